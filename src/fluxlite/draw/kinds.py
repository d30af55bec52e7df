"""What a drawing sees beside its prompts: a picture to begin from, a hole to fill, a picture to
follow, references.

Each kind of drawing is a few tensors for the one loop of `sampling`: latents to start from,
channels beside them, tokens behind them, what is put back after each step. `Guide` holds them.

B pictures, P prompts, L tokens, C channels of a token, h and w in latent cells.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from fluxlite.cli.descriptions import read_json
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import check_kind, refuse_first
from fluxlite.data import images
from fluxlite.data.transfers import send_tensor
from fluxlite.draw import canvas
from fluxlite.draw.posteriors import Posteriors, rows_for, sample_latents_of
from fluxlite.nets import flow
from fluxlite.nets.latents import KIND_NAMES, PATCH, pack_latents, pack_mask, seen_latents

# What is drawn of pictures, each from its stream.
PICTURE_DRAWS = ("image", "masked_image", "control_image")


@dataclass(frozen=True)
class Kind:
    """What a transformer is for, told by its channels: pictures that it needs, and others that it
    may be given; what suits it of `SampleConfig`.
    """

    name: str
    needs: tuple
    takes: tuple
    settings: dict


KINDS = {  # guidance as their publisher's examples have it; FLUX.1-Canny's is 30
    "plain": Kind(KIND_NAMES["plain"], (), ("image", "mask", "reference"), {}),
    "control": Kind(
        *(KIND_NAMES["control"], ("control_image",), ("image", "mask")),
        {"guidance": 10.0},
    ),
    "fill": Kind(KIND_NAMES["fill"], ("image", "mask"), (), {"guidance": 30.0, "steps": 50}),
}


# --- before anything is loaded --------------------------------------------------------------------


@dataclass
class Inputs:
    """Pictures beside the prompts, in RGB. One of a kind serves all prompts, else there is one for
    each; references serve all prompts together.
    """

    image: list = field(default_factory=list)
    mask: list = field(default_factory=list)
    control_image: list = field(default_factory=list)
    reference: list = field(default_factory=list)
    named: dict = field(default_factory=dict)  # what a picture's metadata say of them

    @property
    def size(self):
        """(width, height) of the picture whose proportions a drawing has, or None."""
        first = [*self.image[:1], *self.reference[:1], *self.control_image[:1]]
        return first[0].size if first else None


def open_inputs(num_prompts, **given) -> Inputs:
    """The `Inputs` of arguments by name: a path, a PIL image, a list of them, or None; raises
    `ValueError`.
    """
    found = Inputs()
    for name, value in given.items():
        pictures = given_pictures(value, name)
        if name != "reference" and len(pictures) not in (0, 1, num_prompts):
            raise ValueError(
                f"{name}= is given {len(pictures)} pictures for {num_prompts} prompts: give one "
                "for all, or one for each"
            )
        setattr(found, name, [canvas.read_rgb(picture, name) for picture in pictures])
        if pictures:
            paths = [None if canvas.is_picture(one) else str(one) for one in pictures]
            found.named[name] = paths[0] if len(paths) == 1 else paths
    return found


def given_pictures(value, name):
    """A list of the pictures that an argument gives; raises `ValueError`, naming it."""
    single = isinstance(value, (str, Path)) or not isinstance(value, Iterable)
    found = [value] if single else [*value]
    found = [] if found == [None] else found
    for one in found:
        check_kind(one, (str, Path, Image.Image), name, "a path or a PIL image")
    return found


def check_inputs(kind, inputs, config, where):
    """Raise `ValueError`, naming `where`, where pictures are not those that a model of a kind
    takes, or a setting of `DrawConfig` needs one that is missing.
    """
    about, given = KINDS[kind], [name for name in vars(inputs) if name != "named"]
    given = [name for name in given if getattr(inputs, name)]
    named = " and ".join(f"{name}=" for name in about.needs)
    missing = [name for name in about.needs if name not in given]
    others = [name for name in given if name not in (*about.needs, *about.takes)]
    remedy = "name controlnet.checkpoint= to follow it" if kind == "plain" else "leave it out"
    refuse_first(
        [
            (missing, f"{where} is {about.name}: it needs {named}"),
            (others, f"{', '.join(others)}= is not for {where}, {about.name}: {remedy}"),
            ("mask" in given and "image" not in given, "mask= needs image=, whose part it marks"),
            *unused_settings(config, given),
        ]
    )


def unused_settings(config, given):
    """(whether it is so, text) of each setting that is of a picture which is not given."""
    settings = {
        "strength": (config.strength is not None, "image"),
        "paste": (config.paste, "mask"),
        "crop": (config.crop >= 0, "mask"),
        "canny": (config.canny, "control_image"),
    }
    for name, (is_set, needed) in settings.items():
        of = "a FLUX.1-Canny's own control_image" if name == "canny" else needed
        text = f"{name}= is read with {of}=: name that too, or leave it out"
        yield is_set and needed not in given, text


def settle_strength(kind, inputs, config):
    """How much of a picture is drawn anew, None without one: what a `DrawConfig` says, else all of
    it where the model itself sees what it is to keep.
    """
    if inputs.image:
        return config.strength or (1.0 if kind == "fill" or inputs.reference else 0.6)


def warn_untrained(transformer):
    """Say where the pipeline of a transformer, by its path, is known for another than Kontext."""
    file = Path(transformer).parent / "model_index.json"
    name = read_json(file).get("_class_name") if file.is_file() else None
    if name and "Kontext" not in str(name):
        warn_for_all("%s is a %s: trained without references, it may ignore reference=", file, name)


@dataclass
class Scene:
    """`Inputs` as pixels in [-1, 1] for pictures of height x width: each (P or 1, 3, height,
    width), `holes` (P or 1, 1, height, width) of 0 and 1, references (1, 3, h, w) of their own
    sizes.
    """

    canvases: list
    image: torch.Tensor | None = None
    holes: torch.Tensor | None = None
    control_image: torch.Tensor | None = None
    references: list = field(default_factory=list)

    def encoded(self, kind):
        """{name of `PICTURE_DRAWS`: pixels} of what a kind of model sees as latents."""
        found = {"image": self.image, "control_image": self.control_image}
        if kind == "fill":
            found["masked_image"] = self.image * (1 - self.holes)
        return {name: pixels for name, pixels in found.items() if pixels is not None}

    def paste(self, prompt, drawn):
        """The whole picture that one of a prompt was drawn on, with that in its place."""
        return self.canvases[prompt % len(self.canvases)].paste(drawn)


def frame_inputs(inputs, config, size, area, multiple) -> Scene:
    """The `Scene` of pictures of `size` (height, width); references are sized for drawings of
    `area` pixels. Raises `ValueError`.
    """
    scene, images_given, masks = Scene([]), inputs.image, inputs.mask
    for i in range(max(len(images_given), len(masks))):
        mask = masks[i % len(masks)] if masks else None
        opened = canvas.open_canvas(images_given[i % len(images_given)], mask, *size, config.crop)
        scene.canvases.append(opened)
    if scene.canvases:
        scene.image = torch.stack([one.pixels() for one in scene.canvases])
    if masks:
        scene.holes = torch.stack([one.holes() for one in scene.canvases])
        if not scene.holes.flatten(1).any(1).all():
            raise ValueError(
                "mask= marks nothing of the part of image= that is drawn: mark more, set crop= to "
                "draw around the mask, or leave height= and width= out"
            )
    if inputs.control_image:
        framed = [frame_control(one, size, config.canny) for one in inputs.control_image]
        scene.control_image = torch.stack(framed)
    for one in inputs.reference:
        own = canvas.reference_size(one.size, area, multiple)
        scene.references.append(canvas.resized_pixels(one, *own)[None])
    return scene


def frame_control(picture, size, canny):
    """A picture to follow as pixels (3, height, width), framed as in training; or its edges."""
    frame = images.choose_frame(picture.size, *size).of(picture)
    return images.picture_pixels(images.canny_edges(frame) if canny else frame)


# --- at each step ---------------------------------------------------------------------------------


@dataclass
class Guide:
    """What guides the drawing of B pictures beside their prompts.

    start (B, L, C) latents; channels (B, L, C') beside them; reference (B or 1, L', C) tokens
    behind them; `blend(step, x)` is what the latents x after a step become.
    """

    start: torch.Tensor
    channels: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    blend: Callable = lambda step, x: x

    def see(self, x):
        """Latents x (B, L, C) as the transformer sees them: (B, L + L', C + C')."""
        return seen_latents(x, self.channels, self.reference)


@torch.inference_mode()
def prepare_guides(pipeline, scene, pictures, times, noise, posteriors) -> Callable:
    """A function from pictures' numbers to their `Guide`.

    `pictures` are (prompt, seed), `noise(numbers)` is packed noise, or latents at times[0] where
    there is no picture to begin from.
    """
    kind, device, cell = pipeline.kind, pipeline.device, pipeline.cell
    latents = {}
    for name, pixels in scene.encoded(kind).items():
        draw = posteriors.draw_of(name, seed=0, stream=name)
        pixels = send_tensor(pixels, device)
        latents[name] = sample_latents_of(pipeline.autoencoder, pixels, draw)
    reference = encode_references(pipeline, scene.references)
    holes = None if scene.holes is None else send_tensor(scene.holes, device)

    def guide(numbers):
        prompts, seeds = map(list, zip(*[pictures[n] for n in numbers]))
        of = {name: sample(prompts, seeds) for name, sample in latents.items()}
        hole = None if holes is None else rows_for(prompts, holes)
        start, channels = send_tensor(noise(numbers), device), beside_latents(kind, of, hole, cell)
        found = Guide(start, channels, reference)
        if "image" in of:
            found.start = flow.add_noise(of["image"], start, times[0])
        if hole is not None and kind != "fill":
            kept = of["image"], start, latent_mask(hole, cell, start.shape[-1]), times
            found.blend = partial(keep_outside, *kept)
        return found

    return guide


def encode_references(pipeline, references):
    """Tokens (1, L', C) of pictures, one behind the other: the modes of their posteriors; or
    None.
    """
    device = pipeline.device
    encoded = [pipeline.autoencoder.encode(send_tensor(one, device)) for one in references]
    return torch.cat([pack_latents(one) for one in encoded], dim=1) if encoded else None


def beside_latents(kind, latents, hole, cell):
    """The channels (B, L, C') that a kind of model sees beside the noisy ones, or None.

    Fill's are the picture with a grey hole, and the mask.
    """
    if kind == "control":
        return latents["control_image"]
    if kind == "fill":
        known = latents["masked_image"]
        return torch.cat([known, pack_mask(hole, cell).expand(len(known), -1, -1)], dim=-1)


def latent_mask(hole, cell, channels):
    """A mask of pixels (B, 1, H, W) for tokens of so many channels: of each latent cell its first
    pixel, as diffusers takes it.
    """
    cells = hole[..., ::cell, ::cell]
    return pack_latents(cells.expand(-1, channels // PATCH**2, -1, -1))


def keep_outside(latents, noise, mask, times, step, x):
    """The latents x after a step with the picture's own, as noisy, where the mask is 0."""
    if step == 0:
        return x
    return (1 - mask) * flow.add_noise(latents, noise, times[step]) + mask * x


def check_posteriors(given, pictures, controls, shape):
    """The `Posteriors` that `generate` is given, for pictures (prompt, seed) and `controls`.

    Raises `ValueError`.
    """
    given = given or {}
    check_kind(given, dict, "posteriors", "normal draws by name")
    known = [*PICTURE_DRAWS, *(f"controlnet_{number}" for number in range(len(controls)))]
    allowed = [(len(pictures), *shape), (1, *shape)]
    for name, draws in given.items():
        if name not in known or tuple(getattr(draws, "shape", ())) not in allowed:
            raise ValueError(
                f"posteriors={name}: give {', '.join(known)} as tensors of {allowed[0]}"
            )
    return Posteriors({n: draws.float() for n, draws in given.items()}, [s for _, s in pictures])
