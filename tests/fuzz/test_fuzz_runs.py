"""Run folders with bytes changed, files cut, exchanged, linked and renamed.

What is accepted must hold the very tensors that were written.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from fuzzing import BOTH, try_cases
from test_run_state import flip, original  # noqa: F401, a fixture

from fluxlite import parallel
from fluxlite.train import run_state
from fluxlite.weights import run_folder, sources


def change_bytes(rng, file):
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        flip(file, rng.randrange(file.stat().st_size), rng.randrange(1, 256))


def cut_file(rng, file):
    os.truncate(file, rng.randrange(file.stat().st_size))


def extend_file(rng, file):
    with open(file, "ab") as opened:
        opened.write(rng.randbytes(rng.choice([1, 100, 4096])))


def move_block(rng, file):
    """Bytes of one place copied over another's."""
    data, size = bytearray(file.read_bytes()), rng.choice([1, 4, 64, 3000])
    a, b = (rng.randrange(max(1, len(data) - size)) for _ in range(2))
    data[a : a + size] = data[b : b + size]
    file.write_bytes(data)


def remove_file(rng, file):
    file.unlink()


def make_other(rng, file):
    """A pipe, a folder, a dangling link or nothing where a file was."""
    file.unlink()
    rng.choice([os.mkfifo, os.mkdir, Path.touch, lambda f: os.symlink("nowhere", f)])(file)


def change_value(rng, file):
    """A value somewhere in meta.json replaced; its checksum is left out, as if changed by hand."""
    file = file.parent / "meta.json"
    values = json.loads(file.read_text())
    values.pop("checksum", None)
    at, keys = values, list(values)
    while True:
        key = rng.choice(keys)
        if isinstance(at[key], dict) and at[key] and rng.random() < 0.7:
            at = at[key]
            keys = list(at)
            continue
        break
    strange = [None, -1, 0, 1, 10**9, 10**30, 1.5, "", "x", [], {}, [1, "a"], True, "../../x"]
    at[key] = rng.choice(strange)
    file.write_text(json.dumps(values))


def swap_files(rng, file):
    """A file of another checkpoint in its place."""
    other = file.parent.parent / "step-000004" / file.name
    shutil.copyfile(other, file)


CHANGES = [change_bytes] * 4 + [cut_file, extend_file, move_block, remove_file, make_other]
CHANGES += [change_value] * 3 + [swap_files]  # the last one nothing but a checksum can notice


@pytest.fixture
def quick_folder(tmp_path):
    """A folder in memory where there is such a disk: a checkpoint's fsync takes no time there."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def linked_copy(source, target, own=()):
    """A copy of a run's folder whose files are links to the same bytes, but in folders `own`."""
    shutil.rmtree(target, ignore_errors=True)

    def copy(file, place):
        (shutil.copyfile if Path(file).parent.name in own else os.link)(file, place)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


def read_all(folder):
    source = sources.open_source(folder)
    return {name: source.read(name).clone() for name in source.described}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", BOTH)
@pytest.mark.parametrize("edition", ["with checksums", "without"])
def test_a_changed_run_is_refused_or_gives_the_very_tensors(original, quick_folder, count, edition):  # noqa: F811
    """Where meta.json has no checksums, those of the zips still hold for every tensor."""
    expected = read_all(original)
    plain = read_without_average(original)
    whole, run = quick_folder / "whole", quick_folder / "run"
    shutil.copytree(original, whole, symlinks=True)

    def case(rng):
        linked_copy(whole, run, own=["step-000006"])
        folder = run / "checkpoints" / "step-000006"
        if edition == "without":
            values = json.loads((folder / "meta.json").read_text())
            values = {k: v for k, v in values.items() if k not in ("files", "checksum", "data")}
            (folder / "meta.json").write_text(json.dumps(values))
        change = rng.choice(CHANGES if edition == "with checksums" else CHANGES[:-1])
        change(rng, rng.choice(sorted(folder.iterdir())))
        read = read_all(run)
        for name, values in read.items():
            known = [expected[name], plain[name]] if change is change_value else [expected[name]]
            same = any(torch.equal(values, one) for one in known)
            assert same, f"{change.__name__}: {name} is another"
        return change.__name__

    verdicts = try_cases(count, case)
    assert 0.4 * count < sum(kind == "refused" for kind, _ in verdicts) < count


def read_without_average(folder):
    source = sources.open_source(folder, ema=False)
    return {name: source.read(name).clone() for name in source.described}


def contents_below(folder):
    """What all files hold, whatever their names."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path.read_bytes() for path in files)


NAMES = ["last", "step-000006", "step-000004", "step-000099", "step-6", "step-000006-good"]
NAMES += [".step-000006", "x"]


def change_names(rng, root):
    """Links and folders of a run's checkpoints renamed, removed, copied."""
    name = rng.choice([path.name for path in root.iterdir()] or ["none"])
    target = rng.choice(NAMES)
    change = rng.randrange(5)
    path = root / name
    free = not os.path.lexists(root / target)
    is_folder = path.is_dir() and not path.is_symlink()
    if change == 0 and os.path.lexists(path):
        shutil.rmtree(path) if is_folder else path.unlink()
    elif change == 1 and free:
        os.rename(path, root / target)
    elif change == 2 and is_folder and free:
        shutil.copytree(path, root / target, symlinks=True)
    elif change == 3 and free:
        os.symlink(rng.choice(["step-000004", "nowhere", ".", "..", target]), root / target)
    elif is_folder:
        files = sorted(p for p in path.rglob("*") if p.is_file())
        if files:
            file = rng.choice(files)
            data = file.read_bytes()
            file.unlink()  # the bytes are the original's too
            file.write_bytes(data)
            cut_file(rng, file)


@pytest.fixture
def one_process():
    parallel.start_ranks(parallel.ParallelConfig(), "cpu")
    yield
    parallel.stop_ranks()


@pytest.fixture
def tiny_run(original, quick_folder, one_process):  # noqa: F811
    """A run like the original one, of as many steps, whose model has a dozen numbers."""
    saved = vars(run_folder.read_meta(original / "checkpoints" / "last"))
    meta = {k: saved[k] for k in ("layout", "version", "what", "model", "flow", "config", "ema")}
    model = torch.nn.Linear(3, 4)
    optimizers = [torch.optim.AdamW(model.parameters())]
    for step in (2, 4, 6):
        model(torch.ones(3)).sum().backward()
        optimizers[0].step()
        state = dict(model=model, optimizers=optimizers, ema=None)
        run_state.save_training(
            quick_folder / "whole", step=step, meta=meta | {"ema": []}, keep=0, **state
        )
    return quick_folder / "whole"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", BOTH)
def test_the_newest_whole_step_of_any_folder_is_chosen_none_deleted(tiny_run, count):
    chosen_steps, run = [], tiny_run.parent / "run"

    def case(rng):
        linked_copy(tiny_run, run)
        root = run / "checkpoints"
        for _ in range(rng.randrange(1, 6)):
            change_names(rng, root)
        before = contents_below(root)
        try:
            chosen = run_state.choose_checkpoint(run)
        finally:
            assert before == contents_below(root), "a file is gone or changed"
        if chosen is not None:
            meta = run_folder.read_meta(root / "last")
            run_folder.check_files(root / "last", meta)
            assert (root / "last").resolve() == chosen.resolve()
            listed = run_folder.list_checkpoints(run)
            whole = [folder for folder in listed if not run_state.find_fault(folder)]
            assert whole[0].name == f"step-{meta.step:06d}" == chosen.name
            chosen_steps.append(meta.step)
        return chosen

    try_cases(count, case)
    assert len(set(chosen_steps)) > 1
