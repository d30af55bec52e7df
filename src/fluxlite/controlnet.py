"""ControlNets for FLUX.1: a shallow copy of the transformer that sees a picture to follow, and adds to the base's image tokens.

    samples = controlnet(img, txt, rope, t=t, pooled=pooled, guidance=guidance, hint=hint)        # one for each of its blocks
    velocity = flux(img, txt, rope, t=t, …, residuals=spread(samples, controlnet.config, flux.config))  # one for each of the base's

`Trunk`, embedders and blocks, is Flux's own. The hint is the latents of the control picture (InstantX, Shakker, Union) or its
pixels (XLabs). All that a net adds starts at zero: before training the base is as it was, bit for bit.

B batch, L tokens (text first, then image), H hidden width.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fluxlite.cli.options import check_options, option
from fluxlite.latents import pack_latents
from fluxlite.model import MAX_BLOCKS, FluxConfig, Trunk, initial
from fluxlite.streams import Piece

HINTS = ("latent", "pixel")
MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "lq": 6}  # of the published Union nets
HINT_CHANNELS = 16
HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)  # of the convolutions from pixels to latent cells


@dataclass
class ControlNetConfig(FluxConfig):
    """The shape of a ControlNet: a depth of its own, and for the rest the widths of its base."""

    num_double_blocks: int = option(
        4, "double blocks of the ControlNet", at_least=0, at_most=MAX_BLOCKS
    )
    num_single_blocks: int = option(
        10, "single blocks of the ControlNet", at_least=0, at_most=MAX_BLOCKS
    )
    hint: str = option(
        "latent",
        "what it sees of the control picture: latent, or pixel (XLabs)",
        choices=HINTS,
    )
    num_modes: int = option(
        0,
        "kinds of control that it tells apart (union); 0 for one kind",
        at_least=0,
        at_most=1000,
    )
    out_channels: ClassVar[int] = 0  # there is no final layer

    def validate(self):
        """Raise `ValueError` for a shape that no ControlNet can have."""
        own = ("num_double_blocks", "num_single_blocks", "hint", "num_modes")
        check_options(self, "controlnet.", only=own)
        if self.hint == "pixel" and self.in_channels % 4:
            raise ValueError(f"controlnet.hint=pixel needs model.in_channels={self.in_channels} to be a multiple of 4")
        if not self.num_double_blocks + self.num_single_blocks:
            raise ValueError("controlnet.num_double_blocks=0 and controlnet.num_single_blocks=0 leave nothing: set one of them")
        super().validate()

    @property
    def modulation_chunks(self):
        """Vectors of width H that modulate the network: 6 a stream of a double block, 3 a single block."""
        return 12 * self.num_double_blocks + 3 * self.num_single_blocks

    @classmethod
    def beside(cls, base, **changes):
        """A configuration with the widths of `base`, a `FluxConfig`, and the depth, hint and modes of `changes`."""
        own = {"num_double_blocks", "num_single_blocks", "hint", "num_modes"}
        return cls(**{f.name: getattr(base, f.name) for f in fields(cls) if f.name not in own} | changes)


class ControlNet(Trunk):
    """The ControlNet of diffusers' FluxControlNetModel and of XLabs' x-flux."""

    def __init__(self, config, attention="auto"):
        super().__init__(config, attention)
        hidden = config.hidden_size
        self.hint_in = nn.Linear(config.in_channels, hidden)
        self.mode_in = nn.Embedding(config.num_modes, hidden) if config.num_modes else None
        self.hint_convs = nn.ModuleList(convolutions(config.in_channels // 4) if config.hint == "pixel" else ())
        self.double_out = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(config.num_double_blocks))
        self.single_out = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(config.num_single_blocks))

    def forward(self, img, txt, rope, *, t, pooled, guidance=None, hint, mode=None, scale=1.0):
        """Samples to add to the base's image tokens: a list for its double, one for its single blocks, of (B, L_img, H).

        img, txt, rope, t, pooled and guidance are those of `Flux.forward`. hint is (B or 1, L_img, in_channels) packed latents of
        the control picture, or (B or 1, 3, height, width) pixels in [-1, 1] where config.hint is "pixel"; mode (B,) int64 the kind
        of control, for a union net and no other. Matches diffusers' FluxControlNetModel. Raises `ValueError`.
        """
        modulation = self.modulate(t, pooled, guidance)
        txt = self.with_mode(self.txt_in(self.cast(txt)), mode)
        return self.samples(img, txt, rope, modulation, self.embed_hint(hint), scale)

    def with_mode(self, txt, mode=None):
        """Projected text (B, L_txt, H) behind a union net's token for `mode` (B,): (B, L_txt + 1, H); of other nets as it is."""
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
        """`forward` from what depends on the step alone: txt of `with_mode`, modulation of `modulate`, hint of `embed_hint`.

        rope is the base's; a union net's mode token has the position of the first text token.
        """
        double, single, _ = self.split_modulation(modulation)
        if self.config.num_modes:
            rope = tuple(torch.cat([table[:1], table]) for table in rope)
        img, after_double, after_single = self.img_in(self.cast(img)) + hint, [], []
        for block, mod, out in zip(self.double_blocks, double, self.double_out):
            img, txt = block(img, txt, mod, rope, self.attend)
            after_double.append(scale * out(img))
        x = torch.cat([txt, img], dim=1)
        for block, mod, out in zip(self.single_blocks, single, self.single_out):
            x = block(x, mod, rope, self.attend)
            after_single.append(scale * out(x[:, txt.shape[1] :]))
        return after_double, after_single

    def forward_flops(self, num_text_tokens, num_image_tokens):
        """Floating-point operations of one sample's forward, its outputs included."""
        outputs = len(self.double_out) + len(self.single_out)
        own = 2 * num_image_tokens * self.config.hidden_size * (outputs * self.config.hidden_size + self.config.in_channels)
        return super().forward_flops(num_text_tokens, num_image_tokens) + own

    def drop_conditioning(self):
        """Free the weights that `embed_hint` and `samples` do not use; `forward` and `modulate` then raise `ValueError`."""
        super().drop_conditioning()
        self.mode_in = None

    def initialise(self, generator=None):
        """Fill all parameters with what `initial_value` gives."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_value(self.config, name, parameter.shape, parameter.device, generator))
        return self


def convolutions(channels_out):
    """From pixels to latent cells in eight 3x3 convolutions."""
    widths = [3, *[HINT_CHANNELS] * (len(HINT_STRIDES) - 1), channels_out]
    conv = partial(nn.Conv2d, kernel_size=3, padding=1)
    return [conv(a, b, stride=stride) for a, b, stride in zip(widths, widths[1:], HINT_STRIDES)]


# --- starting -------------------------------------------------------------------------------------------------------------------


def initial_value(config, name, shape, device, generator=None):
    """A parameter's values by Flux's initialisation, with zeros where the net is to start without effect.

    That is in its outputs, and in the hint's linear or, of pixels, in the last convolution before it: two zeros in a row would
    never learn.
    """
    hint = "hint_in." if config.hint == "latent" else f"hint_convs.{len(HINT_STRIDES) - 1}."
    if name.startswith(("double_out.", "single_out.", hint)):
        return torch.zeros((), device=device).expand(shape)
    return initial(name, shape, device, generator)


def pieces_from_base(controlnet, base, pieces, device="cpu", generator=None):
    """A net's weights from those of its base: yields (`streams.Piece`, values), each of which `pieces` or a draw gives.

    `controlnet` may be on meta; `base` is the base's configuration, `pieces` its weights as `checkpoint.pieces` yields them, one
    after the other. The net gets the embedders, the guidance embedder included, the first blocks and their modulation; what the
    base has not is drawn from `generator`, or zero, so that the first step equals the base's. Raises `ValueError` where the widths
    differ or the net is deeper than the base.
    """
    config, shapes = controlnet.config, {name: p.shape for name, p in controlnet.named_parameters()}
    check_starts(config, base)
    doubles, singles = 12 * config.num_double_blocks * config.hidden_size, 3 * config.num_single_blocks * config.hidden_size
    of_singles = 12 * base.num_double_blocks * config.hidden_size
    moved = [(0, doubles, 0), (of_singles, of_singles + singles, doubles)]  # rows of the base's modulation from … to, and where to
    for piece, values in pieces:
        for first, last, to in moved if piece.name.startswith("modulation.") else ():
            start, stop = max(piece.start, first), min(piece.start + len(values), last)
            if start < stop:
                yield Piece(piece.name, start - first + to, stop - first + to), values[start - piece.start : stop - piece.start]
        if piece.name in shapes and not piece.name.startswith("modulation."):
            yield piece, values
    for name, shape in shapes.items():
        if name.startswith(("hint_in.", "mode_in.", "hint_convs.", "double_out.", "single_out.")):
            yield Piece(name), initial_value(config, name, shape, device, generator)


@torch.no_grad()
def init_from_base(controlnet, base, generator=None):
    """Start from a `Flux`, as `pieces_from_base` says; returns the net."""
    parameters, pieces = dict(controlnet.named_parameters()), ((Piece(name), value) for name, value in base.state_dict().items())
    for piece, values in pieces_from_base(controlnet, base.config, pieces, controlnet.hint_in.weight.device, generator):
        parameters[piece.name][piece.start : piece.stop].copy_(values)
    return controlnet


def check_starts(config, base):
    """Raise `ValueError` unless a ControlNet of `config` can start from a transformer of configuration `base`."""
    check_fits(config, base, "the ControlNet")
    _check_equal(config, base, "the ControlNet", ("mlp_ratio", "guidance_embed"))
    for name in ("num_double_blocks", "num_single_blocks"):
        if getattr(config, name) > getattr(base, name):
            raise ValueError(
                f"controlnet.{name}={getattr(config, name)}: the transformer to start from has {getattr(base, name)}; "
                "take as many at most, or set controlnet.init_from_base=false"
            )


def check_fits(config, base, where):
    """Raise `ValueError`, naming `where`, unless a ControlNet's `config` has the widths and positions of `base`."""
    _check_equal(config, base, where, ("hidden_size", "num_heads", "in_channels", "text_width", "pooled_width"))
    _check_equal(config, base, where, ("rope_axes", "rope_theta"))


def _check_equal(config, base, where, names):
    for name in names:
        if getattr(config, name) != getattr(base, name):
            raise ValueError(f"{where} has {name}={getattr(config, name)}, but the transformer has {getattr(base, name)}")


# --- which block of the base gets which sample ----------------------------------------------------------------------------------


def placement(num_base, num_control, *, cyclic=False):
    """For each of `num_base` blocks the number of the control block whose sample it gets: stretched, or repeated in turn."""
    if not num_control:
        return []
    stretch = -(-num_base // num_control)
    return [i % num_control if cyclic else i // stretch for i in range(num_base)]


def placements(config, base):
    """`placement` of the double and of the single blocks; a net that sees pixels repeats its double blocks, as x-flux does."""
    double = placement(base.num_double_blocks, config.num_double_blocks, cyclic=config.hint == "pixel")
    return double, placement(base.num_single_blocks, config.num_single_blocks)


def spread(samples, config, base):
    """A net's samples as `residuals` of `Flux.forward`: two lists over the blocks of the base; nothing is copied."""
    return tuple([of_kind[i] for i in places] for of_kind, places in zip(samples, placements(config, base)))


def combine(residuals):
    """The sum of several nets' `residuals`, each a pair of lists that are as long as the base or empty.

    Blocks that get the same tensors share their sum.
    """
    sums = {}

    def total(tensors):
        key = tuple(map(id, tensors))
        if key not in sums:
            sums[key] = sum(tensors[1:], start=tensors[0])
        return sums[key]

    return tuple([total(tensors) for tensors in zip(*filter(None, of_kind))] for of_kind in zip(*residuals))


def used(num_base, num_control, *, cyclic=False):
    """How many of `num_control` blocks have a sample that a base of `num_base` blocks gets: the first so many."""
    return 1 + max(placement(num_base, num_control, cyclic=cyclic), default=-1)


def nearest_depth(num_base, num_control):
    """The number of control blocks nearest to `num_control` of which stretching wastes none; of two the smaller."""
    lossless = [n for n in range(num_base + 1) if used(num_base, n) == n]
    return min(lossless, key=lambda n: (abs(n - num_control), n))


def unused_parameters(controlnet, base):
    """Parameters that can get no gradient beside a base of configuration `base`: {name: None, or a mask of its rows}.

    They are blocks whose samples nobody gets, and what lies behind the last that counts: where that is a double block, its text
    stream but for keys and values. A mask is true for rows that get none: weight decay belongs masked there too.
    """
    config = controlnet.config
    double, single = (1 + max(places, default=-1) for places in placements(config, base))
    blocks = double if not single else config.num_double_blocks  # single blocks see what all double blocks do
    whole = [f"double_blocks.{i}." for i in range(blocks, config.num_double_blocks)]
    whole += [f"single_blocks.{i}." for i in range(single, config.num_single_blocks)]
    whole += [f"double_out.{i}." for i in range(double, config.num_double_blocks)]
    whole += [f"single_out.{i}." for i in range(single, config.num_single_blocks)]
    modulation = torch.zeros(config.modulation_chunks, dtype=torch.bool)
    modulation[12 * blocks : 12 * config.num_double_blocks] = True
    modulation[12 * config.num_double_blocks + 3 * single :] = True
    masks = {}
    if not single and double:
        last = f"double_blocks.{double - 1}.txt."
        whole += [f"{last}proj.", f"{last}mlp.", f"{last}qkv.q_norm."]
        modulation[12 * double - 4 : 12 * double] = True  # of the text's six, all but the shift and scale before attention
        queries = torch.tensor([True, False, False]).repeat(config.num_heads).repeat_interleave(config.head_width)
        masks = {f"{last}qkv.linear.{leaf}": queries for leaf in ("weight", "bias")}
    if modulation.any():
        rows = modulation.repeat_interleave(config.hidden_size)
        masks |= {f"modulation.{leaf}": rows for leaf in ("weight", "bias")}
    return {n: masks.get(n) for n, _ in controlnet.named_parameters() if n in masks or n.startswith(tuple(whole))}
