"""A checkpoint to fluxlite and back to diffusers' layout at constant memory, beside `cp` of the
same files on the same disk.

    python scripts/make_random.py --dst FLUX.1-random  # 23.8 GB, where there are no real weights
    python benchmarks/convert.py --src FLUX.1-random --work scratch  # twice that again

Every file is put on the disk (fsync) before its time is taken, and out of the page cache before it
is read. Prints a table, whether the tensors that came back are the same by SHA-256, and, last, one
JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fluxlite.cli.stage_times import StageTimes
from fluxlite.weights.sources import open_source
from fluxlite.weights.verify import digests_of
from fluxlite.weights.writing import write_converted

BASELINE = "cp"


def forget_files(files):
    """Put files on the disk and out of the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parse_arguments():
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--src", required=True, help="checkpoint in diffusers' layout")
    help = "folder on the same disk for what is written"
    parser.add_argument("--work", type=Path, required=True, help=help)
    parser.add_argument("--keep", action="store_true", help="leave the fluxlite file there")
    return parser.parse_args()


def go_round(args, source):
    """Copy, convert and convert back: (`StageTimes`, digests before, digests after)."""
    ours, back, copy = args.work / "flux.safetensors", args.work / "diffusers", args.work / "copy"
    stages = StageTimes()
    shutil.rmtree(copy, ignore_errors=True)
    forget_files(source.files)
    copy.mkdir(parents=True)
    with stages(BASELINE):
        subprocess.run(["cp", *map(str, source.files), str(copy)], check=True)
        subprocess.run(["sync", "-f", str(copy)], check=True)
    shutil.rmtree(copy)
    forget_files(source.files)
    with stages("to fluxlite"):
        write_converted(source, ours, overwrite=True)
    forget_files([ours])
    with stages("back to diffusers"):
        write_converted(open_source(ours), back, to="diffusers", overwrite=True)
    before, after = (digests_of(open_source(path)) for path in (args.src, back))
    shutil.rmtree(back)
    if not args.keep:
        ours.unlink()
    return stages, before, after


def main():
    args = parse_arguments()
    source = open_source(args.src, setting="--src")
    if source.layout != "diffusers":
        raise ValueError(
            f"--src {args.src} is in {source.layout}'s layout: name a checkpoint in diffusers'"
        )
    stages, before, after = go_round(args, source)
    baseline, size, count = stages.rows[0][1], source.num_bytes(), len(before[0])
    print(stages.table())
    for name, seconds, *_ in stages.rows[1:]:
        speed = size / seconds / 1e9
        print(f"{name}: {seconds / baseline:.2f} x {BASELINE}, {speed:.2f} GB/s")
    same = sum(before[0][name] == after[0].get(name) for name in before[0])
    print(f"{same} of {count} tensors have the same SHA-256 after the round trip; all: {before[1]}")
    names = ("stage", "seconds", "private_bytes", "resident_bytes")
    found = {"bytes": size, "tensors": count, "same": same, "digest": before[1]}
    print(json.dumps(found | {"stages": [dict(zip(names, row)) for row in stages.rows]}))
    return 0 if before == after else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
