"""Given pictures as latents: samples of what the autoencoder makes of them.

B pictures, P prompts, L tokens, C channels, h and w in latent cells.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from fluxlite import rng
from fluxlite.data.transfers import send_tensor
from fluxlite.nets.autoencoder import sample_posterior
from fluxlite.nets.latents import pack_latents


@dataclass
class Posteriors:
    """Normal draws for encoding pictures that a caller gives in place of ours: {name: draws
    (pictures or 1, C, h, w)}, and the seeds of the pictures.
    """

    given: dict = field(default_factory=dict)
    seeds: list = field(default_factory=list)

    def draw_of(self, name, **key) -> Callable:
        """A function (shape, indices=seeds) → draws (B, *shape): those given by name, or of
        `rng.normal` with such keys.
        """
        if name not in self.given:
            return partial(rng.normal, **key)
        draws = self.given[name].expand(len(self.seeds), -1, -1, -1)
        row = {seed: n for n, seed in enumerate(self.seeds)}
        return lambda shape, indices: draws[[row[one] for one in indices]]


def sample_latents_of(autoencoder, pixels, draw) -> Callable:
    """A function from prompts' numbers and pictures' seeds to packed latents (B, L, C) of pixels
    (P, 3, H, W), P as many as prompts or 1: samples of their posterior by
    `draw(shape, indices=seeds)`.
    """
    alone = (autoencoder.posterior(one[None]) for one in pixels)  # the same bits in any company
    posterior = [torch.cat(part) for part in zip(*alone)]

    def sample(prompts, seeds):
        mean, logvar = (rows_for(prompts, values) for values in posterior)
        noise = send_tensor(draw(mean.shape[1:], indices=seeds), mean.device)
        return pack_latents(autoencoder.scale(sample_posterior(mean, logvar, noise)))

    return sample


def rows_for(prompts, values):
    """The rows of some prompts; of one row, which serves all, itself."""
    if len(values) == 1:
        return values
    return values[send_tensor(torch.as_tensor(prompts), values.device)]
