"""The programs as their users run them: what they refuse, what they leave when they are stopped."""

import errno
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fluxlite
from fluxlite.cli import shipped_help
from fluxlite.cli.command_line import load_config
from fluxlite.cli.messages import LONGEST, one_line
from fluxlite.cli.options import RANGES, option_fields
from fluxlite.cli.programs import Terminated
from fluxlite.cli.stage_times import StageTimes
from fluxlite.draw import generation
from fluxlite.draw.contact_sheet import wrap_caption
from fluxlite.settings import InferConfig, TrainConfig

ROOT = Path(__file__).parents[1]
infer = runpy.run_path(str(ROOT / "infer.py"))
QUICK = dict(steps=1, height=32, width=32)


def test_a_tilde_of_no_user_is_refused_in_every_path():
    place = "~nobody-of-this-name/x"
    with pytest.raises(ValueError, match=f"output={place}: there is no such user"):
        load_config(InferConfig, "infer", ["prompt=a", f"output={place}"])
    for key in ("checkpoint", "t5", "autoencoder"):
        with pytest.raises(ValueError, match=f"{key}={place}: there is no such user"):
            fluxlite.generate("a", **{key: place})
    with pytest.raises(ValueError, match="there is no such user"):
        fluxlite.generate("a", controls=[fluxlite.Control("flux-tiny", place)])


def test_the_page_for_the_library_runs_as_it_stands(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "library.md").read_text()
    monkeypatch.chdir(tmp_path)
    found = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, found)
    assert len(found["pictures"]) == 4 and (tmp_path / "outputs" / "circle.png").exists()
    assert found["velocity"].shape == (2, 16, found["flux"].config.in_channels)
    for name in set(re.findall(r"`fluxlite\.(\w+)\(", page)):
        assert callable(getattr(fluxlite, name)), name


@pytest.mark.parametrize("script", ["convert_hf.py", "prove.py"])
def test_a_program_of_one_process_is_refused_under_torchrun(script):
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    result = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == "error on rank 0: this program is one process: start it without torchrun\n"
    )


def test_an_output_that_nobody_can_take_is_one_line():
    source = "from fluxlite.cli.programs import run_program\nrun_program(lambda _: print('x' * 99))"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", source], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (2, "error: a file: No space left on device\n")


def test_a_stopped_program_closes_its_generators_before_it_says_so():
    source = (
        "from fluxlite.cli.programs import run_program\nimport os, sys\n"
        "def bar():\n"
        "    try:\n        yield\n    finally:\n        print('closed', file=sys.stderr)\n"
        "def body(_):\n"
        "    for _ in bar():\n        os.kill(os.getpid(), 15)\n"
        "run_program(body)"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (143, "closed\nstopped by SIGTERM\n")


def test_a_long_error_keeps_its_beginning_and_its_remedy():
    line = one_line(ValueError(f"key=1 {'x' * 10_000} remedy"))
    assert line.startswith("key=1") and line.endswith("remedy") and len(line) <= LONGEST + 3


def test_pictures_are_handed_over_as_soon_as_their_batch_is_drawn():
    events = []

    def on_step(numbers, step, times, latents):
        if step == 0:
            events.append("batch")

    pictures = fluxlite.generate(
        ["a", "b"],
        images_per_prompt=2,
        batch=2,
        on_step=on_step,
        on_picture=lambda number, picture: events.append((number, picture)),
        **QUICK,
    )
    assert [e if e == "batch" else e[0] for e in events] == ["batch", 0, 1, "batch", 2, 3]
    assert [e[1] for e in events if e != "batch"] == pictures


def test_one_picture_of_many_can_be_drawn_again_alone():
    options = dict(
        seed=5, dtype=torch.float32, **QUICK
    )  # bfloat16 rounds otherwise in other batches
    many = fluxlite.generate(["a", "b", "c"], images_per_prompt=2, **options)
    many = [np.asarray(picture, np.int16) for picture in many]
    [again] = fluxlite.generate("c", prompt_number=2, picture_number=1, **options)
    off = [abs(np.asarray(again, np.int16) - picture).max() for picture in many]
    assert off[5] <= 1 and min(off[:5]) > 2


def pictures_in(folder):
    """The names of whole PNGs; asserts that there is nothing else."""
    found = sorted(folder.iterdir()) if folder.exists() else []
    for path in found:
        Image.open(path).load()
    return [path.name for path in found]


def test_a_stopped_infer_leaves_every_finished_picture(tmp_path, monkeypatch):
    decode, count = generation.decode_pictures, iter(range(99))

    def stop_at_the_fourth(*arguments):
        if next(count) == 3:
            raise Terminated
        return decode(*arguments)

    monkeypatch.setattr(generation, "decode_pictures", stop_at_the_fourth)
    sizes = ["height=32", "width=32", "steps=1", "images_per_prompt=8", "batch=2"]
    with pytest.raises(Terminated):
        infer["body"](["prompt=a", f"output={tmp_path}/o", *sizes])
    assert pictures_in(tmp_path / "o") == ["a-2.png", "a-3.png", "a.png"]


def test_programs_that_save_to_one_folder_take_no_name_twice(tmp_path):
    save = (
        "import pathlib, sys; from PIL import Image\n"
        "from fluxlite.draw.saving import save_picture as save\n"
        "picture = Image.new('RGB', (8, 8))\n"
        "for _ in range(40): save(picture, pathlib.Path(sys.argv[1]), 'a fox')"
    )
    command = [sys.executable, "-c", save, str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    names = [line for one in both for line in one.communicate()[0].split()]
    assert [one.returncode for one in both] == [0, 0]
    assert len(names) == len(set(names)) == 80
    assert pictures_in(tmp_path) == sorted(Path(name).name for name in names)


def test_a_full_disk_leaves_no_half_picture_and_is_named(tmp_path, monkeypatch):
    save, count = Image.Image.save, iter(range(99))

    def fill_up(picture, path, *arguments, **options):
        save(picture, path, *arguments, **options)
        if next(count) == 1:
            os.truncate(path, 20)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", fill_up)
    sizes = ["height=32", "width=32", "steps=1", "images_per_prompt=3"]
    with pytest.raises(ValueError, match="a-2.png cannot be written: no space left"):
        infer["body"](["prompt=a", f"output={tmp_path}/o", *sizes])
    assert pictures_in(tmp_path / "o") == ["a.png"]


def test_a_picture_says_how_it_is_drawn_again(tmp_path):
    sizes = ["height=32", "width=32", "steps=1", f"output={tmp_path}"]
    infer["body"](["prompt=a", "prompt_number=7", "picture_number=4", "seed=3", *sizes])
    about = json.loads(Image.open(tmp_path / "a.png").text["fluxlite"])
    assert {k: about[k] for k in ("prompt", "prompt_number", "picture_number", "seed")} == {
        "prompt": "a",
        "prompt_number": 7,
        "picture_number": 4,
        "seed": 3,
    }


@pytest.mark.parametrize(
    "data,prompts",
    [
        (b"\xef\xbb\xbfa fox\r\nan owl\r\n\r\n", ["a fox", "an owl"]),
        ("a\u2028b\nc\x0cd".encode(), ["a\u2028b", "c\x0cd"]),
        (b"", None),
        (b"\n \n", None),
        (b"caf\xe9", None),
        (b"\xff\xfea\0", None),
    ],
)
def test_a_file_of_prompts_has_one_a_line_or_is_named(data, prompts, tmp_path):
    (tmp_path / "p.txt").write_bytes(data)
    config = SimpleNamespace(prompt=[], prompt_file=str(tmp_path / "p.txt"))
    if prompts:
        assert infer["prompts_of"](config) == prompts
        return
    with pytest.raises(ValueError, match="prompt_file=.*p.txt"):
        infer["prompts_of"](config)


def test_stages_of_one_name_are_one_line():
    stages = StageTimes()
    stages.rows = [("a", 1.0, 5e9, 6e9), ("b", 2.0, 1, 1), ("a", 3.0, 4e9, 7e9)]
    lines = [line.split() for line in stages.table().splitlines()[1:]]
    assert lines == [["a", "4.0", "5.00", "7.00"], ["b", "2.0", "0.00", "0.00"]]


def test_a_caption_of_a_million_letters_is_wrapped_at_once():
    from PIL import ImageFont

    lines = wrap_caption("x" * 10**6, font=ImageFont.load_default(size=12), width=64, max_lines=4)
    assert lines[-1].endswith("…")


@pytest.mark.parametrize("cls", [TrainConfig, InferConfig])
def test_every_number_among_the_settings_has_a_least_and_a_largest_value(cls):
    for key, f in option_fields(cls).items():
        if "int" in str(f.type) or "float" in str(f.type):
            below, above = {"at_least", "above"}, {"at_most", "below"}
            assert set(f.metadata) & below and set(f.metadata) & above, key
    assert {"at_least", "above", "at_most", "below"} == set(RANGES)


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50, np.uint8), lambda: bytearray(1 << 50)],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_no_machine_has_is_one_line_with_what_to_try(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as error:
        allocate()
    line = one_line(error.value)
    assert line.startswith("out of memory") and "micro_batch" in line and "\n" not in line


@pytest.mark.parametrize("name", shipped_help.PROGRAMS)
def test_a_kept_help_text_is_what_the_settings_give(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    file = shipped_help.FOLDER / f"{name}.txt"
    assert file.read_text() == shipped_help.compute_help(name), (
        "python -m fluxlite.cli.shipped_help"
    )


def test_a_kept_help_text_is_not_taken_where_a_source_is_younger(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped_help, "ROOT", tmp_path)
    monkeypatch.setattr(shipped_help, "FOLDER", tmp_path)
    kept = tmp_path / "train.txt"
    kept.write_text("kept\n")
    source, library = tmp_path / "src" / "settings.py", tmp_path / ".venv" / "src" / "library.py"
    for path in (source, library):
        path.parent.mkdir(parents=True)
        path.touch()

    def find(text, *arguments):
        return shipped_help.find_help("train", ["--help", *arguments], lambda: text)

    assert find("computed") == "kept\n"
    assert find("computed", "all") == "computed\n"
    later = kept.stat().st_mtime + 120
    os.utime(library, (later, later))
    assert find("computed") == "kept\n"
    earlier = kept.stat().st_mtime - 120
    os.utime(kept, (earlier, earlier))
    assert find("computed") == "computed\n"
    assert find("kept") == "kept\n" == find("computed"), "one that is right is fresh again"


@pytest.mark.parametrize("name", ["train", "infer", "prove", "convert_hf"])
def test_help_is_there_without_torch(name):
    """In a fresh clone; it is torch's import that takes seconds."""
    kept = list(shipped_help.FOLDER.glob("*.txt"))
    before = [file.stat() for file in kept]
    for file in kept:  # as if nothing had been changed since the clone
        file.touch()
    source = f"import sys; sys.argv = ['{name}.py', '--help']; sys.modules['torch'] = None\n"
    source += f"import runpy; runpy.run_path('{name}.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    for file, stat in zip(kept, before):
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("Train a Flux", "Draw pictures", "Measure", "Convert"))


def test_a_gpu_without_memory_is_one_line_with_what_to_try():
    assert torch.cuda.OutOfMemoryError is torch.OutOfMemoryError
    text = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB, of which 1 is free."
    line = one_line(torch.OutOfMemoryError(text))
    assert line.startswith("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    assert "micro_batch" in line and "offload=all" in line and "\n" not in line
