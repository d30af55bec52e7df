"""Pictures that a run draws of itself: the same prompts and noise every time.

B pictures of a batch, L tokens, C channels of a token.
"""

from dataclasses import dataclass
from functools import partial

import torch

from fluxlite.data.cache import CachedSamples
from fluxlite.data.images import pixels_of
from fluxlite.data.loading import collate_samples
from fluxlite.data.transfers import send_batch, send_tensor
from fluxlite.draw import sampling
from fluxlite.draw.contact_sheet import contact_sheet
from fluxlite.nets.schedule import SampleConfig


@dataclass
class GridBatch:
    """Prompts that are drawn together, encoded."""

    captions: list
    txt: torch.Tensor
    pooled: torch.Tensor
    inputs: dict  # the task's
    noise: torch.Tensor  # (B, L, C)
    shown: list  # of each, the pictures that are shown before the drawn one
    negative: tuple | None  # txt and pooled of the empty caption, where it is guided away from


def encode_grid(run, dataset):
    """The `GridBatch`es of the validation set's first prompts; none where there are no encoders to
    draw with.
    """
    if run.parts.encoders is None:
        return []
    # a cache holds no captions
    plain = dataset.dataset if isinstance(dataset, CachedSamples) else dataset
    config = run.config
    drawn = run.drawn_samples(plain)
    samples = [drawn[i] for i in range(min(config.sample.count, config.data.val_count))]
    captions = [sample["captions"] for sample in samples]
    txt, pooled = run.parts.encoders.encode(captions, config.model.max_sequence_length)
    batches = []
    for start in range(0, len(samples), config.data.micro_batch):
        rows = slice(start, start + config.data.micro_batch)
        batches.append(grid_batch(run, samples[rows], txt[rows], pooled[rows], start))
    return batches


@torch.no_grad()
def grid_batch(run, samples, txt, pooled, start):
    """The `GridBatch` of some samples, the first of which is number `start` of the grid."""
    numbers = list(range(start, start + len(samples)))
    batch = send_batch(collate_samples(samples), run.device)
    noise = send_tensor(sampling.initial_noise(run.latent_shape, numbers), run.device)
    levels = [batch[name].expand(-1, 3, -1, -1) for _, name in run.task.shown]
    shown = [sampling.pictures_of(pixels_of(of)) for of in levels]
    beside = list(zip(*shown)) or [()] * len(samples)
    inputs = run.task.encode_inputs(run, batch)
    return GridBatch(
        *(batch["captions"], txt, pooled, inputs, noise, beside), encode_negative(run, len(samples))
    )


def encode_negative(run, count):
    """txt and pooled of so many empty captions, where sample.true_cfg uses them; else None."""
    if run.config.sample.true_cfg == 1:
        return None
    texts = run.parts.encoders.encode([""] * count, run.config.model.max_sequence_length)
    return tuple(text.to(run.dtype) for text in texts)


def draw_grid(run, batches):
    """A contact sheet of pictures, each behind what the task shows with it. Collective."""
    data, grid = run.config.data, run.config.sample
    drawn_with = {name: getattr(grid, name) for name in ("steps", "guidance", "true_cfg")}
    settings = SampleConfig(height=data.height, width=data.width, **drawn_with)
    pictures, captions = [], []
    for batch in batches:
        velocity = partial(run.velocity, **batch.inputs)
        texts = batch.txt.to(run.dtype), batch.pooled.to(run.dtype)
        tokens = sampling.sample_sharded(
            *(velocity, run.flux.config, *texts, batch.noise, run.rope, settings, run.dtype),
            batch.negative,
        )
        drawn = sampling.decode_pictures(run.parts.autoencoder, tokens, data.height, data.width)
        for caption, shown, picture in zip(batch.captions, batch.shown, drawn):
            pictures += [*shown, picture]
            captions += [*(label for label, _ in run.task.shown), caption]
    columns = 2 * (1 + len(run.task.shown)) if run.task.shown else None
    return contact_sheet(pictures, columns=columns, captions=captions)
