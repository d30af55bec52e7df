"""NF4 files of bitsandbytes, as diffusers and ComfyUI's forks publish them: read as they are.

    img_in.weight                                   uint8 (values / 2, 1), the even value above
    img_in.weight.absmax                            float32, a scale for each block of 64 values
    img_in.weight.quant_map                         float32 (16,), the levels
    img_in.weight.quant_state.bitsandbytes__nf4     JSON as bytes: shape, blocksize, dtype, …

Where scales are quantised themselves (nested), `absmax` are bytes: levels of `nested_quant_map`
times a `nested_absmax` for each 256, plus `nested_offset`. A value is level x scale in float32,
rounded once to the type that the file names: bitsandbytes' own bits (backends/default/ops.py,
0.50.1).
"""

from dataclasses import dataclass
from functools import partial

import torch

from fluxlite.cli.descriptions import DAMAGED
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import option, typed_description
from fluxlite.nets.quantized import NF4_BLOCK, NF4_LEVELS, dequantize_rows
from fluxlite.weights.dtypes import DTYPES

STATE = ".quant_state.bitsandbytes__nf4"
FIELDS = ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE
ZERO_PAIR = 0x77  # two codes of level 0
SPELLED_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass
class Nf4State:
    """What bitsandbytes says of a weight."""

    shape: tuple[int, ...] = option((), "rows and columns", at_least=1, at_most=1 << 24)
    quant_type: str = option("nf4", "the levels", choices=("nf4",))
    blocksize: int = option(64, "values that share a scale", at_least=32, at_most=4096)
    dtype: str = option("bfloat16", "its type before", choices=tuple(SPELLED_TYPES))
    nested_blocksize: int = option(0, "scales that share one", at_least=0, at_most=4096)
    nested_dtype: str = option("float32", "the scales' type", choices=("float32",))
    nested_offset: float = option(0.0, "what is added to a scale")


def attach_nf4(tensors):
    """`Tensors` whose NF4 weights are read dequantised, and whose keys are weights alone.

    Others stay as they are. Raises `ValueError`, naming the key, for a weight that is not whole.
    """
    replaced, hidden = {}, []
    for key in [key for key in tensors.keys() if key.endswith(STATE)]:
        name = key.removesuffix(STATE)
        state = typed_description(key, Nf4State, tensors.read_note(key), foreign=True)
        check_state(tensors, name, state)
        there = [field for field in ("", *FIELDS) if name + field in tensors.entries]
        held = {field: tensors.entries[name + field].read for field in there}
        read = partial(read_nf4, held, name, state)
        replaced[name] = SPELLED_TYPES[state.dtype], tuple(state.shape), read
        hidden += [name + field for field in there[1:]]
    tensors.set_aside(hidden, replaced)
    return tensors


def check_state(tensors, name, state):
    """Raise `ValueError` unless a weight's tensors are those that its state tells of."""
    count, nested = torch.Size(state.shape).numel(), state.nested_blocksize
    if len(state.shape) != 2 or state.shape[1] % state.blocksize:
        raise ValueError(
            f"{name} has the shape {list(state.shape)}, whose rows are no whole blocks of "
            f"{state.blocksize} values: fetch a version in bfloat16"
        )
    blocks = count // state.blocksize
    expected = {"": ("U8", count // 2), ".absmax": ("U8" if nested else "F32", blocks)}
    expected[".quant_map"] = "F32", 16
    if nested:
        expected[".nested_absmax"] = "F32", -(-blocks // nested)
        expected[".nested_quant_map"] = "F32", 256
    for field, (spelled, size) in expected.items():
        there = name + field in tensors.entries
        found = tensors.header(name + field) if there else (None, (0,))
        if (found[0], torch.Size(found[1]).numel()) != (spelled, size):
            raise ValueError(
                f"{name + field} is {found[0]} of {torch.Size(found[1]).numel()} values, not "
                f"{spelled} of {size}: {DAMAGED}"
            )


def read_nf4(held, name, state, start=0, stop=None, exact=False):
    """Rows of an NF4 weight from start to stop: in its type, or with `exact` in float32.

    `held` has for each field of the weight what reads it.
    What is read exactly gives the file's own codes and scales when it is quantised to nf4 again. A
    warning counts the blocks of which that is not so.
    """
    rows, columns = state.shape
    scales = read_scales(held, state).view(rows, -1)[start:stop]
    codes = held[""]().view(rows, columns // 2)[start:stop]
    levels = held[".quant_map"]()
    if exact == "nf4":
        warn_of_lost(name, state, codes, scales, levels)
    dtype = torch.float32 if exact else DTYPES[SPELLED_TYPES[state.dtype]]
    return dequantize_rows(codes, scales, torch.cartesian_prod(levels, levels), dtype)


def read_scales(held, state):
    """The scales of all blocks of a weight, float32."""
    scales = held[".absmax"]()
    if not state.nested_blocksize:
        return scales
    levels, factors = (held[f".nested_{x}"]() for x in ("quant_map", "absmax"))
    factors = factors.repeat_interleave(state.nested_blocksize)[: len(scales)]
    return levels[scales.int()] * factors + state.nested_offset


def warn_of_lost(name, state, codes, scales, levels):
    """Say how many blocks of a weight rounding to nf4 does not find again: all where the levels are
    not ours, else those without the level -1 or 1, and those with a scale below 0.
    """
    blocks = codes.view(*scales.shape, -1)
    ends = [(half == 0) | (half == 15) for half in (blocks >> 4, blocks & 15)]
    kept = torch.stack(ends).any(0).any(-1) & (scales >= 0) | (blocks == ZERO_PAIR).all(-1)
    if not torch.equal(levels, torch.tensor(NF4_LEVELS)) or state.blocksize != NF4_BLOCK:
        kept = torch.zeros_like(kept)
    if not kept.all():
        lost = kept.numel() - int(kept.sum())
        warn_for_all(
            "%s: quantised to nf4, %d of %d blocks are rounded again", name, lost, kept.numel()
        )
