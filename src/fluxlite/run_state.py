"""A run's folder: which checkpoints it holds, who may write there, and the training state in them.

    runs/a/.lock                       held by rank 0 for as long as the run lives
    runs/a/checkpoints/step-000100/    torch.distributed.checkpoint's files, and meta.json
    runs/a/checkpoints/last            a link that always names a whole checkpoint
    runs/a/checkpoints/.step-000200/   one that is being written, or whose writer was killed

`meta.json` says what a checkpoint is, has the size and CRC-32 of each of its files, and a checksum
of itself: a changed byte is noticed wherever a checkpoint is read.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import zlib
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from fluxlite import parallel
from fluxlite.cli.atomic import sync_folder
from fluxlite.cli.descriptions import parse_json, read_description, read_text
from fluxlite.cli.options import option, typed_options
from fluxlite.cli.programs import one_line
from fluxlite.convert import FIRST_EDITION
from fluxlite.run_tensors import (
    DESCRIPTION,
    RunReader,
    RunTensors,
    RunWriter,
    TensorPlanner,
    check_file_bytes,
    check_file_size,
    plain_errors,
)
from fluxlite.streams import all_finite

log = logging.getLogger("fluxlite")

STEP_NAME = re.compile(r"step-(\d{6,})")
SOON_CHECKED = 1 << 30  # bytes of a checkpoint that are read in less time than a program starts in


# --- what a checkpoint says of itself -------------------------------------------------------------


@dataclass
class FileRecord:
    """A file of a checkpoint, as it was written."""

    bytes: int = option(MISSING, "its size", at_least=0)
    crc32: str = option(MISSING, "CRC-32 of its bytes, eight hexadecimal digits")


@dataclass
class DataRecord:
    """What a run was trained on."""

    digest: str = option("", "of the samples; empty where they are made up")
    samples: int = option(0, "how many there are", at_least=0)
    names: list[str] = option([], "of the files they lie in")
    held_out: str = option("", "a digest of the validation set; empty where it is made up")


@dataclass
class CheckpointMeta:
    """A checkpoint's meta.json."""

    step: int = option(MISSING, "optimizer steps taken", at_least=0, at_most=10**12)
    model: dict = option(MISSING, "fields of the model's configuration")
    flow: dict = option(MISSING, "the run's FlowConfig")
    config: dict = option(MISSING, "the run's TrainConfig")
    ema: list[str] = option(MISSING, "names of the parameters that have a moving average")
    layout: str = option("fluxlite", "of the weights", choices=("fluxlite",))
    version: str = option("", "of the program that wrote it")
    what: str = option("transformer", "what was trained", choices=("transformer", "controlnet"))
    data: DataRecord = option(DataRecord, "what it was trained on")
    files: dict = option(dict, "{name: FileRecord}; empty where none was taken")
    checksum: str = option("", "CRC-32 of meta.json with zeros in its place")


NO_CHECKSUM = "0" * 8


def write_meta(file, values):
    """Write a `meta.json` with its own checksum."""
    values = values | {"checksum": NO_CHECKSUM}
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    head, _, tail = text.rpartition(NO_CHECKSUM)
    file.write_text(f"{head}{zlib.crc32(text.encode()):08x}{tail}")


def read_meta(folder):
    """The `CheckpointMeta` of a checkpoint's folder; raises `ValueError` that names the file."""
    file = Path(folder) / "meta.json"
    if not file.exists():
        raise ValueError(f"{file} is missing: {folder} is no whole checkpoint")
    values = parse_json(read_text(file), file)
    meta = read_description(file, CheckpointMeta, values)
    try:
        meta.files = {name: typed_options(FileRecord, of) for name, of in meta.files.items()}
    except ValueError as error:
        raise ValueError(f"{file}: files: {error}") from None
    if meta.checksum:
        head, _, tail = file.read_bytes().rpartition(meta.checksum.encode())
        if f"{zlib.crc32(head + NO_CHECKSUM.encode() + tail):08x}" != meta.checksum:
            raise ValueError(
                f"{file} is damaged: its checksum is another. (Changed by hand? Take the line "
                '"checksum" out.)'
            )
    return meta


def saved_part(folder, meta, name):
    """A group of the run's configuration, a dictionary; raises `ValueError` where there is none."""
    if not isinstance(meta.config.get(name), dict):
        raise ValueError(f"{folder}/meta.json: config.{name} must be an object with named values")
    return meta.config[name]


@dataclass
class SavedParts:
    """Where a run's frozen parts lay; null where it had none."""

    t5: str | None = None
    clip: str | None = None
    autoencoder: str | None = None


def saved_parts(run):
    """{part: path or hub id} of the frozen parts that a run was trained with."""
    folder = Path(run) if (Path(run) / "meta.json").is_file() else last_checkpoint(run)
    part = saved_part(folder, read_meta(folder), "model")
    values = {f.name: part.get(f.name) for f in fields(SavedParts)}
    parts = read_description(folder / "meta.json", SavedParts, values)
    return {name: value for name, value in vars(parts).items() if value}


@dataclass
class DrawingSettings:
    """What a run drew its own pictures with."""

    steps: int = option(MISSING, "sampling steps", at_least=1, at_most=100_000)
    guidance: float = option(MISSING, "guidance embedding", at_least=0)
    height: int = option(MISSING, "pixels", at_least=16, at_most=1 << 16)
    width: int = option(MISSING, "pixels", at_least=16, at_most=1 << 16)
    max_sequence_length: int = option(MISSING, "text tokens", at_least=1, at_most=1 << 16)


def run_settings(folder, meta):
    """{field of SampleConfig: value} that a run drew its pictures with."""
    places = {"sample": ("steps", "guidance"), "data": ("height", "width")}
    values = {}
    for group, names in (places | {"model": ("max_sequence_length",)}).items():
        part = saved_part(folder, meta, group)
        values |= {name: part[name] for name in names if name in part}
    return vars(read_description(Path(folder) / "meta.json", DrawingSettings, values))


# --- finding --------------------------------------------------------------------------------------


def list_checkpoints(run):
    """The checkpoints of a run's folder, newest first: those that are named as a run names them."""
    root = Path(run) / "checkpoints"
    found = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    named = [(int(m[1]), p) for p in found if (m := STEP_NAME.fullmatch(p.name))]
    return [path for _, path in sorted(named, reverse=True)]


def last_checkpoint(run):
    """The newest checkpoint of a run's folder, or None. In a copy, `last` may be a folder."""
    last = Path(run) / "checkpoints" / "last"
    copied = [last] if (last / "meta.json").is_file() else []
    return next(iter([*list_checkpoints(run), *copied]), None)


def is_run(path):
    """Whether `path` is a run folder or one of its checkpoints."""
    return (Path(path) / "meta.json").is_file() or last_checkpoint(path) is not None


def open_checkpoint(folder):
    """(meta, tensors) of a checkpoint: its files' sizes, headers and offsets are checked, no more.

    Raises `ValueError` that names the file.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if meta.version.startswith("0.1."):
        raise ValueError(f"{folder} was written by {FIRST_EDITION}")
    for name, of in meta.files.items():
        if Path(name).name != name:
            raise ValueError(f"{folder}/meta.json names the file {name!r}: it must lie beside it")
        check_file_size(folder / name, of.bytes)
    if meta.files:
        check_listed(folder, meta, DESCRIPTION)
        check_file_bytes(folder / DESCRIPTION, meta.files[DESCRIPTION].crc32)
    tensors = RunTensors(folder)
    for name in tensors.file_names() if meta.files else []:
        check_listed(folder, meta, name)
    for name in meta.ema:
        tensors.described(f"ema.{name}")
    return meta, tensors


def check_listed(folder, meta, name):
    """Raise `ValueError` unless a checkpoint's meta.json has the checksum of a file."""
    if name not in meta.files:
        raise ValueError(f"{folder}/meta.json has no checksum of {name}: the checkpoint is damaged")


def total_bytes(meta):
    """The bytes of a checkpoint's files."""
    return sum(of.bytes for of in meta.files.values())


def check_files(folder, meta, share=slice(None)):
    """Raise `ValueError` unless a checkpoint's files, or a share of them, are as written."""
    for name in sorted(meta.files)[share]:
        check_file_bytes(Path(folder) / name, meta.files[name].crc32)


# --- going on -------------------------------------------------------------------------------------


def held_names(run):
    """What lies among a run's checkpoints, less what killed writers left there."""
    root = Path(run) / "checkpoints"
    return [p.name for p in root.iterdir() if not p.name.startswith(".")] if root.is_dir() else []


def check_unused(run):
    """Raise `ValueError` where a run's folder holds checkpoints, or what may be some."""
    if held_names(run):
        raise ValueError(
            f"output={run} holds a run: resume=auto goes on with it; or set another output="
        )


def choose_checkpoint(run):
    """The folder of the newest whole checkpoint to go on from, or None in a new run; collective.

    Newer ones that are damaged are said and set aside. Raises `ValueError` where none is whole.
    """
    damaged = []
    for folder in parallel.first_rank_does(lambda: _candidates(run)):
        faults = [fault for fault in parallel.gather_values(find_fault(folder)) if fault]
        if not faults:
            return parallel.first_rank_does(partial(settle_checkpoints, run, folder, damaged))
        damaged.append((folder, faults[0]))
    names = parallel.first_rank_does(lambda: held_names(run))
    if names:
        why = "; ".join(fault for _, fault in damaged[:3]) or f"there is {', '.join(names[:3])}"
        nodes = " Do all nodes see this folder?" if parallel.world_size() > 1 else ""
        raise ValueError(
            f"resume=auto: no checkpoint of output={run} is whole: {why}. Bring one back, or move "
            f"what is there away to start anew.{nodes}"
        )
    return None


def _candidates(run):
    """The checkpoints to try, newest first; of a copied run also the folder `last`."""
    found, last = list_checkpoints(run), Path(run) / "checkpoints" / "last"
    if last.is_dir() and not last.is_symlink():
        found.append(last)
    return sorted(found, key=_claimed_step, reverse=True)


def _claimed_step(folder):
    """The step in a checkpoint's name; of a folder `last` what it says, less a bit."""
    match = STEP_NAME.fullmatch(folder.name)
    try:
        return int(match[1]) if match else read_meta(folder).step - 0.5
    except ValueError:
        return -1


def find_fault(folder):
    """What is wrong with a checkpoint, in one line, or None; a rank checks its share of files."""
    try:
        meta, _ = open_checkpoint(folder)
        match = STEP_NAME.fullmatch(folder.name)
        if match and int(match[1]) != meta.step:
            raise ValueError(f"{folder} says that it is step {meta.step}: it is another's copy")
        if parallel.rank() == 0 and total_bytes(meta) > SOON_CHECKED:
            log.info("checking the checksums of %s, %.1f GB", folder.name, total_bytes(meta) / 1e9)
        check_files(folder, meta, slice(parallel.rank(), None, parallel.world_size()))
    except (ValueError, OSError) as error:
        return one_line(error)
    return None


def settle_checkpoints(run, chosen, damaged):
    """Point `last` at the chosen checkpoint and set damaged ones aside; returns the chosen folder.

    In a copied run the folder `last` gets the name of its step; where that is there, another name.
    """
    root = Path(run) / "checkpoints"
    last = root / "last"
    copied = last.is_dir() and not last.is_symlink()
    if not copied:  # before what it may name is moved
        point_last(root, chosen.name)
    for folder, fault in damaged:
        place = free_name(root / f"damaged-{folder.name}")
        os.rename(folder, place)
        names = folder.name, place.name, chosen.name
        log.warning("%s; %s is now %s: going on from %s", fault, *names)
    if copied and chosen == last:
        chosen = root / f"step-{read_meta(last).step:06d}"
        os.rename(last, chosen)
    elif last.is_dir() and not last.is_symlink():
        os.rename(last, free_name(root / "copy-of-last"))
    if copied:
        point_last(root, chosen.name)
    if not read_meta(chosen).files:
        log.warning("%s has no checksums of its files: they are taken as they are", chosen)
    return chosen


def free_name(path):
    """`path`, or the first of `path-2`, `path-3` … that does not exist."""
    number, free = 1, path
    while os.path.lexists(free):
        number, free = number + 1, path.with_name(f"{path.name}-{number + 1}")
    return free


def point_last(root, name):
    """Make the link `last` name a checkpoint, in one step."""
    link = root / ".last"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / "last")
    sync_folder(root)


def changed_data(before, now):
    """How the data differ from those a run was trained on, in words; empty where they do not."""
    words = []
    if before.digest and before.digest != now.digest:
        gone, new = set(before.names) - set(now.names), set(now.names) - set(before.names)
        words = [f"{before.samples} samples then, {now.samples} now"]
        words += [f"without {', '.join(sorted(gone)[:3])}"] if gone else []
        words += [f"with {', '.join(sorted(new)[:3])}"] if new else []
    if before.held_out and before.held_out != now.held_out:
        words.append("another validation set")
    return ", ".join(words)


# --- one run to a folder --------------------------------------------------------------------------


@contextmanager
def locked_run(folder):
    """Keep other runs out of a run's folder until the block ends; collective.

    Raises `ValueError`, on every rank, where another run is in it.
    """
    held = []
    parallel.first_rank_does(lambda: held.append(lock_folder(Path(folder))))
    try:
        yield
    finally:
        for file in held:
            file.close()


def lock_folder(folder):
    """An open file whose lock is this process's: it goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / ".lock"  # somebody else's folder may have a link of that name
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(place, flags, 0o666), "r+")
    try:
        # not flock, which the loader's forked workers would hold on to
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        raise ValueError(
            f"output={folder} is in use by {holder}: wait until that run ends, or set another "
            "output="
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no second run there", place, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


# --- saving and loading ---------------------------------------------------------------------------


BY_NAME = StateDictOptions(  # groups of parameters differ from mesh to mesh
    strict=True, flatten_optimizer_state_dict=True
)


def training_state(model, optimizers, ema):
    """{"model", "optimizer", "ema": {name: tensor}}, and the optimizers' whole state.

    The numbers in that, such as learning rates, follow from the configuration and are not saved.
    """
    whole = get_optimizer_state_dict(model, optimizers, options=BY_NAME)
    moments = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
    state = {"model": dict(model.state_dict()), "optimizer": moments}
    return state | ({"ema": ema.average} if ema else {}), whole


def check_all_finite(state, what):
    """Raise `ValueError`, on every rank, where a tensor of a training state is not finite."""
    found = None
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if found is None and not all_finite(local):
                found = f"{group}.{name}"
    bad = [name for name in parallel.gather_values(found) if name]
    if bad:
        raise ValueError(f"{what} is not finite ({bad[0]})")


def save_training(run, *, step, model, optimizers, ema, meta, keep):
    """Write a checkpoint aside, rename it, point `last` at it, drop all but `keep`; collective.

    Raises `ValueError`, on every rank, where the state is not finite or the disk refuses; the
    checkpoint before is then whole, and nothing of this one is left.
    """
    root = Path(run) / "checkpoints"
    name = f"step-{step:06d}"
    state, _ = training_state(model, optimizers, ema)
    check_all_finite(
        state, f"step {step} is not saved, and the checkpoint before it is whole: its state"
    )
    writer = RunWriter(root / f".{name}")
    try:
        parallel.first_rank_does(lambda: clear_leftovers(root))
        with plain_errors():
            dcp.save(state, storage_writer=writer, planner=TensorPlanner())
        files = {}
        for records in parallel.gather_values(writer.fs.records):
            files |= records
        about = meta | {"step": step, "files": files}
        parallel.first_rank_does(lambda: publish_checkpoint(root, name, about, keep))
    except (ValueError, OSError, MemoryError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(root / f".{name}", ignore_errors=True)
        raise ValueError(
            f"the checkpoint of step {step} could not be written ({one_line(error)}); the one "
            "before it is whole, and resume=auto goes on from there"
        ) from None


def clear_leftovers(root):
    """Make the folder for checkpoints, without what killed writers left there."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".step-*"):
        remove_folder(left)


def remove_folder(path):
    """Remove a folder, or a link to one that lies elsewhere, or a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def publish_checkpoint(root, name, meta, keep):
    """Give what lies whole in `.step-…` its name, point `last` at it, drop all but `keep`."""
    aside = root / f".{name}"
    write_meta(aside / "meta.json", meta)
    sync_folder(aside)
    if os.path.lexists(root / name):  # not this run's
        os.rename(root / name, free_name(root / f"replaced-{name}"))
    os.rename(aside, root / name)
    point_last(root, name)
    older = [path for path in list_checkpoints(root.parent) if int(path.name[5:]) < meta["step"]]
    for path in older[keep - 1 :] if keep else []:
        drop_checkpoint(path)


def drop_checkpoint(path):
    """Remove a checkpoint, out of sight first: a half removed one must not look whole."""
    try:
        aside = path.with_name(f".{path.name}")
        os.rename(path, aside)
        remove_folder(aside)
    except OSError as error:
        log.warning("an old checkpoint could not be removed: %s", one_line(error))


def load_training(folder, *, model, optimizers, ema):
    """Read a checkpoint into a sharded model, its optimizers and average; returns its step.

    Collective; whatever mesh wrote it. Raises `ValueError` where it is damaged.
    """
    meta, tensors = open_checkpoint(folder)
    state, whole = training_state(model, optimizers, ema)
    for group, entries in state.items():
        for name in entries:
            tensors.described(f"{group}.{name}")
    with plain_errors():
        dcp.load(state, storage_reader=RunReader(tensors))
    check_all_finite(state, f"{folder} cannot be gone on from: it")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizers, whole, options=BY_NAME)
    return meta.step
