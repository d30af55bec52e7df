"""Run folders: copied, damaged, hostile, shared, on disks that refuse; what a run makes of them."""

import dataclasses
import errno
import fcntl
import json
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from test_trainer import MOCK, ROOT, SMALL, command, losses, train

import fluxlite
from fluxlite import parallel
from fluxlite.settings import TrainConfig
from fluxlite.train import loop, metrics, run_state
from fluxlite.train.resume import find_resume
from fluxlite.weights import run_folder, run_tensors, sources, verify, writing
from fluxlite.weights.lora_files import read_lora

COMMON = [*MOCK, "checkpoint.every=2", "checkpoint.keep=0", "validate_every=0", "sample.every=0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps, undisturbed."""
    return train(*COMMON, "steps=8", f"output={tmp_path_factory.mktemp('whole')}/run")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The same run's first six steps, not to be changed."""
    return train(*COMMON, "steps=6", f"output={tmp_path_factory.mktemp('original')}/run")


@pytest.fixture
def run(original, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(original, tmp_path / "run", symlinks=True))


@pytest.fixture
def group():
    """A process group of this process alone."""
    parallel.start_ranks(parallel.ParallelConfig(), "cpu")
    yield
    parallel.stop_ranks()


def resume(run, *more, steps=8):
    return train(*COMMON, f"steps={steps}", f"output={run}", "resume=auto", *more)


def weights(run):
    return sources.load_transformer(run).state_dict()


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def bytes_below(folder):
    """{path: bytes} of all files, and {path: target} of all links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = path.read_bytes()
    return found


def flip(file, position, bits=1):
    """Change a byte of a file; negative positions count from its end."""
    data = bytearray(file.read_bytes())
    data[position] ^= bits
    file.write_bytes(data)


def rewrite_meta(folder, change):
    """Change a checkpoint's meta.json as somebody who knows about its checksum would."""
    values = json.loads((folder / "meta.json").read_text())
    values.pop("checksum", None)
    change(values)
    (folder / "meta.json").write_text(json.dumps(values))


# --- copied folders -------------------------------------------------------------------------------


def unlinked(root):
    (root / "last").unlink()


def dangling(root):
    (root / "last").unlink()
    (root / "last").symlink_to("step-000099")


def followed(root):
    (root / "last").unlink()
    shutil.copytree(root / "step-000006", root / "last")


def followed_over_damage(root):
    followed(root)
    os.truncate(root / "step-000006" / "__0_0.distcp", 1000)


def followed_and_damaged(root):
    followed(root)
    os.truncate(root / "last" / "__0_0.distcp", 1000)


def followed_alone(root):
    followed(root)
    for step in (2, 4, 6):
        shutil.rmtree(root / f"step-{step:06d}")


def behind(root):
    (root / "last").unlink()
    (root / "last").symlink_to("step-000002")


def with_copies(root):
    shutil.copytree(root / "step-000004", root / "step-000008-good")
    shutil.copytree(root / "step-000002", root / "step-000100")
    (root / "step-000200").mkdir()
    (root / "step-notes.txt").write_text("mine")


COPIES = [unlinked, dangling, followed, followed_alone, followed_over_damage, followed_and_damaged]
COPIES += [behind, with_copies]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copied_run_goes_on_from_its_newest_whole_step(run, whole, copied, caplog):
    copied(run / "checkpoints")
    before = losses(run)
    with caplog.at_level("INFO", "fluxlite"):
        resume(run)
    assert "resuming after step 6" in caplog.text
    assert same_weights(run, whole) and losses(whole).items() <= losses(run).items()
    assert before.items() <= losses(run).items()
    assert os.readlink(run / "checkpoints" / "last") == "step-000008"
    if copied is with_copies:
        kept = {"step-000008-good", "step-notes.txt", "damaged-step-000100", "damaged-step-000200"}
        assert kept <= set(names_in(run / "checkpoints"))
        assert "step-000100 says that it is step 2" in caplog.text


def test_what_a_run_did_not_write_is_never_deleted(run):
    with_copies(run / "checkpoints")
    resume(run, "checkpoint.keep=1")
    left = names_in(run / "checkpoints")
    assert [n for n in left if run_folder.STEP_NAME.fullmatch(n)] == ["step-000008"]
    assert {"step-000008-good", "step-notes.txt", "damaged-step-000100"} <= set(left)


@pytest.mark.parametrize("copied", [unlinked, dangling, followed, with_copies])
def test_a_folder_with_checkpoints_is_refused_without_resume_whatever_last_says(run, copied):
    copied(run / "checkpoints")
    before = bytes_below(run)
    with pytest.raises(ValueError, match="holds a run: resume=auto"):
        train(*COMMON, "steps=8", f"output={run}")
    after = bytes_below(run)
    after.pop(run / ".lock")
    assert after == {path: data for path, data in before.items() if path != run / ".lock"}


def folder_of(root, names):
    for name in names:
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", ["config.json", "images/a.png", "metrics.jsonl"])
def test_a_run_never_begins_over_files_that_are_no_runs(tmp_path, name, resume):
    root = tmp_path / "photos"
    kept = folder_of(root, ["a.jpg", name])
    config = TrainConfig(output=str(root), resume=resume)
    with pytest.raises(ValueError, match=f"output={root} holds {name.split('/')[0]}, which is no"):
        find_resume(config)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == kept


def test_files_that_lie_where_a_run_begins_are_said_but_not_those_of_a_run(tmp_path, caplog):
    folder_of(tmp_path / "a", ["log.txt", ".lock"])
    assert find_resume(TrainConfig(output=str(tmp_path / "a"))) is None
    assert "holds other files (log.txt): the run's come beside them" in caplog.text
    caplog.clear()
    folder_of(tmp_path / "b", ["metrics.jsonl", "log.txt"])
    begun = json.dumps(dataclasses.asdict(TrainConfig()))
    (tmp_path / "b" / "config.json").write_text(begun)
    (tmp_path / "c").mkdir()
    for name in "bc":
        assert find_resume(TrainConfig(output=str(tmp_path / name))) is None
    assert not caplog.text


@pytest.mark.parametrize("left", [["last"], ["step-000008-good"], ["last", "step-000008-good"]])
def test_a_folder_without_a_step_to_go_on_from_is_refused_and_kept(run, left):
    root = run / "checkpoints"
    os.rename(root / "step-000006", root / "step-000008-good")
    for name in names_in(root):
        if name not in left:
            (root / name).unlink() if (root / name).is_symlink() else shutil.rmtree(root / name)
    rows = (run / "metrics.jsonl").read_bytes()
    refused = "no checkpoint .* is whole: there is (last|step-000008-good)"
    with pytest.raises(ValueError, match=refused):
        resume(run)
    assert names_in(root) == sorted(left) and (run / "metrics.jsonl").read_bytes() == rows


def test_a_new_folder_is_begun_with_resume_auto(tmp_path, whole):
    """As a job that is requeued before its first checkpoint needs it."""
    (tmp_path / "run" / "checkpoints" / ".step-000002").mkdir(parents=True)
    resume(tmp_path / "run", steps=2)
    assert names_in(tmp_path / "run" / "checkpoints") == ["last", "step-000002"]


# --- damage ---------------------------------------------------------------------------------------


def shard(folder):
    return folder / "__0_0.distcp"


def cut(folder):
    os.truncate(shard(folder), shard(folder).stat().st_size - 100)


DAMAGE = {
    "a shard cut short": cut,
    "a shard gone": lambda folder: shard(folder).unlink(),
    "a flipped byte of a tensor": lambda folder: flip(shard(folder), 2_000_000),
    "a flipped byte of a zip's directory": lambda folder: flip(shard(folder), -40),
    "a flipped byte of the description": lambda folder: flip(folder / ".metadata", 5000),
    "no description": lambda folder: (folder / ".metadata").unlink(),
    "a flipped byte of meta.json": lambda folder: flip(folder / "meta.json", 2000),
    "meta.json is nonsense": lambda folder: (folder / "meta.json").write_text("[1, 2"),
    "no meta.json": lambda folder: (folder / "meta.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_damaged_checkpoint_the_one_before_it_is_chosen_and_said(run, group, damage, caplog):
    root = run / "checkpoints"
    DAMAGE[damage](root / "step-000006")
    assert run_state.choose_checkpoint(run) == root / "step-000004"
    assert "step-000006 is now damaged-step-000006: going on from step-000004" in caplog.text
    assert os.readlink(root / "last") == "step-000004"
    assert names_in(root) == ["damaged-step-000006", "last", "step-000002", "step-000004"]
    assert run_state.choose_checkpoint(run) == root / "step-000004"


def test_a_run_goes_on_from_before_a_damaged_checkpoint_as_if_undisturbed(run, whole):
    cut(run / "checkpoints" / "step-000006")
    resume(run)
    assert same_weights(run, whole) and losses(whole).items() <= losses(run).items()


def test_a_run_without_a_whole_checkpoint_is_refused_and_kept(run, group):
    root = run / "checkpoints"
    for step in (2, 4, 6):
        flip(shard(root / f"step-{step:06d}"), 1000)
    before = bytes_below(root)
    with pytest.raises(ValueError, match="no checkpoint of output=.* is whole: .*checksum"):
        run_state.choose_checkpoint(run)
    assert bytes_below(root) == before


def read_all(source):
    return {name: source.read(name).clone() for name in source.described}


def test_a_byte_flipped_anywhere_is_noticed_when_a_run_is_read(run):
    """Whether for a conversion, a drawing or a start: all open it with `open_source`."""
    folder = run / "checkpoints" / "step-000006"
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for k in range(25):
            flip(file, k * (len(data) - 1) // 24, 1 << k % 8)
            with pytest.raises(ValueError, match=str(folder)):
                sources.open_source(run)
            file.write_bytes(data)
    sources.open_source(run)


def test_a_large_run_is_checked_by_tensors_and_whole_before_a_result(run, monkeypatch, tmp_path):
    """A byte that changes what is read is noticed then, any other before a file appears."""
    monkeypatch.setattr(run_folder, "SOON_CHECKED", 0)
    folder = run / "checkpoints" / "step-000006"
    good, data = read_all(sources.open_source(run)), shard(folder).read_bytes()
    noticed = 0
    for k in range(60):
        flip(shard(folder), k * (len(data) - 1) // 59, 1 << k % 8)
        source = sources.open_source(run)
        try:
            read = read_all(source)
            assert all(torch.equal(read[name], good[name]) for name in good)
        except ValueError as error:
            noticed += "damaged" in str(error)
        with pytest.raises(ValueError, match="its checksum is another"):
            verify.digests_of(source)
        if k % 20 == 0:
            with pytest.raises(ValueError, match="damaged"):
                writing.write_converted(source, tmp_path / "out.safetensors")
            assert not (tmp_path / "out.safetensors").exists()
        shard(folder).write_bytes(data)
    assert 5 < noticed < 55


BAD_META = {
    "step is a text": (("step",), "3"),
    "step is negative": (("step",), -1),
    "step is huge": (("step",), 10**40),
    "step is NaN": (("step",), float("nan")),
    "no such layout": (("layout",), "mine"),
    "average of no names": (("ema",), [1, 2]),
    "config is a list": (("config",), []),
    "sample is a list": (("config", "sample"), []),
    "sampling steps are a text": (("config", "sample", "steps"), "many"),
    "a picture of no width": (("config", "data", "width"), -64),
    "a picture too wide": (("config", "data", "width"), 10**12),
    "10⁹ blocks": (("model", "num_double_blocks"), 10**9),
    "blocks too wide": (("model", "hidden_size"), 10**18),
    "negative heads": (("model", "num_heads"), -2),
    "axes of texts": (("model", "rope_axes"), ["a", "b", "c"]),
    "an unknown width": (("model", "widht"), 3),
    "files are a list": (("files",), [1]),
    "a file of negative size": (("files", "__0_0.distcp", "bytes"), -1),
    "a file elsewhere": (("files", "../x"), {"bytes": 1, "crc32": "00000000"}),
    "other flow": (("flow",), 7),
    "a base that is a list": (("config", "model", "checkpoint"), [1]),
}


@pytest.mark.parametrize("case", BAD_META)
def test_nonsense_in_meta_json_is_refused_by_name(run, group, case):
    *path, last = BAD_META[case][0]

    def change(values):
        for name in path:
            values = values[name]
        values[last] = BAD_META[case][1]

    folder = run / "checkpoints" / "step-000006"
    rewrite_meta(folder, change)
    with pytest.raises(ValueError, match="meta.json") as caught:
        sources.open_source(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_deep_nesting_in_meta_json_is_refused(run):
    file = run / "checkpoints" / "step-000006" / "meta.json"
    file.write_text('{"step":' * 100_000)
    with pytest.raises(ValueError, match="meta.json is no JSON"):
        sources.open_source(run)


BAD_ROWS = ["[1]", '{"step": "x"}', '{"step": -1}', '{"loss": 1}', '{"step": 1, "loss": {}}']
BAD_ROWS += ['{"step": 1, "loss": 1' + "0" * 400 + "}", "[" * 100_000]


@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_nonsense_in_metrics_is_refused_by_line(run, row):
    file = run / "metrics.jsonl"
    file.write_text(f"{row}\n{file.read_text()}")
    with pytest.raises(ValueError, match="line 1 of .*metrics.jsonl"):
        metrics.rewind_metrics(run, 6)


def test_no_json_file_holds_a_bare_nan(tmp_path):
    with pytest.raises(ValueError):
        run_folder.write_meta(tmp_path / "meta.json", {"step": 1, "flow": {"shift": float("nan")}})
    row = {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5}
    (tmp_path / "metrics.jsonl").write_text(metrics.format_row(row))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (read,) = metrics.read_metrics(tmp_path)
    assert read["lr"] == 0.5 and read["loss"] != read["loss"]


# --- hostile folders ------------------------------------------------------------------------------


class Touch:
    """Pickled, a command that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def all_tensors(folder):
    """{key: tensor} of a checkpoint, copied."""
    source, found = run_tensors.RunTensors(folder), {}
    for key, tensor in source.tensors.items():
        found[key] = source.read_chunk(key, tensor.chunks[0]).clone()
    return found


def hostile_description(folder, path):
    """The description itself runs a command."""
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(path)))


def hostile_values(folder, path):
    """A pickled value, such as optimizer settings once were, runs a command."""
    state = all_tensors(folder)
    name = next(key for key in state if key.endswith(".exp_avg")).removesuffix(".exp_avg")
    values = {f"{name.replace('.state.', '.param_groups.')}.lr": Touch(path)}
    dcp.save(state | values, checkpoint_id=folder, no_dist=True)


def hostile_zip(folder, path):
    """Beside each tensor's bytes lies a pickle that runs a command."""
    state, save = all_tensors(folder), torch.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda data, file: save([data, Touch(path)], file))
        dcp.save(state, checkpoint_id=folder, no_dist=True)


FRAGMENTS = ["t5", "clip", "autoencoder"]


def init(run, where):
    train(*COMMON, "steps=1", f"model.checkpoint={run}", f"output={where}/new")


def control_init(run, where):
    sources.load_controlnet(run)


def call_program(name, *arguments):
    runpy.run_path(str(ROOT / name))["body"](list(map(str, arguments)))


def convert(run, where):
    call_program("convert_hf.py", "--src", run, "--dst", where / "new.safetensors")


def digest(run, where):
    call_program("convert_hf.py", "--src", run, "--digests")


def draw(run, where):
    fluxlite.generate(["a circle"], checkpoint=str(run), steps=1)


def prove(run, where):
    options = ["--num", 2, "--swaps", 0, "--steps", 1, "--output", where / "proof"]
    call_program("prove.py", "--checkpoint", run, *options)


def resume_there(run, where):
    with_parts = [argument for argument in COMMON if not argument.endswith("=null")]
    train(*with_parts, "steps=8", f"output={run}", "resume=auto")


WAYS = [resume_there, init, control_init, convert, digest, draw, prove]


@pytest.mark.parametrize("form", [hostile_description, hostile_values, hostile_zip])
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_run_folder_runs_nothing_whoever_reads_it(run, form, tmp_path):
    mark = tmp_path / "touched"
    root = run / "checkpoints"
    for step in (2, 4):
        shutil.rmtree(root / f"step-{step:06d}")
    folder = root / "step-000006"
    form(folder, mark)

    def disarm(values):
        values.pop("files", None)
        values["config"]["model"] |= dict.fromkeys(FRAGMENTS, "flux-tiny")

    rewrite_meta(folder, disarm)
    with pytest.raises(BaseException):  # noqa: B017, whoever loads it as DCP does runs the command
        dcp.load({"x": torch.zeros(1)}, checkpoint_id=folder, no_dist=True)
    raw = (folder / ".metadata").read_bytes() + shard(folder).read_bytes()
    assert mark.exists() == (form is hostile_description) and b"system" in raw and b"touch" in raw
    mark.unlink(missing_ok=True)
    refused = {}
    for way in WAYS:
        copy = Path(shutil.copytree(run, tmp_path / f"copy-{way.__name__}", symlinks=True))
        try:
            way(copy, tmp_path)
        except ValueError as error:
            refused[way] = str(error)
        assert not mark.exists(), way.__name__
        shutil.rmtree(copy)
    if form is hostile_description:
        assert set(refused) == set(WAYS)
        assert all("names posix.system, which no checkpoint does" in e for e in refused.values())
    else:
        assert set(refused) == {control_init} and "wrong part" in refused[control_init]


def test_a_description_that_names_no_file_is_refused(run):
    folder = run / "checkpoints" / "step-000006"
    about = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(about.storage_data.values())).relative_path = []
    (folder / ".metadata").write_bytes(pickle.dumps(about))
    with pytest.raises(ValueError, match=r"metadata is damaged"):
        run_tensors.RunTensors(folder)


@pytest.mark.parametrize(
    "chunks, whole",
    [
        ([((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2))], True),
        ([((0, 0), (3, 4)), ((1, 0), (1, 4))], False),  # as many values, and a row is nowhere
        ([((0, 0), (4, 2)), ((1, 1), (4 - 1, 2)), ((0, 3), (2, 1))], False),
        ([((0, 0), (2, 4)), ((0, 0), (2, 4))], False),
    ],
)
def test_chunks_fill_their_tensor_and_do_not_lie_on_each_other(tmp_path, chunks, whole):
    (tmp_path / "file").write_bytes(bytes(100))
    parts = [run_tensors.SavedChunk(*chunk, "file", 0, 100) for chunk in chunks]
    assert sum(a * b for _, (a, b) in chunks) == 16
    tensor = run_tensors.SavedTensor(torch.float32, (4, 4), parts)
    if whole:
        return run_tensors._check_chunks(tmp_path, "x", tensor, {})
    with pytest.raises(ValueError, match="not whole in its parts"):
        run_tensors._check_chunks(tmp_path, "x", tensor, {})


def test_links_in_a_runs_folder_are_never_written_through(run, tmp_path):
    names, before = ("config.json", "metrics.jsonl", "losses.png"), {}
    for name in names:
        victim = shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(victim)
        before[name] = victim.read_bytes()
    resume(run)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert all((run / name).is_file() and not (run / name).is_symlink() for name in names)
    (tmp_path / "victim").write_text("mine")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=".lock"):
        resume(run)
    assert (tmp_path / "victim").read_text() == "mine"


# --- without checksums -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_checksums_is_read_and_gone_on_with_and_that_is_said(run, whole, caplog):
    """With pickled settings of the optimizer among the tensors, as they once were written."""
    root = run / "checkpoints"
    expected = {name: values.clone() for name, values in weights(run).items()}
    for step in (2, 4):
        shutil.rmtree(root / f"step-{step:06d}")
    folder = root / "step-000006"
    state = all_tensors(folder) | {"optimizer.param_groups.out.bias.lr": 0.25}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    rewrite_meta(folder, lambda values: [values.pop(name) for name in ("files", "data")])
    assert all(torch.equal(values, expected[name]) for name, values in weights(run).items())
    resume(run)
    assert "no checksums of its files" in caplog.text
    assert same_weights(run, whole)


# --- one run to a folder --------------------------------------------------------------------------


@contextmanager
def holding(run):
    """Another process that holds a run's folder, and its number."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        file = open(run / ".lock", "a+")
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write("process 1234 on another host\n")
        file.flush()
        os.write(tell, b"x")
        time.sleep(600)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_of_two_runs_in_one_folder_the_second_says_so_and_touches_nothing(run, whole):
    with holding(run):
        before = bytes_below(run)
        for more in ([], ["resume=auto"]):
            with pytest.raises(ValueError, match="in use by process 1234 on another host: wait"):
                train(*COMMON, "steps=8", f"output={run}", *more)
        assert bytes_below(run) == before
    resume(run)  # the lock of a killed process is nobody's
    assert same_weights(run, whole)


@pytest.mark.slow
def test_of_two_runs_started_at_once_one_wins(tmp_path):
    arguments = [*MOCK, "steps=300", f"output={tmp_path}/run"]
    options = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command(*arguments), **options) for _ in range(2)]
    told = {process.communicate(timeout=300)[1]: process.returncode for process in both}
    assert sorted(told.values()) == [0, 2]
    (loser,) = (text for text, code in told.items() if code)
    assert loser.count("\n") == 1 and ("is in use by process" in loser or "holds a run" in loser)
    rows = [row["step"] for row in metrics.read_metrics(tmp_path / "run") if "loss" in row]
    assert rows == list(range(1, 301))


# --- disks that refuse ----------------------------------------------------------------------------


@contextmanager
def file_limit(num_bytes):
    """Files of this process may not grow beyond so many bytes: a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [0, 30_000, 1_000_000])
def test_a_checkpoint_that_does_not_fit_is_said_in_one_line_and_leaves_nothing(
    run, whole, num_bytes, monkeypatch
):
    real = run_state.save_training

    def save_with_limit(*args, **options):
        with file_limit(num_bytes):
            real(*args, **options)

    before = bytes_below(run / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_training", save_with_limit)
        refused = "of step 8 could not be written .*File too large.*; step-000006 is whole, and"
        with pytest.raises(ValueError, match=refused) as caught:
            resume(run)
    assert "\n" not in str(caught.value) and bytes_below(run / "checkpoints") == before
    resume(run)
    assert same_weights(run, whole)


def test_a_disk_that_refuses_a_rename_leaves_the_checkpoint_before(run, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error", "step-000008")

    before = bytes_below(run / "checkpoints")
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ValueError, match="could not be written .step-000008: Input/output error"):
        resume(run)
    assert bytes_below(run / "checkpoints") == before


def test_a_checkpoint_whose_link_alone_is_refused_is_whole_and_gone_on_from(
    run, whole, monkeypatch
):
    real = os.replace

    def refuse(source, target):
        if os.path.islink(source) and os.readlink(source) == "step-000008":
            raise OSError(5, "Input/output error", str(target))
        real(source, target)

    said = "last could not be pointed at step-000008 .*Input/output error., which is whole"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(ValueError, match=said):
            resume(run)
    assert run_state.find_fault(run / "checkpoints" / "step-000008") is None
    resume(run)
    assert same_weights(run, whole)
    assert (run / "checkpoints" / "last").resolve().name == "step-000008"


def test_a_disk_without_links_takes_a_run_that_goes_on_and_says_so(
    tmp_path, original, monkeypatch, caplog
):
    def refuse(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for steps in (2, 4):
        resume(tmp_path / "run", steps=steps)
    assert names_in(tmp_path / "run" / "checkpoints") == ["step-000002", "step-000004"]
    assert "gets no link `last` (Operation not permitted): step-000004 counts" in caplog.text
    assert same_weights(tmp_path / "run", original / "checkpoints" / "step-000004")


def test_a_first_checkpoint_that_does_not_fit_leaves_none_to_go_on_from_and_says_so(tmp_path):
    real = run_state.save_training

    def save_with_limit(*args, **options):
        with file_limit(30_000):
            real(*args, **options)

    with mock.patch.object(run_state, "save_training", save_with_limit):
        with pytest.raises(ValueError, match="step 2 could not be .*; there is no checkpoint to"):
            train(*COMMON, "steps=2", f"output={tmp_path}/run")
    assert names_in(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("resume", [[], ["resume=auto"]])
def test_a_file_or_a_dangling_link_in_the_checkpoints_place_is_said_before_a_step(
    tmp_path, resume, monkeypatch
):
    monkeypatch.setattr(loop, "set_up", None)
    place = tmp_path / "run" / "checkpoints"
    place.parent.mkdir()
    place.write_text("mine")
    with pytest.raises(ValueError, match="checkpoints is a file: bring it back"):
        train(*COMMON, "steps=1", f"output={tmp_path}/run", *resume)
    assert place.read_text() == "mine"
    place.unlink()
    place.symlink_to(tmp_path / "not mounted")
    with pytest.raises(ValueError, match="checkpoints is a link to .*/not mounted, which is no"):
        train(*COMMON, "steps=1", f"output={tmp_path}/run", *resume)


def test_a_run_goes_on_where_its_parts_lie_elsewhere_and_says_so(run, tmp_path, caplog):
    """But not with one that it had not."""
    given = [*COMMON, f"output={tmp_path}/on", "model.ema=false"]
    train(*given, "steps=1", f"model.checkpoint={run}")
    there = run.rename(tmp_path / "there")
    moved = ["steps=2", f"model.checkpoint={there}", "resume=auto"]
    with pytest.raises(ValueError, match="model.tokenizers: None there, other here"):
        train(*given, *moved, "model.tokenizers=other")
    train(*given, *moved)
    told = f"copies of the same: model.checkpoint: {run} there, {there} here"
    assert told in caplog.text and {step for step, _ in losses(tmp_path / "on")} >= {1, 2}


def test_a_run_of_no_lora_is_told_where_a_lora_is_named(run):
    with pytest.raises(ValueError, match="is a run, and not of a LoRA: name it as model.check"):
        read_lora(run)


@contextmanager
def other_user(number=65534):
    """This process as somebody else, whom root's files refuse."""
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def small_disk(place, size):
    """A disk of its own at a folder."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this needs the right to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="this needs the right to become another user")
def test_a_folder_of_another_user_is_said_and_left_as_it_is(run, monkeypatch):
    real = run_state.save_training

    def save_as_another(*args, **options):
        with other_user():
            real(*args, **options)

    before = bytes_below(run / "checkpoints")
    with other_user(), pytest.raises(OSError, match="Permission denied"):
        run_state.lock_folder(run)
    monkeypatch.setattr(run_state, "save_training", save_as_another)
    with pytest.raises(ValueError, match="step 8 could not be written .*Permission denied"):
        resume(run)
    assert bytes_below(run / "checkpoints") == before


def test_a_full_disk_leaves_the_checkpoint_before_whole_and_nothing_of_the_new_one(tmp_path):
    with small_disk(tmp_path / "disk", "7m"):
        output = tmp_path / "disk" / "run"
        refused = "step 4 could not be written .*No space left on device"
        with pytest.raises(ValueError, match=refused):
            train(*COMMON, "steps=6", f"output={output}")
        assert names_in(output / "checkpoints") == ["last", "step-000002"]
        assert run_state.find_fault(output / "checkpoints" / "step-000002") is None


def test_a_checkpoint_that_is_a_link_loses_its_link_alone_when_its_turn_comes(run, tmp_path):
    root = run / "checkpoints"
    os.rename(root / "step-000004", tmp_path / "elsewhere")
    (root / "step-000004").symlink_to(tmp_path / "elsewhere")
    resume(run, "checkpoint.keep=1")
    resume(run, "checkpoint.keep=1", steps=10)
    assert names_in(root) == ["last", "step-000010"]
    assert (tmp_path / "elsewhere" / "meta.json").is_file()


def test_leftovers_of_killed_writers_go_with_the_next_checkpoint(run):
    left = run / "checkpoints" / ".step-000007"
    shutil.copytree(run / "checkpoints" / "step-000002", left)
    resume(run)
    assert names_in(run / "checkpoints") == ["last", *(f"step-{n:06d}" for n in (2, 4, 6, 8))]


def test_last_is_readable_at_every_moment_of_saving(run, monkeypatch):
    """Before and after every call that changes a name, as a kill could come there."""
    seen = []

    def watched(name, real):
        def call(*args, **options):
            for moment in ("before", "after"):
                if moment == "after":
                    result = real(*args, **options)
                meta = run_folder.read_meta(run / "checkpoints" / "last")
                run_folder.check_files(run / "checkpoints" / "last", meta)
                seen.append((name, moment, meta.step))
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "symlink", "unlink"):
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(shutil, "rmtree", watched("rmtree", shutil.rmtree))
        resume(run, "checkpoint.keep=1", steps=10)
    replaced = {("replace", "after", 8), ("replace", "after", 10)}
    assert replaced | {("rename", "after", 6), ("rmtree", "before", 10)} <= set(seen)
    assert names_in(run / "checkpoints") == ["last", "step-000010"]


def test_weights_that_are_not_finite_are_never_saved(run, whole, monkeypatch):
    real = loop.train_step

    def poisoned(run, batches, step):
        result = real(run, batches, step)
        with torch.no_grad():
            run.model.img_in.bias[0] = float("nan")
        return result

    before = bytes_below(run / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned)
        patch.setattr(loop, "skip_step", lambda *_: None)
        with pytest.raises(ValueError, match=r"step 7 is not saved.*not finite .model.img_in.bias"):
            resume(run, steps=7)
    assert bytes_below(run / "checkpoints") == before
    resume(run)
    assert same_weights(run, whole)


RANKS = """
import os, resource, sys
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from test_trainer import MOCK, configure
from fluxlite import parallel
from fluxlite.cli.processes import leave_process
from fluxlite.train import resume, run_state, setup
from fluxlite.cli.messages import one_line
config = configure(*MOCK, f"output={sys.argv[1]}")
device, mesh = parallel.start_ranks(config.parallel, "cpu")
run = setup.set_up(config, device, mesh)
state = dict(model=run.model, optimizers=run.optimizers, ema=run.ema)
about = dict(meta=resume.describe_run(run), keep=0)
save = lambda step: run_state.save_training(config.output, step=step, **about, **state)
save(1)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
if parallel.rank() == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    save(2)
except ValueError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    Path(f"{sys.argv[1]}-rank{parallel.rank()}").write_text(one_line(error))
chosen = run_state.choose_checkpoint(config.output)
assert chosen.name == "step-000001", chosen
save(3)
if parallel.rank() == 0:
    shard = Path(config.output) / "checkpoints/step-000003/__1_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)
torch.distributed.barrier()
assert run_state.choose_checkpoint(config.output).name == "step-000001"
parallel.stop_ranks()
leave_process(0)
"""


def test_every_rank_says_what_one_rank_could_not_write_and_all_fall_back_together(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "ranks", str(tmp_path / "run")]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr
    told = {(tmp_path / f"run-rank{rank}").read_text() for rank in (0, 1)}
    assert len(told) == 1 and "__1_0.distcp: File too large" in told.pop()
    left = ["damaged-step-000003", "last", "step-000001"]
    assert names_in(tmp_path / "run" / "checkpoints") == left


# --- data -----------------------------------------------------------------------------------------


def write_tar(path, colour, count):
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            picture = BytesIO()
            Image.new("RGB", (32, 32), colour).save(picture, "PNG")
            for ending, data in (("png", picture.getvalue()), ("txt", colour.encode())):
                about = tarfile.TarInfo(f"{colour}{number}.{ending}")
                about.size = len(data)
                tar.addfile(about, BytesIO(data))


def test_another_validation_set_alone_is_said_too():
    before = run_folder.DataRecord("a", 5, ["x"], "v")
    assert (
        run_state.changed_data(before, run_folder.DataRecord("a", 5, ["x"], "w"))
        == "another validation set"
    )
    assert run_state.changed_data(before, before) == ""


def test_a_run_that_goes_on_with_other_data_says_so(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "a.tar", "red", 8)
    places = [f"data.path={tmp_path}/data", f"output={tmp_path}/run"]
    arguments = [*SMALL, "data=webdataset", *places, "sample.every=0", "validate_every=0"]
    arguments += ["resume=auto"]
    train(*arguments, "steps=1")
    train(*arguments, "steps=2")
    assert "other data" not in caplog.text
    write_tar(tmp_path / "data" / "b.tar", "blue", 6)
    train(*arguments, "steps=3")
    assert (
        "other data: the samples have changed (5 samples then, 11 now, with b, another validation "
        "set)" in caplog.text
    )
    meta = run_folder.read_meta(run_folder.last_checkpoint(tmp_path / "run"))
    assert meta.data.samples == 11 and meta.data.names == ["a", "b"] and meta.data.digest
