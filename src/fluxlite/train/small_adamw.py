"""AdamW in less memory: moments in 8 bits, and weights in bfloat16 that are rounded stochastically.

A matrix's moments are a byte each: m, and the root of v, which spans half as many decades. Codes
are bitsandbytes' dynamic map (arXiv 2110.02861). A block of up to 128 columns of a row has a
scale, its largest value. Vectors keep float32 moments, and so do matrices whose rows have no such
blocks.

Blocks are those of the whole matrix, and a step is computed element by element. So ranks that share
a matrix compute the bits of one, and a checkpoint is gone on from on any mesh.
"""

import math

import torch
from torch.distributed.tensor import DTensor

from fluxlite.data.transfers import send_tensor
from fluxlite.parallel.weights import local_part, local_tensor

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16  # columns that share a scale
MOMENTS = "mean", "root"  # of the gradient, of its square
AT_ONCE = 1 << 24  # elements that a step computes in float32 at once


def columns_of_block(shape):
    """The columns that share a scale in a matrix, or 0 where its moments stay float32."""
    block = math.gcd(shape[-1], LARGEST_BLOCK) if len(shape) == 2 else 0
    return block if block >= SMALLEST_BLOCK else 0


def dynamic_levels(signed):
    """The 256 values of a byte, sorted: seven decades, each with twice the values of the one below;
    0 and 1.
    """
    found = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1)
        means = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        found += [means, -means] if signed else [means]
    return torch.cat(found).sort().values


def encode_moments(values, block, levels):
    """(codes, scales) of float32 moments (rows, columns), to the nearest of `dynamic_levels`."""
    blocks = values.unflatten(1, (-1, block))
    scales = blocks.abs().amax(2)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, middles, out_int32=True)
    return codes.to(torch.uint8).flatten(1), scales


def decode_moments(codes, scales, levels):
    """The moments (rows, columns) of codes and scales."""
    blocks = levels[codes.int()].unflatten(1, (scales.shape[1], -1))
    return blocks.mul_(scales[..., None]).flatten(1)


# --- stochastic rounding --------------------------------------------------------------------------


def mix_bits(x):
    """int32 numbers whose bits depend on all bits of x (the constants are lowbias32's)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * -0x7B935975
    return x ^ (x >> 16)


def element_bits(part, key, device):
    """16 random bits for each element of a `local_part` of a tensor, int32: they depend on the key
    and on where the element is in the whole.
    """
    words, bits = (key & 0x7FFFFFFF, key >> 31 & 0x7FFFFFFF), None
    for word, piece in zip(words, part):
        places = torch.arange(piece.start, piece.stop, dtype=torch.int32, device=device)
        places = mix_bits(places + word)
        bits = places if bits is None else bits[:, None] + mix_bits(places)
    return mix_bits(bits) & 0xFFFF


def round_randomly(values, bits):
    """float32 values as bfloat16, up or down so that the mean is the value itself; `bits` are
    `element_bits`.
    """
    return ((values.view(torch.int32) + bits) & -0x10000).view(torch.float32).to(torch.bfloat16)


# --- a step ---------------------------------------------------------------------------------------


class SmallAdamW(torch.optim.Optimizer):
    """AdamW of weights in float32 or bfloat16, its moments in 8 bits unless `bits` is 32.

    `found_inf` and `grad_scale` are as torch's fused optimizers have them. `round_key`, a number
    that is another in each step, decides how bfloat16 weights are rounded. `numbers` are those of
    the parameters, {parameter: its place in the model}.
    """

    def __init__(self, groups, *, lr, betas, eps, bits, numbers):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        self.bits, self.numbers, self.round_key = bits, numbers, 0
        self.levels = {}  # of each device
        for group in self.param_groups:
            for p in group["params"]:
                check_blocks(p, self.block_of(p))

    def levels_on(self, device):
        """{moment: its `dynamic_levels`} on a device."""
        if device not in self.levels:
            found = {name: dynamic_levels(name == "mean") for name in MOMENTS}
            self.levels[device] = {name: send_tensor(f, device) for name, f in found.items()}
        return self.levels[device]

    def block_of(self, p):
        return columns_of_block(p.shape) if self.bits == 8 else 0

    @torch.no_grad()
    def step(self, closure=None):
        """One step; none where the tensor `found_inf`, if it is set, is 1."""
        if closure is not None:
            raise ValueError("SmallAdamW takes no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group, self.state[p] or self.start(p))

    def load_state_dict(self, state_dict):
        """As every optimizer's, which casts a state to its weight's type; codes stay codes."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for p, place in zip(group["params"], saved["params"]):
                self.state[p] = dict(state_dict["state"].get(place, {}))

    def start(self, p):
        """A parameter's state: codes and scales, plain tensors or DTensors that lie as it does."""
        state, block = self.state[p], self.block_of(p)
        state["step"] = torch.zeros((), device=p.device)
        for name, levels in self.levels_on(p.device).items():
            values = torch.zeros_like(local_tensor(p), dtype=torch.float32)
            if block:
                values, scales = encode_moments(values, block, levels)
                state[f"{name}_scales"] = laid_out_as(p, scales, block)
            state[name] = laid_out_as(p, values)
        return state

    def update(self, p, group, state):
        """Step one parameter, some of its rows at a time."""
        device, skipped = p.device, getattr(self, "found_inf", None)
        skipped = torch.zeros(()) if skipped is None else skipped
        skipped = skipped.to(device) > 0
        state["step"] += 1 - skipped.float()
        scale = getattr(self, "grad_scale", None)
        scale = 1.0 if scale is None else scale.to(device)
        parts = {name: local_tensor(value) for name, value in state.items() if name != "step"}
        parts |= {"weight": local_tensor(p), "grad": local_tensor(p.grad)}
        rows = max(1, AT_ONCE // max(1, parts["weight"][:1].numel()))
        where, key = local_part(p), mix_key(self.round_key, self.numbers[p])
        for first in range(0, len(parts["weight"]), rows):
            some = {name: part[first : first + rows] for name, part in parts.items()}
            new = self.stepped(some, group, state["step"], scale)
            if p.dtype == torch.bfloat16:
                begin = where[0].start + first
                piece = slice(begin, begin + len(new["weight"])), *where[1:]
                bits = element_bits(piece, key, device)
                new["weight"] = round_randomly(new["weight"], bits)
            for name, value in new.items():
                some[name].copy_(torch.where(skipped, some[name], value))

    def stepped(self, some, group, step, scale):
        """What rows of a parameter and its state become: {name: values}."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        grad = some["grad"].float() / scale
        levels = self.levels_on(grad.device)
        mean, root = (read_moment(some, name, levels[name]) for name in MOMENTS)
        mean = mean.lerp(grad, 1 - beta1)
        root = (beta2 * root.square()).addcmul_(grad, grad, value=1 - beta2).sqrt_()
        bias1, bias2 = 1 - beta1**step, (1 - beta2**step).sqrt()
        weight = some["weight"].float() * (1 - lr * group["weight_decay"])
        weight = weight - lr / bias1 * mean / (root / bias2 + group["eps"])
        found = {"weight": weight}
        for name, values in zip(MOMENTS, (mean, root)):
            found |= stored_moment(some, name, values, levels[name])
        return found


def check_blocks(p, block):
    """Raise `ValueError` where tensor parallelism would split a block of columns."""
    columns = local_part(p)[-1] if block else None
    if block and (columns.start % block or columns.stop % block):
        raise ValueError(
            f"optim.kind=adamw8bit: {p.shape[1]} columns in blocks of {block} do not divide among "
            "parallel.tp ranks: choose a smaller parallel.tp, or adamw"
        )


def laid_out_as(p, local, block=1):
    """This rank's part of a tensor as p has it, a column for each `block` of p's: a DTensor where p
    is one.
    """
    if not isinstance(p, DTensor):
        return local
    shape = (p.shape[0], p.shape[1] // block) if p.ndim == 2 else p.shape
    stride = torch.empty(shape, device="meta").stride()
    about = dict(run_check=False, shape=torch.Size(shape), stride=stride)
    return DTensor.from_local(local, p.device_mesh, p.placements, **about)


def mix_key(key, number):
    """A key of 62 bits for a parameter's number."""
    return (key ^ (number + 1) * 0x9E3779B97F4A7C15) & (1 << 62) - 1


def read_moment(some, name, levels):
    """A moment in float32."""
    scales = some.get(f"{name}_scales")
    return some[name] if scales is None else decode_moments(some[name], scales, levels)


def stored_moment(some, name, values, levels):
    """A moment as it is stored: {name: values}."""
    scales = some.get(f"{name}_scales")
    if scales is None:
        return {name: values}
    made = encode_moments(values, values.shape[1] // scales.shape[1], levels)
    return dict(zip((name, f"{name}_scales"), made))
