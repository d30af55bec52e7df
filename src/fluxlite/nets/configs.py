"""The shapes of the networks: what a checkpoint's description, a setting and a network share.

A `part` is what a network is of a pipeline: transformer, controlnet or autoencoder.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

from fluxlite.cli.options import check_options, option

MAX_BLOCKS, MAX_WIDTH = 1000, 1_000_000  # beyond any net: a damaged description
HINTS = ("latent", "pixel")
HINT_DOWNSAMPLING = 8  # pixels along a side that XLabs' convolutions make a latent cell of
# Of a ControlNet's configuration: what is its own, and what must be its base's.
OWN_FIELDS = ("num_double_blocks", "num_single_blocks", "hint", "num_modes")
SHARED_FIELDS = ("hidden_size", "num_heads", "in_channels", "text_width", "pooled_width")
SHARED_FIELDS += ("rope_axes", "rope_theta")
MODES = {  # kinds of control that the published Union nets tell apart
    "canny": 0,
    "tile": 1,
    "depth": 2,
    "blur": 3,
    "pose": 4,
    "gray": 5,
    "lq": 6,
}


@dataclass
class FluxConfig:
    """The shape of a Flux; the defaults are FLUX.1-dev's."""

    num_double_blocks: int = option(
        19, "blocks with separate text and image weights", at_least=0, at_most=MAX_BLOCKS
    )
    num_single_blocks: int = option(
        38, "blocks with one set of weights for both", at_least=0, at_most=MAX_BLOCKS
    )
    hidden_size: int = option(
        3072, "width of a token inside the network", at_least=1, at_most=MAX_WIDTH
    )
    num_heads: int = option(
        24,
        "attention heads; hidden_size / num_heads must be the sum of rope_axes",
        at_least=1,
        at_most=10_000,
    )
    mlp_ratio: int = option(4, "width of the MLPs over hidden_size", at_least=1, at_most=64)
    in_channels: int = option(
        64, "channels of an input token: latent channels x 4", at_least=1, at_most=MAX_WIDTH
    )
    out_channels: int = option(64, "channels of an output token", at_least=1, at_most=MAX_WIDTH)
    text_width: int = option(
        4096, "width of the T5 encoder's output", at_least=1, at_most=MAX_WIDTH
    )
    pooled_width: int = option(768, "width of CLIP's pooled output", at_least=1, at_most=MAX_WIDTH)
    guidance_embed: bool = option(True, "whether guidance is an input (dev) or not (schnell)")
    rope_axes: tuple[int, ...] = option(
        (16, 56, 56),
        "head channels that rotate with each position axis",
        at_least=0,
        at_most=MAX_WIDTH,
    )
    rope_theta: float = option(10_000, "base of the rotation frequencies", at_least=1, at_most=1e12)
    part: ClassVar[str] = "transformer"
    scheduler: ClassVar[object] = None  # a checkpoint's `SchedulerConfig`, if any; it is no shape

    def validate(self):
        """Raise `ValueError` for a shape that no Flux can have."""
        check_options(self, "model.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of "
                f"model.num_heads={self.num_heads}"
            )
        head = self.hidden_size // self.num_heads
        if sum(self.rope_axes) != head or any(a % 2 or a < 0 for a in self.rope_axes):
            raise ValueError(
                f"model.rope_axes={list(self.rope_axes)} must be even and add up to the head "
                f"width, {head}"
            )

    @property
    def head_width(self):
        """Channels of an attention head, D."""
        return self.hidden_size // self.num_heads

    @property
    def modulation_chunks(self):
        """Vectors of width H that modulate each part of the network: double blocks, single, end."""
        return [12] * self.num_double_blocks + [3] * self.num_single_blocks + [2]


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
    part: ClassVar[str] = "controlnet"
    out_channels: ClassVar[int] = 0  # there is no final layer

    def validate(self):
        """Raise `ValueError` for a shape that no ControlNet can have."""
        check_options(self, "controlnet.", only=OWN_FIELDS)
        if self.hint == "pixel" and self.in_channels % 4:
            raise ValueError(
                f"controlnet.hint=pixel needs model.in_channels={self.in_channels} to be a "
                "multiple of 4"
            )
        if not self.num_double_blocks + self.num_single_blocks:
            raise ValueError(
                "controlnet.num_double_blocks=0 and controlnet.num_single_blocks=0 leave nothing: "
                "set one of them"
            )
        super().validate()

    @property
    def modulation_chunks(self):
        """Vectors of width H that modulate each block: there is no final layer."""
        return super().modulation_chunks[:-1]

    @classmethod
    def beside(cls, base, **changes):
        """A configuration with the widths of `base`, a `FluxConfig`, and such `changes`."""
        shared = (f.name for f in fields(cls) if f.name not in OWN_FIELDS)
        return cls(**{name: getattr(base, name) for name in shared} | changes)

    def check_fits(self, base, where="the ControlNet", names=SHARED_FIELDS):
        """Raise `ValueError`, naming `where`, unless widths and positions are those of `base`."""
        for name in names:
            if getattr(self, name) != getattr(base, name):
                raise ValueError(
                    f"{where} has {name}={getattr(self, name)}, but the transformer has "
                    f"{getattr(base, name)}"
                )

    def check_hint(self, downsampling, where="the ControlNet"):
        """Raise `ValueError`, naming `where`, unless its hint has as many tokens as a picture by an
        autoencoder of so many pixels a cell.
        """
        if self.hint == "pixel" and downsampling != HINT_DOWNSAMPLING:
            raise ValueError(
                f"{where} has hint=pixel, which makes a cell of {HINT_DOWNSAMPLING} pixels a side, "
                f"and the autoencoder of {downsampling}: take a net with hint=latent"
            )

    def check_starts(self, base):
        """Raise `ValueError` unless a ControlNet can start from a transformer of shape `base`."""
        self.check_fits(base, names=(*SHARED_FIELDS, "mlp_ratio", "guidance_embed"))
        for name in ("num_double_blocks", "num_single_blocks"):
            if getattr(self, name) > getattr(base, name):
                raise ValueError(
                    f"controlnet.{name}={getattr(self, name)}: the transformer to start from has "
                    f"{getattr(base, name)}; "
                    "take as many at most, or set controlnet.init_from_base=false"
                )


NET_CONFIGS = {"transformer": FluxConfig, "controlnet": ControlNetConfig}  # that are trained


@dataclass
class AutoencoderConfig:
    """The shape of an autoencoder and the scale of its latents; the defaults are FLUX.1's."""

    part: ClassVar[str] = "autoencoder"
    block_out_channels: tuple[int, ...] = option(
        (128, 256, 512, 512), "channels at each resolution", at_least=1, at_most=100_000
    )
    layers_per_block: int = option(2, "residual blocks of each", at_least=1, at_most=100)
    latent_channels: int = option(16, "channels of a latent cell", at_least=1, at_most=100_000)
    norm_num_groups: int = option(32, "groups of the norms", at_least=1, at_most=100_000)
    scaling_factor: float = option(0.3611, "what latents are multiplied by", above=0, at_most=1e6)
    shift_factor: float = option(
        0.1159, "what is taken from latents before", at_least=-1e6, at_most=1e6
    )

    @property
    def downsampling(self):
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


def mode_number(mode):
    """The number of a kind of control, from a name of `MODES` or a number as it is or as text; None
    for anything else.
    """
    text = str(mode) if isinstance(mode, (str, int)) else ""
    return MODES.get(text, int(text) if len(text) < 10 and text.isdecimal() else None)
