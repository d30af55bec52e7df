"""Samples of a tar or a folder, indexed: each part of one is then one read away.

n samples of a `Shard`.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL.ContainerIO import ContainerIO

from fluxlite.cli.descriptions import check_regular
from fluxlite.cli.messages import one_line, warn_for_all
from fluxlite.data.captions import read_caption
from fluxlite.data.config import PlaceOptions
from fluxlite.data.images import BadSample, check_proportions, open_picture, upright_size
from fluxlite.data.pairing import choose_parts
from fluxlite.data.parts import (
    CONTROL,
    IMAGE,
    JSON,
    MASK,
    MAX_KEY,
    TEXT,
    SampleParts,
    printable_name,
)

# of a file
MAX_PART_BYTES = {IMAGE: 1 << 30, CONTROL: 1 << 30, MASK: 1 << 30, TEXT: 1 << 20, JSON: 1 << 24}


@dataclass(frozen=True, eq=False)
class Shard:
    """The usable samples of one tar or folder, and where the parts of each lie, by column: its
    picture, txt, json, control and mask.

    A size of -1 is none.
    """

    path: str
    files: tuple  # (path, size, time of change in ns) of each file that was read: of a tar, one
    parts: SampleParts
    index: Callable  # (path, parts) → the `Shard` that it is now
    keys: np.ndarray  # (n,) bytes
    places: np.ndarray  # (n, 5) which of the files
    spans: np.ndarray  # (n, 5, 2) offset and size in it
    sizes: np.ndarray | None  # (n, 2) width and height of the pictures, where they are measured
    skipped: tuple  # "key: reason" of samples that cannot be used
    options: PlaceOptions = PlaceOptions()
    shapes: np.ndarray | None = None  # (n, 2) height and width to train in, where they differ

    @property
    def name(self):
        """Its name without an ending, as a log or a JSON file can show it."""
        return printable_name(Path(self.path).stem)

    @cached_property
    def size(self):
        """Bytes of its files."""
        return sum(size for _, size, _ in self.files)

    @cached_property
    def modified(self):
        """Its time of change; of a folder a number for the times of all its files."""
        if len(self.files) == 1:
            return self.files[0][2]
        digest = hashlib.blake2b(repr(self.files).encode(errors="replace"), digest_size=7)
        return int.from_bytes(digest.digest(), "little")

    def rows(self, chosen):
        """The shard of some of its samples: a slice, or a boolean array."""
        names = "keys", "places", "spans", "sizes", "shapes"
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, **{n: a[chosen] for n, a in arrays.items() if a is not None})

    def alike(self):
        """The rows of its samples, an array for each shape."""
        if self.shapes is None:
            return [np.arange(len(self.keys))]
        kinds = np.unique(self.shapes, axis=0)
        return [np.flatnonzero((self.shapes == kind).all(axis=1)) for kind in kinds]

    @staticmethod
    def identity_of(file):
        """Size and time of change of an open file."""
        about = os.fstat(file.fileno())
        return about.st_size, about.st_mtime_ns

    def open_unchanged(self, number):
        """One of its files, unbuffered, and its `identity_of`.

        Raises `ValueError` where it is not the one that was indexed. One that was touched or
        written anew will do where its parts lie where they lay.
        """
        path, *known = self.files[number]
        check_regular(path)
        file = open(path, "rb", buffering=0)
        identity = self.identity_of(file)
        if identity != tuple(known):
            now = self.index(self.path, self.parts)
            rows = {key: i for i, key in enumerate(now.keys.tolist())}
            same = [rows.get(key, -1) for key in self.keys.tolist()]
            if -1 in same or not np.array_equal(now.spans[same], self.spans):
                raise ValueError(f"{path} was changed while it is read: start again")
        return file, identity


def index_samples(path, files, parts, index, found):
    """The `Shard` of samples {key: [(ending, (file, offset, size), run)]}."""
    keys, rows, skipped = [], [], []
    for key, of_key in found.items():
        encoded = key.encode(errors="surrogateescape")
        if len(encoded) > MAX_KEY:
            skipped.append(f"{printable_name(key[:80])}…: a name of {len(encoded)} bytes")
            continue
        chosen, lost = choose_parts(of_key, parts)
        skipped += [f"{printable_name(encoded)}: {reason}" for reason in lost]
        if chosen:
            keys.append(encoded)
            rows.append([place or (0, 0, -1) for place in chosen])
    return _measured(_shard_of(path, files, parts, index, keys, rows, tuple(skipped)))


def _shard_of(path, files, parts, index, keys, rows, skipped):
    rows = np.array(rows, np.int64).reshape(-1, MASK + 1, 3)
    places, spans = rows[..., 0].astype(np.int32), np.ascontiguousarray(rows[..., 1:])
    if len(files) == 1:
        places = np.broadcast_to(np.int32(0), places.shape)  # which takes no memory
    keys = np.array(keys, f"S{max(map(len, keys), default=1)}")
    return Shard(path, files, parts, index, keys, places, spans, None, skipped)


def _measured(shard):
    """A shard with its pictures' sizes, where its parts ask for them, and without what cannot be
    used, as far as headers and captions tell.
    """
    if not shard.parts.measured:
        return shard
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(partial(_look_at, shard), range(len(shard.keys))))
    good = np.array([isinstance(size, tuple) for size in found], bool)
    sizes = np.array([size for size in found if isinstance(size, tuple)], np.int32)
    bad = [(key, why) for key, why in zip(shard.keys.tolist(), found) if isinstance(why, str)]
    skipped = (*shard.skipped, *(f"{printable_name(key)}: {why}" for key, why in bad))
    shard = replace(shard.rows(good), sizes=sizes.reshape(-1, 2), skipped=skipped)
    return _own_masks(shard) if shard.parts.alpha else shard


def _look_at(shard, row):
    """Width and height of a sample's picture, or why it, its control, mask or caption is none."""
    sizes, what = [], ""
    try:
        for column, name in ((IMAGE, ""), (CONTROL, "its control: "), (MASK, "its mask: ")):
            what = name
            if size := _part_as(_upright_size, shard, row, column):
                check_proportions(size, sizes[0] if sizes else size)
                sizes.append(size)
        what = ""
        if shard.parts.captions:
            read_caption(shard.parts, lambda column: _part_as(read_part, shard, row, column))
    except (ValueError, OSError) as error:
        return f"{what}{one_line(error)}"
    return sizes[0]


def _part_as(read, shard, row, column):
    """`read(file, column, offset, size)` of a sample's part in its file; None where it has none."""
    (offset, size), number = shard.spans[row, column].tolist(), shard.places[row, column]
    if size < 0:
        return None
    check_regular(path := shard.files[number][0])
    with open(path, "rb") as file:
        return read(file, column, offset, size)


def read_part(file, column, offset, size):
    """The bytes of a sample's part; raises `BadSample` where they are too many, or gone."""
    if size > MAX_PART_BYTES[column]:
        raise BadSample(f"a file of {size} bytes")
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise BadSample("its file has become shorter")
    return data


def _upright_size(file, _, *span):
    return upright_size(ContainerIO(file, *span))


def _may_be_transparent(file, _, *span):
    return open_picture(ContainerIO(file, *span)).has_transparency_data


def _own_masks(shard):
    """A shard whose pictures are their own masks, where they can be transparent."""
    look = partial(_part_as, _may_be_transparent, shard, column=IMAGE)
    with ThreadPoolExecutor(16) as pool:
        own = np.array([*pool.map(look, range(len(shard.keys)))], bool)
    spans, places = shard.spans.copy(), shard.places.copy()
    spans[own, MASK], places[own, MASK] = spans[own, IMAGE], places[own, IMAGE]
    return replace(shard, spans=spans, places=places)


def open_shards(found, index, *, setting, max_bad_fraction):
    """Tars or folders, [(path, its `SampleParts`, its `PlaceOptions`)], indexed in parallel.

    Raises `ValueError`, naming `setting`, where nothing or too little in them is usable.
    """
    try:
        with ThreadPoolExecutor(16) as pool:
            indexed = list(pool.map(lambda place: index(*place[:2]), found))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
    shards = [replace(shard, options=options) for shard, (_, _, options) in zip(indexed, found)]
    check_usable(shards, setting, max_bad_fraction)
    return shards


def check_usable(shards, setting, max_bad_fraction):
    """Log what of shards cannot be used; raises `ValueError` where that is too much of them."""
    skipped = []
    for shard in shards:
        skipped += [f"{shard.name}/{entry}" for entry in shard.skipped]
    usable = sum(len(shard.keys) for shard in shards)
    if not usable or len(skipped) > max_bad_fraction * (usable + len(skipped)):
        shown = "; ".join(skipped[:3]) or "they are empty"
        limit = f"data.max_bad_fraction={max_bad_fraction}"
        what = "folders" if os.path.isdir(shards[0].path) else "tars"
        counts = f"{len(skipped)} of {usable + len(skipped)} samples in {len(shards)} {what}"
        raise ValueError(f"{setting}: {counts} cannot be used, more than {limit}: {shown}")
    for entry in skipped:
        warn_for_all("skipped %s", entry)


def cut_shards(shards, start, stop):
    """Samples `start` to `stop` of shards, numbered through, as shards."""
    kept, first = [], 0
    for shard in shards:
        kept.append(shard.rows(slice(max(0, start - first), max(0, stop - first))))
        first += len(shard.keys)
    return [shard for shard in kept if len(shard.keys)]
