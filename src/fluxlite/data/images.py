"""From an encoded picture to a tensor: any kind of file as RGB, resized and cropped; its levels
from 0 to 255, and pixels in [-1, 1].
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fluxlite.cli.file_kinds import KIND_BYTES, PICTURE, file_kind

# of a sample's pictures, in their place where they are encoded: mean and log variance
POSTERIORS = {"images": ("mean", "logvar"), "controls": ("control_mean", "control_logvar")}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BadSample(ValueError):
    """A sample that cannot be used: it is skipped, counted and logged."""


def decode_picture(data):
    """Encoded bytes as an RGB PIL image, as `to_rgb` makes it. Raises `BadSample`."""
    return to_rgb(open_picture(io.BytesIO(data)))


def open_picture(stream):
    """A PIL image whose header is read, of any of `FORMATS`. Raises `BadSample`."""
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        stream.seek(0)
        kind = file_kind(stream.read(KIND_BYTES))
        but = f", but {kind}" if kind not in (None, PICTURE) else ""
        raise BadSample(f"no picture of a known format{but}") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise BadSample(f"a picture of more than {limit} pixels: make it smaller") from None
    except Exception as error:  # PIL's readers raise whatever a damaged file makes them meet
        raise BadSample(f"unreadable picture ({_reason(error)})") from None


def upright_size(stream):
    """Width and height of an encoded picture as `to_rgb` turns it; its pixels are not read."""
    image = open_picture(stream)
    try:
        # PngImageFile's own would decode the picture first
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        turned &= image.format != "TIFF"  # whose size is told as it will be
    except Exception as error:
        raise BadSample(f"unreadable picture ({_reason(error)})") from None
    return image.size[::-1] if turned else image.size


def decode_alpha(data):
    """How opaque the pixels of an encoded picture are, a PIL image of one channel; None where it
    says nothing of that. Raises `BadSample`.
    """
    try:
        image = open_picture(io.BytesIO(data))
        if not image.has_transparency_data:
            return None
        image = ImageOps.exif_transpose(image)
        image = _of_eight_bits(image) if image.mode.startswith("I") else image
        return image.convert("RGBA").getchannel("A")
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"unreadable picture ({_reason(error)})") from None


def decode_mask(data):
    """An encoded mask as a PIL image of one channel. Raises `BadSample`, also for one that is
    transparent somewhere: as white it would count, and whoever drew the figure alone meant black.
    """
    alpha = decode_alpha(data)
    if alpha and alpha.getextrema()[0] < 255:
        raise BadSample("transparent, which is neither black nor white: save it without")
    return decode_picture(data).convert("L")


def to_rgb(image):
    """Any PIL image as RGB: EXIF rotation applied, alpha on white, 16 bits scaled to 8.

    Raises `BadSample`: it is the one way from a picture to pixels, whoever opened it.
    """
    try:
        image.load()
        if not all(image.size):
            raise BadSample("a picture without pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _of_eight_bits(image)
        if image.mode == "F":
            raise BadSample("a picture of floating-point numbers, whose range is unknown")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        rgb = image.convert("RGB")
        if image.mode not in ("RGB", "P"):  # CMYK's or a grey's would be saved with it
            rgb.info.pop("icc_profile", None)
        return rgb
    except BadSample:
        raise
    except Exception as error:  # as above: struct.error, KeyError, RecursionError, …
        raise BadSample(f"unreadable picture ({_reason(error)})") from None


def _of_eight_bits(image):
    levels = np.asarray(image, np.float64)
    found = Image.fromarray(np.rint(levels / 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # one of the levels
        opaque = levels != image.info["transparency"]
        found.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return found


def _reason(error):
    """What a decoder's exception says, on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


@dataclass(frozen=True)
class Frame:
    """What is taken of a picture: `box` of its pixels, as height x width, mirrored or not."""

    size: tuple  # width and height of the picture
    box: tuple  # left, top, right, bottom
    height: int
    width: int
    mirrored: bool

    def of(self, image, resample=Image.Resampling.LANCZOS):
        """The frame's image, of the picture or of another that shows the same in another size.

        One of other proportions, but for a side's rounding, raises `BadSample`. Whole pixels of the
        right size stay as they are.
        """
        check_proportions(image.size, self.size)
        scales = image.width / self.size[0], image.height / self.size[1]
        box = tuple(
            min(edge * scale, side)
            for edge, scale, side in zip(self.box, scales * 2, image.size * 2)
        )
        image = image.resize((self.width, self.height), resample, box=box)
        return ImageOps.mirror(image) if self.mirrored else image


def check_proportions(size, target):
    """Raise `BadSample` unless (width, height) are in the proportion of `target`'s, but for a
    side's rounding.
    """
    if abs(size[0] * target[1] - size[1] * target[0]) > max(target):
        theirs = "{}x{} pixels beside {}x{}".format(*size, *target)
        raise BadSample(f"a picture of other proportions than the target's ({theirs})")


def choose_frame(size, height, width, *, crop="center", flip=False, generator=None):
    """The `Frame` of height x width for a picture of `size`: its short side is resized to cover,
    the rest is cropped.

    A crop of "random" and a `flip`, every other time, are drawn from `generator`.
    """
    draw = torch.rand(3, generator=generator) if crop == "random" or flip else None
    left, top = draw[:2].tolist() if crop == "random" else (0.5, 0.5)
    scale = min(size[0] / width, size[1] / height)  # pixels of the picture per pixel of the result
    # of the side that is covered the rest is 0, or by rounding a little less
    x, y = (max(0.0, rest) for rest in (size[0] - width * scale, size[1] - height * scale))
    x, y = left * x, top * y
    if scale == 1:
        x, y = (size[0] - width) // 2, (size[1] - height) // 2
        if crop == "random":
            x, y = int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1))
    box = x, y, min(x + width * scale, size[0]), min(y + height * scale, size[1])
    return Frame(size, box, height, width, bool(flip and draw[2] < 0.5))


def picture_levels(image):
    """An RGB image as (3, H, W) uint8, one of a single channel as (1, H, W): as it travels, in a
    quarter of the bytes of its pixels.
    """
    levels = torch.from_numpy(np.array(image))
    return levels.view(*levels.shape[:2], -1).permute(2, 0, 1).contiguous()


def pixels_of(levels):
    """The uint8 levels of pictures as float32 in [-1, 1], on whatever device they are."""
    return levels.float() / 127.5 - 1


def picture_pixels(image):
    """An RGB image as (3, H, W) float32 in [-1, 1]."""
    return pixels_of(picture_levels(image))


def resize_crop(image, height, width, **options):
    """An RGB image as (3, height, width) float32 in [-1, 1], framed as `choose_frame`
    does with `options`.
    """
    return picture_pixels(choose_frame(image.size, height, width, **options).of(image))


def canny_edges(image):
    """The edges of an RGB image, white on black, as OpenCV's Canny finds them with the thresholds
    100 and 200.
    """
    import cv2

    cv2.setNumThreads(0)  # else each loader process would start as many as there are cores
    return Image.fromarray(cv2.Canny(np.asarray(image), 100, 200)).convert("RGB")
