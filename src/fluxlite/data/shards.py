"""WebDataset tars, read by position: an index of every tar, an order that is a pure function of (seed, epoch), samples on top.

A tar's headers are read once, when it is opened; after that any sample is one or two reads away. So the sample of a global index
is the same on any mesh and with any workers, and a resumed run reads nothing that was consumed.
"""

import glob
import hashlib
import json
import logging
import os
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import webdataset
from braceexpand import braceexpand

from fluxlite import draws
from fluxlite.data.images import BadSample, decode, resize_crop

IMAGES = ("jpg", "jpeg", "webp", "png")  # in this order: beside a jpg, a png is the control
MAX_SUBSTITUTES = 1000

log = logging.getLogger("fluxlite")


# --- which tars -----------------------------------------------------------------------------------------------------------------


def expand(path, download):
    """The tars that `path` names, as local files: a folder, a glob, a brace pattern or a URL that webdataset opens."""
    found = []
    for part in path.split("::"):
        for name in braceexpand(part) if "{" in part else [part]:
            if name.startswith(("pipe:", "file:")) or "://" in name:
                found.append(fetch(name, Path(download).expanduser()))
            elif Path(name).expanduser().is_dir():
                found += sorted(Path(name).expanduser().rglob("*.tar"))
            else:
                found += sorted(Path(p) for p in glob.glob(str(Path(name).expanduser()), recursive=True))
    missing = [str(f) for f in found if not Path(f).is_file()]
    if not found or missing:
        raise ValueError(f"data.path={path} names no tar: give a folder of .tar files, a glob, a brace pattern or a URL")
    return found


def fetch(url, folder):
    """A URL's bytes as a file in `folder`, fetched once, written aside and renamed."""
    target = folder / (hashlib.blake2b(url.encode(), digest_size=8).hexdigest() + ".tar")
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s to %s", url, target)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as aside:
        try:
            with webdataset.gopen(url, "rb") as stream:
                shutil.copyfileobj(stream, aside)
        except OSError as error:
            os.unlink(aside.name)
            raise ValueError(f"data.path: {url} cannot be read: {error}") from None
    os.replace(aside.name, target)
    return target


def energon_split(folder, part):
    """The tars of one part ("train", "val") of an Energon `.nv-meta/split.yaml`, or None where there is none."""
    import yaml

    file = Path(folder).expanduser() / ".nv-meta" / "split.yaml"
    if not file.is_file():
        return None
    patterns = (yaml.safe_load(file.read_text()).get("split_parts") or {}).get(part) or []
    return [file.parent.parent / name for pattern in patterns for name in braceexpand(pattern)]


# --- what is in them ------------------------------------------------------------------------------------------------------------


def index_tar(path):
    """The samples of a tar in their order: a list of (key, {extension: (offset, size)}). Raises `ValueError` for a broken tar."""
    samples = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                key, _, extension = name.partition(".")
                samples.setdefault(f"{folder}/{key}" if folder else key, {})[extension.lower()] = member.offset_data, member.size
            size = os.path.getsize(path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole tar: {error}") from None
    for key, members in samples.items():
        if any(offset + length > size for offset, length in members.values()):
            raise ValueError(f"{path} is not a whole tar: it ends within {key}")
    return list(samples.items())


class Shards:
    """The usable samples of some tars, numbered through; those without a picture or a caption are left out, counted and logged."""

    def __init__(self, paths):
        self.paths = [Path(p) for p in paths]
        with ThreadPoolExecutor(16) as pool:
            indexed = list(pool.map(index_tar, self.paths))
        self.samples, self.skipped, sizes = [], [], []
        for shard, samples in enumerate(indexed):
            before = len(self.samples)
            for key, members in samples:
                image = next((e for e in IMAGES if e in members), None)
                text = next((e for e in ("txt", "json") if e in members), None)
                if image and text:
                    self.samples.append((shard, key, members, image, text))
                else:
                    self.skipped.append(f"{self.paths[shard].name}/{key}")
            sizes.append(len(self.samples) - before)
        self.sizes = np.array(sizes)
        if self.skipped:
            log.warning(
                "%d samples have no picture or no caption and are skipped: %s", len(self.skipped), ", ".join(self.skipped[:5])
            )
        if not self.samples:
            raise ValueError(
                f"{self.paths[0].parent} holds no sample with a picture ({', '.join(IMAGES)}) and a caption (txt, json)"
            )
        self.files = {}

    def __len__(self):
        return len(self.samples)

    def __getstate__(self):
        return self.__dict__ | {"files": {}}

    def key(self, number):
        shard, key, *_ = self.samples[number]
        return f"{self.paths[shard].name}/{key}"

    def read(self, number, extension):
        """The bytes of one member of a sample."""
        shard, _, members, *_ = self.samples[number]
        if shard not in self.files:
            self.files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        offset, size = members[extension]
        return os.pread(self.files[shard], size, offset)

    def image(self, number):
        """The picture of a sample as RGB; raises `BadSample`."""
        return decode(self.read(number, self.samples[number][3]))

    def caption(self, number, caption_field):
        """The caption of a sample, from its txt or a field of its json; raises `BadSample`."""
        kind = self.samples[number][4]
        try:
            text = self.read(number, kind).decode()
            if kind == "json":
                text = json.loads(text)[caption_field]
        except (ValueError, KeyError, TypeError) as error:
            raise BadSample(f"no caption: {error!r}") from None
        if not isinstance(text, str) or not text.strip():
            raise BadSample("an empty caption")
        return text.strip()

    def digest(self):
        """A digest of the tars' names, sizes and contents' index."""
        digest = hashlib.blake2b(digest_size=8)
        for path in self.paths:
            digest.update(f"{path.name}/{os.path.getsize(path)}".encode())
        for shard, key, members, *_ in self.samples:
            digest.update(f"{shard}/{key}/{sorted(members.items())}".encode())
        return digest.hexdigest()


class Order:
    """Which sample a global index is: each epoch permutes the shards, then the samples within windows of them."""

    def __init__(self, sizes, *, seed, shuffle, window, limit=None, start=0):
        self.sizes, self.seed, self.shuffle, self.window = sizes, seed, shuffle, window
        self.start, self.length = start, (limit if limit is not None else int(sizes.sum()) - start)
        self.epoch, self.numbers = None, None

    def __len__(self):
        return self.length

    def __call__(self, global_index):
        """The number of the sample at a global index."""
        epoch, position = divmod(int(global_index), self.length)
        if epoch != self.epoch:
            self.epoch, self.numbers = epoch, self._permutation(epoch)
        return int(self.numbers[position])

    def _permutation(self, epoch):
        numbers = np.arange(self.start, self.start + self.length)
        if not self.shuffle:
            return numbers
        rng = np.random.default_rng((self.seed, epoch))
        first = np.concatenate([[0], np.cumsum(self.sizes)])
        shards = rng.permutation(len(self.sizes))
        mixed = []
        for i in range(0, len(shards), self.window):
            window = np.concatenate([np.arange(first[s], first[s + 1]) for s in shards[i : i + self.window]])
            mixed.append(rng.permutation(window))
        mixed = np.concatenate(mixed)
        return mixed[(mixed >= self.start) & (mixed < self.start + self.length)]


# --- samples --------------------------------------------------------------------------------------------------------------------


class Samples:
    """Pictures and captions by global index: a dictionary of image (3, H, W), caption, index, key, and the keys skipped as bad.

    A bad sample's place is taken by the next good one in the order.
    """

    def __init__(self, config, shards, order, *, seed, training):
        self.config, self.shards, self.order, self.seed, self.training = config, shards, order, seed, training

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        bad = []
        for candidate in range(index, index + MAX_SUBSTITUTES):
            number = self.order(candidate)
            try:
                image, caption = self.load(number, index)
                break
            except BadSample as error:
                bad.append(f"{self.shards.key(number)} ({error})")
        else:
            raise ValueError(f"{MAX_SUBSTITUTES} samples in a row cannot be used; the first is {bad[0]}")
        if self.training and drops_caption(self.config, self.seed, index):
            caption = ""
        return {"images": image, "captions": caption, "indices": index, "keys": self.shards.key(number), "bad": bad}

    def load(self, number, index):
        """Sample `number` as (image, caption), its crop and flip keyed by the global index; raises `BadSample`."""
        config = self.config
        caption = self.shards.caption(number, config.caption_field)
        crop, flip = (config.crop, config.flip) if self.training else ("center", False)
        generator = draws.generator(self.seed, index, "crop")
        image = resize_crop(self.shards.image(number), config.height, config.width, crop=crop, flip=flip, generator=generator)
        return image, caption


def drops_caption(config, seed, index):
    """Whether the sample of a global index is trained with the empty caption."""
    return bool(draws.uniform(seed=seed, indices=[index], stream="dropout") < config.caption_dropout)
