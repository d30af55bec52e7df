"""FLUX.1's transformer: velocities for image tokens, given text tokens, pooled text, t and
guidance.

`Flux.forward` is the paper's figure. What depends on the step alone (`modulate`) is apart from what
depends on the latents (`velocity`). Training calls `forward`; sampling computes the modulation of
all steps at once and calls `velocity`. `Trunk` is what a ControlNet (`controlnet`) shares with it.

B batch, L tokens (text first, then image), H hidden width, N heads, D head width.

Weights lie as diffusers publishes them: rows, columns, order of chunks and rotation pairs. Two
things are arranged otherwise, and neither moves a number:
* All modulation is in one module outside the blocks: 27 % of the parameters, 0.009 % of the FLOPs.
* The single block's last linear is two, since tensor parallelism splits its columns: attention's
  and the MLP's. Their products are added, and the one bias is with the MLP's.
"""

import itertools
import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SINUSOID = 256


def sinusoid(x):
    """Embed x (B,) as (B, 256) in float32: cos, then sin of 1000·x at frequencies from 1 to
    1/10,000.
    """
    half = SINUSOID // 2
    exponents = torch.arange(half, dtype=torch.float32, device=x.device)
    frequencies = torch.exp(-math.log(10_000) * exponents / half)
    angles = 1000 * x.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(ids, config):
    """Rotations for positions ids (L, axes): the `pair_tables` (L, 1, D) of float64 angles."""
    angles = []
    for axis, width in enumerate(config.rope_axes):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[:, axis, None].double() * config.rope_theta**-exponents)
    return pair_tables(torch.cat(angles, dim=-1)[:, None])


def pair_tables(angles):
    """Two float32 tables (…, D) of angles (…, D/2): cos twice for each pair, and −sin, then sin."""
    cos, sin = angles.cos().float(), angles.sin().float()
    return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)


def rotate_pairs(x, cos, sin, sign=1):
    """Turn the pairs (0, 1), (2, 3) … of x (B, L, N, D) by angles, or with sign -1 back.

    cos and sin are `pair_tables` (L, 1, D), and the products float32 as they are.
    """
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).view_as(x)
    # an accelerator rounds what it writes, and so does a graph; a CPU would write it twice
    plain = x.device.type == "cpu" or torch.compiler.is_compiling()
    rounded = None if plain else torch.empty_like(x, memory_format=torch.contiguous_format)
    turned = torch.addcmul(x * cos, swapped, sin, value=sign, out=rounded)
    # `.to` of the same dtype is an alias: as a Function's output, compiled by torch 2.11, it has
    # no gradient
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


class Rotate(torch.autograd.Function):
    """`rotate_pairs` of q and k; the backward turns back, in fewer passes than autograd's."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        return rotate_pairs(dq, cos, sin, sign=-1), rotate_pairs(dk, cos, sin, sign=-1), None, None


def rotate(q, k, cos, sin):
    """q and k (B, L, N, D), rotated; where no gradient is wanted, without what autograd costs."""
    if torch.is_grad_enabled():
        return Rotate.apply(q, k, cos, sin)
    return rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)


class ContiguousGradient(torch.autograd.Function):
    """x as it is; its gradient is contiguous, as x is.

    Torch keeps a plan of cuDNN's attention backward for shapes, and strides of q, k and v, but not
    of the gradient (ATen/native/cudnn/MHA.cpp): at other strides than the first it reads wrong
    memory. Measured with torch 2.11, cuDNN 9.19.
    """

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


def attend(q, k, v, rope, backend="auto"):
    """Attention of normed q, k and v (B, L, N, D) after rotation by tables (L, 1, D): (B, L, N·D).

    Tokens come before heads in memory, as cuDNN and flash lay out their output: nothing is copied.
    """
    chosen = ATTENTION[backend]
    heads = [x.transpose(1, 2) for x in (*rotate(q, k, *rope), v)]
    with sdpa_kernel(chosen) if chosen is not None else nullcontext():
        out = F.scaled_dot_product_attention(*heads)
    out = out.transpose(1, 2).flatten(2)
    if out.is_cuda and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out = ContiguousGradient.apply(out)
    return out


def modulated_norm(x, shift, factor):
    """LayerNorm without weights, then factor·x + shift; shift and factor are (B, 1, H).

    The factor is 1 + scale, as `Trunk.modulate` gives it.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), factor)


def initial_weight(name, shape, device, generator=None):
    """A parameter's values by DiT's initialisation (arXiv 2212.09748).

    Linears are xavier, embedders N(0, 0.02), the ends zero. Queries, keys and values are as if they
    were one linear of three times the width, which they are in BFL's code.
    """
    if name.endswith("norm.weight"):
        return torch.ones((), device=device).expand(shape)
    if len(shape) == 1 or name.startswith(("modulation.", "out.")):
        return torch.zeros((), device=device).expand(shape)
    values = torch.empty(shape, device=device)
    if name.startswith(("time_in.", "guidance_in.", "pooled_in.")):
        return nn.init.normal_(values, std=0.02, generator=generator)
    gain = 0.5**0.5 if ".qkv." in name else 1.0
    return nn.init.xavier_uniform_(values, gain=gain, generator=generator)


class MLP(nn.Module):
    """Linear, tanh GELU or SiLU, linear."""

    def __init__(self, width_in, hidden, width_out, activation):
        super().__init__()
        self.linear_in = nn.Linear(width_in, hidden)
        self.linear_out = nn.Linear(hidden, width_out)
        self.activation = activation

    def forward(self, x):
        x = x.to(self.linear_in.bias.dtype)  # a quantised weight is no tensor
        linear = self.linear_in
        if self.activation is gelu and can_fuse_gelu(linear, x):
            fused = torch.ops.mkldnn._linear_pointwise
            return self.linear_out(fused(x, linear.weight, linear.bias, "gelu", [], "tanh"))
        return self.linear_out(self.activation(linear(x)))


def gelu(x):
    """GELU by tanh, as FLUX.1 was trained with."""
    return F.gelu(x, approximate="tanh")


def can_fuse_gelu(linear, x):
    """Whether oneDNN can compute a linear and its GELU at once: 5 % of that product on a CPU.

    That is in bfloat16 on a CPU, where no gradient is wanted and no compiler is at work. An adapter
    or a hook, which the fused operator would pass by, keeps a linear as it is.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    return torch.backends.mkldnn.is_available() and is_plain_linear(linear)


def is_plain_linear(linear):
    """Whether a linear is x·Wᵀ + b and no more: no adapter, no hook, no sharded weight."""
    if type(linear) is not nn.Linear or "forward" in linear.__dict__:
        return False
    hooked = linear._forward_hooks or linear._forward_pre_hooks
    return not hooked and type(linear._parameters["weight"]) in (nn.Parameter, torch.Tensor)


class FanOut(torch.autograd.Function):
    """Linears that read the same x; parameters are weight and bias of each, `last` the last
    dimensions of their outputs.

    The backward adds up the gradient of x inside the products. Autograd would write one for each
    linear and add them in passes of their own.
    """

    @staticmethod
    def forward(ctx, x, last, *parameters):
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, *weights)
        shape = *x.shape[:-1], *last
        return tuple(F.linear(x, *pair).view(shape) for pair in zip(weights, biases))

    @staticmethod
    def backward(ctx, *gradients):
        x, *weights = ctx.saved_tensors
        rows, trained = x.flatten(0, -2), ctx.needs_input_grad[2:]
        flat, dx = (rows.shape[0], -1), None
        gradients = [g.reshape(flat) for g in gradients]
        if ctx.needs_input_grad[0]:
            for gradient, weight in zip(gradients, weights):
                # in place: a sum elsewhere would be copied there first
                dx = gradient.mm(weight) if dx is None else dx.addmm_(gradient, weight)
            dx = dx.view_as(x)
        of_each = by_joining if x.ndim == 2 else one_by_one
        of_weights = of_each(lambda g: g.t().mm(rows), gradients, trained[::2])
        of_biases = of_each(lambda g: g.sum(0), gradients, trained[1::2])
        return dx, None, *itertools.chain.from_iterable(zip(of_weights, of_biases))


def one_by_one(differentiate, gradients, trained):
    """What `differentiate` makes of each gradient (rows, features); None for what is frozen."""
    return [differentiate(g) if wanted else None for g, wanted in zip(gradients, trained)]


def by_joining(differentiate, gradients, trained):
    """`one_by_one` at once, for rows so few that joining them costs less than many kernels."""
    chosen = [g for g, wanted in zip(gradients, trained) if wanted]
    if not chosen:
        return [None] * len(trained)
    parts = iter(differentiate(torch.cat(chosen, dim=1)).split([g.shape[1] for g in chosen]))
    return [next(parts) if wanted else None for wanted in trained]


def fan_out(x, linears, last=(-1,)):
    """What each of some linears makes of x (…, H), with the last dimensions `last`: a tuple."""
    if torch.is_grad_enabled() and all(map(is_plain_linear, linears)):
        parameters = (linear._parameters.values() for linear in linears)  # weight and bias
        return FanOut.apply(x, last, *itertools.chain.from_iterable(parameters))
    return tuple(linear(x).view(*x.shape[:-1], *last) for linear in linears)


class QKV(nn.Module):
    """One stream's queries, keys and values, the first two normed per head: (B, L, N, D) each."""

    def __init__(self, hidden, num_heads):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.q_norm = nn.RMSNorm(hidden // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(hidden // num_heads, eps=1e-6)

    def forward(self, x):
        q, k, v = fan_out(x, (self.q, self.k, self.v), (-1, self.q_norm.weight.shape[0]))
        return self.q_norm(q), self.k_norm(k), v


class Stream(nn.Module):
    """What a double block holds for one of text and image."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.qkv = QKV(hidden, config.num_heads)
        self.proj = nn.Linear(hidden, hidden)
        self.mlp = MLP(hidden, config.mlp_ratio * hidden, hidden, gelu)

    def queries(self, x, shift, scale):
        """Queries, keys and values (B, L, N, D) of x (B, L, H); shift, 1 + scale: (B, 1, H)."""
        return self.qkv(modulated_norm(x, shift, scale))

    def finish(self, x, attention, gate, mlp_shift, mlp_scale, mlp_gate):
        """x (B, L, H) with what attention (B, L, H) found, then with the MLP's, each gated."""
        x = torch.addcmul(x, gate, self.proj(attention))
        return torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, mlp_shift, mlp_scale)))


class DoubleBlock(nn.Module):
    """Text and image with weights of their own, joined in attention."""

    def __init__(self, config):
        super().__init__()
        self.img = Stream(config)
        self.txt = Stream(config)

    def forward(self, img, txt, modulation, rope, attend=attend):
        """img (B, L_img, H), txt (B, L_txt, H); modulation: (B, 1, H) twelve times, first the
        image's six.
        """
        img_mod, txt_mod = modulation[:6], modulation[6:]
        txt_qkv, img_qkv = self.txt.queries(txt, *txt_mod[:2]), self.img.queries(img, *img_mod[:2])
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv))
        lengths = [txt_qkv[0].shape[1], img_qkv[0].shape[1]]
        txt_out, img_out = attend(q, k, v, rope).split(lengths, dim=1)
        img = self.img.finish(img, img_out, *img_mod[2:])
        return img, self.txt.finish(txt, txt_out, *txt_mod[2:])


class SingleBlock(nn.Module):
    """Attention and MLP side by side over the joint sequence."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.qkv = QKV(hidden, config.num_heads)
        self.proj = nn.Linear(hidden, hidden, bias=False)
        self.mlp = MLP(hidden, config.mlp_ratio * hidden, hidden, gelu)
        # where tensor parallelism hands h out and adds the shares up, once
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, x, modulation, rope, attend=attend):
        """x (B, L, H), modulation: (B, 1, H) three times."""
        shift, scale, gate = modulation
        h = self.enter(modulated_norm(x, shift, scale))
        out = self.leave(self.proj(attend(*self.qkv(h), rope)) + self.mlp(h))
        return torch.addcmul(x, gate, out)


class Modulation(nn.Module):
    """The linears from vec to every shift, scale and gate, as published: one or two a block."""

    def __init__(self, config):
        super().__init__()
        linear = partial(nn.Linear, config.hidden_size)
        six, three, two = (chunks * config.hidden_size for chunks in (6, 3, 2))
        self.img = nn.ModuleList(linear(six) for _ in range(config.num_double_blocks))
        self.txt = nn.ModuleList(linear(six) for _ in range(config.num_double_blocks))
        self.single = nn.ModuleList(linear(three) for _ in range(config.num_single_blocks))
        self.out = linear(two) if config.out_channels else None  # a ControlNet has no end

    def linears(self):
        """All of them, in the order that the network uses them."""
        double = itertools.chain.from_iterable(zip(self.img, self.txt))
        return [*double, *self.single] + ([self.out] if self.out else [])

    def forward(self, vec):
        """vec (B, H) to (B, features): a double block's 6H of the image, then of the text, …"""
        return torch.cat(fan_out(vec, self.linears()), dim=-1)


class Trunk(nn.Module):
    """What Flux and its ControlNets are alike in: embedders, modulation, blocks."""

    joins_tokens = False  # whether ranks that share tokens join those of its output
    is_whole = False  # whether each data-parallel rank has all of it
    conditioning = (
        "modulation",
        "time_in",
        "guidance_in",
        "pooled_in",
        "txt_in",
    )  # no step uses them

    def __init__(self, config, attention="auto"):
        super().__init__()
        config.validate()
        self.config, self.attend = config, partial(attend, backend=attention)
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.txt_in = nn.Linear(config.text_width, hidden)
        self.time_in = MLP(SINUSOID, hidden, hidden, F.silu)
        self.guidance_in = MLP(SINUSOID, hidden, hidden, F.silu) if config.guidance_embed else None
        self.pooled_in = MLP(config.pooled_width, hidden, hidden, F.silu)
        self.modulation = Modulation(config)
        doubles, singles = range(config.num_double_blocks), range(config.num_single_blocks)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in doubles)
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in singles)

    def modulate(self, t, pooled, guidance=None):
        """Every shift, 1 + scale and gate of the network for B steps or samples: (chunks, B, 1, H).

        `split_modulation` gives each block its part, and the end its own.
        """
        if self.modulation is None:
            raise ValueError(
                "drop_conditioning has freed the weights of the modulation: load the model again"
            )
        if (guidance is None) == self.config.guidance_embed:
            raise ValueError(
                "guidance must be given to a model with guidance_embed, and to no other"
            )
        vec = self.time_in(sinusoid(t)) + self.pooled_in(pooled)
        if guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance))
        features = self.modulation(F.silu(vec))
        chunks = rearrange(features, "b (m h) -> m b 1 h", h=self.config.hidden_size)
        return chunks + self.scale_offsets(chunks)

    def split_modulation(self, modulation):
        """The vectors (B, 1, H) of each block in turn, then of the end. They are taken apart once:
        each slice would have a backward of its own.
        """
        vectors = iter(modulation.unbind())
        return (tuple(itertools.islice(vectors, n)) for n in self.config.modulation_chunks)

    def scale_offsets(self, chunks):
        """1 for each scale among the chunks, else 0: (chunks, 1, 1, 1)."""
        offsets = chunks.new_zeros(len(chunks), 1, 1, 1)
        offsets[1 : 3 * (len(chunks) // 3) : 3] = 1  # shift, scale, gate, shift, …
        if self.config.out_channels:  # at the end scale comes first
            offsets[-2] = 1
        return offsets

    def drop_conditioning(self):
        """Free the weights that the steps do not use, 27 % of FLUX.1-dev.

        `forward` and `modulate` then raise `ValueError`.
        """
        for name in self.conditioning:
            setattr(self, name, None)

    def cast(self, x):
        return x.to(self.img_in.weight.dtype)

    def num_parameters(self):
        """Parameters, embedders and modulation included: 11,901,408,320 for FLUX.1-dev."""
        return sum(p.numel() for p in self.parameters())

    def forward_flops(self, num_text_tokens, num_image_tokens):
        """Floating-point operations of one sample's forward, two to a multiply-add.

        A training step takes three times as many. A double block's stream has H·3H + H·H + 2·rH·H
        weights, 12H² at MLP ratio r = 4, and each token passes one stream; a single block has as
        many. So linears cost 2·L·(4 + 2r)·H² a block, and attention 4·L²·H a block (q·k and
        weights·v). Modulation and embedders run once a sample.
        """
        c, hidden = self.config, self.config.hidden_size
        blocks = c.num_double_blocks + c.num_single_blocks
        tokens = num_text_tokens + num_image_tokens
        linears = 2 * tokens * (4 + 2 * c.mlp_ratio) * hidden**2 * blocks
        attention = 4 * tokens**2 * hidden * blocks
        modulation = 2 * sum(c.modulation_chunks) * hidden**2
        sinusoids = 2 if c.guidance_embed else 1
        vec = (SINUSOID + hidden) * sinusoids + c.pooled_width + hidden
        image_channels = c.in_channels + c.out_channels
        ends = num_text_tokens * c.text_width + num_image_tokens * image_channels
        return linears + attention + modulation + 2 * hidden * (vec + ends)


class Flux(Trunk):
    """The rectified-flow transformer of FLUX.1."""

    joins_tokens = True

    def __init__(self, config, attention="auto"):
        super().__init__(config, attention)
        self.out = nn.Linear(config.hidden_size, config.out_channels)

    def forward(self, img, txt, rope, *, t, pooled, guidance=None, residuals=None):
        """Velocity (B, L_img, out_channels) of noisy tokens img (B, L_img, in_channels).

        txt (B, L_txt, text_width) and pooled (B, pooled_width) are the encoders' outputs, t and
        guidance (B,) float32 with t in [0, 1], rope the `rope_table` of text and image. `residuals`
        are two lists, of tensors (B, L_img, H) to add to the image after each double and each
        single block. Matches diffusers' FluxTransformer2DModel.
        """
        modulation = self.modulate(t, pooled, guidance)
        return self.velocity(img, self.txt_in(self.cast(txt)), rope, modulation, residuals)

    def velocity(self, img, txt, rope, modulation, residuals=None):
        """`forward` from txt (B, L_txt, H) of `txt_in` and the modulation of `modulate`."""
        mods = self.split_modulation(modulation)
        after_double, after_single = residuals or ((), ())
        img = self.img_in(self.cast(img))
        for i, (block, mod) in enumerate(zip(self.double_blocks, mods)):
            img, txt = block(img, txt, mod, rope, self.attend)
            if i < len(after_double):
                img = img + after_double[i]
        x = torch.cat([txt, img], dim=1)
        for i, (block, mod) in enumerate(zip(self.single_blocks, mods)):
            x = block(x, mod, rope, self.attend)
            if i < len(after_single):
                x = x + F.pad(after_single[i], (0, 0, txt.shape[1], 0))
        scale, shift = next(mods)  # here scale comes first, as diffusers has it
        return self.out(modulated_norm(x[:, txt.shape[1] :], shift, scale))
