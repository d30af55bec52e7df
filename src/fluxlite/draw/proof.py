"""Whether a model has learnt fill50k, from the pictures that it draws of held-out pairs of colours.

`prove` takes any function that draws. It compares with two controls: the same pictures under each
other's prompts, and pairs whose two colours change places under the same seed.
"""

import time
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fluxlite.cli.options import option, same_option
from fluxlite.data.circles import (
    MAX_COLOUR_ERROR,
    MIN_IOU,
    colour_difference,
    figure_mask,
    measure_circle,
    measure_ring,
)
from fluxlite.data.fill50k import COLOURS, circle_caption, colour_pairs, draw_sample, rgb
from fluxlite.data.rings import recolour_caption, ring_caption
from fluxlite.draw.pipeline import DrawConfig, PartsConfig
from fluxlite.nets.schedule import SampleConfig

# ΔE between the two colours of a pair: more than twice MAX_COLOUR_ERROR, so that no colour can pass
# for both
MIN_DIFFERENCE = 25.0
NUM_PAIRS = 796  # that are held out and so different
HOLE_MARGIN = (0.03, 0.12)  # of the side: how far a hole reaches beyond its circle, on each side
MIN_INSIDE = 0.95  # of a figure that fills a hole: what lies in it


@dataclass
class ProofConfig:
    """What `prove.py` takes."""

    checkpoint: str | None = option(
        None,
        "a run, a pipeline folder or a transformer; null: the shipped tiny pipeline",
        path=True,
        key="model.checkpoint",
    )
    t5: str | None = same_option(PartsConfig, "t5", key="model.t5")
    clip: str | None = same_option(PartsConfig, "clip", key="model.clip")
    tokenizers: str | None = same_option(PartsConfig, "tokenizers", key="model.tokenizers")
    autoencoder: str | None = same_option(PartsConfig, "autoencoder", key="model.autoencoder")
    controlnet: str | None = option(
        None,
        "a ControlNet, for instance a run; its pictures then follow control pictures",
        path=True,
        key="controlnet.checkpoint",
    )
    kind: str | None = option(
        None,
        "a model.kind= that the checkpoint is: it follows outlines, fills holes, recolours circles",
        choices=("control", "fill", "kontext"),
    )
    control_size: int = option(
        64, "side of the pictures that are given, in pixels", at_least=16, at_most=16_384
    )
    lora: str | None = option(
        None,
        "a LoRA that teaches rings, for instance a run: rings with it and without, and circles",
        path=True,
        key="lora",
    )
    circles: int | None = option(
        None, "with --lora, pictures of circles; null: 500", at_least=1, at_most=NUM_PAIRS
    )
    num: int = option(200, "held-out pairs of colours to draw", at_least=2, at_most=NUM_PAIRS)
    swaps: int | None = option(
        None,
        "of these, how many are drawn again with their colours swapped; null: 50 or all",
        at_least=0,
        at_most=NUM_PAIRS,
    )
    steps: int | None = same_option(SampleConfig, "steps", default=None)
    guidance: float | None = same_option(SampleConfig, "guidance", default=None)
    true_cfg: float | None = same_option(
        SampleConfig,
        "true_cfg",
        default=None,
        help="classifier-free guidance away from the empty caption; null: the checkpoint's own",
    )
    seed: int = same_option(DrawConfig, "seed", help="of the choice of pairs and of the noise")
    batch: int = same_option(DrawConfig, "batch", default=50)
    output: str = option("outputs/proof", "folder for proof.json and grid.png", path=True)
    overwrite: bool = option(False, "replace a proof that is there")

    def validate(self):
        """Raise `ValueError` for flags that contradict each other, or where a proof is there."""
        if (self.swaps or 0) > self.num:
            raise ValueError(f"--swaps={self.swaps} must be at most --num={self.num}")
        given = self.controlnet or self.kind
        if not given and self.control_size != type(self).control_size:
            raise ValueError("--control-size is of a ControlNet's pictures: name --controlnet too")
        others = {"--controlnet": self.controlnet, "--lora": self.lora, "--swaps": self.swaps}
        named = ", ".join(flag for flag, value in others.items() if value is not None)
        if self.kind and named:
            raise ValueError(f"--kind={self.kind} is measured by itself: leave out {named}")
        if self.lora and (self.controlnet or self.swaps is not None):
            other = "--controlnet" if self.controlnet else "--swaps"
            raise ValueError(f"--lora is measured by rings: leave out {other}")
        if self.circles and not self.lora:
            raise ValueError("--circles are drawn with a LoRA: name --lora too")
        there = Path(self.output) / "proof.json"
        if there.exists() and not self.overwrite:
            raise ValueError(f"{there} exists: pass --overwrite, or another --output")


def choose_pairs(num, seed):
    """`num` different held-out (circle, background) pairs of clearly different colours, up to
    `NUM_PAIRS`, the same for the same seed.
    """
    candidates = [
        (a, b)
        for a, b in colour_pairs(held_out=True)
        if colour_difference(rgb(a), rgb(b)) > MIN_DIFFERENCE
    ]
    return [candidates[i] for i in np.random.default_rng(seed).permutation(len(candidates))[:num]]


def draw_controls(chosen, size, seed):
    """For each pair a control picture of the generator's, a PIL image, and the disc (size, size)
    bool that it outlines.
    """
    found = []
    for number, pair in enumerate(chosen):
        target, control, _ = draw_sample(number, size=size, seed=seed + 1_000_003, choices=[pair])
        found.append((Image.fromarray(control), figure_mask(target, *pair)))
    return found


def prove_position(pictures, chosen, controls):
    """How many figures lie where their control has them, and where another's has them: by the IoU
    of the figure with the disc that the control outlines.
    """
    discs = np.array([disc for _, disc in controls])
    figures, ious = find_figures(pictures, chosen, discs), {}
    for key, other in (("position", discs), ("shuffled_position", np.roll(discs, -1, axis=0))):
        both, either = (figures & other).sum((1, 2)), (figures | other).sum((1, 2))
        ious[key] = both / np.maximum(either, 1)
    shares = {key: float(np.mean(of >= MIN_IOU)) for key, of in ious.items()}
    return shares | {"median_position_iou": float(np.median(ious["position"]))}


def find_figures(pictures, chosen, places):
    """Where the figures of pictures are, as one of its pair of colours each: (N, H, W) bool, as
    `places` are.
    """
    size = places.shape[:0:-1]
    pixels = (np.asarray(picture.convert("RGB").resize(size)) for picture in pictures)
    return np.array([figure_mask(p, *colours) for p, colours in zip(pixels, chosen)])


def measure_all(pictures, chosen):
    """What `measure_circle` says of each picture, as one of its pair of colours."""
    return [measure_circle(picture, *pair) for picture, pair in zip(pictures, chosen, strict=True)]


def mean_of(results, key):
    """The mean of a measurement's key: of what is true or not, a share."""
    return sum(result[key] for result in results) / len(results)


def prove(draw, *, num, num_swaps=None, seed, control_size=None):
    """The report of a model that `draw(prompts, controls)` → PIL pictures stands for, the pictures,
    and one measurement for each.

    `draw` must give the picture at a position the same noise in every call, so that a swapped pair
    shares its noise. Its controls are None, or with `control_size` square pictures of so many
    pixels, one a prompt.
    """
    chosen = choose_pairs(num, seed)
    num_swaps = min(50, num) if num_swaps is None else num_swaps
    controls = draw_controls(chosen, control_size, seed) if control_size else []
    images = [image for image, _ in controls] or None
    prompts = [circle_caption(*pair) for pair in chosen]
    began = time.perf_counter()
    pictures = draw(prompts, images)
    report = {"num": num, "num_swaps": num_swaps}
    report["seconds_per_picture"] = (time.perf_counter() - began) / num
    own = measure_all(pictures, chosen)
    others = measure_all(pictures, chosen[1:] + chosen[:1])  # everyone gets a neighbour's
    swaps = draw_swapped(draw, chosen[:num_swaps], images)
    report |= summarise_results(own, others, swaps)
    if controls:
        report |= prove_position(pictures, chosen, controls)
    return report, pictures, [{"prompt": p, **result} for p, result in zip(prompts, own)]


def prove_rings(draw, *, num, seed):
    """How many of the pictures that `draw(prompts)` gives of rings of held-out pairs of colours are
    rings, the pictures, and one measurement for each.

    The pairs are those of `prove` with the same seed: call it once with a LoRA and once without.
    """
    chosen = choose_pairs(num, seed)
    prompts = [ring_caption(*pair) for pair in chosen]
    pictures = draw(prompts)
    results = [measure_ring(picture, *pair) for picture, pair in zip(pictures, chosen, strict=True)]
    shares = {key: mean_of(results, key) for key in ("ring", "shape", "right", "depth")}
    report = {"num": num, **shares}
    return report, pictures, [{"prompt": p, **result} for p, result in zip(prompts, results)]


def prove_lora(draw, *, num, num_circles, seed):
    """The report of what a LoRA teaches, rings, and what it costs, circles; its pictures and
    measurements as `prove_rings` has them.

    `draw(prompts, strength)` gives PIL pictures, for strength None without the LoRA, and the
    picture at a position the same noise in every call.
    """
    report, pictures, results = prove_rings(lambda p: draw(p, 1.0), num=num, seed=seed)
    for name, strength in (("half", 0.5), ("without", None)):
        other, *_ = prove_rings(partial(draw, strength=strength), num=num, seed=seed)
        report |= {f"{key}_{name}": other[key] for key in ("ring", "depth")}
    chosen = choose_pairs(num_circles, seed)
    prompts = [circle_caption(*pair) for pair in chosen]
    for name, strength in (("", 1.0), ("_without", None)):
        found = measure_all(draw(prompts, strength), chosen)
        report[f"circle{name}"] = mean_of(found, "right")
    nothing, base = (draw(prompts[:1], strength)[0] for strength in (0.0, None))
    report["same_at_0"] = bool(np.array_equal(nothing, base))
    return report | {"num_circles": num_circles}, pictures, results


LORA_ROWS = {
    "ring": "rings with the LoRA",
    "ring_half": "rings at half its strength",
    "ring_without": "rings without it",
    "depth": "depth of the holes with the LoRA",
    "depth_half": "at half its strength",
    "depth_without": "without it",
    "circle": "circles with the LoRA",
    "circle_without": "circles without it",
}


def format_lora(report):
    """The report of a LoRA as lines for a person."""
    rows = [f"{label:<36}{report[key]:>12.1%}" for key, label in LORA_ROWS.items()]
    same = "yes" if report["same_at_0"] else "no"
    return "\n".join([*rows, f"{'at scale 0 the same picture':<36}{same:>12}"])


def draw_swapped(draw, chosen, images):
    """Measurements of pairs drawn with their two colours swapped."""
    swapped = [pair[::-1] for pair in chosen]
    prompts = [circle_caption(*pair) for pair in swapped]
    return measure_all(draw(prompts, images and images[: len(prompts)]), swapped) if prompts else []


def summarise_results(own, others, swaps):
    """Shares and medians of measurements: of pictures under their own prompts, under others', and
    with swapped colours.
    """
    report = {}
    for prefix, results in (("", own), ("shuffled_", others)):
        for key in ("right", "colours", "shape"):
            report[prefix + key] = mean_of(results, key)
    both = sum(a["colours"] and b["colours"] for a, b in zip(own, swaps))
    report["swap"] = both / len(swaps) if swaps else None
    for key in ("circle_error", "background_error", "iou"):
        report[f"median_{key}"] = float(np.median([result[key] for result in own]))
    return report


# --- models that see a picture --------------------------------------------------------------------

# given: {argument of `generate`: PIL picture}; place: (H, W) bool, where the figure shall be
SeenCase = namedtuple("SeenCase", "prompt given place")


def make_case(kind, number, pair, size, seed):
    """The `SeenCase` of a pair of colours: the generator's outline of a circle; a picture of it in
    another colour, and a hole around it; or that picture as a reference.
    """
    draw = np.random.default_rng((seed, number, 2))
    named = dict(size=size, seed=seed + 1_000_003)
    target, outline, prompt = draw_sample(number, choices=[pair], **named)
    disc = figure_mask(target, *pair)
    if kind == "control":
        return SeenCase(prompt, {"control_image": Image.fromarray(outline)}, disc)
    other = other_colour(pair, draw), pair[1]
    before = Image.fromarray(draw_sample(number, choices=[other], **named)[0])
    if kind == "kontext":
        return SeenCase(recolour_caption(pair[0]), {"reference": before}, disc)
    hole = box_around(disc, draw)
    return SeenCase(prompt, {"image": before, "mask": Image.fromarray(hole)}, hole)


def other_colour(pair, draw):
    """A colour's name that could pass for neither of a pair."""
    every = np.array([rgb(name) for name in COLOURS])
    far = [colour_difference(every, rgb(name)) > MIN_DIFFERENCE for name in pair]
    return draw.choice(np.array(list(COLOURS))[np.logical_and(*far)])


def box_around(disc, draw):
    """A box (H, W) bool around a disc, wider by `HOLE_MARGIN` on each side."""
    margins = np.rint(draw.uniform(*HOLE_MARGIN, 4) * disc.shape[0]).astype(int)
    rows, columns = (np.flatnonzero(disc.any(axis=axis)) for axis in (1, 0))
    top, left = max(rows[0] - margins[0], 0), max(columns[0] - margins[1], 0)
    box = np.zeros_like(disc)
    box[top : rows[-1] + 1 + margins[2], left : columns[-1] + 1 + margins[3]] = True
    return box


def are_in_place(kind, figures, places):
    """Which figures (N, H, W) are where they shall be: in the hole, or where the circle is."""
    both = (figures & places).sum((1, 2))
    if kind == "fill":
        return both >= MIN_INSIDE * np.maximum(figures.sum((1, 2)), 1)
    return both >= MIN_IOU * np.maximum((figures | places).sum((1, 2)), 1)


def judge_cases(kind, pictures, figures, pairs, places):
    """A measurement for each picture, whose figure is as found: right with both colours of its pair
    and its figure in its place.
    """
    results = measure_all(pictures, pairs)
    for result, placed in zip(results, are_in_place(kind, figures, places)):
        result |= {"place": bool(placed), "right": bool(placed and result["colours"])}
    return results


def prove_kind(draw, kind, *, num, size, seed):
    """The report of a model of a kind that `draw(cases)` → PIL pictures stands for, the pictures,
    and one measurement for each.

    Shuffled, a picture is measured as its neighbour's: by that one's colours, and its outline, hole
    or reference.
    """
    chosen = choose_pairs(num, seed)
    cases = [make_case(kind, number, pair, size, seed) for number, pair in enumerate(chosen)]
    pictures, places = draw(cases), np.array([case.place for case in cases])
    figures, report = find_figures(pictures, chosen, places), {"num": num}
    turned = chosen[1:] + chosen[:1], np.roll(places, -1, axis=0)
    own = judge_cases(kind, pictures, figures, chosen, places)
    others = judge_cases(kind, pictures, figures, *turned)
    for key in KIND_ROWS:
        for prefix, results in (("", own), ("shuffled_", others)):
            report[prefix + key] = mean_of(results, key)
    return report, pictures, [{"prompt": c.prompt, **result} for c, result in zip(cases, own)]


KIND_ROWS = {  # of the table: a share, also under shuffled inputs
    "colours": f"both colours right (ΔE2000 ≤ {MAX_COLOUR_ERROR:g})",
    "place": "figure in its place",
    "right": "right in both",
    "shape": f"one circle (IoU ≥ {MIN_IOU:g})",
}


def format_kind(report):
    """The report of a kind as lines for a person."""
    rows = [f"{'':<36}{'own':>12}{'shuffled':>12}"]
    for key, label in KIND_ROWS.items():
        rows.append(f"{label:<36}{report[key]:>12.1%}{report[f'shuffled_{key}']:>12.1%}")
    return "\n".join(rows)


REPORT_ROWS = {  # of the table: a share, also under shuffled prompts
    "colours": f"both colours right (ΔE2000 ≤ {MAX_COLOUR_ERROR:g})",
    "shape": f"one circle (IoU ≥ {MIN_IOU:g})",
    "right": "right in both",
    "position": f"where the control has it (IoU ≥ {MIN_IOU:g})",
}


def format_table(report):
    """The report as lines for a person."""
    rows = [("", "own prompt", "shuffled")]
    for key, label in REPORT_ROWS.items():
        if key in report:
            rows.append((label, f"{report[key]:.1%}", f"{report['shuffled_' + key]:.1%}"))
    if report["num_swaps"]:
        rows.append(("both colours right, also swapped", f"{report['swap']:.1%}", ""))
    errors = f"{report['median_circle_error']:.1f}, {report['median_background_error']:.1f}"
    rows += [
        ("median ΔE2000: circle, background", errors, ""),
        ("median IoU with the best circle", f"{report['median_iou']:.3f}", ""),
        ("seconds per picture, with loading", f"{report['seconds_per_picture']:.2f}", ""),
    ]
    return "\n".join(f"{label:<36}{own:>12}{other:>12}".rstrip() for label, own, other in rows)


def format_verdict(result):
    """A measured picture's caption: its prompt, and what is wrong with it."""
    keys = "colours", "shape", "ring", "place"
    wrong = [key for key in keys if not result.get(key, True)]
    return f"{result['prompt']}\n{'wrong ' + ' and '.join(wrong) if wrong else 'right'}"
