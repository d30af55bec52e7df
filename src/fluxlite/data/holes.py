"""Random holes, which a Fill model is trained to fill: boxes, strokes of a brush, whole pictures.

Sides, places and widths are parts of the picture's shorter side or of its sides.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw

SHARES = {"boxes": 0.5, "strokes": 0.4, "whole": 0.1}  # of the samples
MOST_BOXES, BOX_SIDE = 2, (0.2, 0.7)
MOST_STROKES, MOST_POINTS, BRUSH = 3, 5, (0.08, 0.25)


def random_hole(height, width, seed):
    """A hole (1, height, width) uint8, 255 where it is, else 0; the same for the same seed."""
    draw, image = np.random.default_rng(seed), Image.new("L", (width, height))
    shape = draw.choice(list(SHARES), p=list(SHARES.values()))
    pen = ImageDraw.Draw(image)
    if shape == "whole":
        image.paste(255, (0, 0, width, height))
    elif shape == "boxes":
        for _ in range(draw.integers(1, MOST_BOXES + 1)):
            pen.rectangle(random_box(draw, image.size), fill=255)
    else:
        for _ in range(draw.integers(1, MOST_STROKES + 1)):
            draw_stroke(pen, draw, image.size)
    return torch.from_numpy(np.array(image))[None]


def random_box(draw, size):
    """Left, top, right and bottom of a box in a picture of `size` (width, height)."""
    sides = draw.uniform(*BOX_SIDE, 2) * size
    corner = draw.uniform(0, 1, 2) * (size - sides)
    return (*corner, *(corner + sides))


def draw_stroke(pen, draw, size):
    """Draw a line through random points with a round brush."""
    brush = draw.uniform(*BRUSH) * min(size)
    points = draw.uniform(0, 1, (draw.integers(2, MOST_POINTS + 1), 2)) * size
    pen.line([tuple(point) for point in points], fill=255, width=max(1, round(brush)))
    for x, y in points:
        pen.ellipse([x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2], fill=255)
