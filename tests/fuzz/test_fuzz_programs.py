"""Programs as processes: stopped at any moment, and on disks that are full, they end with one
line.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "flux-tiny"
SMALL = ["height=64", "width=64", "steps=8", "batch=2", "images_per_prompt=9"]
PREFLIGHT = ["model=flux_tiny", "data=mock", "data.global_batch=4", "data.val_count=4"]
PROGRAMS = {
    "infer": lambda out: [
        "infer.py",
        "prompt=red circle with blue background",
        *SMALL,
        f"output={out}",
    ],
    "prove": lambda out: [
        "prove.py",
        "--num",
        "8",
        "--swaps",
        "4",
        "--batch",
        "2",
        "--output",
        out,
    ],
    "convert": lambda out: [
        "convert_hf.py",
        "--src",
        str(TINY),
        "--dst",
        out,
        "--to",
        "diffusers",
        "--verify",
    ],
    "preflight": lambda out: [
        "-m",
        "fluxlite.preflight",
        "--ranks",
        "4",
        *PREFLIGHT,
        f"output={out}",
    ],
    "generator": lambda out: [
        "-m",
        "fluxlite.data.fill50k",
        "--dst",
        out,
        "--count",
        "4000",
        "--size",
        "64",
    ],
}


def start_program(name, out, **options):
    """The process of a program that writes to the folder `out`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *PROGRAMS[name](str(out))]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, **pipes, **options
    )


def wait_for_handler(process):
    """Wait until SIGTERM has a handler: a program's first moment."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def leftovers(folder):
    """What a stopped writer left: anything whose name says that it is not whole."""
    return [str(p.relative_to(folder)) for p in folder.rglob(".*")]


def members_of(group):
    """The processes of a process group that are alive."""
    found = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True)
    return found.stdout.split()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_stopped_at_any_moment_ends_with_one_line_and_leaves_nothing_half_written(
    name, seed, tmp_path
):
    rng = random.Random(f"{name}/{seed}")
    number, whole_group = rng.choice([signal.SIGINT, signal.SIGTERM]), rng.random() < 0.5
    process = start_program(name, tmp_path / "out")
    wait_for_handler(process)
    time.sleep(rng.uniform(0, 1) ** 2 * 14)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    codes = {signal.SIGINT: (130, "stopped"), signal.SIGTERM: (143, "stopped by SIGTERM")}
    code, line = codes[number]
    about = f"{number.name}, group {whole_group}: {process.returncode}: {err[-1500:]}"
    assert "Traceback" not in err and process.returncode in (0, code), about
    assert process.returncode == 0 or err.rstrip("\n").splitlines()[-1] == line, about
    assert leftovers(tmp_path) == [] and members_of(process.pid) == []
    for picture in tmp_path.rglob("*.png"):
        Image.open(picture).load()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("limit", [3000, 50_000])
@pytest.mark.parametrize("name", ["infer", "prove", "convert", "generator"])
def test_a_file_too_large_for_its_user_is_one_line_and_nothing_is_left_half_written(
    name, limit, tmp_path
):
    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start_program(name, tmp_path / "out", preexec_fn=prepare)
    _, err = process.communicate(timeout=300)
    assert process.returncode in ((2,) if limit < 50_000 else (0, 2)), err[-1500:]
    assert str(tmp_path / "out") in err or process.returncode == 0, err[-1500:]
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert len(lines) == (process.returncode == 2) and "Traceback" not in err, err[-1500:]
    assert leftovers(tmp_path) == []
    for picture in tmp_path.rglob("*.png"):
        Image.open(picture).load()
