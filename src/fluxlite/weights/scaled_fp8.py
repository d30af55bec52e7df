"""fp8 weights that have a scale each, as ComfyUI, BFL and diffusers publish them.

    img_in.weight        float8_e4m3fn
    img_in.weight_scale  float32, one value or one a row; older files: .scale_weight
    img_in.input_scale   of activations, which are not quantised here; older files: .scale_input
    img_in.comfy_quant   JSON as bytes, {"format": "float8_e4m3fn"}; or so in the file's metadata
    scaled_fp8           a tensor that marks older files

A weight is read as its product with its scale: computed in float32, rounded once to bfloat16.
"""

import torch

from fluxlite.cli.descriptions import DAMAGED, parse_json
from fluxlite.cli.options import shortened
from fluxlite.weights.dtypes import DTYPES

SCALES = ".weight_scale", ".scale_weight"
NOTES = ".input_scale", ".scale_input", ".comfy_quant"
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
FORMATS = "float8_e4m3fn", "float8_e5m2"
FP8_TYPES = "F8_E4M3", "F8_E5M2"


def attach_scales(tensors):
    """`Tensors` whose fp8 weights are read times their scales, and whose keys are weights alone.

    Without scales they stay as they are. Raises `ValueError`, naming the key, where a scale is
    missing, belongs to nothing or is of another kind.
    """
    keys = tensors.keys()
    found = {key: weight_of(key, SCALES) for key in keys if weight_of(key, SCALES)}
    noted = {key: weight_of(key, NOTES) for key in keys if weight_of(key, NOTES)}
    marks = [key for key in keys if key.split(".")[-1] == MARKER]
    if not (found or noted or marks):
        return tensors
    check_formats(tensors, [key for key in noted if key.endswith(".comfy_quant")])
    for key, weight in found.items():
        check_scale(tensors, key, weight)
    scales = {weight: key for key, weight in found.items()}
    check_pairs(tensors, found, noted, scales)
    replaced = {weight: scaled_weight(tensors, weight, key) for weight, key in scales.items()}
    tensors.set_aside([*found, *noted, *marks], replaced)
    return tensors


def weight_of(key, endings):
    """The name of the weight that a key with one of some endings belongs to; else None."""
    ending = next((ending for ending in endings if key.endswith(ending)), None)
    return ending and f"{key.removesuffix(ending)}.weight"


def check_pairs(tensors, found, noted, scales):
    """Raise `ValueError` unless each fp8 matrix has one scale, and each note a scaled weight."""
    twice = next((key for key, weight in found.items() if scales[weight] != key), None)
    if twice:
        raise ValueError(f"{found[twice]} has two scales, {twice} is one of them: {DAMAGED}")
    extra = next((key for key, weight in noted.items() if weight not in scales), None)
    if extra:
        raise ValueError(f"{extra} belongs to no weight with a scale: {DAMAGED}")
    for key in tensors.keys():
        spelled, shape = tensors.header(key)
        if spelled in FP8_TYPES and len(shape) == 2 and key not in scales:
            raise ValueError(
                f"{key} is in fp8 and has no scale, as others of this file do: {DAMAGED}"
            )


def check_scale(tensors, key, weight):
    """Raise `ValueError` unless a scale has an fp8 matrix, and one value or one for each row."""
    rows = tensors.shape(weight)
    kind = tensors.header(weight)[0] if rows else None
    if kind not in (None, *FP8_TYPES, *DTYPES):
        raise ValueError(
            f"{weight} is of type {kind} with a scale, which is not supported yet: fetch a version "
            "in bfloat16, fp8 or nf4"
        )
    if not rows or len(rows) != 2 or kind not in FP8_TYPES:
        raise ValueError(f"{key} scales nothing: the file has no {weight} in fp8: {DAMAGED}")
    spelled, shape = tensors.header(key)
    if shape not in ((), (1,), (1, 1), rows[:1], (rows[0], 1)):
        raise ValueError(
            f"{key} has the shape {list(shape)}, and {weight} {list(rows)}: scales of blocks are "
            "not supported yet, fetch a version in bfloat16"
        )
    if spelled not in ("F32", "F16", "BF16"):
        raise ValueError(f"{key} is of type {spelled}, which no scale has: {DAMAGED}")


def check_formats(tensors, notes):
    """Raise `ValueError` where a layer says that it is in another format than scaled fp8."""
    said = tensors.metadata.get(METADATA)
    layers = parse_json(said, METADATA).get("layers") if said else {}
    if not isinstance(layers, dict):
        raise ValueError(f"{METADATA} lists no layers: {DAMAGED}")
    layers = layers | {key: tensors.read_note(key) for key in notes}
    for name, layer in layers.items():
        kind = layer.get("format") if isinstance(layer, dict) else None
        if kind not in FORMATS:
            raise ValueError(
                f"{name} is in the format {shortened(kind)}, which is not supported yet: fetch a "
                "version in bfloat16 or fp8"
            )


def scaled_weight(tensors, weight, scale):
    """(type, shape, read) of a weight in fp8, whose scale is the tensor of that name."""
    read_weight, read_scale = (tensors.entries[name].read for name in (weight, scale))

    def read(start=0, stop=None, exact=False):
        factors = read_scale().float().reshape(-1, 1)
        factors = factors if len(factors) == 1 else factors[start:stop]
        product = read_weight(start, stop).float() * factors
        return product if exact else product.to(torch.bfloat16)

    return "BF16", tensors.shape(weight), read
