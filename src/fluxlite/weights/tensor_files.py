"""safetensors files of any size at constant memory: mapped and checked on reading, streamed, and
renamed when whole, on writing.

    tensors = Tensors("FLUX.1-dev/transformer")  # a file, or a folder with its index; none is read
    with atomic_weights("out.safetensors") as path:  # whole under that name, or not there
        write_tensors(path, {"a": (torch.bfloat16, (2, 3))}, [("a", tensor)], {"format": "pt"})
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore

import torch
from safetensors import SafetensorError, safe_open

from fluxlite.cli.atomic import atomic_folder, atomic_path
from fluxlite.cli.descriptions import DAMAGED, check_regular, inside_folder, parse_json, read_json
from fluxlite.weights import foreign, gguf_files
from fluxlite.weights.dtypes import DTYPES, SPELLED

WRITE_ERRORS = {
    errno.EFBIG: "file too large for this user's limit",
    errno.ENOSPC: "no space left on the disk; free some",
    errno.EEXIST: "a file lies where a folder must be",
    errno.ENOTDIR: "a file lies where a folder must be",
}
MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
LONGEST_NOTE = 4096  # bytes
DIGEST_BYTES = 1 << 26  # read at a time
SHARD_NAME = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")
WAITING_BYTES = 1 << 27  # made and not yet written
BYTE_UNITS = "bytes", "kB", "MB", "GB", "TB"


# --- reading --------------------------------------------------------------------------------------


def files_of(path):
    """The safetensors files of a file or folder, those of its index where it has one; GGUF files
    where there are no others. Raises `ValueError`.
    """
    path = Path(path)
    if not path.is_dir():
        shard = SHARD_NAME.search(path.name)
        if shard and int(shard[1]) > 1:
            raise ValueError(f"{path} is one of {int(shard[1])} files: name their folder")
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if not indices:
        found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
        if not found:
            others = sorted(p.name for p in path.iterdir() if p.suffix in OTHER_SUFFIXES)
            beside = f" but {others[0]}, which is not read" if others else ""
            raise ValueError(
                f"{path} holds no .safetensors file{beside}: name the folder or file that does"
            )
        return found
    if len(indices) > 1:
        raise ValueError(
            f"{path} has {len(indices)} indices, {indices[0].name} first: move all but one away"
        )
    return indexed_files(indices[0])


OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx", ".distcp")


def indexed_files(index):
    """The files that an index names, all in its folder or below; raises `ValueError`."""
    folder, places = index.parent, read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map with a file's name for each weight: {DAMAGED}")
    names = sorted(set(places.values()))
    if not names:
        raise ValueError(f"{index} names no file: {DAMAGED}")
    files = [inside_folder(folder, name, index) for name in names]
    missing = [name for name, file in zip(names, files) if not file.exists()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(names)} files of its index, {missing[0]} "
            "first: fetch it again"
        )
    return files


def check_file(file):
    """Raise `ValueError`, naming it, unless a file is whole safetensors: header, names and length.

    The library that maps it checks types and offsets; a file that is cut later kills the process.
    """
    with open(file, "rb") as opened:
        size, start = os.fstat(opened.fileno()).st_size, opened.read(512)
        foreign.check_bytes(file, start)
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{file} is no whole safetensors file (a header of {length} bytes in {size}): "
                "fetch it again"
            )
        opened.seek(8)
        text = opened.read(length)
    try:
        parse_json(text.decode(), f"{file}'s header")
    except UnicodeDecodeError:
        raise ValueError(f"{file}'s header is no text in UTF-8: {DAMAGED}") from None


def open_tensors(file):
    """({name: (type, shape, read)} of a file, its metadata), by its first bytes: safetensors or
    GGUF; raises `ValueError`.
    """
    check_regular(file)
    with open(file, "rb") as opened:
        if opened.read(4) == gguf_files.MAGIC:
            return gguf_files.open_gguf(file)
    check_file(file)
    try:
        handle = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}): fetch it again") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    return {name: _open_mapped(handle, name) for name in handle.keys()}, handle.metadata() or {}


def _open_mapped(handle, name):
    """(type, shape, read) of a tensor in a mapped safetensors file."""
    part = handle.get_slice(name)

    def read(start=0, stop=None, exact=False):
        tensor = handle.get_tensor(name)
        return tensor[start:stop] if tensor.ndim else tensor

    return part.get_dtype(), tuple(part.get_shape()), read


# type: as safetensors spells it; read(start=0, stop=None, exact=False) gives rows
Entry = namedtuple("Entry", "type shape read file")


class Tensors:
    """The tensors of one file or a folder's files, mapped and read one by one."""

    def __init__(self, path, files=None):
        self.files, self.entries, self.metadata = files or files_of(path), {}, {}
        for file in self.files:
            found, metadata = open_tensors(file)
            twice = self.entries.keys() & found.keys()
            if twice:
                raise ValueError(
                    f"{file.parent} has {min(twice)} in several files: name one of them"
                )
            self.entries |= {name: Entry(*values, file) for name, values in found.items()}
            self.metadata |= metadata

    def keys(self):
        return list(self.entries)

    def read(self, name, start=0, stop=None, exact=False):
        """A tensor, or its rows from start to stop: a view of the mapped file, or what stands for
        it; with `exact` not rounded to its type.
        """
        return self.entries[name].read(start, stop, exact=exact)

    def read_note(self, name):
        """The JSON object that a tensor of bytes spells; raises `ValueError`."""
        spelled, shape = self.header(name)
        if spelled != "U8" or len(shape) != 1 or shape[0] > LONGEST_NOTE:
            found = f"{spelled} of shape {list(shape)}"
            raise ValueError(f"{name} is {found}, not a short text: {DAMAGED}")
        return parse_json(bytes(self.read(name).tolist()).decode(errors="replace"), name)

    def set_aside(self, names, replaced):
        """Hide some tensors; of others, {name: (type, shape, read)}, it is told how they are
        read.
        """
        for name, found in replaced.items():
            self.entries[name] = Entry(*found, self.entries[name].file)
        hidden = set(names)
        self.entries = {name: e for name, e in self.entries.items() if name not in hidden}

    def rename(self, names):
        """Keep the tensors of {old name: new name} alone, under their new names."""
        self.entries = {new: self.entries[old] for old, new in names.items()}

    def without(self, prefix):
        """The same with names that lose `prefix`; raises `ValueError` where some do not have it."""
        odd = [name for name in self.entries if not name.startswith(prefix)]
        if odd:
            raise ValueError(
                f"{self.files[0]} has {len(odd)} keys without the others' prefix {prefix}: "
                f"{odd[0]} first"
            )
        self.rename({name: name.removeprefix(prefix) for name in self.entries})
        return self

    def shape(self, name):
        """A tensor's shape, of whatever type it is; None where there is none of that name."""
        return self.entries[name].shape if name in self.entries else None

    def header(self, name):
        """(type as it is spelled, shape) of a tensor."""
        return self.entries[name][:2]

    def described(self):
        """{name: (dtype, shape)}, from the headers alone."""
        return {name: self._described(name, entry) for name, entry in self.entries.items()}

    def _described(self, name, entry):
        where = f"{entry.file}: {name}"
        if entry.type not in DTYPES:
            raise ValueError(
                f"{where} is of type {entry.type}, which no weights have: quantised "
                "weights are not supported yet, fetch a version in bfloat16"
            )
        if not torch.Size(entry.shape).numel():
            raise ValueError(
                f"{where} has no values (shape {list(entry.shape)}), a placeholder that "
                "DeepSpeed ZeRO-3 leaves: gather the weights before they are saved"
            )
        return DTYPES[entry.type], entry.shape


# --- digests --------------------------------------------------------------------------------------


def tensor_bytes(tensor):
    """A tensor's bytes as a one-dimensional numpy array, without a copy where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class Digests:
    """SHA-256 of tensors, computed in a thread beside the copying."""

    def __init__(self):
        self.pool, self.room, self.found = ThreadPoolExecutor(1), BoundedSemaphore(16), {}

    def add(self, name, source):
        """Digest a tensor of a `Source` unless it has been seen; waits while too many wait, so as
        not to fall far behind.
        """
        if name not in self.found:
            self.room.acquire()
            self.found[name] = self.pool.submit(self._digest, name, source)

    def _digest(self, name, source):
        try:
            source = source.base or source
            dtype, shape = source.described[name]
            size = max(1, num_bytes({name: (dtype, shape)}))
            digest, step = hashlib.sha256(), max(1, DIGEST_BYTES * shape[0] // size)
            for start in range(0, shape[0], step):
                digest.update(tensor_bytes(source.read(name, start, start + step)))
            described = f"{SPELLED[dtype]}{list(shape)}".encode()
            return hashlib.sha256(described + digest.digest()).hexdigest()
        finally:
            self.room.release()

    def each(self):
        """{name: digest of type, shape and bytes}."""
        return {name: future.result() for name, future in sorted(self.found.items())}

    def total(self):
        """One digest of all names and digests, in whatever order and files they came."""
        lines = "".join(f"{name} {digest}\n" for name, digest in self.each().items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def close(self):
        self.pool.shutdown(cancel_futures=True)


# --- writing --------------------------------------------------------------------------------------


def num_bytes(described):
    """Bytes of {name: (dtype, shape)}."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in described.values())


def format_bytes(count):
    """A number of bytes for a person: `5.34 MB`."""
    power = min((len(str(count)) - 1) // 3, len(BYTE_UNITS) - 1)
    size = count / 1000**power
    digits = max(0, 3 - len(str(int(size)))) if power else 0
    return f"{size:.{digits}f} {BYTE_UNITS[power]}"


def split_shards(described, max_bytes):
    """{name: (dtype, shape)} as a list of such, in order; all in one without `max_bytes`.

    Each has at most so many bytes, or one tensor.
    """
    shards = [{}]
    for name, entry in described.items():
        full = num_bytes(shards[-1] | {name: entry}) > (max_bytes or math.inf)
        if full and shards[-1]:
            shards.append({})
        shards[-1][name] = entry
    return shards


def shard_names(stem, count):
    """The names of `count` files of one checkpoint, as transformers and diffusers number them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _header(described, metadata):
    entries, offset = {"__metadata__": {k: str(v) for k, v in metadata.items()}}, 0
    for name, (dtype, shape) in described.items():
        end = offset + num_bytes({name: (dtype, shape)})
        about = {"dtype": SPELLED[dtype], "shape": list(shape)}
        entries[name] = about | {"data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def checked_cast(name, tensor, dtype):
    """`tensor` as `dtype`; raises `ValueError` where a finite value becomes infinite."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    narrows = tensor.is_floating_point() and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrows and not all_finite(result) and all_finite(tensor):
        raise ValueError(
            f"{name} has values up to {tensor.abs().max().item():.3g}, too large for {dtype}: "
            "choose another --dtype"
        )
    return result


def check_values(name, tensor):
    """Raise `ValueError`, naming the tensor, where it holds NaN or an infinity."""
    if not all_finite(tensor):
        raise ValueError(
            f"{name} holds NaN or infinite values: the file is damaged, or the run that wrote it "
            "had diverged; fetch it again, or take an earlier checkpoint"
        )


def all_finite(tensor):
    """Whether a tensor holds no NaN and no infinity.

    The least and the largest value tell, since NaN is passed on: 0.07 s a GB of bfloat16, where
    `isfinite` takes 2.4 s.
    """
    if not tensor.numel():
        return True
    narrow = tensor.dtype.itemsize == 1  # of fp8 torch cannot ask
    return all(end.isfinite().item() for end in (tensor.float() if narrow else tensor).aminmax())


def write_tensors(path, described, pieces, metadata, progress=lambda count: None):
    """Write a safetensors file of {name: (dtype, shape)} from (name, tensor) pieces in its order.

    Returns what rewrites the metadata, for values of the same length that are known only now: a
    function of {key: text}.
    """
    header = _header(described, metadata)
    with open(path, "wb") as file:
        file.write(header)
        parts = (tensor_bytes(checked_cast(name, t, described[name][0])) for name, t in pieces)
        for count in write_behind(file, parts):
            progress(count)
        if file.tell() != len(header) + num_bytes(described):
            written = file.tell() - len(header)
            raise RuntimeError(f"{path}: {written} bytes were written, not {num_bytes(described)}")

    def rewrite(changes):
        with open(path, "r+b") as file:
            changed = _header(described, metadata | changes)
            assert len(changed) == len(header)
            file.write(changed)

    return rewrite


def write_behind(file, parts):
    """Write arrays to an open file while the next are made; yields the bytes of each."""
    with ThreadPoolExecutor(1) as writer:
        waiting = deque()
        for part in parts:
            waiting.append((part.nbytes, writer.submit(file.write, part)))
            while sum(size for size, _ in waiting) > WAITING_BYTES:
                yield waiting.popleft()[1].result()
        for _, written in waiting:
            yield written.result()


def write_index(path, shards, names):
    """Write the index of shards, {name: (dtype, shape)} each, in files `names`."""
    places = {}
    for name, shard in zip(names, shards):
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(num_bytes, shards))}, "weight_map": places}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def atomic_weights(final, *, overwrite=False, folder=False, remedy="name another"):
    """A path to write a file or a `folder` to, which is `final` once the block ends.

    It is gone if the block raises. A link to a file is replaced and not followed: a run's folder
    may come from somebody else. Raises `ValueError` where `final` exists and `overwrite` is false,
    is of the other kind or holds what no checkpoint does, and where it cannot be written: full
    disk, no permission.
    """
    final = Path(final).resolve() if folder else Path(final).parent.resolve() / Path(final).name
    free = partial(check_replaceable, final, overwrite=overwrite, folder=folder, remedy=remedy)
    free()
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(final, replace=True) if folder else atomic_path(final) as path:
            free()  # nobody has written it while we waited
            yield path
    except OSError as error:
        reason = WRITE_ERRORS.get(error.errno) or error.strerror or error
        raise ValueError(f"{final} cannot be written: {reason}") from error


def check_replaceable(final, *, overwrite, folder, remedy):
    """Raise `ValueError` unless `final` is free or, with `overwrite`, a file or a folder of a
    checkpoint's files alone.
    """
    if not final.exists():
        return
    if final.is_dir() != folder:
        there, written = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{final} is a {there}, and a {written} is written: name another")
    inside = list(final.iterdir()) if folder else []
    if folder and not inside:
        return
    if not overwrite:
        raise ValueError(f"{final} exists: {remedy}")
    ours = (".safetensors", ".safetensors.index.json")
    known = ("config.json", "scheduler_config.json")
    others = [p.name for p in inside if p.is_dir() or not p.name.endswith((*ours, *known))]
    if others:
        raise ValueError(
            f"{final} holds more than a checkpoint's files, {sorted(others)[0]} first: it is not "
            "overwritten; name another"
        )


def check_room(final, count):
    """Raise `ValueError` unless the disk of `final` has `count` bytes free."""
    folder = Path(final).resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < count:
        raise ValueError(
            f"{final} needs {format_bytes(count)}, and {format_bytes(free)} are free: make room, "
            "or name another disk"
        )
