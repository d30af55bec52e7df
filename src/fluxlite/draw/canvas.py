"""The pictures that a user gives, as PIL images: read, framed, masked, pasted back.

A box is (left, top, right, bottom) in whole pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fluxlite.cli.options import expand_home
from fluxlite.data import images

LANCZOS = Image.Resampling.LANCZOS
# Of FLUX.1-Kontext: the sizes (width, height) that its references are resized to, about a megapixel
REFERENCE_AREA = 1024 * 1024
REFERENCE_WIDTHS = (672, 688, 720, 752, 800, 832, 880, 944, 1024, 1104, 1184, 1248, 1328)
REFERENCE_WIDTHS += (1392, 1456, 1504, 1568)
REFERENCE_SIZES = tuple(zip(REFERENCE_WIDTHS, reversed(REFERENCE_WIDTHS)))


def is_picture(image):
    """Whether a picture is given as a PIL image, and not as a path."""
    return isinstance(image, Image.Image)


def read_rgb(image, key):
    """A picture, a path or a PIL image of any mode, in RGB; raises `ValueError`, naming `key`."""
    name = f"the {key.replace('_', ' ')}" if is_picture(image) else f"{key}={image}"
    try:
        if is_picture(image):
            return images.to_rgb(image)
        return images.decode_picture(_read_file(image, key))
    except images.BadSample as error:
        remedy = ": pass it as RGB" * is_picture(image)
        raise ValueError(f"{name} cannot be read ({error}){remedy}") from None


def _read_file(path, key):
    file = Path(expand_home(str(path), key))
    if not file.is_file():
        raise ValueError(f"{key}={path} is not a file")
    return file.read_bytes()


# --- sizes ----------------------------------------------------------------------------------------


def fitting_size(size, area, multiple):
    """(height, width) with the proportions of a picture's `size` (width, height) and about so many
    pixels, each a multiple, as FLUX.1-Kontext sizes its pictures.
    """
    aspect = size[0] / size[1]
    sides = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
    height, width = (max(multiple, side // multiple * multiple) for side in sides)
    return height, width


def reference_size(size, area, multiple):
    """The same for a reference: where pictures have a megapixel, the nearest proportions of those
    that FLUX.1-Kontext was trained with.
    """
    if area != REFERENCE_AREA:
        return fitting_size(size, area, multiple)
    aspect = size[0] / size[1]
    _, width, height = min((abs(aspect - w / h), w, h) for w, h in REFERENCE_SIZES)
    return height // multiple * multiple, width // multiple * multiple


# --- a picture to draw on -------------------------------------------------------------------------


@dataclass
class Canvas:
    """A picture, its `box` that is drawn anew in height x width and, of the picture's size, a mask
    in grey whose white is drawn.
    """

    picture: Image.Image
    box: tuple
    height: int
    width: int
    mask: Image.Image | None = None

    def pixels(self):
        """What is drawn anew, as it is: (3, height, width) in [-1, 1]."""
        return images.picture_pixels(self._framed(self.picture))

    def holes(self):
        """The mask, 1 where it is at least half white, else 0: (1, height, width)."""
        return torch.from_numpy(np.array(self._framed(self.mask)) >= 128).float()[None]

    def _framed(self, image):
        return image.crop(self.box).resize((self.width, self.height), LANCZOS)

    def paste(self, drawn):
        """The whole picture with `drawn` in its box, under the mask; where that is black no pixel
        changes.
        """
        left, top, right, bottom = self.box
        whole = self.picture.copy()
        whole.paste(drawn.resize((right - left, bottom - top), LANCZOS), (left, top))
        return Image.composite(whole, self.picture, self.mask)


def open_canvas(picture, mask, height, width, padding=-1):
    """The `Canvas` of an RGB picture and its mask, or None: of the largest middle part with the
    proportions of height x width or, with a padding of 0 pixels or more, of the `mask_box`.

    Raises `ValueError`.
    """
    if mask is not None:
        mask = fitted_mask(mask, picture.size)
    if padding >= 0:
        box = mask_box(mask, height, width, padding)
    else:
        box = whole_box(images.choose_frame(picture.size, height, width).box)
    return Canvas(picture, box, height, width, mask)


def whole_box(box):
    """A box in whole pixels, at least one: in a small picture it may round to none."""
    left, top, right, bottom = map(round, box)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def fitted_mask(mask, size):
    """An RGB mask in grey and of a picture's size; raises `ValueError` where it marks nothing, or
    is of other proportions.
    """
    if abs(mask.width * size[1] - mask.height * size[0]) > max(size):
        theirs = "{}x{} pixels beside {}x{}".format(*mask.size, *size)
        raise ValueError(f"mask= has other proportions than image= ({theirs}): crop one of them")
    grey = mask.convert("L")
    if grey.getextrema()[1] < 128:
        raise ValueError("mask= is black: nothing would be drawn; white marks what is drawn anew")
    return grey if grey.size == size else grey.resize(size, LANCZOS)


def mask_box(mask, height, width, padding):
    """The box around what a grey mask marks, padded, then widened to the proportions of height x
    width as far as the picture goes: what diffusers' `padding_mask_crop` crops.
    """
    left, top, right, bottom = mask.getbbox()
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, mask.width), min(bottom + padding, mask.height)
    if (right - left) * height > (bottom - top) * width:
        top, bottom = widen_span(top, bottom, (right - left) * height / width, mask.height)
    else:
        left, right = widen_span(left, right, (bottom - top) * width / height, mask.width)
    return left, top, right, bottom


def widen_span(start, stop, length, limit):
    """A span widened on both sides to a length, moved and cut to lie within 0 and a limit."""
    more = int(length - (stop - start))
    start, stop = start - more // 2, stop + more - more // 2
    if stop > limit:
        start, stop = start - (stop - limit), limit
    if start < 0:
        start, stop = 0, stop - start
    return start, min(stop, limit)


def resized_pixels(picture, height, width):
    """An RGB picture as pixels (3, height, width) in [-1, 1], whatever its proportions."""
    return images.picture_pixels(picture.resize((width, height), LANCZOS))
