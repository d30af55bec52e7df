"""From an encoded picture to a tensor: any kind of file as RGB, resized and cropped, in [-1, 1]."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)


class BadSample(ValueError):
    """A sample that cannot be used: it is skipped, counted and logged."""


def decode(data):
    """Encoded bytes as an RGB PIL image: EXIF rotation applied, alpha on white, 16 bits scaled to 8. Raises `BadSample`."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise BadSample("no picture of a known format") from None
    except DAMAGE as error:
        raise BadSample(f"unreadable picture ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadSample("a picture of floating-point numbers, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_crop(image, height, width, *, crop="center", flip=False, generator=None):
    """An RGB image as (3, height, width) float32 in [-1, 1]: the short side is resized to cover, the rest is cropped.

    A crop of "random" and a `flip`, every other time, are drawn from `generator`. A picture whose short side fits is not resampled.
    """
    draw = torch.rand(3, generator=generator) if crop == "random" or flip else None
    left, top = draw[:2].tolist() if crop == "random" else (0.5, 0.5)
    scale = min(image.width / width, image.height / height)  # pixels of the picture per pixel of the result
    if scale == 1:
        x, y = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
        if crop == "center":
            x, y = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((x, y, x + width, y + height))
    else:
        x, y = left * (image.width - width * scale), top * (image.height - height * scale)
        box = x, y, min(x + width * scale, image.width), min(y + height * scale, image.height)
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if flip and draw[2] < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 127.5 - 1
