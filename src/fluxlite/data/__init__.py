"""Data: shards of pictures and captions to batches that are a pure function of (config, seed, global sample index)."""

import fcntl
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fluxlite.data import fill50k
from fluxlite.data.cache import CachedSamples, build_cache
from fluxlite.data.mock import MockPictures, MockSamples
from fluxlite.data.shards import Order, Samples, Shards, energon_split, expand

__all__ = ["CachedSamples", "DataConfig", "MockPictures", "MockSamples", "build_cache", "make_loader", "open_dataset", "prepare"]

log = logging.getLogger("fluxlite")


def _path(default, help):
    return field(default=default, metadata={"help": help, "verbatim": True})


@dataclass
class DataConfig:
    """Where samples come from and how they are batched."""

    kind: str = field(default="fill50k", metadata={"help": "mock, fill50k (generated where there are no shards) or webdataset"})
    path: str | None = _path(None, "tars: a folder, a glob, a brace pattern or a URL; for fill50k also where to generate")
    count: int = field(default=50_000, metadata={"help": "fill50k: pictures to generate; mock: samples of an epoch"})
    generate_size: int = field(default=512, metadata={"help": "fill50k: side of the generated pictures in pixels"})
    height: int = field(default=512, metadata={"help": "height that pictures are resized to, in pixels, a multiple of 16"})
    width: int = field(default=512, metadata={"help": "width that pictures are resized to, in pixels, a multiple of 16"})
    crop: str = field(default="center", metadata={"help": "which part stays of a picture of another shape: center or random"})
    flip: bool = field(default=False, metadata={"help": "mirror every other picture"})
    caption_field: str = field(default="caption", metadata={"help": "field of a sample's json that holds its caption"})
    caption_dropout: float = field(default=0.1, metadata={"help": "share of samples trained with the empty caption"})
    micro_batch: int = field(default=1, metadata={"help": "samples a process takes at once"})
    global_batch: int = field(default=8, metadata={"help": "samples of an optimizer step, over all processes"})
    shuffle: bool = field(default=True, metadata={"help": "a new order each epoch"})
    shuffle_window: int = field(default=64, metadata={"help": "tars whose samples are mixed at a time"})
    workers: int = field(default=2, metadata={"help": "loader processes for each training process"})
    max_bad_fraction: float = field(default=0.01, metadata={"help": "share of unusable samples at which the run stops"})
    cache: str | None = _path(None, "folder for latents and text encoded once; null encodes every time")
    val_path: str | None = _path(
        None, "tars of the validation set; null: an Energon split, fill50k's held-out pairs, or the last samples"
    )
    val_count: int = field(default=64, metadata={"help": "samples of the validation set"})
    download: str = _path("~/.cache/fluxlite/shards", "folder for tars fetched from URLs")

    def validate(self):
        """Raise `ValueError` for values that make no sense."""
        if self.kind not in ("mock", "fill50k", "webdataset"):
            raise ValueError(f"data.kind={self.kind}: choose mock, fill50k or webdataset")
        if self.crop not in ("center", "random"):
            raise ValueError(f"data.crop={self.crop}: choose center or random")
        if self.kind == "webdataset" and not self.path:
            raise ValueError("data=webdataset needs data.path=: a folder of tars, a glob, a brace pattern or a URL")
        for name in ("count", "generate_size", "micro_batch", "global_batch", "shuffle_window", "val_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        for name in ("caption_dropout", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be in [0, 1]")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must not be negative")
        if self.cache and (self.crop == "random" or self.flip):
            raise ValueError("data.cache encodes each picture once: set data.crop=center data.flip=false, or data.cache=null")
        if self.cache and self.kind == "mock":
            raise ValueError("data=mock makes its samples on the fly: set data.cache=null")


# --- opening --------------------------------------------------------------------------------------------------------------------


def fill50k_folder(config):
    """Where generated shards lie or will lie."""
    return Path(config.path or f"data/fill50k-{config.generate_size}-{config.count}").expanduser()


def has_own_shards(config):
    """Whether fill50k's path holds tars that the user put there."""
    return any(fill50k_folder(config).glob("*.tar"))


def prepare(config, split, seed=0):
    """Generate fill50k's shards of a split where there are none; safe when processes meet: one works, the others wait.

    Raises `ValueError` where shards of another count or size lie there.
    """
    if config.kind != "fill50k" or (split == "train" and has_own_shards(config)) or (split == "val" and config.val_path):
        return
    folder = fill50k_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    count = config.count if split == "train" else config.val_count
    wanted = {"count": count, "size": config.generate_size, "seed": 0}
    with open(folder / f".{split}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        note = folder / f"{split}.json"
        if any((folder / split).glob("*.tar")):
            found = json.loads(note.read_text()) if note.is_file() else wanted
            if found != wanted:
                raise ValueError(f"{folder / split} was generated with {found}, not {wanted}: remove it, or set another data.path=")
            return
        note.write_text(json.dumps(wanted) + "\n")
        held_out = split == "val"
        samples = fill50k.generated_samples(count, size=config.generate_size, seed=int(held_out), held_out=held_out)
        fill50k.write_shards(samples, folder / split, count=count)


def split_paths(config, split):
    """The tars of a split, or None where the validation set is cut from the training tars' end."""
    if split == "val" and config.val_path:
        return expand(config.val_path, config.download)
    if config.kind == "fill50k":
        if split == "train" and has_own_shards(config):
            return sorted(fill50k_folder(config).glob("*.tar"))
        return expand(str(fill50k_folder(config) / split), config.download)
    listed = energon_split(config.path, split)
    if listed:
        return expand("::".join(map(str, listed)), config.download)
    return expand(config.path, config.download) if split == "train" else None


def open_dataset(config, split, seed):
    """The `Samples` of "train" or "val"; `prepare` must have run. Raises `ValueError` where there are none."""
    if config.kind == "mock":
        return MockPictures(config, split=split, seed=seed)
    paths, training = split_paths(config, split), split == "train"
    cut = 0
    if config.kind == "webdataset" and not config.val_path and not energon_split(config.path, "val"):
        cut = config.val_count
    shards = Shards(paths or split_paths(config, "train"))
    if cut and len(shards) <= cut:
        raise ValueError(
            f"data.path={config.path} holds {len(shards)} samples, and data.val_count={cut} are for validation: set fewer"
        )
    whole = len(shards)
    start, limit = (0, whole - cut) if training else ((whole - cut) if cut else 0, None)
    if cut and training:
        log.info("the last %d of %d samples are held out for validation", cut, whole)
    order = Order(
        shards.sizes, seed=seed, shuffle=training and config.shuffle, window=config.shuffle_window, start=start, limit=limit
    )
    if not training and len(order) < config.val_count:
        raise ValueError(f"the validation set holds {len(order)} samples: set data.val_count={len(order)} or less")
    return Samples(config, shards, order, seed=seed, training=training)


# --- batching -------------------------------------------------------------------------------------------------------------------


def collate(items):
    """A list of samples as a batch: tensors stacked, indices a LongTensor, the rest lists; the bad keys of all."""
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    batch["indices"] = torch.tensor(batch["indices"])
    batch["bad"] = [key for keys in batch["bad"] for key in keys]
    return batch


def _one_thread(_worker):
    torch.set_num_threads(1)


def make_loader(dataset, *, global_batch, micro_batch, dp_rank, dp_size, start_index, stop_index=None, workers=0):
    """Batches of one rank, from the global index `start_index` (a multiple of global_batch) on, for ever or to `stop_index`.

    Step s, slice a, rank r takes the indices s·global_batch + (a·dp_size + r)·micro_batch and the micro_batch - 1 after it. Raises
    `ValueError` when more than max_bad_fraction of 100 samples or more are bad.
    """

    def indices():
        first = start_index + dp_rank * micro_batch
        while stop_index is None or first < stop_index:
            yield list(range(first, first + micro_batch))
            first += dp_size * micro_batch

    if global_batch % (micro_batch * dp_size) or start_index % global_batch:
        raise ValueError(
            f"global_batch={global_batch} must be a multiple of {micro_batch} x {dp_size}, start_index={start_index} one of it"
        )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_Batches(indices),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
    )
    return _counted(loader, dataset.config.max_bad_fraction)


class _Batches:
    """An iterable of index lists that a DataLoader can take as its batch sampler."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


def _counted(loader, max_bad_fraction):
    """Batches, with bad samples logged once each and counted against the limit."""
    seen, bad = 0, set()
    for batch in loader:
        seen += len(batch["indices"])
        for key in batch.pop("bad"):
            if key not in bad:
                bad.add(key)
                log.warning("skipped %s", key)
        if seen >= 100 and len(bad) > max_bad_fraction * seen:
            few = ", ".join(sorted(bad)[:3])
            raise ValueError(f"{len(bad)} of {seen} samples cannot be used, over data.max_bad_fraction={max_bad_fraction}: {few}")
        yield batch
