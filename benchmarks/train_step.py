"""A training step beside the same step of diffusers' model: one process, same loss, clipping,
optimizer and dtype.

    python benchmarks/train_step.py  # bf16, with and without activation checkpointing; minutes
    python benchmarks/train_step.py --dtype float32 --side 256
    python benchmarks/train_step.py --scaling  # one process on one core beside two on two, FSDP2

Ours is the trainer's on a mesh of one: float32 weights, gradients and AdamW, weights cast to the
compute dtype while a block runs. Theirs has float32 weights under autocast, as diffusers' training
examples have. Times are alternating medians of `--repeats` steps in one process, in which both
models lie; the most memory, private, is of a process of each one's own, in which tensors are asked
of the system one by one: "kept" is the same with what glibc's heap keeps of freed ones, a fifth
more, which varies. Prints a table and a JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from build import Peak
from side_by_side import (
    TEXT_TOKENS,
    configure_step,
    our_step,
    seconds_of,
    shape_of_heads,
    their_step,
)

from fluxlite import parallel


def configure(args, checkpointing="none"):
    return configure_step(
        shape_of_heads(args.doubles, args.singles, args.heads),
        side=args.side,
        dtype=args.dtype,
        options=[f"parallel.activation_checkpointing={checkpointing}", *args.set],
    )


def alternate(args, checkpointing):
    """Median seconds of (diffusers', our) steps, and their first losses."""
    config = configure(args, checkpointing)
    ours, model = our_step(config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # zero initialisation would give both the same velocity, zero
        for name, value in weights.items():
            if name.startswith(("modulation.", "out.")):
                value.normal_(std=0.02, generator=generator)
    steps = [their_step(config, checkpointing, weights), ours]
    parallel.fill_weights(model, weights.items())
    times, losses = ([], []), []
    for number in range(args.repeats + 1):
        for taken, step in zip(times, steps):
            seconds, loss = seconds_of(step)
            if number:
                taken.append(seconds)
            else:  # the first warms up, and both start from the same weights
                losses.append(loss.item())
    parallel.stop_ranks()
    return [statistics.median(taken) for taken in times], losses


def peak_alone(args, who, checkpointing, kept):
    """The most private memory of a process that takes three steps of one of the two."""
    with tempfile.NamedTemporaryFile("r") as file:
        own = ["--alone", who, "--checkpointing", checkpointing, "--result", file.name]
        heap = (
            {} if kept else {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        )  # larger allocations return to the system when freed
        subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], *own], check=True, env=os.environ | heap
        )
        return json.load(file)


def alone(args):
    """`peak_alone`'s process: its private memory above what it has after its imports."""
    with Peak() as peak:
        config = configure(args, args.checkpointing)
        step = our_step(config)[0] if args.who == "ours" else their_step(config, args.checkpointing)
        for _ in range(3):
            step()
    with open(args.result, "w") as file:
        json.dump(peak.grown, file)


def scaling(args):
    """Samples a second of one process on one core, and of two on two."""
    rates = []
    for ranks in (1, 2):
        with tempfile.NamedTemporaryFile("r") as file:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
            rest = [a for a in sys.argv[1:] if a != "--scaling"]
            subprocess.run(
                [*launch, __file__, *rest, "--rank-of", file.name],
                check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            rates.append(json.load(file))
    return rates


def as_rank(args):
    """`scaling`'s process."""
    torch.set_num_threads(1)
    step, _ = our_step(configure(args))
    times = [seconds_of(step)[0] for _ in range(args.repeats + 1)][1:]
    if parallel.rank() == 0:
        with open(args.rank_of, "w") as file:
            json.dump(parallel.world_size() / statistics.median(times), file)
    parallel.stop_ranks()


def compare(args):
    rows = []
    for checkpointing in ("none", "full"):
        (theirs, ours), losses = alternate(args, checkpointing)
        row = {
            "checkpointing": checkpointing,
            "diffusers_s": theirs,
            "ours_s": ours,
            "losses": losses,
        }
        for key in ("memory", "kept"):
            row[key] = [
                peak_alone(args, who, checkpointing, key == "kept") for who in ("diffusers", "ours")
            ]
        rows.append(row)
    print(
        f"{args.side}², {TEXT_TOKENS} text tokens, {args.doubles} + {args.singles} blocks of width "
        f"{args.heads * 128}, {args.dtype}"
    )
    heads = "diffusers 11|ours 9|ratio 8|memory GB 15|ratio 8|kept GB 15|ratio 8".split("|")
    columns = [head.rsplit(" ", 1) for head in heads]
    print(f"{'activation checkpointing':<26}" + "".join(f"{n:>{width}}" for n, width in columns))
    for row in rows:
        theirs, ours = row["diffusers_s"], row["ours_s"]
        line = f"{theirs:>9.2f} s{ours:>7.2f} s{theirs / ours:>8.2f}"
        for theirs, ours in (row["memory"], row["kept"]):
            line += f"{f'{theirs / 1e9:.2f} and {ours / 1e9:.2f}':>15}{ours / theirs:>8.2f}"
        print(f"{row['checkpointing']:<26}{line}")
    return {"rows": rows}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--side", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--doubles", type=int, default=1)
    parser.add_argument("--singles", type=int, default=2)
    parser.add_argument(
        "--heads", type=int, default=12, help="attention heads of width 128; FLUX.1 has 24"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--scaling", action="store_true", help="one and two processes instead of diffusers and ours"
    )
    parser.add_argument(
        "--set", action="append", default=[], help="a key of train.py, as key=value"
    )
    for name in (
        "--alone",
        "--checkpointing",
        "--result",
        "--rank-of",
    ):  # what this script says to its own processes
        parser.add_argument(name, dest="who" if name == "--alone" else None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.rank_of:
        return as_rank(args)
    if args.who:
        return alone(args)
    found = {"scaling": scaling(args)} if args.scaling else compare(args)
    if args.scaling:
        one, two = found["scaling"]
        print(
            f"samples a second: {one:.3f} with one process on one core, {two:.3f} with two on two, "
            f"{two / one:.2f} times as many"
        )
    print(
        json.dumps(
            found
            | {k: v for k, v in vars(args).items() if v is not None}
            | {"torch": torch.__version__}
        )
    )


if __name__ == "__main__":
    main()
