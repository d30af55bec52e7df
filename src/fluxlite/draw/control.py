"""Drawing with ControlNets: a net, the picture that it follows, when and how strongly.

    canny = fluxlite.Control("FLUX.1-dev-Controlnet-Canny", "edges.png", scale=0.7)
    pictures = fluxlite.generate("a fox", controls=[canny])

`open_control` checks all that can be seen without loading a net; `prepare_controls` loads the
nets and gives what they add at each step.

B pictures, L tokens, H hidden width.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from fluxlite.cli.options import check_kind, check_options, option
from fluxlite.data import images
from fluxlite.data.transfers import send_tensor
from fluxlite.draw import canvas
from fluxlite.draw.posteriors import Posteriors, rows_for, sample_latents_of
from fluxlite.draw.sampling import prepare_conditions
from fluxlite.nets.configs import MODES, mode_number
from fluxlite.nets.controlnet import ControlNet, spread_samples, sum_residuals
from fluxlite.weights import sources, writing


@dataclass
class Control:
    """A ControlNet to draw with; several of them add up."""

    checkpoint: object = option(
        MISSING, "a file or folder of any layout, a hub repository, or a loaded net", path=True
    )
    image: object = option(
        MISSING,
        "the picture to follow, a path or a PIL image, resized and cropped as in training; a list: "
        "one a prompt",
    )
    scale: float = option(
        1.0, "strength, by default 1; 0 for no effect", at_least=-100, at_most=100
    )
    start: float = option(
        0.0, "part of the steps before which the net is off", at_least=0, at_most=1
    )
    end: float = option(1.0, "part of the steps after which the net is off", at_least=0, at_most=1)
    mode: str | int | None = option(
        None, f"of a union net: {', '.join(MODES)}, or a number; none for others"
    )
    save_converted: str | None = option(
        None, "where to keep the checkpoint in our own layout", path=True
    )

    def validate(self):
        check_options(self, "controlnet.")
        net, paths = (str, Path, ControlNet, sources.Source), (str, Path, Image.Image)
        check_kind(self.checkpoint, net, "controlnet.checkpoint", "a path or a loaded ControlNet")
        for image in self.images():
            check_kind(image, paths, "control_image", "a path or a PIL image")
        if not self.start < self.end:
            raise ValueError(
                f"controlnet.start={self.start} must be less than controlnet.end={self.end}, both "
                "from 0 to 1"
            )

    def images(self):
        """A list of the pictures to follow."""
        return [*self.image] if isinstance(self.image, (list, tuple)) else [self.image]

    def active(self, step, num_steps):
        """Whether the net takes part in a step: where all of it lies between start and end, as in
        diffusers.
        """
        return not (step / num_steps < self.start or (step + 1) / num_steps > self.end)

    def describe(self):
        """What a picture's metadata say of it."""
        path = isinstance(self.checkpoint, (str, Path))
        named = isinstance(self.image, (str, Path))
        own = {
            "checkpoint": str(self.checkpoint) if path else None,
            "image": str(self.image) if named else None,
        }
        return own | {name: getattr(self, name) for name in ("scale", "start", "end", "mode")}


# --- before anything is loaded --------------------------------------------------------------------


def open_control(control, pipeline, height, width, num_prompts=1):
    """The `Control` for pictures of height x width by a `Pipeline`, with what its values name.

    Its checkpoint is a `Source` or the loaded net, its mode a number or None, its image pixels
    (P, 3, height, width) in [-1, 1], one for each prompt or one for all. Raises `ValueError`.
    """
    control.validate()
    given = control.images()
    if len(given) not in (1, num_prompts):
        raise ValueError(
            f"{len(given)} control images for {num_prompts} prompts: give one for all, or one "
            "for each"
        )
    pixels = torch.stack([read_picture(picture, height, width) for picture in given])
    net, where = control.checkpoint, "the ControlNet"
    if not is_loaded(control):
        where = f"controlnet.checkpoint={control.checkpoint}"
        net = writing.open_converted(net, control.save_converted, part="controlnet")
    base = pipeline.model_config  # a net sees latents alone, whatever else its base sees
    net.config.check_fits(replace(base, in_channels=base.out_channels), where)
    net.config.check_hint(pipeline.sources["autoencoder"].config.downsampling, where)
    mode = union_mode(control.mode, net.config.num_modes, where)
    return replace(control, checkpoint=net, image=pixels, mode=mode)


def is_loaded(control):
    """Whether the net was given loaded: it is used as it is, and nothing of it is freed."""
    return isinstance(control.checkpoint, ControlNet)


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
    return images.resize_crop(canvas.read_rgb(image, "control_image"), height, width)


# --- at each step ---------------------------------------------------------------------------------


@torch.inference_mode()
def prepare_hint(opened, number, autoencoder, device, posteriors=None) -> Callable:
    """A function from prompts' numbers and pictures' seeds to the hint of net `number`, for
    `ControlNet.embed_hint`.

    Latents are a sample of the posterior, as diffusers' pipeline takes it, drawn for each picture
    from its seed alone or taken of `posteriors`.
    """
    pixels = send_tensor(opened.image, device)
    if opened.checkpoint.config.hint == "pixel":
        return lambda prompts, seeds: rows_for(prompts, pixels)
    posteriors = posteriors or Posteriors()
    draw = posteriors.draw_of(f"controlnet_{number}", seed=number, stream="control")
    return sample_latents_of(autoencoder, pixels, draw)


def prepare_controls(pipeline, controls, texts, times, guidance, posteriors=None) -> Callable:
    """A function from prompts' numbers and pictures' seeds to `residuals` of `sample_latents`: the
    sum of what all nets add that are active at a step.
    """
    nets = [
        prepare_control(pipeline, control, number, texts, times, guidance, posteriors)
        for number, control in enumerate(controls)
    ]

    def attach(prompts, seeds):
        added = [add(prompts, seeds) for add in nets]

        def residuals(x, step, rope):
            pairs = zip(controls, added)
            active = [of(x, step, rope) for c, of in pairs if c.active(step, len(times) - 1)]
            return sum_residuals(active) if active else None

        return residuals

    return attach


def prepare_control(pipeline, control, number, texts, times, guidance, posteriors) -> Callable:
    """`prepare_controls` of one net, its `number` the stream of its draws: loaded, conditioned."""
    loaded, net, base = is_loaded(control), control.checkpoint, pipeline.model_config
    if loaded:
        check_alike(net, pipeline)
    else:
        net = pipeline.load_net(sources.load_controlnet, net)
    keep = loaded or pipeline.keeps_parts
    conditions = prepare_conditions(net, texts, times, guidance, control.mode, keep=keep)
    if not loaded:
        pipeline.place_net(net)
    hint = prepare_hint(control, number, pipeline.autoencoder, pipeline.device, posteriors)

    def attach(prompts, seeds):
        known, embedded = conditions(prompts), net.embed_hint(hint(prompts, seeds))

        def residuals(x, step, rope):
            modulation = known.modulation[step]
            samples = net.samples(x, known.txt, rope, modulation, embedded, control.scale)
            return spread_samples(samples, net.config, base)

        return residuals

    return attach


def check_alike(net, pipeline):
    """Raise `ValueError` where a ControlNet that was given loaded computes in another type or place
    than the transformer.
    """
    a, b = net.img_in.weight, torch.empty(0, dtype=pipeline.dtype, device=pipeline.device)
    if (a.dtype, a.device) != (b.dtype, b.device):
        raise ValueError(
            f"the ControlNet is in {a.dtype} on {a.device}, the transformer in {b.dtype} on "
            f"{b.device}: load them alike"
        )
