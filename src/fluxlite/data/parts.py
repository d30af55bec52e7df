"""Which of a sample's files are its picture, caption and control: the one table of endings.

A sample is the files of one key, and a key ends at the first dot of a file's name, as WebDataset
and Energon have it: `a/frame.depth.png` is the `depth.png` of `a/frame`.
"""

from dataclasses import dataclass

IMAGES = ("jpg", "jpeg", "webp", "png")  # in this order: beside a jpg, a png is the control
IMAGE, TEXT, JSON, CONTROL = range(4)  # columns of a shard's `spans`
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

    def endings(self):
        """The endings of each column: IMAGE, TEXT, JSON, CONTROL."""
        images = tuple(ending for ending in self.images if ending != self.control)
        others = self.text, self.json, self.control
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


def config_parts(config):
    """The `SampleParts` of a sample as `data.caption_field` and `data.control` have them."""
    return SampleParts(
        captions=((JSON, config.caption_field), (TEXT,)), control=config.control_ending
    )


def printable_name(name):
    """A key of bytes, or a name, as a log or an error can show it."""
    text = name.decode(errors="backslashreplace") if isinstance(name, bytes) else name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
