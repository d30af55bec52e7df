"""Names in LoRA files: each key tells by itself which weight it changes, and how.

A key is a prefix, which tells the part of the pipeline; the name of a module as some layout has it,
dotted or with underscores; and a suffix, which tells what the tensor is. `read_key` takes it apart
by tables alone. Names are those of `layouts`, and of two dialects with names of their own: XLabs'
x-flux, and diffusers with its projections fused.

Sources: diffusers, kohya's sd-scripts, ai-toolkit, x-flux, BFL's flux, ComfyUI, OneTrainer,
LyCORIS, SimpleTuner and peft.
"""

import re
from collections import namedtuple

from fluxlite.weights.layouts import (
    COLUMNS,
    DIFFUSERS,
    LAST,
    OUR_D,
    OUR_S,
    SAME,
    STACKED,
    TABLES,
    Rule,
    flux_rules,
)

# layout: whose names these are; part: transformer, clip or t5; rules: {"weight" or "bias": Rule}
Module = namedtuple("Module", "name layout part rules")
# what a tensor is: role, of a module's `leaf`, weight or bias
KeyMeaning = namedtuple("KeyMeaning", "module role leaf dialect")

# --- what a tensor is -----------------------------------------------------------------------------

# of a low-rank product up · down, as each program calls its factors
SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.default.bias": "up_bias",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down",  # x-flux's, after its own names
    ".up.weight": "up",
    ".alpha": "alpha",
    # DoRA, by shape per output or per input
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    ".diff": "diff",
    ".diff_b": "bias diff",
    ".w_norm": "diff",
    ".b_norm": "bias diff",
    ".set_weight": "set",
    ".reshape_weight": "shape",  # ComfyUI's: what the base is widened to
    "": "whole",  # BFL's scales of norms, PEFT's modules_to_save: in place of the base's
}
REFUSED_SUFFIXES = {  # what is known and not applied: what it is
    r"\.oft_(blocks|diag|R)|\.oft_R\.weight|\.boft_": "OFT",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.hada_t[12]$|\.lokr_t[12]$|\.lora_mid\.weight$": "an adapter of convolutions",
    r"^bundle_emb\.|^(clip_l|t5xxl|emb_params)$": "a textual inversion (an embedding)",
    r"\.lora_embedding_[AB]": "a LoRA of an embedding table",
    r"text_projection": "CLIP's text projection, which FLUX does not use",
}

# --- which weight it changes ----------------------------------------------------------------------

# prefix: (part, whether names have underscores for dots, whose it is)
PREFIXES = {
    "lora_unet_": ("transformer", True, "kohya"),
    "lycoris_": ("transformer", True, "LyCORIS"),
    "lora_transformer_": ("transformer", True, "OneTrainer"),
    "base_model.model.transformer.": ("transformer", False, "PEFT"),
    "base_model.model.": ("transformer", False, "fal or PEFT"),
    "transformer.": ("transformer", False, "diffusers"),
    "model.diffusion_model.": ("transformer", False, "ComfyUI"),
    "diffusion_model.": ("transformer", False, "ComfyUI or ai-toolkit"),
    "unet.": ("transformer", False, "diffusers"),
    "": ("transformer", False, "bare names"),
    "lora_te1_": ("clip", True, "kohya"),
    "lora_te_": ("clip", True, "kohya"),
    "lora_te2_": ("t5", True, "OneTrainer"),
    "lora_te3_": ("t5", True, "kohya"),
    "text_encoder.": ("clip", False, "diffusers"),
    "text_encoder_2.": ("t5", False, "diffusers"),
    "text_encoders.clip_l.transformer.": ("clip", False, "ComfyUI"),
    "text_encoders.clip_l.": ("clip", False, "ComfyUI"),
    "text_encoders.t5xxl.transformer.": ("t5", False, "ComfyUI"),
    "text_encoders.t5xxl.": ("t5", False, "ComfyUI"),
}

D, S = "double_blocks.{i}", "single_blocks.{i}"
XLABS_STREAMS = {"1": "img", "2": "txt"}


def stream_qkv(ours):
    """Our names of a stream's queries, keys and values."""
    return [f"{ours}.qkv.{x}.weight" for x in "qkv"]


XLABS = [
    *(
        ([f"{D}.processor.qkv_lora{n}.weight"], stream_qkv(f"{OUR_D}.{s}"), STACKED)
        for n, s in XLABS_STREAMS.items()
    ),
    *(
        ([f"{D}.processor.proj_lora{n}.weight"], [f"{OUR_D}.{s}.proj.weight"], SAME)
        for n, s in XLABS_STREAMS.items()
    ),
    # of linear1 its first rows alone
    ([f"{S}.processor.qkv_lora.weight"], stream_qkv(OUR_S), STACKED),
    ([f"{S}.processor.proj_lora.weight"], LAST, COLUMNS),
]
D, S = "transformer_blocks.{i}.attn", "single_transformer_blocks.{i}.attn"
FUSED_DIFFUSERS = [
    ([f"{D}.to_qkv.weight"], stream_qkv(f"{OUR_D}.img"), STACKED),
    ([f"{D}.to_added_qkv.weight"], stream_qkv(f"{OUR_D}.txt"), STACKED),
    ([f"{S}.to_qkv.weight"], stream_qkv(OUR_S), STACKED),
]
ADAPTER_TABLES = {
    "diffusers": DIFFUSERS,
    "bfl": TABLES["bfl"],
    "xlabs": XLABS,
    "fused": FUSED_DIFFUSERS,
}

MAX_LAYERS = 64  # of a text encoder: T5-XXL has 24
CLIP_NAMES = (
    *(f"encoder.layers.{{i}}.self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
    *(f"encoder.layers.{{i}}.{x}" for x in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")),
    "embeddings.token_embedding",
    "embeddings.position_embedding",
    "final_layer_norm",
)
T5_NAMES = (
    *(f"encoder.block.{{i}}.layer.0.SelfAttention.{x}" for x in "qkvo"),
    *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")),
    *(f"encoder.block.{{i}}.layer.{n}.layer_norm" for n in (0, 1)),
    "encoder.final_layer_norm",
    "shared",
)
ENCODER_NAMES = {"clip": CLIP_NAMES, "t5": T5_NAMES}
CLIP_PREFIX = "text_model."  # which some versions of transformers leave out


LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight"}  # the last is of BFL's norms


def split_leaf(name):
    """(module, weight or bias) of a tensor's name, (the name, None) of anything else."""
    module, _, leaf = name.rpartition(".")
    return (module, LEAVES[leaf]) if leaf in LEAVES else (name, None)


def adapter_rules(layout, config):
    """The rules of a layout of `ADAPTER_TABLES`, one for each tensor of theirs."""
    for rule in flux_rules(layout, config, ADAPTER_TABLES):
        if rule.transform is SAME:
            yield from (
                Rule([theirs], [ours], SAME) for theirs, ours in zip(rule.theirs, rule.ours)
            )
        else:
            yield rule


def transformer_modules(config):
    """{name: Module} of all that a transformer of this shape has, in every layout."""
    found = {}
    for layout in ADAPTER_TABLES:
        for rule in adapter_rules(layout, config):
            name, leaf = split_leaf(rule.theirs[0])
            found.setdefault(name, Module(name, layout, "transformer", {})).rules[leaf] = rule
    return found


def encoder_modules(part):
    """The same of a text encoder, whose names are transformers', CLIP's without `text_model.`."""
    found = {}
    for pattern in ENCODER_NAMES[part]:
        for i in range(MAX_LAYERS if "{i}" in pattern else 1):
            name = pattern.format(i=i)
            leaves = {leaf: f"{name}.{leaf}" for leaf in ("weight", "bias")}
            rules = {leaf: Rule([full], [full], SAME) for leaf, full in leaves.items()}
            found[name] = Module(name, part, part, rules)
            if part == "clip":
                found[CLIP_PREFIX + name] = found[name]
    return found


def module_names(config):
    """{(part, whether underscored): {name: Module}} for `read_key`."""
    of_parts = {"transformer": transformer_modules(config)}
    of_parts |= {part: encoder_modules(part) for part in ENCODER_NAMES}
    found = {}
    for part, modules in of_parts.items():
        found[part, False] = modules
        found[part, True] = {name.replace(".", "_"): module for name, module in modules.items()}
    return found


def read_key(key, names):
    """The `KeyMeaning` of a file's key, or None; `names` are those of `module_names`."""
    for prefix, (part, underscored, dialect) in PREFIXES.items():
        if not key.startswith(prefix):
            continue
        inside = key[len(prefix) :]
        for suffix, role in SUFFIXES.items():
            name = inside.removesuffix(suffix)
            if not inside.endswith(suffix):
                continue
            found = _meaning(name, role, names[part, underscored], dialect)
            if found:
                return found
    return None


def _meaning(name, role, modules, dialect):
    """The meaning of a role of the module or, as ComfyUI names scales, of the tensor `name`."""
    leaf = "bias" if role in ("up_bias", "bias diff") else "weight"
    if role == "whole" or (role in ("diff", "set") and name not in modules):
        name, leaf = split_leaf(name.replace(".modules_to_save", ""))
    module = modules.get(name)
    if module is None or leaf not in module.rules:
        return None
    return KeyMeaning(module, role, leaf, dialect)


# --- what matches nothing -------------------------------------------------------------------------

# A pattern of keys and whose they are; the first that matches counts.
OTHER_LORAS = (
    (r"single_stream_modulation|double_stream_modulation|to_qkv_mlp_proj|ff\.linear_in", "FLUX.2"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"lora_te2_text_model|lora_te_text_model_.*text_projection", "SDXL"),
    (r"(^|[._])(input_blocks|output_blocks|middle_block|mid_block|(down|up)_blocks)[._]", "SDXL"),
    (r"joint_blocks", "Stable Diffusion 3"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)", "a video model, as Wan"),
    (r"img_mod[._]1|txt_norm|transformer_blocks[._]\d+[._](img|txt)_mlp", "Qwen-Image"),
    (r"double_stream_blocks|individual_token_refiner|noise_refiner|cap_embedder", "another model"),
    (r"transformer_blocks[._]\d+[._]attn1[._]", "LTX or PixArt"),
)


def other_model(keys):
    """Whose LoRA it is that has such keys, or None."""
    for pattern, what in OTHER_LORAS:
        if any(re.search(pattern, key) for key in keys):
            return what
    return None


def refused_kind(key):
    """What an unknown key is, where it is known and not applied; or None."""
    return next((what for p, what in REFUSED_SUFFIXES.items() if re.search(p, key)), None)
