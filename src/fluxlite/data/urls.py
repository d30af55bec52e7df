"""Tars of URLs and commands, fetched once, and again when the server says that they are others."""

import hashlib
import http.client
import json
import logging
import os
import re
import select
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, url2pathname, urlopen

from fluxlite.cli.atomic import aside_of, atomic_file, locked, naming_errors, naming_setting
from fluxlite.cli.descriptions import read_json
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import typed_description

STALLED = 30  # seconds without a byte, after which a server is given up
SLOW_COMMAND = 600  # the same for commands, which may prepare something first
ATTEMPTS = 3
REMOTE = re.compile(r"pipe:|[A-Za-z][\w+.-]*://")
AGENT = {"User-Agent": "fluxlite"}

log = logging.getLogger("fluxlite")


@dataclass
class FetchedDescription:
    """What a server said of a tar when it was fetched."""

    etag: str | None = None
    modified: str | None = None
    length: int | None = None

    @classmethod
    def of(cls, headers):
        length = headers.get("Content-Length")
        length = int(length) if (length or "").isdecimal() else None
        return cls(headers.get("ETag"), headers.get("Last-Modified"), length)

    def differs(self, other):
        """Whether something that both say is not the same."""
        pairs = zip(asdict(self).values(), asdict(other).values())
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def fetch_note(path):
    """Where the `FetchedDescription` of a fetched tar is kept."""
    return Path(path).with_name(f".{Path(path).name}.source.json")


def fetched_description(path):
    """The `FetchedDescription` of a tar, or None for one that was not fetched."""
    note = fetch_note(path)
    return typed_description(note, FetchedDescription, read_json(note)) if note.is_file() else None


def fetch_tar(name, folder, setting, unanswered, check):
    """A local path as it is; a URL as the local file that it was fetched to.

    `check` raises `ValueError` for a file that is no whole tar. `unanswered` collects servers that
    do not answer, each of which is asked once. Raises `ValueError` that names `setting`.
    """
    if name.startswith("file:"):
        return url2pathname(urlparse(name).path)
    if not REMOTE.match(name):
        return name
    url = urlparse(name)
    tail = re.sub(r"[^\w.-]+", "_", url.path.rsplit("/")[-1]).removesuffix(".tar")[-60:]
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    target = folder / f"{digest}-{tail}.tar"
    if not target.is_file() or _has_changed(name, url, target, unanswered):
        with naming_setting(f"data.download={folder}", "name a folder of your own"):
            folder.mkdir(parents=True, exist_ok=True)
        _download(name, target, setting, check)
    return str(target)


def _has_changed(name, url, target, unanswered):
    """Whether a server has another tar than was fetched. One that does not answer is asked once."""
    if url.scheme not in ("http", "https") or url.netloc in unanswered:
        return False
    known = fetched_description(target) or FetchedDescription(length=target.stat().st_size)
    try:
        with urlopen(Request(name, method="HEAD", headers=AGENT), timeout=STALLED) as response:
            changed = known.differs(FetchedDescription.of(response.headers))
    except (OSError, ValueError, http.client.HTTPException) as error:
        unanswered.add(url.netloc)
        warn_for_all(
            "%s cannot be asked for changes (%s): using what was fetched before", url.netloc, error
        )
        return False
    if changed:
        warn_for_all("%s is another tar than was fetched: fetching it again", name)
    return changed


def _download(url, target, setting, check):
    """Fetch a tar aside, check that it is whole, and rename it, unless another process does."""
    before = _identity(target)
    with locked(target.with_name(f".{target.name}.lock")):
        if _identity(target) != before:
            return
        log.info("fetching %s to %s", url, target)
        with atomic_file(target) as file:
            about = _copied(url, file, target, setting, check)
        with atomic_file(fetch_note(target)) as note:
            note.write(json.dumps(asdict(about)).encode())


def _identity(path):
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.is_file() else None


def _copied(url, file, target, setting, check):
    """Copy a URL's tar to `file`, trying again; returns its `FetchedDescription`."""
    for attempt in range(ATTEMPTS):
        try:
            about = _copy_url(url, file, target)
            check(aside_of(target))
            return about
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "filename", None) == str(target):
                raise  # the disk's fault
            if attempt + 1 == ATTEMPTS or not _is_passing(error):
                instead = "" if url.startswith("pipe:") else ", or give pipe:COMMAND that prints it"
                raise ValueError(
                    f"{setting}: {url} cannot be fetched ({' '.join(str(error).split())}); check "
                    f"it{instead}"
                ) from error
            time.sleep(2**attempt)


def _is_passing(error):
    """Whether trying again may help: a server's bad moment, and no stall or missing file."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code == 429
    return isinstance(error, (ConnectionError, http.client.HTTPException))


def _copy_url(url, file, target):
    file.seek(0)
    file.truncate()
    if urlparse(url).scheme not in ("http", "https"):
        _copy_command(url, file, target)
        return FetchedDescription()
    with urlopen(Request(url, headers=AGENT), timeout=STALLED) as response:
        about = FetchedDescription.of(response.headers)
        _copy_chunks(partial(response.read1, 1 << 20), file, target)
    if about.length not in (None, file.tell()):
        raise ConnectionError(f"it ends after {file.tell()} of {about.length} bytes")
    return about


def _copy_command(url, file, target):
    """Copy what a command, or the client of another kind of URL, prints."""
    import webdataset

    stream = webdataset.gopen(url, "rb")
    number = stream.stream.fileno()

    def read():
        if not select.select([number], [], [], SLOW_COMMAND)[0]:
            raise TimeoutError(f"nothing came for {SLOW_COMMAND} seconds")
        return os.read(number, 1 << 20)

    try:
        _copy_chunks(read, file, target)
    except BaseException:
        stream.proc.kill()
        stream.proc.wait()
        raise
    try:
        stream.close()
    except OSError:  # an exit code, in the library's words
        code = stream.proc.returncode
        raise ValueError(f"its command ends with exit code {code}, see above") from None


def _copy_chunks(read, file, target):
    """Copy until `read()` gives nothing. Raises `TimeoutError` below a kilobyte a second."""
    start, received = time.monotonic(), 0
    while chunk := read():
        with naming_errors(target):
            file.write(chunk)
        received += len(chunk)
        if (waited := time.monotonic() - start) > STALLED:
            if received < 1000 * STALLED:
                raise TimeoutError(f"{received} bytes in {waited:.0f} seconds")
            start, received = time.monotonic(), 0
    with naming_errors(target):
        file.flush()
