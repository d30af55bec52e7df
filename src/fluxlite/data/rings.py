"""A folder of generated rings, each of one named colour on another: what the shipped model cannot
draw and a LoRA teaches it. With circles, which it can, as the prior to keep. Or of recoloured
circles, each with an instruction and the circle before it, as a Kontext model is trained on.

    python -m fluxlite.data.rings --dst rings --count 64 --size 64
    python -m fluxlite.data.rings --dst circles --figure circle --seed 1 --count 2048
    python -m fluxlite.data.rings --dst recoloured --figure recoloured --count 6000

A ring is a circle with a hole of the background's colour, half as wide. The two colours of a
picture stand out from each other, and no colour comes often while another has not come. Pairs of
colours that `is_held_out` are never written.
"""

from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fluxlite.cli.atomic import atomic_folder, naming_setting
from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.options import option
from fluxlite.cli.programs import run_program
from fluxlite.data.fill50k import (
    COLOURS,
    colour_pairs,
    disc_coverage,
    distance_from,
    draw_sample,
    encode_picture,
    is_held_out,
    rgb,
)

# of the picture's side, the outer one: of 64 pixels smaller rings are thinner than the cells of the
# shipped autoencoder can carry
RING_RADIUS = (0.36, 0.46)
HOLE = 0.5  # of the outer radius: the hole's
VISIBLE = 64  # levels of one channel between two colours


def ring_caption(ring, background):
    """`pale golden rod circle ring with old lace background`.

    The shipped T5 spells `ring`, which it never saw, in five tokens, and in their company it hardly
    knows a colour; after `circle` it does.
    """
    return f"{ring} circle ring with {background} background"


def deal_pairs(count, seed):
    """`count` (figure, background) pairs of colours that stand out, none held out.

    They are dealt in rounds, in each of which a colour comes once at most.
    """
    rng = np.random.default_rng(seed)
    pairs, dealt = [pair for pair in colour_pairs(held_out=False) if stands_out(*pair)], []
    while len(dealt) < count:
        used = set()
        for number in rng.permutation(len(pairs)):
            if used.isdisjoint(pairs[number]):
                used.update(pairs[number])
                dealt.append(pairs[number])
    return dealt[:count]


def draw_ring(index, pair, *, size, seed):
    """Sample `index`: a ring of a pair of colours as (size, size, 3) uint8, and its caption."""
    rng, (ring, background) = np.random.default_rng((seed, index)), pair
    radius = rng.uniform(*RING_RADIUS) * size
    distance = distance_from(rng.uniform(radius, size - radius, 2), size)
    inside = disc_coverage(distance, radius) - disc_coverage(distance, HOLE * radius)
    target = rgb(background) + inside * (rgb(ring) - rgb(background))
    return np.rint(target).astype(np.uint8), ring_caption(ring, background)


def draw_circle(index, pair, *, size, seed):
    """The same for a circle of fill50k."""
    target, _, caption = draw_sample(index, size=size, seed=seed, choices=[pair])
    return target, caption


def recolour_caption(colour):
    """`colour the circle pale golden rod`, an instruction."""
    return f"colour the circle {colour}"


def draw_recoloured(index, pair, *, size, seed):
    """A circle of fill50k, the instruction that it follows, and the same circle in another colour,
    which stands out too.
    """
    draw, (circle, background) = np.random.default_rng((seed, index, 1)), pair
    others = [name for name in COLOURS if stands_out(name, background)]
    other = others[draw.integers(len(others))], background
    target, before = (draw_circle(index, p, size=size, seed=seed)[0] for p in (pair, other))
    return target, recolour_caption(circle), before


def stands_out(name, background):
    """Whether a colour is far from another one, in a pair that is not held out."""
    far = np.abs(rgb(name) - rgb(background)).max() >= VISIBLE
    return bool(far) and not is_held_out(name, background)


FIGURES = {"ring": draw_ring, "circle": draw_circle, "recoloured": draw_recoloured}


@dataclass
class RingsConfig:
    """What the command line of this module takes."""

    dst: str = option(MISSING, "folder to write; must not exist", path=True)
    figure: str = option("ring", "what is drawn", choices=tuple(FIGURES))
    count: int = option(64, "pictures", at_least=1, at_most=100_000)
    size: int = option(64, "side of the pictures in pixels", at_least=16, at_most=16_384)
    seed: int = option(0, "of every picture", at_least=0, at_most=2**64 - 1)


def write_figures(config):
    """Write the folder that a `RingsConfig` names: pictures and a .txt beside each, and what was
    recoloured as .ref.png.
    """
    draw, dst = FIGURES[config.figure], Path(config.dst).resolve()
    with naming_setting(f"--dst {config.dst}", "name another folder"):
        dst.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(dst) as folder:
        if folder is None:
            raise ValueError(f"--dst {config.dst} exists: remove it or name another folder")
        for i, pair in enumerate(deal_pairs(config.count, config.seed)):
            picture, caption, *before = draw(i, pair, size=config.size, seed=config.seed)
            for ending, one in zip(("png", "ref.png"), (picture, *before)):
                (folder / f"{i:05d}.{ending}").write_bytes(encode_picture(one, "png"))
            (folder / f"{i:05d}.txt").write_text(caption)


def generate_folder(arguments):
    """The program."""
    write_figures(parse_flags(RingsConfig, arguments))


if __name__ == "__main__":
    run_program(generate_folder, usage=partial(flags_help, RingsConfig, __doc__), ranks=False)
