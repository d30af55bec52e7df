"""What a sample is trained with beside itself, drawn by the process that reads it.

Each draw is keyed by (seed, the sample's index, its purpose): the same on any mesh, with any
workers, after any resume.

L tokens, C channels, h and w in latent cells.
"""

from fluxlite import rng
from fluxlite.nets import flow
from fluxlite.nets.latents import pack_latents


class DrawnSamples:
    """A data set whose samples hold their draws too: {name: tensor} of each `draw(sample)`."""

    def __init__(self, dataset, *draws):
        self.dataset, self.config, self.draws = dataset, dataset.config, draws

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        for draw in self.draws:
            sample = sample | draw(sample)
        return sample


def keys_of(config, sample):
    """What the draws of a sample are keyed by, but for their purpose."""
    return dict(seed=config.seed, indices=[sample["indices"]])


def shape_of(config, sample):
    """(C, h, w) of a sample's latents; a batch's have it too."""
    if "mean" in sample:
        return sample["mean"].shape[-3:]
    return config.latent_shape(*sample["images"].shape[-2:])


def latent_noise(config, sample, stream):
    """Noise (C, h, w) that some latents of a sample are drawn from their posterior with."""
    return rng.normal(shape_of(config, sample), stream=stream, **keys_of(config, sample))[0]


def draw_posterior(config, sample):
    """The noise (C, h, w) that a sample's latents are drawn from their posterior with."""
    return {"posterior_noise": latent_noise(config, sample, "posterior")}


def draw_step(config, sample):
    """Noise (L, C), t and guidance that a sample is trained with."""
    keys = keys_of(config, sample)
    noise = pack_latents(rng.normal(shape_of(config, sample), stream="noise", **keys))
    batch = config.data.global_batch
    t = flow.sample_t(config.flow, noise.shape[1], batch=batch, **keys)
    guidance = flow.sample_guidance(config.flow, **keys)
    return {"noise": noise[0], "t": t[0], "guidance": guidance[0]}


def draw_nothing(config, sample):
    """No draws: what a task without any has."""
    return {}
