"""Make `assets/flux-tiny`: a tiny but complete FLUX pipeline, every part trained on generated
fill50k pictures and captions.

    python scripts/make_tiny.py  # all stages, about two hours and a half on two cores
    python scripts/make_tiny.py --stage vae        # or text, transformer, controlnet

Pairs of colours that `fill50k.is_held_out` holds out are in no stage's data. Weights are stored in
bfloat16.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fluxlite.cli.programs import run_program, stop_at_once

if __name__ == "__main__":
    stop_at_once()

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_text import make_text
from torch import nn

from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.options import option
from fluxlite.data import fill50k
from fluxlite.nets.autoencoder import Autoencoder, AutoencoderConfig, sample_posterior
from fluxlite.weights import layouts
from fluxlite.weights.sources import load_transformer, open_source, write_converted

SIZE = 64
STAGES = ("vae", "text", "transformer", "controlnet")
ASSETS = Path(__file__).parent.parent / "assets" / "flux-tiny"


def cosine(progress, warmup=0.02):
    return min(1.0, progress / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fit(parameters, step, *, minutes, lr, log_every=200):
    """AdamW with a cosine schedule over wall time; `step()` returns a loss; keeps and returns the
    mean of the last weights.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    shadow = [p.detach().clone() for p in parameters]
    start, count = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(progress)
        loss = step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        count += 1
        decay = min(0.995, (1 + count) / (10 + count))
        torch._foreach_lerp_(shadow, parameters, 1 - decay)
        if count % log_every == 0:
            print(
                f"{progress:5.1%} of {minutes} min, step {count}, loss {loss.item():.5f}",
                flush=True,
            )
    with torch.no_grad():
        for p, s in zip(parameters, shadow):
            p.copy_(s)


def save_module(folder, tensors, config, name):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- autoencoder ----------------------------------------------------------------------------------


def picture_batches(batch, seed):
    """Endless batches of training pictures, (batch, 3, SIZE, SIZE) in [-1, 1], drawn afresh."""
    choices, index = fill50k.pairs(held_out=False), 0
    while True:
        rows = [
            fill50k.draw_sample(index + i, size=SIZE, seed=seed, choices=choices)[0]
            for i in range(batch)
        ]
        index += batch
        yield torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1


def initialise_residual(vae):
    """Unit-variance convolutions, and residual branches that start at zero: some times faster than
    torch's default.
    """
    for name, module in vae.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)


def make_vae(minutes):
    """Two phases: pictures alone, then with noise of up to 0.4 of the latents' spread, so that the
    decoder forgives errors.
    """
    torch.manual_seed(0)
    config = AutoencoderConfig(
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
    )
    vae = Autoencoder(config).to(memory_format=torch.channels_last)
    initialise_residual(vae)
    nn.init.constant_(
        vae.encoder.conv_out.bias[config.latent_channels :], -4
    )  # little noise at first: pictures before priors
    batches = picture_batches(8, seed=1)

    def step(noise):
        images = next(batches).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = vae.posterior(images)
            level = noise * mean.detach().std() * torch.rand(len(mean), 1, 1, 1)
            out = vae.decoder(
                sample_posterior(mean, logvar, torch.randn_like(mean))
                + level * torch.randn_like(mean)
            )
        error = out.float() - images
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + 1e-4 * kl

    fit(vae.parameters(), partial(step, 0.0), minutes=0.7 * minutes, lr=2e-3)
    fit(vae.parameters(), partial(step, 0.4), minutes=0.3 * minutes, lr=2e-3)
    vae = vae.to(memory_format=torch.contiguous_format).to(torch.bfloat16).float()
    with torch.no_grad():
        images = torch.cat([next(batches) for _ in range(64)])
        mean, logvar = vae.posterior(images)
        sample = sample_posterior(mean, logvar, torch.randn_like(mean))
        config.shift_factor, config.scaling_factor = (
            round(sample.mean().item(), 4),
            round(1 / sample.std().item(), 4),
        )
        error = (vae.decode(vae.encode(images)) - images) * 127.5
    print(f"reconstruction: mean |error| {error.abs().mean():.2f} of 255; latents {config}")
    save_module(
        ASSETS / "vae",
        vae.state_dict(),
        layouts.autoencoder_config_to_diffusers(config),
        "diffusion_pytorch_model.safetensors",
    )


# --- transformer ----------------------------------------------------------------------------------


def make_transformer():
    """Train by `train.py recipe=flux_tiny` (which resumes), then write the averaged weights in
    diffusers' layout.
    """
    root, run = ASSETS.parent.parent, "runs/flux_tiny"
    subprocess.run(
        [sys.executable, "train.py", "recipe=flux_tiny", f"output={run}", "resume=auto"],
        cwd=root,
        check=True,
    )
    model = load_transformer(root / run)
    state = model.state_dict()
    tensors = layouts.from_fluxlite(state, model.config, "diffusers")
    config = layouts.config_to_diffusers(model.config)
    save_module(ASSETS / "transformer", tensors, config, "diffusion_pytorch_model.safetensors")
    write_index()


def make_controlnet():
    """Train by `train.py recipe=controlnet_tiny` beside the shipped transformer, go on from there,
    and write the average.
    """
    root, first, run = ASSETS.parent.parent, "runs/controlnet_tiny", "runs/controlnet_shipped"
    train = [sys.executable, "train.py", "recipe=controlnet_tiny", "resume=auto"]
    subprocess.run([*train, f"output={first}"], cwd=root, check=True)
    longer = [f"controlnet.checkpoint={first}", "optim.lr=3e-3", "steps=3000", f"output={run}"]
    longer += ["data.count=40000", "data.cache=data/fill50k-64-40000-control"]
    subprocess.run([*train, *longer], cwd=root, check=True)
    write_converted(
        open_source(root / run),
        ASSETS / "controlnet",
        to="diffusers",
        dtype=torch.bfloat16,
        overwrite=True,
    )


def write_index():
    """The files that make the parts a pipeline: for diffusers `model_index.json` and the
    scheduler's, for us default settings.
    """
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.30.0",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    }
    settings = {
        "height": SIZE,
        "width": SIZE,
        "steps": 28,
        "guidance": 3.5,
        "max_sequence_length": 16,
    }
    (ASSETS / "scheduler").mkdir(exist_ok=True)
    for name, values in {
        "model_index.json": index,
        "scheduler/scheduler_config.json": scheduler,
        "fluxlite.json": settings,
    }.items():
        (ASSETS / name).write_text(json.dumps(values, indent=2) + "\n")


# --- driver ---------------------------------------------------------------------------------------


@dataclass
class TinyConfig:
    """What this script takes."""

    stage: str = option("all", "what to train", choices=("all", *STAGES))
    vae_minutes: float = option(30.0, "minutes for the autoencoder", above=0, at_most=10_000)
    text_minutes: float = option(7.0, "minutes for the encoders", above=0, at_most=10_000)
    threads: int = option(2, "threads of torch", at_least=1, at_most=1024)


def usage():
    return flags_help(TinyConfig, __doc__)


def body(arguments):
    config = parse_flags(TinyConfig, arguments)
    torch.set_num_threads(config.threads)
    stages = {
        "vae": lambda: make_vae(config.vae_minutes),
        "text": lambda: make_text(ASSETS, config.text_minutes),
        "transformer": make_transformer,
        "controlnet": make_controlnet,
    }
    for name in STAGES if config.stage == "all" else [config.stage]:
        stages[name]()


if __name__ == "__main__":
    run_program(body, usage=usage, ranks=False)
