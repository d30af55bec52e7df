"""The texts of `--help`, kept beside the code: to compute one takes the import of torch, seconds.

    python -m fluxlite.cli.shipped_help  # after a change of settings: writes them anew

A text is taken only where nothing that it could come from is younger: whoever changes a setting
gets the computed text. A test compares the two.
"""

import runpy
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parent / "help"
PROGRAMS = {"train": [], "infer": [], "infer-all": ["all"], "prove": []}  # with their arguments
CLONED_WITHIN = 60  # seconds between the first and the last file of a fresh clone


def find_help(program, arguments, usage):
    """The text of a program's --help: the kept one, or `usage()` where that may be out of date.

    A kept text that turns out to be right counts as fresh from then on.
    """
    file = FOLDER / f"{program}{'-all' if 'all' in arguments else ''}.txt"
    if file.is_file() and is_fresh(file):
        return file.read_text()
    text = usage() + "\n"
    if file.is_file() and file.read_text() == text:
        with suppress(OSError):  # somebody else's clone
            file.touch()
    return text


def is_fresh(file):
    """Whether nothing that a kept text could come from is younger."""
    latest = file.stat().st_mtime + CLONED_WITHIN
    # not from the root downwards: a virtual environment and data may lie there
    below = [*(ROOT / "src").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    sources = [*ROOT.glob("*.py"), *below]
    return not any(path.stat().st_mtime > latest for path in sources)


def compute_help(name):
    """The text of a program of `PROGRAMS` as its settings give it."""
    sys.argv = [name, "--help", *PROGRAMS[name]]
    script = ROOT / f"{name.removesuffix('-all')}.py"
    return runpy.run_path(str(script))["usage"]() + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PROGRAMS:
        (FOLDER / f"{name}.txt").write_text(compute_help(name))
