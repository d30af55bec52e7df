"""`profile=`: the steps that are named are recorded, whole and readable, and no others."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from test_trainer import MOCK, configure, train

from fluxlite.cli.command_line import load_config
from fluxlite.cli.profiling import StepProfile, parse_steps
from fluxlite.settings import InferConfig

ROOT = Path(__file__).parents[1]


def events_of(folder):
    [file] = folder.glob("profile-rank*.json")
    return json.loads(file.read_text())["traceEvents"]


def count_of(events, name):
    return sum(event.get("name") == name for event in events)


def test_a_training_records_the_operators_of_the_steps_that_are_named(tmp_path):
    options = [*MOCK, "dtype=float32", "steps=4", "validate_every=0", "sample.every=0"]
    options.append("data.global_batch=2")
    found = {}
    for steps in ("2", "2-3"):
        folder = train(*options, f"profile={steps}", f"output={tmp_path}/{steps}")
        events = events_of(folder)
        found[steps] = count_of(events, "Rotate"), count_of(events, "FanOutBackward")
    assert found["2"] == (2, 4)  # blocks; their linears that read one tensor, and the modulation's
    assert found["2-3"] == (4, 8)
    assert not list(train(*options, f"output={tmp_path}/none").glob("profile*"))


def test_a_drawing_records_the_steps_of_its_first_batch_that_are_named(tmp_path):
    given = ["prompt=a", "images_per_prompt=2", "batch=1", "height=32", "width=32", "steps=4"]
    given += ["device=cpu", "dtype=float32", f"output={tmp_path}"]
    infer = runpy.run_path(str(ROOT / "infer.py"))
    counts = {}
    for steps in ("3", "2-4", "3-9"):  # the last one ends with the batch
        infer["body"]([*given, f"profile={steps}"])
        events = events_of(tmp_path)
        counts[steps] = count_of(events, "aten::scaled_dot_product_attention")
    assert counts["2-4"] == 3 * counts["3"] > 0 and counts["3-9"] == 2 * counts["3"]


def test_steps_that_a_drawing_does_not_take_are_said_and_nothing_is_recorded(tmp_path, caplog):
    given = ["prompt=a", "height=32", "width=32", "steps=2", "device=cpu", "dtype=float32"]
    infer = runpy.run_path(str(ROOT / "infer.py"))
    infer["body"]([*given, "profile=3-4", f"output={tmp_path}"])
    assert caplog.text.count("step 3 was not taken: nothing is recorded") == 1
    assert not list(tmp_path.glob("profile*"))


def test_what_is_recorded_is_written_when_a_run_stops_before_the_last_step(tmp_path, caplog):
    caplog.set_level("INFO", "fluxlite")
    profile = StepProfile((2, 9), tmp_path, "cpu")
    for step in profile.over(range(1, 10)):
        torch.ones(2) @ torch.ones(2)
        if step == 3:
            break
    profile.close()
    assert count_of(events_of(tmp_path), "aten::dot") == 2
    assert caplog.text.count("steps 2 to 3 are recorded") == 1


@pytest.mark.parametrize("steps", [(2, 3), (2, 6), (9, 9)])
def test_that_nothing_is_recorded_is_said_once(steps, tmp_path, caplog):
    profile = StepProfile(steps, tmp_path, "cpu")
    assert [*profile.over(range(4, 8))] == [4, 5, 6, 7]  # of a run that is resumed after step 3
    assert caplog.text.count(f"step {steps[0]} was not taken: nothing is recorded") == 1
    assert not [*tmp_path.iterdir()]


def test_nothing_is_said_where_nothing_is_asked_for(tmp_path, caplog):
    assert [*StepProfile((0, 0), tmp_path, "cpu").over(range(1, 3))] == [1, 2]
    assert not caplog.text


@pytest.mark.parametrize("steps", ["0-3", "3-2", "5", "2-9", "a few", "-1", "", "2-"])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match=f"profile={steps}"):
        configure(*MOCK, "steps=4", f"profile={steps}")


def test_steps_are_read_as_first_and_last():
    assert parse_steps("10-12", 20) == (10, 12) and parse_steps("7", 7) == (7, 7)
    assert parse_steps(None, 20) == (0, 0)
    with pytest.raises(ValueError, match="profile=x: write the steps"):
        load_config(InferConfig, "infer", ["prompt=a", "profile=x"])
