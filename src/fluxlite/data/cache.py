"""Pre-encoded data: every sample's posterior and text once through the encoders, then read from safetensors files.

A cache holds a file for each tar (for every 1,000 samples of a larger one), and `cache.json` says what it was made from: a stale
one is an error. Texts are stored once for each distinct caption of a file, padding included: FLUX attends to it.

Shapes: n samples, m captions, C channels, h and w in latent cells, L tokens, D and P the widths of T5 and CLIP.
"""

import hashlib
import json
import logging
import os
import uuid
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fluxlite.data.images import BadSample
from fluxlite.data.loading import load_batches
from fluxlite.data.shards import Kept, first_good

POSTERIORS = {"images": ("mean", "logvar"), "controls": ("control_mean", "control_logvar")}
OF_PICTURES = (*POSTERIORS["images"], *POSTERIORS["controls"], "modes")  # tensors of a row for each good sample
OF_TEXTS = ("txt", "pooled")
ROWS = 1000  # samples of a file: 4 GB of FLUX.1-dev's texts, all in memory until the file is written

log = logging.getLogger("fluxlite")


def build_cache(dataset, directory, *, encode_images, encode_texts, digest, rank=0, world_size=1):
    """Encode the samples of `dataset`, a `Samples`, that `directory` does not hold yet; returns the folder for `CachedSamples`.

    encode_images: (B, 3, H, W) → mean, logvar (B, C, h, w); encode_texts: B strings → txt (B, L, D), pooled (B, P), both with B up
    to `data.micro_batch`; `digest` names the encoders. Each rank takes every world_size-th file. Raises `ValueError` where
    `directory` is a cache of other encoders, data or size, or more than `data.max_bad_fraction` of the samples are bad.
    """
    config = dataset.config
    made_from = {"encoders": digest, "data": data_digest(dataset), "size": f"{config.height}x{config.width}"}
    folder, mine = _claim(Path(directory).expanduser(), made_from), pieces(dataset)[rank::world_size]
    if rank == 0 and not (folder / "empty.safetensors").is_file():
        with torch.no_grad():
            txt, pooled = encode_texts([""])
        _write(folder / "empty.safetensors", {"txt": txt.cpu(), "pooled": pooled.cpu()})
    todo = [(file, numbers) for file, numbers in mine if not (folder / file).is_file()]
    total = sum(len(numbers) for _, numbers in todo)
    with tqdm(total=total, desc=f"encoding into {directory}", unit="picture", disable=rank > 0 or not todo) as bar:
        for file, numbers in todo:
            tensors, bad = _encode(dataset, numbers, encode_images, encode_texts, bar)
            _write(folder / file, tensors, {"bad": json.dumps(bad)})
    bad = [f"{dataset.key(numbers[row])}: {why}" for file, numbers in mine for row, why in _bad_rows(folder / file).items()]
    seen = sum(len(numbers) for _, numbers in mine)
    for entry in bad:
        log.warning("skipped %s", entry)
    if len(bad) > config.max_bad_fraction * seen:
        shown = "; ".join(bad[:3])
        raise ValueError(
            f"{len(bad)} of {seen} samples are bad, more than data.max_bad_fraction={config.max_bad_fraction}: {shown}"
        )
    return folder


def pieces(dataset):
    """The files of a cache: (name, numbers of the samples in it)."""
    starts, found = dataset.order.starts.tolist(), []
    for shard, (first, end) in enumerate(zip(starts, starts[1:])):
        found += [(piece_name(shard, i - first), range(i, min(i + ROWS, end))) for i in range(first, end, ROWS)]
    return found


def piece_name(shard, row):
    """The file that holds a row of a shard."""
    return f"{shard:06d}-{row // ROWS:04d}.safetensors"


def data_digest(dataset):
    """Sixteen hexadecimal digits for the tars' names and sizes and for what is read from them."""
    config = dataset.config
    control = f"/{config.control}/{config.control_mode}" if config.control else ""
    digest = hashlib.blake2b(f"{config.caption_field}{control}".encode(), digest_size=8)
    for shard in dataset.shards:
        digest.update(f"{shard.name}/{shard.size}/{len(shard.keys)}/".encode())
        digest.update(b"/".join(shard.keys.tolist()))
        digest.update(shard.spans.tobytes())
    return digest.hexdigest()


def _claim(directory, made_from):
    """The folder for a cache that is made from these; raises `ValueError` where `directory` has one that is made from others."""
    key = hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=8).hexdigest()
    for file in sorted(directory.glob("*/cache.json")):
        old = json.loads(file.read_text())
        differing = [
            f"{name} ({old.get(name)} there, {made_from[name]} now)" for name in made_from if old.get(name) != made_from[name]
        ]
        if differing:
            raise ValueError(
                f"the cache in {directory} is stale: other {', '.join(differing)}; remove it, or set another data.cache="
            )
    folder = directory / key
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".cache-{uuid.uuid4().hex}"  # all ranks write it
    aside.write_text(json.dumps(made_from, indent=2) + "\n")
    os.replace(aside, folder / "cache.json")
    return folder


def _write(file, tensors, metadata=None):
    aside = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


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
    """One file's tensors and its bad rows: mean, logvar (n', C, h, w), txt (m, L, D), pooled (m, P); image_row, text_row (n,).

    Where samples have a control and a mode also control_mean, control_logvar (n', C, h, w) and modes (n',).
    """
    config, parts, texts, image_rows, text_rows, bad = dataset.config, {}, {}, [], [], {}
    readable = _Readable(dataset, numbers)
    for items in load_batches(readable, workers=config.workers, batch_size=config.micro_batch, collate_fn=list):
        for sample, reason in items:
            if sample is None:
                bad[len(image_rows)] = reason
            image_rows.append(-1 if sample is None else len(image_rows) - len(bad))
            text_rows.append(-1 if sample is None else texts.setdefault(sample["captions"], len(texts)))
        for name, values in _stacked([sample for sample, _ in items if sample is not None]).items():
            encoded = zip(POSTERIORS[name], encode_images(values)) if name in POSTERIORS else [(name, values)]
            for part, rows in encoded:
                parts.setdefault(part, []).append(rows.cpu())
        bar.update(len(items))
    tensors = {"image_row": torch.tensor(image_rows), "text_row": torch.tensor(text_rows)}
    if texts:
        captions, size = list(texts), config.micro_batch
        encoded = [[x.cpu() for x in encode_texts(captions[i : i + size])] for i in range(0, len(captions), size)]
        tensors |= {name: torch.cat(rows) for name, rows in (parts | dict(zip(OF_TEXTS, zip(*encoded)))).items()}
    return tensors, bad


def _stacked(samples):
    """The tensors of some samples, stacked by name."""
    names = [name for name in (*POSTERIORS, "modes") if samples and name in samples[0]]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def _bad_rows(file):
    with safe_open(file, "pt") as opened:
        return {int(row): reason for row, reason in json.loads(opened.metadata()["bad"]).items()}


def _open(file):
    """A cache file's tensors, mapped and not read, its rows as lists, its bad rows."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors, tensors["image_row"].tolist(), tensors["text_row"].tolist(), _bad_rows(file)


class CachedSamples:
    """A `Samples` from its cache: mean, logvar, txt, pooled, indices, keys, bad by global index, in the same order.

    Those with a control have control_mean, control_logvar and perhaps modes. Substitutes of bad samples and dropped captions are
    the same too.
    """

    def __init__(self, dataset, folder):
        self.dataset, self.config, self.folder = dataset, dataset.config, Path(folder)
        missing = [
            name for name in ("empty.safetensors", *(name for name, _ in pieces(dataset))) if not (self.folder / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"data.cache: {folder} lacks {len(missing)} files, {missing[0]} first; it must be a folder that all ranks share"
            )
        self.empty = load_file(self.folder / "empty.safetensors")
        self.files = Kept(256)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        number, sample, bad = first_good(self.dataset, index, self._read)
        if self.dataset.drops_caption(index):
            sample |= {"txt": self.empty["txt"][0], "pooled": self.empty["pooled"][0]}
        return sample | {"indices": index, "keys": self.dataset.key(number), "bad": bad}

    def _read(self, number):
        shard, row = self.dataset.place(number)
        name, row = piece_name(shard, row), row % ROWS
        tensors, image_rows, text_rows, bad = self.files.get(name, lambda: _open(self.folder / name))
        if row in bad:
            raise BadSample(bad[row])
        sample = {name: tensors[name][image_rows[row]] for name in OF_PICTURES if name in tensors}
        return sample | {name: tensors[name][text_rows[row]] for name in OF_TEXTS}
