"""Drawing by several processes: what they draw is what one draws, each picture once.

The reference is one process. Ranks are forked (`on_ranks`); torchrun's own are in the slow part.
"""

import json
import os
import runpy
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from on_ranks import on_ranks
from PIL import Image

from fluxlite.draw import sharing
from fluxlite.draw.pipeline import open_pipeline
from fluxlite.draw.plan import plan_drawing
from fluxlite.settings import load_settings

ROOT = Path(__file__).parents[1]
infer = runpy.run_path(str(ROOT / "infer.py"))
FAST = ["device=cpu", "dtype=float32", "steps=2", "height=32", "width=32", "compile=false"]
PROMPTS = ["prompt=red circle with blue background", "prompt=gold circle", "prompt=a"]


def drawn(folder):
    """{(prompt's number, picture's number): pixels} and the contact sheet's, under None."""
    found = {}
    for path in Path(folder).glob("*.png"):
        picture = Image.open(path)
        about = json.loads(picture.text["fluxlite"]) if "fluxlite" in picture.text else None
        key = about and (about["prompt_number"], about["picture_number"])
        assert key not in found
        found[key] = np.asarray(picture, np.int64)
    return found


def draw_ways(folder, ways):
    """Draw on this rank, in a folder for each of some ways, {name: arguments}."""
    for name, arguments in ways.items():
        config = load_settings("infer", [*FAST, *arguments, f"output={folder}/{name}"])
        joined = sharing.join_sharing(config.parallel, config.device)
        draw = infer["draw_jobs" if config.jobs else "draw_prompts"]
        draw(config, joined, lambda stage: nullcontext())


def draw_on(ranks, folder, **ways):
    on_ranks(ranks, partial(draw_ways, folder, ways), folder)
    return {name: drawn(folder / name) for name in ways}


def farthest(ours, theirs):
    """The largest difference of two drawings, in levels."""
    assert ours.keys() == theirs.keys()
    return max(np.abs(ours[key] - theirs[key]).max() for key in ours)


def test_two_ranks_draw_what_one_process_draws(tmp_path):
    """Three batches of a ControlNet and true CFG: dealt to the ranks, and shared by them."""
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).save(tmp_path / "photo.png")
    guided = ["true_cfg=2", "negative_prompt=a fox", f"control_image={tmp_path}/photo.png"]
    common = [*PROMPTS, *guided, "images_per_prompt=2", "batch=2"]
    one = draw_on(1, tmp_path, one=common)["one"]
    assert len(one) == 7 and None in one
    ways = {way: [*common, f"parallel.{way}=2"] for way in ("tp", "cp", "cfg")}
    found = draw_on(2, tmp_path, spread=common, **ways)
    assert farthest(found["spread"], one) == farthest(found["cfg"], one) == 0
    assert farthest(found["tp"], one) <= 1 and farthest(found["cp"], one) <= 1
