"""What drawing from pictures does, measured on held-out circles: `python benchmarks/kinds.py`.

Pictures of the generator's, each with a prompt. At a low strength the circle keeps its place and
the picture changes, by more than the autoencoder alone changes it; at a high one it has the colours
of another prompt; what is pasted under a mask leaves all else as it is. Baselines: the place of
another picture's circle, the colours of another prompt. Takes two minutes on a core.
"""

import argparse
import json
from functools import partial
from itertools import starmap

import numpy as np
import torch
from PIL import Image

import fluxlite
from fluxlite.data.circles import MIN_IOU, figure_mask, measure_circle
from fluxlite.data.fill50k import circle_caption, rgb
from fluxlite.data.images import picture_pixels
from fluxlite.draw.proof import choose_pairs, draw_controls
from fluxlite.draw.sampling import pictures_of

SIZE, LOW, HIGH = 64, 0.3, 0.9


def draw_circles(pairs):
    """For each pair of colours a picture of the generator's and the disc (H, W) in it."""
    found = []
    for (circle, background), (_, disc) in zip(pairs, draw_controls(pairs, SIZE, seed=1)):
        values = np.where(disc[..., None], rgb(circle), rgb(background)).astype(np.uint8)
        found.append((Image.fromarray(values), disc))
    return found


def share_of_places(pictures, pairs, discs):
    """How many figures lie where a disc does."""
    ious = []
    for picture, pair, disc in zip(pictures, pairs, discs):
        figure = figure_mask(np.asarray(picture), *pair)
        ious.append((figure & disc).sum() / max((figure | disc).sum(), 1))
    return float(np.mean(np.array(ious) >= MIN_IOU))


def share_of_colours(pictures, pairs):
    """How many pictures have both colours of their pair."""
    measured = (measure_circle(picture, *pair) for picture, pair in zip(pictures, pairs))
    return float(np.mean([one["colours"] for one in measured]))


def mean_change(pictures, before):
    """Mean absolute difference in levels."""
    levels = partial(np.asarray, dtype=int)
    after, before = (np.stack([*map(levels, of)]) for of in (pictures, before))
    return float(np.abs(after - before).mean())


@torch.inference_mode()
def reconstruct(autoencoder, pictures):
    """Pictures as the autoencoder has them."""
    pixels = torch.stack([picture_pixels(picture) for picture in pictures])
    return pictures_of(autoencoder.decode(autoencoder.encode(pixels)))


def measure_kinds(pipeline, count):
    """{what: share or levels} over `count` pictures."""
    pairs = choose_pairs(count, seed=0)
    pictures, discs = zip(*draw_circles(pairs))
    others = [*pairs[1:], pairs[0]]
    shifted = [*discs[1:], discs[0]]
    common = dict(checkpoint=pipeline, image=list(pictures), seed=0, batch=20)
    own, other = ([*starmap(circle_caption, of)] for of in (pairs, others))
    low = fluxlite.generate(own, strength=LOW, **common)
    high = fluxlite.generate(other, strength=HIGH, **common)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (13, 21, 45, 50))  # no whole cells
    holes = fluxlite.generate(other, mask=mask, paste=True, strength=1.0, **common)
    outside = np.asarray(mask) == 0
    changed = np.stack([np.asarray(a) != np.asarray(b) for a, b in zip(holes, pictures)])
    plain = reconstruct(pipeline.autoencoder, pictures)
    return {
        f"strength {LOW}: circle in its place": share_of_places(low, pairs, discs),
        f"strength {LOW}: in another's place": share_of_places(low, pairs, shifted),
        f"strength {LOW}: mean change of pixels": mean_change(low, pictures),
        "autoencoder alone: mean change": mean_change(plain, pictures),
        f"strength {HIGH}: colours of the prompt": share_of_colours(high, others),
        f"strength {HIGH}: colours of another prompt": share_of_colours(high, pairs),
        "inpainting: share of levels changed outside": float(changed[:, outside].mean()),
        "inpainting: share of levels changed inside": float(changed[:, ~outside].mean()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100, help="pictures")
    parser.add_argument("--checkpoint", default="flux-tiny", help="a run or a pipeline")
    options = parser.parse_args()
    pipeline = fluxlite.load_pipeline(options.checkpoint, dtype=torch.float32)
    print(json.dumps(measure_kinds(pipeline, options.num), indent=2))


if __name__ == "__main__":
    main()
