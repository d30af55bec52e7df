"""Steps whose numbers are read while the next one runs, as on an accelerator: here on the CPU."""

import math
import os
import signal

import poison
import pytest
import torch
from test_trainer import MOCK, losses, train, weights

from fluxlite.train import loop, optim
from fluxlite.train.metrics import read_metrics
from fluxlite.weights import run_folder

EVERY_TWO = [*MOCK, "steps=7", "checkpoint.every=2", "checkpoint.keep=0", "validate_every=4"]


@pytest.fixture
def order(monkeypatch):
    """What is launched, read and finished, in order; steps are read late."""
    monkeypatch.setattr(loop, "reads_late", lambda device: True)
    happened = []
    watch(monkeypatch, happened, "launch_step", lambda args, out: out.number)
    watch(monkeypatch, happened, "settle_step", lambda args, out: args[2].number)
    watch(monkeypatch, happened, "finish_step", lambda args, out: args[2])
    return happened


def watch(monkeypatch, happened, name, number):
    real = getattr(loop, name)

    def watched(*args):
        out = real(*args)
        happened.append((name.removesuffix("_step"), number(args, out)))
        return out

    monkeypatch.setattr(loop, name, watched)


def step_folder(run, step):
    return run / f"checkpoints/step-{step:06d}"


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is read step by step, with every second step's checkpoint."""
    return train(*EVERY_TWO, f"output={tmp_path_factory.mktemp('whole')}/run")


def test_a_step_is_read_while_the_next_one_runs_but_first_where_something_is_due(
    tmp_path, order, whole
):
    folder = train(*EVERY_TWO, f"output={tmp_path}/run")
    first = [("launch", 1), ("launch", 2), ("settle", 1), ("settle", 2), ("finish", 2)]
    assert order[:5] == first and ("finish", 3) not in order
    assert order[5:8] == [("launch", 3), ("launch", 4), ("settle", 3)]
    assert order[-4:] == [("finish", 6), ("launch", 7), ("settle", 7), ("finish", 7)]
    assert losses(folder) == losses(whole)
    for step in (2, 4, 6, 7):
        assert same_weights(step_folder(folder, step), step_folder(whole, step))


@pytest.mark.parametrize("bad_step", [2, 3, 5])
def test_a_bad_step_is_named_though_the_next_is_launched_and_nothing_of_either_is_saved(
    tmp_path, order, whole, bad_step
):
    seen = samples_of(whole, bad_step)
    saved = bad_step // 2 * 2 - 2 * (bad_step % 2 == 0)
    remedy = f"step-{saved:06d} is whole" if saved else "no checkpoint to go on from"
    with poison.poisoned_gradient(math.nan, call=bad_step):
        with pytest.raises(ValueError, match=f"norm of step {bad_step} is nan.*: {seen}.*{remedy}"):
            train(*EVERY_TWO, f"output={tmp_path}/run")
    launched = max(number for what, number in order if what == "launch")
    assert launched == (bad_step if bad_step % 2 == 0 else bad_step + 1)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == list(
        range(1, bad_step)
    )
    if saved:
        assert same_weights(tmp_path / "run", step_folder(whole, saved))
        resumed = train(*EVERY_TWO, f"output={tmp_path}/run", "resume=auto")
        assert same_weights(resumed, whole) and losses(resumed) == losses(whole)


def samples_of(run, step):
    """The samples of a step of four, as an error lists them."""
    return ", ".join(f"mock/{index % 20}" for index in range(4 * (step - 1), 4 * step))


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_step_that_is_skipped_changes_no_weight_and_is_counted(
    tmp_path, monkeypatch, caplog, late
):
    monkeypatch.setattr(loop, "reads_late", lambda device: late)
    options = [*MOCK, "steps=7", "checkpoint.every=1", "checkpoint.keep=0", "validate_every=0"]
    options += ["optim.nonfinite=skip", f"output={tmp_path}/run"]
    if late:
        options += ["checkpoint.every=3"]
    with poison.poisoned_gradient(math.nan, call=5):
        folder = train(*options)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows if row.get("skipped")] == [5]
    assert [row["step"] for row in rows if math.isnan(row.get("grad_norm", 0))] == [5]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 8))
    assert f"norm of step 5 is nan; its samples: {samples_of(folder, 5)}" in caplog.text
    if not late:
        assert same_weights(step_folder(folder, 4), step_folder(folder, 5))
        assert not same_weights(step_folder(folder, 5), step_folder(folder, 6))


def test_what_is_skipped_is_the_same_late_or_at_once_and_resumed(tmp_path, monkeypatch):
    options = [*EVERY_TWO, "optim.nonfinite=skip"]
    for late in (False, True):
        monkeypatch.setattr(loop, "reads_late", lambda device, late=late: late)
        with poison.poisoned_gradient(math.nan, call=3):
            train(*options, f"output={tmp_path}/{late}")
    at_once, late = tmp_path / "False", tmp_path / "True"
    assert same_weights(at_once, late) and losses_alike(at_once, late)
    with poison.poisoned_gradient(math.nan, call=3):
        train(*options, "steps=4", f"output={tmp_path}/resumed")
    resumed = train(*options, f"output={tmp_path}/resumed", "resume=auto")
    assert same_weights(at_once, resumed) and losses_alike(at_once, resumed)


def losses_alike(a, b):
    """Whether two runs' losses are the same, but for those that are null."""
    a, b = losses(a), losses(b)
    return a == b


def test_a_run_that_only_skips_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED", 3)
    monkeypatch.setattr(optim, "gradient_norm", lambda *_: torch.tensor(math.nan))
    with pytest.raises(ValueError, match=r"step 3 is .*\(and of the 2 steps before\)"):
        train(*MOCK, "steps=9", "optim.nonfinite=skip", f"output={tmp_path}/run")


def stop_in_step(monkeypatch, number):
    """SIGTERM comes while a step is launched."""
    real = loop.train_step

    def stopped(run, batches, step):
        if step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, batches, step)

    monkeypatch.setattr(loop, "train_step", stopped)


@pytest.mark.parametrize("asked,saved", [(3, 4), (4, 4), (1, 2)])
def test_a_stop_signal_saves_the_newest_launched_step_and_loses_nothing(
    tmp_path, order, monkeypatch, whole, asked, saved
):
    with monkeypatch.context() as patch:
        stop_in_step(patch, asked)
        folder = train(*EVERY_TWO, f"output={tmp_path}/run")
    assert run_folder.read_meta(folder / "checkpoints/last").step == saved
    assert same_weights(folder, step_folder(whole, saved))
    resumed = train(*EVERY_TWO, f"output={folder}", "resume=auto")
    assert losses(resumed) == losses(whole) and same_weights(resumed, whole)


def test_a_stop_signal_between_due_steps_saves_the_step_after(tmp_path, order, monkeypatch):
    common = [*MOCK, "steps=9", "checkpoint.every=99", "validate_every=0", "sample.every=0"]
    stop_in_step(monkeypatch, 3)
    folder = train(*common, f"output={tmp_path}/run")
    assert order[-3:] == [("settle", 3), ("settle", 4), ("finish", 4)]
    assert run_folder.read_meta(folder / "checkpoints/last").step == 4
    assert [row["step"] for row in read_metrics(folder) if "loss" in row] == [1, 2, 3, 4]


def test_a_step_that_is_bad_after_a_stop_signal_is_not_saved(tmp_path, order, monkeypatch):
    common = [*MOCK, "steps=9", "checkpoint.every=99", "validate_every=0", "sample.every=0"]
    stop_in_step(monkeypatch, 3)
    with poison.poisoned_gradient(math.nan, call=4):
        with pytest.raises(ValueError, match="norm of step 4 is nan"):
            train(*common, f"output={tmp_path}/run")
    assert not (tmp_path / "run/checkpoints").exists()
