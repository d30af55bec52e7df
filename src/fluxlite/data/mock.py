"""Made-up data: seeded latents and embeddings of a model's widths, or pictures and captions where encoders are set."""

import torch

from fluxlite import draws

WORDS = "a the red green blue small large round square bright dark cat dog house tree river on in with near".split()
DISTINCT_TEXTS = 8  # of a width of 512 x 4096 each takes longer to draw than the latents of 1024 x 1024 pixels


class MockSamples:
    """Posteriors, text tokens and pooled vectors by global index: mean, logvar, txt, pooled, indices, keys, bad."""

    def __init__(self, config, *, split, seed, latent_shape, text_shape, pooled_width):
        self.config, self.split, self.seed, self.latent_shape = config, split, seed, tuple(latent_shape)
        self.length = config.count if split == "train" else config.val_count
        self.txt = self._normal((min(DISTINCT_TEXTS, self.length), *text_shape), 0, "txt")
        self.pooled = self._normal((len(self.txt), pooled_width), 0, "pooled")

    def __len__(self):
        return self.length

    def _normal(self, shape, number, what):
        return torch.randn(shape, generator=draws.generator(self.seed, number, f"mock {self.split} {what}"))

    def __getitem__(self, index):
        number = index % self.length
        return {
            "mean": self._normal(self.latent_shape, number, "mean"),
            "logvar": torch.full(self.latent_shape, -10.0),
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
        generator = draws.generator(self.seed, number, f"mock {self.split}")
        words = torch.randint(len(WORDS), (8,), generator=generator).tolist()
        image = torch.rand(3, self.config.height, self.config.width, generator=generator) * 2 - 1
        caption = " ".join(WORDS[i] for i in words)
        return {"images": image, "captions": caption, "indices": index, "keys": f"mock/{number}", "bad": []}
