"""From noise to latents to pictures: the velocity that `solvers` ask for, and what is around it.

What depends on the step alone is computed for all steps before the first (`condition_net`); then
its weights are not needed any more.

B pictures, P prompts, L tokens, C channels, H hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from fluxlite import parallel, rng
from fluxlite.data.transfers import begin_read, send_tensor
from fluxlite.draw.solvers import sample_euler
from fluxlite.nets.latents import pack_latents, unpack_latents
from fluxlite.nets.schedule import times_for


def initial_noise(shape, seeds):
    """Packed noise (B, L, C) for latents of `shape` (C, h, w), a picture for each seed: the same in
    any batch.
    """
    return pack_latents(rng.normal(shape, seed=0, indices=seeds, stream="sampling"))


# --- what depends on the prompt and the step ------------------------------------------------------


@dataclass
class Conditions:
    """All that a net needs to know of P prompts at every step.

    txt (P, L_txt, H) projected text; modulation (steps, chunks, P, 1, H).
    """

    txt: torch.Tensor
    modulation: torch.Tensor


def join_conditions(parts):
    """The `Conditions` of several prompts from those of each."""
    txt = torch.cat([part.txt for part in parts])
    return Conditions(txt, torch.cat([part.modulation for part in parts], dim=2))


def guidance_rows(model_config, guidance, count, device):
    """The guidance input (count,), or None for a model without one (schnell)."""
    return torch.full((count,), guidance, device=device) if model_config.guidance_embed else None


@torch.inference_mode()
def condition_net(net, txt, pooled, times, guidance, mode=None):
    """The `Conditions` of encoded prompts txt (P, L_txt, D), pooled (P, W) at times (steps + 1,),
    where those lie; computed where the weights lie.

    One GEMM of P x steps rows. `mode` is a union ControlNet's. Afterwards the net's
    `drop_conditioning` may free a quarter of its weights.
    """
    prompts, steps, device = len(txt), len(times) - 1, txt.device
    txt, pooled = (x.to(net.txt_in.weight.device) for x in (txt, pooled))
    t = send_tensor(times[:-1].repeat_interleave(prompts), txt.device)
    rows = net.cast(pooled).repeat(steps, 1)
    modulation = net.modulate(t, rows, guidance_rows(net.config, guidance, len(t), txt.device))
    txt = net.txt_in(net.cast(txt))
    if mode is not None:
        txt = net.with_mode(txt, torch.full((prompts,), mode, device=txt.device))
    modulation = rearrange(modulation, "m (s p) 1 h -> s m p 1 h", s=steps)
    return Conditions(txt.to(device), modulation.to(device))


def conditions_fit(net, num_prompts, steps):
    """Whether the modulation of all prompts at all steps takes no more memory than its weights.

    At 28 steps FLUX.1-dev's are worth 110 prompts.
    """
    features = sum(net.config.modulation_chunks) * net.config.hidden_size
    taken = num_prompts * steps * features * net.txt_in.weight.dtype.itemsize
    return taken <= sum(p.nbytes for p in net.modulation.parameters())


def prepare_conditions(net, texts, times, guidance, mode=None, *, keep) -> Callable:
    """A function from numbers of the encoded prompts `texts`, each (txt (1, L_txt, D), pooled (1,
    W)), to their `Conditions`, of each prompt the same in any company.

    They are computed at once, where they fit; unless `keep`, the net then loses the weights that
    it needs no more. Else they are computed when they are asked for.
    """

    def condition(number):
        return condition_net(net, *texts[number], times, guidance, mode)

    known = None
    if conditions_fit(net, len(texts), len(times) - 1):
        known = [condition(number) for number in range(len(texts))]
        if not keep:
            net.drop_conditioning()
    of = known.__getitem__ if known else condition
    return lambda numbers: join_conditions([of(number) for number in numbers])


# --- from noise to latents ------------------------------------------------------------------------


@torch.inference_mode()
def sample_latents(
    model,
    conditions,
    noise,
    rope,
    times,
    *,
    true_cfg=1.0,
    negative=None,
    residuals=None,
    see=lambda x: x,
    compute=lambda passes: [one() for one in passes],
    callback=lambda step, x: x,
    solver=sample_euler,
):
    """Denoised packed latents (B, L, C) float32 from packed `noise` (B, L, C), a picture for each
    row of `conditions`; `rope` is the `rope_table` of their text and image tokens, references last.

    `negative` are the conditions of the negative prompts, perhaps shorter, for true_cfg > 1;
    `residuals(x, i, rope)` those of ControlNets at step i, or None. As in diffusers, those for the
    prompt serve the negative prompt too. `see(x)` is x as the model sees it, with channels beside
    it and tokens behind it (`kinds.Guide`). `compute(passes)` calls those of a step: the prompt's,
    and the negative prompt's. `solver` and `callback` are as in `sample_euler`.
    Raises `ValueError` where latents are not finite.
    """
    finite = []  # looked at in the end: in the loop the device is not waited for
    length, tokens = conditions.txt.shape[1], noise.shape[1]
    own_rope = tuple(table[: length + tokens] for table in rope)

    def velocity_for(of, seen, i, added):
        there = tuple(table[length - of.txt.shape[1] :] for table in rope)  # all text lies at 0
        return model.velocity(seen, of.txt, there, of.modulation[i], added)[:, :tokens]

    def velocity(x, i):
        seen, added = see(x), residuals(x, i, own_rope) if residuals else None
        added = pad_residuals(added, seen.shape[1] - x.shape[1])
        positive = partial(velocity_for, conditions, seen, i, added)
        if negative is None:
            return positive()
        positive, away = compute([positive, partial(velocity_for, negative, seen, i, added)])
        away = away.float()
        return away + true_cfg * (positive.float() - away)

    def watch_step(step, x):
        finite.append(x.isfinite().all())
        return callback(step, x)

    latents = solver(velocity, noise, times, watch_step)
    if finite:
        check_latents_finite(model, conditions, begin_read(torch.stack(finite))())
    return latents


def pad_residuals(residuals, tokens):
    """A ControlNet's residuals, or None, with zeros for so many tokens that it does not see."""
    if not residuals or not tokens:
        return residuals
    pad = partial(F.pad, pad=(0, 0, 0, tokens))
    return [[*map(pad, of_kind)] for of_kind in residuals]


def check_latents_finite(model, conditions, finite):
    """Raise `ValueError`, naming where it began, unless latents were finite at every step."""
    if all(finite):
        return
    tensors = [("the encoded prompt", conditions.txt), ("the modulation", conditions.modulation)]
    tensors += model.named_parameters()
    values = ((name, parallel.plain_values(t).float()) for name, t in tensors)
    where = next((name for name, t in values if not t.isfinite().all()), None)
    others = "no weight of the transformer does: look at the ControlNet, or try dtype=float32"
    cause = f"{where} holds some" if where else others
    step, last = finite.index(False), len(finite) - 1
    raise ValueError(
        f"the latents are NaN or infinite after step {step} of {last}, and {cause}; "
        "convert_hf.py names the first tensor of a checkpoint that does"
    )


@torch.inference_mode()
def sample_sharded(forward, model_config, txt, pooled, noise, rope, config, dtype, negative=None):
    """`sample_latents` by whole forwards, as sharded models in training need, whose weights are
    gathered inside `forward` alone.

    `forward(img, txt, rope, t=, pooled=, guidance=)` is a velocity. `negative` are txt and pooled
    of the negative prompts, for true_cfg > 1.
    """
    times = times_for(config, model_config, noise.shape[1])
    guidance = guidance_rows(model_config, config.guidance, len(noise), noise.device)

    there = send_tensor(times, noise.device)

    def velocity_for(x, i, txt, pooled):
        t = there[i].expand(len(x))
        return forward(x.to(dtype), txt, rope, t=t, pooled=pooled, guidance=guidance)

    def velocity(x, i):
        positive = velocity_for(x, i, txt, pooled)
        if negative is None:
            return positive
        return velocity_for(x, i, *negative).float().lerp(positive.float(), config.true_cfg)

    return sample_euler(velocity, noise, times)


# --- from latents to pictures ---------------------------------------------------------------------


@torch.inference_mode()
def decode_pictures(autoencoder, tokens, height, width, tile=0):
    """Packed latents (B, L, C) to PIL pictures of height x width pixels; with `tile` decoded in
    tiles of so many pixels a side.
    """
    factor = autoencoder.config.downsampling
    latents = unpack_latents(tokens, height // factor, width // factor)
    pixels = decode_latents(autoencoder, latents, tile)
    given, made = begin_read(torch.stack([x.isfinite().all() for x in (tokens, pixels)]))()
    if given and not made:
        raise ValueError(
            "the autoencoder gives NaN or infinite pixels: try dtype=float32, or fetch it again"
        )
    return pictures_of(pixels)


def decode_latents(autoencoder, latents, tile=0):
    """Latents (B, C, h, w) as pixels; with `tile` decoded in tiles of so many pixels a side."""
    if not tile:
        return autoencoder.decode(latents)
    return autoencoder.decode_tiled(latents, tile // autoencoder.config.downsampling)


def pictures_of(pixels):
    """Pixels (B, 3, H, W) in [-1, 1] as PIL pictures."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    rows = levels.permute(0, 2, 3, 1).to("cpu", torch.uint8)
    return [Image.fromarray(row.numpy()) for row in rows]
