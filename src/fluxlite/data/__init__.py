"""Data: shards of pictures and captions to batches that are a pure function of (config, seed,
global sample index).

prepare(config, "train", seed)                       # on every rank; generates fill50k where it is
missing dataset = open_dataset(config, "train", seed) for batch in make_loader(dataset,
global_batch=8, micro_batch=2, dp_rank=0, dp_size=2, start_index=0, workers=2): …
"""

import importlib.util
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxlite.cli.descriptions import read_description
from fluxlite.cli.options import check_options, expand_home, option
from fluxlite.cli.programs import warn_for_all
from fluxlite.data.cache import CachedSamples, build_cache, data_digest
from fluxlite.data.loading import load_batches
from fluxlite.data.mock import MockPictures, MockSamples
from fluxlite.data.parts import IMAGES, config_parts
from fluxlite.data.places import expand_places
from fluxlite.data.shards import Samples
from fluxlite.data.tars import cut_shards, open_shards
from fluxlite.nets.control_modes import MODES, mode_number
from fluxlite.nets.latents import MAX_SIDE

__all__ = [
    "CachedSamples",
    "DataConfig",
    "MockPictures",
    "MockSamples",
    "Samples",
    "build_cache",
    "data_digest",
    "make_loader",
    "open_dataset",
    "prepare",
]

KINDS = ("mock", "fill50k", "webdataset")
CROPS = ("center", "random")

log = logging.getLogger("fluxlite")


@dataclass
class DataConfig:
    """Where samples come from and how they are batched."""

    kind: str = option(
        "fill50k",
        "where samples come from; fill50k is generated where there are no shards",
        choices=KINDS,
        group="data",
    )
    path: str | None = option(
        None,
        "tars: a folder, a glob, a brace pattern, a URL, or from the command line alone "
        "pipe:COMMAND, a shell command that prints a tar; several with :: between them; fill50k: "
        "the "
        "folder where they are or will be",
        verbatim=True,
        only_given="pipe:",
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
        "height that pictures are resized to, in pixels, a multiple of 16",
        at_least=16,
        at_most=MAX_SIDE,
    )
    width: int = option(
        512,
        "width that pictures are resized to, in pixels, a multiple of 16",
        at_least=16,
        at_most=MAX_SIDE,
    )
    crop: str = option("center", "which part stays of a picture of another shape", choices=CROPS)
    flip: bool = option(False, "mirror every other picture, drawn for each sample")
    caption_field: str = option(
        "caption", "field of a sample's json that is its caption; without it, its txt is"
    )
    caption_dropout: float = option(
        0.1, "share of samples trained with the empty caption", at_least=0, at_most=1
    )
    control: str | None = option(
        None,
        "a ControlNet's picture: an ending, as png, of a file beside the target; canny: its edges",
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
        64, "tars whose samples are mixed at a time", at_least=1, at_most=10**9
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
    )
    val_path: str | None = option(
        None,
        "tars of the validation set, as data.path; null: an Energon split, fill50k's held-out "
        "pairs, "
        "or the last samples",
        verbatim=True,
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

    def validate(self):
        """Raise `ValueError` for values that make no sense, here or together."""
        check_options(self, "data.")
        for name in ("path", "val_path", "caption_field"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                what = "a field" if name == "caption_field" else "tars"
                raise ValueError(f"data.{name}= is empty: name {what}, or leave it out")
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
        if self.control_ending is not None and not re.fullmatch(
            rf"([a-z0-9_-]+\.)*({'|'.join(IMAGES)})", self.control_ending
        ):
            raise ValueError(
                f"data.control={self.control}: choose {', '.join(IMAGES)}, an ending such as "
                "depth.png, canny, or null"
            )
        if self.control == "canny" and not importlib.util.find_spec("cv2"):
            raise ValueError(
                "data.control=canny needs OpenCV: pip install opencv-python-headless, or -e "
                "'.[control]'"
            )
        if self.control_mode is not None and not self.control:
            raise ValueError(
                f"data.control_mode={self.control_mode} says of which kind a control is: set "
                "data.control= too"
            )
        if self.control_mode not in (None, "json") and mode_number(self.control_mode) is None:
            raise ValueError(
                f"data.control_mode={self.control_mode}: choose json, one of {', '.join(MODES)}, "
                "or a number"
            )
        if self.cache and (self.crop == "random" or self.flip):
            raise ValueError(
                "data.cache encodes each picture once: set data.crop=center and data.flip=false, "
                "or data.cache=null"
            )
        if self.cache and self.kind == "mock":
            raise ValueError("data=mock makes its samples as they are read: set data.cache=null")
        if self.kind == "mock" and (self.path or self.val_path):
            name = "path" if self.path else "val_path"
            raise ValueError(
                f"data.{name}={getattr(self, name)} is not read with data=mock: set "
                "data=webdataset, "
                "or leave it out"
            )


# --- opening --------------------------------------------------------------------------------------


def fill50k_folder(config, split):
    """Where fill50k's tars of a split are or will be: `path/train`, `path/val`.

    `path` itself is the training set where it holds tars that the generator wrote there.
    """
    root = fill50k_root(config)
    return root if split == "train" and any(root.glob("*.tar")) else root / split


def fill50k_root(config):
    """The folder that fill50k's splits lie in."""
    root = config.path or f"data/fill50k-{config.generate_size}-{config.count}"
    return Path(expand_home(root, "data.path"))


def prepare(config, split, seed=0):
    """Generate fill50k's tars of a split where there are none; every rank calls it: one works, the
    others wait.

    The pictures are the same whatever the `seed` of a run, so that runs share them. Raises
    `ValueError` where pictures of another count or size were generated before, and for a folder
    with files of the user's: nothing is written into that.
    """
    from fluxlite.data import fill50k

    if config.kind != "fill50k" or (split == "val" and config.val_path):
        return
    folder, held_out = fill50k_folder(config, split), split == "val"
    count = config.val_count if held_out else config.count
    _check_ours(fill50k_root(config))
    if not any(folder.glob("*.tar")):
        folder.parent.mkdir(parents=True, exist_ok=True)
        workers = min(os.cpu_count() or 1, count // 500)
        options = dict(
            size=config.generate_size, seed=int(held_out), held_out=held_out, workers=workers
        )
        samples = fill50k.generated_samples(count, **options)
        fill50k.write_shards(
            samples, folder, count=count, about={"count": count, "size": config.generate_size}
        )
    _check_generated(config, folder, count, at_least=held_out)


def _check_ours(root):
    """Raise `ValueError` unless fill50k's folder is new, or holds only what the generator wrote."""
    from fluxlite.data.fill50k import NOTE

    names = sorted(p.name for p in root.iterdir()) if root.exists() else []
    if NOTE in names:
        return
    foreign = [n for n in names if n[0] != "." and not (root / n / NOTE).is_file()]
    if foreign:
        raise ValueError(
            f"data.path={root} holds {foreign[0]}, which is not data=fill50k's: set "
            "data=webdataset to train on tars of "
            "your own, or name a new folder to generate circles in"
        )


def _check_generated(config, folder, count, *, at_least):
    """Compare the note that generated tars have with what is asked for; a larger validation set
    will do.
    """
    from fluxlite.data.fill50k import NOTE, GeneratedDescription

    old, size = read_description(folder / NOTE, GeneratedDescription), config.generate_size
    if old.count is None:  # imported from the original download
        return
    if old.size != size or (old.count < count if at_least else old.count != count):
        setting = "data.val_count" if at_least else "data.count"
        raise ValueError(
            f"{folder} holds {old.count} pictures of {old.size} pixels, but {setting}={count} and "
            f"data.generate_size={size}: "
            "remove that folder, or set another data.path="
        )


def find_shards(config, split, found):
    """The shards of a split. Without a validation set of its own, the last `val_count` samples are
    validation's. `found` as `open_dataset` has it.
    """
    limit, parts = dict(max_bad_fraction=config.max_bad_fraction), config_parts(config)
    if split == "val" and config.val_path:
        places = _places(config, "val_path", "val", found)
        places = places or _places(config, "val_path", "train", found)
        _warn_of_overlap(config, places, found)
        return open_shards(places, setting=f"data.val_path={config.val_path}", **limit)
    if config.kind == "fill50k":
        folder = fill50k_folder(config, split)
        places = [(str(path), parts) for path in sorted(folder.glob("*.tar"))]
        return open_shards(places, setting=f"data.path={folder}", **limit)
    held_out = [] if config.val_path else _places(config, "path", "val", found)
    if split == "val" and held_out:
        return open_shards(held_out, setting=f"data.path={config.path}", **limit)
    places = _places(config, "path", "train", found)
    shards = open_shards(places, setting=f"data.path={config.path}", **limit)
    if config.val_path or held_out:
        return shards
    total = sum(len(shard.keys) for shard in shards)
    start = total - config.val_count
    if start < 1:
        raise ValueError(
            f"data.path={config.path} holds {total} samples: set data.val_count below that, or "
            "data.val_path="
        )
    if split == "train":
        log.info("the last %d of %d samples are kept for validation", config.val_count, total)
    return cut_shards(shards, 0, start) if split == "train" else cut_shards(shards, start, total)


def _places(config, name, split, found):
    """The tars that `data.path` or `data.val_path` names for a split; expanded once."""
    if (name, split) not in found:
        options = dict(download=config.download, parts=config_parts(config))
        where, setting = getattr(config, name), f"data.{name}"
        found[name, split] = expand_places(where, split, setting=setting, **options)
    return found[name, split]


def _warn_of_overlap(config, places, found):
    """Say so where a tar is of the training set and of the validation set."""
    trained = {os.path.realpath(path) for path in training_paths(config, found)}
    shared = [path for path, _ in places if os.path.realpath(path) in trained]
    if shared:
        warn_for_all(
            "%d of %d tars of data.val_path are trained on too, %s first: validation will look "
            "better than it is",
            *(len(shared), len(places), shared[0]),
        )


def training_paths(config, found):
    """The training set's tars."""
    if config.kind == "fill50k":
        return [str(path) for path in fill50k_folder(config, "train").glob("*.tar")]
    return [path for path, _ in _places(config, "path", "train", found)]


def open_dataset(config, split, seed, found=None):
    """The samples of "train" or "val" by global index; `prepare` comes first. Raises `ValueError`
    where there are too few.

    `found`, a dictionary for both splits of a run, keeps what the places were expanded to: servers
    are asked once.
    """
    found = {} if found is None else found
    if config.kind == "mock":
        return MockPictures(config, split=split, seed=seed)
    shards = find_shards(config, split, found)
    if split == "train":
        return Samples(config, shards, seed=seed, training=True)
    total = sum(len(shard.keys) for shard in shards)
    if total < config.val_count:
        raise ValueError(
            f"the validation set holds {total} samples: set data.val_count={total} or less"
        )
    return Samples(config, cut_shards(shards, 0, config.val_count), seed=seed, training=False)


# --- batching -------------------------------------------------------------------------------------


def make_loader(
    dataset, *, global_batch, micro_batch, dp_rank, dp_size, start_index, stop_index=None, workers=0
):
    """An iterator over one rank's micro-batches from `start_index`, a multiple of `global_batch`,
    to `stop_index` or for ever.

    Step s, slice a, rank r takes `micro_batch` indices from s·global_batch + (a·dp_size +
    r)·micro_batch on. Batches are dictionaries: images (B, 3, H, W) and captions, or mean, logvar,
    txt and pooled, stacked; indices (B,) and keys; with `data.control` also controls (B, 3, H, W),
    or control_mean and control_logvar, and perhaps modes (B,) int64. Raises `ValueError` where more
    than `max_bad_fraction` of 100 samples or more, or of an epoch, are bad.
    """
    for name, value, multiple in (
        ("global_batch", global_batch, micro_batch * dp_size),
        ("start_index", start_index, global_batch),
        ("stop_index", stop_index or 0, global_batch),
    ):
        if value % multiple:
            raise ValueError(f"{name}={value} must be a multiple of {multiple}")
    batches = load_batches(
        dataset,
        workers=workers,
        batch_sampler=_Slices(
            start_index + dp_rank * micro_batch, stop_index, dp_size * micro_batch, micro_batch
        ),
        prefetch_factor=4 if workers else None,
        collate_fn=collate,
    )
    return _counted(
        batches,
        dataset.config.max_bad_fraction,
        size=len(dataset),
        share=-(-len(dataset) // dp_size),
    )


@dataclass
class _Slices:
    """Lists of `size` successive indices, every `stride`-th of them: a DataLoader's batch
    sampler.
    """

    start: int
    stop: int | None
    stride: int
    size: int

    def __iter__(self):
        first = self.start
        while self.stop is None or first < self.stop:
            yield list(range(first, first + self.size))
            first += self.stride


def collate(items):
    """Samples as a batch: tensors stacked, indices a LongTensor (B,), the rest lists."""
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    batch["indices"] = torch.tensor(batch["indices"])
    return batch


def _counted(batches, max_bad_fraction, *, size, share):
    """The batches of one rank's `share` of `size` samples an epoch; what they skipped is logged and
    counted, once by key.
    """
    seen, bad, logged = 0, set(), set()
    for batch in batches:
        skipped = batch.pop("bad")
        seen += len(skipped)
        bad |= {
            entries[0] for entries in skipped if entries
        }  # what a substitute passed over as well has a place of its own
        for entry in (entry for entries in skipped for entry in entries if entry not in logged):
            logged.add(entry)
            log.warning("skipped %s", entry)
        if seen >= min(100, share) and len(bad) > max_bad_fraction * min(seen, size):
            shown, limit = "; ".join(sorted(bad)[:3]), f"data.max_bad_fraction={max_bad_fraction}"
            raise ValueError(
                f"{len(bad)} of {min(seen, size)} samples cannot be used, more than {limit}: "
                f"{shown}"
            )
        yield batch
