"""A run's folder, read: which checkpoints it holds, and what they say of themselves.

    runs/a/checkpoints/step-000100/    torch.distributed.checkpoint's files, and meta.json
    runs/a/checkpoints/last            a link that always names a whole checkpoint

`meta.json` says what a checkpoint is, has the size and CRC-32 of each of its files, and a checksum
of itself: a changed byte is noticed wherever a checkpoint is read.
"""

import json
import re
import zlib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from fluxlite.cli.descriptions import parse_json, read_text
from fluxlite.cli.options import option, typed_description, typed_options
from fluxlite.nets.configs import NET_CONFIGS
from fluxlite.weights.layouts import FIRST_EDITION
from fluxlite.weights.run_tensors import (
    DESCRIPTION,
    RunTensors,
    check_file_bytes,
    check_file_size,
)

STEP_NAME = re.compile(r"step-(\d{6,})")
SOON_CHECKED = 1 << 30  # bytes of a checkpoint that are read in less time than a program starts in


@dataclass
class CheckpointConfig:
    """When a run saves, and how much it keeps."""

    every: int = option(
        1000, "steps between checkpoints; the last step always saves", at_least=1, at_most=10**9
    )
    keep: int = option(
        2, "checkpoints kept, the newest; 0 keeps all", at_least=0, at_most=1_000_000
    )


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
    what: str = option("transformer", "what was trained", choices=(*NET_CONFIGS, "lora"))
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
    meta = typed_description(file, CheckpointMeta, values)
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


def saved_group(folder, meta, name):
    """A group of the run's configuration, a dictionary; raises `ValueError` where there is none."""
    if not isinstance(meta.config.get(name), dict):
        raise ValueError(f"{folder}/meta.json: config.{name} must be an object with named values")
    return meta.config[name]


@dataclass
class SavedParts:
    """Where what a run was made of lay, paths or hub ids; null where it had none."""

    checkpoint: str | None = None
    t5: str | None = None
    clip: str | None = None
    autoencoder: str | None = None
    tokenizers: str | None = None


def saved_parts(folder, meta):
    """The `SavedParts` of a run, from one of its checkpoints."""
    group = saved_group(folder, meta, "model")
    values = {f.name: group.get(f.name) for f in fields(SavedParts)}
    return typed_description(Path(folder) / "meta.json", SavedParts, values)


@dataclass
class DrawingSettings:
    """What a run drew its own pictures with."""

    steps: int = option(MISSING, "sampling steps", at_least=1, at_most=100_000)
    guidance: float = option(MISSING, "guidance embedding", at_least=0)
    height: int = option(MISSING, "pixels", at_least=16, at_most=1 << 16)
    width: int = option(MISSING, "pixels", at_least=16, at_most=1 << 16)
    max_sequence_length: int = option(MISSING, "text tokens", at_least=1, at_most=1 << 16)
    true_cfg: float = option(1.0, "classifier-free guidance", at_least=1)


def run_settings(folder, meta):
    """{field of SampleConfig: value} that a run drew its pictures with."""
    places = {"sample": ("steps", "guidance", "true_cfg"), "data": ("height", "width")}
    values = {}
    for group, names in (places | {"model": ("max_sequence_length",)}).items():
        part = saved_group(folder, meta, group)
        values |= {name: part[name] for name in names if name in part}
    return vars(typed_description(Path(folder) / "meta.json", DrawingSettings, values))


# --- finding --------------------------------------------------------------------------------------


def list_checkpoints(run):
    """The checkpoints of a run's folder, newest first: those that are named as a run names them."""
    root = Path(run) / "checkpoints"
    found = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    named = [(int(m[1]), p) for p in found if (m := STEP_NAME.fullmatch(p.name))]
    return [path for _, path in sorted(named, reverse=True)]


def last_checkpoint(run):
    """The newest checkpoint of a run's folder, or None; of a checkpoint itself. In a copy, `last`
    may be a folder.
    """
    if (Path(run) / "meta.json").is_file():
        return Path(run)
    last = Path(run) / "checkpoints" / "last"
    copied = [last] if (last / "meta.json").is_file() else []
    return next(iter([*list_checkpoints(run), *copied]), None)


def is_run(path):
    """Whether `path` is a run folder or one of its checkpoints."""
    return last_checkpoint(path) is not None


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
