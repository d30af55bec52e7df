"""Batches of samples as what the transformer sees: encoded here, or read from a cache.

B samples of a micro-batch, L tokens, C channels of a token.
"""

import torch

from fluxlite import rng
from fluxlite.nets.autoencoder import sample_posterior
from fluxlite.nets.latents import pack_latents


@torch.no_grad()
def encode_batch(run, batch):
    """A batch as clean tokens x0 (B, L, C) float32, txt, pooled, and the task's inputs {name: (B,
    …)}.
    """
    if "captions" in batch:
        length = run.config.model.max_sequence_length
        txt, pooled = run.parts.encoders.encode(batch["captions"], length)
    else:
        txt, pooled = batch["txt"].to(run.device), batch["pooled"].to(run.device)
    x0 = encode_pictures(run, batch, "images", ("mean", "logvar"), stream="posterior")
    return x0, txt, pooled, run.task.encode_inputs(run, batch)


def encode_pictures(run, batch, name, cached, *, stream):
    """Packed latents (B, L, C) float32 of a batch's pictures `name`: a sample of their posterior,
    whose mean and log variance a cached batch holds under the names `cached`.
    """
    autoencoder = run.parts.autoencoder
    if cached[0] in batch:
        mean, logvar = (batch[key].to(run.device) for key in cached)
    else:
        mean, logvar = autoencoder.posterior(batch[name].to(run.device))
    keys = dict(seed=run.config.seed, indices=batch["indices"], stream=stream)
    noise = rng.normal(mean.shape[1:], **keys).to(run.device)
    latents = sample_posterior(mean.float(), logvar.float(), noise)
    return pack_latents(latents if autoencoder is None else autoencoder.scale(latents))
