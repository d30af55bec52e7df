"""Drawing with ControlNets: a net, the picture that it follows, when and how strongly.

    canny = fluxlite.Control("FLUX.1-dev-Controlnet-Canny", "edges.png", scale=0.7)
    pictures = fluxlite.generate("a fox", controls=[canny])

`open_control` checks all that can be seen without loading a net, `residuals` is what its samples
are at each step.

B pictures, L tokens, H hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from fluxlite import rng
from fluxlite.cli.options import check_options, expand_home, option
from fluxlite.data import images
from fluxlite.draw import sampling
from fluxlite.nets.autoencoder import sample_posterior
from fluxlite.nets.configs import ControlNetConfig
from fluxlite.nets.control_modes import MODES, mode_number
from fluxlite.nets.controlnet import ControlNet, spread_samples, sum_residuals
from fluxlite.nets.latents import pack_latents
from fluxlite.weights import sources, writing


@dataclass
class Control:
    """A ControlNet to draw with; several of them add up."""

    checkpoint: object = field(
        metadata={
            "help": "a file or folder of any layout, a hub repository, or a loaded ControlNet"
        }
    )
    image: object = field(
        metadata={
            "help": "the picture to follow, a path or a PIL image, resized and cropped as in "
            "training; a list: one a prompt"
        }
    )
    scale: float = option(1.0, "strength; 0 for no effect", at_least=-100, at_most=100)
    start: float = option(
        0.0, "part of the steps before which the net is off", at_least=0, at_most=1
    )
    end: float = option(1.0, "part of the steps after which the net is off", at_least=0, at_most=1)
    mode: str | int | None = option(None, f"of a union net: {', '.join(MODES)}, or a number")
    save_converted: str | None = option(None, "where to keep the checkpoint in our own layout")

    def validate(self):
        check_options(self, "controlnet.")
        if not self.start < self.end:
            raise ValueError(
                f"controlnet.start={self.start} must be less than controlnet.end={self.end}, both "
                "from 0 to 1"
            )

    def active(self, step, num_steps):
        """Whether the net takes part in a step: where all of it lies between start and end, as in
        diffusers.
        """
        return not (step / num_steps < self.start or (step + 1) / num_steps > self.end)

    def settings(self):
        """What a picture's metadata say of it."""
        path = isinstance(self.checkpoint, (str, Path))
        named = isinstance(self.image, (str, Path))
        own = {
            "checkpoint": str(self.checkpoint) if path else None,
            "image": str(self.image) if named else None,
        }
        return own | {name: getattr(self, name) for name in ("scale", "start", "end", "mode")}


def is_picture(image):
    return isinstance(image, Image.Image)


# --- before anything is loaded --------------------------------------------------------------------


@dataclass
class OpenControl:
    """A `Control`, checked: its net described or loaded, its picture read."""

    control: Control
    source: sources.Source | ControlNet
    config: ControlNetConfig
    mode: int | None
    pixels: torch.Tensor  # (P, 3, height, width) in [-1, 1], for each prompt one, or one for all

    @property
    def given(self):
        """Whether the net was given loaded: it is used as it is, and nothing of it is freed."""
        return isinstance(self.source, ControlNet)

    def load(self, *, attention, dtype, device):
        """The net."""
        if self.given:
            return self.source
        return sources.load_controlnet(self.source, attention=attention, dtype=dtype, device=device)


def open_control(control, base, height, width, num_prompts=1):
    """The `OpenControl` for pictures of height x width by a transformer of configuration `base`;
    raises `ValueError`.
    """
    control.validate()
    pictures = control.image if isinstance(control.image, (list, tuple)) else [control.image]
    if len(pictures) not in (1, num_prompts):
        raise ValueError(
            f"{len(pictures)} control images for {num_prompts} prompts: give one for all, or one "
            "for each"
        )
    pixels = torch.stack([read_picture(picture, height, width) for picture in pictures])
    if isinstance(control.checkpoint, ControlNet):
        source, where = control.checkpoint, "the ControlNet"
    else:
        where = f"controlnet.checkpoint={control.checkpoint}"
        source = writing.open_converted(
            sources.resolve_tiny(control.checkpoint),
            control.save_converted,
            group="controlnet",
            part="controlnet",
        )
    source.config.check_fits(base, where)
    return OpenControl(
        control,
        source,
        source.config,
        union_mode(control.mode, source.config.num_modes, where),
        pixels,
    )


def union_mode(mode, num_modes, where):
    """A mode's number from its name or number, None for a net without; raises `ValueError`."""
    if mode in (None, "none", "null"):
        if num_modes:
            names = ", ".join(f"{name} {number}" for name, number in MODES.items())
            raise ValueError(
                f"{where} is a union net: choose controlnet.mode= ({names}), or a number below "
                f"{num_modes}"
            )
        return None
    if not num_modes:
        raise ValueError(
            f"controlnet.mode={mode}, but {where} is no union net: leave it out, or say none for "
            "this net"
        )
    number = mode_number(mode)
    if number is None or number >= num_modes:
        raise ValueError(
            f"controlnet.mode={mode}: choose one of {', '.join(MODES)}, or a number from 0 to "
            f"{num_modes - 1}"
        )
    return number


def read_picture(image, height, width):
    """A picture, a path or a PIL image of any mode, as pixels (3, height, width) in [-1, 1], like a
    training picture.

    Raises `ValueError`.
    """
    given, name = image, "the control image" if is_picture(image) else f"control_image={image}"
    try:
        image = (
            images.to_rgb(given)
            if is_picture(given)
            else images.decode_picture(_bytes_of(given, name))
        )
        return images.resize_crop(image, height, width)
    except images.BadSample as error:
        remedy = ": pass it as RGB" * is_picture(given)
        raise ValueError(f"{name} cannot be read ({error}){remedy}") from None


def _bytes_of(path, name):
    path = Path(expand_home(str(path), "control_image"))
    if not path.is_file():
        raise ValueError(f"{name} is not a file")
    return path.read_bytes()


# --- at each step ---------------------------------------------------------------------------------


@torch.inference_mode()
def hint_of(opened, number, autoencoder, device):
    """What gives the hint of net `number` to pictures: a function of their prompts and seeds, for
    `ControlNet.embed_hint`.

    Latents are a sample of the posterior, as diffusers' pipeline takes it, drawn for each picture
    from its seed alone.
    """
    pixels = opened.pixels.to(device)

    def of(values, prompts):
        return values if len(values) == 1 else values[prompts]

    if opened.config.hint == "pixel":
        return lambda prompts, seeds: of(pixels, prompts)
    posterior = autoencoder.posterior(pixels)

    def latents(prompts, seeds):
        mean, logvar = (of(values, prompts) for values in posterior)
        noise = rng.normal(mean.shape[1:], seed=number, indices=seeds, stream="control").to(device)
        return pack_latents(autoencoder.scale(sample_posterior(mean, logvar, noise)))

    return latents


def condition(net, mode, txt, pooled, *, times, guidance):
    """`sampling.condition` of a ControlNet: of a union net the text begins with the token of
    `mode`.
    """
    found = sampling.condition(net, txt, pooled, times, guidance)
    return replace(
        found,
        txt=net.with_mode(
            found.txt, None if mode is None else torch.full((len(txt),), mode, device=txt.device)
        ),
    )


@dataclass
class Steering:
    """A net ready to draw a batch of pictures."""

    control: Control
    net: ControlNet
    conditions: sampling.Conditions  # a row for each picture
    hint: torch.Tensor  # (B or 1, L_img, H) of `ControlNet.embed_hint`

    def residuals(self, x, step, rope, base):
        conditions = self.conditions
        samples = self.net.samples(
            x, conditions.txt, rope, conditions.modulation[step], self.hint, self.control.scale
        )
        return spread_samples(samples, self.net.config, base)


def residuals(steerings, num_steps, base) -> Callable:
    """What `sampling.sample` asks at each step: (x, step, rope) → the sum of all active nets'
    residuals, None where all are off.
    """

    def at(x, step, rope):
        parts = [
            s.residuals(x, step, rope, base) for s in steerings if s.control.active(step, num_steps)
        ]
        return sum_residuals(parts) if parts else None

    return at
