"""What the code computes now beside the golden files; `make_golden` has how they were made."""

import itertools
import json

import numpy as np
import pytest
import torch
from make_golden import (
    DRAWINGS,
    FOLDER,
    NETS,
    draw_golden,
    make_golden_nets,
    sketch_step,
    step_path,
    take_our_step,
    take_their_step,
)

import fluxlite


@pytest.fixture(scope="module")
def pipeline():
    return fluxlite.load_pipeline(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", DRAWINGS)
def test_pictures_and_latents_are_the_golden_ones(pipeline, name):
    pictures, latents = draw_golden(pipeline, DRAWINGS[name])
    golden = np.load(FOLDER / "pictures.npz")[name].astype(int)
    assert golden.std() > 20 and np.abs(pictures - golden).max() <= 1
    golden = np.load(FOLDER / "latents.npz")[name]
    assert golden.std() > 0.5
    assert np.linalg.norm(latents - golden) <= 1e-5 * np.linalg.norm(golden)


def test_no_two_golden_drawings_are_alike():
    """So control, true CFG and seed each have an effect that the bounds can see."""
    golden = dict(np.load(FOLDER / "latents.npz"))
    assert golden.keys() == DRAWINGS.keys()
    for one, other in itertools.combinations(golden.values(), 2):
        assert np.linalg.norm(one - other) > 0.01 * np.linalg.norm(one)


@pytest.mark.parametrize("kind", NETS)
def test_loss_and_every_gradient_are_the_golden_ones(kind):
    golden = read_golden_step(kind)
    found = sketch_step(*take_our_step(*make_golden_nets(NETS[kind])))
    assert found.keys() == golden.keys()
    assert found.pop("loss") == pytest.approx(golden.pop("loss"), rel=1e-6)
    worst = {name: relative_change(found[name], golden[name]) for name in golden}
    assert {name: change for name, change in worst.items() if change > 1e-5} == {}


@pytest.mark.parametrize("kind", NETS)
def test_golden_gradients_are_those_of_diffusers_and_zero_only_where_they_are(kind):
    golden = read_golden_step(kind)
    loss, gradients = take_their_step(*make_golden_nets(NETS[kind]))
    theirs = sketch_step(loss, gradients)
    assert theirs.keys() == golden.keys()
    assert golden.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-6)
    dead = {name for name in golden if not gradients[name].any()}
    assert {name for name, (norm, *_) in golden.items() if norm == 0} == dead
    # where doubles are all, the last one's text goes nowhere
    assert bool(dead) == (kind == "controlnet of doubles")
    assert max(relative_change(golden[name], theirs[name]) for name in golden) < 1e-5


def read_golden_step(kind):
    return json.loads(step_path(kind).read_text())


def relative_change(found, golden):
    """The largest difference of a sketch's numbers, relative to the golden norm.

    Infinite where that norm is zero and a number is not.
    """
    largest = max(abs(a - b) for a, b in zip(found, golden))
    return largest / golden[0] if golden[0] else largest and float("inf")
