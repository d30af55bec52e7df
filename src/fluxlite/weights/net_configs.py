"""The configuration of a net on a disk: what its weights show, and what is written beside them.

Shapes show all of it but the rotations' axes and base, and an autoencoder's scale. So a
description, a config.json of diffusers' or our own metadata, adds those alone. In all else it must
agree with the weights: it can promise nothing, such as a billion blocks, that they do not hold.
"""

import logging
from dataclasses import dataclass, fields

from fluxlite.cli.descriptions import parse_json, read_json
from fluxlite.cli.options import option, shortened, typed_description, typed_value
from fluxlite.nets.configs import NET_CONFIGS, AutoencoderConfig, ControlNetConfig, FluxConfig
from fluxlite.weights import layouts
from fluxlite.weights.diffusers_configs import (
    CLASS_NAMES,
    DIFFUSERS_FIELDS,
    fields_from_diffusers,
)

log = logging.getLogger("fluxlite")

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


# Our fields as an error names them in diffusers' config.json.
THEIR_NAMES = DIFFUSERS_FIELDS | {
    "hidden_size": "num_attention_heads x attention_head_dim",
    "num_modes": "num_mode",
    "hint": "conditioning_embedding_channels, so hint",
}
DESCRIPTIONS = {  # of each part: what is read of diffusers' config.json
    "transformer": TransformerDescription,
    "controlnet": ControlNetDescription,
    "autoencoder": AutoencoderDescription,
}


# --- what the weights show ------------------------------------------------------------------------

SHOWN_SIZES = {  # our fields: a tensor of ours and the dimension that shows it
    "in_channels": ("img_in.weight", 1),
    "text_width": ("txt_in.weight", 1),
    "pooled_width": ("pooled_in.linear_in.weight", 1),
    "out_channels": ("out.weight", 0),
    "num_modes": ("mode_in.weight", 0),
}
FIRST_STREAMS = ("double_blocks.0.img", "single_blocks.0")


def infer_config(layout, found):
    """The `FluxConfig` or `ControlNetConfig` that {name: shape} of such a net in `layout` shows.

    RoPE axes cannot be seen in the weights: they are FLUX's share of the head width, D/8, 7D/16,
    7D/16.
    """
    at = layouts.first_names(layout)

    def there(name):
        return at.get(name, name) in found

    def shape(name):
        if not there(name):
            raise ValueError(f"missing: this {layout} checkpoint has no {at.get(name, name)}")
        return checked_shape(
            at.get(name, name), found[at.get(name, name)], 1 + ("norm" not in name)
        )

    norms = [f"{stream}.qkv.q_norm.weight" for stream in FIRST_STREAMS]
    patterns = [at.get(norm, norm).split(".0.")[0] + ".{i}" for norm in norms]
    doubles, singles = (layouts.count_blocks(found, pattern) for pattern in patterns)
    first = 0 if doubles else 1
    hidden, head = shape("img_in.weight")[0], shape(norms[first])[0]
    if layout == "bfl" and not doubles:  # one linear makes queries, keys, values and the MLP's
        mlp = shape("single_blocks.0.qkv.q.weight")[0] - 3 * hidden
    else:
        mlp = shape(f"{FIRST_STREAMS[first]}.mlp.linear_in.weight")[0]
    values = dict(
        num_double_blocks=doubles,
        num_single_blocks=singles,
        hidden_size=hidden,
        num_heads=max(1, hidden // head),
        mlp_ratio=mlp // hidden,
        guidance_embed=there("guidance_in.linear_in.weight"),
        rope_axes=(head // 8, *2 * [head // 16 * 7]),
    )
    of_controlnet = there("hint_in.weight")
    absent = ["out_channels"] if of_controlnet else ["num_modes"]
    absent += ["num_modes"] * (not there("mode_in.weight"))
    sizes = {name: place for name, place in SHOWN_SIZES.items() if name not in absent}
    values |= {name: shape(tensor)[axis] for name, (tensor, axis) in sizes.items()}
    if not of_controlnet:
        return FluxConfig(**values)
    return ControlNetConfig(**values, hint="pixel" if there("hint_convs.0.weight") else "latent")


def checked_shape(name, shape, rank):
    """`shape` if it has so many dimensions, none absurdly wide; else `ValueError`."""
    if len(shape) != rank or max(shape) > 1 << 20:
        raise ValueError(
            f"{name} has the shape {list(shape)} where {rank} dimensions belong: it is damaged, or "
            "flattened by a trainer"
        )
    return shape


def infer_autoencoder_config(layout, found, said=None):
    """The `AutoencoderConfig` of an autoencoder's {name: shape}.

    `said`, the values of a vae/config.json, adds what shapes do not show.
    """
    level, resnet = "encoder.down_blocks.{i}", "resnets.{i}"
    if layout == "bfl":
        level, resnet = "encoder.down.{i}", "block.{i}"

    def shape(name):
        if name not in found:
            raise ValueError(f"missing: this {layout} autoencoder has no {name}")
        return checked_shape(name, found[name], 4)

    levels, first = layouts.count_blocks(found, level), f"{level}.{resnet}.conv1.weight"
    firsts = [first.replace("{i}", str(i), 1).format(i=0) for i in range(levels)]
    inferred = AutoencoderConfig(
        block_out_channels=tuple(shape(name)[0] for name in firsts),
        layers_per_block=layouts.count_blocks(found, f"{level.format(i=0)}.{resnet}"),
        latent_channels=shape("decoder.conv_in.weight")[1],
    )
    if not levels:
        raise ValueError(f"missing: this {layout} autoencoder has no encoder")
    for name in ("norm_num_groups", "scaling_factor", "shift_factor"):
        if (said or {}).get(name) is not None:
            setattr(inferred, name, said[name])
    if any(width % inferred.norm_num_groups for width in inferred.block_out_channels):
        raise ValueError(
            "an autoencoder of other widths than FLUX's needs its config.json beside it, with "
            "norm_num_groups"
        )
    return inferred


# --- what is written beside them ------------------------------------------------------------------


def config_from_diffusers(values, cls=FluxConfig):
    """The `FluxConfig`, or `ControlNetConfig`, of the values of a diffusers `config.json`."""
    return cls(**fields_from_diffusers(values, cls.part))


def read_net_config(what, layout, shapes, *, saved, where, beside, given=None):
    """The configuration of {name: shape}, a transformer's, ControlNet's or autoencoder's.

    `saved` is the JSON text of our own metadata in the file `where`, or None; `beside` the path of
    a config.json, which need not exist. `given` are {field: value} of rotations that none says.
    Raises `ValueError` that names the file.
    """
    if what == "autoencoder":
        return _autoencoder_config(layout, shapes, saved, where, beside)
    shown = infer_config(layout, shapes)
    said, by = _said_config(what, layout, saved, where, beside)
    if said is None:
        return _with_rotations(shown, given or {}, where)
    check_agreement(said, shown, by, but=ROPE_FIELDS, names={} if saved else THEIR_NAMES)
    said.validate()
    return said


def _said_config(what, layout, saved, where, beside):
    """What a description says (None without one), and the name of where it says so."""
    if saved:
        by = f"{where}'s metadata"
        return typed_description(by, NET_CONFIGS[what], parse_json(saved, by)), by
    values = diffusers_values(beside, what) if layout == "diffusers" else None
    if not values:
        return None, None
    described = typed_description(beside, DESCRIPTIONS[what], values, foreign=True)
    return config_from_diffusers(vars(described), NET_CONFIGS[what]), beside


def diffusers_values(file, part):
    """The values of diffusers' config.json of such a part, or None where there is none."""
    values = read_json(file) if file.exists() else {}
    ours = values.get("_class_name", CLASS_NAMES[part]) == CLASS_NAMES[part]
    return values if ours and values else None


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
        if f.name in ROPE_FIELDS and f.name in given:
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
    values = parse_json(saved, by) if saved else diffusers_values(beside, "autoencoder") or {}
    said = typed_description(by, AutoencoderDescription, values, foreign=True)
    shown = infer_autoencoder_config(layout, shapes, vars(said))
    unsaid = [f.name for f in fields(AutoencoderConfig) if getattr(said, f.name) is None]
    check_agreement(said, shown, by, but=unsaid)
    return shown
