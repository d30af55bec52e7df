"""Writers on disks that refuse; run by `test_disks.py`, which sends a line of JSON for each case.

    {"writer": "infer", "out": "/place/out", "limit": 0, "user": 65534}

Without a limit and a user, the writer runs in this process, once: what it imports is then there for
the others, each of which runs in a process forked off, as a program. The answer is a line of JSON:
{"code", "text": all it wrote}.
"""

import json
import os
import resource
import runpy
import sys
import traceback
from functools import partial
from pathlib import Path

from test_data import config_for, make_cache
from test_trainer import MOCK

import convert_hf
import infer
import prove
import train
from fluxlite import parallel
from fluxlite.cli.programs import run_program
from fluxlite.data import fill50k
from fluxlite.data.opening import open_dataset
from fluxlite.train import metrics, plots
from fluxlite.weights import writing

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "flux-tiny"
FIRST = ROOT / "tests" / "golden" / "first_edition_net.safetensors"
make_random, first_edition = (
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))
    for name in ("make_random", "convert_first_edition")
)
SMALL = ["height=32", "width=32", "steps=1"]
FEW = ["--num", "2", "--swaps", "2", "--steps", "1", "--batch", "4"]
CONVERT = ["--src", str(TINY / "transformer"), "--overwrite", "--dst"]


def write_cache(out):
    tars = Path(os.environ["DISKS_TARS"])
    make_cache(open_dataset(config_for(tars, val_count=1), "train", 0), Path(out))


def write_metrics(tensorboard, out):
    config = metrics.MetricsConfig(tensorboard=tensorboard, progress=False)
    start = 59 if Path(out).exists() else 0
    log = metrics.Metrics(config, out, total_steps=999, start_step=start)
    try:
        for step in range(start + 1, start + 60):
            log.log(step, {"loss": 0.1 * step} | {f"val/loss_t{n / 32}": 0.1 for n in range(32)})
    finally:
        log.close()


def plot_metrics(out):
    Path(out).mkdir(exist_ok=True)
    plots.plot_losses(out)


def run_training(out):
    try:
        train.body(
            [*MOCK, "steps=2", "checkpoint.every=1", "sample.every=1", "resume=auto"]
            + [f"output={out}"]
        )
    finally:
        parallel.stop_ranks()


def infer_converted(out):
    return infer.body(
        ["prompt=a", *SMALL, f"model.checkpoint={TINY}", f"output={out}.pictures"]
        + [f"model.save_converted={out}"]
    )


# each writes to `out` and ends as a program's body does
WRITERS = {
    "infer": lambda out: infer.body(["prompt=a", *SMALL, "images_per_prompt=2", f"output={out}"]),
    "prove": lambda out: prove.body([*FEW, "--output", out]),
    "convert to a file": lambda out: convert_hf.body([*CONVERT, f"{out}.safetensors"]),
    "convert to a folder": lambda out: convert_hf.body([*CONVERT, out, "--to", "diffusers"]),
    "convert to shards": lambda out: convert_hf.body([*CONVERT, out, "--max-shard-size", "200KB"]),
    "save_converted": lambda out: writing.open_converted(TINY, f"{out}.safetensors"),
    "generator": lambda out: fill50k.generate_tars(
        ["--dst", out, "--count", "40", "--size", "32", "--workers", "0"]
    ),
    "make_random": lambda out: make_random["body"](
        ["--dst", out, "--doubles", "0", "--singles", "0"]
    ),
    "first edition": lambda out: first_edition["main"](
        ["--src", str(FIRST), "--dst", f"{out}.safetensors"]
    ),
    "cache": write_cache,
    "metrics": partial(write_metrics, False),
    "tensorboard": partial(write_metrics, True),
    "plot": plot_metrics,
    "train": run_training,
}


def fork_writer(case):
    """A writer as a program in a process of its own, on a disk that refuses."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with open(read, "rb") as pipe:
            text = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return {"code": code, "text": text}
    for stream in (1, 2):
        os.dup2(write, stream)
    os.close(write)
    if case.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], case["limit"]))
    if case.get("user"):
        os.setgroups([])
        os.setgid(case["user"])
        os.setuid(case["user"])
    sys.argv = ["writer"]
    run_program(lambda _: WRITERS[case["writer"]](case["out"]))


def write_here(case):
    """A writer in this process, whose disk refuses nothing."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        WRITERS[case["writer"]](case["out"])
        return {"code": 0, "text": ""}
    except Exception:
        return {"code": 1, "text": traceback.format_exc()}
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def main():
    for line in sys.stdin:
        case = json.loads(line)
        answer = fork_writer(case) if case.keys() & {"limit", "user", "full"} else write_here(case)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
