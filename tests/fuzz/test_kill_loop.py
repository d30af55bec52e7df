"""Runs that are killed again and again end with the weights of an undisturbed one.

    pytest -m slow tests/fuzz/test_kill_loop.py -s  # 40 kills on one process, 40 on two ranks

A run saves at every step, so that many kills fall into a write or between its renames. Set
KILLS and KILL_SEED for other numbers and moments.
"""

import collections
import json
import os
import random
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_processes import ENVIRONMENT, alive, descendants, hidden_files, wait_until
from test_trainer import MOCK, ROOT, command, losses, weights

KILLS, SEED = int(os.environ.get("KILLS", 40)), int(os.environ.get("KILL_SEED", 0))
STEPS = 15 * KILLS  # more than the kills leave time for
COMMON = [
    *MOCK,
    "data.micro_batch=1",
    "data.workers=1",
    f"steps={STEPS}",
    "validate_every=0",
    "metrics.progress=false",
    "checkpoint.keep=5",
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {  # exit codes of what got the signal: in a set-up, in the loop, before Python listens
    signal.SIGKILL: {-9},
    signal.SIGTERM: {143, 0, -15},
    signal.SIGINT: {130, 0, -2},
}


def start_run(folder, ranks, *options):
    """A run in a session of its own, its words in a file."""
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            command(*COMMON, f"output={folder}", *options, ranks=ranks),
            cwd=ROOT,
            stderr=log,
            stdout=log,
            env=ENVIRONMENT,
            start_new_session=True,
        )


def saved_steps(folder):
    """The step of the newest checkpoint, 0 where there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)


def wait_for_steps(rng, folder, process):
    """Until some of the start is over, or a few steps are saved."""
    if rng.random() < 0.15:
        return time.sleep(rng.uniform(0, 6))
    first, count = saved_steps(folder), rng.randint(1, 12)
    while process.poll() is None and saved_steps(folder) < first + count:
        time.sleep(0.002)


def wait_for_write(rng, folder, process):
    """Until the next checkpoint is being written, more often than not, and a moment more."""
    if rng.random() < 0.6 and (folder / "checkpoints").exists():
        while process.poll() is None and not any((folder / "checkpoints").glob(".step-*")):
            time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.06))


def targets(rng, tree, process, ranks):
    """Whom a kill hits: {name: pids}."""
    workers = [pid for pid in tree if is_loader(pid)]
    found = {"run": [process.pid], "all": sorted(tree), "loader": workers[:1]}
    own = [pid for pid in sorted(tree) if is_rank(pid, process.pid)] if ranks else []
    return {name: pids for name, pids in (found | {"rank": own[:1]}).items() if pids}


def about_process(pid, name):
    """What Linux tells of a process, empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_loader(pid):
    """torch gives a loader process this name."""
    return about_process(pid, "comm").startswith("pt_data_worker")


def is_rank(pid, launcher):
    """A child of torchrun that runs the program; torchrun has short-lived others."""
    parent = about_process(pid, "stat").rpartition(")")[2].split()[1:2]
    words = about_process(pid, "cmdline")
    return parent == [str(launcher)] and "train.py" in words and "torch.distributed" not in words


@contextmanager
def watching_last(folder, faults):
    """Read the description of `last` all the time."""
    over = threading.Event()

    def watch():
        file = folder / "checkpoints" / "last" / "meta.json"
        while not over.wait(0.01):
            try:
                if file.parent.parent.is_dir() and any(file.parent.parent.glob("step-*")):
                    json.loads(file.read_text())["step"]
            except (OSError, ValueError, KeyError) as error:
                if (file.parent.parent / "last").is_symlink():
                    faults.append(repr(error))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def kill_once(rng, folder, ranks, number):
    """One start and one kill; what it was, and whether it fell into a write."""
    process = start_run(folder, ranks, "resume=auto", "checkpoint.every=1")
    wait_for_steps(rng, folder, process)
    assert process.poll() is None, (
        f"kill {number}: ended by itself, {process.returncode}; see {folder}.log"
    )
    tree = descendants(process.pid)
    choices = targets(rng, tree, process, ranks)
    name, sent = rng.choice(sorted(choices)), rng.choice(SIGNALS)
    sent = signal.SIGKILL if name == "loader" else sent  # it ignores the others
    wait_for_write(rng, folder, process)
    for pid in choices[name]:
        try:
            os.kill(pid, sent)
        except ProcessLookupError:
            pass
    wait_until(
        lambda: process.poll() is not None, f"kill {number}: {name} {sent.name} ends it", 180
    )
    code = process.returncode
    wait_until(
        lambda: not any(alive(pid) for pid in tree), f"kill {number}, {name}: {tree} end", 20
    )
    if name in ("run", "all") and not ranks:
        assert code in ENDS[sent], f"kill {number}: {name} {sent.name} ended with {code}"
    torn = sent == signal.SIGKILL and folder.is_dir() and bool(hidden_files(folder))
    return f"{name} {sent.name}", torn, process.returncode


def check_last(folder):
    """The newest checkpoint has finite weights and average."""
    if (folder / "checkpoints" / "last").exists():
        for average in (False, True):
            assert all(
                torch.isfinite(value).all() for value in weights(folder, ema=average).values()
            )


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("ranks", [None, 2], ids=["one process", "two ranks"])
def test_a_run_killed_again_and_again_ends_with_an_undisturbed_ones_weights(tmp_path, ranks):
    rng, whole, folder = random.Random(SEED), tmp_path / "whole", tmp_path / "killed"
    assert start_run(whole, ranks, "checkpoint.every=50").wait() == 0, whole.with_suffix(
        ".log"
    ).read_text()
    found, torn, faults = collections.Counter(), 0, []
    with watching_last(folder, faults):
        for number in range(KILLS):
            name, inside, code = kill_once(rng, folder, ranks, number)
            found[name] += 1
            torn += inside
            check_last(folder)
            print(
                f"kill {number}: {name}, exit code {code}, at step "
                f"{saved_steps(folder)}{', in a write' * inside}",
                flush=True,
            )
    assert start_run(folder, ranks, "resume=auto", "checkpoint.every=50").wait() == 0, (
        folder.with_suffix(".log").read_text()
    )
    print(f"seed {SEED}, {KILLS} kills, {torn} in a write: {dict(found)}")
    assert not faults, faults[:3]
    assert torn or KILLS < 20, "no kill fell into a write"
    words = folder.with_suffix(".log").read_text()
    assert "DataLoader worker" not in words.replace("(DataLoader worker", "")
    assert ranks or "Traceback" not in words  # torchrun's own are many
    for average in (False, True):
        expected, ours = weights(whole, ema=average), weights(folder, ema=average)
        assert all(torch.equal(ours[key], value) for key, value in expected.items())
    assert losses(folder) == losses(whole)
