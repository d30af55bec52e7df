"""From noise to pictures: `denoise` over any velocity function, and `sample`, which gives it a Flux.

B pictures, L tokens, C channels.
"""

from dataclasses import dataclass, field

import torch
from PIL import Image

from fluxlite import draws, flow
from fluxlite.latents import check_size, pack_latents, position_ids, unpack_latents
from fluxlite.model import rope_table


@dataclass
class SampleConfig:
    """How pictures are drawn."""

    height: int = field(default=1024, metadata={"help": "height in pixels"})
    width: int = field(default=1024, metadata={"help": "width in pixels"})
    steps: int = field(default=28, metadata={"help": "Euler steps"})
    guidance: float = field(default=3.5, metadata={"help": "guidance embedding; only for models that have one (dev)"})
    true_cfg: float = field(
        default=1.0, metadata={"help": "strength of classifier-free guidance away from negative_prompt; 1 for none"}
    )
    shift: str = field(
        default="auto", metadata={"help": "time shift: auto (schnell none, else resolution), resolution, none, or a number"}
    )
    max_sequence_length: int = field(default=512, metadata={"help": "T5 tokens that prompts are padded and cut to"})

    def validate(self, downsampling=8):
        check_size(self.height, self.width, downsampling)
        if self.steps < 1 or self.max_sequence_length < 1:
            raise ValueError(f"steps={self.steps} and max_sequence_length={self.max_sequence_length} must be at least 1")
        if self.true_cfg < 1:
            raise ValueError(f"true_cfg={self.true_cfg} must be at least 1")
        if self.shift != "auto":
            flow.training_mu(self.shift, 256)


def denoise(velocity, x, times, progress=lambda steps: steps):
    """Euler from times[0] to times[-1]: x (B, L, C) float32; `velocity(x, i)` is the velocity at times[i]."""
    for i in progress(range(len(times) - 1)):
        x = flow.euler_step(x, velocity(x, i), times[i], times[i + 1])
    return x


def times_for(config, model_config, num_image_tokens):
    """Sampling times (steps + 1,) for a model: FLUX's shift by resolution, none for models without guidance (schnell)."""
    shift = config.shift
    if shift == "auto":
        shift = "resolution" if model_config.guidance_embed else "none"
    return flow.schedule(config.steps, flow.training_mu(shift, num_image_tokens))


def initial_noise(shape, seeds):
    """Packed noise (B, L, C) for latents of `shape` (C, h, w), a picture for each seed: the same in any batch."""
    return pack_latents(draws.normal(shape, seed=0, indices=seeds, stream="sampling"))


@torch.inference_mode()
def sample(model, txt, pooled, noise, config, *, negative=None, whole_forward=False, progress=lambda steps: steps):
    """Denoised packed latents (B, L, C) float32.

    txt (B, L_txt, D), pooled (B, P) and packed `noise` (B, L, C) of latents height/8 by width/8; `negative` is the (txt, pooled) of
    the negative prompts when config.true_cfg > 1. `whole_forward` calls the model's forward at every step, as a sharded model
    needs; without it the modulation of all steps is computed at once.
    """
    device, batch, num_text = noise.device, len(noise), txt.shape[1]
    times = times_for(config, model.config, noise.shape[1])
    rope = rope_table(position_ids(config.height // 8, config.width // 8, num_text).to(device), model.config)
    guidance = torch.full((batch,), config.guidance, device=device) if model.config.guidance_embed else None

    def velocity_from(txt, pooled):
        if whole_forward:
            return lambda x, i: model(x, txt, rope, t=times[i].expand(batch).to(device), pooled=pooled, guidance=guidance)
        projected = model.txt_in(model.cast(txt))
        modulations = [model.modulate(t.expand(batch).to(device), model.cast(pooled), guidance) for t in times[:-1]]
        return lambda x, i: model.velocity(x, projected, rope, modulations[i])

    velocity = positive = velocity_from(txt, pooled)
    if config.true_cfg > 1 and negative is not None:
        against = velocity_from(*negative)

        def velocity(x, i):
            away = against(x, i).float()
            return away + config.true_cfg * (positive(x, i).float() - away)

    return denoise(velocity, noise, times, progress)


@torch.inference_mode()
def decode(autoencoder, tokens, height, width):
    """Packed latents (B, L, C) to PIL pictures of height x width pixels."""
    factor = autoencoder.config.downsampling
    images = autoencoder.decode(unpack_latents(tokens, height // factor, width // factor)).float()
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to("cpu", torch.uint8)
    return [Image.fromarray(p.numpy()) for p in pixels]
