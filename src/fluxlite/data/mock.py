"""Made-up data: seeded latents and embeddings of a model's widths, or pictures and captions where there are encoders."""

import torch

from fluxlite import draws

WORDS = "a the red green blue small large round square bright dark cat dog house tree river on in with near".split()


class MockSamples:
    """Posterior means, log-variances, text and pooled vectors, all keyed by (seed, index)."""

    def __init__(self, config, *, split, seed, latent_shape, text_shape, pooled_width):
        self.length = config.count if split == "train" else config.val_count
        self.shapes = {"mean": latent_shape, "txt": text_shape, "pooled": (pooled_width,)}
        self.config, self.seed, self.split = config, seed, split

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        number = index % self.length
        sample = {
            name: torch.randn(shape, generator=draws.generator(self.seed, number, f"mock-{self.split}-{name}"))
            for name, shape in self.shapes.items()
        }
        return sample | {"logvar": torch.full(self.shapes["mean"], -10.0), "indices": index, "keys": f"mock/{number}", "bad": []}


class MockPictures:
    """Random pictures and captions."""

    def __init__(self, config, *, split, seed):
        self.length = config.count if split == "train" else config.val_count
        self.config, self.seed, self.split = config, seed, split

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        number = index % self.length
        generator = draws.generator(self.seed, number, f"mock-{self.split}")
        image = torch.rand(3, self.config.height, self.config.width, generator=generator) * 2 - 1
        words = torch.randint(len(WORDS), (8,), generator=generator).tolist()
        return {
            "images": image,
            "captions": " ".join(WORDS[i] for i in words),
            "indices": index,
            "keys": f"mock/{number}",
            "bad": [],
        }
