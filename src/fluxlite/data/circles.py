"""Measure pictures of fill50k: is there one circle, where, and are its colour and the background's
those of the caption?

Colours are compared by CIEDE2000 (ΔE): 1 is barely visible, two of the names differ by 42 on
average. Needs scikit-image and scipy.
"""

import numpy as np
from scipy.ndimage import binary_erosion, binary_fill_holes, label
from skimage.color import deltaE_ciede2000, rgb2lab

from fluxlite.data.fill50k import RADIUS, rgb
from fluxlite.data.rings import HOLE, RING_RADIUS

MAX_COLOUR_ERROR = 12.0  # ΔE
# at 64x64 the generator's discs reach 0.95 or more; a square 0.85 at 20 pixels a side (0.88 at 14)
MIN_IOU = 0.85
# of the picture: a smaller piece (12 pixels of 64x64) does not count as a second figure, though it
# lowers the IoU
SPECK = 0.003
MIN_HOLE_IOU = 0.75  # of a hole, which at 64x64 has some 13 pixels of radius
HOLE_TOLERANCE = 0.15  # of the outer radius: the hole's radius, and how far its centre is off


def colour_difference(a, b):
    """ΔE between RGB colours in [0, 255], broadcast: (…, 3), (…, 3) → (…)."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), b)
    return deltaE_ciede2000(rgb2lab(a / 255), rgb2lab(b / 255))


def figure_mask(picture, circle, background):
    """Where an RGB picture is nearer to the colour named `circle` than to `background`: (H, W, 3) →
    (H, W) bool.

    Nearer in RGB, in which the generator blends the two by how much of a pixel its disc covers: so
    the rim is where it covers half.
    """
    towards = rgb(circle) - rgb(background)
    return (picture - rgb(background)) @ towards > towards @ towards / 2


def inner_colour(picture, mask):
    """Median per channel over `mask` without its rim of one pixel; over all of a thinner mask, over
    the picture if it is empty.
    """
    inner = binary_erosion(mask, border_value=1)
    return np.median(
        picture[inner if inner.any() else mask if mask.any() else np.ones_like(mask)], axis=0
    )


def connected_pieces(mask):
    """The connected pieces of `mask` that are no specks, the largest first, as boolean masks."""
    labels, count = label(mask)
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    return [labels == i + 1 for i in np.argsort(-sizes) if sizes[i] >= SPECK * mask.size]


def fit_circle(mask):
    """The circle that overlaps `mask` best: (centre (x, y), radius, IoU), in pixels, or None where
    the mask has only specks.

    A search over centres, down to a quarter of a pixel, that starts at the centroid of the largest
    piece; for each centre the best radius comes from counting pixels by distance. What of the
    circle lies outside the picture counts against it.
    """
    pieces = connected_pieces(mask)
    if not pieces:
        return None
    pad = int(np.ceil(np.sqrt(pieces[0].sum() / np.pi))) + 2
    rows, columns = (np.flatnonzero(pieces[0].any(axis=i)) for i in (1, 0))
    near = np.pad(mask, pad)[
        rows[0] : rows[-1] + 1 + 2 * pad, columns[0] : columns[-1] + 1 + 2 * pad
    ]
    y, x = np.mgrid[: near.shape[0], : near.shape[1]] + 0.5 - pad
    x, y = x + columns[0], y + rows[0]
    area = mask.sum()

    def best_radius(centre):
        ring = np.int64(np.hypot(x - centre[0], y - centre[1]) * 4).reshape(
            -1
        )  # rings a quarter of a pixel wide
        inside = np.cumsum(np.bincount(ring))
        overlap = np.cumsum(np.bincount(ring, weights=near.reshape(-1)))
        iou = overlap / (area + inside - overlap)
        return iou.max(), (iou.argmax() + 1) / 4

    centre = tuple(np.argwhere(pieces[0]).mean(axis=0)[::-1] + 0.5)
    (iou, radius), step = best_radius(centre), max(mask.shape) / 64
    while step >= 0.25:
        around = [
            (centre[0] + i * step, centre[1] + j * step)
            for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))
        ]
        (best, best_r), place = max((best_radius(c), c) for c in around)
        if best > iou:
            iou, radius, centre = best, best_r, place
        else:
            step /= 2
    return (float(centre[0]), float(centre[1])), float(radius), float(iou)


def surrounds_picture(mask):
    """Whether `mask` has most of the picture's rim, as the background of every circle has.

    Without this, two right colours in each other's place (a red disc on blue for a blue circle on
    red) would count as right.
    """
    return bool(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean() > 0.5)


def has_circle_size(mask, radii=RADIUS):
    """Whether the area of `mask` is that of a circle which the generator draws, give or take a
    pixel of radius for its soft rim.
    """
    radius = np.sqrt(mask.sum() / np.pi)
    return bool(radii[0] * mask.shape[0] - 1 <= radius <= radii[1] * mask.shape[0] + 1)


def measure_circle(picture, circle, background):
    """Measure a PIL picture against the two colours that its caption names; a dictionary.

    `colours`: both are there, each in its place, and right; `shape`: the figure is one circle of
    the generator's size; `right`: both are true. `circle_error`, `background_error`: ΔE; `centre`,
    `radius`: pixels, None without a figure, as `iou` is 0.
    """
    picture = np.asarray(picture.convert("RGB"))
    mask = figure_mask(picture, circle, background)
    circle_error = float(colour_difference(inner_colour(picture, mask), rgb(circle)))
    background_error = float(colour_difference(inner_colour(picture, ~mask), rgb(background)))
    centre, radius, iou = fit_circle(mask) or (None, None, 0.0)
    colours = bool(
        centre
        and surrounds_picture(~mask)
        and max(circle_error, background_error) <= MAX_COLOUR_ERROR
    )
    shape = len(connected_pieces(mask)) == 1 and has_circle_size(mask) and iou >= MIN_IOU
    return {
        "colours": colours,
        "shape": shape,
        "right": colours and shape,
        "circle_error": circle_error,
        "background_error": background_error,
        "iou": iou,
        "centre": centre,
        "radius": radius,
    }


def measure_ring(picture, ring, background):
    """Measure a PIL picture against the two colours of a ring's caption; a dictionary.

    `shape`: the figure is one circle of the generator's size with one round hole in its middle, of
    `HOLE` its radius; `ring`: also, what is around it and its hole are of the background's colour;
    `right`: and it is of its own. `figure_error`, `background_error`, `hole_error`: ΔE. `depth`:
    `hole_depth`.
    """
    picture = np.asarray(picture.convert("RGB"))
    mask = figure_mask(picture, ring, background)
    whole = binary_fill_holes(mask)
    outer = fit_circle(whole)
    depth = hole_depth(picture, outer, ring, background)
    hole = whole & ~mask
    masks = {"figure": mask, "background": ~whole, "hole": hole}
    wanted = {"figure": ring, "background": background, "hole": background}
    errors = {}
    for name, region in masks.items():
        difference = colour_difference(inner_colour(picture, region), rgb(wanted[name]))
        errors[f"{name}_error"] = float(difference)
    shape = len(connected_pieces(mask)) == 1 and has_ring_shape(whole, outer, hole)
    around = surrounds_picture(~whole) and errors["background_error"] <= MAX_COLOUR_ERROR
    is_ring = bool(shape and around and errors["hole_error"] <= MAX_COLOUR_ERROR)
    right = is_ring and errors["figure_error"] <= MAX_COLOUR_ERROR
    return {"shape": shape, "ring": is_ring, "right": right, "depth": depth, **errors}


def hole_depth(picture, outer, ring, background):
    """How far the middle of a figure is on the way from the colour of the ring, 0, to the other, 1.

    The middle is the disc that the hole of a ring would be in the circle `outer` that fits the
    filled figure best; pixels past either end count as there, and no figure, None, as 0.
    """
    if outer is None:
        return 0.0
    centre, radius, _ = outer
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    middle = np.hypot(x - centre[0], y - centre[1]) < HOLE * radius - 1  # within its soft rim
    away = rgb(background) - rgb(ring)
    shares = (picture[middle] - rgb(ring)) @ away / (away @ away)
    return float(shares.clip(0, 1).mean()) if len(shares) else 0.0


def has_ring_shape(whole, outer, hole):
    """Whether the mask `whole`, which the circle `outer` fits best, is a circle of a ring's size,
    and `hole` one within it, as the generator draws them.
    """
    inner = fit_circle(hole)
    if not (outer and inner) or len(connected_pieces(hole)) > 1:
        return False
    (centre, radius, iou), (middle, hole_radius, hole_iou) = outer, inner
    off = max(abs(hole_radius - HOLE * radius), np.hypot(*np.subtract(centre, middle)))
    if iou < MIN_IOU or hole_iou < MIN_HOLE_IOU or off > HOLE_TOLERANCE * radius:
        return False
    return has_circle_size(whole, RING_RADIUS)
