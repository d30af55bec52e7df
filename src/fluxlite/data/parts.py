"""Which of a sample's files are its picture, caption and control: the one table of endings.

A sample is the files of one key, and a key ends at the first dot of a file's name, as WebDataset
and Energon have it: `a/frame.depth.png` is the `depth.png` of `a/frame`.
"""

from dataclasses import dataclass

from fluxlite.nets.control_modes import MODES

IMAGES = ("jpg", "jpeg", "webp", "png")  # in this order: beside a jpg, a png is the control
SAME_KIND = {"jpg", "jpeg", "webp"}  # of these a sample has one
PICTURES = {*IMAGES, "gif", "bmp", "tif", "tiff"}
OTHER_PICTURES = {
    *MODES,
    "mask",
    "control",
    "condition",
    "conditioning",
    "reference",
    "segmentation",
}
IMAGE, TEXT, JSON, CONTROL = range(4)  # columns of a shard's `spans`
MAX_KEY = 1024  # bytes; keys lie in a matrix as wide as the longest


@dataclass(frozen=True)
class Parts:
    """The endings of a sample's parts, in lower case."""

    images: tuple = IMAGES  # the first that is there
    text: str | None = "txt"
    json: str | None = "json"
    captions: tuple = (
        (JSON, "caption"),
        (TEXT,),
    )  # the first that a sample has; the json's keys follow
    control: str | None = None

    def endings(self):
        """The endings of each column: IMAGE, TEXT, JSON, CONTROL."""
        images = tuple(ending for ending in self.images if ending != self.control)
        return [
            images,
            *(
                () if ending is None else (ending,)
                for ending in (self.text, self.json, self.control)
            ),
        ]

    def captioned(self):
        """The endings that a caption can come from."""
        columns = {option[0] for option in self.captions}
        return [
            e for e, column in ((self.text, TEXT), (self.json, JSON)) if e and column in columns
        ]

    def wanted(self):
        """What a sample without a caption lacks, in words."""
        names = [
            f"no {'.'.join(keys)} in its {self.json}" if keys else f"no {self.text}"
            for _, *keys in self.captions
        ]
        return ", ".join(names)


def config_parts(config):
    """The `Parts` of a sample as `data.caption_field` and `data.control` have them."""
    return Parts(captions=((JSON, config.caption_field), (TEXT,)), control=config.control_ending)


def split_name(name):
    """A file's name as its key and ending; None for hidden files and those without an ending."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or not ending or folder.startswith(".") or "/." in folder:
        return None
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def choose_parts(files, parts):
    """What of a key's files is used: ([place of each column, or None], or None) and the samples
    lost.

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
    columns = [next((e for e in endings if e in found), None) for endings in parts.endings()]
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
    if len(several) > 1 and parts.images == IMAGES:
        return f"several pictures ({', '.join(several)}): which one is meant is unknown"
    if not any(ending in found for ending in captions):
        return f"no caption ({', '.join(captions)})"
    if parts.control and columns[CONTROL] is None:
        return f"no control ({parts.control})"
    return None


def _dotted(found, parts):
    """A reason for each picture whose name seems to go on behind its key's dot, as in
    `frame.001.jpg`.

    Those are pictures with a caption of the same name, and several that are no known part.
    """
    known = {ending for endings in parts.endings() for ending in endings}
    unknown = [e for e in found if e not in known and _is_dotted_picture(e)]
    captioned = [e for e in unknown if any(f"{_stem(e)}.{c}" in found for c in parts.captioned())]
    alone = len(unknown) == 1 and not captioned
    if alone and any(e in found for e in parts.endings()[IMAGE]):
        return []
    return [f"{e} is no part of a sample: a key ends at its first dot" for e in unknown]


def _is_dotted_picture(ending):
    stem, _, last = ending.rpartition(".")
    return bool(stem) and last in PICTURES and stem not in OTHER_PICTURES


def _stem(ending):
    return ending.rpartition(".")[0]


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
    control = columns[CONTROL] and found[columns[CONTROL]][1]
    if len(runs) > 1 or len(images & captions) > 1 or control in (images | captions) - runs:
        return None
    return [e if e and found[e][1] in {*runs, control} else None for e in columns]


def printable_name(name):
    """A key of bytes, or a name, as a log or an error can show it."""
    text = name.decode(errors="backslashreplace") if isinstance(name, bytes) else name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
