"""Latents as the transformer sees them: 2x2 patches as tokens, with positions.

B batch, C latent channels, h and w in latent cells, L tokens.
"""

import torch
from einops import rearrange

PATCH = 2
MAX_SIDE = 16_384  # pixels: a million tokens
KIND_NAMES = {  # of transformers, by what they see
    "plain": "which sees noise alone",
    "control": "a FLUX.1-Canny or FLUX.1-Depth",
    "fill": "a FLUX.1-Fill",
}


def pack_latents(latents):
    """Latents (B, C, h, w) to tokens (B, h·w/4, 4C), channel-major within a token, as FLUX does."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack_latents(tokens, height, width):
    """The inverse of `pack_latents`; `height` and `width` are the latents' own, in cells."""
    return rearrange(
        tokens,
        "b (h w) (c ph pw) -> b c (h ph) (w pw)",
        h=height // PATCH,
        w=width // PATCH,
        ph=PATCH,
        pw=PATCH,
    )


def pack_mask(mask, cell):
    """A mask of pixels (B, 1, H, W) as tokens (B, L, (2·cell)²): each pixel of the `cell` pixels a
    side of a latent cell is a channel, as FLUX.1-Fill has it.
    """
    return pack_latents(rearrange(mask, "b 1 (h y) (w x) -> b (y x) h w", y=cell, x=cell))


def seen_latents(x, channels=None, reference=None):
    """Latents x (B, L, C) as a transformer sees them, (B, L + L', C + C'): with channels (B, L, C')
    beside them, or a reference's tokens (B or 1, L', C) behind them.
    """
    if channels is not None:
        x = torch.cat([x, channels], dim=-1)
    if reference is not None:
        x = torch.cat([x, reference.expand(len(x), -1, -1)], dim=1)
    return x


def position_ids(height, width, num_text_tokens, references=()):
    """Positions (L, 3): zeros for text, (0, row, column) for image tokens; latent `height` and
    `width` in cells.

    `references` are the (height, width) of pictures whose tokens follow: (1, row, column) as of
    FLUX.1-Kontext's one, and 2, 3, … on the first axis for more, which it was not trained with.
    """
    sizes = [(height, width), *references]
    grids = [grid_ids(number, *size) for number, size in enumerate(sizes)]
    return torch.cat([torch.zeros(num_text_tokens, 3, dtype=grids[0].dtype), *grids])


def grid_ids(number, height, width):
    """(number, row, column) of the tokens of one picture, latent sides in cells."""
    axes = torch.tensor([number]), torch.arange(height // PATCH), torch.arange(width // PATCH)
    return torch.cartesian_prod(*axes)


def num_image_tokens(height, width):
    """Tokens of latents of `height` and `width` cells."""
    return (height // PATCH) * (width // PATCH)


def check_size(height, width, downsampling, prefix=""):
    """Raise `ValueError`, naming the nearest valid sizes, unless both sides in pixels divide into
    tokens; `downsampling` are the pixels of a latent cell along a side, `prefix` that of the keys.
    """
    multiple = downsampling * PATCH
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % multiple:
            below = max(multiple, value // multiple * multiple)
            raise ValueError(
                f"{prefix}{name}={value} must be a multiple of {multiple}: {below} and "
                f"{below + multiple} are the nearest"
            )


def kind_channels(channels, cell):
    """{kind: channels that it takes} of a transformer that gives so many, with an
    autoencoder of `cell` pixels a latent cell.
    """
    return {"plain": channels, "control": 2 * channels, "fill": 2 * channels + (PATCH * cell) ** 2}


def drawing_kind(config, cell, where):
    """The key in `KIND_NAMES` of a `FluxConfig`, with an autoencoder of `cell` pixels a cell.

    Raises `ValueError`, naming `where`.
    """
    out = config.out_channels
    for name, count in kind_channels(out, cell).items():
        if config.in_channels == count:
            return name
    raise ValueError(
        f"{where} takes {config.in_channels} channels and gives {out}, as a model that sees more "
        "than noise, and is none of FLUX.1, FLUX.1-Fill, FLUX.1-Canny and FLUX.1-Depth: it can be "
        "converted, but neither drawn with nor trained"
    )
