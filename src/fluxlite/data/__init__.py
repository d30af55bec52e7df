"""Data: shards of pictures and captions to batches that are a pure function of (config, seed, global sample index).

prepare(config, "train", seed)                       # on every rank; generates fill50k where it is missing
dataset = open_dataset(config, "train", seed)
for batch in make_loader(dataset, global_batch=8, micro_batch=2, dp_rank=0, dp_size=2, start_index=0, workers=2): …
"""

import importlib.util
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fluxlite.controlnet import MODES
from fluxlite.data.cache import CachedSamples, build_cache
from fluxlite.data.loading import load_batches
from fluxlite.data.mock import MockPictures, MockSamples
from fluxlite.data.shards import IMAGES, Samples, cut, expand, locked, mode_number, open_shards

__all__ = [
    "CachedSamples",
    "DataConfig",
    "MockPictures",
    "MockSamples",
    "Samples",
    "build_cache",
    "make_loader",
    "open_dataset",
    "prepare",
]

KINDS = ("mock", "fill50k", "webdataset")
CROPS = ("center", "random")

log = logging.getLogger("fluxlite")


def _path(default, help):
    return field(default=default, metadata={"help": help, "verbatim": True})


@dataclass
class DataConfig:
    """Where samples come from and how they are batched."""

    kind: str = field(default="fill50k", metadata={"help": "mock, fill50k (generated where there are no shards) or webdataset"})
    path: str | None = _path(
        None, "tars: a folder, a glob, a brace pattern or a URL; fill50k: the folder where they are or will be"
    )
    count: int = field(default=50_000, metadata={"help": "fill50k: pictures to generate; mock: samples of an epoch"})
    generate_size: int = field(default=512, metadata={"help": "fill50k: side of the generated pictures in pixels"})
    height: int = field(default=512, metadata={"help": "height that pictures are resized to, in pixels, a multiple of 16"})
    width: int = field(default=512, metadata={"help": "width that pictures are resized to, in pixels, a multiple of 16"})
    crop: str = field(default="center", metadata={"help": "which part stays of a picture of another shape: center or random"})
    flip: bool = field(default=False, metadata={"help": "mirror every other picture, drawn for each sample"})
    caption_field: str = field(
        default="caption", metadata={"help": "field of a sample's json that is its caption; without it, its txt is"}
    )
    caption_dropout: float = field(default=0.1, metadata={"help": "share of samples trained with the empty caption"})
    control: str | None = field(
        default=None, metadata={"help": "a ControlNet's picture: an ending, as png, of a file beside the target; canny: its edges"}
    )
    control_mode: str | None = field(
        default=None,
        metadata={"help": f"kind of control, for union nets: json (its field mode), or {', '.join(MODES)} or a number without one"},
    )
    micro_batch: int = field(default=1, metadata={"help": "samples of a forward pass, for each data-parallel rank"})
    global_batch: int = field(default=8, metadata={"help": "samples of an optimizer step, over all ranks"})
    shuffle: bool = field(default=True, metadata={"help": "a new order each epoch; false: the tars' own"})
    shuffle_window: int = field(default=64, metadata={"help": "tars whose samples are mixed at a time"})
    workers: int = field(default=2, metadata={"help": "loader processes for each rank; 0 loads in the training process"})
    max_bad_fraction: float = field(default=0.01, metadata={"help": "share of unusable samples above which the run stops"})
    cache: str | None = _path(None, "folder for latents and texts that are encoded once; null: encode them each time")
    val_path: str | None = _path(
        None, "tars of the validation set; null: an Energon split, fill50k's held-out pairs, or the last samples"
    )
    val_count: int = field(default=64, metadata={"help": "held-out samples that validation takes"})
    download: str = _path("~/.cache/fluxlite/shards", "folder for tars fetched from URLs")

    @property
    def control_ending(self):
        """The ending of the control's file; None where there is no such file."""
        return None if self.control == "canny" else self.control

    def validate(self):
        """Raise `ValueError` for values that make no sense, here or together."""
        for name, choices in (("kind", KINDS), ("crop", CROPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"data.{name}={getattr(self, name)}: choose one of {', '.join(choices)}")
        if self.kind == "webdataset" and not self.path:
            raise ValueError("data=webdataset needs data.path=: a folder of tars, a glob, a brace pattern or a URL")
        if self.kind == "fill50k" and re.match(r"[A-Za-z][\w+.-]*:", self.path or ""):
            raise ValueError(f"data.path={self.path} must be a folder for data=fill50k; data=webdataset reads URLs")
        if self.control_ending is not None and not re.fullmatch(rf"([a-z0-9_-]+\.)*({'|'.join(IMAGES)})", self.control_ending):
            raise ValueError(
                f"data.control={self.control}: choose {', '.join(IMAGES)}, an ending such as depth.png, canny, or null"
            )
        if self.control == "canny" and not importlib.util.find_spec("cv2"):
            raise ValueError("data.control=canny needs OpenCV: pip install opencv-python-headless, or -e '.[control]'")
        if self.control_mode is not None and not self.control:
            raise ValueError(f"data.control_mode={self.control_mode} says of which kind a control is: set data.control= too")
        if self.control_mode not in (None, "json") and mode_number(self.control_mode) is None:
            raise ValueError(f"data.control_mode={self.control_mode}: choose json, one of {', '.join(MODES)}, or a number")
        for name in ("count", "generate_size", "height", "width", "micro_batch", "global_batch", "shuffle_window", "val_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        for name in ("caption_dropout", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must lie in [0, 1]")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must not be negative")
        if self.cache and (self.crop == "random" or self.flip):
            raise ValueError("data.cache encodes each picture once: set data.crop=center and data.flip=false, or data.cache=null")
        if self.cache and self.kind == "mock":
            raise ValueError("data=mock makes its samples as they are read: set data.cache=null")


# --- opening --------------------------------------------------------------------------------------------------------------------


def fill50k_folder(config, split):
    """Where fill50k's tars of a split are or will be: `path/train`, `path/val`; or `path` itself, where the user put tars there."""
    root = Path(config.path or f"data/fill50k-{config.generate_size}-{config.count}").expanduser()
    return root if split == "train" and any(root.glob("*.tar")) else root / split


def prepare(config, split, seed=0):
    """Generate fill50k's tars of a split where there are none; every rank calls it: one works, the others wait.

    The pictures are the same whatever the `seed` of a run, so that runs share them. Raises `ValueError` where pictures of another
    count or size were generated before.
    """
    from fluxlite.data import fill50k

    if config.kind != "fill50k" or (split == "val" and config.val_path):
        return
    folder, held_out = fill50k_folder(config, split), split == "val"
    count = config.val_count if held_out else config.count
    if not any(folder.glob("*.tar")):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{split}.lock"):
            if not any(folder.glob("*.tar")):
                if folder.is_dir() and any(folder.iterdir()):
                    raise ValueError(f"{folder} holds no .tar but other files: empty it, or set another data.path=")
                for abandoned in folder.parent.glob(f".{split}-*"):  # by a run that was killed
                    shutil.rmtree(abandoned, ignore_errors=True)
                workers = min(os.cpu_count() or 1, count // 500)
                options = dict(size=config.generate_size, seed=int(held_out), held_out=held_out, workers=workers)
                fill50k.write_shards(
                    fill50k.generated_samples(count, **options),
                    folder,
                    count=count,
                    about={"count": count, "size": config.generate_size},
                )
    _check_generated(config, folder, count, at_least=held_out)


def _check_generated(config, folder, count, *, at_least):
    """Compare `fill50k.json`, which generated tars have, with what is asked for; a larger validation set will do."""
    note = folder / "fill50k.json"
    if not note.is_file():
        return
    old, size = json.loads(note.read_text()), config.generate_size
    if old["size"] != size or (old["count"] < count if at_least else old["count"] != count):
        setting = "data.val_count" if at_least else "data.count"
        raise ValueError(
            f"{folder} holds {old['count']} pictures of {old['size']} pixels, but {setting}={count} and data.generate_size={size}: "
            "remove that folder, or set another data.path="
        )


def find_shards(config, split):
    """The shards of a split. Without a validation set of its own, the last `val_count` samples are validation's."""
    limit = dict(max_bad_fraction=config.max_bad_fraction, control=config.control_ending)
    places = dict(setting="data.path", download=config.download)
    if split == "val" and config.val_path:
        places["setting"] = "data.val_path"
        paths = expand(config.val_path, "val", **places) or expand(config.val_path, "train", **places)
        return open_shards(paths, setting=f"data.val_path={config.val_path}", **limit)
    if config.kind == "fill50k":
        folder = fill50k_folder(config, split)
        return open_shards(sorted(folder.glob("*.tar")), setting=f"data.path={folder}", **limit)
    held_out = [] if config.val_path else expand(config.path, "val", **places)
    if split == "val" and held_out:
        return open_shards(held_out, setting=f"data.path={config.path}", **limit)
    shards = open_shards(expand(config.path, "train", **places), setting=f"data.path={config.path}", **limit)
    if config.val_path or held_out:
        return shards
    total = sum(len(shard.keys) for shard in shards)
    start = total - config.val_count
    if start < 1:
        raise ValueError(f"data.path={config.path} holds {total} samples: set data.val_count below that, or data.val_path=")
    if split == "train":
        log.info("the last %d of %d samples are kept for validation", config.val_count, total)
    return cut(shards, 0, start) if split == "train" else cut(shards, start, total)


def open_dataset(config, split, seed):
    """The samples of "train" or "val" by global index; `prepare` comes first. Raises `ValueError` where there are too few."""
    if config.kind == "mock":
        return MockPictures(config, split=split, seed=seed)
    shards = find_shards(config, split)
    if split == "train":
        return Samples(config, shards, seed=seed, training=True)
    total = sum(len(shard.keys) for shard in shards)
    if total < config.val_count:
        raise ValueError(f"the validation set holds {total} samples: set data.val_count={total} or less")
    return Samples(config, cut(shards, 0, config.val_count), seed=seed, training=False)


# --- batching -------------------------------------------------------------------------------------------------------------------


def make_loader(dataset, *, global_batch, micro_batch, dp_rank, dp_size, start_index, stop_index=None, workers=0):
    """An iterator over one rank's micro-batches from `start_index`, a multiple of `global_batch`, to `stop_index` or for ever.

    Step s, slice a, rank r takes `micro_batch` indices from s·global_batch + (a·dp_size + r)·micro_batch on. Batches are
    dictionaries: images (B, 3, H, W) and captions, or mean, logvar, txt and pooled, stacked; indices (B,) and keys; with
    `data.control` also controls (B, 3, H, W), or control_mean and control_logvar, and perhaps modes (B,) int64. Raises `ValueError`
    where more than `max_bad_fraction` of 100 samples or more, or of an epoch, are bad.
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
        batch_sampler=_Slices(start_index + dp_rank * micro_batch, stop_index, dp_size * micro_batch, micro_batch),
        prefetch_factor=4 if workers else None,
        collate_fn=collate,
    )
    return _counted(batches, dataset.config.max_bad_fraction, size=len(dataset), share=-(-len(dataset) // dp_size))


@dataclass
class _Slices:
    """Lists of `size` successive indices, every `stride`-th of them: a DataLoader's batch sampler."""

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
    """The batches of one rank's `share` of `size` samples an epoch; what they skipped is logged and counted, once by key."""
    seen, bad, logged = 0, set(), set()
    for batch in batches:
        skipped = batch.pop("bad")
        seen += len(skipped)
        bad |= {entries[0] for entries in skipped if entries}  # what a substitute passed over as well has a place of its own
        for entry in (entry for entries in skipped for entry in entries if entry not in logged):
            logged.add(entry)
            log.warning("skipped %s", entry)
        if seen >= min(100, share) and len(bad) > max_bad_fraction * min(seen, size):
            shown, limit = "; ".join(sorted(bad)[:3]), f"data.max_bad_fraction={max_bad_fraction}"
            raise ValueError(f"{len(bad)} of {min(seen, size)} samples cannot be used, more than {limit}: {shown}")
        yield batch
