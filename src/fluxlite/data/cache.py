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
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from fluxlite.cli.atomic import atomic_file
from fluxlite.cli.descriptions import read_json
from fluxlite.cli.options import expand_home, typed_description
from fluxlite.data.images import BadSample
from fluxlite.data.loading import load_batches
from fluxlite.data.parts import CONTROL, config_parts
from fluxlite.data.places import fetched_description
from fluxlite.data.rows import RowFile, write_rows
from fluxlite.data.shards import Kept, first_good

POSTERIORS = {"images": ("mean", "logvar"), "controls": ("control_mean", "control_logvar")}
OF_PICTURES = (
    *POSTERIORS["images"],
    *POSTERIORS["controls"],
    "modes",
)  # tensors of a row for each good sample
OF_TEXTS = ("txt", "pooled")
ROWS = (
    1000  # samples of a file: 4 GB of FLUX.1-dev's texts, all in memory until the file is written
)
EMPTY = "empty.safetensors"  # the empty caption
TIMES = "times.json"

log = logging.getLogger("fluxlite")


@dataclass
class CacheDescription:
    """`cache.json`: what a cache was made from."""

    encoders: str
    data: str
    size: str


def build_cache(dataset, directory, *, encode_images, encode_texts, digest, rank=0, world_size=1):
    """Encode the samples of `dataset`, a `Samples`, that `directory` does not hold yet; returns the
    folder for `CachedSamples`.

    encode_images: (B, 3, H, W) → mean, logvar (B, C, h, w); encode_texts: B strings → txt (B, L,
    D), pooled (B, P), both with B up to `data.micro_batch`; `digest` names the encoders. Each rank
    takes every world_size-th file. Raises `ValueError` where `directory` is a cache of other
    encoders, data or size, or more than `data.max_bad_fraction` of the samples are bad.
    """
    config = dataset.config
    made_from = CacheDescription(digest, layout_digest(dataset), f"{config.height}x{config.width}")
    folder = _claimed_folder(Path(expand_home(str(directory), "data.cache")), made_from)
    mine = pieces(dataset)[rank::world_size]
    if rank == 0 and not (folder / EMPTY).is_file():
        with torch.no_grad():
            txt, pooled = encode_texts([""])
        write_rows(folder / EMPTY, {"txt": txt, "pooled": pooled}, {})
    todo = [piece for piece in mine if not (folder / piece[0]).is_file()]
    contents = _Contents(dataset, folder)
    contents.check([RowFile(folder / piece[0]) for piece in mine if piece not in todo])
    total = sum(len(numbers) for _, numbers in todo)
    with tqdm(
        total=total, desc=f"encoding into {directory}", unit="picture", disable=rank > 0 or not todo
    ) as bar:
        for file, numbers in todo:
            tensors, about = _encode(dataset, numbers, encode_images, encode_texts, bar)
            write_rows(folder / file, tensors, about | {"tar": contents.describe(numbers[0])})
    _check_bad(dataset, [(RowFile(folder / file), numbers) for file, numbers in mine])
    return folder


def _check_bad(dataset, files):
    """Log the bad samples of cache files; raises `ValueError` where there are too many."""
    bad, limit = [], dataset.config.max_bad_fraction
    for file, numbers in files:
        bad += [
            f"{dataset.key(numbers[int(row)])}: {why}" for row, why in file.about["bad"].items()
        ]
    for entry in bad:
        log.warning("skipped %s", entry)
    seen = sum(len(numbers) for _, numbers in files)
    if len(bad) > limit * seen:
        raise ValueError(
            f"{len(bad)} of {seen} samples are bad, more than data.max_bad_fraction={limit}: "
            f"{'; '.join(bad[:3])}"
        )


def pieces(dataset):
    """The files of a cache: (name, numbers of the samples in it)."""
    starts, found = dataset.order.starts.tolist(), []
    for shard, (first, end) in enumerate(zip(starts, starts[1:])):
        found += [
            (piece_name(shard, i - first), range(i, min(i + ROWS, end)))
            for i in range(first, end, ROWS)
        ]
    return found


def piece_name(shard, row):
    """The file that holds a row of a shard."""
    return f"{shard:06d}-{row // ROWS:04d}.safetensors"


# --- what it was made from ------------------------------------------------------------------------


def layout_digest(dataset):
    """Sixteen hexadecimal digits for the tars' names and sizes and for what is read from where in
    them.
    """
    config = dataset.config
    control = f"/{config.control}/{config.control_mode}" if config.control else ""
    digest = hashlib.blake2b(f"{config.caption_field}{control}".encode(), digest_size=8)
    for shard in dataset.shards:
        spans = shard.spans if config.control_ending else shard.spans[:, :CONTROL]
        digest.update(f"{shard.name}/{shard.size}/{len(shard.keys)}/".encode())
        digest.update(b"/".join(shard.keys.tolist()))
        digest.update(spans.tobytes())
        if shard.parts != config_parts(config):
            digest.update(repr(shard.parts).encode())
    return digest.hexdigest()


def data_digest(dataset):
    """Sixteen hexadecimal digits for all that a set's samples depend on: `layout_digest`, and which
    contents the tars have.

    A tar's contents are told by what its server said of it, else by its time of change, as `make`
    and `rsync` do. Made-up data have the digest of their settings.
    """
    dataset = getattr(dataset, "dataset", dataset)  # a cache's
    if not hasattr(dataset, "shards"):
        return hashlib.blake2b(f"mock/{dataset.config}".encode(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(layout_digest(dataset).encode(), digest_size=8)
    for shard in dataset.shards:
        fetched = fetched_description(shard.path)
        known = fetched and (fetched.etag or fetched.modified)
        digest.update(f"/{known or shard.modified}".encode())
    return digest.hexdigest()


def _claimed_folder(directory, made_from):
    """The folder for a cache that is made from these; raises `ValueError` where `directory` has one
    that is made from others.
    """
    key = hashlib.blake2b(
        json.dumps(vars(made_from), sort_keys=True).encode(), digest_size=8
    ).hexdigest()
    for file in sorted(directory.glob("*/cache.json")):
        old = typed_description(file, CacheDescription, read_json(file))
        differing = [f"{name} ({getattr(old, name)} there, {new} "
                     "now)" for name, new in vars(made_from).items()
                     if getattr(old, name) != new]  # fmt: skip
        if differing:
            raise ValueError(
                f"the cache in {directory} is stale: other {', '.join(differing)}; remove it, or "
                "set another data.cache="
            )
    folder = directory / key
    if not (
        folder / "cache.json"
    ).is_file():  # a complete one may lie on a disk that only can be read
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "cache.json") as file:
            file.write((json.dumps(vars(made_from), indent=2) + "\n").encode())
    return folder


class _Contents:
    """Whether tars have the contents that were encoded: each is hashed once at most."""

    def __init__(self, dataset, folder):
        self.dataset, self.folder, self.digests = dataset, folder, Kept(1 << 20)

    def describe(self, number):
        """Size, time of change and digest of the tar of a sample, as they are now."""
        shard = self.dataset.shards[self.dataset.place(number)[0]]
        digest = self.digests.get(shard.path, lambda: file_digest(shard))
        return {"size": shard.size, "modified": shard.modified, "digest": digest}

    def check(self, files):
        """Raise `ValueError` where cache files were made from other contents than their tars
        have.
        """
        known, accepted = self._times(), {}
        for file in files:
            number = Path(file.path).name.split("-")[0]
            shard, old = self.dataset.shards[int(number)], file.about["tar"]
            now = [shard.size, shard.modified]
            if now in ([old["size"], old["modified"]], known.get(number)):
                continue
            if (
                self.digests.get(shard.path, lambda shard=shard: file_digest(shard))
                != old["digest"]
            ):
                raise ValueError(
                    f"the cache in {self.folder.parent} is stale: {shard.path} has other contents "
                    "than were encoded; "
                    "remove it, or set another data.cache="
                )
            accepted[number] = now
        if accepted:
            self._keep(accepted)

    def _times(self):
        return read_json(self.folder / TIMES) if (self.folder / TIMES).is_file() else {}

    def _keep(self, accepted):
        """Note the times of tars that were touched, where that can be written: else they are hashed
        at each start.
        """
        try:
            with atomic_file(self.folder / TIMES) as file:
                file.write(json.dumps(self._times() | accepted).encode())
        except OSError as error:
            log.info(
                "%s cannot be written (%s): tars that were touched are read again at each start",
                TIMES,
                error.strerror,
            )


def file_digest(shard):
    """A digest of all bytes of a shard's tar; raises `ValueError` where it is not the one that was
    indexed.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(shard.path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        about = os.fstat(file.fileno())
    if (about.st_size, about.st_mtime_ns) != (shard.size, shard.modified):
        raise ValueError(f"{shard.path} was changed while it is read: start again")
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
def _encode(dataset, numbers, encode_images, encode_texts, bar):
    """One file's tensors, mean, logvar (n', C, h, w), txt (m, L, D), pooled (m, P); and image_row,
    text_row (n,), bad {row: why}.

    Where samples have a control and a mode also control_mean, control_logvar (n', C, h, w) and
    modes (n',).
    """
    config, parts, texts, image_rows, text_rows, bad = dataset.config, {}, {}, [], [], {}
    readable = _Readable(dataset, numbers)
    for items in load_batches(
        readable, workers=config.workers, batch_size=config.micro_batch, collate_fn=list
    ):
        for sample, reason in items:
            if sample is None:
                bad[len(image_rows)] = reason
            image_rows.append(-1 if sample is None else len(image_rows) - len(bad))
            text_rows.append(
                -1 if sample is None else texts.setdefault(sample["captions"], len(texts))
            )
        for name, values in _stacked([sample for sample, _ in items if sample is not None]).items():
            encoded = (
                zip(POSTERIORS[name], encode_images(values))
                if name in POSTERIORS
                else [(name, values)]
            )
            for part, rows in encoded:
                parts.setdefault(part, []).append(rows.cpu())
        bar.update(len(items))
    about, tensors = {"image_row": image_rows, "text_row": text_rows, "bad": bad}, {}
    if texts:
        captions, size = list(texts), config.micro_batch
        encoded = [
            [x.cpu() for x in encode_texts(captions[i : i + size])]
            for i in range(0, len(captions), size)
        ]
        tensors = {
            name: torch.cat(rows)
            for name, rows in (parts | dict(zip(OF_TEXTS, zip(*encoded)))).items()
        }
    return tensors, about


def _stacked(samples):
    """The tensors of some samples, stacked by name."""
    names = [name for name in (*POSTERIORS, "modes") if samples and name in samples[0]]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


# --- reading --------------------------------------------------------------------------------------


class CachedSamples:
    """A `Samples` from its cache: mean, logvar, txt, pooled, indices, keys, bad by global index, in
    the same order.

    Those with a control have control_mean, control_logvar and perhaps modes. Substitutes of bad
    samples and dropped captions are the same too.
    """

    def __init__(self, dataset, folder):
        self.dataset, self.config, self.folder = dataset, dataset.config, Path(folder)
        missing = [
            name
            for name in (EMPTY, *(name for name, _ in pieces(dataset)))
            if not (self.folder / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"data.cache: {folder} lacks {len(missing)} files, {missing[0]} first; it must be "
                "a folder that all ranks share"
            )
        empty = RowFile(self.folder / EMPTY)
        self.empty = {name: empty.row(name, 0) for name in OF_TEXTS}
        self.files = Kept(256)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        number, sample, bad = first_good(self.dataset, index, self._read)
        if self.dataset.drops_caption(index):
            sample |= self.empty
        return sample | {"indices": index, "keys": self.dataset.key(number), "bad": bad}

    def _read(self, number):
        shard, row = self.dataset.place(number)
        name, row = piece_name(shard, row), row % ROWS
        file = self.files.get(name, lambda: RowFile(self.folder / name))
        if str(row) in file.about["bad"]:
            raise BadSample(file.about["bad"][str(row)])
        image, text = file.about["image_row"][row], file.about["text_row"][row]
        sample = {name: file.row(name, image) for name in OF_PICTURES if name in file.tensors}
        return sample | {name: file.row(name, text) for name in OF_TEXTS}
