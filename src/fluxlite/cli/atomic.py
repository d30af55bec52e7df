"""Files and folders that appear whole under their name or not at all, written by one process at a
time.

What is being written lies aside as `.NAME.part`. A killed process leaves that; the next one to
write NAME takes it over. Locks are `flock`'s: they end with the process that holds them.
"""

import fcntl
import logging
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 1  # seconds of waiting that are not worth a line
_unlockable = set()  # what file systems without locks said: each is told once

log = logging.getLogger("fluxlite")


@contextmanager
def locked(path):
    """Let one process at a time in; gives the lock's file, which is removed at the end.

    A wait is logged. Processes share the lock where they share the file system. Where it has no
    locks they work side by side.
    """
    path = Path(path)
    with naming_errors(path):
        file = _locked_file(path)
    try:
        yield file
    finally:
        if _is_at(file, path):
            path.unlink()
        _unlock(file)


def _locked_file(path):
    """The file at `path`, open and locked. Another's file may be renamed or removed meanwhile."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags, 0o666), "r+b")
        _wait_for_lock(file, path)
        if _is_at(file, path):
            return file
        _unlock(file)


def _wait_for_lock(file, path):
    deadline = time.monotonic() + PATIENCE
    try:
        while not _has_locked(file):
            if time.monotonic() >= deadline:
                log.warning("waiting for another process, which holds %s", path)
                return fcntl.flock(file, fcntl.LOCK_EX)
            time.sleep(0.05)
    except OSError as error:  # a file system without locks: the renames decide
        if error.strerror not in _unlockable:
            _unlockable.add(error.strerror)
            log.warning("%s and files beside it cannot be locked: %s", path, error.strerror)


def _has_locked(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: forked workers hold the file too
    except OSError:
        pass  # there was no lock
    file.close()


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def aside_of(path):
    """Where what will be at `path` is written."""
    return Path(path).with_name(f".{Path(path).name}.part")


@contextmanager
def atomic_file(path):
    """A binary file to write; it is at `path` once the block ends, and gone if it raises."""
    path = Path(path)
    aside = aside_of(path)
    with naming_errors(path), locked(aside) as file:
        file.truncate(0)
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(aside, path)


@contextmanager
def atomic_path(path):
    """The same for writers that open a file by its path themselves."""
    with atomic_file(path):
        yield aside_of(path)


@contextmanager
def atomic_folder(path, *, replace=False):
    """A folder to write into; it is at `path` once the block ends, and gone if it raises.

    With `replace` it takes the place of a folder that is there. Else it is None where another
    process has written `path` meanwhile. Raises `ValueError` where `path` is a file.
    """
    path = Path(path)
    aside, old = aside_of(path), path.with_name(f".{path.name}.old")
    with naming_errors(path), locked(path.with_name(f".{path.name}.lock")):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: remove it or name a folder")
        _clear_leftovers(path, aside, old)
        if path.is_dir() and any(path.iterdir()) and not replace:
            yield None
            return
        try:
            aside.mkdir()
            yield aside
            sync_folder(aside)
            if path.exists():
                os.rename(path, old)
            os.rename(aside, path)
        finally:
            _clear_leftovers(path, aside, old)


def _clear_leftovers(path, aside, old):
    """Remove what a writer left, perhaps one that was killed; what it had moved away is back
    first.
    """
    if old.exists() and not path.exists():
        os.rename(old, path)
    for folder in (aside, old):
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder):
    """Put a folder and its files on the disk."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def naming_setting(setting, remedy):
    """Make an `OSError` of the block a `ValueError` that begins with a setting and its value."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"{setting}: {place}{error.strerror or error}; {remedy}") from error


@contextmanager
def naming_errors(path):
    """Give an `OSError` that names no file, as a full disk's, the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or not error.strerror:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
