"""The settings of data: where samples come from, what is made of them, how they are batched."""

import importlib.util
import math
import re
from dataclasses import dataclass

from fluxlite.cli.options import check_options, option
from fluxlite.data.parts import IMAGES
from fluxlite.nets.configs import MODES, mode_number
from fluxlite.nets.latents import MAX_SIDE

DATA_KINDS = ("mock", "fill50k", "webdataset", "folder")
READ_KINDS = {"data.kind": DATA_KINDS[1:]}  # whose samples lie in files
CROPS = ("center", "random")
PICTURE_ENDING = rf"([a-z0-9_-]+\.)*({'|'.join(IMAGES)})"
MAX_ASPECT = 3  # of a bucket, its longer side over its shorter one


@dataclass(frozen=True)
class PlaceOptions:
    """How the samples of one place of `data.path` are used."""

    repeats: float = 1.0
    loss_weight: float = 1.0
    template: str = "{}"


@dataclass
class DataConfig:
    """Where samples come from and how they are batched."""

    kind: str = option(
        "fill50k",
        "where samples come from; fill50k is generated where there are no shards",
        choices=DATA_KINDS,
        group="data",
    )
    path: str | None = option(
        None,
        "tars: a folder, a glob, a brace pattern, a URL, or from the command line alone "
        "pipe:COMMAND, a shell command that prints a tar; data=folder: a folder of pictures; "
        "several with :: between them; fill50k: the folder where they are or will be",
        verbatim=True,
        resume="elsewhere",
        only_given="pipe:",
    )
    repeats: list[float] = option(
        [],
        "how often an epoch has each sample, once for each place of data.path, or once for all; "
        "0.5: every second one, in turn (default 1)",
        verbatim=True,
        only_with=READ_KINDS,
        above=0,
        at_most=10_000,
    )
    loss_weight: list[float] = option(
        [],
        "what the loss of a sample counts, for each place or for all; of a prior, say, 0.5 "
        "(default 1)",
        verbatim=True,
        only_with=READ_KINDS,
        above=0,
        at_most=1000,
    )
    template: list[str] = option(
        [],
        "what captions are put into, for each place or for all: 'sks dog, {}'; without {} it is "
        "the caption of every picture, and none is read",
        verbatim=True,
        only_with=READ_KINDS,
    )
    count: int = option(
        50_000,
        "fill50k: pictures to generate; mock: samples of an epoch",
        only_with={"data.kind": ("fill50k", "mock")},
        at_least=1,
        at_most=10**9,
    )
    generate_size: int = option(
        512,
        "fill50k: side of the generated pictures in pixels",
        only_with={"data.kind": ("fill50k",)},
        at_least=8,
        at_most=MAX_SIDE,
    )
    height: int = option(
        512,
        "height that pictures are resized to, in pixels, a multiple of model.downsampling x 2",
        at_least=16,
        at_most=MAX_SIDE,
    )
    width: int = option(
        512,
        "width that pictures are resized to, in pixels, a multiple of model.downsampling x 2",
        at_least=16,
        at_most=MAX_SIDE,
    )
    resolutions: list[int] = option(
        [],
        "sides of squares, as [512,768,1024]: each sample is trained at each; [] is data.height x "
        "data.width alone, which validation and grids always have",
        only_with=READ_KINDS,
        at_least=16,
        at_most=MAX_SIDE,
    )
    buckets: bool = option(
        False,
        "train each picture in the shape nearest to its own, of no more pixels; each step has one",
        only_with=READ_KINDS,
    )
    bucket_step: int = option(
        64,
        "the shapes' sides are multiples of this, and it of model.downsampling x 2",
        at_least=16,
        at_most=MAX_SIDE,
        only_with={"data.buckets": (True,)},
    )
    crop: str = option("center", "which part stays of a picture of another shape", choices=CROPS)
    flip: bool = option(False, "mirror every other picture, drawn for each sample")
    caption_field: str = option(
        "caption",
        "field of a sample's json that is its caption; without it, its txt is",
        only_with=READ_KINDS,
    )
    caption_dropout: float = option(
        0.1, "share of samples trained with the empty caption", at_least=0, at_most=1
    )
    control: str | None = option(
        None,
        "the picture that a ControlNet or model.kind= sees: an ending, as png, of a file beside "
        "the target; canny: its edges",
    )
    mask: str | None = option(
        None,
        "a picture whose white is trained on, black is not: an ending, as mask.png, of a file "
        "beside the target; alpha: the target's own; of model.kind=fill white is the hole",
        only_with=READ_KINDS,
    )
    control_mode: str | None = option(
        None,
        "kind of control, for union nets: json (its field mode), or "
        f"{', '.join(MODES)} or a number without one",
    )
    micro_batch: int = option(
        1,
        "samples of a forward pass, for each data-parallel rank",
        at_least=1,
        at_most=100_000,
        resume=True,
    )
    global_batch: int = option(
        8, "samples of an optimizer step, over all ranks", at_least=1, at_most=10_000_000
    )
    shuffle: bool = option(True, "a new order each epoch; false: the tars' own")
    shuffle_window: int = option(
        64,
        "tars whose samples are mixed at a time",
        at_least=1,
        at_most=10**9,
        only_with={"data.shuffle": (True,)},
    )
    workers: int = option(
        2,
        "loader processes for each rank; 0 loads in the training process",
        at_least=0,
        at_most=1024,
        resume=True,
    )
    max_bad_fraction: float = option(
        0.01,
        "share of unusable samples above which the run stops",
        at_least=0,
        at_most=1,
        resume=True,
    )
    cache: str | None = option(
        None,
        "folder for latents and texts that are encoded once; null: encode them each time",
        path=True,
        resume="elsewhere",
    )
    cache_pictures: bool = option(
        False, "keep the pictures themselves in data.cache= too, which model.kind=fill masks"
    )
    val_path: str | None = option(
        None,
        "tars of the validation set, as data.path; null: an Energon split, fill50k's held-out "
        "pairs, "
        "or the last samples",
        verbatim=True,
        resume="elsewhere",
        only_given="pipe:",
    )
    val_count: int = option(
        64, "held-out samples that validation takes", at_least=1, at_most=10_000_000
    )
    download: str = option(
        "~/.cache/fluxlite/shards", "folder for tars fetched from URLs", path=True, resume=True
    )

    @property
    def control_ending(self):
        """The ending of the control's file; None where there is no such file."""
        return None if self.control == "canny" else self.control

    def places(self):
        """The places of `data.path`."""
        return self.path.split("::") if self.path else [self.kind]

    def options_of(self, number):
        """The `PlaceOptions` that the samples of a place of `data.path` have."""
        values = {name: getattr(self, name) for name in PlaceOptions.__dataclass_fields__}
        given = {name: of[number % len(of)] for name, of in values.items() if of}
        return PlaceOptions(**given)

    def shapes(self):
        """[[(height, width) that a picture can be trained in], for each resolution]."""
        sides = [(side, side) for side in self.resolutions] or [(self.height, self.width)]
        if not self.buckets:
            return [[side] for side in sides]
        return [bucket_shapes(height * width, self.bucket_step) for height, width in sides]

    def validate(self):
        """Raise `ValueError` for values that make no sense, here or together."""
        check_options(self, "data.")
        self._check_places()
        self._check_options()
        self._check_shapes()
        self._check_control()
        self._check_mask()
        if self.cache and (self.crop == "random" or self.flip):
            raise ValueError(
                "data.cache encodes each picture once: set data.crop=center and data.flip=false, "
                "or data.cache=null"
            )
        if self.cache_pictures and not self.cache:
            raise ValueError("data.cache_pictures=true needs data.cache=: name a folder")
        if self.cache and self.kind == "mock":
            raise ValueError("data=mock makes its samples as they are read: set data.cache=null")
        given = [name for name in ("path", "val_path") if getattr(self, name)]
        if given and self.kind == "mock":
            raise ValueError(
                f"data.{given[0]}={getattr(self, given[0])} is not read with data=mock: set "
                "data=webdataset, or leave it out"
            )

    def _check_options(self):
        """Raise `ValueError` where settings of places are not as many, or make no sense."""
        count = len(self.places())
        for name in PlaceOptions.__dataclass_fields__:
            values = getattr(self, name)
            if len(values) not in (0, 1, count):
                raise ValueError(
                    f"data.{name}= is given {len(values)} times, and data.path= names {count} "
                    "places: give it once for each, or once for all"
                )
        for text in self.template:
            if text.strip() in ("", "[]") or re.search("[{}]", text.replace("{}", "")):
                raise ValueError(
                    f"data.template={text}: write a caption, with {{}} where a picture's own goes"
                )

    def _check_shapes(self):
        """Raise `ValueError` where resolutions and buckets give no shapes."""
        if len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(f"data.resolutions={self.resolutions} names one twice: once is enough")
        if self.buckets and not all(self.shapes()):
            raise ValueError(
                f"data.bucket_step={self.bucket_step} is wider than a picture: lower it"
            )

    def _check_mask(self):
        """Raise `ValueError` where nothing can be read as the mask."""
        if self.mask not in (None, "alpha") and not re.fullmatch(PICTURE_ENDING, self.mask):
            raise ValueError(
                f"data.mask={self.mask}: choose an ending such as mask.png, alpha, or null"
            )
        if self.mask and self.mask == self.control:
            raise ValueError(f"data.mask={self.mask} is data.control= too: name another ending")

    def _check_places(self):
        """Raise `ValueError` where `kind` and the places of tars do not belong together."""
        for name, what in (("path", "tars"), ("val_path", "tars"), ("caption_field", "a field")):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"data.{name}= is empty: name {what}, or leave it out")
        if self.kind == "folder" and not self.path:
            raise ValueError("data=folder needs data.path=: a folder of pictures and captions")
        if self.kind == "webdataset" and not self.path:
            raise ValueError(
                "data=webdataset needs data.path=: a folder of tars, a glob, a brace pattern or a "
                "URL"
            )
        if self.kind == "fill50k" and re.match(r"[A-Za-z][\w+.-]*:", self.path or ""):
            raise ValueError(
                f"data.path={self.path} must be a folder for data=fill50k; data=webdataset reads "
                "URLs"
            )

    def _check_control(self):
        """Raise `ValueError` where nothing can be read as the control, or as its kind."""
        ending = self.control_ending
        if ending is not None and not re.fullmatch(PICTURE_ENDING, ending):
            raise ValueError(
                f"data.control={self.control}: choose {', '.join(IMAGES)}, an ending such as "
                "depth.png, canny, or null"
            )
        if self.control == "canny" and not importlib.util.find_spec("cv2"):
            raise ValueError(
                "data.control=canny needs OpenCV: pip install opencv-python-headless, or -e "
                "'.[control]'"
            )
        mode = self.control_mode
        if mode is not None and not self.control:
            raise ValueError(
                f"data.control_mode={mode} says of which kind a control is: set data.control= too"
            )
        if mode not in (None, "json") and mode_number(mode) is None:
            raise ValueError(
                f"data.control_mode={mode}: choose json, one of {', '.join(MODES)}, or a number"
            )


def bucket_shapes(area, step):
    """Shapes (height, width) of sides that `step` divides: to each side the longest other one of at
    most `area` pixels together, and none longer than that of `MAX_ASPECT`.
    """
    longest = math.isqrt(area * MAX_ASPECT)
    pairs = [(area // side // step * step, side) for side in range(step, longest + 1, step)]
    kept = [(a, b) for a, b in pairs if 0 < a <= longest]
    return sorted({*kept, *((b, a) for a, b in kept)})
