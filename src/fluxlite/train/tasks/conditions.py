"""Transformers that see a picture beside noise and text: one to follow, one with a hole, a
reference.

`condition_task` gives any task what a kind of transformer sees, as `draw.kinds` does drawing:
channels beside the noisy ones, or tokens behind them.

B samples, L tokens, C channels of a token, H and W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from fluxlite import rng
from fluxlite.cli.options import refuse_first
from fluxlite.data.holes import random_hole
from fluxlite.nets.latents import pack_mask, seen_latents
from fluxlite.train.building import open_base
from fluxlite.train.draws import draw_nothing, latent_noise, shape_of
from fluxlite.train.training_step import encode_pictures

# of a model and of a LoRA: what learns to see new channels
INPUTS = {"img_in.weight", "x_embedder.down"}


@dataclass(frozen=True)
class Condition:
    """What a kind of transformer sees; fields as those of `Task`."""

    draw_inputs: Callable
    encode_inputs: Callable
    shown: tuple
    needs: str = ""  # of data.control=


def draw_follow(config, sample):
    """The noise (C, h, w) of the posterior of a picture to follow."""
    return {"control_noise": latent_noise(config, sample, "control")}


def encode_follow(run, batch):
    """A picture to follow as channels (B, L, C)."""
    latents = encode_pictures(run, batch, "controls", "control_noise")
    return {"channels": latents.to(run.dtype)}


def draw_hole(config, sample):
    """The hole of a sample (1, H, W) uint8, its mask where it has one, else at random; and the
    noise of the posterior of what is left.
    """
    height, width = (config.model.downsampling * cells for cells in shape_of(config, sample)[1:])
    seed = rng.generator(config.seed, sample["indices"], "hole").initial_seed()
    mask = sample["masks"] if "masks" in sample else random_hole(height, width, seed)
    return {"masks": mask, "hole_noise": latent_noise(config, sample, "masked picture")}


def encode_hole(run, batch):
    """The target, grey in its hole, and the hole as channels (B, L, C').

    Made-up latents, of no picture, stay whole.
    """
    holes = (batch["masks"] >= 128).float()
    known = encode_pictures(run, batch, "images", "hole_noise", keep=1 - holes)
    mask = pack_mask(holes, run.config.model.downsampling)
    return {"channels": torch.cat([known, mask], dim=-1).to(run.dtype)}


def encode_reference(run, batch):
    """A reference as tokens (B, L, C): the mode of its posterior, as drawing has it."""
    latents = encode_pictures(run, batch, "controls")
    return {"reference": latents.to(run.dtype)}


TARGET = ("target", "images")
CONDITIONS = {
    "control": Condition(
        *(draw_follow, encode_follow, (("control", "controls"), TARGET)),
        "control.png, beside the target, or canny",
    ),
    "fill": Condition(draw_hole, encode_hole, (("hole", "masks"), TARGET)),
    "kontext": Condition(
        *(draw_nothing, encode_reference, (("reference", "controls"), TARGET)),
        "ref.jpg, beside the target",
    ),
}


def condition_task(task, kind):
    """A `Task` whose transformer sees what a kind of `CONDITIONS` does."""
    added = CONDITIONS[kind]
    return replace(
        task,
        velocity_of=partial(connect_condition, task.velocity_of),
        check_settings=partial(check_condition, task.check_settings),
        draw_inputs=partial(join_values, (task.draw_inputs, added.draw_inputs)),
        encode_inputs=partial(join_values, (task.encode_inputs, added.encode_inputs)),
        shown=added.shown,
    )


def join_values(functions, *given):
    """All {name: value} that some functions make of what is given."""
    found = {}
    for function in functions:
        found |= function(*given)
    return found


def connect_condition(velocity_of, models):
    """velocity(img, txt, rope, …) of a task's models, with what they see beside img."""
    return partial(conditioned_velocity, velocity_of(models))


def conditioned_velocity(velocity, img, txt, rope, *, channels=None, reference=None, **inputs):
    """The velocity (B, L, C) of img (B, L, C) beside channels, or before a reference."""
    seen = seen_latents(img, channels, reference)
    return velocity(seen, txt, rope, **inputs)[:, : img.shape[1]]


# --- what cannot be trained -----------------------------------------------------------------------


def check_condition(check_settings, config):
    """Raise `ValueError` where a `TrainConfig` cannot train its kind, or its task."""
    refuse_first(condition_conflicts(config))
    check_settings(config)


def condition_conflicts(config):
    """(whether it is so, text) of each way in which settings do not go with a kind."""
    key, data = f"model.kind={config.model.kind}", config.data
    needs = CONDITIONS[config.model.kind].needs
    yield config.controlnet.train, f"{key}: a ControlNet is trained beside a plain transformer"
    yield needs and not data.control, f"{key} sees a picture: set data.control={needs}"
    yield (
        data.control and not needs,
        f"{key} sees the target itself, with a hole: leave data.control= out",
    )
    yield (
        not needs and data.mask == "alpha",
        f"{key} fills holes, and data.mask=alpha marks what is there: name an ending, as mask.png",
    )
    yield data.control_mode, f"data.control_mode= is for a union ControlNet, not for {key}"
    yield (
        not needs and data.cache and not data.cache_pictures,
        f"{key} masks pictures, and data.cache holds latents: set data.cache_pictures=true too",
    )


def check_sees(task, config):
    """Raise `ValueError` where nothing that is trained reads the channels that are new."""
    begun = config.model.checkpoint and open_base(config).config.in_channels
    if begun in (None, config.model.shape().in_channels):
        return
    wrap, _ = task.models[0]
    named = wrap(config, None).named_parameters()
    if not INPUTS & {name for name, p in named if p.requires_grad}:
        raise ValueError(
            f"model.kind={config.model.kind}: model.checkpoint={config.model.checkpoint} sees "
            "noise alone, and what would read more is not trained: leave img_in to optim.trainable="
            ", of a LoRA name x_embedder among lora.targets"
        )
