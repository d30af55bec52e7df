"""Measure whether a model has learnt fill50k: circles and backgrounds of the named colours, for pairs that it never saw together.

    python prove.py                                     # the shipped tiny pipeline
    python prove.py --checkpoint runs/mine --num 500
    python prove.py --controlnet runs/controlnet_tiny   # also: does the circle lie where the control picture has it?

Draws a picture for each of `--num` held-out pairs of colours, measures it (`fluxlite.data.circles`), and compares with two
controls: the same pictures under each other's prompts, and pairs whose two colours change places under the same seed.
Writes proof.json and grid.png, prints a table and, last, one JSON line.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fluxlite.data.circles import MAX_COLOUR_ERROR, MIN_IOU, colour_difference, figure_mask, measure
from fluxlite.data.fill50k import caption, draw_sample, pairs, rgb
from fluxlite.metrics import contact_sheet

MIN_DIFFERENCE = 25.0  # ΔE between the two colours of a pair: more than twice MAX_COLOUR_ERROR, so that no colour can pass for both


def choose_pairs(num, seed):
    """`num` different held-out (circle, background) pairs of clearly different colours, the same for the same seed."""
    candidates = [(a, b) for a, b in pairs(held_out=True) if colour_difference(rgb(a), rgb(b)) > MIN_DIFFERENCE]
    if not 2 <= num <= len(candidates):
        raise ValueError(f"num={num} must be between 2 and {len(candidates)}, the held-out pairs of clearly different colours")
    return [candidates[i] for i in np.random.default_rng(seed).permutation(len(candidates))[:num]]


def draw_controls(chosen, size, seed):
    """For each pair a control picture of the generator's, a PIL image, and the disc (size, size) bool that it outlines."""
    found = []
    for number, pair in enumerate(chosen):
        target, control, _ = draw_sample(number, size=size, seed=seed + 1_000_003, choices=[pair])
        found.append((Image.fromarray(control), figure_mask(target, *pair)))
    return found


def overlap(picture, pair, disc):
    """IoU of the drawn figure with the disc that the control outlines."""
    mask = figure_mask(np.asarray(picture.convert("RGB")), *pair)
    return (mask & disc).sum() / max((mask | disc).sum(), 1)


def prove_position(pictures, chosen, controls):
    """How many figures lie where their control has them, and where another's has them."""
    own = [overlap(picture, pair, disc) for picture, pair, (_, disc) in zip(pictures, chosen, controls)]
    other = [overlap(picture, pair, disc) for picture, pair, (_, disc) in zip(pictures, chosen, controls[1:] + controls[:1])]
    shares = {key: float(np.mean(np.array(ious) >= MIN_IOU)) for key, ious in (("position", own), ("shuffled_position", other))}
    return shares | {"median_position_iou": float(np.median(own))}


def share(results, key):
    return sum(result[key] for result in results) / len(results)


def prove(draw, *, num, num_swaps, seed, control_size=None):
    """The report of a model that `draw(prompts, controls)` → PIL pictures stands for, the pictures, and one measurement for each.

    `draw` must give the picture at a position the same noise in every call, so that a swapped pair shares its noise. Its controls
    are None, or with `control_size` square pictures of so many pixels, one a prompt.
    """
    chosen = choose_pairs(num, seed)
    num_swaps = min(num_swaps, num)
    controls = draw_controls(chosen, control_size, seed) if control_size else []
    images = [image for image, _ in controls] or None
    began = time.perf_counter()
    pictures = draw([caption(*pair) for pair in chosen], images)
    seconds = time.perf_counter() - began
    results = [{"prompt": caption(*pair), **measure(picture, *pair)} for picture, pair in zip(pictures, chosen, strict=True)]
    shuffled = [measure(picture, *pair) for picture, pair in zip(pictures, chosen[1:] + chosen[:1])]  # everyone gets a neighbour's
    swapped = [pair[::-1] for pair in chosen[:num_swaps]]
    swapped_pictures = draw([caption(*pair) for pair in swapped], images and images[:num_swaps]) if swapped else []
    swaps = [measure(picture, *pair) for picture, pair in zip(swapped_pictures, swapped, strict=True)]
    report = {
        **{key: share(results, key) for key in ("right", "colours", "shape")},
        **{f"shuffled_{key}": share(shuffled, key) for key in ("right", "colours", "shape")},
        "swap": sum(a["colours"] and b["colours"] for a, b in zip(results, swaps)) / num_swaps if num_swaps else None,
        "median_circle_error": float(np.median([result["circle_error"] for result in results])),
        "median_background_error": float(np.median([result["background_error"] for result in results])),
        "median_iou": float(np.median([result["iou"] for result in results])),
        "num": num,
        "num_swaps": num_swaps,
        "seconds_per_picture": seconds / num,
    }
    if controls:
        report |= prove_position(pictures, chosen, controls)
    return report, pictures, results


def format_table(report):
    """The report as lines for a person."""
    rows = [
        ("", "own prompt", "shuffled"),
        *(
            (label, f"{report[key]:.1%}", f"{report['shuffled_' + key]:.1%}")
            for key, label in (
                ("colours", f"both colours right (ΔE2000 ≤ {MAX_COLOUR_ERROR:g})"),
                ("shape", f"one circle (IoU ≥ {MIN_IOU:g})"),
                ("right", "right in both"),
                ("position", f"where the control has it (IoU ≥ {MIN_IOU:g})"),
            )
            if key in report
        ),
        *([("both colours right, also swapped", f"{report['swap']:.1%}", "")] if report["num_swaps"] else []),
        ("median ΔE2000: circle, background", f"{report['median_circle_error']:.1f}, {report['median_background_error']:.1f}", ""),
        ("median IoU with the best circle", f"{report['median_iou']:.3f}", ""),
        ("seconds per picture, with loading", f"{report['seconds_per_picture']:.2f}", ""),
    ]
    return "\n".join(f"{label:<36}{own:>12}{shuffled:>12}".rstrip() for label, own, shuffled in rows)


def verdict(result):
    wrong = [key for key in ("colours", "shape") if not result[key]]
    return f"{result['prompt']}\n{'wrong ' + ' and '.join(wrong) if wrong else 'right'}"


def main():
    parser = argparse.ArgumentParser(description="Measure whether a model has learnt fill50k.")
    parser.add_argument("--checkpoint", help="a run, a pipeline folder or a transformer (default: the shipped tiny pipeline)")
    parser.add_argument("--controlnet", help="a ControlNet, for instance a run; its pictures then follow control pictures")
    parser.add_argument("--control-size", type=int, default=64, help="side of the control pictures in pixels")
    parser.add_argument("--num", type=int, default=200, help="held-out pairs of colours to draw")
    parser.add_argument("--swaps", type=int, default=50, help="of these, how many are drawn again with their colours swapped")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the checkpoint's own)")
    parser.add_argument("--guidance", type=float, help="guidance embedding (default: the checkpoint's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs and of the noise")
    parser.add_argument("--batch", type=int, default=50, help="pictures drawn at once")
    parser.add_argument("--output", type=Path, default=Path("outputs/proof"), help="folder for proof.json and grid.png")
    args = parser.parse_args()
    for name, least in (("swaps", 0), ("steps", 1), ("batch", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    args.output.mkdir(parents=True, exist_ok=True)

    how = {key: getattr(args, key) for key in ("checkpoint", "seed", "steps", "guidance", "batch")}

    def draw(prompts, images):
        import fluxlite

        controls = [fluxlite.Control(args.controlnet, images)] if images else []
        given = {k: v for k, v in how.items() if v is not None}
        return fluxlite.generate(prompts, controls=controls, **given, progress=partial(tqdm, leave=False))

    try:
        size = args.control_size if args.controlnet else None
        report, pictures, results = prove(draw, num=args.num, num_swaps=args.swaps, seed=args.seed, control_size=size)
    except ValueError as error:
        parser.error(str(error))
    report |= how | {"controlnet": args.controlnet}
    (args.output / "proof.json").write_text(json.dumps({**report, "pictures": results}, indent=1))
    shown = min(len(pictures), 48)
    contact_sheet(pictures[:shown], columns=8, captions=[verdict(r) for r in results[:shown]]).save(args.output / "grid.png")
    print(format_table(report))
    print(f"pictures: {args.output / 'grid.png'}, measurements: {args.output / 'proof.json'}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
