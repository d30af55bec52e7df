"""From noise to pictures: `denoise` over any velocity function, and `sample`, which gives it a
Flux.

What depends on the step alone is computed for all steps before the first (`condition`); then its
weights are not needed any more.

B pictures, L tokens, C channels.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image

from fluxlite import rng
from fluxlite.nets import flow
from fluxlite.nets.flux import rope_table
from fluxlite.nets.latents import pack_latents, position_ids, unpack_latents
from fluxlite.nets.schedule import times_for


def denoise(velocity, x, times, progress=lambda steps: steps):
    """Euler from times[0] to times[-1]: x (B, L, C) float32; `velocity(x, i)` is the velocity at
    times[i].
    """
    for i in progress(range(len(times) - 1)):
        x = flow.euler_step(x, velocity(x, i), times[i], times[i + 1])
    return x


def initial_noise(shape, seeds):
    """Packed noise (B, L, C) for latents of `shape` (C, h, w), a picture for each seed: the same in
    any batch.
    """
    return pack_latents(rng.normal(shape, seed=0, indices=seeds, stream="sampling"))


@dataclass
class Conditions:
    """All that the transformer needs to know of P prompts at every step: what depends on neither
    pictures nor noise.

    txt (P, L_txt, H) projected text; modulation (steps, chunks, P, 1, H).
    """

    txt: torch.Tensor
    modulation: torch.Tensor

    def rows(self, numbers):
        """The conditions of some of the prompts, by number, repeated as they are."""
        return Conditions(self.txt[numbers], self.modulation[:, :, numbers])

    @staticmethod
    def num_bytes(config, num_prompts, steps, dtype):
        """What the modulation of so many prompts and steps takes; at 28 steps FLUX.1-dev's weights
        are worth 110 prompts.
        """
        features = sum(config.modulation_chunks) * config.hidden_size
        return num_prompts * steps * features * dtype.itemsize


def guidance_rows(model_config, guidance, count, device):
    """The guidance input (count,), or None for a model without one (schnell)."""
    return torch.full((count,), guidance, device=device) if model_config.guidance_embed else None


@torch.inference_mode()
def condition(model, txt, pooled, times, guidance):
    """The `Conditions` of encoded prompts txt (P, L_txt, D), pooled (P, W) at times (steps + 1,):
    one GEMM of P x steps rows.

    Afterwards the model's `drop_conditioning` may free a quarter of its weights.
    """
    prompts, steps = len(txt), len(times) - 1
    t = times[:-1].to(txt.device).repeat_interleave(prompts)
    rows = model.cast(pooled).repeat(steps, 1)
    modulation = model.modulate(t, rows, guidance_rows(model.config, guidance, len(t), txt.device))
    return Conditions(
        model.txt_in(model.cast(txt)), rearrange(modulation, "m (s p) 1 h -> s m p 1 h", s=steps)
    )


def rope_for(model_config, noise, config, num_text):
    """The rotations of pictures of config.height x config.width after `num_text` text tokens."""
    return rope_table(
        position_ids(config.height // 8, config.width // 8, num_text).to(noise.device), model_config
    )


@torch.inference_mode()
def sample(
    model,
    conditions,
    noise,
    times,
    config,
    *,
    against=None,
    residuals=lambda *_: None,
    progress=lambda steps: steps,
):
    """Denoised packed latents (B, L, C) float32 from packed `noise` (B, L, C), a picture for each
    row of `conditions`.

    `against` are the conditions of the negative prompts, for config.true_cfg > 1; `residuals(x, i,
    rope)` those of ControlNets at step i, or None. As in diffusers, those for the prompt serve the
    negative prompt too.
    """
    rope, finite = rope_for(model.config, noise, config, conditions.txt.shape[1]), []

    def velocity(x, i):
        finite.append(x.isfinite().all())  # looked at in the end: the device is not waited for
        added = residuals(x, i, rope)
        positive = model.velocity(x, conditions.txt, rope, conditions.modulation[i], added)
        if against is None:
            return positive
        away = model.velocity(x, against.txt, rope, against.modulation[i], added).float()
        return away + config.true_cfg * (positive.float() - away)

    latents = denoise(velocity, noise, times, progress)
    check_drawn(model, conditions, [*finite, latents.isfinite().all()])
    return latents


def check_drawn(model, conditions, finite):
    """Raise `ValueError`, naming where it began, unless latents were finite at every step."""
    if all(finite):
        return
    tensors = [("the encoded prompt", conditions.txt), ("the modulation", conditions.modulation)]
    tensors += model.named_parameters()
    where = next((name for name, t in tensors if not t.float().isfinite().all()), None)
    others = "no weight of the transformer does: look at the ControlNet, or try dtype=float32"
    cause = f"{where} holds some" if where else others
    step = [bool(f) for f in finite].index(False)
    raise ValueError(
        f"the latents are NaN or infinite after step {step} of {len(finite) - 1}, and {cause}; "
        "convert_hf.py names the first tensor of a checkpoint that does"
    )


@torch.inference_mode()
def sample_sharded(forward, model_config, txt, pooled, noise, config, dtype):
    """`sample` by whole forwards, as sharded models in training need, whose weights are gathered
    inside `forward` alone.

    `forward(img, txt, rope, t=, pooled=, guidance=)` is a velocity.
    """
    times = times_for(config, model_config, noise.shape[1])
    rope = rope_for(model_config, noise, config, txt.shape[1])
    guidance = guidance_rows(model_config, config.guidance, len(noise), noise.device)

    def velocity(x, i):
        return forward(
            x.to(dtype),
            txt,
            rope,
            t=times[i].expand(len(x)).to(x.device),
            pooled=pooled,
            guidance=guidance,
        )

    return denoise(velocity, noise, times)


@torch.inference_mode()
def decode(autoencoder, tokens, height, width):
    """Packed latents (B, L, C) to PIL pictures of height x width pixels."""
    factor = autoencoder.config.downsampling
    pixels = autoencoder.decode(unpack_latents(tokens, height // factor, width // factor))
    if tokens.isfinite().all() and not pixels.isfinite().all():
        raise ValueError(
            "the autoencoder gives NaN or infinite pixels: try dtype=float32, or fetch it again"
        )
    return pictures_of(pixels)


def pictures_of(pixels):
    """Pixels (B, 3, H, W) in [-1, 1] as PIL pictures."""
    rounded = (
        ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255)
        .round()
        .permute(0, 2, 3, 1)
        .to("cpu", torch.uint8)
    )
    return [Image.fromarray(p.numpy()) for p in rounded]
