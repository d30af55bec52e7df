"""Make `assets/flux-tiny`: a tiny but complete FLUX pipeline, every part trained on generated
fill50k pictures and captions.

    python scripts/make_tiny.py  # all stages, about two hours and a half on two cores
    python scripts/make_tiny.py --stage vae        # or text, transformer, controlnet

Pairs of colours that `fill50k.is_held_out` holds out are in no stage's data. Weights are stored in
bfloat16.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fluxlite.cli.programs import run_program, stop_at_once

if __name__ == "__main__":
    stop_at_once()

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_fit import fit_parameters
from tiny_text import make_text
from torch import nn

from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.options import option
from fluxlite.data import fill50k
from fluxlite.nets.autoencoder import Autoencoder, sample_posterior
from fluxlite.nets.configs import AutoencoderConfig
from fluxlite.weights import conversion, diffusers_configs
from fluxlite.weights.sources import load_transformer, open_source
from fluxlite.weights.writing import write_converted

SIZE = 64
STAGES = ("vae", "text", "transformer", "controlnet")
ASSETS = Path(__file__).parent.parent / "assets" / "flux-tiny"


def save_module(folder, tensors, config):
    """Write a part in bfloat16 as diffusers does, with its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    described = diffusers_configs.config_to_diffusers(config)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


# --- autoencoder ----------------------------------------------------------------------------------


def picture_batches(batch, seed):
    """Endless batches of training pictures, (batch, 3, SIZE, SIZE) in [-1, 1], drawn afresh."""
    choices, index = fill50k.colour_pairs(held_out=False), 0
    while True:
        numbers = range(index, index + batch)
        options = dict(size=SIZE, seed=seed, choices=choices)
        rows = [fill50k.draw_sample(number, **options)[0] for number in numbers]
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
    config = AutoencoderConfig((16, 32, 64, 96), layers_per_block=1, norm_num_groups=1)
    vae = Autoencoder(config).to(memory_format=torch.channels_last)
    initialise_residual(vae)
    # little noise at first: pictures before priors
    nn.init.constant_(vae.encoder.conv_out.bias[config.latent_channels :], -4)
    batches = picture_batches(8, seed=1)

    def step(noise):
        images = next(batches).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = vae.posterior(images)
            level = noise * mean.detach().std() * torch.rand(len(mean), 1, 1, 1)
            latents = sample_posterior(mean, logvar, torch.randn_like(mean))
            out = vae.decoder(latents + level * torch.randn_like(mean))
        error = out.float() - images
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + 1e-4 * kl

    fit_parameters(vae.parameters(), partial(step, 0.0), minutes=0.7 * minutes, lr=2e-3)
    fit_parameters(vae.parameters(), partial(step, 0.4), minutes=0.3 * minutes, lr=2e-3)
    vae = vae.to(memory_format=torch.contiguous_format).to(torch.bfloat16).float()
    with torch.no_grad():
        images = torch.cat([next(batches) for _ in range(64)])
        mean, logvar = vae.posterior(images)
        sample = sample_posterior(mean, logvar, torch.randn_like(mean))
        config.shift_factor = round(sample.mean().item(), 4)
        config.scaling_factor = round(1 / sample.std().item(), 4)
        error = (vae.decode(vae.encode(images)) - images) * 127.5
    print(f"reconstruction: mean |error| {error.abs().mean():.2f} of 255; latents {config}")
    save_module(ASSETS / "vae", vae.state_dict(), config)


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
    tensors = conversion.from_fluxlite(state, model.config, "diffusers")
    save_module(ASSETS / "transformer", tensors, model.config)
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
    settings = dict(height=SIZE, width=SIZE, steps=28, guidance=3.5, max_sequence_length=16)
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
    run_program(body, usage=partial(flags_help, TinyConfig, __doc__), ranks=False)
