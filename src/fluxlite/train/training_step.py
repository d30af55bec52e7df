"""One training step: a batch encoded, noised, velocity, loss, gradient, update.

B samples of a micro-batch, L tokens, C channels of a token.
"""

import torch
import torch.nn.functional as F

from fluxlite import parallel, rng
from fluxlite.data.images import POSTERIORS, pixels_of
from fluxlite.data.transfers import feed_device, send_tensor
from fluxlite.nets import flow
from fluxlite.nets.autoencoder import sample_posterior
from fluxlite.nets.latents import pack_latents
from fluxlite.train import optim


def flow_loss(run, x0, txt, pooled, *, noise, t, guidance, rope=None, weights=None, **inputs):
    """The velocity loss of each sample (B,) at times t (B,), all on the run's device; `inputs` are
    the task's.

    `rope` is that of another shape than the configuration's, `weights` (B, L, C) are the values'.
    """
    noisy = flow.add_noise(x0, noise, t).to(run.dtype)
    conditions = dict(t=t, pooled=pooled.to(run.dtype), **inputs)
    if run.flux.config.guidance_embed:
        conditions["guidance"] = guidance
    velocity = run.velocity(noisy, txt.to(run.dtype), rope or run.rope, **conditions)
    return flow.velocity_loss(velocity, x0, noise, weights)


def train_step(run, batches, step):
    """One optimizer step over this rank's micro-batches, as `Run.loader` has them; their mean loss
    and the gradient's norm, both tensors.

    The host does not wait for the device here, nor look at a tensor that is there.
    """
    total = torch.zeros((), device=run.device)
    for i, batch in enumerate(feed_device(batches, run.device)):
        parallel.reduce_gradients(run.model, i == len(batches) - 1)
        x0, txt, pooled, inputs = encode_batch(run, batch)
        inputs = run.task.drop_inputs(run, inputs, batch)
        drawn = {name: batch[name] for name in ("noise", "t", "guidance")}
        shaped = dict(rope=run.rope_of(batch), weights=value_weights(run, batch))
        losses = flow_loss(run, x0, txt, pooled, **drawn, **shaped, **inputs)
        loss = losses.mean() / len(batches)
        loss.backward()
        total += loss.detach()
    parallel.average_gradients(run.model, run.mesh.fsdp)
    return total, optimizer_step(run, step, total)


def fixed_draws(run, indices, stream):
    """Noise (B, L, C) and guidance (B,), the middle of its range, that held-out samples are always
    measured with.
    """
    middle = sum(flow.guidance_range(run.config.flow.guidance)) / 2
    noise = pack_latents(rng.normal(run.latent_shape, seed=0, indices=indices, stream=stream))
    return {
        "noise": send_tensor(noise, run.device),
        "guidance": torch.full((len(indices),), middle, device=run.device),
    }


def optimizer_step(run, step, loss=0.0):
    """Clip the gradient, step the optimizers and the moving average; the gradient's norm, a tensor.

    Where a rank's loss or the gradient is not finite, the norm is not either, and nothing changes:
    the device sees to that without the host, which learns of it later, in `settle_step`.
    """
    config = run.config
    norm = optim.gradient_norm(run.gradient_groups, loss)
    skipped = (~torch.isfinite(norm)).float()
    for optimizer in run.optimizers:
        # as torch.amp.GradScaler has it: the device looks at both
        optimizer.found_inf = skipped
        optimizer.grad_scale = optim.clip_scale(norm, config.optim.clip)
        if hasattr(optimizer, "round_key"):
            optimizer.round_key = rng.generator(config.seed, step, "rounding").initial_seed()
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(config.optim, step, config.steps)
        optimizer.step()
        optimizer.zero_grad()
    if run.ema:
        run.ema.update(step, skipped)
    return norm


def value_weights(run, batch):
    """What each latent value of a batch counts in the loss, (B, L, C): the share of its cell that
    the mask leaves, times its sample's weight; (B, 1, 1) without masks. None where all count 1.
    """
    weights = batch["weights"].view(-1, 1, 1) if "weights" in batch else None
    if "masks" not in batch or run.config.model.kind == "fill":  # whose masks are holes
        return weights
    cells = F.avg_pool2d(batch["masks"].float() / 255, run.config.model.downsampling)
    masks = pack_latents(cells.expand(-1, run.latent_shape[0], -1, -1))
    return masks if weights is None else masks * weights


# --- from samples to latents ----------------------------------------------------------------------


@torch.no_grad()
def encode_batch(run, batch):
    """A batch on the device as clean tokens x0 (B, L, C) float32, txt, pooled, and the task's
    inputs {name: (B, …)}.
    """
    if "captions" in batch:
        length = run.config.model.max_sequence_length
        txt, pooled = run.parts.encoders.encode(batch["captions"], length)
    else:
        txt, pooled = batch["txt"], batch["pooled"]
    x0 = encode_pictures(run, batch, "images", "posterior_noise")
    return x0, txt, pooled, run.task.encode_inputs(run, batch)


def encode_pictures(run, batch, name, noise=None, keep=None):
    """Packed latents (B, L, C) float32 of a batch's pictures `name`: a sample of their posterior by
    the draws `noise`, without these its mode.

    With `keep` (B, 1, H, W) of the pixels' product with it, where there are pixels.
    """
    autoencoder, cached = run.parts.autoencoder, POSTERIORS[name]
    if cached[0] in batch and (keep is None or name not in batch):
        mean, logvar = (batch[key] for key in cached)
    else:
        pixels = pixels_of(batch[name])
        mean, logvar = autoencoder.posterior(pixels if keep is None else pixels * keep)
    latents = sample_posterior(mean.float(), logvar.float(), batch[noise] if noise else None)
    return pack_latents(latents if autoencoder is None else autoencoder.scale(latents))
