"""From an encoded picture to a tensor: every kind of file as RGB, resized and cropped, [-1, 1]."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError


class BadSample(ValueError):
    """A sample that cannot be used; it is skipped, counted and logged."""


def decode(data):
    """Encoded bytes as an RGB PIL image: EXIF rotation applied, alpha on white, 16 bits scaled to 8. Raises `BadSample`."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"not a readable picture: {error}") from None
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_crop(image, height, width, *, crop="center", flip=False, generator=None):
    """A PIL image as (3, height, width) float32 in [-1, 1]: the short side is resized to cover, the rest is cut.

    `crop` "random" and `flip` draw from `generator`; a picture of the right size is not resampled.
    """
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    spare = image.width - width, image.height - height
    if crop == "random":
        left, top = (int(torch.randint(s + 1, (), generator=generator)) for s in spare)
    else:
        left, top = (s // 2 for s in spare)
    image = image.crop((left, top, left + width, top + height))
    if flip and torch.rand((), generator=generator) < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
