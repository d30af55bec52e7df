"""Which files of a tar are one sample: nothing is guessed, and what does not pair is lost."""

import itertools

from fluxlite.data.parts import CONTROL, IMAGE, IMAGES, MASK
from fluxlite.nets.configs import MODES

SAME_KIND = {"jpg", "jpeg", "webp"}  # of these a sample has one
PICTURES = {*IMAGES, "gif", "bmp", "tif", "tiff"}
OTHER_PICTURES = {
    *MODES,
    "mask",
    "control",
    "condition",
    "conditioning",
    "reference",
    "ref",
    "segmentation",
}


def split_name(name):
    """A file's name as its key and ending; None for hidden files and those without an ending."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or not ending or folder.startswith(".") or "/." in folder:
        return None
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def choose_parts(files, parts):
    """What of a key's files is used: ([place of each column, or None], or None), and what is lost.

    `files` are (ending, place, run): runs of one key that others interrupt have different numbers.
    The lost are reasons, one for each sample. What could pair one sample's picture with another's
    caption is lost, never guessed.
    """
    found = {}
    for ending, *where in files:
        found.setdefault(ending, []).append(where)
    most, count = max(((e, len(places)) for e, places in found.items()), key=lambda pair: pair[1])
    if count > 1:
        return None, [f"{count} samples of one key: its {most} is there {count} times"] * count
    found = {ending: places[0] for ending, places in found.items()}
    columns = []
    for endings in parts.endings():
        columns.append(next((ending for ending in endings if ending in found), None))
    lost = _dotted(found, parts)
    reason = _lacking(columns, found, parts)
    if reason:
        return None, lost + [reason] * (columns[IMAGE] is not None or not lost)
    columns = _of_one_run(columns, found, parts)
    if columns is None:
        runs = len({run for _, run in found.values()})
        return None, lost + [
            f"{runs} samples of one key, or one whose files lie apart in the tar"
        ] * runs
    return [e and found[e][0] for e in columns], lost


def _lacking(columns, found, parts):
    """Why these files make no sample; None where they do."""
    images, captions = parts.endings()[IMAGE], parts.captioned()
    several = sorted(SAME_KIND & set(found) & set(images))
    if columns[IMAGE] is None:
        return f"no picture ({', '.join(images)})"
    if len(several) > 1 and parts.images[: len(IMAGES)] == IMAGES:
        return f"several pictures ({', '.join(several)}): which one is meant is unknown"
    if parts.captions and not any(ending in found for ending in captions):
        return f"no caption ({', '.join(captions)})"
    if parts.control and columns[CONTROL] is None:
        return f"no control ({parts.control})"
    return None


def _dotted(found, parts):
    """A reason for each picture whose name goes on behind its key's dot, as in `frame.001.jpg`.

    Those are pictures with a caption of the same name, and several that are no known part.
    """
    known = set().union(*parts.endings())
    unknown = [e for e in found if e not in known and _is_dotted_picture(e)]
    captions = itertools.product(unknown, parts.captioned())
    captioned = [e for e, caption in captions if f"{e.rpartition('.')[0]}.{caption}" in found]
    alone = len(unknown) == 1 and not captioned
    if alone and any(e in found for e in parts.endings()[IMAGE]):
        return []
    return [f"{e} is no part of a sample: a key ends at its first dot" for e in unknown]


def _is_dotted_picture(ending):
    stem, _, last = ending.rpartition(".")
    return bool(stem) and last in PICTURES and stem not in OTHER_PICTURES


def _of_one_run(columns, found, parts):
    """`columns` without what lies apart from a run that has a picture and a caption.

    None where the picture and the first caption are not of one such run, or the control is another
    sample's: controls may have been appended. Where no run has both, the files of a key belong
    together: tar packs a folder in any order.
    """
    images = {run for e, (_, run) in found.items() if e in parts.endings()[IMAGE]}
    captions = {run for e, (_, run) in found.items() if e in parts.captioned()}
    if not images & captions:
        return columns
    caption = next(columns[option[0]] for option in parts.captions if columns[option[0]])
    runs = {found[columns[IMAGE]][1], found[caption][1]}
    beside = {found[columns[i]][1] for i in (CONTROL, MASK) if columns[i]}
    if len(runs) > 1 or len(images & captions) > 1 or beside & (images | captions) - runs:
        return None
    return [e if e and found[e][1] in runs | beside else None for e in columns]
