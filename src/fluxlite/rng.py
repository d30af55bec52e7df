"""Random draws keyed by (seed, global sample index, stream): the same on any mesh, with any
workers, after any resume.

Nothing in a run draws from a global generator. A stream is a word, one for each purpose ("noise",
"crop", …), so that a new kind of draw never shifts the others.
"""

import hashlib

import torch


def generator(seed, index, stream):
    """A CPU generator that depends on its three keys alone."""
    index = index.item() if isinstance(index, torch.Tensor) else index
    digest = hashlib.blake2b(f"{seed}/{index}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape, *, seed, indices, stream):
    """Standard normal draws in float32, a row for each of `indices`: (B, *shape)."""
    return torch.stack([torch.randn(shape, generator=generator(seed, i, stream)) for i in indices])


def uniform(*, seed, indices, stream):
    """Draws from [0, 1) in float32, one for each of `indices`: (B,)."""
    return torch.stack([torch.rand((), generator=generator(seed, i, stream)) for i in indices])
