"""Which data set a configuration names: made up, generated, or tars or folders found and
indexed.
"""

import logging
import os
from functools import partial
from pathlib import Path

from fluxlite.cli.atomic import naming_setting
from fluxlite.cli.descriptions import read_json
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import expand_home, typed_description
from fluxlite.data import fill50k
from fluxlite.data.buckets import check_masks, log_samples, shape_shards
from fluxlite.data.folders import index_folder
from fluxlite.data.indexed import cut_shards, open_shards
from fluxlite.data.mock import MockPictures
from fluxlite.data.parts import config_parts
from fluxlite.data.places import expand_places, warn_of_repeats
from fluxlite.data.shards import Samples
from fluxlite.data.tars import index_tar

log = logging.getLogger("fluxlite")


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


def prepare_data(config, split):
    """Generate fill50k's tars of a split where there are none.

    Every rank calls it: one works, the others wait. The pictures are the same for every run,
    whatever its seed, so that runs share them. Raises `ValueError` where pictures of another count
    or size were generated before, and for a folder with files of the user's: nothing is written
    into that.
    """
    if config.kind != "fill50k" or (split == "val" and config.val_path):
        return
    folder, held_out = fill50k_folder(config, split), split == "val"
    count = config.val_count if held_out else config.count
    _check_ours(fill50k_root(config))
    if not any(folder.glob("*.tar")):
        with naming_setting(f"data.path={fill50k_root(config)}", "name a folder of your own"):
            folder.parent.mkdir(parents=True, exist_ok=True)
        workers = min(os.cpu_count() or 1, count // 500)
        options = dict(seed=int(held_out), held_out=held_out, workers=workers)
        samples = fill50k.generated_samples(count, size=config.generate_size, **options)
        about = {"count": count, "size": config.generate_size}
        fill50k.write_shards(samples, folder, count=count, about=about)
    _check_generated(config, folder, count, at_least=held_out)


def _check_ours(root):
    """Raise `ValueError` unless fill50k's folder is new, or holds only what the generator wrote."""
    names = sorted(p.name for p in root.iterdir()) if root.exists() else []
    if fill50k.NOTE in names:
        return
    foreign = [n for n in names if n[0] != "." and not (root / n / fill50k.NOTE).is_file()]
    if foreign:
        raise ValueError(
            f"data.path={root} holds {foreign[0]}, which is not data=fill50k's: set "
            "data=webdataset to train on tars of "
            "your own, or name a new folder to generate circles in"
        )


def _check_generated(config, folder, count, *, at_least):
    """Raise `ValueError` unless tars are as asked for; a larger validation set will do."""
    note, size = folder / fill50k.NOTE, config.generate_size
    old = typed_description(note, fill50k.GeneratedDescription, read_json(note))
    if old.count is None:  # imported from the original download
        return
    if old.size != size or (old.count < count if at_least else old.count != count):
        setting = "data.val_count" if at_least else "data.count"
        raise ValueError(
            f"{folder} holds {old.count} pictures of {old.size} pixels, but {setting}={count} and "
            f"data.generate_size={size}: "
            "remove that folder, or set another data.path="
        )


def find_shards(config, split, places):
    """The shards of a split; `places` as `open_dataset` has them.

    Without a validation set of its own, the last `val_count` samples are validation's.
    """
    expanded = partial(_expanded, config, places)
    if split == "val" and config.val_path:
        found = expanded("val_path", "val") or expanded("val_path", "train")
        _warn_of_overlap(config, found, places)
        return _opened(config, "val_path", found)
    if config.kind == "fill50k":
        folder, parts = fill50k_folder(config, split), config_parts(config)
        found = [(str(path), parts, 0) for path in sorted(folder.glob("*.tar"))]
        return _opened(config, "path", found, where=folder)
    held_out = [] if config.val_path else expanded("path", "val")
    if split == "val" and held_out:
        return _opened(config, "path", held_out)
    found = expanded("path", "train")
    shards, numbers = _opened(config, "path", found), [number for *_, number in found]
    return shards if config.val_path or held_out else _split_off(config, split, shards, numbers)


def _expanded(config, places, name, split):
    """[(path, `SampleParts`, number of the place)] of the tars or folders that `data.path` or
    `data.val_path` names for a split.

    They are kept in `places`, by (name, split), and taken from there the next time.
    """
    if (name, split) not in places:
        where, setting = getattr(config, name), f"data.{name}"
        parts_of = partial(config_parts, config)
        if config.kind == "folder":
            named = [expand_home(path, setting) for path in where.split("::")]
            found = [(path, parts_of(i), i) for i, path in enumerate(named) if split == "train"]
            warn_of_repeats([path for path, *_ in found], setting)
        else:
            options = dict(setting=setting, download=config.download, check=index_tar)
            found = expand_places(where, split, parts_of=parts_of, **options)
        places[name, split] = found
    return places[name, split]


def _opened(config, name, found, where=None):
    """The shards of tars or folders that the setting `name` gave, indexed."""
    setting = f"data.{name}={where or getattr(config, name)}"
    if not found:
        raise ValueError(
            f"{setting} names no .tar: give a folder of tars, a glob, a brace pattern or a URL"
        )
    index = index_folder if config.kind == "folder" else index_tar
    places = [(path, parts, config.options_of(number)) for path, parts, number in found]
    return open_shards(places, index, setting=setting, max_bad_fraction=config.max_bad_fraction)


def _split_off(config, split, shards, numbers):
    """The part of "train" or "val" where validation's samples are the last of the first place of
    `data.path`; `numbers` say of which place each shard is.
    """
    own = [shard for shard, number in zip(shards, numbers) if number == numbers[0]]
    total = sum(len(shard.keys) for shard in own)
    start = total - config.val_count
    if start < 1:
        fewer = (
            "set data.val_count below that, or " if total > 1 else "none is left to hold out: set "
        )
        raise ValueError(
            f"data.path={config.places()[0]} holds {total} samples: {fewer}data.val_path="
        )
    if split == "val":
        return cut_shards(own, start, total)
    log.info("the last %d of %d samples are kept for validation", config.val_count, total)
    return cut_shards(own, 0, start) + shards[len(own) :]


def _warn_of_overlap(config, found, places):
    """Say so where a tar is of the training set and of the validation set."""
    trained = {os.path.realpath(path) for path in training_paths(config, places)}
    own = [(path, os.path.realpath(path)) for path, *_ in found]
    shared = [path for path, real in own if trained & {real, *map(str, Path(real).parents)}]
    if shared:
        warn_for_all(
            "%d of %d places of data.val_path are trained on too, %s first: validation will look "
            "better than it is",
            *(len(shared), len(found), shared[0]),
        )


def training_paths(config, places):
    """The training set's tars or folders."""
    if config.kind == "fill50k":
        return [str(path) for path in fill50k_folder(config, "train").glob("*.tar")]
    return [path for path, *_ in _expanded(config, places, "path", "train")]


def open_dataset(config, split, seed, places=None):
    """The data set of "train" or "val"; `prepare_data` comes first.

    `places`, a dictionary for both sets of a run, keeps what their settings were expanded to:
    servers are asked once. Raises `ValueError` where there are too few samples.
    """
    places = {} if places is None else places
    if config.kind == "mock":
        return MockPictures(config, split=split, seed=seed)
    shards = find_shards(config, split, places)
    if split == "train":
        samples = Samples(config, shape_shards(config, shards), seed=seed, training=True)
        check_masks(samples)
        log_samples(samples)
        return samples
    total = sum(len(shard.keys) for shard in shards)
    if total < config.val_count:
        raise ValueError(
            f"the validation set holds {total} samples: set data.val_count={total} or less"
        )
    return Samples(config, cut_shards(shards, 0, config.val_count), seed=seed, training=False)
