"""ControlNets for FLUX.1: a shallow copy of the transformer that sees a picture to follow, and adds
to the base's image tokens.

    # one for each of its blocks, then one for each of the base's
    samples = controlnet(img, txt, rope, t=t, pooled=pooled, guidance=guidance, hint=hint)
    residuals = spread_samples(samples, controlnet.config, flux.config)
    velocity = flux(img, txt, rope, t=t, …, residuals=residuals)

`Trunk`, embedders and blocks, is Flux's own. The hint is the latents of the control picture
(InstantX, Shakker, Union) or its pixels (XLabs). All that a net adds starts at zero: before
training the base is as it was, bit for bit.

B batch, L tokens (text first, then image), H hidden width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fluxlite.nets.flux import Trunk, initial_weight
from fluxlite.nets.latents import PATCH, pack_latents

HINT_CHANNELS = 16
HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)  # of the convolutions from pixels to latent cells


class ControlNet(Trunk):
    """The ControlNet of diffusers' FluxControlNetModel and of XLabs' x-flux."""

    conditioning = *Trunk.conditioning, "mode_in"

    def __init__(self, config, attention="auto"):
        super().__init__(config, attention)
        hidden = config.hidden_size
        self.hint_in = nn.Linear(config.in_channels, hidden)
        self.mode_in = nn.Embedding(config.num_modes, hidden) if config.num_modes else None
        self.hint_convs = nn.ModuleList(
            hint_convolutions(config.in_channels // PATCH**2) if config.hint == "pixel" else ()
        )
        self.double_out = nn.ModuleList(
            nn.Linear(hidden, hidden) for _ in range(config.num_double_blocks)
        )
        self.single_out = nn.ModuleList(
            nn.Linear(hidden, hidden) for _ in range(config.num_single_blocks)
        )

    def forward(self, img, txt, rope, *, t, pooled, guidance=None, hint, mode=None, scale=1.0):
        """Samples to add to the base's image tokens: a list for its double, one for its single
        blocks, of (B, L_img, H).

        img, txt, rope, t, pooled and guidance are those of `Flux.forward`. hint is (B or 1, L_img,
        in_channels) packed latents of the control picture, or (B or 1, 3, height, width) pixels in
        [-1, 1] where config.hint is "pixel"; mode (B,) int64 the kind of control, for a union net
        and no other. Matches diffusers' FluxControlNetModel. Raises `ValueError`.
        """
        modulation = self.modulate(t, pooled, guidance)
        txt = self.with_mode(self.txt_in(self.cast(txt)), mode)
        return self.samples(img, txt, rope, modulation, self.embed_hint(hint), scale)

    def with_mode(self, txt, mode=None):
        """Projected text (B, L_txt, H) behind a union net's token for `mode` (B,): (B, L_txt + 1,
        H); of other nets as it is.
        """
        if (mode is None) != (self.config.num_modes == 0):
            raise ValueError("mode must be given to a union ControlNet, and to no other")
        return txt if mode is None else torch.cat([self.mode_in(mode)[:, None], txt], dim=1)

    def embed_hint(self, hint):
        """A hint, as `forward` takes it, as tokens (B or 1, L_img, H), which no step changes."""
        hint = self.cast(hint)
        for i, conv in enumerate(self.hint_convs):
            hint = conv(F.silu(hint) if i else hint)
        return self.hint_in(pack_latents(hint) if self.hint_convs else hint)

    def samples(self, img, txt, rope, modulation, hint, scale=1.0):
        """`forward` from what depends on the step alone: txt of `with_mode`, modulation of
        `modulate`, hint of `embed_hint`.

        rope is the base's; a union net's mode token has the position of the first text token.
        """
        mods = self.split_modulation(modulation)
        if self.config.num_modes:
            rope = tuple(torch.cat([table[:1], table]) for table in rope)
        img, after_double, after_single = self.img_in(self.cast(img)) + hint, [], []
        for block, out, mod in zip(self.double_blocks, self.double_out, mods):
            img, txt = block(img, txt, mod, rope, self.attend)
            after_double.append(scale * out(img))
        x = torch.cat([txt, img], dim=1)
        for block, out, mod in zip(self.single_blocks, self.single_out, mods):
            x = block(x, mod, rope, self.attend)
            after_single.append(scale * out(x[:, txt.shape[1] :]))
        return after_double, after_single

    def forward_flops(self, num_text_tokens, num_image_tokens):
        """Floating-point operations of one sample's forward, its outputs included."""
        outputs = len(self.double_out) + len(self.single_out)
        own = (
            2
            * num_image_tokens
            * self.config.hidden_size
            * (outputs * self.config.hidden_size + self.config.in_channels)
        )
        return super().forward_flops(num_text_tokens, num_image_tokens) + own


def hint_convolutions(channels_out):
    """From pixels to latent cells in eight 3x3 convolutions."""
    widths = [3, *[HINT_CHANNELS] * (len(HINT_STRIDES) - 1), channels_out]
    conv = partial(nn.Conv2d, kernel_size=3, padding=1)
    return [conv(a, b, stride=stride) for a, b, stride in zip(widths, widths[1:], HINT_STRIDES)]


# --- starting -------------------------------------------------------------------------------------


def initial_control_weight(config, name, shape, device, generator=None):
    """A parameter's values by Flux's initialisation, with zeros where the net is to start without
    effect.

    That is in its outputs, and in the hint's linear or, of pixels, in the last convolution before
    it: two zeros in a row would never learn.
    """
    hint = "hint_in." if config.hint == "latent" else f"hint_convs.{len(HINT_STRIDES) - 1}."
    if name.startswith(("double_out.", "single_out.", hint)):
        return torch.zeros((), device=device).expand(shape)
    return initial_weight(name, shape, device, generator)


def weights_from_base(controlnet, base, weights, device="cpu", generator=None):
    """A net's weights from those of its base: yields (name, values).

    `controlnet` may be on meta; `base` is the base's configuration, `weights` yields (name, values)
    of its parameters, one after the other. The net gets the embedders, the guidance embedder
    included, the first blocks and their modulation. What the base has not is drawn from `generator`
    or zero, so that the first step equals the base's. Raises `ValueError` where the widths differ
    or the net is deeper than the base.
    """
    config = controlnet.config
    shapes = {name: p.shape for name, p in controlnet.named_parameters()}
    config.check_starts(base)
    for name, values in weights:
        if shapes.pop(name, None) is not None:
            yield name, values
    for name, shape in shapes.items():
        yield name, initial_control_weight(config, name, shape, device, generator)


# --- which block of the base gets which sample ----------------------------------------------------


def place_blocks(num_base, num_control, *, cyclic=False):
    """For each of `num_base` blocks the number of the control block whose sample it gets:
    stretched, or repeated in turn.
    """
    if not num_control:
        return []
    stretch = -(-num_base // num_control)
    return [i % num_control if cyclic else i // stretch for i in range(num_base)]


def block_places(config, base):
    """`place_blocks` of the double and of the single blocks.

    A net that sees pixels repeats its double blocks, as x-flux does.
    """
    double = place_blocks(
        base.num_double_blocks, config.num_double_blocks, cyclic=config.hint == "pixel"
    )
    return double, place_blocks(base.num_single_blocks, config.num_single_blocks)


def spread_samples(samples, config, base):
    """A net's samples as `residuals` of `Flux.forward`: two lists over the blocks of the base.

    Nothing is copied.
    """
    (double, single), (places, single_places) = samples, block_places(config, base)
    return [double[i] for i in places], [single[i] for i in single_places]


def sum_residuals(residuals):
    """The sum of several nets' `residuals`, pairs of lists as long as the base or empty.

    Blocks that get the same tensors share their sum.
    """
    sums = {}

    def total(tensors):
        key = tuple(map(id, tensors))
        if key not in sums:
            sums[key] = sum(tensors[1:], start=tensors[0])
        return sums[key]

    double, single = (zip(*filter(None, of_kind)) for of_kind in zip(*residuals))
    return [total(tensors) for tensors in double], [total(tensors) for tensors in single]


def count_used(num_base, num_control, *, cyclic=False):
    """How many control blocks, from the first on, have a sample that some base block gets."""
    return 1 + max(place_blocks(num_base, num_control, cyclic=cyclic), default=-1)


def nearest_depth(num_base, num_control):
    """The number of control blocks nearest to `num_control` of which stretching wastes none; of two
    the smaller.
    """
    lossless = [n for n in range(num_base + 1) if count_used(num_base, n) == n]
    return min(lossless, key=lambda n: (abs(n - num_control), n))


def unused_parameters(controlnet, base):
    """Names of parameters that can get no gradient beside a base of configuration `base`.

    They are blocks whose samples nobody gets, and what lies behind the last that counts: where that
    is a double block, its text stream but for keys and values. Of that stream's modulation, one
    linear, only the shift and scale before attention count. It is trained whole: four rows in six
    get no gradient, and weight decay shrinks them towards zero, which no output shows.
    """
    config = controlnet.config
    double, single = (1 + max(places, default=-1) for places in block_places(config, base))
    blocks = double if not single else config.num_double_blocks  # single blocks see all doubles
    found = []
    for i in range(blocks, config.num_double_blocks):
        found += [f"double_blocks.{i}.", f"modulation.img.{i}.", f"modulation.txt.{i}."]
    for i in range(single, config.num_single_blocks):
        found += [f"single_blocks.{i}.", f"modulation.single.{i}.", f"single_out.{i}."]
    found += [f"double_out.{i}." for i in range(double, config.num_double_blocks)]
    if not single and double:
        parts = ("qkv.q.", "qkv.q_norm.", "proj.", "mlp.")
        found += [f"double_blocks.{double - 1}.txt.{part}" for part in parts]
    return [name for name, _ in controlnet.named_parameters() if name.startswith(tuple(found))]
