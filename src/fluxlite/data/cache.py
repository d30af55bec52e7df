"""Pre-encoded data: every sample's posterior and text once through the encoders, then read from
safetensors files.

A cache holds a file for each tar (for every 1,000 samples of a larger one), and `cache.json` says
what it was made from: a stale one is an error. Texts are stored once for each distinct caption of a
file, padding included: FLUX attends to it. Each file keeps its tar's size, time of change and
digest. Where size or time differ, the tar's contents decide; `times.json` keeps the times of tars
whose contents are those that were encoded.

Shapes: n samples, m captions, C channels, h and w in latent cells, L tokens, D and P the widths of
T5 and CLIP.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fluxlite.cli.atomic import atomic_file, naming_setting
from fluxlite.cli.descriptions import read_json
from fluxlite.cli.options import expand_home, option, typed_description
from fluxlite.data.images import POSTERIORS, BadSample
from fluxlite.data.loading import load_batches
from fluxlite.data.order import RecentValues
from fluxlite.data.rows import RowFile, write_rows
from fluxlite.data.shards import first_good_sample

# tensors of a row for each good sample
PLAIN = ("modes", "masks")  # which are kept as they are
OF_PICTURES = (*POSTERIORS["images"], *POSTERIORS["controls"], *PLAIN, "images")
OF_TEXTS = ("txt", "pooled")
# samples of a file: 4 GB of FLUX.1-dev's texts, all in memory until the file is written
FILE_ROWS = 1000
EMPTY = "empty.safetensors"  # the empty caption
TIMES_FILE = "times.json"

log = logging.getLogger("fluxlite")

# the settings that each part of a `CacheDescription` comes from
MADE_BY = {
    "encoders": (
        *("model.t5", "model.clip", "model.autoencoder"),
        *("model.max_sequence_length", "dtype"),
    ),
    "data": (
        *("data.path", "data.val_path", "data.caption_field"),
        *("data.template", "data.control", "data.control_mode", "data.mask"),
        "data.cache_pictures",
        *("data.resolutions", "data.buckets", "data.bucket_step"),
    ),
    "size": ("data.height", "data.width"),
}


@dataclass
class CacheDescription:
    """`cache.json`: what a cache was made from."""

    encoders: str
    data: str
    size: str
    settings: dict = option(dict, "{key: value} of the run that began it, for what is said of it")
    checksum: str = option("", "of the settings; empty in caches of earlier versions")

    def parts(self):
        """{name: value} of all that must be alike."""
        return {name: getattr(self, name) for name in MADE_BY}

    def differences(self, now):
        """What is other than in the `CacheDescription` `now`: `size (32x32 there, 16x16 now)`, with
        the settings where these tell it.
        """
        found = []
        for name, value in now.parts().items():
            if getattr(self, name) != value:
                told = [self._changed(key, now) for key in MADE_BY[name]]
                values = f"{getattr(self, name)} there, {value} now"
                found.append(f"{name} ({', '.join(filter(None, told)) or values})")
        return ", ".join(found)

    def _changed(self, key, now):
        """How a setting has changed, in words; nothing where it has not, or where it is unknown."""
        there, here = self.settings.get(key), now.settings.get(key)
        return f"{key}: {there} there, {here} now" if there != here and self.settings else ""


def build_cache(
    dataset,
    directory,
    *,
    encode_images,
    encode_texts,
    digest,
    settings=None,
    rank=0,
    world_size=1,
):
    """Encode what a cache in `directory` lacks of a `Samples`; returns a `CachedSamples`' folder.

    encode_images: (B, 3, H, W) → mean, logvar (B, C, h, w); encode_texts: B strings → txt (B, L,
    D), pooled (B, P), both with B up to `data.micro_batch`; `digest` names the encoders, and
    `settings` {key: value} are where they come from. Each rank takes every world_size-th file.
    Raises `ValueError` where `directory` is a cache of other
    encoders, data or size, or more than `data.max_bad_fraction` of the samples are bad.
    """
    config = dataset.config
    names = [key.removeprefix("data.") for key in (*MADE_BY["data"], *MADE_BY["size"])]
    settings = {f"data.{name}": getattr(config, name) for name in names} | (settings or {})
    size = f"{config.height}x{config.width}"
    layout = dataset.layout_digest()
    made_from = CacheDescription(digest, layout, size, settings, json_digest(settings))
    folder = _claimed_folder(Path(expand_home(str(directory), "data.cache")), made_from)
    mine = cache_pieces(dataset)[rank::world_size]
    if rank == 0 and not (folder / EMPTY).is_file():
        with torch.no_grad():
            txt, pooled = encode_texts([""])
        write_rows(folder / EMPTY, {"txt": txt, "pooled": pooled}, {})
    todo = [piece for piece in mine if not (folder / piece[0]).is_file()]
    contents = _Contents(dataset, folder)
    contents.check([RowFile(folder / piece[0]) for piece in mine if piece not in todo])
    total = sum(len(numbers) for _, numbers in todo)
    options = dict(total=total, unit="picture", disable=rank > 0 or not todo)
    with tqdm(desc=f"encoding into {directory}", **options) as bar:
        for file, numbers in todo:
            tensors, about = _encoded_piece(dataset, numbers, encode_images, encode_texts, bar)
            write_rows(folder / file, tensors, about | {"tar": contents.describe(numbers[0])})
    _check_bad(dataset, [(RowFile(folder / file), numbers) for file, numbers in mine])
    return folder


def _check_bad(dataset, files):
    """Log the bad samples of cache files; raises `ValueError` where there are too many."""
    bad, limit = [], dataset.config.max_bad_fraction
    for file, numbers in files:
        found = file.about["bad"].items()
        bad += [f"{dataset.key(numbers[int(row)])}: {why}" for row, why in found]
    for entry in bad:
        log.warning("skipped %s", entry)
    seen = sum(len(numbers) for _, numbers in files)
    if len(bad) > limit * seen:
        raise ValueError(
            f"{len(bad)} of {seen} samples are bad, more than data.max_bad_fraction={limit}: "
            f"{'; '.join(bad[:3])}"
        )


def cache_pieces(dataset):
    """The files of a cache: (name, numbers of the samples in it, all of one shard and shape)."""
    found = []
    for number, (first, shard) in enumerate(zip(dataset.starts.tolist(), dataset.shards)):
        runs = []
        for rows in shard.alike():
            runs += [rows[i : i + FILE_ROWS] for i in range(0, len(rows), FILE_ROWS)]
        for i, rows in enumerate(runs):
            found.append((f"{number:06d}-{i:04d}.safetensors", first + rows))
    return found


# --- what it was made from ------------------------------------------------------------------------


def _claimed_folder(directory, made_from):
    """The folder for a cache that is made from these.

    Raises `ValueError` where `directory` has one that is made from others.
    """
    for file in sorted(directory.glob("*/cache.json")):
        old = typed_description(file, CacheDescription, read_json(file))
        if old.checksum != (json_digest(old.settings) if old.settings else ""):
            raise ValueError(f"{file} is damaged: remove the cache, or set another data.cache=")
        if differences := old.differences(made_from):
            raise ValueError(
                f"the cache in {directory} is stale: other {differences}; remove it, or set "
                "another data.cache="
            )
    folder = directory / json_digest(made_from.parts())
    if not (folder / "cache.json").is_file():  # a whole one may lie on a disk that is only read
        with naming_setting(f"data.cache={directory.parent}", "name a folder of your own"):
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / "cache.json") as file:
                file.write((json.dumps(vars(made_from), indent=2) + "\n").encode())
    return folder


def json_digest(values):
    """Sixteen hexadecimal digits that name JSON's values."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _Contents:
    """Whether tars have the contents that were encoded: each is hashed once at most."""

    def __init__(self, dataset, folder):
        self.dataset, self.folder, self.digests = dataset, folder, RecentValues(1 << 20)

    def describe(self, number):
        """Size, time of change and digest of the tar of a sample, as they are now."""
        shard = self.dataset.shards[self.dataset.place(number)[0]]
        return {"size": shard.size, "modified": shard.modified, "digest": self._digest(shard)}

    def _digest(self, shard):
        return self.digests.get(shard.path, lambda: file_digest(shard))

    def check(self, files):
        """Raise `ValueError` where cache files were made from other contents than tars have."""
        known, accepted = self._times(), {}
        for file in files:
            number = Path(file.path).name.split("-")[0]
            shard, old = self.dataset.shards[int(number)], file.about["tar"]
            now = [shard.size, shard.modified]
            if now in ([old["size"], old["modified"]], known.get(number)):
                continue
            if self._digest(shard) != old["digest"]:
                raise ValueError(
                    f"the cache in {self.folder.parent} is stale: {shard.path} has other contents "
                    "than were encoded; "
                    "remove it, or set another data.cache="
                )
            accepted[number] = now
        if accepted:
            self._keep(accepted)

    def _times(self):
        return read_json(self.folder / TIMES_FILE) if (self.folder / TIMES_FILE).is_file() else {}

    def _keep(self, accepted):
        """Note the times of tars that were touched; unwritten, they are hashed at each start."""
        try:
            with atomic_file(self.folder / TIMES_FILE) as file:
                file.write(json.dumps(self._times() | accepted).encode())
        except OSError as error:
            log.info(
                "%s cannot be written (%s): tars that were touched are read again at each start",
                TIMES_FILE,
                error.strerror,
            )


def file_digest(shard):
    """A digest of all bytes of a shard's files; `ValueError` where one is not as it was indexed."""
    digest = hashlib.blake2b(digest_size=16)
    for path, *known in shard.files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
            identity = shard.identity_of(file)
        if identity != tuple(known):
            raise ValueError(f"{path} was changed while it is read: start again")
    return digest.hexdigest()


# --- writing --------------------------------------------------------------------------------------


class _Readable:
    """Some samples of a `Samples`, as (sample, None), or as (None, reason) where they are bad."""

    def __init__(self, dataset, numbers):
        self.dataset, self.numbers = dataset, numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, row):
        try:
            return self.dataset.read(self.numbers[row], 0), None
        except BadSample as error:
            return None, str(error)


@torch.no_grad()
def _encoded_piece(dataset, numbers, encode_images, encode_texts, bar):
    """One file's tensors, and what it says of its rows.

    Tensors: mean, logvar (n', C, h, w), txt (m, L, D), pooled (m, P); where samples have a control
    and a mode also control_mean, control_logvar (n', C, h, w) and modes (n',), where they have a
    mask masks (n', 1, H, W), where they are kept images (n', 3, H, W). Of the rows: image_row,
    text_row (n,), bad {row: why}.
    """
    config, parts, texts, image_rows, text_rows, bad = dataset.config, {}, {}, [], [], {}
    options = dict(workers=config.workers, batch_size=config.micro_batch, collate_fn=list)
    for items in load_batches(_Readable(dataset, numbers), **options):
        for sample, reason in items:
            if sample is None:
                bad[len(image_rows)] = reason
                image_rows.append(-1)
                text_rows.append(-1)
            else:
                image_rows.append(len(image_rows) - len(bad))
                text_rows.append(texts.setdefault(sample["captions"], len(texts)))
        good = [sample for sample, _ in items if sample is not None]
        pictures = _encoded_pictures(good, encode_images, config.cache_pictures)
        for name, rows in pictures.items():
            parts.setdefault(name, []).append(rows.cpu())
        bar.update(len(items))
    captions = list(texts)
    for start in range(0, len(captions), config.micro_batch):
        encoded = encode_texts(captions[start : start + config.micro_batch])
        for name, rows in zip(OF_TEXTS, encoded):
            parts.setdefault(name, []).append(rows.cpu())
    about = {"image_row": image_rows, "text_row": text_rows, "bad": bad}
    return {name: torch.cat(rows) for name, rows in parts.items()}, about


def _encoded_pictures(samples, encode_images, kept):
    """{name: rows} of the pictures of some samples, encoded, and of their modes and masks; where
    they are `kept`, of the targets as they are too.
    """
    found = {}
    for name in (*POSTERIORS, *PLAIN) if samples else ():
        if name not in samples[0]:
            continue
        values = torch.stack([sample[name] for sample in samples])
        if name in POSTERIORS:
            found |= zip(POSTERIORS[name], encode_images(values))
        else:
            found[name] = values
        if name == "images" and kept:
            found[name] = values
    return found


# --- reading --------------------------------------------------------------------------------------


class CachedSamples:
    """The data set of a `Samples` from its cache: encoded, and in the same order.

    Substitutes of bad samples and dropped captions are the same too.
    """

    def __init__(self, dataset, folder):
        self.dataset, self.config, self.folder = dataset, dataset.config, Path(folder)
        self.pieces = cache_pieces(dataset)
        names = [EMPTY, *(name for name, _ in self.pieces)]
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(
                f"data.cache: {folder} lacks {len(missing)} files, {missing[0]} first; it must be "
                "a folder that all ranks share"
            )
        empty = RowFile(self.folder / EMPTY)
        self.empty = {name: empty.row(name, 0) for name in OF_TEXTS}
        self.files = RecentValues(256)
        self.rows = np.empty((dataset.starts[-1], 2), np.int32)  # of each sample its piece and row
        for piece, (_, numbers) in enumerate(self.pieces):
            self.rows[numbers, 0], self.rows[numbers, 1] = piece, np.arange(len(numbers))

    def __len__(self):
        return len(self.dataset)

    def file_names(self):
        """The names of the tars that were encoded."""
        return self.dataset.file_names()

    def digest(self):
        """That of the samples that were encoded."""
        return self.dataset.digest()

    def __getitem__(self, index):
        number, sample, bad = first_good_sample(self.dataset, index, self._read)
        if self.dataset.drops_caption(index):
            sample |= self.empty
        return sample | self.dataset.named(number, index) | {"bad": bad}

    def _read(self, number):
        piece, row = self.rows[number].tolist()
        name, _ = self.pieces[piece]
        file = self.files.get(name, lambda: RowFile(self.folder / name))
        if str(row) in file.about["bad"]:
            raise BadSample(file.about["bad"][str(row)])
        image, text = file.about["image_row"][row], file.about["text_row"][row]
        sample = {name: file.row(name, image) for name in OF_PICTURES if name in file.tensors}
        return sample | {name: file.row(name, text) for name in OF_TEXTS}
