"""Which of a sample's files are its picture, caption, control and mask: the one table of endings.

A sample is the files of one key. In tars a key ends at the first dot of a file's name, as
WebDataset and Energon have it: `a/frame.depth.png` is the `depth.png` of `a/frame`. In folders it
ends at the last (`folders.split_file`).
"""

from dataclasses import dataclass, field

IMAGES = ("jpg", "jpeg", "webp", "png")  # in this order: beside a jpg, a png is the control
IN_FOLDERS = (*IMAGES, "jfif", "bmp", "tif", "tiff", "gif")  # there other endings are common too
IMAGE, TEXT, JSON, CONTROL, MASK = range(5)  # columns of a shard's `spans`
MAX_KEY = 1024  # bytes; keys lie in a matrix as wide as the longest


@dataclass(frozen=True)
class SampleParts:
    """The endings of a sample's parts, in lower case."""

    images: tuple = IMAGES  # the first that is there
    text: str | None = "txt"
    json: str | None = "json"
    # the first that a sample has; the json's keys follow
    captions: tuple = ((JSON, "caption"), (TEXT,))
    control: str | None = None
    mask: str | None = field(default=None, repr=False)
    # whether the pictures' sizes are read, from their headers
    measured: bool = field(default=False, repr=False)
    alpha: bool = field(default=False, repr=False)  # whether a picture's own alpha is its mask

    def endings(self):
        """The endings of each column: IMAGE, TEXT, JSON, CONTROL, MASK."""
        images = tuple(e for e in self.images if e not in (self.control, self.mask))
        others = self.text, self.json, self.control, self.mask
        return [images, *((ending,) if ending else () for ending in others)]

    def captioned(self):
        """The endings that a caption can come from."""
        columns = {column for column, *_ in self.captions}
        endings = {TEXT: self.text, JSON: self.json}
        return [e for column, e in endings.items() if e and column in columns]

    def wanted(self):
        """What a sample without a caption lacks, in words."""
        names = [
            f"no {'.'.join(keys)} in its {self.json}" if keys else f"no {self.text}"
            for _, *keys in self.captions
        ]
        return ", ".join(names)


def config_parts(config, place=0):
    """The `SampleParts` of a sample of one of the places of `data.path`."""
    folder = config.kind == "folder"
    fields = dict.fromkeys((config.caption_field, "text") if folder else (config.caption_field,))
    captions = (*((JSON, name) for name in fields), (TEXT,))
    return SampleParts(
        images=IN_FOLDERS if folder else IMAGES,
        captions=captions if "{}" in config.options_of(place).template else (),
        control=config.control_ending,
        mask=None if config.mask == "alpha" else config.mask,
        measured=folder or config.buckets or config.mask == "alpha",
        alpha=config.mask == "alpha",
    )


def printable_name(name):
    """A key of bytes, or a name, as a log or an error can show it."""
    text = name.decode(errors="backslashreplace") if isinstance(name, bytes) else name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
