"""Pre-encoded data: every sample's posterior and text once through the encoders, then read from safetensors files.

A cache holds one file a tar, named by its number, and says in `cache.json` what it was made from: a stale one is an error. Texts
are stored once for each distinct caption, with all padded tokens: FLUX attends to the padding, so dropping it would change results.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fluxlite.data.images import BadSample
from fluxlite.data.shards import MAX_SUBSTITUTES, drops_caption

BATCH = 64


def build_cache(dataset, directory, *, encode_images, encode_texts, digest, rank=0, world_size=1):
    """Encode the tars of `dataset`, a `Samples`, that are not in `directory` yet; each rank takes every world_size-th.

    encode_images: (B, 3, H, W) -> mean, logvar (B, C, h, w); encode_texts: B strings -> txt (B, L, D), pooled (B, P). `digest`
    stands for the encoders. Raises `ValueError` where `directory` holds a cache of other encoders, data or size.
    Returns the folder.
    """
    config, directory = dataset.config, Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    made_from = {"encoders": digest, "data": dataset.shards.digest(), "size": f"{config.height}x{config.width}"}
    _claim(directory, made_from)
    sizes = dataset.shards.sizes
    todo = [s for s in range(len(sizes)) if s % world_size == rank and not shard_file(directory, s).is_file()]
    empty = directory / "empty.safetensors"
    if rank == 0 and not empty.is_file():
        txt, pooled = encode_texts([""])
        _write(empty, {"txt": txt, "pooled": pooled})
    with tqdm(total=int(sizes[todo].sum()), desc=f"encoding into {directory}", unit="picture", disable=rank > 0 or not todo) as bar:
        for shard in todo:
            first = int(sizes[:shard].sum())
            tensors = _encode_shard(dataset, range(first, first + int(sizes[shard])), encode_images, encode_texts, bar)
            _write(shard_file(directory, shard), tensors)
    return directory


def shard_file(directory, shard):
    """The cache's file for a tar."""
    return Path(directory) / f"{shard:06d}.safetensors"


def _claim(directory, made_from):
    """Mark a new cache with what it is made from, or check an old one."""
    file = directory / "cache.json"
    if file.is_file():
        old = json.loads(file.read_text())
        differing = [name for name in made_from if old.get(name) != made_from[name]]
        if differing:
            raise ValueError(
                f"data.cache={directory} is stale: its {', '.join(differing)} differ; remove it or name another folder"
            )
    else:
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(made_from, indent=2) + "\n")
        os.replace(aside, file)


def _write(file, tensors):
    aside = file.with_suffix(f".{os.getpid()}")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, aside)
    os.replace(aside, file)


@torch.inference_mode()
def _encode_shard(dataset, numbers, encode_images, encode_texts, bar):
    """One tar's tensors: mean and logvar (n, C, h, w), good (n,), text_row (n,), and the distinct captions' txt and pooled."""
    images, rows, good, texts, encoded = [], [], [], {}, []

    def flush():
        if images:
            encoded.append([x.cpu() for x in encode_images(torch.stack(images))])
            images.clear()

    for number in numbers:
        try:
            image, caption = dataset.load(number, 0)
            rows.append(texts.setdefault(caption, len(texts)))
            images.append(image)
            good.append(True)
        except BadSample:
            images.append(torch.zeros(3, dataset.config.height, dataset.config.width))
            rows.append(0)
            good.append(False)
        if len(images) == BATCH:
            flush()
        bar.update()
    flush()
    captions = list(texts) or [""]
    parts = [encode_texts(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]
    mean, logvar = (torch.cat(x) for x in zip(*encoded))
    txt, pooled = (torch.cat([x.cpu() for x in part]) for part in zip(*parts))
    return dict(mean=mean, logvar=logvar, txt=txt, pooled=pooled, text_row=torch.tensor(rows), good=torch.tensor(good))


class CachedSamples:
    """The samples of a `Samples`, encoded: mean, logvar, txt, pooled with its order, substitutes and dropout."""

    def __init__(self, dataset, directory):
        self.dataset, self.config, self.directory, self.open = dataset, dataset.config, Path(directory), {}
        self.first = [0, *dataset.shards.sizes.cumsum().tolist()]

    def __len__(self):
        return len(self.dataset)

    def __getstate__(self):
        return self.__dict__ | {"open": {}}

    def tensors(self, file):
        """A file's tensors, mapped, read once a worker."""
        if file not in self.open:
            self.open[file] = load_file(file)
        return self.open[file]

    def __getitem__(self, index):
        dataset, bad = self.dataset, []
        for candidate in range(index, index + MAX_SUBSTITUTES):
            number = dataset.order(candidate)
            shard = dataset.shards.samples[number][0]
            tensors, row = self.tensors(shard_file(self.directory, shard)), number - self.first[shard]
            if tensors["good"][row]:
                break
            bad.append(dataset.shards.key(number))
        else:
            raise ValueError(f"{MAX_SUBSTITUTES} samples in a row cannot be used; the first is {bad[0]}")
        text, text_row = tensors, tensors["text_row"][row]
        if dataset.training and drops_caption(dataset.config, dataset.seed, index):
            text, text_row = self.tensors(self.directory / "empty.safetensors"), 0
        return {
            "mean": tensors["mean"][row],
            "logvar": tensors["logvar"][row],
            "txt": text["txt"][text_row],
            "pooled": text["pooled"][text_row],
            "indices": index,
            "keys": dataset.shards.key(number),
            "bad": bad,
        }
