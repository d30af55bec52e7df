"""Made-up data: seeded latents and embeddings of a model's widths, or pictures and captions where
encoders are set.
"""

import torch

from fluxlite import rng
from fluxlite.nets.control_modes import mode_number

WORDS = (
    "a the red green blue small large round square bright dark cat dog house tree river on in "
    "with near"
).split()
DISTINCT_TEXTS = (
    8  # of a width of 512 x 4096 each takes longer to draw than the latents of 1024 x 1024 pixels
)


class MockSamples:
    """Posteriors, text tokens and pooled vectors by global index, as `CachedSamples` gives them."""

    def __init__(self, config, *, split, seed, latent_shape, text_shape, pooled_width):
        self.config, self.split, self.seed, self.latent_shape = (
            config,
            split,
            seed,
            tuple(latent_shape),
        )
        self.length = config.count if split == "train" else config.val_count
        self.txt = self._normal((min(DISTINCT_TEXTS, self.length), *text_shape), 0, "txt")
        self.pooled = self._normal((len(self.txt), pooled_width), 0, "pooled")

    def __len__(self):
        return self.length

    def _normal(self, shape, number, what):
        return torch.randn(
            shape, generator=rng.generator(self.seed, number, f"mock {self.split} {what}")
        )

    def __getitem__(self, index):
        number = index % self.length
        logvar, control = torch.full(self.latent_shape, -10.0), {}
        if self.config.control:
            control = {
                "control_mean": self._normal(self.latent_shape, number, "control"),
                "control_logvar": logvar,
            }
        return {
            "mean": self._normal(self.latent_shape, number, "mean"),
            "logvar": logvar,
            **control,
            **made_up_mode(self.config),
            "txt": self.txt[number % len(self.txt)],
            "pooled": self.pooled[number % len(self.txt)],
            "indices": index,
            "keys": f"mock/{number}",
            "bad": [],
        }


class MockPictures:
    """Random pictures and captions by global index, as `Samples` gives them."""

    def __init__(self, config, *, split, seed):
        self.config, self.split, self.seed = config, split, seed
        self.length = config.count if split == "train" else config.val_count

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        number = index % self.length
        generator = rng.generator(self.seed, number, f"mock {self.split}")
        words = torch.randint(len(WORDS), (8,), generator=generator).tolist()
        image = torch.rand(3, self.config.height, self.config.width, generator=generator) * 2 - 1
        caption = " ".join(WORDS[i] for i in words)
        sample = {
            "images": image,
            "captions": caption,
            "indices": index,
            "keys": f"mock/{number}",
            "bad": [],
        }
        if self.config.control:
            generator = rng.generator(self.seed, number, f"mock {self.split} control")
            sample["controls"] = torch.rand(image.shape, generator=generator) * 2 - 1
        return sample | made_up_mode(self.config)


def made_up_mode(config):
    """What a sample has of `data.control_mode`: the number of that kind, or nothing."""
    return (
        {}
        if config.control_mode is None
        else {"modes": torch.tensor(mode_number(config.control_mode))}
    )
