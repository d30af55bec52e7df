"""Training a ControlNet beside a transformer, which is frozen in the compute dtype.

B samples, L tokens, C channels of a token.
"""

import logging
from dataclasses import dataclass
from functools import partial

import torch

from fluxlite import rng
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import option, refuse_first, same_option
from fluxlite.data.images import pixels_of
from fluxlite.nets.configs import ControlNetConfig, mode_number
from fluxlite.nets.controlnet import (
    ControlNet,
    count_used,
    initial_control_weight,
    nearest_depth,
    spread_samples,
    unused_parameters,
    weights_from_base,
)
from fluxlite.train import optim
from fluxlite.train.building import (
    check_shape,
    checked_weights,
    device_generator,
    flux_weights,
    frozen_weights,
    random_base_value,
    random_weights,
    wrap_flux,
    wrap_model,
)
from fluxlite.train.draws import keys_of, latent_noise
from fluxlite.train.meter import ControlMeter
from fluxlite.train.tasks.task import Task
from fluxlite.train.training_step import encode_pictures
from fluxlite.weights import sources

log = logging.getLogger("fluxlite")

SHAPE = ("num_double_blocks", "num_single_blocks", "hint", "num_modes")


@dataclass
class ControlNetTrainConfig:
    """The ControlNet that is trained beside a frozen transformer; none without `controlnet=default`
    or a recipe that has one.
    """

    train: bool = option(False, "train a ControlNet; set by controlnet=default", group="controlnet")
    checkpoint: str | None = option(
        None,
        "a ControlNet to start from, of any layout; its depth must be the one below",
        path=True,
        resume="elsewhere",
    )
    init_from_base: bool = option(
        True,
        "else start from the transformer's embedders and first blocks; false: random weights",
    )
    num_double_blocks: int = same_option(ControlNetConfig, "num_double_blocks")
    num_single_blocks: int = same_option(ControlNetConfig, "num_single_blocks")
    hint: str = same_option(ControlNetConfig, "hint")
    num_modes: int = same_option(ControlNetConfig, "num_modes")
    dropout: float = option(
        0.0, "share of samples trained with an empty control", at_least=0, below=1
    )
    meter_every: int = option(
        50,
        "steps between measurements of whether it learns; 0 for none",
        at_least=0,
        at_most=10**9,
        resume=True,
    )
    patience: int = option(
        300,
        "steps after which a control without effect is said loudly",
        at_least=0,
        at_most=10**9,
        resume=True,
    )

    def shape(self, base):
        """The `ControlNetConfig` beside a transformer of configuration `base`."""
        return ControlNetConfig.beside(base, **{name: getattr(self, name) for name in SHAPE})


def check_control(config):
    """Raise `ValueError` where a `TrainConfig` cannot train its ControlNet."""
    net, base = config.controlnet, config.model.shape()
    net.shape(base).validate()
    net.shape(base).check_hint(config.model.downsampling, "controlnet.hint=pixel: the ControlNet")
    refuse_first([*meter_conflicts(config), *mode_conflicts(config), *hint_conflicts(config)])
    if net.init_from_base and not net.checkpoint:
        net.shape(base).check_starts(base)


def meter_conflicts(config):
    """(whether it is so, text) of what the net and its meter lack of data."""
    replicate, shard, _, _ = config.parallel.sizes()
    least, count = max(8, 2 * replicate * shard), config.data.val_count
    yield (
        not config.data.control,
        "a ControlNet needs control pictures: set data.control=png (beside the target in the tar) "
        "or canny",
    )
    yield (
        config.controlnet.meter_every and count < least,
        "the meter compares a control with another's, which takes eight held-out samples, and two "
        f"on each data-parallel rank: set data.val_count={least} or more, not {count}, or "
        "controlnet.meter_every=0",
    )


def mode_conflicts(config):
    """The same of a union net's kinds of control."""
    mode, count = config.data.control_mode, config.controlnet.num_modes
    kind = -1 if mode in (None, "json") else mode_number(mode)
    yield (
        (mode is None) == (count > 0),
        f"controlnet.num_modes={count} and data.control_mode={mode}: only a union net has both",
    )
    yield (
        mode == "json" and config.data.kind not in ("webdataset", "folder"),
        f"data.control_mode=json: data={config.data.kind} has no modes, name a kind",
    )
    yield (
        kind >= count and mode is not None,
        f"data.control_mode={mode} is kind {kind}: set controlnet.num_modes above that",
    )


def hint_conflicts(config):
    """The same of what the net sees of a control."""
    pixel = config.controlnet.hint == "pixel"
    shared = config.parallel.cp > 1 or config.parallel.sequence_parallel
    yield (
        shared and (pixel or config.controlnet.num_modes),
        "parallel.cp and parallel.sequence_parallel share tokens, which a ControlNet with "
        "controlnet.hint=pixel or controlnet.num_modes makes itself: leave them out",
    )
    yield (
        pixel and config.data.cache,
        "controlnet.hint=pixel needs pictures, and data.cache holds latents: set data.cache=null",
    )
    yield (
        pixel and config.data.kind == "mock",
        "controlnet.hint=pixel needs pictures, and data=mock makes up latents: choose other data",
    )


# --- weights --------------------------------------------------------------------------------------


def meta_controlnet(config):
    """The ControlNet on meta, as it is."""
    with torch.device("meta"):
        return ControlNet(config.controlnet.shape(config.model.shape()), config.model.attention)


def wrap_controlnet(config, mesh):
    """The ControlNet on meta, wrapped; parameters that no gradient can reach are frozen and
    logged.
    """
    base, net = config.model.shape(), meta_controlnet(config)
    optim.freeze_parameters(net.train(), config.optim)
    unused = unused_parameters(net, base)
    parameters = dict(net.named_parameters())
    for name in unused:
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            "optim.trainable and optim.freeze leave nothing to train that a gradient can reach: "
            "see controlnet's depth"
        )
    if mesh:
        log_unused(net.config, base, unused)
    return wrap_model(net, config, mesh)


def log_unused(shape, base, unused):
    """Log what is frozen since no gradient can reach it, and the nearest depth that wastes no
    block.
    """
    for kind in ("double", "single"):
        count, num_base = getattr(shape, f"num_{kind}_blocks"), getattr(base, f"num_{kind}_blocks")
        taken = count_used(num_base, count, cyclic=kind == "double" and shape.hint == "pixel")
        if taken < count:
            warn_for_all(
                "controlnet.num_%s_blocks=%d: the transformer's %d blocks take the outputs of %d, "
                "the rest is frozen; %d would waste none",
                *(kind, count, num_base, taken, nearest_depth(num_base, count)),
            )
    if unused:
        log.info("frozen, since no gradient can reach them: %s", ", ".join(unused))


def controlnet_weights(config, device):
    """A ControlNet's (name, values) to start from: a checkpoint's, its base's, or random."""
    control, net = config.controlnet, meta_controlnet(config)
    if control.checkpoint:
        source = sources.open_part(control.checkpoint, "controlnet", ema=config.model.ema)
        check_shape(source, net.config, "controlnet.checkpoint", control.checkpoint)
        return checked_weights(source, "controlnet.checkpoint")
    if control.init_from_base:
        base = config.model.shape(), flux_weights(config, device, random_base_value)
        generator = device_generator(config.seed, "controlnet", device)
        return weights_from_base(net, *base, device, generator)
    return random_weights(net, config.seed, device, partial(initial_control_weight, net.config))


# --- a step ---------------------------------------------------------------------------------------


def controlled_velocity(net, flux, img, txt, rope, *, hint=None, mode=None, **inputs):
    """The transformer's velocity, steered by the ControlNet; without `hint` its own."""
    if hint is None:
        return flux(img, txt, rope, **inputs)
    samples = net(img, txt, rope, hint=hint.to(img.dtype), mode=mode, **inputs)
    return flux(
        img, txt, rope, residuals=spread_samples(samples, net.config, flux.config), **inputs
    )


def draw_control(config, sample):
    """The noise (C, h, w) of a control's posterior, and whether a sample is trained without it.

    Raises `ValueError` for a mode that the net has not.
    """
    control, keys = config.controlnet, keys_of(config, sample)
    if control.num_modes and sample["modes"] >= control.num_modes:
        raise ValueError(
            f"controlnet.num_modes={control.num_modes}, but a sample's json has the mode "
            f"{int(sample['modes'])}"
        )
    noise = latent_noise(config, sample, "control")
    dropped = rng.uniform(stream="control dropout", **keys) < control.dropout
    return {"control_noise": noise, "control_dropped": dropped[0]}


def encode_control(run, batch):
    """A ControlNet's hint, latents (B, L, C) or pixels (B, 3, H, W), and of a union net the mode
    (B,).
    """
    control = run.config.controlnet
    if control.hint == "pixel":
        hint = pixels_of(batch["controls"])
    else:
        hint = encode_pictures(run, batch, "controls", "control_noise")
    return {"hint": hint} | ({"mode": batch["modes"]} if control.num_modes else {})


def drop_control(run, inputs, batch):
    """Inputs with the control of a share of the samples emptied: black pixels, or latents of
    zero.
    """
    control, hint = run.config.controlnet, inputs["hint"]
    if not control.dropout:
        return inputs
    gone = batch["control_dropped"].view(-1, *[1] * (hint.ndim - 1))
    return inputs | {"hint": torch.where(gone, -1.0 if control.hint == "pixel" else 0.0, hint)}


def make_meter(run, held_out):
    """What measures whether the ControlNet learns; None with controlnet.meter_every=0."""
    every = run.config.controlnet.meter_every
    return ControlMeter(run, held_out, every) if every else None


CONTROLNET = Task(
    name="controlnet",
    models=(
        (wrap_controlnet, controlnet_weights),
        (partial(wrap_flux, frozen=True), frozen_weights),
    ),
    velocity_of=lambda models: partial(controlled_velocity, *models),
    check_settings=check_control,
    draw_inputs=draw_control,
    encode_inputs=encode_control,
    drop_inputs=drop_control,
    make_meter=make_meter,
    shown=(("control", "controls"), ("target", "images")),
)
