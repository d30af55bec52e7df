"""GGUF files, as llama.cpp and city96's ComfyUI nodes write them: read as they are, by the package
gguf.

    b"GGUF", version, number of tensors, of values      the header
    key, kind, value                                    of each value
    name, dimensions (innermost first), type, place     of each tensor
    the tensors' bytes, aligned                         a quantised row is whole blocks of values

Tensors in F32, F16, BF16 and F64 are views of the mapped file. Others are dequantised when they are
read: in float32 by gguf's own functions, rounded once to bfloat16.
"""

import contextlib
import logging
import math
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch

from fluxlite.weights.dtypes import DTYPES

log = logging.getLogger("fluxlite")

MAGIC = b"GGUF"
VERSIONS = 2, 3
TEXT, LIST = 8, 9  # kinds of values, as the numbers in SCALARS
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd"))
MOST = {"values": 1 << 16, "tensors": 1 << 16, "dimensions": 4, "bytes": 1 << 22, "items": 1 << 22}
ALIGNMENT = "general.alignment"
PART_BYTES = 1 << 21  # dequantised at a time: gguf makes some 30 times as many on the way
TYPES = "gguf types"  # in the metadata: what is quantised


# --- the header -----------------------------------------------------------------------------------


def take_number(file, code):
    """The next number of a file, of the kind that struct calls `code`."""
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def take_count(file, code, what):
    """The next number of a file, of things that follow; raises `ValueError` for absurd ones."""
    count = take_number(file, code)
    if count > MOST[what]:
        raise ValueError(f"{count} {what}")
    return count


def take_text(file):
    """The next text of a file; raises `ValueError` for one that is no UTF-8."""
    return file.read(take_count(file, "Q", "bytes")).decode()


def take_value(file, kind):
    """The next value of a file, which is of such a kind."""
    if kind == TEXT:
        return take_text(file)
    if kind == LIST:
        kind = take_number(file, "I")
        return [take_value(file, kind) for _ in range(take_count(file, "Q", "items"))]
    return take_number(file, SCALARS[kind])


def take_tensor(file):
    """(name, shape, number of its type, place) of the next tensor of a file."""
    name, rank = take_text(file), take_count(file, "I", "dimensions")
    shape = tuple(take_number(file, "Q") for _ in range(rank))[::-1]
    return name, shape, take_number(file, "I"), take_number(file, "Q")


def read_header(file):
    """({key: value}, [what `take_tensor` gives], where places count from) of an opened file.

    Raises `ValueError`, `KeyError`, `RecursionError` or `struct.error` for what is none.
    """
    file.seek(len(MAGIC))
    version = take_number(file, "I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}, not 2 or 3")
    counts = [take_count(file, "Q", what) for what in ("tensors", "values")]
    pairs = [(take_text(file), take_value(file, take_number(file, "I"))) for _ in range(counts[1])]
    tensors = [take_tensor(file) for _ in range(counts[0])]
    twice = [name for name, count in Counter(name for name, *_ in tensors).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0][:80]} is there twice")
    values = dict(pairs)
    step = values.get(ALIGNMENT, 32)
    if type(step) is not int or step < 8 or step % 8:
        raise ValueError(f"{ALIGNMENT}={step}")
    return values, tensors, -(-file.tell() // step) * step


# --- tensors --------------------------------------------------------------------------------------


def open_gguf(file):
    """({name: (type, shape, read)} of a file, its metadata), as `tensor_files.open_tensors` gives
    them; raises `ValueError`.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{file} is a GGUF file, and gguf is missing: pip install gguf") from None
    try:
        with open(file, "rb") as opened:
            values, tensors, first = read_header(opened)
        kinds = [gguf.GGMLQuantizationType(number) for _, _, number, _ in tensors]
    except (ValueError, KeyError, RecursionError, struct.error) as error:
        raise ValueError(f"{file} is no whole GGUF file ({error}): fetch it again") from None
    data, found = np.memmap(file, np.uint8, mode="c"), {}  # copied on writing: torch warns else
    for (name, shape, _, place), kind in zip(tensors, kinds):
        try:
            found[name] = open_blocks(data[first + place :], shape, kind)
        except ValueError as error:
            raise ValueError(f"{file}: {name} {error}: fetch it again") from None
    counts = Counter(kind.name for kind in kinds).most_common()
    told = ", ".join(f"{count} {name}" for name, count in counts if name not in DTYPES)
    texts = {key: value for key, value in values.items() if isinstance(value, str)}
    return found, texts | {TYPES: told}


def open_blocks(data, shape, kind):
    """(type, shape, read) of a tensor whose bytes begin `data`; raises `ValueError`."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    if not shape or not math.prod(shape) or shape[-1] % block:
        raise ValueError(f"has the shape {list(shape)}, no whole blocks of {block} values")
    of_row = shape[-1] // block * size
    count = math.prod(shape[:-1]) * of_row
    if count > len(data):
        raise ValueError(f"has {count} bytes of which {len(data)} are there")
    rows = data[:count].reshape(*shape[:-1], of_row)
    spelled = "BF16" if can_dequantize(kind) and kind.name not in DTYPES else kind.name
    return spelled, shape, partial(read_blocks, rows, kind)


@lru_cache
def can_dequantize(kind):
    """Whether the package has a function for blocks of this kind."""
    from gguf import GGML_QUANT_SIZES, quants

    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read_blocks(data, kind, start=0, stop=None, exact=False):
    """Rows from start to stop of a tensor of bytes (..., bytes of a row); what is quantised is
    rounded to bfloat16, with `exact` not at all.
    """
    flat = data.ndim == 1  # a row in itself
    data = data if flat else data[start:stop]
    if kind.name in DTYPES:
        values = torch.from_numpy(data).view(DTYPES[kind.name])
    else:
        values = dequantize_blocks(data, kind, torch.float32 if exact else torch.bfloat16)
    return values[start:stop] if flat else values


@contextlib.contextmanager
def timed_reading(where, quantised, size):
    """Log what is `quantised` of a file (its `TYPES`) and read in the block, and how long it took;
    nothing where it is empty. `size` is in bytes, as it is read.
    """
    began = time.monotonic()
    if quantised:
        log.info("%s: dequantising %s, %.1f GB", where, quantised, size / 1e9)
    yield
    if quantised:
        log.info("%s: dequantised in %.1f s", where, time.monotonic() - began)


def dequantize_blocks(data, kind, dtype):
    """Values of quantised rows of bytes, computed in float32, some rows at a time in threads."""
    from gguf import quants

    def convert(rows):
        return torch.from_numpy(quants.dequantize(rows, kind)).to(dtype)

    if data.ndim == 1:
        return convert(data)
    parts = np.array_split(data, 1 + min(len(data) - 1, data.size // PART_BYTES))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.cat([*pool.map(convert, parts)])
