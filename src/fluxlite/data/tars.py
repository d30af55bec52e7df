"""Tars of samples, indexed: their headers are read once."""

import os
import tarfile
from functools import cache

from fluxlite.cli.descriptions import check_regular
from fluxlite.cli.file_kinds import ARCHIVE, KIND_BYTES, TAR, file_kind
from fluxlite.cli.messages import warn_for_all
from fluxlite.data.indexed import index_samples
from fluxlite.data.pairing import split_name
from fluxlite.data.parts import SampleParts, printable_name

MAX_TAR_HEADER = 1 << 20  # bytes of a long name or of attributes
TAR_DAMAGE = (  # what reading nonsense as a tar can raise
    *(tarfile.TarError, ValueError, IndexError, KeyError),
    *(EOFError, OverflowError, RecursionError),
)


def index_tar(path, parts=SampleParts()):  # noqa: B008 (frozen)
    """The `Shard` of a tar; raises `ValueError` for one that is damaged, cut short or
    compressed.
    """
    check_regular(path)
    about = os.stat(path)
    return _indexed(str(path), about.st_size, about.st_mtime_ns, parts)


@cache  # validation is often cut from the training set, and opened more than once
def _indexed(path, size, modified, parts):
    files = ((path, size, modified),)
    return index_samples(path, files, parts, index_tar, _files_by_key(path))


def _files_by_key(path):
    """{key: [(ending, (0, offset, size), run)]} of a tar; a run: a stretch of files of one key."""
    found, before, run = {}, None, 0
    for name, place in _members(path):
        split = split_name(name)
        if split is None:
            continue
        run += split[0] != before
        before = split[0]
        found.setdefault(before, []).append((split[1], (0, *place), run))
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
    places, unread, offset = {}, [], -1
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
                elif not member.isdir():
                    unread.append(member.name)
            _check_end(file, tar.offset)
    except TAR_DAMAGE as error:
        raise ValueError(f"{path} is {_fault_of(path, error)}") from None
    if unread:
        text = (
            "%s: %d members are links or sparse files and not read, %s first: write it with tar -h"
        )
        warn_for_all(text, path, len(unread), printable_name(unread[0]))


def _check_end(file, offset):
    """Raise `tarfile.ReadError` unless a tar ends at a byte, with nothing but zeros behind it."""
    file.seek(offset)
    if file.read(512) != bytes(512):
        raise tarfile.ReadError(f"no header and no end at byte {offset}")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"more behind its end at byte {offset}, as of tars joined")


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
