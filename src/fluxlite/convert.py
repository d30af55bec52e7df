"""Names and layouts of checkpoints: one table for each format, read forwards or backwards.

A rule maps the tensors of a foreign layout that match a pattern onto tensors of ours, with a transform that is its own data:
`forward` from their tensors to ours, `backward` the inverse. Completeness is checked on names and shapes before anything is read.

H hidden width, N heads, D head width.
"""

from collections import namedtuple
from dataclasses import dataclass

import torch
from einops import rearrange

from fluxlite.model import FluxConfig

# theirs and ours: lists of names; forward: [their tensors] -> [our tensors]; backward: the inverse.
Rule = namedtuple("Rule", "theirs ours forward backward")


@dataclass
class Shape:
    """What transforms need to know of a model."""

    hidden_size: int
    num_heads: int

    @property
    def head(self):
        return self.hidden_size // self.num_heads


# --- transforms: (function, inverse), each from a list of tensors to a list of tensors -----------------------------------------


def _same(tensors):
    return list(tensors)


def _halves(x):
    """Interleaved rotation pairs (0,1),(2,3).. of the first axis's heads to half-split pairs (i, i + D/2)."""
    return rearrange(x, "(d two) ... -> (two d) ...", two=2)


def _pairs(x):
    return rearrange(x, "(two d) ... -> (d two) ...", two=2)


def _per_head(function, x, head):
    """Apply a permutation of a head's channels to every head of x (N·D, ...)."""
    heads = rearrange(x, "(n d) ... -> d n ...", d=head)
    return rearrange(function(heads), "d n ... -> (n d) ...")


def join_qkv(shape):
    """Separate q, k, v ↔ our head-by-head qkv with half-split rotation pairs in q and k."""

    def forward(tensors):
        q, k, v = tensors
        q, k = (_per_head(_halves, x, shape.head) for x in (q, k))
        return [rearrange(torch.stack([q, k, v]), "three (n d) ... -> (n three d) ...", d=shape.head).contiguous()]

    def backward(tensors):
        q, k, v = rearrange(tensors[0], "(n three d) ... -> three (n d) ...", three=3, d=shape.head)
        return [_per_head(_pairs, q, shape.head), _per_head(_pairs, k, shape.head), v.contiguous()]

    return forward, backward


def halve_norm():
    """A q or k norm's scale, interleaved ↔ half-split."""
    return (lambda t: [_halves(t[0])]), (lambda t: [_pairs(t[0])])


def stack_rows(chunks):
    """Several tensors stacked along rows; `chunks` gives each one's share of the rows, in units of the hidden width."""

    def backward(tensors):
        unit = tensors[0].shape[0] // sum(chunks)
        return [x.contiguous() for x in tensors[0].split([c * unit for c in chunks])]

    return (lambda tensors: [torch.cat(tensors)]), backward


def split_columns(shape):
    """One linear over (attention, MLP) ↔ two linears."""

    def forward(tensors):
        return [x.contiguous() for x in tensors[0].split([shape.hidden_size, tensors[0].shape[1] - shape.hidden_size], dim=1)]

    return forward, (lambda tensors: [torch.cat(tensors, dim=1)])


def swap_halves(tensors):
    """(scale, shift) ↔ (shift, scale)."""
    a, b = tensors[0].chunk(2)
    return [torch.cat([b, a])]


# --- tables ---------------------------------------------------------------------------------------------------------------------


def _linears(theirs, ours, leaves=("weight", "bias")):
    return [Rule([f"{theirs}.{leaf}"], [f"{ours}.{leaf}"], _same, _same) for leaf in leaves]


def diffusers_rules(config):
    """The table between diffusers' FluxTransformer2DModel and ours."""
    shape = Shape(config.hidden_size, config.num_heads)
    qkv, norm = join_qkv(shape), halve_norm()
    rules = _linears("x_embedder", "img_in") + _linears("context_embedder", "txt_in") + _linears("proj_out", "out")
    embedders = {"timestep_embedder": "time_in", "text_embedder": "pooled_in"}
    if config.guidance_embed:
        embedders["guidance_embedder"] = "guidance_in"
    for theirs, ours in embedders.items():
        for a, b in (("linear_1", "linear_in"), ("linear_2", "linear_out")):
            rules += _linears(f"time_text_embed.{theirs}.{a}", f"{ours}.{b}")

    modulated = []
    for i in range(config.num_double_blocks):
        block = f"transformer_blocks.{i}"
        streams = {
            "img": ("to_{}", "norm_{}", "to_out.0", "ff"),
            "txt": ("add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
        }
        for stream, (projection, normed, out, mlp) in streams.items():
            ours = f"double_blocks.{i}.{stream}"
            for leaf in ("weight", "bias"):
                names = [f"{block}.attn.{projection.format(x)}.{leaf}" for x in "qkv"]
                rules.append(Rule(names, [f"{ours}.qkv.linear.{leaf}"], *qkv))
            for x in "qk":
                rules.append(Rule([f"{block}.attn.{normed.format(x)}.weight"], [f"{ours}.qkv.{x}_norm.weight"], *norm))
            rules += _linears(f"{block}.attn.{out}", f"{ours}.proj")
            rules += _linears(f"{block}.{mlp}.net.0.proj", f"{ours}.mlp.linear_in")
            rules += _linears(f"{block}.{mlp}.net.2", f"{ours}.mlp.linear_out")
        modulated += [(f"{block}.norm1.linear", 6), (f"{block}.norm1_context.linear", 6)]

    for i in range(config.num_single_blocks):
        block, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for leaf in ("weight", "bias"):
            names = [f"{block}.attn.to_{x}.{leaf}" for x in "qkv"]
            rules.append(Rule(names, [f"{ours}.qkv.linear.{leaf}"], *qkv))
        for x in "qk":
            rules.append(Rule([f"{block}.attn.norm_{x}.weight"], [f"{ours}.qkv.{x}_norm.weight"], *norm))
        rules += _linears(f"{block}.proj_mlp", f"{ours}.mlp.linear_in")
        parts = [f"{ours}.proj.weight", f"{ours}.mlp.linear_out.weight"]
        rules.append(Rule([f"{block}.proj_out.weight"], parts, *split_columns(shape)))
        rules += _linears(f"{block}.proj_out", f"{ours}.mlp.linear_out", leaves=("bias",))
        modulated.append((f"{block}.norm.linear", 3))

    chunks = [c for _, c in modulated] + [2]
    stack, unstack = stack_rows(chunks)
    for leaf in ("weight", "bias"):  # diffusers ends with (scale, shift), BFL and we with (shift, scale)
        names = [f"{name}.{leaf}" for name, _ in modulated] + [f"norm_out.linear.{leaf}"]
        rules.append(
            Rule(
                names,
                [f"modulation.{leaf}"],
                lambda t: stack(t[:-1] + swap_halves(t[-1:])),
                lambda t: (parts := unstack(t))[:-1] + swap_halves(parts[-1:]),
            )
        )
    return rules


def fluxlite_rules(config):
    """The table between our own layout and itself."""
    from fluxlite.model import Flux

    with torch.device("meta"):
        return [Rule([name], [name], _same, _same) for name in Flux(config).state_dict()]


RULES = {"fluxlite": fluxlite_rules, "diffusers": diffusers_rules}


def layout_of(keys):
    """Which layout a transformer's keys are in; raises `ValueError` for none that is known."""
    if "modulation.weight" in keys:
        return "fluxlite"
    if "time_text_embed.timestep_embedder.linear_1.weight" in keys:
        return "diffusers"
    raise ValueError(f"not a FLUX transformer: {len(keys)} keys such as {', '.join(sorted(keys)[:3]) or 'none'}")


def config_from_diffusers(values):
    """`FluxConfig` of a diffusers `transformer/config.json`."""
    hidden = values["num_attention_heads"] * values["attention_head_dim"]
    return FluxConfig(
        num_double_blocks=values["num_layers"],
        num_single_blocks=values["num_single_layers"],
        hidden_size=hidden,
        num_heads=values["num_attention_heads"],
        in_channels=values["in_channels"],
        out_channels=values.get("out_channels") or values["in_channels"],
        text_width=values["joint_attention_dim"],
        pooled_width=values["pooled_projection_dim"],
        guidance_embed=values["guidance_embeds"],
        rope_axes=tuple(values.get("axes_dims_rope", (16, 56, 56))),
    )


def config_to_diffusers(config):
    """The `transformer/config.json` of a `FluxConfig`."""
    if (config.rope_theta, config.mlp_ratio) != (10_000, 4):
        raise ValueError("diffusers fixes model.rope_theta=10000 and model.mlp_ratio=4: this model has no config.json there")
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.30.0",
        "patch_size": 1,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.rope_axes),
    }


def _checked(keys, wanted, layout):
    missing, unknown = sorted(wanted - keys), sorted(keys - wanted)
    if missing or unknown:
        listed = [
            f"{word}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for word, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(f"{len(missing)} missing and {len(unknown)} unknown keys in a {layout} checkpoint; " + "; ".join(listed))


def to_fluxlite(keys, get, config, layout):
    """Yield (our name, tensor) from a foreign layout; `get(name)` reads one tensor of `keys`. Names are checked first."""
    rules = RULES[layout](config)
    _checked(set(keys), {name for rule in rules for name in rule.theirs}, layout)
    for rule in rules:
        yield from zip(rule.ours, rule.forward([get(name) for name in rule.theirs]))


def from_fluxlite(keys, get, config, layout):
    """Yield (their name, tensor) from our layout, one rule at a time; names are checked first."""
    rules = RULES[layout](config)
    _checked(set(keys), {name for rule in rules for name in rule.ours}, "fluxlite")
    for rule in rules:
        yield from zip(rule.theirs, rule.backward([get(name) for name in rule.ours]))


def autoencoder_keys_from_bfl(keys):
    """{diffusers name: name in `ae.safetensors`} for every key; attention is 1x1 convolutions there, linear here."""
    num_levels = 1 + max(int(k.split(".")[2]) for k in keys if k.startswith("decoder.up."))
    renamed = {}
    for key in keys:
        parts = key.split(".")
        side, name = parts[0], ".".join(parts[1:])
        if parts[1] in ("down", "up"):
            level = int(parts[2]) if parts[1] == "down" else num_levels - 1 - int(parts[2])
            name = f"{parts[1]}_blocks.{level}." + ".".join(parts[3:])
            name = (
                name.replace(".block.", ".resnets.")
                .replace(".downsample.", ".downsamplers.0.")
                .replace(".upsample.", ".upsamplers.0.")
            )
        for theirs, ours in (
            ("mid.block_1", "mid_block.resnets.0"),
            ("mid.block_2", "mid_block.resnets.1"),
            ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
            ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
            ("mid.attn_1.k", "mid_block.attentions.0.to_k"),
            ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
            ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
            ("nin_shortcut", "conv_shortcut"),
            ("norm_out", "conv_norm_out"),
        ):
            name = name.replace(theirs, ours)
        renamed[f"{side}.{name}"] = key
    return renamed
