"""Made-up data: pictures and captions, or what encoders of a model's widths would make of them."""

from functools import partial

import torch

from fluxlite import rng
from fluxlite.nets.configs import mode_number

WORDS = (
    "a the red green blue small large round square bright dark cat dog house tree river on in "
    "with near"
).split()
# Of a width of 512 x 4096 each takes longer to draw than the latents of 1024 x 1024 pixels.
DISTINCT_TEXTS = 8


class MadeUp:
    """What both made-up data sets have: a length, and the name and mode of each sample."""

    def __init__(self, config, *, split, seed):
        self.config, self.split, self.seed = config, split, seed
        self.length = config.count if split == "train" else config.val_count

    def __len__(self):
        return self.length

    def file_names(self):
        """No files."""
        return []

    def digest(self):
        """Empty: nothing on a disk can change."""
        return ""

    def generator(self, number, what=""):
        """The generator of one thing of a sample."""
        return rng.generator(self.seed, number, f"mock {self.split} {what}".strip())

    def named(self, index):
        """What a sample of any kind has: its index, its name, and perhaps its kind of control."""
        sample = {"indices": index, "keys": f"mock/{index % self.length}", "bad": []}
        mode = self.config.control_mode
        return sample if mode is None else sample | {"modes": torch.tensor(mode_number(mode))}


class MockSamples(MadeUp):
    """Posteriors, text tokens and pooled vectors, as `CachedSamples` gives them."""

    def __init__(self, config, *, split, seed, latent_shape, text_shape, pooled_width):
        super().__init__(config, split=split, seed=seed)
        self.latent_shape = tuple(latent_shape)
        self.txt = self._normal((min(DISTINCT_TEXTS, self.length), *text_shape), 0, "txt")
        self.pooled = self._normal((len(self.txt), pooled_width), 0, "pooled")

    def _normal(self, shape, number, what):
        return torch.randn(shape, generator=self.generator(number, what))

    def __getitem__(self, index):
        number, logvar = index % self.length, torch.full(self.latent_shape, -10.0)
        sample = {"mean": self._normal(self.latent_shape, number, "mean"), "logvar": logvar}
        if self.config.control:
            control = self._normal(self.latent_shape, number, "control")
            sample |= {"control_mean": control, "control_logvar": logvar}
        text = number % len(self.txt)
        return sample | {"txt": self.txt[text], "pooled": self.pooled[text]} | self.named(index)


class MockPictures(MadeUp):
    """Random pictures and captions, as `Samples` gives them."""

    def __getitem__(self, index):
        number = index % self.length
        shape, generator = (3, self.config.height, self.config.width), self.generator(number)
        words = torch.randint(len(WORDS), (8,), generator=generator).tolist()
        levels = partial(torch.randint, 256, shape, dtype=torch.uint8)
        sample = {
            "images": levels(generator=generator),
            "captions": " ".join(WORDS[i] for i in words),
        }
        if self.config.control:
            generator = self.generator(number, "control")
            sample["controls"] = levels(generator=generator)
        return sample | self.named(index)
