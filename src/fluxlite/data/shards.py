"""WebDataset tars, read by position: which tars, an index of each, and an order that is a pure function of (seed, epoch).

A tar's headers are read once, when it is opened; after that each member of any sample is one read away. So the sample of a global
index is the same on any mesh and with any workers, and a resumed run reads nothing that was consumed.
"""

import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import torch

from fluxlite import draws
from fluxlite.controlnet import MODES
from fluxlite.data.images import BadSample, decode, edges, frame, pixels

IMAGES = ("jpg", "jpeg", "webp", "png")  # in this order: beside a jpg, a png is the control
IMAGE, TEXT, JSON, CONTROL = range(4)  # columns of a shard's `spans`
MAX_IN_A_ROW = 100  # bad samples, before a wrong setting is a likelier reason than bad luck

log = logging.getLogger("fluxlite")


class Kept:
    """A dictionary of the last `limit` values that were made; in another process it starts empty."""

    def __init__(self, limit):
        self.limit, self.values = limit, {}

    def get(self, key, make):
        if key not in self.values:
            while len(self.values) >= self.limit:
                del self.values[next(iter(self.values))]
            self.values[key] = make()
        return self.values[key]

    def __reduce__(self):
        return Kept, (self.limit,)


# --- which tars -----------------------------------------------------------------------------------------------------------------


def expand(where, split, *, setting, download):
    """Local paths of the tars that `where` names for a split, in order; URLs are fetched first.

    `where` is a folder, a file, a glob, a brace pattern or a URL, or several with `::` between them. A folder with an Energon
    `.nv-meta/split.yaml` gives the tars of that split; any other place belongs to "train". Raises `ValueError`, naming `setting`.
    """
    found = []
    for pattern in where.split("::"):
        for name in _braces(pattern, setting):
            if re.match(r"(pipe|file):|[A-Za-z][\w+.-]*://", name):
                found += [name] if split == "train" else []
            else:
                found += _local(os.path.expanduser(name), split, setting)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda name: _fetched(name, Path(download).expanduser(), setting), found))


def _braces(pattern, setting):
    from braceexpand import UnbalancedBracesError, braceexpand

    if os.path.exists(os.path.expanduser(pattern)):  # braces may be part of a name
        return [pattern]
    try:
        return list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError as error:
        raise ValueError(f"{setting}={pattern}: {error}") from None


def _local(name, split, setting):
    if os.path.isdir(name):
        listed = energon_split(name, split, setting)
        if listed is not None:
            return listed
        found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        if not found:
            raise ValueError(f"{setting}={name} holds no .tar: name the folder of the tars itself, a glob or a URL")
    elif os.path.isfile(name):
        found = [name]
    else:
        found = [tar for match in sorted(glob.glob(name, recursive=True)) for tar in _local(match, "train", setting)]
        if not found:
            raise ValueError(f"{setting}={name} does not exist: name a folder of tars, a glob, a brace pattern or a URL")
    return found if split == "train" else []


def energon_split(folder, split, setting):
    """The tars of one part of an Energon dataset's `.nv-meta/split.yaml`; None where the folder has none."""
    file = Path(folder) / ".nv-meta" / "split.yaml"
    if not file.is_file():
        return None
    import yaml
    from braceexpand import braceexpand

    content = yaml.safe_load(file.read_text()) or {}
    patterns, excluded = (content.get("split_parts") or {}).get(split) or [], content.get("exclude") or []
    single = [name for name in excluded if not str(name).endswith(".tar")]
    if single:
        raise ValueError(
            f"{setting}: {file} excludes single samples ({single[0]}), but only whole tars can be: remove them from it"
        )
    excluded = {name for pattern in excluded for name in braceexpand(pattern)}
    names = [name for pattern in patterns for name in braceexpand(pattern) if name not in excluded]
    missing = [name for name in names if not (Path(folder) / name).is_file()]
    if missing:
        raise ValueError(f"{setting}={folder}: {file} lists {len(missing)} tars that are not there, {missing[0]} among them")
    return [str(Path(folder) / name) for name in names]


def _fetched(name, folder, setting):
    """A local path as it is; a URL as the local file that it was fetched to, once."""
    if name.startswith("file:"):
        return url2pathname(urlparse(name).path)
    if not re.match(r"pipe:|[A-Za-z][\w+.-]*://", name):
        return name
    tail = re.sub(r"[^\w.-]+", "_", urlparse(name).path.rsplit("/")[-1]).removesuffix(".tar")[-60:]
    target = folder / f"{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}-{tail}.tar"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{target.name}.lock"):
            if not target.is_file():
                _download(name, target, setting)
    return str(target)


def _download(url, target, setting):
    """Fetch a tar aside, check that it is whole, and rename it."""
    import webdataset

    log.info("fetching %s to %s", url, target)
    number, aside = tempfile.mkstemp(dir=target.parent, prefix=".fetching-")
    try:
        with open(number, "wb") as file, webdataset.gopen(url, "rb") as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
        index_tar(aside)
        os.chmod(aside, 0o644)
        os.replace(aside, target)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{setting}: {url} cannot be fetched ({error}); check it, or give pipe:COMMAND that prints the tar"
        ) from error
    finally:
        Path(aside).unlink(missing_ok=True)


@contextmanager
def locked(path):
    """Let one process of this machine, or of those that share the file system, in at a time, where the file system has locks."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # then processes work side by side, and their renames decide
            log.warning("%s cannot be locked: %s", path, error)
        yield


# --- what is in them ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shard:
    """The usable samples of one tar: n keys, and where each one's picture, txt, json and, if it was asked for, control lie.

    A size of -1 is none.
    """

    path: str
    size: int
    keys: np.ndarray  # (n,) bytes
    spans: np.ndarray  # (n, 3 or 4, 2) offset and size
    skipped: tuple  # "key: reason" of the samples without a picture, a caption or a control

    @property
    def name(self):
        return Path(self.path).stem


def index_tar(path, control=None):
    """The `Shard` of a tar; with `control`, the picture of that ending is a sample's control and never its target.

    Raises `ValueError` for one that is damaged, cut short or compressed.
    """
    about = os.stat(path)
    return _index(str(path), about.st_size, about.st_mtime_ns, control)


@cache  # validation is often cut from the training set, and opened more than once
def _index(path, size, _modified, control):
    samples, keys, spans, skipped = {}, [], [], []
    targets = [kind for kind in IMAGES if kind != control]
    for name, offset, length in _members(path):
        folder, _, base = name.removeprefix("./").rpartition("/")
        stem, _, extension = base.partition(".")
        if stem and extension and not folder.startswith(".") and "/." not in folder:
            samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[extension.lower()] = offset, length
    for key, members in samples.items():
        image = next((members[kind] for kind in targets if kind in members), None)
        if image is None:
            skipped.append(f"{key}: no picture ({', '.join(targets)})")
        elif "txt" not in members and "json" not in members:
            skipped.append(f"{key}: no caption (txt, json)")
        elif control and control not in members:
            skipped.append(f"{key}: no control ({control})")
        else:
            keys.append(key.encode())
            columns = [image, members.get("txt", (0, -1)), members.get("json", (0, -1))]
            spans.append(columns + [members[control]] if control else columns)
    return Shard(
        path,
        size,
        np.array(keys, f"S{max(map(len, keys), default=1)}"),
        np.array(spans, np.int64).reshape(-1, 4 if control else 3, 2),
        tuple(skipped),
    )


def _members(path):
    """Name, offset and size of each file in a tar. tarfile takes a damaged header for the end, so the end's mark is looked at."""
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            while (member := tar.next()) is not None:
                tar.members.clear()
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole, uncompressed tar ({error}): fetch or write it again") from None


def open_shards(paths, *, setting, max_bad_fraction, control=None):
    """Index tars in parallel, as `index_tar` does.

    Raises `ValueError`, naming `setting`, where nothing or too little in them is usable.
    """
    if not paths:
        raise ValueError(f"{setting} names no .tar: give a folder of tars, a glob, a brace pattern or a URL")
    with ThreadPoolExecutor(16) as pool:
        shards = list(pool.map(partial(index_tar, control=control), paths))
    skipped = [f"{shard.name}/{entry}" for shard in shards for entry in shard.skipped]
    usable = sum(len(shard.keys) for shard in shards)
    if not usable or len(skipped) > max_bad_fraction * (usable + len(skipped)):
        shown, limit = "; ".join(skipped[:3]) or "they are empty", f"data.max_bad_fraction={max_bad_fraction}"
        counts = f"{len(skipped)} of {usable + len(skipped)} samples in {len(paths)} tars"
        lacking = "no picture, no caption or no control" if control else "no picture or no caption"
        raise ValueError(f"{setting}: {counts} have {lacking}, more than {limit}: {shown}")
    for entry in skipped:
        log.warning("skipped %s", entry)
    return shards


def cut(shards, start, stop):
    """Samples `start` to `stop` of shards, numbered through, as shards."""
    kept, first = [], 0
    for shard in shards:
        rows = slice(max(0, start - first), max(0, stop - first))
        first += len(shard.keys)
        kept.append(replace(shard, keys=shard.keys[rows], spans=shard.spans[rows]))
    return [shard for shard in kept if len(shard.keys)]


def stated_mode(data):
    """What the json of a sample, as bytes or None, says of its kind of control; None where it says nothing."""
    try:
        fields = json.loads(data or b"{}")
    except ValueError:  # there is no caption either, and that is the reason to report
        return None
    return fields.get("mode") if isinstance(fields, dict) else None


def mode_number(mode):
    """The number of a kind of control, from a name of `MODES` or a number as it is or as text; None for anything else."""
    return MODES.get(str(mode), int(str(mode)) if str(mode).isdecimal() else None)


# --- in which order -------------------------------------------------------------------------------------------------------------


class Order:
    """Which sample a global index is: each epoch permutes the shards, then the samples within windows of `window` shards.

    Samples are numbered through the shards, whose sizes are `counts`. Only the windows in use are permuted.
    """

    def __init__(self, counts, *, seed, shuffle, window):
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.seed, self.shuffle, self.window = seed, shuffle, window
        self.kept = Kept(6)

    def __len__(self):
        return int(self.starts[-1])

    def sample_at(self, index):
        """The epoch of a global index and the number of its sample."""
        epoch, position = divmod(int(index), len(self))
        return epoch, self._number(epoch, position)

    def following(self, index):
        """The numbers of all samples of an epoch, from that of a global index on, the epoch's first after its last."""
        epoch, position = divmod(int(index), len(self))
        return (self._number(epoch, (position + i) % len(self)) for i in range(len(self)))

    def _number(self, epoch, position):
        if not self.shuffle:
            return position
        shards, ends = self.kept.get(epoch, lambda: self._permuted_shards(epoch))
        i = int(np.searchsorted(ends, position, side="right"))
        numbers = self.kept.get((epoch, i), lambda: self._permuted_window(epoch, i, shards))
        return int(numbers[position - (ends[i - 1] if i else 0)])

    def _rng(self, epoch, stream):
        return np.random.default_rng(draws.generator(self.seed, epoch, stream).initial_seed())

    def _permuted_shards(self, epoch):
        """The epoch's shards in their order, and the position at which each window of them ends."""
        shards = self._rng(epoch, "shards").permutation(len(self.starts) - 1)
        sizes = np.add.reduceat(np.diff(self.starts)[shards], np.arange(0, len(shards), self.window))
        return shards, np.cumsum(sizes)

    def _permuted_window(self, epoch, i, shards):
        shards = shards[i * self.window : (i + 1) * self.window]
        numbers = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        return self._rng(epoch, f"window {i}").permutation(numbers)


# --- samples --------------------------------------------------------------------------------------------------------------------


def first_good(samples, index, load):
    """The sample of a global index, or else the next good one of its epoch: (number, what `load(number)` gives, the bad before).

    `load` raises `BadSample`; the bad are "shard/key: reason". Raises `ValueError` where too many in a row are bad.
    """
    bad = []
    for number in samples.order.following(index):
        try:
            return number, load(number), bad
        except BadSample as error:
            bad.append(f"{samples.key(number)}: {error}")
        if len(bad) == MAX_IN_A_ROW:
            break
    raise ValueError(f"{len(bad)} samples in a row cannot be used, first {bad[0]}")


class Samples:
    """Pictures and captions by global index, as dictionaries named as batches are: images (3, H, W), captions, …

    With `data.control` also controls (3, H, W), in the same frame as the image, and, where `data.control_mode` or the json of any
    sample says of which kind they are, modes, an int64. A bad sample's place is taken by the epoch's next good one, and `bad`
    lists what was passed over. In training the crop, the flip and the dropping of the caption are keyed by (seed, index); otherwise
    the crop is the centre's and captions stay.
    """

    def __init__(self, config, shards, *, seed, training):
        self.config, self.shards, self.seed, self.training = config, shards, seed, training
        counts = [len(shard.keys) for shard in shards]
        self.order = Order(counts, seed=seed, shuffle=training and config.shuffle, window=config.shuffle_window)
        self.files = Kept(256)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        number, sample, bad = first_good(self, index, lambda number: self.read(number, index))
        if self.drops_caption(index):
            sample["captions"] = ""
        return sample | {"indices": index, "keys": self.key(number), "bad": bad}

    def place(self, number):
        """The shard of a sample, by its position among the shards, and the row in it."""
        shard = int(np.searchsorted(self.order.starts, number, side="right")) - 1
        return shard, number - int(self.order.starts[shard])

    def key(self, number):
        """The name of a sample's tar and its own."""
        shard, row = self.place(number)
        return f"{self.shards[shard].name}/{self.shards[shard].keys[row].decode()}"

    def read(self, number, index):
        """Sample `number` as a global index has it: images and captions, and controls and modes; raises `BadSample`."""
        caption, image = self._caption(number), decode(self._bytes(number, IMAGE))
        framed = self._frame(image.size, index)
        target = framed.of(image)
        sample = {"images": pixels(target), "captions": caption}
        if self.config.control:
            sample["controls"] = pixels(self._control(number, framed) if self.config.control_ending else edges(target))
        if self.config.control_mode is not None:
            sample["modes"] = torch.tensor(self._mode(number))
        return sample

    def drops_caption(self, index):
        """Whether the sample of a global index is trained with the empty caption."""
        drawn = draws.uniform(seed=self.seed, indices=[index], stream="dropout")
        return self.training and bool(drawn < self.config.caption_dropout)

    def _frame(self, size, index):
        """The part of a picture of `size` that a global index shows."""
        config = self.config
        if not self.training or (config.crop == "center" and not config.flip):
            return frame(size, config.height, config.width)
        generator = draws.generator(self.seed, index, "crop")
        return frame(size, config.height, config.width, crop=config.crop, flip=config.flip, generator=generator)

    def _control(self, number, framed):
        try:
            return framed.of(decode(self._bytes(number, CONTROL)))
        except BadSample as error:
            raise BadSample(f"its control ({self.config.control}): {error}") from None

    def _mode(self, number):
        """The number of a sample's kind of control: what its json says, else `data.control_mode`."""
        stated = stated_mode(self._bytes(number, JSON))
        mode = self.config.control_mode if stated is None else stated
        if mode == "json":
            raise BadSample("no mode in its json: name one with data.control_mode= for those without")
        if mode_number(mode) is None:
            raise BadSample(f"mode {mode!r} in its json is neither a number nor one of {', '.join(MODES)}")
        return mode_number(mode)

    def _bytes(self, number, column):
        """The bytes of a sample's picture, txt, json or control; None where it has none."""
        shard, row = self.place(number)
        offset, size = self.shards[shard].spans[row, column].tolist()
        if size < 0:
            return None
        path = self.shards[shard].path
        file = self.files.get(path, lambda: open(path, "rb", buffering=0))
        data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise BadSample("its tar has become shorter")
        return data

    def _caption(self, number):
        """The json's caption field where there is one, else the txt."""
        text, fields = self._bytes(number, TEXT), self._bytes(number, JSON)
        try:
            fields = json.loads(fields) if fields is not None else {}
            text = fields[self.config.caption_field] if self.config.caption_field in fields else text
            text = text.decode() if isinstance(text, bytes) else text
        except (ValueError, TypeError) as error:
            raise BadSample(f"unreadable caption ({error})") from None
        if text is None:
            raise BadSample(f"no caption: no txt, and no {self.config.caption_field} in its json")
        if not isinstance(text, str) or not text.strip():
            raise BadSample("an empty caption" if isinstance(text, str) else f"a caption of type {type(text).__name__}")
        return text.strip()
