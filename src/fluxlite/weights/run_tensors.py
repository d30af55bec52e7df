"""A checkpoint's tensors: torch.distributed.checkpoint's files, whose pickles are never run.

DCP describes its files in `.metadata`, which is a pickle, and may pickle single values too: whoever
loads them runs what they name. Here the description is read as plain records, and of the files
nothing but tensors, which lie there as `torch.save` writes them: a zip of stored bytes, with the
CRC-32 of each. So a tensor is checked whenever it is first read.

tensors = RunTensors("runs/a/checkpoints/step-000100")      # sizes and places are checked, no more
tensors.read("ema.img_in.weight", 0, 64)                    # rows, mapped
"""

import io
import itertools
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from fluxlite.cli.descriptions import check_regular
from fluxlite.weights.dtypes import DTYPES

SavedTensor = namedtuple("SavedTensor", "dtype shape chunks")
# Where a part of a tensor lies: `length` bytes of a file from `begin` on, a zip of its own.
SavedChunk = namedtuple("SavedChunk", "offsets sizes file begin length")

DESCRIPTION = ".metadata"
MAX_DESCRIPTION = 1 << 30  # bytes; a thousand ranks' of FLUX have a quarter of it
READ_BYTES = 1 << 24  # at a time, for checksums


# --- the description ------------------------------------------------------------------------------


class PickledRecord:
    """What a pickle would have made by calling `name` with `args` and giving it `state`."""

    def __init__(self, name, args):
        self.name, self.args, self.state = name, args, None


IN_DCP = "torch.distributed.checkpoint"
IN_METADATA = """Metadata StorageMeta MetadataIndex TensorStorageMetadata BytesStorageMetadata
    ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING"""
# of what a checkpoint holds: weights, and an optimizer's codes
SAVED_DTYPES = {str(dtype): dtype for dtype in (*DTYPES.values(), torch.uint8)}
KNOWN_NAMES = {  # all that DCP's description names
    *(f"{IN_DCP}.metadata.{name}" for name in IN_METADATA.split()),
    f"{IN_DCP}.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    *("pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath"),
    *SAVED_DTYPES,
}
KNOWN_OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS MEMOIZE BINGET LONG_BINGET BINPUT LONG_BINPUT GLOBAL STACK_GLOBAL"""
DAMAGE = (  # what reading nonsense as a pickle or a zip can raise
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, NotImplementedError, RuntimeError),
)


class RecordUnpickler(pickle._Unpickler):
    """Reads a pickle as `PickledRecord`s: what it names is neither imported nor called.

    It is the one written in Python: an opcode that is not in its table is refused.
    """

    dispatch = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in KNOWN_OPCODES.split()
    }

    def find_class(self, module, name):
        if f"{module}.{name}" not in KNOWN_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return f"{module}.{name}"

    def load_call(self):
        args = self.stack.pop()
        self.stack[-1] = PickledRecord(self.stack[-1], args)

    def load_build(self):
        state = self.stack.pop()
        self.stack[-1].state = state

    dispatch |= {pickle.REDUCE[0]: load_call, pickle.NEWOBJ[0]: load_call}
    dispatch |= {pickle.BUILD[0]: load_build}


def read_saved_tensors(folder):
    """{key: SavedTensor} of a checkpoint's folder, whose chunks are within their tensor and file.

    Raises `ValueError` that names the file.
    """
    file = Path(folder) / DESCRIPTION
    check_regular(file)
    if file.stat().st_size > MAX_DESCRIPTION:
        raise ValueError(f"{file} has more than {MAX_DESCRIPTION} bytes: it is damaged")
    try:
        found = _described(RecordUnpickler(io.BytesIO(file.read_bytes())).load().state)
    except DAMAGE as error:
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise ValueError(f"{file} is damaged ({reason[:160]})") from None
    sizes = {}
    for key, tensor in found.items():
        _check_chunks(file.parent, key, tensor, sizes)
    return found


def _described(about):
    """{key: SavedTensor} from the state of DCP's `Metadata`, without pickled values."""
    places = {}
    for index, place in about["storage_data"].items():
        if index.state.get("offset") is not None:  # else a pickled value
            places[index.state["fqn"], _whole_numbers(index.state["offset"])] = place.state
    found = {}
    for key, entry in about["state_dict_metadata"].items():
        if entry.name.endswith(".TensorStorageMetadata"):
            chunks = [_described_chunk(key, chunk.state, places) for chunk in entry.state["chunks"]]
            dtype = SAVED_DTYPES[entry.state["properties"].state[0]]
            found[key] = SavedTensor(dtype, _whole_numbers(entry.state["size"]), chunks)
    return found


def _described_chunk(key, chunk, places):
    offsets, place = _whole_numbers(chunk["offsets"]), places[key, _whole_numbers(chunk["offsets"])]
    numbers = place["offset"], place["length"]
    file = place["relative_path"]
    if not isinstance(file, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{key} lies at {numbers} of {file!r:.80}")
    return SavedChunk(offsets, _whole_numbers(chunk["sizes"]), file, *numbers)


def _whole_numbers(record):
    """The numbers of a pickled torch.Size."""
    numbers = tuple(record.args[0]) if record.args else ()
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError(f"{numbers} is no shape")
    return numbers


def _check_chunks(folder, key, tensor, sizes):
    """Raise `ValueError` unless chunks fill their tensor and lie in files of the folder.

    `sizes` is {name: bytes} of the files seen so far.
    """
    where = f"{folder / DESCRIPTION}: {key}"
    for chunk in tensor.chunks:
        edges = zip(chunk.offsets, chunk.sizes, tensor.shape)
        if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
            raise ValueError(f"{where} has a part of another rank: it is damaged")
        if any(offset + size > whole for offset, size, whole in edges):
            raise ValueError(f"{where} has a part beyond its end: it is damaged")
        if chunk.file not in sizes:
            sizes[chunk.file] = _size_of(folder, chunk.file)
        num_bytes = math.prod(chunk.sizes) * tensor.dtype.itemsize
        if chunk.begin + chunk.length > sizes[chunk.file] or num_bytes > chunk.length:
            raise ValueError(f"{folder / chunk.file} is cut short: {key} does not lie in it whole")
    filled = sorted(chunk for chunk in tensor.chunks if math.prod(chunk.sizes))
    count = sum(math.prod(chunk.sizes) for chunk in filled)
    if count != math.prod(tensor.shape) or tensor.shape and _overlap(filled):
        raise ValueError(f"{where} is not whole in its parts: it is damaged")


def _overlap(chunks):
    """Whether two chunks, sorted and none of them empty, lie on each other."""
    for i, one in enumerate(chunks):
        for j in range(i + 1, len(chunks)):
            edges = zip(one.offsets, one.sizes, chunks[j].offsets, chunks[j].sizes)
            apart = [a + n <= b or b + m <= a for a, n, b, m in edges]
            if apart[0]:  # so are all that follow
                break
            if not any(apart):
                return True
    return False


def _size_of(folder, name):
    """The bytes of a file that lies in the folder itself."""
    if Path(name).name != name:
        raise ValueError(f"{folder / DESCRIPTION} names the file {name!r}: it must lie beside it")
    if not (folder / name).exists():
        raise ValueError(f"{folder / name} is missing")
    check_regular(folder / name)
    return (folder / name).stat().st_size


# --- reading --------------------------------------------------------------------------------------


class RunTensors:
    """The tensors of a checkpoint's folder, mapped and checked when they are first read."""

    def __init__(self, folder):
        self.folder, self.tensors, self.checked = Path(folder), read_saved_tensors(folder), set()

    def file_names(self):
        """The files that hold them."""
        chunks = itertools.chain.from_iterable(t.chunks for t in self.tensors.values())
        return {chunk.file for chunk in chunks}

    def described(self, key):
        """(dtype, shape); raises `ValueError` where there is no such tensor."""
        if key not in self.tensors:
            raise ValueError(
                f"{self.folder} has no {key}: it was written by another version, or is damaged"
            )
        return self.tensors[key].dtype, self.tensors[key].shape

    def read(self, key, start=0, stop=None):
        """Rows of a tensor: a view of the file where one chunk holds them, else a copy."""
        (dtype, shape), chunks = self.described(key), self.tensors[key].chunks
        if len(chunks) == 1:
            return self.read_chunk(key, chunks[0])[start:stop]
        rows = range(*slice(start, stop).indices(shape[0]))
        out = torch.empty(len(rows), *shape[1:], dtype=dtype)
        for chunk in chunks:
            edges = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            first, end = (min(max(edge, rows.start), rows.stop) for edge in edges)
            if first < end:
                columns = [slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:])]
                part = self.read_chunk(key, chunk)[first - edges[0] : end - edges[0]]
                out[(slice(first - rows.start, end - rows.start), *columns)] = part
        return out

    def read_chunk(self, key, chunk):
        """One chunk of a tensor as a view of its file; raises `ValueError` where it is damaged."""
        dtype, count = self.tensors[key].dtype, math.prod(chunk.sizes)
        if not count:
            return torch.empty(chunk.sizes, dtype=dtype)
        file = self.folder / chunk.file
        try:
            begin, checksum = _find_bytes(file, chunk, count * dtype.itemsize)
        except DAMAGE as error:
            raise ValueError(f"{file}: {key} is damaged ({error})") from None
        # "c": writable for torch, never written back
        data = np.memmap(file, np.uint8, "c", begin, (count * dtype.itemsize,))
        if (file, begin) not in self.checked and zlib.crc32(data) != checksum:
            raise ValueError(f"{file}: {key} is damaged: its checksum is another")
        self.checked.add((file, begin))
        return torch.from_numpy(data).view(dtype).view(chunk.sizes)


def _find_bytes(file, chunk, num_bytes):
    """Where in the file a chunk's bytes begin, and their CRC-32, from its zip's directory."""
    with open(file, "rb") as opened:
        with zipfile.ZipFile(FilePart(opened, chunk.begin, chunk.length)) as archive:
            entries = [i for i in archive.infolist() if i.filename.endswith("/data/0")]
        if len(entries) != 1 or entries[0].compress_type or entries[0].file_size != num_bytes:
            raise ValueError("it does not lie there as plain bytes")
        entry = entries[0]
        opened.seek(chunk.begin + entry.header_offset + 26)
        lengths = struct.unpack("<HH", opened.read(4))  # of its name, of an extra field
    begin = entry.header_offset + 30 + sum(lengths)
    if begin + num_bytes > chunk.length:
        raise ValueError("it ends beyond its place")
    return chunk.begin + begin, entry.CRC


class FilePart(io.RawIOBase):
    """Some bytes of an open file as a file of their own, for `zipfile`."""

    def __init__(self, file, begin, length):
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def seekable(self):
        return True

    def readable(self):
        return True

    def seek(self, position, whence=io.SEEK_SET):
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        if start + position < 0:
            raise ValueError("it points before its own beginning")
        self.at = start + position
        return self.at

    def tell(self):
        return self.at

    def read(self, count=-1):
        left = max(0, self.length - self.at)
        count = left if count < 0 else min(count, left)
        data = os.pread(self.file.fileno(), count, self.begin + self.at)
        self.at += len(data)
        return data


class RunReader(FileSystemReader):
    """Reads a checkpoint for `dcp.load` through `RunTensors`, on any mesh."""

    def __init__(self, tensors):
        super().__init__(tensors.folder)
        self.run_tensors = tensors

    def read_metadata(self, *args, **options):
        entries = {}
        for key, (dtype, shape, chunks) in self.run_tensors.tensors.items():
            entries[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype),
                torch.Size(shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks],
            )
        return Metadata(entries, storage_data={})

    def read_data(self, plan, planner):
        for item in plan.items:
            key, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            if item.type is not LoadItemType.TENSOR:
                raise ValueError(f"{self.path}: {key} is no tensor")
            chunks = self.run_tensors.tensors[key].chunks
            chunk = next(chunk for chunk in chunks if chunk.offsets == offsets)
            values = self.run_tensors.read_chunk(key, chunk)
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                values = values.narrow(axis, start, length)
            planner.resolve_tensor(item).detach().copy_(values)
        return _finished(None)


def _finished(value):
    future = Future()
    future.set_result(value)
    return future


# --- writing --------------------------------------------------------------------------------------


class ChecksummedFile(io.FileIO):
    """A file to write, which counts its bytes and takes their CRC-32 as they are written."""

    def __init__(self, path):
        super().__init__(path, "w")
        self.crc32, self.num_bytes, self.fault = 0, 0, None

    def write(self, data):
        view = memoryview(data).cast("B")
        total = len(view)
        while len(view):
            try:
                count = super().write(view)
            except OSError as error:  # torch.save would hide it behind an error of its own
                self.fault = OSError(error.errno, error.strerror, self.name)
                raise
            self.crc32 = zlib.crc32(view[:count], self.crc32)
            self.num_bytes, view = self.num_bytes + count, view[count:]
        return total


class ChecksummedFiles(FileSystem):
    """DCP's file system; `records` has {name: {"bytes": …, "crc32": …}} of what was written."""

    def __init__(self):
        self.records = {}

    @contextmanager
    def create_stream(self, path, mode):
        if mode != "wb":
            raise ValueError(f"{path} is written, not opened as {mode}")
        with ChecksummedFile(str(path)) as file:
            try:
                yield file
            except RuntimeError as error:
                raise file.fault or error from None
        name = Path(path).name.removesuffix(".tmp")  # `.metadata` is renamed when it is whole
        self.records[name] = {"bytes": file.num_bytes, "crc32": f"{file.crc32:08x}"}


class RunWriter(FileSystemWriter):
    """Writes a checkpoint for `dcp.save`; `fs.records` has the checksums of this rank's files."""

    def __init__(self, folder):
        super().__init__(folder)
        self.fs = ChecksummedFiles()


class TensorPlanner(DefaultSavePlanner):
    """Plans a checkpoint of tensors alone, each written as its bytes in order."""

    def transform_object(self, write_item, object):
        if not isinstance(object, torch.Tensor):
            raise TypeError(f"{write_item.index.fqn} is no tensor, and would be pickled")
        return object.detach().contiguous()


@contextmanager
def plain_errors():
    """Raise what failed on some rank itself, not the `CheckpointException` that DCP makes of it."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from None


# --- checksums ------------------------------------------------------------------------------------


def check_file_size(path, num_bytes):
    """Raise `ValueError` unless a file has so many bytes."""
    if not path.exists():
        raise ValueError(f"{path} is missing")
    check_regular(path)
    if path.stat().st_size != num_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {num_bytes}: it is damaged")


def file_checksum(path):
    """The CRC-32 of a file's bytes, eight hexadecimal digits."""
    crc32 = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            crc32 = zlib.crc32(data, crc32)
    return f"{crc32:08x}"


def check_file_bytes(path, checksum):
    """Raise `ValueError` unless a file's bytes have this CRC-32."""
    if file_checksum(path) != checksum:
        raise ValueError(f"{path} is damaged: its checksum is another")
