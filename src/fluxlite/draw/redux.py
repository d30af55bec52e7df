"""FLUX.1-Redux: pictures as further text tokens of every prompt.

    pictures = fluxlite.generate("", redux=fluxlite.Redux("FLUX.1-Redux-dev", "owl.png"))

SigLIP (transformers) makes tokens of a picture, two linears bring them to T5's width. Of several
pictures the tokens are added up, each with its scale.

R pictures, L tokens, D the width of T5's output, W of SigLIP's.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from fluxlite.cli.options import check_kind, check_options, option
from fluxlite.data import images
from fluxlite.data.transfers import send_tensor
from fluxlite.draw import canvas
from fluxlite.weights import hub, tensor_files
from fluxlite.weights.encoder_files import (
    SIGLIP,
    OpenEncoder,
    load_model,
    open_encoder,
    quiet_transformers,
)

FILES = ["image_encoder/*", "image_embedder/*"]


@dataclass
class Redux:
    """A picture whose likeness is drawn, and how strongly; several add up."""

    checkpoint: object = option(MISSING, "the folder of FLUX.1-Redux-dev, or its hub id", path=True)
    image: object = option(MISSING, "the picture, a path or a PIL image")
    scale: float = option(
        1.0, "strength of its tokens, and of the prompt's", at_least=-100, at_most=100
    )
    pooled_scale: float = option(
        1.0, "strength of the prompt's pooled vector", at_least=-100, at_most=100
    )

    def validate(self):
        check_options(self, "redux.")
        check_kind(self.checkpoint, (str, Path), "redux.checkpoint", "a path or a hub id")
        check_kind(self.image, (str, Path, Image.Image), "redux", "a path or a PIL image")

    def describe(self):
        """What a picture's metadata say of it."""
        image = None if canvas.is_picture(self.image) else str(self.image)
        own = {"checkpoint": str(self.checkpoint), "image": image}
        return own | {"scale": self.scale, "pooled_scale": self.pooled_scale}


@dataclass
class OpenRedux:
    """A `Redux` whose files are found and checked, and its picture in RGB."""

    redux: Redux
    siglip: OpenEncoder
    linears: tensor_files.Tensors
    picture: Image.Image


def open_redux(redux, text_width) -> OpenRedux:
    """The `OpenRedux` for a transformer whose text has such a width; raises `ValueError`."""
    redux.validate()
    where = f"redux.checkpoint={redux.checkpoint}"
    folder = hub.local_path(redux.checkpoint, FILES, setting="redux.checkpoint")
    for name in ("image_encoder", "image_embedder"):
        if not (folder / name).is_dir():
            raise ValueError(f"{where} has no folder {name}: name that of FLUX.1-Redux-dev")
    linears = tensor_files.Tensors(folder / "image_embedder")
    siglip = open_encoder(folder / SIGLIP.encoder, SIGLIP)
    check_linears(where, linears, siglip.values["hidden_size"], text_width)
    return OpenRedux(redux, siglip, linears, canvas.read_rgb(redux.image, "redux"))


def check_linears(where, linears, width, text_width):
    """Raise `ValueError` unless two linears lead from SigLIP's width to that of the text."""
    shape = linears.shape("redux_down.weight")
    if not shape or linears.shape("redux_up.weight") is None:
        raise ValueError(f"{where}: image_embedder lacks redux_up or redux_down: fetch it again")
    if shape[0] != text_width:
        raise ValueError(
            f"{where} gives {shape[0]} channels, but the transformer has "
            f"model.text_width={text_width}"
        )
    inner = shape[-1]
    needed = {"up.weight": (inner, width), "up.bias": (inner,)}
    needed |= {"down.weight": (text_width, inner), "down.bias": (text_width,)}
    for name, needs in needed.items():
        found = linears.shape(f"redux_{name}")
        if found != needs:
            raise ValueError(
                f"{where}: redux_{name} is of shape {found and list(found)}, not {list(needs)}: "
                "fetch image_embedder and image_encoder again"
            )


@torch.inference_mode()
def add_pictures(opened, device, dtype) -> Callable:
    """A function from a prompt's (txt (1, L, D), pooled (1, W)) to the same with the tokens of
    pictures behind it, scaled and summed over the pictures, as FluxPriorReduxPipeline sums them.
    """
    scales = [(one.redux.scale, one.redux.pooled_scale) for one in opened]
    tokens = sum(s * picture_tokens(one, device, dtype) for (s, _), one in zip(scales, opened))
    of_text, of_pooled = (sum(column) for column in zip(*scales))

    @torch.inference_mode()
    def add(text):
        txt, pooled = text
        return torch.cat([of_text * txt, tokens.to(txt)], dim=1), of_pooled * pooled

    return add


def picture_tokens(opened, device, dtype):
    """Tokens (1, L', D) of a picture."""
    with quiet_transformers():
        from transformers import SiglipVisionModel

        encoder = load_model(SiglipVisionModel, opened.siglip, dtype)
    size = encoder.config.image_size
    square = opened.picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = send_tensor(images.picture_pixels(square)[None], device).to(dtype)
    tokens = encoder.to(device)(pixels).last_hidden_state

    def linear(x, name):
        return F.linear(x, *(opened.linears.read(f"{name}.{p}").to(x) for p in ("weight", "bias")))

    return linear(F.silu(linear(tokens, "redux_up")), "redux_down")
