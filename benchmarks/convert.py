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
from fluxlite.weights import sources, verify

BASELINE = "cp"


def forget(files):
    """Put files on the disk and out of the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, help="checkpoint in diffusers' layout")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder on the same disk for what is written"
    )
    parser.add_argument("--keep", action="store_true", help="leave the fluxlite file there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source, stages = sources.open_source(args.src, setting="--src"), StageTimes()
    if source.layout != "diffusers":
        raise ValueError(
            f"--src {args.src} is in {source.layout}'s layout: name a checkpoint in diffusers'"
        )
    ours, back, copy = args.work / "flux.safetensors", args.work / "diffusers", args.work / "copy"
    shutil.rmtree(copy, ignore_errors=True)

    forget(source.files)
    copy.mkdir()
    with stages(BASELINE):
        subprocess.run(["cp", *map(str, source.files), str(copy)], check=True)
        subprocess.run(["sync", "-f", str(copy)], check=True)
    shutil.rmtree(copy)

    forget(source.files)
    with stages("to fluxlite"):
        sources.write_converted(source, ours, overwrite=True)
    forget([ours])
    with stages("back to diffusers"):
        sources.write_converted(sources.open_source(ours), back, to="diffusers", overwrite=True)
    before, after = (verify.digests_of(sources.open_source(path)) for path in (args.src, back))
    shutil.rmtree(back)
    if not args.keep:
        ours.unlink()

    baseline = stages.rows[0][1]
    print(stages.table())
    for name, seconds, *_ in stages.rows[1:]:
        print(
            f"{name}: {seconds / baseline:.2f} x {BASELINE}, "
            f"{source.num_bytes() / seconds / 1e9:.2f} GB/s"
        )
    same = sum(before[0][name] == after[0].get(name) for name in before[0])
    print(
        f"{same} of {len(before[0])} tensors have the same SHA-256 after the round trip; all: "
        f"{before[1]}"
    )
    rows = [
        dict(zip(("stage", "seconds", "private_bytes", "resident_bytes"), row))
        for row in stages.rows
    ]
    print(
        json.dumps(
            {
                "bytes": source.num_bytes(),
                "tensors": len(before[0]),
                "same": same,
                "digest": before[1],
                "stages": rows,
            }
        )
    )
    return 0 if before == after else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
