"""Names and layouts of checkpoints: a table for each foreign layout, read forwards or backwards.

A row of a table is (their names, our names, transform). `{i}` counts blocks, and `.*` stands for
`.weight` and `.bias`. `rules` spells a table out for a model. `convert` carries the tensors of one
layout to another, a rule at a time: no more than a few linears are in memory. Completeness is
checked on names and shapes before any tensor is read.

Ours holds what diffusers' holds under other names, and the single block's last linear in two. So a
checkpoint of diffusers' is mapped and nothing of it is copied; of BFL's the last modulation alone.

H hidden width, N heads, D head width. The layouts: `fluxlite` (ours), `diffusers`, `bfl`
(flux1-dev.safetensors, ComfyUI; of a ControlNet x-flux's), `nemo`.
"""

import re
from collections import namedtuple
from functools import reduce

import torch
from einops import rearrange

from fluxlite.nets.autoencoder import Autoencoder
from fluxlite.nets.configs import AutoencoderConfig, ControlNetConfig, FluxConfig
from fluxlite.nets.controlnet import ControlNet
from fluxlite.nets.flux import Flux
from fluxlite.weights.tensor_files import wider

MODELS = {FluxConfig: Flux, ControlNetConfig: ControlNet, AutoencoderConfig: Autoencoder}

# forward: (their tensors, the model's configuration) → our tensors; backward: the inverse.
# Both are views where they can be.
Transform = namedtuple("Transform", "forward backward")
# theirs and ours: lists of names; optional: of theirs, those that a checkpoint may lack.
Rule = namedtuple("Rule", "theirs ours transform optional", defaults=((),))


# --- transforms -----------------------------------------------------------------------------------


def join_heads(tensors, config):
    """q, k and v (N·D, ...) as one (N·3·D, ...), head by head."""
    qkv = torch.stack(list(tensors))
    return [rearrange(qkv, "three (n d) ... -> (n three d) ...", d=config.head_width)]


def split_heads(tensors, config):
    """The inverse of `join_heads`."""
    return list(
        rearrange(tensors[0], "(n three d) ... -> three (n d) ...", three=3, d=config.head_width)
    )


def split_rows(tensors, config):
    """BFL's linear1 as q, k, v and the MLP's first linear."""
    hidden = config.hidden_size
    return list(tensors[0].split([hidden, hidden, hidden, config.mlp_ratio * hidden]))


def split_columns(tensors, config):
    """One linear from (attention H, MLP) to H as two."""
    return list(tensors[0].tensor_split([config.hidden_size], dim=1))


def swap_halves(tensors, config):
    """(shift, scale) ↔ (scale, shift)."""
    return [torch.cat(tensors[0].chunk(2)[::-1])]


SAME = Transform(*2 * [lambda t, c: list(t)])
STACKED = Transform(lambda t, c: list(t[0].chunk(3)), lambda t, c: [torch.cat(t)])  # q, k, v
ROWS = Transform(split_rows, lambda t, c: [torch.cat(t)])
COLUMNS = Transform(split_columns, lambda t, c: [torch.cat(t, dim=1)])
HEADS = Transform(split_heads, join_heads)
SWAPPED = Transform(swap_halves, swap_halves)
# NeMo writes the bias of the single block's output twice, and its forward uses the first alone
TWICE = Transform(lambda t, c: [t[0]], lambda t, c: [t[0], t[0]])
# a 1x1 convolution ↔ a linear
CONV_1X1 = Transform(lambda t, c: [t[0].flatten(1)], lambda t, c: [t[0][:, :, None, None]])


# --- tables ---------------------------------------------------------------------------------------


def same(pairs):
    """Rows of linears that are alike but for their names: {theirs: ours}."""
    return [([f"{theirs}.*"], [f"{ours}.*"], SAME) for theirs, ours in pairs.items()]


def embedder(theirs, ours):
    """Rows of an embedder's two linears; `theirs` are two names, or what comes before BFL's."""
    if isinstance(theirs, str):
        theirs = f"{theirs}.in_layer", f"{theirs}.out_layer"
    return same({theirs[0]: f"{ours}.linear_in", theirs[1]: f"{ours}.linear_out"})


def qkv(ours, theirs, norms, transform=SAME):
    """Rows of queries, keys, values and the norms of the first two; `theirs` and `norms` are
    names.
    """
    linears = [f"{name}.*" for name in theirs], [f"{ours}.qkv.{x}.*" for x in "qkv"], transform
    return [
        linears,
        *(([norm], [f"{ours}.qkv.{x}_norm.weight"], SAME) for norm, x in zip(norms, "qk")),
    ]


def stream(ours, *, qkv_rows, proj, mlp):
    """Rows for one stream of a double block; `mlp` are two names, `qkv_rows` the arguments of
    `qkv`.
    """
    linears = {proj: "proj", mlp[0]: "mlp.linear_in", mlp[1]: "mlp.linear_out"}
    return [
        *qkv(ours, *qkv_rows),
        *same({theirs: f"{ours}.{name}" for theirs, name in linears.items()}),
    ]


OUR_D, OUR_S = "double_blocks.{i}", "single_blocks.{i}"
LAST = [f"{OUR_S}.proj.weight", f"{OUR_S}.mlp.linear_out.weight"]

D, S = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
EMBED = "time_text_embed.{}_embedder.linear_{}".format
DIFFUSERS = [
    *same({"x_embedder": "img_in", "context_embedder": "txt_in"}),
    *embedder([EMBED("timestep", 1), EMBED("timestep", 2)], "time_in"),
    *embedder([EMBED("guidance", 1), EMBED("guidance", 2)], "guidance_in"),
    *embedder([EMBED("text", 1), EMBED("text", 2)], "pooled_in"),
    *stream(
        f"{OUR_D}.img",
        qkv_rows=(
            [f"{D}.attn.to_{x}" for x in "qkv"],
            [f"{D}.attn.norm_{x}.weight" for x in "qk"],
        ),
        proj=f"{D}.attn.to_out.0",
        mlp=[f"{D}.ff.net.0.proj", f"{D}.ff.net.2"],
    ),
    *stream(
        f"{OUR_D}.txt",
        qkv_rows=(
            [f"{D}.attn.add_{x}_proj" for x in "qkv"],
            [f"{D}.attn.norm_added_{x}.weight" for x in "qk"],
        ),
        proj=f"{D}.attn.to_add_out",
        mlp=[f"{D}.ff_context.net.0.proj", f"{D}.ff_context.net.2"],
    ),
    *qkv(OUR_S, [f"{S}.attn.to_{x}" for x in "qkv"], [f"{S}.attn.norm_{x}.weight" for x in "qk"]),
    *same({f"{S}.proj_mlp": f"{OUR_S}.mlp.linear_in"}),
    ([f"{S}.proj_out.weight"], LAST, COLUMNS),
    ([f"{S}.proj_out.bias"], [f"{OUR_S}.mlp.linear_out.bias"], SAME),
    *same({f"{D}.norm1.linear": "modulation.img.{i}"}),
    *same({f"{D}.norm1_context.linear": "modulation.txt.{i}"}),
    *same({f"{S}.norm.linear": "modulation.single.{i}"}),
    *same({"norm_out.linear": "modulation.out", "proj_out": "out"}),
]

D, S = "double_blocks.{i}", "single_blocks.{i}"


def bfl_stream(s):
    """Rows for the stream `s`, img or txt, of BFL's double blocks, and its modulation."""
    norms = [f"{D}.{s}_attn.norm.{x}_norm.scale" for x in ("query", "key")]
    return [
        *stream(
            f"{OUR_D}.{s}",
            qkv_rows=([f"{D}.{s}_attn.qkv"], norms, STACKED),
            proj=f"{D}.{s}_attn.proj",
            mlp=[f"{D}.{s}_mlp.0", f"{D}.{s}_mlp.2"],
        ),
        *same({f"{D}.{s}_mod.lin": f"modulation.{s}.{{i}}"}),
    ]


BFL = [
    *same({"img_in": "img_in", "txt_in": "txt_in"}),
    *embedder("time_in", "time_in"),
    *embedder("guidance_in", "guidance_in"),
    *embedder("vector_in", "pooled_in"),
    *bfl_stream("img"),
    *bfl_stream("txt"),
    (
        [f"{S}.linear1.*"],
        [*(f"{OUR_S}.qkv.{x}.*" for x in "qkv"), f"{OUR_S}.mlp.linear_in.*"],
        ROWS,
    ),
    ([f"{S}.norm.query_norm.scale"], [f"{OUR_S}.qkv.q_norm.weight"], SAME),
    ([f"{S}.norm.key_norm.scale"], [f"{OUR_S}.qkv.k_norm.weight"], SAME),
    ([f"{S}.linear2.weight"], LAST, COLUMNS),
    ([f"{S}.linear2.bias"], [f"{OUR_S}.mlp.linear_out.bias"], SAME),
    *same({f"{S}.modulation.lin": "modulation.single.{i}", "final_layer.linear": "out"}),
    (["final_layer.adaLN_modulation.1.*"], ["modulation.out.*"], SWAPPED),
]


def nemo_stream(s, added, mlp):
    """Rows for the stream `s` of NeMo's double blocks."""
    attention = f"{D}.self_attention.{added}"
    norms = [f"{attention}{x}_layernorm.weight" for x in "qk"]
    return stream(
        f"{OUR_D}.{s}",
        qkv_rows=([f"{attention}linear_qkv"], norms, HEADS),
        proj=f"{attention}linear_proj",
        mlp=[f"{D}.{mlp}.linear_fc1", f"{D}.{mlp}.linear_fc2"],
    )


A, M = f"{S}.self_attention", f"{S}.mlp"
NEMO = [
    *same({"img_embed": "img_in", "txt_embed": "txt_in"}),
    *embedder("timestep_embedding.time_embedder", "time_in"),
    *embedder("guidance_embedding", "guidance_in"),
    *embedder("vector_embedding", "pooled_in"),
    *nemo_stream("img", "", "mlp"),
    *nemo_stream("txt", "added_", "context_mlp"),
    *qkv(OUR_S, [f"{A}.linear_qkv"], [f"{A}.{x}_layernorm.weight" for x in "qk"], HEADS),
    *same({f"{M}.linear_fc1": f"{OUR_S}.mlp.linear_in"}),
    ([f"{A}.linear_proj.weight"], LAST[:1], SAME),
    ([f"{M}.linear_fc2.weight"], LAST[1:], SAME),
    ([f"{M}.linear_fc2.bias", f"{A}.linear_proj.bias"], [f"{OUR_S}.mlp.linear_out.bias"], TWICE),
    *same({f"{D}.adaln.adaLN_modulation.1": "modulation.img.{i}"}),
    *same({f"{D}.adaln_context.adaLN_modulation.1": "modulation.txt.{i}"}),
    *same({f"{S}.adaln.adaLN_modulation.1": "modulation.single.{i}"}),
    *same({"norm_out.adaLN_modulation.1": "modulation.out", "proj_out": "out"}),
]

TABLES = {"diffusers": DIFFUSERS, "bfl": BFL, "nemo": NEMO}


def control(hint, double, *convs):
    """Rows for what a ControlNet has beside its blocks; `convs` are the names of its eight
    convolutions.
    """
    return [
        *same(
            {
                hint: "hint_in",
                f"controlnet_{double}.{{i}}": "double_out.{i}",
                "controlnet_single_blocks.{i}": "single_out.{i}",
            }
        ),
        (["controlnet_mode_embedder.weight"], ["mode_in.weight"], SAME),
        *same({f"input_hint_block.{name}": f"hint_convs.{k}" for k, name in enumerate(convs)}),
    ]


CONVS = "conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out"
CONTROL = {
    "diffusers": control("controlnet_x_embedder", "blocks", *CONVS),
    "bfl": control(
        "pos_embed_input", "blocks", *range(0, 16, 2)
    ),  # between the convolutions stand activations
    "nemo": control("controlnet_x_embedder", "double_blocks", *CONVS),
}
LAYOUTS = ("fluxlite", *TABLES)
FIRST_EDITION = (
    "fluxlite 0.1, whose weights lie in another order: "
    "python scripts/convert_first_edition.py --src OLD --dst NEW.safetensors converts them "
    "(what save_converted kept may be removed instead)"
)
PREFIXES = ("", "model.diffusion_model.")  # the second: BFL's layout as ComfyUI saves it


# --- tables spelled out for a model ---------------------------------------------------------------


def stage_of(row):
    """Where a row's tensors stand: 0 embedders, 1 double blocks, 2 single blocks, 3 the end."""
    ours = row[1][0].removeprefix("modulation.")
    prefixes = {"double": 1, "img.": 1, "txt.": 1, "single": 2, "out.": 3}
    return next((stage for prefix, stage in prefixes.items() if ours.startswith(prefix)), 0)


def spell_rows(layout, config):
    """Yield (row, block number) of all rows that a model of this shape has, block after block."""
    depths = (1, config.num_double_blocks, config.num_single_blocks, 1)
    rows, absent = TABLES[layout], [] if config.guidance_embed else ["guidance_in"]
    if isinstance(config, ControlNetConfig):
        rows = [*rows, *CONTROL[layout]]
        absent += ["out.", "modulation.out"]
        absent += ["hint_convs"] * (config.hint != "pixel") + ["mode_in"] * (not config.num_modes)
    kept = [row for row in rows if not row[1][0].startswith(tuple(absent))]
    for stage, depth in enumerate(depths):
        of_stage = [row for row in kept if stage_of(row) == stage]
        for i in range(depth):
            yield from ((row, i) for row in of_stage)


def flux_rules(layout, config):
    """The rules between a foreign layout of a transformer or a ControlNet and ours."""
    found = []
    for (theirs, ours, transform), i in spell_rows(layout, config):
        for leaf in ("weight", "bias") if theirs[0].endswith(".*") else [""]:
            mine, foreign = spell_names(ours, i, leaf), spell_names(theirs, i, leaf)
            found.append(Rule(foreign, mine, transform, foreign[1:] if transform is TWICE else ()))
    return found


def spell_names(patterns, i, leaf):
    """Names of a row with the number of a block and `weight` or `bias` filled in."""
    return [pattern.format(i=i).replace("*", leaf) for pattern in patterns]


# diffusers' and our names → those of `ae.safetensors`, besides the order of the decoder's levels
AUTOENCODER_NAMES = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("down_blocks.", "down."),
    ("up_blocks.", "up."),
    ("resnets.", "block."),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)


def autoencoder_rules(config):
    """The rules between BFL's layout of the autoencoder and ours, whose names are diffusers'."""
    levels, found = len(config.block_out_channels), []
    for name in our_shapes(config):
        theirs = re.sub(
            r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name
        )
        for ours, bfl in AUTOENCODER_NAMES:
            theirs = theirs.replace(ours, bfl)
        square = "attentions.0.to_" in name and name.endswith("weight")
        found.append(Rule([theirs], [name], CONV_1X1 if square else SAME))
    return found


def rules(layout, config):
    """The rules between `layout` and ours for the model that `config`, of one of `MODELS`,
    describes.
    """
    of_autoencoder = isinstance(config, AutoencoderConfig)
    if layout == "fluxlite" or (of_autoencoder and layout == "diffusers"):
        return [Rule([name], [name], SAME) for name in our_shapes(config)]
    return autoencoder_rules(config) if of_autoencoder else flux_rules(layout, config)


def our_shapes(config):
    """{name: meta tensor} of a model in our layout."""
    return on_meta(config).state_dict()


def on_meta(config, *options):
    """The model that `config` describes, without memory for its weights."""
    with torch.device("meta"):
        return MODELS[type(config)](config, *options)


def shapes(layout, config):
    """{name: shape} of a whole checkpoint in `layout`, in the order that `convert` yields
    tensors.
    """
    ours, found = our_shapes(config), {}
    for rule in rules(layout, config):
        parts = rule.transform.backward([ours[name] for name in rule.ours], config)
        found |= {name: tuple(part.shape) for name, part in zip(rule.theirs, parts)}
    return found


# --- recognising ----------------------------------------------------------------------------------


def their_name(layout, linear):
    """The name in `layout` of the weight of one of our linears."""
    rows = (*TABLES[layout], *CONTROL[layout]) if layout in TABLES else ()
    return next((r[0][0] for r in rows if r[1][0].startswith(linear)), f"{linear}.*").replace(
        "*", "weight"
    )


def recognise(keys):
    """(what, layout, prefix) of a checkpoint from its keys: what is "transformer", "controlnet" or
    "autoencoder".

    Raises `ValueError` for keys that are none's, or several layouts'.
    """
    keys, everywhere = set(keys), "time_in.linear_in"  # which each layout names in its own way
    found = [
        (layout, prefix)
        for layout in LAYOUTS
        for prefix in PREFIXES
        if prefix + their_name(layout, everywhere) in keys
    ]
    if "decoder.conv_in.weight" in keys:
        if found:
            raise ValueError(
                "there are a transformer and an autoencoder here: name the file of one"
            )
        return (
            "autoencoder",
            "bfl" if "decoder.mid.block_1.norm1.weight" in keys else "diffusers",
            "",
        )
    if len(found) > 1:
        raise ValueError(f"the keys mix layouts: {' and '.join(layout for layout, _ in found)}")
    if not found:
        shown = ", ".join(sorted(keys)[:3]) or "none"
        raise ValueError(
            f"neither a FLUX transformer, a ControlNet nor an autoencoder: {len(keys)} keys such "
            f"as {shown}"
        )
    layout, prefix = found[0]
    if layout == "fluxlite" and "modulation.weight" in keys:
        raise ValueError(f"it was written by {FIRST_EDITION}")
    return (
        "controlnet" if prefix + their_name(layout, "hint_in") in keys else "transformer",
        layout,
        prefix,
    )


def depth(keys, pattern):
    """How many blocks there are: one more than the largest number in the keys that start with
    `pattern`.
    """
    numbers = [
        int(match[1])
        for key in keys
        if (match := re.match(re.escape(pattern).replace(r"\{i\}", r"(\d+)") + r"\.", key))
    ]
    if max(numbers, default=-1) >= len(keys):
        raise ValueError(f"block {max(numbers)} among {len(keys)} keys: the file is damaged")
    return 1 + max(numbers, default=-1)


def infer_config(layout, found):
    """The `FluxConfig` or `ControlNetConfig` of {name: shape} of such a net, in `layout` and
    without its prefix.

    RoPE axes cannot be seen in the weights: they are FLUX's share of the head width, D/8, 7D/16,
    7D/16.
    """
    if layout == "fluxlite":
        at = {name: name for name in found}
        blocks = ["double_blocks.{i}", "single_blocks.{i}"]
    else:
        rows = [*TABLES[layout], *CONTROL[layout]]
        table = [
            (r[0][0].replace("*", leaf), r[1][0].replace("*", leaf))
            for r in rows
            for leaf in ("weight", "bias")
        ]
        at = {ours.format(i=0): theirs.format(i=0) for theirs, ours in table}
        blocks = [
            next(t for t, o in table if o.startswith(kind)).split(".{i}")[0] + ".{i}"
            for kind in ("double_b", "single_b")
        ]
    doubles, singles = (depth(found, pattern) for pattern in blocks)

    def shape(name):
        if at.get(name) not in found:
            raise ValueError(f"missing: this {layout} checkpoint has no {at.get(name, name)}")
        return checked_shape(at[name], found[at[name]], 1 if "norm" in name else 2)

    first = "double_blocks.0.img" if doubles else "single_blocks.0"
    hidden, head = shape("img_in.weight")[0], shape(f"{first}.qkv.q_norm.weight")[0]
    if doubles:
        mlp = shape("double_blocks.0.img.mlp.linear_in.weight")[0]
    else:
        mlp = (
            shape("single_blocks.0.qkv.q.weight")[0] - 3 * hidden
            if layout == "bfl"
            else shape(f"{first}.mlp.linear_in.weight")[0]
        )
    values = dict(
        num_double_blocks=doubles,
        num_single_blocks=singles,
        hidden_size=hidden,
        num_heads=max(1, hidden // head),
        mlp_ratio=mlp // hidden,
        in_channels=shape("img_in.weight")[1],
        text_width=shape("txt_in.weight")[1],
        pooled_width=shape("pooled_in.linear_in.weight")[1],
        guidance_embed=at.get("guidance_in.linear_in.weight") in found,
        rope_axes=(head // 8, *2 * [head // 16 * 7]),
    )
    if at.get("hint_in.weight") not in found:
        return FluxConfig(**values, out_channels=shape("out.weight")[0])
    modes = shape("mode_in.weight")[0] if at.get("mode_in.weight") in found else 0
    hint = "pixel" if at.get("hint_convs.0.weight") in found else "latent"
    return ControlNetConfig(**values, hint=hint, num_modes=modes)


def checked_shape(name, shape, rank):
    """`shape` if it has so many dimensions, none absurdly wide; else `ValueError`."""
    if len(shape) != rank or max(shape) > 1 << 20:
        raise ValueError(
            f"{name} has the shape {list(shape)} where {rank} dimensions belong: it is damaged, or "
            "flattened by a trainer"
        )
    return shape


def infer_autoencoder_config(layout, found, values=None):
    """The `AutoencoderConfig` of an autoencoder's {name: shape}; `values`, a vae/config.json, adds
    what shapes do not show.
    """
    levels = depth(found, "encoder.down.{i}" if layout == "bfl" else "encoder.down_blocks.{i}")
    level, resnet = (
        ("encoder.down.{i}", "block.{i}")
        if layout == "bfl"
        else ("encoder.down_blocks.{i}", "resnets.{i}")
    )

    def shape(name):
        if name not in found:
            raise ValueError(f"missing: this {layout} autoencoder has no {name}")
        return checked_shape(name, found[name], 4)

    first = f"{level}.{resnet.format(i=0)}.conv1.weight"
    inferred = AutoencoderConfig(
        block_out_channels=tuple(shape(first.format(i=i))[0] for i in range(levels)),
        layers_per_block=depth(found, f"{level.format(i=0)}.{resnet}"),
        latent_channels=shape("decoder.conv_in.weight")[1],
    )
    if not levels:
        raise ValueError(f"missing: this {layout} autoencoder has no encoder")
    for name in ("norm_num_groups", "scaling_factor", "shift_factor"):
        if (values or {}).get(name) is not None:
            setattr(inferred, name, values[name])
    if any(width % inferred.norm_num_groups for width in inferred.block_out_channels):
        raise ValueError(
            "an autoencoder of other widths than FLUX's needs its config.json beside it, with "
            "norm_num_groups"
        )
    return inferred


def check(layout, config, found):
    """Raise `ValueError`, with a list, unless {name: shape} is exactly a checkpoint of `config` in
    `layout`.
    """
    expected = shapes(layout, config)
    optional = {name for rule in rules(layout, config) for name in rule.optional}
    faults = {
        "missing": sorted(expected.keys() - found.keys() - optional),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{k} {list(found[k])}, not {list(expected[k])}"
            for k in expected
            if k in found and tuple(found[k]) != expected[k]
        ],
    }
    if any(faults.values()):
        listed = [
            f"{f}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
            for f, names in faults.items()
            if names
        ]
        counts = ", ".join(f"{len(names)} {fault}" for fault, names in faults.items() if names)
        raise ValueError(
            f"{counts} among the keys of this {layout} checkpoint; " + "; ".join(listed)
        )


# --- carrying over --------------------------------------------------------------------------------


def convert(read, source, target, config):
    """Yield (name in `target`'s layout, tensor) of a whole model; `read(name)` reads one of
    `source`'s.

    Every tensor of the source is read once and no more than a few linears are held; tensors whose
    bytes do not change are views of the source's.
    """
    made, makers = {}, {name: rule for rule in rules(source, config) for name in rule.ours}

    def ours(name):
        if name not in made:
            rule = makers[name]
            required = rule.theirs[: len(rule.theirs) - len(rule.optional)]
            tensors = [read(n) for n in required]
            made.update(zip(rule.ours, apply_transform(rule.transform, "forward", tensors, config)))
        return made.pop(name)

    for rule in rules(target, config):
        tensors = [ours(name) for name in rule.ours]
        yield from zip(rule.theirs, apply_transform(rule.transform, "backward", tensors, config))


def apply_transform(transform, direction, tensors, config):
    """A `Transform` of tensors, those that it joins in the widest of their types."""
    if transform is not SAME and len(tensors) > 1:
        common = reduce(wider, [t.dtype for t in tensors])
        tensors = [t.to(common) for t in tensors]
    return getattr(transform, direction)(tensors, config)


def dtypes(source, target, config, theirs):
    """{name: type} in `target` for a checkpoint in `source` whose types are {name: dtype}.

    Each tensor's is that of its sources; where they differ, the wider one.
    """
    makers = {name: rule for rule in rules(source, config) for name in rule.ours}
    found = {}
    for rule in rules(target, config):
        names = [name for ours in rule.ours for name in makers[ours].theirs if name in theirs]
        found |= dict.fromkeys(rule.theirs, reduce(wider, [theirs[name] for name in names]))
    return found


def to_fluxlite(state, config, layout):
    """A state dict of ours from one in `layout`, checked first; only what changes is copied."""
    check(layout, config, {name: tuple(state[name].shape) for name in state.keys()})
    return dict(convert(state.__getitem__, layout, "fluxlite", config))


def from_fluxlite(state, config, layout):
    """A state dict in `layout` from one of ours, checked first."""
    check("fluxlite", config, {name: tuple(state[name].shape) for name in state.keys()})
    return dict(convert(state.__getitem__, "fluxlite", layout, config))


# --- configurations as diffusers writes them ------------------------------------------------------


def config_from_diffusers(values):
    """`FluxConfig` of a diffusers `transformer/config.json`."""
    return FluxConfig(
        **_shape_from_diffusers(values),
        out_channels=values.get("out_channels") or values["in_channels"],
    )


def controlnet_config_from_diffusers(values):
    """`ControlNetConfig` of the `config.json` of a FluxControlNetModel."""
    hint = "pixel" if values.get("conditioning_embedding_channels") else "latent"
    return ControlNetConfig(
        **_shape_from_diffusers(values), hint=hint, num_modes=values.get("num_mode") or 0
    )


def _shape_from_diffusers(values):
    return dict(
        num_double_blocks=values["num_layers"],
        num_single_blocks=values["num_single_layers"],
        hidden_size=values["num_attention_heads"] * values["attention_head_dim"],
        num_heads=values["num_attention_heads"],
        in_channels=values["in_channels"],
        text_width=values["joint_attention_dim"],
        pooled_width=values["pooled_projection_dim"],
        guidance_embed=values["guidance_embeds"],
        rope_axes=tuple(values.get("axes_dims_rope", (16, 56, 56))),
    )


def config_to_diffusers(config):
    """The `config.json` of a `FluxConfig` or a `ControlNetConfig`."""
    if (config.rope_theta, config.mlp_ratio) != (10_000, 4):
        raise ValueError(
            "diffusers fixes model.rope_theta=10000 and model.mlp_ratio=4: this model has no "
            "config.json there"
        )
    shape = {
        "patch_size": 1,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.rope_axes),
    }
    if isinstance(config, ControlNetConfig):
        pixel = config.hint == "pixel"  # patches of what the convolutions give are formed inside
        own = {
            "num_mode": config.num_modes or None,
            "conditioning_embedding_channels": config.in_channels // 4 if pixel else None,
        }
        return _named("FluxControlNetModel") | shape | own | ({"patch_size": 2} if pixel else {})
    return _named("FluxTransformer2DModel") | shape | {"out_channels": config.out_channels}


def _named(class_name):
    return {"_class_name": class_name, "_diffusers_version": "0.30.0"}


def autoencoder_config_to_diffusers(config):
    """The `vae/config.json` of an `AutoencoderConfig`."""
    levels = len(config.block_out_channels)
    return _named("AutoencoderKL") | {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "latents_mean": None,
        "latents_std": None,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
    }
