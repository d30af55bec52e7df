"""safetensors files of any size at constant memory: mapped and checked on reading, streamed, renamed when whole on writing.

tensors = Tensors("FLUX.1-dev/transformer")          # a file, or a folder with its index; nothing is read yet
with aside("out.safetensors") as path:               # a killed or failed writer leaves nothing under the final name
    write(path, {"a": (torch.bfloat16, (2, 3))}, [("a", tensor)], {"layout": "fluxlite"})
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {  # as safetensors spells them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}


# --- reading --------------------------------------------------------------------------------------------------------------------


def files_of(path):
    """The safetensors files of a file or folder, those of its index where it has one; raises `ValueError`."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if not indices:
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise ValueError(f"{path} holds no .safetensors file: name the folder or file that does")
        return found
    if len(indices) > 1:
        raise ValueError(f"{path} has {len(indices)} indices, {indices[0].name} first: move all but one away")
    try:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{indices[0]} is damaged: fetch it again") from None
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {len(names)} files of its index, {missing[0]} first: fetch it again")
    return [path / name for name in names]


class Tensors:
    """The tensors of one file or a folder's files, mapped and read one by one, named without `prefix`."""

    def __init__(self, path):
        self.files, self.handles, self.metadata, self.prefix = files_of(path), {}, {}, ""
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is no whole safetensors file ({error}): fetch it again") from None
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
            self.metadata |= handle.metadata() or {}
            twice = self.handles.keys() & handle.keys()
            if twice:
                raise ValueError(f"{file.parent} has {min(twice)} in several files: name one of them")
            self.handles |= dict.fromkeys(handle.keys(), handle)

    def keys(self):
        return [name[len(self.prefix) :] for name in self.handles if name.startswith(self.prefix)]

    def __getitem__(self, name):
        return self.handles[self.prefix + name].get_tensor(self.prefix + name)

    def without(self, prefix):
        """The same with names that lose `prefix`; raises `ValueError` where some do not have it."""
        odd = [name for name in self.handles if not name.startswith(prefix)]
        if odd:
            raise ValueError(f"{self.files[0]} has {len(odd)} keys without the others' prefix {prefix}: {odd[0]} first")
        self.prefix = prefix
        return self

    def described(self):
        """{name: (dtype, shape)}, from the headers alone."""
        found = {}
        for name in self.keys():
            part = self.handles[self.prefix + name].get_slice(self.prefix + name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"{self.files[0]}: {name} has the type {part.get_dtype()}, which is not supported")
            found[name] = DTYPES[part.get_dtype()], tuple(part.get_shape())
        return found


# --- digests --------------------------------------------------------------------------------------------------------------------


def raw(tensor):
    """A tensor's bytes as a one-dimensional numpy array, without a copy where it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class Digests:
    """SHA-256 of tensors, computed in a thread beside the copying."""

    def __init__(self):
        self.pool, self.room, self.found = ThreadPoolExecutor(1), BoundedSemaphore(16), {}

    def add(self, name, tensor):
        """Digest `tensor` unless `name` has been seen; waits while too many tensors are held for it."""
        if name not in self.found:
            self.room.acquire()
            self.found[name] = self.pool.submit(self._digest, tensor)

    def _digest(self, tensor):
        try:
            about = f"{SPELLED[tensor.dtype]}{list(tensor.shape)}".encode()
            return hashlib.sha256(about + hashlib.sha256(raw(tensor)).digest()).hexdigest()
        finally:
            self.room.release()

    def each(self):
        """{name: digest of type, shape and bytes}."""
        return {name: future.result() for name, future in sorted(self.found.items())}

    def total(self):
        """One digest of all names and digests, in whatever order and files they came."""
        return hashlib.sha256("".join(f"{k} {v}\n" for k, v in self.each().items()).encode()).hexdigest()

    def close(self):
        self.pool.shutdown(cancel_futures=True)


# --- writing --------------------------------------------------------------------------------------------------------------------


def num_bytes(described):
    """Bytes of {name: (dtype, shape)}."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in described.values())


def split_shards(described, max_bytes):
    """{name: (dtype, shape)} as a list of such, in order, each of at most `max_bytes` or of one tensor; None: all in one."""
    shards = [{}]
    for name, entry in described.items():
        if max_bytes and shards[-1] and num_bytes(shards[-1]) + num_bytes({name: entry}) > max_bytes:
            shards.append({})
        shards[-1][name] = entry
    return shards


def _header(described, metadata):
    entries, offset = {"__metadata__": {k: str(v) for k, v in metadata.items()}}, 0
    for name, (dtype, shape) in described.items():
        end = offset + num_bytes({name: (dtype, shape)})
        entries[name] = {"dtype": SPELLED[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(path, described, pieces, metadata, progress=lambda count: None):
    """Write a safetensors file of {name: (dtype, shape)} from its (name, tensor) pieces, which come in the file's order.

    Returns what rewrites the metadata, for values of the same length that are known only now: a function of {key: text}.
    """
    header = _header(described, metadata)
    with open(path, "wb") as file:
        file.write(header)
        for name, tensor in pieces:
            data = raw(tensor.to(described[name][0]))
            file.write(data)
            progress(data.nbytes)
        if file.tell() != len(header) + num_bytes(described):
            raise RuntimeError(f"{path}: {file.tell() - len(header)} bytes were written, not {num_bytes(described)}")

    def rewrite(changes):
        with open(path, "r+b") as file:
            changed = _header(described, metadata | changes)
            assert len(changed) == len(header)
            file.write(changed)

    return rewrite


def write_index(path, shards, names):
    """The index of shards ({name: (dtype, shape)} each) in files `names`, as transformers and diffusers read it."""
    index = {
        "metadata": {"total_size": sum(map(num_bytes, shards))},
        "weight_map": {key: name for name, shard in zip(names, shards) for key in shard},
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def aside(final, *, overwrite=False, folder=False):
    """A path beside `final` to write to, renamed to it at the end and removed if that is not reached.

    Raises `ValueError` where `final` exists and `overwrite` is false, or where it cannot be written: full disk, no permission.
    """
    final = Path(final)
    occupied = any(final.iterdir()) if final.is_dir() else final.exists()
    if occupied and not overwrite:
        raise ValueError(f"{final} exists: pass --overwrite, or name another")
    path, old = (final.parent / f".{final.name}.{word}" for word in ("part", "old"))
    try:
        remove(path)  # of a writer that was killed
        (path if folder else final.parent).mkdir(parents=True, exist_ok=True)
        yield path
        for file in [p for p in path.rglob("*") if p.is_file()] if folder else [path]:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        if final.exists() and (final.is_dir() or folder):
            os.rename(final, old)
        os.replace(path, final)
    except OSError as error:
        reason = {errno.EFBIG: "File too large for this user's limit", errno.ENOSPC: "No space left on device"}.get(error.errno)
        raise ValueError(
            f"{final} cannot be written: {reason or error.strerror or error}; free some room or name another"
        ) from error
    finally:
        if old.exists() and not final.exists():
            os.rename(old, final)
        with contextlib.suppress(OSError):
            remove(path)
            remove(old)


def remove(path):
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_room(final, count):
    """Raise `ValueError` unless the disk of `final` has `count` bytes free."""
    folder = Path(final).resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < count:
        raise ValueError(f"{final} needs {count / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room, or name another disk")
