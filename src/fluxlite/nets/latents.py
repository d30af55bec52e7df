"""Latents as the transformer sees them: 2x2 patches as tokens, with positions.

B batch, C latent channels, h and w in latent cells, L tokens.
"""

import torch
from einops import rearrange

PATCH = 2
MAX_SIDE = 16_384  # pixels: a million tokens


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


def position_ids(height, width, num_text_tokens):
    """Positions (L_txt + L_img, 3): zeros for text, (0, row, column) for image tokens; latent
    `height` and `width` in cells.
    """
    rows, columns = torch.meshgrid(
        torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij"
    )
    image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return torch.cat([torch.zeros(num_text_tokens, 3, dtype=image.dtype), image])


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
