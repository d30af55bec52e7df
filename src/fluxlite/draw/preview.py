"""Pictures while they are drawn: what the latents seem to become, every few steps.

Either decoded, or by a linear map from a latent cell to the mean colour of its pixels, which takes
next to no time and is fitted to whatever autoencoder there is.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from fluxlite.cli.atomic import atomic_path
from fluxlite.data.transfers import send_tensor
from fluxlite.draw.contact_sheet import contact_sheet
from fluxlite.draw.sampling import decode_latents, pictures_of

PREVIEWS = "colours", "decoder"


@torch.inference_mode()
def fit_colours(autoencoder):
    """The map (C + 1, 3) from a latent cell, then 1, to its mean colour in [-1, 1]: least squares
    over made-up pictures of patches and blends.
    """
    weight = autoencoder.encoder.conv_in.weight
    cell, generator = autoencoder.config.downsampling, torch.Generator().manual_seed(0)
    colours = 2 * torch.rand(2, 3, 8, 8, generator=generator) - 1
    patches = F.interpolate(colours[:1], scale_factor=4 * cell)
    blends = F.interpolate(colours[1:], scale_factor=4 * cell, mode="bilinear")
    pixels = send_tensor(torch.cat([patches, blends]), weight.device)
    latents = autoencoder.encode(pixels)
    means = F.avg_pool2d(pixels, cell)
    known, wanted = (x.movedim(1, -1).flatten(0, 2).float().cpu() for x in (latents, means))
    ones = torch.ones(len(known), 1)
    return torch.linalg.lstsq(torch.cat([known, ones], 1), wanted).solution


def colours_of(latents, fitted):
    """Latents (B, C, h, w) as colours (B, 3, h, w) by the map of `fit_colours`."""
    fitted = fitted.to(latents.device)
    return torch.einsum("bchw,cd->bdhw", latents, fitted[:-1]) + fitted[-1][:, None, None]


@contextmanager
def previewing(pipeline, every, file, how="colours", tile=0):
    """Give an `on_step` that shows the pictures of a batch in a PNG, every so many steps; that is
    gone in the end. With `every` 0 it does nothing. The decoder has tiles of `tile` pixels a side.
    """
    if not every:
        yield lambda *_: None
        return
    try:
        yield preview_steps(pipeline, every, file, how, tile)
    finally:
        Path(file).unlink(missing_ok=True)


def preview_steps(pipeline, every, file, how, tile) -> Callable:
    """`previewing` as long as it lasts. What latents x at time t lead to is x - t * velocity, the
    velocity as the last step took it.
    """
    fitted, before = cache(fit_colours), []

    @torch.inference_mode()
    def on_step(numbers, step, times, latents):
        if before and step < len(times) - 1:
            t, change = times[step], latents - before.pop()
            clean = latents - t / (t - times[step - 1]) * change
            autoencoder = pipeline.autoencoder
            if how == "decoder":
                alone = [decode_latents(autoencoder, one[None], tile) for one in clean]
                pixels = torch.cat(alone)
            else:
                pixels = colours_of(clean, fitted(autoencoder))
                pixels = F.interpolate(pixels, scale_factor=autoencoder.config.downsampling)
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as part:
                contact_sheet(pictures_of(pixels)).save(part, "PNG")
        more = step < len(times) - 1 and (step + 1) % every == 0
        before[:] = [latents.clone()] if more else []

    return on_step
