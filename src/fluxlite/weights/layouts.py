"""Names and layouts of checkpoints: a table for each foreign layout, read forwards or backwards.

A row of a table is (their names, our names, transform). `{i}` counts blocks, and `.*` stands for
`.weight` and `.bias`. `spell_rules` spells a table out for a model, and `recognise_layout` tells by
its keys which table a checkpoint follows. `conversion` carries tensors over.

Ours holds what diffusers' holds under other names, and the single block's last linear in two. So a
checkpoint of diffusers' is mapped and nothing of it is copied; of BFL's the last modulation alone.

H hidden width, N heads, D head width. The layouts: `fluxlite` (ours), `diffusers`, `bfl`
(flux1-dev.safetensors, ComfyUI; of a ControlNet x-flux's), `nemo`.
"""

import itertools
import re
from collections import namedtuple

import torch
from einops import rearrange

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


def keep_tensors(tensors, config):
    """The tensors as they are."""
    return list(tensors)


def join_rows(tensors, config):
    """Linears as one, the rows of the first on top."""
    return [torch.cat(tensors)]


SAME = Transform(keep_tensors, keep_tensors)
STACKED = Transform(lambda t, c: list(t[0].chunk(3)), join_rows)  # q, k, v
ROWS = Transform(split_rows, join_rows)
COLUMNS = Transform(split_columns, lambda t, c: [torch.cat(t, dim=1)])
HEADS = Transform(split_heads, join_heads)
SWAPPED = Transform(swap_halves, swap_halves)
# NeMo writes the bias of the single block's output twice, and its forward uses the first alone
TWICE = Transform(lambda t, c: [t[0]], lambda t, c: [t[0], t[0]])
# a 1x1 convolution ↔ a linear
CONV_1X1 = Transform(lambda t, c: [t[0].flatten(1)], lambda t, c: [t[0][:, :, None, None]])


# --- tables ---------------------------------------------------------------------------------------


def linear_rows(pairs):
    """Rows of linears that are alike but for their names: {theirs: ours}."""
    return [([f"{theirs}.*"], [f"{ours}.*"], SAME) for theirs, ours in pairs.items()]


def embedder_rows(theirs, ours):
    """Rows of an embedder's two linears; `theirs` are two names, or what comes before BFL's."""
    if isinstance(theirs, str):
        theirs = f"{theirs}.in_layer", f"{theirs}.out_layer"
    return linear_rows({theirs[0]: f"{ours}.linear_in", theirs[1]: f"{ours}.linear_out"})


def qkv_rows(ours, theirs, norms, transform=SAME):
    """Rows of queries, keys, values and the norms of the first two; `theirs` and `norms` are
    names.
    """
    linears = [f"{name}.*" for name in theirs], [f"{ours}.qkv.{x}.*" for x in "qkv"], transform
    return [
        linears,
        *(([norm], [f"{ours}.qkv.{x}_norm.weight"], SAME) for norm, x in zip(norms, "qk")),
    ]


def stream_rows(ours, *, heads, proj, mlp):
    """Rows for one stream of a double block; `mlp` are two names, `heads` the arguments of
    `qkv_rows`.
    """
    linears = {proj: "proj", mlp[0]: "mlp.linear_in", mlp[1]: "mlp.linear_out"}
    return [
        *qkv_rows(ours, *heads),
        *linear_rows({theirs: f"{ours}.{name}" for theirs, name in linears.items()}),
    ]


OUR_D, OUR_S = "double_blocks.{i}", "single_blocks.{i}"
LAST = [f"{OUR_S}.proj.weight", f"{OUR_S}.mlp.linear_out.weight"]

D, S = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
EMBED = "time_text_embed.{}_embedder.linear_{}".format
DIFFUSERS = [
    *linear_rows({"x_embedder": "img_in", "context_embedder": "txt_in"}),
    *embedder_rows([EMBED("timestep", 1), EMBED("timestep", 2)], "time_in"),
    *embedder_rows([EMBED("guidance", 1), EMBED("guidance", 2)], "guidance_in"),
    *embedder_rows([EMBED("text", 1), EMBED("text", 2)], "pooled_in"),
    *stream_rows(
        f"{OUR_D}.img",
        heads=(
            [f"{D}.attn.to_{x}" for x in "qkv"],
            [f"{D}.attn.norm_{x}.weight" for x in "qk"],
        ),
        proj=f"{D}.attn.to_out.0",
        mlp=[f"{D}.ff.net.0.proj", f"{D}.ff.net.2"],
    ),
    *stream_rows(
        f"{OUR_D}.txt",
        heads=(
            [f"{D}.attn.add_{x}_proj" for x in "qkv"],
            [f"{D}.attn.norm_added_{x}.weight" for x in "qk"],
        ),
        proj=f"{D}.attn.to_add_out",
        mlp=[f"{D}.ff_context.net.0.proj", f"{D}.ff_context.net.2"],
    ),
    *qkv_rows(
        OUR_S, [f"{S}.attn.to_{x}" for x in "qkv"], [f"{S}.attn.norm_{x}.weight" for x in "qk"]
    ),
    *linear_rows({f"{S}.proj_mlp": f"{OUR_S}.mlp.linear_in"}),
    ([f"{S}.proj_out.weight"], LAST, COLUMNS),
    ([f"{S}.proj_out.bias"], [f"{OUR_S}.mlp.linear_out.bias"], SAME),
    *linear_rows({f"{D}.norm1.linear": "modulation.img.{i}"}),
    *linear_rows({f"{D}.norm1_context.linear": "modulation.txt.{i}"}),
    *linear_rows({f"{S}.norm.linear": "modulation.single.{i}"}),
    *linear_rows({"norm_out.linear": "modulation.out", "proj_out": "out"}),
]

D, S = "double_blocks.{i}", "single_blocks.{i}"


def bfl_stream_rows(s):
    """Rows for the stream `s`, img or txt, of BFL's double blocks, and its modulation."""
    norms = [f"{D}.{s}_attn.norm.{x}_norm.scale" for x in ("query", "key")]
    return [
        *stream_rows(
            f"{OUR_D}.{s}",
            heads=([f"{D}.{s}_attn.qkv"], norms, STACKED),
            proj=f"{D}.{s}_attn.proj",
            mlp=[f"{D}.{s}_mlp.0", f"{D}.{s}_mlp.2"],
        ),
        *linear_rows({f"{D}.{s}_mod.lin": f"modulation.{s}.{{i}}"}),
    ]


BFL = [
    *linear_rows({"img_in": "img_in", "txt_in": "txt_in"}),
    *embedder_rows("time_in", "time_in"),
    *embedder_rows("guidance_in", "guidance_in"),
    *embedder_rows("vector_in", "pooled_in"),
    *bfl_stream_rows("img"),
    *bfl_stream_rows("txt"),
    (
        [f"{S}.linear1.*"],
        [*(f"{OUR_S}.qkv.{x}.*" for x in "qkv"), f"{OUR_S}.mlp.linear_in.*"],
        ROWS,
    ),
    ([f"{S}.norm.query_norm.scale"], [f"{OUR_S}.qkv.q_norm.weight"], SAME),
    ([f"{S}.norm.key_norm.scale"], [f"{OUR_S}.qkv.k_norm.weight"], SAME),
    ([f"{S}.linear2.weight"], LAST, COLUMNS),
    ([f"{S}.linear2.bias"], [f"{OUR_S}.mlp.linear_out.bias"], SAME),
    *linear_rows({f"{S}.modulation.lin": "modulation.single.{i}", "final_layer.linear": "out"}),
    (["final_layer.adaLN_modulation.1.*"], ["modulation.out.*"], SWAPPED),
]


def nemo_stream_rows(s, added, mlp):
    """Rows for the stream `s` of NeMo's double blocks."""
    attention = f"{D}.self_attention.{added}"
    norms = [f"{attention}{x}_layernorm.weight" for x in "qk"]
    return stream_rows(
        f"{OUR_D}.{s}",
        heads=([f"{attention}linear_qkv"], norms, HEADS),
        proj=f"{attention}linear_proj",
        mlp=[f"{D}.{mlp}.linear_fc1", f"{D}.{mlp}.linear_fc2"],
    )


A, M = f"{S}.self_attention", f"{S}.mlp"
NEMO = [
    *linear_rows({"img_embed": "img_in", "txt_embed": "txt_in"}),
    *embedder_rows("timestep_embedding.time_embedder", "time_in"),
    *embedder_rows("guidance_embedding", "guidance_in"),
    *embedder_rows("vector_embedding", "pooled_in"),
    *nemo_stream_rows("img", "", "mlp"),
    *nemo_stream_rows("txt", "added_", "context_mlp"),
    *qkv_rows(OUR_S, [f"{A}.linear_qkv"], [f"{A}.{x}_layernorm.weight" for x in "qk"], HEADS),
    *linear_rows({f"{M}.linear_fc1": f"{OUR_S}.mlp.linear_in"}),
    ([f"{A}.linear_proj.weight"], LAST[:1], SAME),
    ([f"{M}.linear_fc2.weight"], LAST[1:], SAME),
    ([f"{M}.linear_fc2.bias", f"{A}.linear_proj.bias"], [f"{OUR_S}.mlp.linear_out.bias"], TWICE),
    *linear_rows({f"{D}.adaln.adaLN_modulation.1": "modulation.img.{i}"}),
    *linear_rows({f"{D}.adaln_context.adaLN_modulation.1": "modulation.txt.{i}"}),
    *linear_rows({f"{S}.adaln.adaLN_modulation.1": "modulation.single.{i}"}),
    *linear_rows({"norm_out.adaLN_modulation.1": "modulation.out", "proj_out": "out"}),
]

TABLES = {"diffusers": DIFFUSERS, "bfl": BFL, "nemo": NEMO}


def control_rows(hint, double, *convs):
    """Rows for what a ControlNet has beside its blocks; `convs` are the names of its eight
    convolutions.
    """
    return [
        *linear_rows(
            {
                hint: "hint_in",
                f"controlnet_{double}.{{i}}": "double_out.{i}",
                "controlnet_single_blocks.{i}": "single_out.{i}",
            }
        ),
        (["controlnet_mode_embedder.weight"], ["mode_in.weight"], SAME),
        *linear_rows(
            {f"input_hint_block.{name}": f"hint_convs.{k}" for k, name in enumerate(convs)}
        ),
    ]


CONVS = "conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out"
CONTROL_TABLES = {
    "diffusers": control_rows("controlnet_x_embedder", "blocks", *CONVS),
    # between x-flux's convolutions stand activations
    "bfl": control_rows("pos_embed_input", "blocks", *range(0, 16, 2)),
    "nemo": control_rows("controlnet_x_embedder", "double_blocks", *CONVS),
}
LAYOUTS = ("fluxlite", *TABLES)
FIRST_EDITION = (
    "fluxlite 0.1, whose weights lie in another order: "
    "python scripts/convert_first_edition.py --src OLD --dst NEW.safetensors converts them "
    "(what save_converted kept may be removed instead)"
)
ARTICLED = {
    "transformer": "a transformer",
    "controlnet": "a ControlNet",
    "autoencoder": "an autoencoder",
}
PART_KEYS = {  # that name them
    "transformer": "model.checkpoint",
    "controlnet": "controlnet.checkpoint",
    "autoencoder": "model.autoencoder",
}


# --- tables spelled out for a model ---------------------------------------------------------------


def stage_of(row):
    """Where a row's tensors stand: 0 embedders, 1 double blocks, 2 single blocks, 3 the end."""
    ours = row[1][0].removeprefix("modulation.")
    prefixes = {"double": 1, "img.": 1, "txt.": 1, "single": 2, "out.": 3}
    return next((stage for prefix, stage in prefixes.items() if ours.startswith(prefix)), 0)


def spell_rows(layout, config, tables=TABLES):
    """Yield (row, block number) of all rows that a model of this shape has, block after block."""
    depths = (1, config.num_double_blocks, config.num_single_blocks, 1)
    rows, absent = tables[layout], [] if config.guidance_embed else ["guidance_in"]
    if config.part == "controlnet":
        rows = [*rows, *CONTROL_TABLES[layout]]
        absent += ["out.", "modulation.out"]
        absent += ["hint_convs"] * (config.hint != "pixel") + ["mode_in"] * (not config.num_modes)
    kept = [row for row in rows if not row[1][0].startswith(tuple(absent))]
    for stage, depth in enumerate(depths):
        of_stage = [row for row in kept if stage_of(row) == stage]
        for i in range(depth):
            yield from ((row, i) for row in of_stage)


def flux_rules(layout, config, tables=TABLES):
    """The rules between a foreign layout of a transformer or a ControlNet and ours."""
    found = []
    for (theirs, ours, transform), i in spell_rows(layout, config, tables):
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


def autoencoder_rules(config, names):
    """The rules between BFL's layout of the autoencoder and ours, whose `names` are diffusers'."""
    levels, found = len(config.block_out_channels), []
    for name in names:
        level = re.search(r"up_blocks\.(\d+)", name)  # BFL counts them from the other end
        theirs = (
            name.replace(level[0], f"up_blocks.{levels - 1 - int(level[1])}") if level else name
        )
        for ours, bfl in AUTOENCODER_NAMES:
            theirs = theirs.replace(ours, bfl)
        square = "attentions.0.to_" in name and name.endswith("weight")
        found.append(Rule([theirs], [name], CONV_1X1 if square else SAME))
    return found


def spell_rules(layout, config, names):
    """The rules between `layout` and ours for a model of shape `config`; `names` are ours."""
    autoencoder = config.part == "autoencoder"
    if layout == "fluxlite" or (autoencoder and layout == "diffusers"):
        return [Rule([name], [name], SAME) for name in names]
    return autoencoder_rules(config, names) if autoencoder else flux_rules(layout, config)


# --- recognising ----------------------------------------------------------------------------------


def their_name(layout, linear):
    """The name in `layout` of the weight of one of our linears."""
    if layout not in TABLES:
        return f"{linear}.weight"
    rows = (*TABLES[layout], *CONTROL_TABLES[layout])
    return next(r[0][0] for r in rows if r[1][0].startswith(linear)).replace("*", "weight")


def first_names(layout):
    """{our tensor: theirs} outside the blocks and in the first ones; empty where they are the same.

    Of rows that make several tensors of ours, the first's.
    """
    found = {}
    for theirs, ours, _ in (*TABLES[layout], *CONTROL_TABLES[layout]) if layout in TABLES else ():
        for leaf in ("weight", "bias"):
            found |= zip(spell_names(ours[:1], 0, leaf), spell_names(theirs[:1], 0, leaf))
    return found


def recognise_layout(keys):
    """(part, layout, prefix) of a checkpoint from its keys: transformer, controlnet or autoencoder.

    The prefix is whatever a program puts before all of them, as ComfyUI `model.diffusion_model.`
    and torch.compile `_orig_mod.`. Raises `ValueError` for keys that are none's, or several
    layouts'.
    """
    keys, everywhere = set(keys), "time_in.linear_in"  # which each layout names in its own way
    names = [(of, their_name(of, everywhere)) for of in LAYOUTS]
    pairs = [(of, name, key) for (of, name), key in itertools.product(names, keys)]
    found = [(of, k.removesuffix(name)) for of, name, k in pairs if f".{k}".endswith(f".{name}")]
    if "decoder.conv_in.weight" in keys:
        if found:
            raise ValueError(
                "there are a transformer and an autoencoder here: name the file of one"
            )
        bfl = "decoder.mid.block_1.norm1.weight" in keys
        return "autoencoder", "bfl" if bfl else "diffusers", ""
    if len(found) > 1:
        shown = " and ".join(layout + f" ({prefix})" * bool(prefix) for layout, prefix in found)
        raise ValueError(f"the keys mix layouts: {shown}")
    if not found:
        shown = ", ".join(sorted(keys)[:3]) or "none"
        raise ValueError(
            f"neither a FLUX transformer, a ControlNet nor an autoencoder: {len(keys)} keys such "
            f"as {shown}"
        )
    layout, prefix = found[0]
    if layout == "fluxlite" and "modulation.weight" in keys:
        raise ValueError(f"it was written by {FIRST_EDITION}")
    sees_hints = prefix + their_name(layout, "hint_in") in keys
    return "controlnet" if sees_hints else "transformer", layout, prefix


def count_blocks(keys, pattern):
    """How many blocks there are: one more than the largest {i} in keys that start with `pattern`.

    Raises `ValueError` where there cannot be as many.
    """
    named = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)") + r"\.")
    last = max((int(match[1]) for match in map(named.match, keys) if match), default=-1)
    if last >= len(keys):
        raise ValueError(f"block {last} among {len(keys)} keys: the file is damaged")
    return 1 + last
