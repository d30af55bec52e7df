"""Safetensors files of rows, each with a checksum that is compared when the row is read.

The header's metadata hold `rows`, a JSON object of the writer's with the checksums of all rows, and
`checksum`, that of the header itself. Rows are read by position and never mapped: a file that is
cut while it is read is an error and no SIGBUS.
"""

import json
import os
import re
import zlib

import torch

from fluxlite.cli.atomic import atomic_file
from fluxlite.cli.descriptions import check_regular, json_values

ROW_TYPES = {  # as safetensors spells them
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
TYPE_NAMES = {dtype: name for name, dtype in ROW_TYPES.items()}
CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{8})"')
UNSET = b'"checksum":"00000000"'
MAX_HEADER = 100_000_000  # bytes, as safetensors itself has it: some 2 million rows


def write_rows(path, tensors, about):
    """Write tensors, whose first dimension counts rows, and the JSON object `about`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {}
    for name, tensor in tensors.items():
        checksums[name] = [zlib.crc32(_row_bytes(row)) for row in tensor]
    rows = json.dumps(about | {"checksums": checksums})
    header, end = {"__metadata__": {"rows": rows, "checksum": "00000000"}}, 0
    for name, tensor in tensors.items():
        span = [end, end := end + tensor.numel() * tensor.element_size()]
        about_tensor = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = about_tensor | {"data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path} would have too many rows for one file: use smaller tars")
    length = len(text).to_bytes(8, "little")
    checksum = f'"checksum":"{zlib.crc32(length + text):08x}"'.encode()
    with atomic_file(path) as file:
        file.write(length + text.replace(UNSET, checksum, 1))
        for tensor in tensors.values():
            file.write(_row_bytes(tensor))


def _row_bytes(tensor):
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class RowFile:
    """A file that `write_rows` wrote: `about`, and its rows one at a time.

    Raises `ValueError`, with the file and the remedy, where a byte differs from what was written.
    """

    def __init__(self, path):
        self.path = str(path)
        check_regular(path)
        self.file = open(path, "rb", buffering=0)  # closed with the last reference
        size = os.fstat(self.file.fileno()).st_size
        header, self.start = self._checked_header(size)
        try:
            self.about = json_values(header.pop("__metadata__")["rows"])
            self.tensors = {name: _row_layout(x) for name, x in header.items()}
            end = max(
                (first + rows * width for first, rows, width, _, _ in self.tensors.values()),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged("no header of ours") from None
        if self.start + end != size:
            raise self._damaged(f"{size} bytes instead of {self.start + end}")

    def _checked_header(self, size):
        """The header as JSON, and where data begin."""
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise self._damaged("no whole header")
        text = self._read(8, length)
        found = CHECKSUM.search(text)
        if found is None:
            raise self._damaged("no checksum, as in files of earlier versions")
        plain = text[: found.start()] + UNSET + text[found.end() :]
        if zlib.crc32(length.to_bytes(8, "little") + plain) != int(found[1], 16):
            raise self._damaged("its header differs from what was written")
        try:
            return dict(json_values(text)), 8 + length
        except (ValueError, TypeError):
            raise self._damaged("no header of ours") from None

    def _read(self, offset, size):
        data = bytearray(size)
        if os.preadv(self.file.fileno(), [data], offset) != size:
            raise self._damaged("it is cut short")
        return data

    def row(self, name, number):
        """Row `number` of a tensor, its checksum compared."""
        first, rows, width, dtype, shape = self.tensors[name]
        if not 0 <= number < rows:
            raise self._damaged(f"{name} has no row {number}")
        data = self._read(self.start + first + number * width, width)
        if zlib.crc32(data) != self.about["checksums"][name][number]:
            raise self._damaged(f"row {number} of {name} differs from what was written")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def _damaged(self, what):
        return ValueError(f"{self.path} is damaged ({what}): remove it, and it is made again")


def _row_layout(described):
    """Where a tensor begins, its rows, a row's bytes, its dtype, a row's shape."""
    (rows, *shape), dtype = described["shape"], ROW_TYPES[described["dtype"]]
    width = dtype.itemsize
    for side in shape:
        width *= side
    return described["data_offsets"][0], rows, width, dtype, tuple(shape)
