"""The rectified flow: x_t = (1 − t)·x0 + t·noise, whose velocity noise − x0 the transformer
predicts; t = 1 is noise.

One file for training, validation and sampling. Everything here is float32, whatever the transformer
computes in.

B batch, L image tokens, C channels of a token.
"""

import math
from dataclasses import dataclass

import torch

from fluxlite import rng
from fluxlite.cli.options import option

DENSITIES = ("logit_normal", "uniform", "mode")
VALIDATION_T = tuple(i / 8 for i in range(8))


@dataclass
class FlowConfig:
    """How t and guidance are drawn in training."""

    density: str = option("logit_normal", "density of t (arXiv 2403.03206)", choices=DENSITIES)
    logit_mean: float = option(
        0.0,
        "mean of logit(t) for logit_normal",
        at_least=-20,
        at_most=20,
        only_with={"flow.density": ("logit_normal",)},
    )
    logit_std: float = option(
        1.0,
        "standard deviation of logit(t) for logit_normal",
        above=0,
        at_most=20,
        only_with={"flow.density": ("logit_normal",)},
    )
    mode_scale: float = option(
        1.29,
        "strength of the mode density",
        at_least=-1,
        at_most=1.75,
        only_with={"flow.density": ("mode",)},
    )
    shift: str = option(
        "resolution",
        "time shift: resolution (from the number of tokens), none, or a factor s as everywhere, "
        "t' = s*t / (1 + (s - 1)*t)",
    )
    stratified: bool = option(
        False, "spread the t of a batch evenly: each of its samples draws from a share of its own"
    )
    guidance: str = option(
        "1.0", "guidance in training: a constant, or uniform[a,b]", verbatim=True
    )

    def validate(self):
        shift_factor(self.shift, 256)
        guidance_range(self.guidance)


def time_shift_mu(num_image_tokens, shifts=(0.5, 1.15), lengths=(256, 4096)):
    """FLUX's mu: linear in the packed length, 0.5 at 256 tokens and 1.15 at 4096 (BFL's
    sampler).
    """
    (low, high), (start, end) = shifts, lengths
    return low + (num_image_tokens - start) * (high - low) / (end - start)


def shift_time(t, factor):
    """Shift t in [0, 1] towards noise, where the factor is above 1: s·t / (1 + (s − 1)·t)."""
    return factor * t / (1 + (factor - 1) * t)


def shift_factor(shift, num_image_tokens, key="flow.shift"):
    """The factor that `shift` names: a number, 1 for "none", or e^mu from the resolution.

    Raises `ValueError` that names `key`.
    """
    if shift == "resolution":
        return math.exp(time_shift_mu(num_image_tokens))
    if shift == "none":
        return 1.0
    try:
        factor = float(shift)
    except ValueError:
        raise ValueError(f"{key}={shift}: choose resolution, none, or a number") from None
    if not 0 < factor <= 1e6:
        raise ValueError(f"{key}={shift}: the factor must be above 0, at most 1,000,000; 1 is none")
    return factor


def guidance_range(policy):
    """`"3.5"` or `"uniform[1,7]"` as (low, high)."""
    text = policy.replace(" ", "")
    try:
        if text.startswith("uniform[") and text.endswith("]"):
            low, high = (float(x) for x in text[len("uniform[") : -1].split(","))
        else:
            low = high = float(text)
    except ValueError:
        raise ValueError(f"flow.guidance={policy}: write a number, or uniform[a,b]") from None
    if not 0 <= low <= high <= 1000:
        raise ValueError(f"flow.guidance={policy}: write a range within 0 and 1000, least first")
    return low, high


def sample_t(config, num_image_tokens, *, seed, indices, batch=None):
    """Training times (B,), one for each global sample index, shifted for the resolution.

    With `flow.stratified` those of a `batch` of successive indices are spread evenly.
    """
    keys = dict(seed=seed, indices=indices)
    u = stratified_uniform(batch, **keys) if config.stratified else rng.uniform(stream="t", **keys)
    t = u
    if config.density == "logit_normal":
        z = torch.special.ndtri(u) if config.stratified else rng.normal((), stream="t", **keys)
        t = torch.sigmoid(config.logit_mean + config.logit_std * z)
    elif config.density == "mode":
        t = 1 - u - config.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return shift_time(t, shift_factor(config.shift, num_image_tokens))


def stratified_uniform(batch, *, seed, indices):
    """Draws from [0, 1) (B,), one from each `batch`-th of it for successive global indices (the
    stratified sampling of Monte Carlo methods).

    Which place in a batch has which share turns from batch to batch.
    """
    inside = rng.uniform(seed=seed, indices=indices, stream="t")
    turn = rng.uniform(seed=seed, indices=[i // batch for i in indices], stream="turn")
    place = torch.tensor([i % batch for i in indices])
    return ((place + (batch * turn).floor()) % batch + inside) / batch


def sample_guidance(config, *, seed, indices):
    """Training guidance (B,)."""
    low, high = guidance_range(config.guidance)
    return low + (high - low) * rng.uniform(seed=seed, indices=indices, stream="guidance")


def add_noise(x0, noise, t):
    """Clean tokens (B, L, C) at times t, (B,) or one number: (1 − t)·x0 + t·noise."""
    t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
    return (1 - t) * x0 + t * noise


def velocity_loss(velocity, x0, noise, weights=None):
    """Mean squared error against noise − x0, one number a sample: (B,).

    With `weights` (B, L, C) each value's error is multiplied by its own. The mean is over all
    values still: a value counts alike, whatever a mask leaves of its sample.
    """
    errors = (velocity.float() - (noise - x0)).square()
    return (errors if weights is None else errors * weights).flatten(1).mean(dim=1)


def schedule(steps, factor, *, terminal=None):
    """Sampling times, (steps + 1,) from 1 to 0, shifted by a factor; it is 1 for schnell.

    With `terminal` they are stretched, so that this is the last but one (LTX-Video's schedule).
    """
    t = shift_time(torch.linspace(1, 1 / steps, steps, dtype=torch.float64), factor)
    if terminal:
        t = 1 - (1 - t) * (1 - terminal) / (1 - t[-1])
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)]).float()


def euler_step(x, velocity, t, t_next):
    """One step of dx/dt = velocity from t to t_next, in float32."""
    return x + (t_next - t) * velocity.float()
