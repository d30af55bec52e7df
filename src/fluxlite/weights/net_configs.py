"""The configuration of a net on a disk: what its weights show, and what is written beside them.

Shapes show all of it but the rotations' axes and base, and an autoencoder's scale. So a
description, a config.json of diffusers' or our own metadata, adds those alone. In all else it must
agree with the weights: it can promise nothing, such as a billion blocks, that they do not hold.
"""

import logging
from dataclasses import asdict, dataclass, fields

from fluxlite.cli.descriptions import parse_json, read_json
from fluxlite.cli.options import option, shortened, typed_description, typed_value
from fluxlite.nets.configs import AutoencoderConfig, ControlNetConfig, FluxConfig
from fluxlite.weights import layouts

log = logging.getLogger("fluxlite")

NET_CONFIGS = {"transformer": FluxConfig, "controlnet": ControlNetConfig}
ROPE_FIELDS = ("rope_axes", "rope_theta")
FLUX_HEAD_WIDTH = 128  # channels of a head of every published FLUX.1


@dataclass
class TransformerDescription:
    """What is read of the config.json of a FluxTransformer2DModel; the defaults are diffusers'."""

    in_channels: int = option(64, "channels of an input token", at_least=1)
    out_channels: int | None = option(None, "of an output token; in_channels if null", at_least=1)
    num_layers: int = option(19, "double blocks", at_least=0)
    num_single_layers: int = option(38, "single blocks", at_least=0)
    attention_head_dim: int = option(128, "channels of a head", at_least=2)
    num_attention_heads: int = option(24, "heads", at_least=1)
    joint_attention_dim: int = option(4096, "width of T5's output", at_least=1)
    pooled_projection_dim: int = option(768, "width of CLIP's pooled output", at_least=1)
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = option((16, 56, 56), "channels a position axis", at_least=0)


@dataclass
class ControlNetDescription(TransformerDescription):
    """What is read of the config.json of a FluxControlNetModel."""

    num_mode: int | None = option(None, "modes of a union net", at_least=0)
    conditioning_embedding_channels: int | None = option(None, "of a pixel hint", at_least=1)


@dataclass
class AutoencoderDescription:
    """What is read of an autoencoder's config.json, diffusers' or our own."""

    block_out_channels: tuple[int, ...] | None = option(None, "channels of a level", at_least=1)
    layers_per_block: int | None = option(None, "residual blocks of a level", at_least=1)
    latent_channels: int | None = option(None, "channels of a latent cell", at_least=1)
    norm_num_groups: int | None = option(None, "groups of the norms", at_least=1)
    scaling_factor: float | None = option(None, "scale of the latents", above=0, at_most=1e6)
    shift_factor: float | None = option(None, "shift of the latents", at_least=-1e6, at_most=1e6)


THEIR_NAMES = {  # of our fields in diffusers' config.json
    "num_double_blocks": "num_layers",
    "num_single_blocks": "num_single_layers",
    "num_heads": "num_attention_heads",
    "hidden_size": "num_attention_heads x attention_head_dim",
    "text_width": "joint_attention_dim",
    "pooled_width": "pooled_projection_dim",
    "guidance_embed": "guidance_embeds",
    "num_modes": "num_mode",
    "hint": "conditioning_embedding_channels, so hint",
}
DIFFUSERS_CLASSES = {  # what: its class there, what is read of it, and how that becomes ours
    "transformer": (
        "FluxTransformer2DModel",
        TransformerDescription,
        layouts.config_from_diffusers,
    ),
    "controlnet": (
        "FluxControlNetModel",
        ControlNetDescription,
        layouts.controlnet_config_from_diffusers,
    ),
}


def read_net_config(what, layout, shapes, *, saved, where, beside, given=None):
    """The configuration of {name: shape}, a transformer's, ControlNet's or autoencoder's.

    `saved` is the JSON text of our own metadata in the file `where`, or None; `beside` the path of
    a config.json, which need not exist. `given` are {field: value} of rotations that none says.
    Raises `ValueError` that names the file.
    """
    if what == "autoencoder":
        return _autoencoder_config(layout, shapes, saved, where, beside)
    shown = layouts.infer_config(layout, shapes)
    said, by = _said_config(what, layout, saved, where, beside)
    if said is None:
        return _with_rotations(
            shown, {k: v for k, v in (given or {}).items() if k in ROPE_FIELDS}, where
        )
    check_agreement(said, shown, by, but=ROPE_FIELDS, names={} if saved else THEIR_NAMES)
    said.validate()
    return said


def _said_config(what, layout, saved, where, beside):
    """What a description says (None without one), and the name of where it says so."""
    if saved:
        by = f"{where}'s metadata"
        return typed_description(by, NET_CONFIGS[what], parse_json(saved, by)), by
    class_name, description, ours_from = DIFFUSERS_CLASSES[what]
    values = diffusers_values(beside, class_name) if layout == "diffusers" else None
    if not values:
        return None, None
    return ours_from(asdict(typed_description(beside, description, values, foreign=True))), beside


def diffusers_values(file, class_name):
    """A diffusers config.json of `class_name`, or None where there is none."""
    values = read_json(file) if file.exists() else {}
    return values if values.get("_class_name", class_name) == class_name and values else None


def check_agreement(said, shown, by, *, but=(), names=None):
    """Raise `ValueError`, naming the file `by`, where it says other than the weights show.

    `names` are {field: what it is called there}, where that is another name.
    """
    for f in fields(shown):
        ours, theirs = getattr(shown, f.name), getattr(said, f.name)
        if f.name not in but and ours != theirs:
            name = (names or {}).get(f.name, f.name)
            raise ValueError(
                f"{by} says {name}={shortened(theirs)}, and the weights have {ours}: "
                "they do not belong together, or one is damaged; fetch both again"
            )


def _with_rotations(config, given, where):
    """A configuration whose rotations nothing says: the `given`, or FLUX.1's, which is logged."""
    for f in fields(config):
        if f.name in given:
            setattr(config, f.name, typed_value(given[f.name], f.type, f"model.{f.name}"))
    assumed = [name for name in ROPE_FIELDS if name not in given]
    try:
        config.validate()
    except ValueError as error:
        raise ValueError(f"{error}; the weights do not show them: set model.rope_axes=") from None
    if assumed:
        level = logging.INFO if config.head_width == FLUX_HEAD_WIDTH else logging.WARNING
        values = ", ".join(f"{name}={getattr(config, name)}" for name in assumed)
        log.log(level, "%s does not say how it rotates: %s is assumed, as of FLUX.1", where, values)
    return config


def _autoencoder_config(layout, shapes, saved, where, beside):
    by = f"{where}'s metadata" if saved else beside
    values = parse_json(saved, by) if saved else diffusers_values(beside, "AutoencoderKL") or {}
    said = typed_description(by, AutoencoderDescription, values, foreign=True)
    shown = layouts.infer_autoencoder_config(layout, shapes, asdict(said))
    unsaid = [f.name for f in fields(AutoencoderConfig) if getattr(said, f.name) is None]
    check_agreement(said, shown, by, but=unsaid)
    return shown
