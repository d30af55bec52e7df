"""Which tars a setting names: folders, globs, brace patterns, URLs and commands, as local files."""

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain
from pathlib import Path

from fluxlite.cli.descriptions import check_regular
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import expand_home
from fluxlite.data.braces import expand_braces
from fluxlite.data.energon import energon_parts, energon_split
from fluxlite.data.parts import IMAGES, printable_name
from fluxlite.data.urls import REMOTE, fetch_tar


def expand_places(where, split, *, setting, download, parts_of, check):
    """The tars that `where` names for a split, in order: [(local path, its `SampleParts`, the
    number of the place that named it)].

    `where` is a folder, a file, a glob, a brace pattern or a URL, or several with `::` between
    them. A folder with an Energon `.nv-meta/split.yaml` gives the tars of that split; any other
    place belongs to "train". `parts_of(number)` are what an unnamed ending is at a place. `check`
    raises `ValueError` for a fetched file that is no whole tar. Raises `ValueError`, naming
    `setting`.
    """
    found, numbers = [], []
    for number, pattern in enumerate(where.split("::")):
        for name in _names_of(pattern, setting):
            if re.match("file:", name) or REMOTE.match(name):
                found += [(name, None)] if split == "train" else []
            else:
                found += _local_tars(expand_home(name, setting), split, setting)
        numbers += [number] * (len(found) - len(numbers))
    download, unanswered = Path(expand_home(download, "data.download")), set()
    with ThreadPoolExecutor(8) as pool:
        options = dict(setting=setting, unanswered=unanswered, check=check)
        fetch = partial(fetch_tar, folder=download, **options)
        paths = list(pool.map(fetch, [name for name, _ in found]))
    warn_of_repeats(paths, setting)
    folders = [root or os.path.dirname(path) for path, (_, root) in zip(paths, found)]
    described = cache(lambda folder, number: energon_parts(folder, parts_of(number)))
    places = zip(paths, folders, numbers)
    return [(path, described(folder, number), number) for path, folder, number in places]


def warn_of_repeats(paths, setting):
    """Say so where paths are the same, or one lies in another."""
    seen = set()
    for path in sorted(map(os.path.realpath, paths)):
        if seen & {path, *map(str, Path(path).parents)}:
            warn_for_all("%s names %s twice: its samples come twice an epoch", setting, path)
        seen.add(path)


def _names_of(pattern, setting):
    if os.path.exists(os.path.expanduser(pattern)):  # braces may be part of a name
        return [pattern]
    names = expand_braces([pattern], setting, escape=False)
    made = [
        name for name in names if name[:5].lower() == "pipe:" and not pattern.startswith("pipe:")
    ]
    if made:  # a command is written as one, so that it is seen
        raise ValueError(f"{setting}={pattern} makes {made[0]} of braces: write pipe: as it is")
    return names


def _local_tars(name, split, setting):
    """[(path, the folder whose `.nv-meta` describes it, or None for its own)]."""
    if os.path.isdir(name):
        listed = energon_split(name, split, setting)
        if listed is not None:
            return [(path, name) for path in listed]
        found = _tars_in(name)
        if not found:
            raise ValueError(f"{setting}={name} holds {_no_tar_in(name)}")
    elif os.path.exists(name):
        check_regular(name)
        found = [name]
    else:
        return _matching(name, split, setting)
    return [(path, None) for path in found] if split == "train" else []


def _tars_in(folder):
    """The tars of a folder, in order; compressed ones are told."""
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    packed = [name for name in names if re.search(r"\.(tar\.\w+|t[bgx]z)$", name.lower())]
    if packed:
        text = "%s: %d compressed tars are not read, %s first: unpack them to .tar"
        warn_for_all(text, folder, len(packed), printable_name(packed[0]))
    return [os.path.join(folder, name) for name in names if name.lower().endswith(".tar")]


def _no_tar_in(folder):
    """What a folder without a tar holds, and what to do."""
    inside = chain(*map(Path(folder).glob, ("*", "*/*")))
    if any(entry.suffix[1:].lower() in IMAGES for entry in inside):
        return "pictures and no .tar: set data=folder"
    return "no .tar: name the folder of the tars itself, a glob or a URL"


def _matching(pattern, split, setting):
    """What a glob matches, as `_local_tars` has it."""
    matches = sorted(glob.glob(pattern, recursive=True))
    broken = [match for match in matches if not os.path.exists(match)]
    if not matches or broken:
        raise ValueError(
            f"{setting}={(broken or [pattern])[0]} does not exist: name a folder of tars, a glob, "
            "a brace pattern or a URL"
        )
    found = []
    for match in matches:
        found += _local_tars(match, "train", setting)
    return found if split == "train" else []
