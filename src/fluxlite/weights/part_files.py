"""One part's tensors in a file of whatever kind: an all-in-one file's, or quantised ones.

All-in-one files, as ComfyUI saves them, hold a pipeline's parts, told apart by what their keys
begin with.
"""

from fluxlite.cli.messages import warn_for_all
from fluxlite.weights import foreign, nf4_files, scaled_fp8

PREFIXES = {  # of a part, named as its folder in a pipeline; ComfyUI's for FLUX first
    "transformer": ("model.diffusion_model.",),
    "text_encoder_2": ("text_encoders.t5xxl.transformer.", "cond_stage_model.t5xxl.transformer."),
    "text_encoder": ("text_encoders.clip_l.transformer.", "cond_stage_model.clip_l.transformer."),
    "vae": ("vae.", "first_stage_model."),
}
# no file of a transformer alone has these
SIGNS = "text_encoders.", "cond_stage_model.", "conditioner.", "vae.", "first_stage_model."


def list_parts(keys):
    """{part: what its keys begin with} of an all-in-one file's keys; empty for any other's.

    What stands there without a beginning of that kind is the transformer.
    """
    others = [key for key in keys if not key.startswith(SIGNS)]
    if len(others) == len(keys):
        return {}
    found = {"transformer": ""} if others else {}
    for part, prefixes in PREFIXES.items():
        there = [p for p in prefixes if any(key.startswith(p) for key in keys)]
        found |= {part: there[0]} if there else {}
    return found


def keys_of_part(keys, prefix):
    """An all-in-one file's keys that begin with a part's prefix, or those of no part without
    one.
    """
    return [key for key in keys if key.startswith(prefix) and (prefix or not key.startswith(SIGNS))]


def own_weights(tensors, part, expected=None):
    """`Tensors` of a part, named as its folder in a pipeline is: of an all-in-one file its own, and
    without their prefix; read dequantised.

    Raises `ValueError`, saying what the file is, where it is none of this project's, nor what is
    `expected`.
    """
    keys = tensors.keys()
    parts = list_parts(keys)
    if parts and part in PREFIXES and part not in parts:
        raise ValueError(
            f"it is an all-in-one checkpoint without {part}, of {', '.join(parts)}: name a file "
            "that holds one"
        )
    if part in parts:
        prefix = parts[part]
        own = keys_of_part(keys, prefix)
        if part == "transformer" and (left := set(keys_of_part(keys, "")) - {*own}):
            count, first = len(left), min(left)
            text = "%s: %d keys of no part are left out, %s first"
            warn_for_all(text, tensors.files[0], count, first)
        tensors.rename({key: key.removeprefix(prefix) for key in own})
    nf4_files.attach_nf4(tensors)
    foreign.check_keys(tensors.keys(), expected)
    return scaled_fp8.attach_scales(tensors)
