"""Tars of samples, indexed: their headers are read once, then each file is one read away.

n samples of a tar.
"""

import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from fluxlite.cli.descriptions import check_regular
from fluxlite.cli.file_kinds import ARCHIVE, KIND_BYTES, TAR, file_kind
from fluxlite.cli.messages import warn_for_all
from fluxlite.data.pairing import choose_parts, split_name
from fluxlite.data.parts import MAX_KEY, SampleParts, printable_name

MAX_TAR_HEADER = 1 << 20  # bytes of a long name or of attributes
TAR_DAMAGE = (  # what reading nonsense as a tar can raise
    *(tarfile.TarError, ValueError, IndexError, KeyError),
    *(EOFError, OverflowError, RecursionError),
)


@dataclass(frozen=True, eq=False)
class Shard:
    """The usable samples of one tar, and where each one's picture, txt, json and control lie.

    A size of -1 is none.
    """

    path: str
    size: int
    modified: int  # mtime in nanoseconds
    parts: SampleParts
    keys: np.ndarray  # (n,) bytes
    spans: np.ndarray  # (n, 4, 2) offset and size, by column
    skipped: tuple  # "key: reason" of samples without a picture, a caption or a control

    @property
    def name(self):
        """The tar's name without its ending, as a log or a JSON file can show it."""
        return printable_name(Path(self.path).stem)

    @staticmethod
    def identity_of(file):
        """Size and time of change of an open file."""
        about = os.fstat(file.fileno())
        return about.st_size, about.st_mtime_ns

    def open_unchanged(self):
        """The tar, unbuffered, and its `identity_of`.

        Raises `ValueError` where it is not the one that was indexed. One that was touched or
        written anew will do where its files lie where they lay.
        """
        check_regular(self.path)
        file = open(self.path, "rb", buffering=0)
        identity = self.identity_of(file)
        if identity != (self.size, self.modified):
            now = index_tar(self.path, self.parts)
            rows = {key: i for i, key in enumerate(now.keys.tolist())}
            same = [rows.get(key, -1) for key in self.keys.tolist()]
            if -1 in same or not np.array_equal(now.spans[same], self.spans):
                raise ValueError(f"{self.path} was changed while it is read: start again")
        return file, identity


def index_tar(path, parts=SampleParts()):  # noqa: B008 (frozen)
    """The `Shard` of a tar; raises `ValueError` for one that is damaged, cut short or
    compressed.
    """
    check_regular(path)
    about = os.stat(path)
    return _indexed(str(path), about.st_size, about.st_mtime_ns, parts)


@cache  # validation is often cut from the training set, and opened more than once
def _indexed(path, size, modified, parts):
    keys, spans, skipped = [], [], []
    for key, files in _files_by_key(path).items():
        encoded = key.encode(errors="surrogateescape")
        if len(encoded) > MAX_KEY:
            skipped.append(f"{printable_name(key[:80])}…: a name of {len(encoded)} bytes")
            continue
        places, lost = choose_parts(files, parts)
        skipped += [f"{printable_name(encoded)}: {reason}" for reason in lost]
        if places:
            keys.append(encoded)
            spans.append([place or (0, -1) for place in places])
    keys = np.array(keys, f"S{max(map(len, keys), default=1)}")
    spans = np.array(spans, np.int64).reshape(-1, 4, 2)
    return Shard(path, size, modified, parts, keys, spans, tuple(skipped))


def _files_by_key(path):
    """{key: [(ending, (offset, size), run)]} of a tar; a run is a stretch of files of one key."""
    found, before, run = {}, None, 0
    for name, place in _members(path):
        split = split_name(name)
        if split is None:
            continue
        run += split[0] != before
        before = split[0]
        found.setdefault(before, []).append((split[1], place, run))
    return found


class _CheckedInfo(tarfile.TarInfo):
    """A tar's header whose numbers are possible: tarfile would go back in the file for ever."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        found = super().frombuf(buf, encoding, errors)
        long = found.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, *tarfile.GNU_TYPES[:2])
        if found.size < 0 or long and found.size > MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {found.size} bytes")
        return found


def _members(path):
    """Name, and offset and size, of each file in a tar, hard links too.

    tarfile takes a damaged header for the end, so the end's mark is looked at.
    """
    places, offset = {}, -1
    try:
        with (
            tarfile.open(path, "r:", tarinfo=_CheckedInfo, encoding="utf-8") as tar,
            open(path, "rb") as file,
        ):
            while (member := tar.next()) is not None:
                tar.members.clear()
                if tar.offset <= offset or member.size < 0:
                    raise tarfile.ReadError(
                        f"a member of {member.size} bytes at byte {member.offset}"
                    )
                offset = tar.offset
                place = _place_of(member, places)
                if place is not None:
                    places[_plain_name(member.name)] = place
                    yield member.name, place
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
    except TAR_DAMAGE as error:
        raise ValueError(f"{path} is {_fault_of(path, error)}") from None


def _fault_of(path, error):
    """What a file is that could not be read as a tar, and what to do."""
    with open(path, "rb") as file:
        kind = file_kind(file.read(KIND_BYTES))
    if kind == ARCHIVE:
        return f"{kind}, and only plain tars are read: unpack it to a .tar"
    if kind not in (None, TAR):
        return f"{kind}, not a tar: name tars of pictures and captions"
    reason = str(error) or type(error).__name__
    return f"no whole, uncompressed tar ({reason}): fetch or write it again"


def _place_of(member, places):
    """Offset and size of a member's data, a hard link's being those of what it is linked to."""
    if member.islnk():
        return places.get(_plain_name(member.linkname))
    return (member.offset_data, member.size) if member.isreg() and not member.issparse() else None


def _plain_name(name):
    return name.removeprefix("./")


def open_shards(places, *, setting, max_bad_fraction):
    """Index tars, [(path, its `SampleParts`)], in parallel, as `index_tar` does.

    Raises `ValueError`, naming `setting`, where nothing or too little in them is usable.
    """
    if not places:
        raise ValueError(
            f"{setting} names no .tar: give a folder of tars, a glob, a brace pattern or a URL"
        )
    try:
        with ThreadPoolExecutor(16) as pool:
            shards = list(pool.map(lambda place: index_tar(*place), places))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
    skipped = []
    for shard in shards:
        skipped += [f"{shard.name}/{entry}" for entry in shard.skipped]
    usable = sum(len(shard.keys) for shard in shards)
    if not usable or len(skipped) > max_bad_fraction * (usable + len(skipped)):
        shown = "; ".join(skipped[:3]) or "they are empty"
        limit = f"data.max_bad_fraction={max_bad_fraction}"
        counts = f"{len(skipped)} of {usable + len(skipped)} samples in {len(places)} tars"
        raise ValueError(f"{setting}: {counts} cannot be used, more than {limit}: {shown}")
    for entry in skipped:
        warn_for_all("skipped %s", entry)
    return shards


def cut_shards(shards, start, stop):
    """Samples `start` to `stop` of shards, numbered through, as shards."""
    kept, first = [], 0
    for shard in shards:
        rows = slice(max(0, start - first), max(0, stop - first))
        first += len(shard.keys)
        kept.append(replace(shard, keys=shard.keys[rows], spans=shard.spans[rows]))
    return [shard for shard in kept if len(shard.keys)]
