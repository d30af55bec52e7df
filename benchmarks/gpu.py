"""What one GPU or several do: is it right, and how fast beside diffusers. One command:

    python benchmarks/gpu.py                      # all GPUs there are; under 8 minutes on one
    python benchmarks/gpu.py --only tests train   # some sections

Needs `pip install -e '.[test]'`. Correctness comes first: `pytest -m gpu`. Then, with random
weights made on the GPU: a step of our sampler beside diffusers', eager and compiled; a training
step and its peak memory under each checkpointing, and of a LoRA; float8; loading; the autoencoder;
FSDP2 and tensor parallelism where there are several GPUs. A model that does not fit is made less
deep, and its rows say so. Each section is a process with a limit of seconds; what does not fit is
named as skipped.

Prints a table, a JSON line and, last, the table in Markdown for docs/performance.md. Exit code 1
where a test failed, 2 without a GPU.

TFLOP/s count two operations to a multiply-add of the forward, three forwards to a training step, of
a LoRA two; MFU is their share of the device's dense bf16 peak.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from itertools import chain

import torch
from gpu_sections import (
    MESH_SECONDS,
    SCRIPT,
    SECTIONS,
    TINY,
    Clock,
    Scale,
    child_arguments,
    last_words,
    mesh_rows,
    rank_rows,
    run_limited,
    skipped_row,
)

from fluxlite import parallel
from fluxlite.cli.programs import run_program
from fluxlite.parallel import compilation

MINUTES = 8  # on one GPU


def find_scale(args):
    """The `Scale` of this machine; raises `ValueError` where it has no GPU."""
    if args.tiny:
        compilation.BACKEND = "eager"  # what is run here is this script
        return TINY
    if not torch.cuda.is_available():
        raise ValueError(
            "there is no GPU: nothing was measured, and `pytest -m gpu` skips its tests"
        )
    memory = torch.cuda.get_device_properties(0).total_memory
    return Scale(ranks=torch.cuda.device_count(), memory=memory)


# --- one process for each section -----------------------------------------------------------------


def run_child(scale, section, seconds):
    """The rows of a section, made by a process of its own that is killed when its time is up."""
    with tempfile.NamedTemporaryFile("r") as file:
        own = child_arguments(scale, section, seconds, file.name)
        command = [sys.executable, str(SCRIPT), *own]
        found = run_limited(command, seconds + 5, start_new_session=True)
        rows = [json.loads(line) for line in file.read().splitlines()]
        if found is None:
            short = f"{seconds:.0f} s were not enough"
            return [*rows, skipped_row(f"the rest of {section}", short)]
        if found.returncode:
            said = f"failed: {last_words(found.stderr)}"
            return [*rows, {"what": section, "note": said, "failed": True}]
        return rows


def write_rows(rows, path):
    """Write rows as they come, a line each: what is killed leaves those that it has made."""
    with open(path, "a") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)


def as_child(args):
    """The process of one section, or of one rank."""
    scale, clock = find_scale(args), Clock(args.seconds)
    if args.section == "ranks":
        rows = rank_rows(scale, clock, args.mesh)
    else:
        rows = SECTIONS[args.section][0](scale, clock)
    write_rows(rows, args.result if parallel.rank() == 0 else os.devnull)


def measure_sections(scale, names, minutes, run=run_child):
    """{section: rows} of some sections, within so many minutes; what one leaves, the next has."""
    end, found = time.perf_counter() + 60 * minutes, {}
    for number, name in enumerate(names):
        reserved = sum(SECTIONS[later][1] for later in names[number + 1 :])
        left = end - time.perf_counter()
        seconds = max(min(SECTIONS[name][1], left), left - reserved)
        if seconds < 5:
            found[name] = [skipped_row(name, "no time was left")]
            continue
        print(f"{name}: at most {seconds:.0f} s …", file=sys.stderr, flush=True)
        found[name] = run(scale, name, seconds)
    return found


# --- report ---------------------------------------------------------------------------------------

COLUMNS = {  # heading: (key of a row, how it is shown)
    "ms": ("ms", "{:.1f}"),
    "× diffusers": ("ratio", "{:.2f}"),
    "TFLOP/s": ("tflops", "{:.0f}"),
    "MFU": ("mfu", "{:.0%}"),
    "peak GB": ("gb", "{:.1f}"),
    "": ("note", "{}"),
}


def row_cells(row):
    """A row as texts, one for each column, the first of them what was measured."""
    shown = [(row.get(key), form) for key, form in COLUMNS.values()]
    return [row["what"], *("" if value is None else form.format(value) for value, form in shown)]


def print_table(found):
    """The rows of all sections, for a terminal."""
    every = map(row_cells, chain.from_iterable(found.values()))
    heads = ["", *COLUMNS]
    widths = [max(map(len, column)) for column in zip(heads, *every)]
    for name, rows in found.items():
        print(f"\n{name}")
        for cells in [heads, *map(row_cells, rows)]:
            first, *middle, last = (cell.ljust(w) for cell, w in zip(cells, widths))
            print("  ".join([first, *(c.strip().rjust(len(c)) for c in middle), last]).rstrip())


def markdown_block(found, about):
    """The same for docs/performance.md."""
    said = f"{about['gpus']} x {about['device']}, torch {about['torch']}, CUDA {about['cuda']}"
    lines = [f"Measured by `benchmarks/gpu.py` on {said}, {about['date']}, random weights.", ""]
    lines += [f"| {' | '.join(['', *COLUMNS])} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, rows in found.items():
        lines.append(f"| **{name}** {'| ' * len(COLUMNS)}|")
        lines += [f"| {' | '.join(row_cells(row))} |" for row in rows]
    return "\n".join(lines)


def describe_machine(scale):
    on_gpu = scale.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else scale.device,
        "gpus": scale.ranks,
        "memory_gb": scale.memory / 1e9,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


def report_sections(found, about):
    """Print all of it; whether nothing failed."""
    print_table(found)
    print(f"\n{json.dumps(about | {'sections': found})}\n")
    print(markdown_block(found, about))
    return not any(row.get("failed") for row in chain.from_iterable(found.values()))


def parse_arguments(arguments):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections, else all of them")
    parser.add_argument("--minutes", type=float, help=f"at most; {MINUTES}, of several GPUs 12")
    # what this script says to its own processes, and tests to it
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    for name, kind in dict(section=str, seconds=float, result=str, mesh=str, ranks=int).items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def body(arguments):
    args = parse_arguments(arguments)
    if args.section:
        as_child(args)
        return
    scale = find_scale(args)
    several = scale.ranks > 1
    if several:
        SECTIONS["meshes"] = mesh_rows, MESH_SECONDS
    minutes = args.minutes or MINUTES + several * MESH_SECONDS / 60
    found = measure_sections(scale, args.only or list(SECTIONS), minutes)
    if not report_sections(found, describe_machine(scale)):
        sys.exit(1)


if __name__ == "__main__":
    run_program(body)
