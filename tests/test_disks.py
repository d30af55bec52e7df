"""Every writer on a disk that refuses: one line, exit code 2, nothing half written.

What lay there before is there afterwards, byte for byte, and nothing else is.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import pytest
from PIL import Image
from test_data import members, write_tar
from test_run_state import small_disk

ROOT = Path(__file__).parents[1]
WRITERS = ["infer", "prove", "convert to a file", "convert to a folder", "convert to shards"]
WRITERS += ["save_converted", "generator", "make_random", "first edition", "cache", "metrics"]
WRITERS += ["tensorboard", "plot", "train"]
REPLACING = ["infer", "prove", "convert to a file", "convert to a folder", "convert to shards"]
REPLACING += ["metrics", "tensorboard", "plot", "train"]
NOBODY, NUMBERS = 65534, count()


def is_open_to_all(folder):
    """Whether any user may enter a folder, and those that it lies in, and read there."""
    return all(path.stat().st_mode & 0o005 == 0o005 for path in (folder, *folder.parents))


CANNOT_BECOME = pytest.mark.skipif(
    os.geteuid() != 0 or not is_open_to_all(ROOT),
    reason="needs the right to be another user, and a clone that this one may read",
)


class Writers:
    """The process that runs the writers, and a folder that any user may enter."""

    def __init__(self):
        self.base = Path(tempfile.mkdtemp(prefix="fluxlite-disks-"))
        self.base.chmod(0o755)
        write_tar(self.base / "tars" / "0.tar", members(range(6)))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.base),
            "DISKS_TARS": str(self.base / "tars"),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "disks.py")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.made = {}

    def ask(self, **case):
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def whole(self, name):
        """The folder in which a writer has written without hindrance, once."""
        if name not in self.made:
            folder = self.base / "whole" / name.replace(" ", "-")
            folder.mkdir(parents=True)
            answer = self.ask(writer=name, out=str(folder / "out"))
            assert answer["code"] == 0 and list(folder.rglob("out*")), answer["text"]
            self.made[name] = folder
        return self.made[name]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.base)


@pytest.fixture(scope="module")
def writers():
    started = Writers()
    yield started
    started.close()


def contents_of(folder):
    """{name: bytes, or where a link leads} of all below a folder; a run's lock stays."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and path.name not in (".lock", "ballast"):
            found[name] = path.read_bytes()
    return found


def check_refused(writers, name, place, existing, **how):
    """Let a writer fail at `place`, and look at what it says and leaves."""
    before = contents_of(place)
    answer = writers.ask(writer=name, out=str(place / "out"), **how)
    text = answer["text"].replace("\r", "\n")
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert answer["code"] == 2 and len(errors) == 1 and "Traceback" not in text, text[-3000:]
    assert str(place) in errors[0], errors
    after = contents_of(place)
    left = [key for key in after if any(p.startswith(".") for p in Path(key).parts)]
    assert not [key for key in left if key not in before], left
    for key, value in before.items():
        now = after.get(key, b"")
        grown = key.endswith("metrics.jsonl") or "tensorboard" in key  # written line by line
        assert now == value or grown and now.startswith(value) or is_whole(key, now), key
    return {key: after[key] for key in after.keys() - before.keys()}


def is_whole(name, data):
    """Whether a file that was replaced is another whole one."""
    if name.endswith(".json"):
        return bool(json.loads(data))
    return name.endswith(".png") and bool(Image.open(io.BytesIO(data)).load())


def place_for(writers, name, existing):
    place = writers.base / f"case-{next(NUMBERS)}"
    if existing:
        shutil.copytree(writers.whole(name), place, symlinks=True)
    else:
        writers.whole(name)
        place.mkdir()
    return place


NEW = [(name, False) for name in WRITERS]
REPLACED = [(name, True) for name in REPLACING]


def each_writer(key, quick, slow):
    """Cases (name, existing, value of `key`), those in `slow` marked so."""
    marked = [pytest.param(*case, marks=pytest.mark.slow) for case in slow if case not in quick]
    return pytest.mark.parametrize(f"name,existing,{key}", quick + marked)


def cases_of(pairs, *values):
    return [(*pair, value) for pair in pairs for value in values]


@each_writer("limit", cases_of(NEW, 0), cases_of(NEW + REPLACED, 0, 1500))
def test_a_file_beyond_a_quota_is_one_line(writers, name, existing, limit):
    place = place_for(writers, name, existing)
    new = check_refused(writers, name, place, existing, limit=limit)
    assert limit or not any(new.values()), new  # a log may have been begun


@each_writer("user", cases_of(REPLACED, NOBODY), cases_of(NEW, NOBODY))
@CANNOT_BECOME
def test_a_folder_of_another_user_is_one_line(writers, name, existing, user):
    place = place_for(writers, name, existing)
    assert not check_refused(writers, name, place, existing, user=user)


@each_writer("room", cases_of(REPLACED, 8192), cases_of(NEW + REPLACED, 0, 8192))
def test_a_full_disk_is_one_line(writers, name, existing, room, tmp_path):
    whole = writers.whole(name)
    with small_disk(tmp_path / "disk", "64m"):
        place = tmp_path / "disk" / "place"
        if existing:
            shutil.copytree(whole, place, symlinks=True)
        else:
            place.mkdir()
        fill_disk(place.parent / "ballast", room)
        check_refused(writers, name, place, existing, full=True)


def fill_disk(ballast, room):
    """Leave so many bytes of a disk."""
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
    os.truncate(ballast, ballast.stat().st_size - room)
