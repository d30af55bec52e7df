"""Pictures in a grid, with captions: what `infer.py`, `prove.py` and a run's grids show."""

import math
from operator import attrgetter

from PIL import Image, ImageDraw, ImageFont


def wrap_caption(text, *, font, width, max_lines):
    """`text` as at most `max_lines` lines of at most `width` pixels; what does not fit ends in an
    ellipsis.
    """
    lines = []
    for paragraph in text[:1000].split("\n"):  # a caption of a million letters would take for ever
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    cut = lines[:max_lines]
    if len(lines) > max_lines:
        cut[-1] += "…"
    for i, line in enumerate(cut):
        while len(line) > 1 and font.getlength(line) > width:
            line = line.rstrip("…")[:-1] + "…"
        cut[i] = line
    return cut


def contact_sheet(images, *, columns=None, captions=None):
    """A grid of PIL pictures with a caption of up to four lines under each, if any.

    Pictures narrower than 128 pixels are enlarged by a whole factor, the same for all, without
    smoothing. Raises `ValueError` where there are no pictures or not as many captions.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    if captions is not None and len(captions) != len(images):
        raise ValueError(
            f"{len(captions)} captions for {len(images)} pictures: give one for each, '' for none"
        )
    images = enlarge_alike(images)
    width, height = map(max, zip(*map(attrgetter("size"), images)))
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    font = ImageFont.load_default(size=max(12, width // 24))
    wrapped, below = [()] * len(images), 0
    line_height = math.ceil(1.2 * sum(font.getmetrics()))
    if any(captions or ()):
        wrapped = [wrap_caption(t or "", font=font, width=width, max_lines=4) for t in captions]
        below = 4 + line_height * max(map(len, wrapped))
    margin = max(8, width // 32)
    across, down = width + margin, height + below + margin
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (margin + columns * across, margin + rows * down), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        x, y = margin + i % columns * across, margin + i // columns * down
        left, top = x + (width - image.width) // 2, y + (height - image.height) // 2
        frame = left - 1, top - 1, left + image.width, top + image.height
        draw.rectangle(frame, outline=(205, 205, 205))
        sheet.paste(image, (left, top))
        for j, line in enumerate(lines):
            draw.text((x, y + height + 4 + j * line_height), line, fill=(60, 60, 60), font=font)
    return sheet


def enlarge_alike(images):
    """Pictures in RGB, the widest of at least 128 pixels, by one whole factor without smoothing."""
    factor = max(1, math.ceil(128 / max(image.width for image in images)))
    nearest = Image.Resampling.NEAREST
    return [
        image.convert("RGB").resize((factor * image.width, factor * image.height), nearest)
        for image in images
    ]
