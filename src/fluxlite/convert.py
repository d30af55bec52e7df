"""Names and layouts of checkpoints: a table for each foreign layout, read forwards or backwards.

A row of a table is (their names, our names, transform). `{i}` counts blocks, `.*` stands for `.weight` and `.bias`, and
`modulation/img` for the rows of our one modulation linear that belong to the image stream of block i. `rules` spells a table out
for a model; `convert` carries the tensors of one layout to another, a rule at a time: no more than one block's linear is in memory.
Completeness is checked on names and shapes before any tensor is read.

H hidden width, N heads, D head width. The layouts: `fluxlite` (ours), `diffusers`, `bfl` (flux1-dev.safetensors, ComfyUI; of a
ControlNet x-flux's), `nemo`.
"""

import re
from collections import namedtuple
from functools import reduce

import torch
from einops import rearrange

from fluxlite.autoencoder import Autoencoder, AutoencoderConfig
from fluxlite.controlnet import ControlNet, ControlNetConfig
from fluxlite.model import Flux, FluxConfig
from fluxlite.streams import Piece, wider

MODELS = {FluxConfig: Flux, ControlNetConfig: ControlNet, AutoencoderConfig: Autoencoder}

# forward: (their tensors, the model's configuration) → our tensors; backward: the inverse. Both are views where they can be.
Transform = namedtuple("Transform", "forward backward")
# theirs and ours: lists of pieces; optional: of theirs, the names that a checkpoint may lack.
Rule = namedtuple("Rule", "theirs ours transform optional", defaults=((),))


# --- transforms -----------------------------------------------------------------------------------------------------------------


def half_split(x, config):
    """Rows (N·D, ...) of queries or keys, from rotation pairs (0, 1), (2, 3) … of a head to pairs (i, i + D/2)."""
    return rearrange(x, "(n d two) ... -> (n two d) ...", d=config.head_width // 2, two=2)


def interleave(x, config):
    """The inverse of `half_split`."""
    return rearrange(x, "(n two d) ... -> (n d two) ...", d=config.head_width // 2, two=2)


def by_head(q, k, v, config):
    """(N·D, ...) each to (N·3·D, ...)."""
    return rearrange(torch.stack([q, k, v]), "three (n d) ... -> (n three d) ...", d=config.head_width)


def by_kind(qkv, config):
    """The inverse of `by_head`."""
    return rearrange(qkv, "(n three d) ... -> three (n d) ...", three=3, d=config.head_width)


def join_qkv(tensors, config):
    q, k, v = tensors
    return [by_head(half_split(q, config), half_split(k, config), v, config)]


def split_qkv(tensors, config):
    q, k, v = by_kind(tensors[0], config)
    return [interleave(q, config), interleave(k, config), v]


def split_rows(tensors, config):
    qkv, mlp = tensors[0].split([3 * config.hidden_size, config.mlp_ratio * config.hidden_size])
    return [*join_qkv(qkv.chunk(3), config), mlp]


def _same(tensors, config):
    return list(tensors)


SAME = Transform(_same, _same)
# separate q, k and v ↔ ours, head by head and half-split
QKV = Transform(join_qkv, split_qkv)
# BFL stacks all of q, all of k, all of v
STACKED_QKV = Transform(lambda t, c: join_qkv(t[0].chunk(3), c), lambda t, c: [torch.cat(split_qkv(t, c))])
# BFL's linear1: these over the MLP's first linear
ROWS = Transform(split_rows, lambda t, c: [torch.cat([*split_qkv(t[:1], c), t[1]])])
# NeMo is head by head as ours is, with interleaved rotation pairs
HEADWISE_QKV = Transform(lambda t, c: join_qkv(by_kind(t[0], c), c), lambda t, c: [by_head(*split_qkv(t, c), c)])
# the scale of a q or k norm
NORM = Transform(lambda t, c: [half_split(t[0], c)], lambda t, c: [interleave(t[0], c)])
# (scale, shift) ↔ our (shift, scale)
SWAPPED = Transform(*2 * [lambda t, c: [torch.cat(t[0].chunk(2)[::-1])]])
# one linear from (attention H, MLP) to H ↔ two
COLUMNS = Transform(lambda t, c: [t[0][:, : c.hidden_size], t[0][:, c.hidden_size :]], lambda t, c: [torch.cat(t, dim=1)])
# NeMo writes the bias of the single block's output twice, and its forward uses the first alone
TWICE = Transform(lambda t, c: [t[0]], lambda t, c: [t[0], t[0]])
# a 1x1 convolution ↔ a linear
CONV_1X1 = Transform(lambda t, c: [t[0].flatten(1)], lambda t, c: [t[0][:, :, None, None]])


# --- tables ---------------------------------------------------------------------------------------------------------------------


def stream(ours, *, qkv, norms, proj, mlp, qkv_transform):
    """Rows for one stream of a double block; `qkv`, `norms` and `mlp` are lists of their names."""
    return [
        *((([f"{name}.{leaf}" for name in qkv]), [f"{ours}.qkv.linear.{leaf}"], qkv_transform) for leaf in ("weight", "bias")),
        *(([theirs], [f"{ours}.qkv.{x}_norm.weight"], NORM) for theirs, x in zip(norms, "qk")),
        ([f"{proj}.*"], [f"{ours}.proj.*"], SAME),
        ([f"{mlp[0]}.*"], [f"{ours}.mlp.linear_in.*"], SAME),
        ([f"{mlp[1]}.*"], [f"{ours}.mlp.linear_out.*"], SAME),
    ]


def same(pairs):
    """Rows of linears that are alike but for their names: {theirs: ours}."""
    return [([f"{theirs}.*"], [f"{ours}.*"], SAME) for theirs, ours in pairs.items()]


D, S = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
DIFFUSERS = [
    *same({"x_embedder": "img_in", "context_embedder": "txt_in"}),
    *same({f"time_text_embed.timestep_embedder.linear_{k}": f"time_in.linear_{x}" for k, x in ((1, "in"), (2, "out"))}),
    *same({f"time_text_embed.guidance_embedder.linear_{k}": f"guidance_in.linear_{x}" for k, x in ((1, "in"), (2, "out"))}),
    *same({f"time_text_embed.text_embedder.linear_{k}": f"pooled_in.linear_{x}" for k, x in ((1, "in"), (2, "out"))}),
    *stream(
        "double_blocks.{i}.img",
        qkv=[f"{D}.attn.to_{x}" for x in "qkv"],
        norms=[f"{D}.attn.norm_{x}.weight" for x in "qk"],
        proj=f"{D}.attn.to_out.0",
        mlp=[f"{D}.ff.net.0.proj", f"{D}.ff.net.2"],
        qkv_transform=QKV,
    ),
    *stream(
        "double_blocks.{i}.txt",
        qkv=[f"{D}.attn.add_{x}_proj" for x in "qkv"],
        norms=[f"{D}.attn.norm_added_{x}.weight" for x in "qk"],
        proj=f"{D}.attn.to_add_out",
        mlp=[f"{D}.ff_context.net.0.proj", f"{D}.ff_context.net.2"],
        qkv_transform=QKV,
    ),
    *(([f"{S}.attn.to_{x}.{leaf}" for x in "qkv"], [f"single_blocks.{{i}}.qkv.linear.{leaf}"], QKV) for leaf in ("weight", "bias")),
    *(([f"{S}.attn.norm_{x}.weight"], [f"single_blocks.{{i}}.qkv.{x}_norm.weight"], NORM) for x in "qk"),
    ([f"{S}.proj_mlp.*"], ["single_blocks.{i}.mlp.linear_in.*"], SAME),
    ([f"{S}.proj_out.weight"], ["single_blocks.{i}.proj.weight", "single_blocks.{i}.mlp.linear_out.weight"], COLUMNS),
    ([f"{S}.proj_out.bias"], ["single_blocks.{i}.mlp.linear_out.bias"], SAME),
    *same({"proj_out": "out"}),
    *same({f"{D}.norm1.linear": "modulation/img", f"{D}.norm1_context.linear": "modulation/txt"}),
    *same({f"{S}.norm.linear": "modulation/single"}),
    (["norm_out.linear.*"], ["modulation/out.*"], SWAPPED),
]

D, S = "double_blocks.{i}", "single_blocks.{i}"
BFL = [
    *same({"img_in": "img_in", "txt_in": "txt_in"}),
    *same({f"time_in.{x}_layer": f"time_in.linear_{x}" for x in ("in", "out")}),
    *same({f"guidance_in.{x}_layer": f"guidance_in.linear_{x}" for x in ("in", "out")}),
    *same({f"vector_in.{x}_layer": f"pooled_in.linear_{x}" for x in ("in", "out")}),
    *(
        row
        for s in ("img", "txt")
        for row in stream(
            f"{D}.{s}",
            qkv=[f"{D}.{s}_attn.qkv"],
            norms=[f"{D}.{s}_attn.norm.{x}_norm.scale" for x in ("query", "key")],
            proj=f"{D}.{s}_attn.proj",
            mlp=[f"{D}.{s}_mlp.0", f"{D}.{s}_mlp.2"],
            qkv_transform=STACKED_QKV,
        )
    ),
    *(([f"{S}.linear1.{leaf}"], [f"{S}.qkv.linear.{leaf}", f"{S}.mlp.linear_in.{leaf}"], ROWS) for leaf in ("weight", "bias")),
    *(([f"{S}.norm.{name}_norm.scale"], [f"{S}.qkv.{x}_norm.weight"], NORM) for name, x in (("query", "q"), ("key", "k"))),
    ([f"{S}.linear2.weight"], [f"{S}.proj.weight", f"{S}.mlp.linear_out.weight"], COLUMNS),
    ([f"{S}.linear2.bias"], [f"{S}.mlp.linear_out.bias"], SAME),
    *same({"final_layer.linear": "out"}),
    *same({f"{D}.{s}_mod.lin": f"modulation/{s}" for s in ("img", "txt")}),
    *same({f"{S}.modulation.lin": "modulation/single", "final_layer.adaLN_modulation.1": "modulation/out"}),
]

NEMO = [
    *same({"img_embed": "img_in", "txt_embed": "txt_in"}),
    *same({f"timestep_embedding.time_embedder.{x}_layer": f"time_in.linear_{x}" for x in ("in", "out")}),
    *same({f"guidance_embedding.{x}_layer": f"guidance_in.linear_{x}" for x in ("in", "out")}),
    *same({f"vector_embedding.{x}_layer": f"pooled_in.linear_{x}" for x in ("in", "out")}),
    *(
        row
        for s, added, mlp in (("img", "", "mlp"), ("txt", "added_", "context_mlp"))
        for row in stream(
            f"{D}.{s}",
            qkv=[f"{D}.self_attention.{added}linear_qkv"],
            norms=[f"{D}.self_attention.{added}{x}_layernorm.weight" for x in "qk"],
            proj=f"{D}.self_attention.{added}linear_proj",
            mlp=[f"{D}.{mlp}.linear_fc1", f"{D}.{mlp}.linear_fc2"],
            qkv_transform=HEADWISE_QKV,
        )
    ),
    *(([f"{S}.self_attention.linear_qkv.{leaf}"], [f"{S}.qkv.linear.{leaf}"], HEADWISE_QKV) for leaf in ("weight", "bias")),
    *(([f"{S}.self_attention.{x}_layernorm.weight"], [f"{S}.qkv.{x}_norm.weight"], NORM) for x in "qk"),
    *same({f"{S}.mlp.linear_fc1": f"{S}.mlp.linear_in"}),
    ([f"{S}.self_attention.linear_proj.weight"], [f"{S}.proj.weight"], SAME),
    ([f"{S}.mlp.linear_fc2.weight"], [f"{S}.mlp.linear_out.weight"], SAME),
    ([f"{S}.mlp.linear_fc2.bias", f"{S}.self_attention.linear_proj.bias"], [f"{S}.mlp.linear_out.bias"], TWICE),
    *same({"proj_out": "out"}),
    *same({f"{D}.adaln.adaLN_modulation.1": "modulation/img", f"{D}.adaln_context.adaLN_modulation.1": "modulation/txt"}),
    *same({f"{S}.adaln.adaLN_modulation.1": "modulation/single"}),
    (["norm_out.adaLN_modulation.1.*"], ["modulation/out.*"], SWAPPED),
]

TABLES = {"diffusers": DIFFUSERS, "bfl": BFL, "nemo": NEMO}


def control(hint, double, *convs):
    """Rows for what a ControlNet has beside its blocks; `convs` are the names of its eight convolutions."""
    return [
        *same({hint: "hint_in", f"controlnet_{double}.{{i}}": "double_out.{i}", "controlnet_single_blocks.{i}": "single_out.{i}"}),
        (["controlnet_mode_embedder.weight"], ["mode_in.weight"], SAME),
        *same({f"input_hint_block.{name}": f"hint_convs.{k}" for k, name in enumerate(convs)}),
    ]


CONVS = "conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out"
CONTROL = {
    "diffusers": control("controlnet_x_embedder", "blocks", *CONVS),
    "bfl": control("pos_embed_input", "blocks", *range(0, 16, 2)),  # between the convolutions stand activations
    "nemo": control("controlnet_x_embedder", "double_blocks", *CONVS),
}
LAYOUTS = ("fluxlite", *TABLES)
PREFIXES = ("", "model.diffusion_model.")  # the second: BFL's layout as ComfyUI saves it


# --- tables spelled out for a model ---------------------------------------------------------------------------------------------


def _piece(name, i, config):
    """Our `modulation/img.weight` and its like as rows of the modulation linear; other names stand for whole tensors."""
    if not name.startswith("modulation/"):
        return Piece(name.format(i=i))
    part, leaf = name.removeprefix("modulation/").split(".")
    single = 12 * config.num_double_blocks
    first, chunks = {
        "img": (12 * i, 6),
        "txt": (12 * i + 6, 6),
        "single": (single + 3 * i, 3),
        "out": (single + 3 * config.num_single_blocks, 2),
    }[part]
    return Piece(f"modulation.{leaf}", first * config.hidden_size, (first + chunks) * config.hidden_size)


def _stage(row):
    """Where a row's tensors stand in a checkpoint: 0 embedders, 1 double blocks, 2 single blocks, 3 the end."""
    name = row[1][0].replace("modulation/img", "double").replace("modulation/txt", "double").replace("modulation/single", "single")
    return 1 if name.startswith("double") else 2 if name.startswith("single") else 3 if name.startswith(("out", "mod")) else 0


def _spelled(layout, config):
    """The rows of `layout` that a model of this shape has, with each block number, block after block: (row, i)."""
    depths = (1, config.num_double_blocks, config.num_single_blocks, 1)
    rows, absent = TABLES[layout], [] if config.guidance_embed else ["guidance_in"]
    if isinstance(config, ControlNetConfig):
        rows = [*rows, *CONTROL[layout]]
        absent += ["out.", "modulation/out"] + ["hint_convs"] * (config.hint != "pixel") + ["mode_in"] * (not config.num_modes)
    kept = [row for row in rows if not row[1][0].startswith(tuple(absent))]
    return [(row, i) for stage, depth in enumerate(depths) for i in range(depth) for row in kept if _stage(row) == stage]


def flux_rules(layout, config):
    """The rules between a layout of a transformer or a ControlNet and ours."""
    if layout == "fluxlite":  # the modulation last, in the pieces that the other layouts have it in
        pieces = [piece for rule in flux_rules("bfl", config) for piece in rule.ours]
        pieces.sort(key=lambda piece: (piece.stop is not None, piece.name if piece.stop is not None else "", piece.start))
        return [Rule([piece], [piece], SAME) for piece in pieces]
    found = []
    for (theirs, ours, transform), i in _spelled(layout, config):
        for leaf in ("weight", "bias") if theirs[0].endswith(".*") else [""]:
            their_pieces = [Piece(name.format(i=i).replace("*", leaf)) for name in theirs]
            our_pieces = [_piece(name.replace("*", leaf), i, config) for name in ours]
            optional = tuple(piece.name for piece in their_pieces[1:]) if transform is TWICE else ()
            found.append(Rule(their_pieces, our_pieces, transform, optional))
    return found


AUTOENCODER_NAMES = (  # diffusers' and our names → those of `ae.safetensors`, besides the order of the decoder's levels
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


def autoencoder_rules(layout, config):
    """The rules between a layout of the autoencoder and ours, whose names are diffusers'."""
    levels, rules = len(config.block_out_channels), []
    with torch.device("meta"):
        names = list(Autoencoder(config).state_dict())
    for name in names:
        theirs, transform = name, SAME
        if layout == "bfl":
            theirs = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
            for ours, bfl in AUTOENCODER_NAMES:
                theirs = theirs.replace(ours, bfl)
            transform = CONV_1X1 if "attentions.0.to_" in name and name.endswith("weight") else SAME
        rules.append(Rule([Piece(theirs)], [Piece(name)], transform))
    return rules


def rules(layout, config):
    """The rules between `layout` and ours for the model that `config`, of one of `MODELS`, describes."""
    return (autoencoder_rules if isinstance(config, AutoencoderConfig) else flux_rules)(layout, config)


def our_shapes(config):
    """{name: meta tensor} of a model in our layout."""
    return on_meta(config).state_dict()


def on_meta(config, *options):
    """The model that `config` describes, without memory for its weights."""
    with torch.device("meta"):
        return MODELS[type(config)](config, *options)


def shapes(layout, config):
    """{name: shape} of a whole checkpoint in `layout`, in the order that `convert` yields tensors."""
    ours, found = our_shapes(config), {}
    for rule in rules(layout, config):
        parts = rule.transform.backward([ours[p.name][p.start : p.stop] for p in rule.ours], config)
        for piece, part in zip(rule.theirs, parts):
            found[piece.name] = tuple(ours[piece.name].shape) if piece.stop is not None else tuple(part.shape)
    return found


# --- recognising ----------------------------------------------------------------------------------------------------------------


def their_name(layout, linear):
    """The name in `layout` of the weight of one of our linears."""
    rows = (*TABLES[layout], *CONTROL[layout]) if layout in TABLES else ()
    return next((r[0][0] for r in rows if r[1][0].startswith(linear)), f"{linear}.*").replace("*", "weight")


def recognise(keys):
    """(what, layout, prefix) of a checkpoint from its keys: what is "transformer", "controlnet" or "autoencoder".

    Raises `ValueError` for keys that are none's, or several layouts'.
    """
    keys, everywhere = set(keys), "time_in.linear_in"  # which each layout names in its own way
    found = [(layout, prefix) for layout in LAYOUTS for prefix in PREFIXES if prefix + their_name(layout, everywhere) in keys]
    if "decoder.conv_in.weight" in keys:
        if found:
            raise ValueError("there are a transformer and an autoencoder here: name the file of one")
        return "autoencoder", "bfl" if "decoder.mid.block_1.norm1.weight" in keys else "diffusers", ""
    if len(found) > 1:
        raise ValueError(f"the keys mix layouts: {' and '.join(layout for layout, _ in found)}")
    if not found:
        shown = ", ".join(sorted(keys)[:3]) or "none"
        raise ValueError(f"neither a FLUX transformer, a ControlNet nor an autoencoder: {len(keys)} keys such as {shown}")
    layout, prefix = found[0]
    return "controlnet" if prefix + their_name(layout, "hint_in") in keys else "transformer", layout, prefix


def depth(keys, pattern):
    """How many blocks there are: one more than the largest number in the keys that start with `pattern`."""
    numbers = [int(match[1]) for key in keys if (match := re.match(re.escape(pattern).replace(r"\{i\}", r"(\d+)") + r"\.", key))]
    if max(numbers, default=-1) >= len(keys):
        raise ValueError(f"a block has the number {max(numbers)} among {len(keys)} keys: it is damaged")
    return 1 + max(numbers, default=-1)


def infer_config(layout, found):
    """The `FluxConfig` or `ControlNetConfig` of {name: shape} of such a net, in `layout` and without its prefix.

    RoPE axes cannot be seen in the weights: they are FLUX's share of the head width, D/8, 7D/16, 7D/16.
    """
    if layout == "fluxlite":
        at = {name: name for name in found}
        blocks = ["double_blocks.{i}", "single_blocks.{i}"]
    else:
        rows = [*TABLES[layout], *CONTROL[layout]]
        table = [(r[0][0].replace("*", leaf), r[1][0].replace("*", leaf)) for r in rows for leaf in ("weight", "bias")]
        at = {ours.format(i=0): theirs.format(i=0) for theirs, ours in table}
        blocks = [next(t for t, o in table if o.startswith(kind)).split(".{i}")[0] + ".{i}" for kind in ("double_b", "single_b")]
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
            shape("single_blocks.0.qkv.linear.weight")[0] - 3 * hidden
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
        raise ValueError(f"{name} has the shape {list(shape)} where {rank} dimensions belong: it is damaged, or flattened by a trainer")
    return shape


def infer_autoencoder_config(layout, found, values=None):
    """The `AutoencoderConfig` of an autoencoder's {name: shape}; `values`, a vae/config.json, adds what shapes do not show."""
    levels = depth(found, "encoder.down.{i}" if layout == "bfl" else "encoder.down_blocks.{i}")
    level, resnet = ("encoder.down.{i}", "block.{i}") if layout == "bfl" else ("encoder.down_blocks.{i}", "resnets.{i}")

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
        raise ValueError("an autoencoder of other widths than FLUX's needs its config.json beside it, with norm_num_groups")
    return inferred


def check(layout, config, found):
    """Raise `ValueError`, with a list, unless {name: shape} is exactly a checkpoint of `config` in `layout`."""
    expected = shapes(layout, config)
    optional = {name for rule in rules(layout, config) for name in rule.optional}
    faults = {
        "missing": sorted(expected.keys() - found.keys() - optional),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{k} {list(found[k])}, not {list(expected[k])}" for k in expected if k in found and tuple(found[k]) != expected[k]
        ],
    }
    if any(faults.values()):
        listed = [f"{f}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for f, names in faults.items() if names]
        counts = ", ".join(f"{len(names)} {fault}" for fault, names in faults.items() if names)
        raise ValueError(f"{counts} among the keys of this {layout} checkpoint; " + "; ".join(listed))


# --- carrying over --------------------------------------------------------------------------------------------------------------


def convert(read, source, target, config):
    """Yield (piece of `target`'s layout, tensor) for a whole model; `read(name, start, stop)` reads rows of one of `source`'s.

    Pieces of one tensor come one after the other, their rows in order. Every tensor of the source is read about once and no more
    than a few linears are held; tensors whose bytes do not change are views of the source's.
    """
    made, makers = {}, {piece: rule for rule in rules(source, config) for piece in rule.ours}

    def ours(piece):
        if piece not in made:
            rule = makers[piece]
            pieces = rule.theirs[: len(rule.theirs) - len(rule.optional)]
            tensors = apply_transform(rule.transform, "forward", [read(*piece) for piece in pieces], config)
            made.update(zip(rule.ours, tensors))
        return made.pop(piece)

    for rule in rules(target, config):
        tensors = [ours(piece) for piece in rule.ours]
        yield from zip(rule.theirs, apply_transform(rule.transform, "backward", tensors, config))


def apply_transform(transform, direction, tensors, config):
    """A `Transform` of tensors, those that it joins in the widest of their types."""
    if transform is not SAME and len(tensors) > 1:
        common = reduce(wider, [t.dtype for t in tensors])
        tensors = [t.to(common) for t in tensors]
    return getattr(transform, direction)(tensors, config)


def dtypes(source, target, config, theirs):
    """{name: type} in `target` for a checkpoint in `source` whose types are {name: dtype}: each tensor's is that of its sources.

    Where they differ, the wider one.
    """
    makers, found = {piece: rule for rule in rules(source, config) for piece in rule.ours}, {}
    for rule in rules(target, config):
        of = [theirs[p.name] for piece in rule.ours for p in makers[piece].theirs if p.name in theirs]
        for piece in rule.theirs:
            found[piece.name] = reduce(wider, of, found.get(piece.name, of[0]))
    return found


def to_fluxlite(state, config, layout):
    """A state dict of ours from one in `layout`, checked first; only what changes is copied."""
    check(layout, config, {name: tuple(state[name].shape) for name in state.keys()})
    return assemble(convert(reader(state), layout, "fluxlite", config), our_shapes(config))


def from_fluxlite(state, config, layout):
    """A state dict in `layout` from one of ours, checked first."""
    check("fluxlite", config, {name: tuple(state[name].shape) for name in state.keys()})
    return {piece.name: tensor for piece, tensor in convert(reader(state), "fluxlite", layout, config)}


def reader(state):
    """The `read` of `convert` for a state dict in memory."""
    return lambda name, start=0, stop=None: state[name][start:stop]


def assemble(pieces, shapes_like):
    """Whole tensors from `convert`'s pieces: {name: tensor}."""
    state = {}
    for piece, tensor in pieces:
        if piece.stop is None:
            state[piece.name] = tensor
        else:
            if piece.name not in state:
                state[piece.name] = torch.empty(shapes_like[piece.name].shape, dtype=tensor.dtype)
            widest = wider(state[piece.name].dtype, tensor.dtype)
            state[piece.name] = state[piece.name].to(widest)  # no copy where all are of one type
            state[piece.name][piece.start : piece.stop] = tensor
    return state


# --- configurations as diffusers writes them ------------------------------------------------------------------------------------


def config_from_diffusers(values):
    """`FluxConfig` of a diffusers `transformer/config.json`."""
    return FluxConfig(**_shape_from_diffusers(values), out_channels=values.get("out_channels") or values["in_channels"])


def controlnet_config_from_diffusers(values):
    """`ControlNetConfig` of the `config.json` of a FluxControlNetModel."""
    hint = "pixel" if values.get("conditioning_embedding_channels") else "latent"
    return ControlNetConfig(**_shape_from_diffusers(values), hint=hint, num_modes=values.get("num_mode") or 0)


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
        raise ValueError("diffusers fixes model.rope_theta=10000 and model.mlp_ratio=4: this model has no config.json there")
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
        own = {"num_mode": config.num_modes or None, "conditioning_embedding_channels": config.in_channels // 4 if pixel else None}
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
