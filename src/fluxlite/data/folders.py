"""Folders of pictures with captions beside them, indexed as tars are.

A caption is a `.txt` or `.caption` of the picture's name, or a line of a `metadata.jsonl` in the
picture's folder, as Hugging Face's imagefolder has it: `{"file_name": "a.jpg", "text": "a fox"}`.
"""

import os
from collections import Counter
from dataclasses import replace
from functools import cache
from operator import itemgetter

import numpy as np

from fluxlite.cli.descriptions import MAX_BYTES, check_regular, foreign_json
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import shortened
from fluxlite.data.indexed import index_samples
from fluxlite.data.parts import CONTROL, IMAGE, JSON, MASK, SampleParts, printable_name

LINES = "metadata.jsonl"
CAPTION = "caption"  # an ending that stands for txt, where there is none
UNTOLD = "json without a caption"  # and one that stands for json, where a txt has the caption
BESIDE = ("mask", "ref", "control")  # of `a.mask.png`, which is no sample of its own


def split_file(name, parts=SampleParts()):  # noqa: B008 (frozen)
    """A file's name as its key and ending; None for hidden files and those without an ending.

    A key ends at the last dot, or at the last but one where a word of `BESIDE` follows, or the word
    of `data.control` or `data.mask`: `a/v1.5.mask.png` is the `mask.png` of `a/v1.5`.
    """
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.rpartition(".")
    if not stem or folder.startswith(".") or "/." in f"/{name}":
        return None
    front, _, word = stem.rpartition(".")
    asked = [e.rpartition(".")[0] for e in (parts.control, parts.mask) if e]
    if front and word and word.lower() in (*BESIDE, *asked):
        stem, ending = front, f"{word}.{ending}"
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def index_folder(path, parts):
    """The `Shard` of a folder and all below it, in the order of the files' names.

    Raises `ValueError` where there is none, and for a `metadata.jsonl` that cannot be followed.
    """
    if not os.path.isdir(path):
        wrong = "is a file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"{path} {wrong}: name a folder of pictures and captions")
    names = sorted(_names_below(path), key=os.fsencode)
    files = (_known_file(os.path.join(path, name)) for name in names)
    return _indexed_files(path, tuple(files), parts)


def _known_file(path):
    """A file's path, size and time of change; 0 of a link that leads nowhere."""
    try:
        about = os.stat(path)
    except OSError:  # its sample is then skipped by name
        return path, 0, 0
    return path, about.st_size, about.st_mtime_ns


def _names_below(path):
    """The names of all files in a folder and below it, links followed; none that is hidden."""
    seen = set()
    for folder, below, files in os.walk(path, followlinks=True, onerror=_raise_error):
        again = os.path.realpath(folder) in seen
        seen.add(os.path.realpath(folder))
        # sorted: by which of two links a folder is found must not be the disk's choice
        below[:] = sorted(name for name in below if not again and name[0] != ".")
        shown = [name for name in files if not again and name[0] != "."]
        yield from (os.path.relpath(os.path.join(folder, name), path) for name in shown)


def _raise_error(error):
    raise error


@cache  # validation is often cut from the training set, and opened more than once
def _indexed_files(path, files, parts):
    found = _parts_by_key(path, files, parts)
    pictures = set().union(*(parts.endings()[column] for column in (IMAGE, CONTROL, MASK)))
    endings = {key: {*map(itemgetter(0), of)} for key, of in found.items()}
    samples = {key: of for key, of in found.items() if endings[key] & pictures}
    if files and not samples:
        raise ValueError(_no_picture_in(path, files, parts))
    told = {parts.text, parts.json}
    lone = [k for k in found if k not in samples and (endings[k] & told or not endings[k])]
    if lone:
        shown = len(lone), path, printable_name(lone[0])
        warn_for_all("%d captions have no picture: that of %s/%s first", *shown)
    shard = index_samples(path, files, parts, index_folder, samples)
    _warn_of_unread(shard)
    return _only_read(shard)


def _only_read(shard):
    """A shard that knows of no files but those it reads: others may come and go."""
    used = shard.spans[..., 1] >= 0
    read, numbers = np.unique(shard.places[used], return_inverse=True)
    places = np.zeros_like(shard.places)
    places[used] = numbers
    return replace(shard, files=tuple(shard.files[i] for i in read), places=places)


def _no_picture_in(path, files, parts):
    """What a folder without a picture holds, and what to do."""
    counts = Counter(os.path.splitext(file)[1].lower() or "no ending" for file, *_ in files)
    held = ", ".join(f"{count} of {ending}" for ending, count in counts.most_common(3))
    remedy = "set data=webdataset" if ".tar" in counts else "convert them, or name another folder"
    pictures = ", ".join(parts.endings()[IMAGE])
    return f"{path} holds no picture ({pictures}), but {held}: {remedy}"


def _parts_by_key(path, files, parts):
    """{key: [(ending, (file, offset, size), run)]}: a file whole, or a line of `LINES`."""
    found = {}
    for number, (file, size, _) in enumerate(files):
        name = os.path.relpath(file, path)
        if os.path.basename(name) == LINES:
            entries = _described_pictures(path, file, number, parts)
        else:
            entries = [(split_file(name, parts), (number, 0, size))]
        for split, place in entries:
            if split:
                found.setdefault(split[0], []).append((split[1], place, 0))
    return {key: _one_text(of_key, parts) for key, of_key in found.items()}


def _one_text(of_key, parts):
    """A key's files with `CAPTION` as its text, where it has no other; `UNTOLD` is left out where
    the key would have no caption at all.
    """
    endings = {ending for ending, *_ in of_key}
    told = not parts.captions or {parts.text, CAPTION} & endings
    unread = {UNTOLD} if not told else {CAPTION} if parts.text in endings else set()
    names = {CAPTION: parts.text, UNTOLD: parts.json}
    return [(names.get(e, e), *rest) for e, *rest in of_key if e not in unread]


def _described_pictures(path, file, number, parts):
    """[((key, "json" or `UNTOLD`), its line's place)] of the pictures that a `LINES` describes."""
    check_regular(file)
    if os.path.getsize(file) > MAX_BYTES:
        raise ValueError(f"{file} has more than {MAX_BYTES} bytes: use tars for so many pictures")
    found, offset = {}, 0
    fields = {keys[0] for column, *keys in parts.captions if column == JSON}
    with open(file, "rb") as lines:
        for i, line in enumerate(lines, 1):
            if line.strip():
                row = _read_line(line, f"{file} line {i}")
                picture = os.path.join(os.path.dirname(file), row["file_name"])
                key, _ = split_file(os.path.relpath(picture, path), parts) or (None, None)
                if key is None or key in found:
                    wrong = "has a line already" if key else "is no picture in its folder or below"
                    raise ValueError(f"{file} line {i}: {shortened(row['file_name'])} {wrong}")
                ending = parts.json if any(map(row.get, fields)) else UNTOLD
                found[key] = ending, (number, offset, len(line))
            offset += len(line)
    return [((key, ending), place) for key, (ending, place) in found.items()]


def _read_line(line, where):
    """The object that a line of `LINES` is, which names a picture."""
    try:
        row = foreign_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ValueError(f'{where} must be an object with a "file_name"')
    return row


def _warn_of_unread(shard):
    """Say so where files of a folder are part of no sample."""
    read = set(shard.places[shard.spans[..., 1] >= 0].tolist())
    names = [path for path, _, _ in shard.files]
    unread = [name for i, name in enumerate(names) if i not in read]
    if unread:
        pictures = ", ".join(shard.parts.endings()[IMAGE])
        text = "%d files are not read, %s first: pictures are %s; see data.control= and data.mask="
        warn_for_all(text, len(unread), printable_name(unread[0]), pictures)
