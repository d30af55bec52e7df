"""Training that is told to stop in a given phase; run by `test_processes.py`, alone or under
torchrun.

    python tests/phases.py loading SIGTERM data=mock …  # one run, signalled in that phase
    python tests/phases.py < cases.json  # many, each in a process forked off: no import for each

The signal goes to the whole process group, loader processes and all; under torchrun to torchrun.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  what a forked run need not import again
import transformers  # noqa: F401

import train
from fluxlite import settings
from fluxlite.cli.programs import run_program
from fluxlite.data import cache, fill50k
from fluxlite.train import loop, setup

# where each begins: the owner of a function, its name, the call that the signal comes in
PHASES = {
    "composing": (settings, "load_settings", 1),
    "generating": (fill50k.TarWriter, "write", 5),
    "loading": (setup, "load_parts", 1),
    "encoding": (cache, "_encoded_pictures", 2),
    "first validation": (loop, "encode_validation", 1),
    "training": (loop, "train_step", 2),
    "validating": (loop, "validation_losses", 1),
    "drawing": (loop, "draw_grid", 1),
    "saving": (loop, "save_checkpoint", 1),
    "plotting": (loop, "plot_losses", 1),
}


def signal_in(phase, name):
    """Have the signal sent when the phase begins, once."""
    owner, function, number = PHASES[phase]
    original, calls = getattr(owner, function), []

    @functools.wraps(original)
    def signalled(*args, **options):
        calls.append(None)
        if len(calls) == number and os.environ.get("RANK", "0") == "0":
            ranked = "TORCHELASTIC_RUN_ID" in os.environ
            os.kill(os.getppid(), signal.Signals[name]) if ranked else os.killpg(
                0, signal.Signals[name]
            )
            time.sleep(0.5 * ranked)
        return original(*args, **options)

    setattr(owner, function, signalled)


def run_phase(phase, name, *arguments):
    """`train.py` with these arguments."""
    signal_in(phase, name)
    sys.argv = ["train.py", *arguments]
    run_program(train.body)


def fork_case(case, folder):
    """A run in a process and a group of its own; {"code", "text": all it wrote, "left": processes
    of its group}.
    """
    file = Path(folder) / "output.txt"
    child = os.fork()
    if not child:
        os.setsid()
        descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        run_phase(*case)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = subprocess.run(
        ["pgrep", "-g", str(child)], capture_output=True, text=True
    ).stdout.split()
    return {"code": code, "text": file.read_text(), "left": left}


def main():
    if sys.argv[1:]:
        return run_phase(*sys.argv[1:])
    found = [fork_case(case["arguments"], case["folder"]) for case in json.load(sys.stdin)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
