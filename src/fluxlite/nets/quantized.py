"""Linears whose frozen weight lies in 8 or 4 bits and is dequantised where it is used.

    codes    int8 or float8_e4m3fn (out, in); of nf4 uint8 (out, in / 2), the even column above
    scales   float32 (out, 1); of nf4 (out, in / 64): one for each block of a row

Codes and scales are plain frozen parameters: they are sharded and sent as bytes, and no row needs
another's. The weight is codes times scales in float32, rounded once to the compute dtype. No graph
keeps it: the backward dequantises it again.

NF4: QLoRA, arXiv 2305.14314, laid out as bitsandbytes has it.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

QUANTIZED_KINDS = "none", "int8", "float8", "nf4"
NF4_BLOCK = 64  # columns that share a scale
LARGEST = {"int8": 127.0, "float8": 448.0}  # code
LOSSES = {  # by how much rounding changes a weight at most
    "int8": "1/254 of its row's largest",
    "float8": "1/16 of itself",
    "nf4": "0.15 of its block's largest, and nothing of what a file has in nf4 already",
}
CODE_TYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "nf4": torch.uint8}
# quantiles of a normal distribution, -1 and 1 among them, and an exact 0
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
QUANTIZED_PARTS = "double_blocks.", "single_blocks.", "modulation."  # of a Flux: 99 % of it


def quantize_rows(values, kind):
    """(codes, scales) of rows of a weight (out, in), by rounding to the nearest code."""
    values = values.float()
    blocks = values.unflatten(1, (-1, NF4_BLOCK if kind == "nf4" else values.shape[1]))
    scales = blocks.abs().amax(2) / LARGEST.get(kind, 1.0)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return nearest_codes(scaled.flatten(1), kind), scales


def nearest_codes(scaled, kind):
    """Codes of values that are divided by their scale."""
    if kind != "nf4":
        return (scaled.round() if kind == "int8" else scaled).to(CODE_TYPES[kind])
    levels = torch.tensor(NF4_LEVELS, device=scaled.device)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
    return nearest[:, ::2] << 4 | nearest[:, 1::2]


def dequantize_rows(codes, scales, pairs, dtype):
    """The weight (out, in) of codes and scales; `pairs` are `level_pairs` or None."""
    values = codes.float() if pairs is None else F.embedding(codes.int(), pairs).flatten(1)
    blocks = values.unflatten(1, (scales.shape[1], -1))
    return blocks.mul_(scales[..., None]).flatten(1).to(dtype)


def computed_weight(name, values, kind, dtype):
    """The weight that a linear of a model that is quantised so computes with, of its values."""
    if kind == "none" or not name.startswith(QUANTIZED_PARTS):
        return values.to(dtype)
    pairs = level_pairs(values.device) if kind == "nf4" else None
    return dequantize_rows(*quantize_rows(values, kind), pairs, dtype)


def level_pairs(device=None):
    """The two levels of each byte of nf4 codes: (256, 2)."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.cartesian_prod(levels, levels)


def local_values(tensor):
    """This rank's part of a DTensor, or a plain tensor or None as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dequantize_weight(codes, scales, pairs, dtype):
    """`dequantize_rows`, of DTensors by each rank's own part: a DTensor that lies as the codes."""
    weight = dequantize_rows(*map(local_values, (codes, scales, pairs)), dtype)
    if not isinstance(codes, DTensor):
        return weight
    return DTensor.from_local(weight, codes.device_mesh, codes.placements, run_check=False)


class FrozenProduct(torch.autograd.Function):
    """x·Wᵀ + b of a quantised W, of which only x has a gradient: W is not kept for the backward."""

    @staticmethod
    def forward(ctx, x, bias, codes, scales, pairs, dtype):
        ctx.save_for_backward(codes, scales, pairs)
        ctx.dtype = dtype
        return F.linear(x, dequantize_weight(codes, scales, pairs, dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        weight = dequantize_weight(*ctx.saved_tensors, ctx.dtype)
        return gradient @ weight, None, None, None, None, None


class QuantizedLinear(nn.Linear):
    """A linear with `codes` and `scales` for its weight, which `weight` makes of them each time."""

    @property
    def weight(self):
        return dequantize_weight(self.codes, self.scales, self.pairs, self.weight_dtype)

    def forward(self, x):
        held = self.bias, self.codes, self.scales, self.pairs
        return FrozenProduct.apply(x, *held, self.weight_dtype)


@cache
def quantized_class(kind):
    """A class like `kind`, of linears, that computes with a `QuantizedLinear`'s weight."""
    if kind is nn.Linear:
        return QuantizedLinear
    return type(f"Quantized{kind.__name__}", (kind, QuantizedLinear), {})


def quantize_linear(linear, kind, weight=None, dtype=None):
    """Make a linear a quantised one, in place, of its own weight or another, which is given in
    `dtype` then. On meta there is nothing to round.
    """
    own = linear._parameters.pop("weight").detach()
    weight = own if weight is None else weight
    linear.__class__ = quantized_class(type(linear))
    linear.weight_dtype, linear.quantized_kind = dtype or weight.dtype, kind
    for name, values in zip(("codes", "scales"), quantize_rows(weight, kind)):
        linear.register_parameter(name, nn.Parameter(values, requires_grad=False))
    pairs = level_pairs(weight.device) if kind == "nf4" else None
    linear.register_buffer("pairs", pairs, persistent=False)


def quantized_linears(model, parts=QUANTIZED_PARTS):
    """{name: linear} of a model that are quantised: those of blocks and modulation, or other parts.

    Embedders, ends, norms and biases stay as they are, and so do adapters beside a linear.
    """
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Linear) and n.startswith(parts)}


def quantize_model(model, kind):
    """Quantise the linears of a model, one by one; returns the model."""
    for linear in quantized_linears(model).values():
        quantize_linear(linear, kind)
    return model


def quantize_conflicts(kind, width, ranks=1):
    """(whether it is so, text) of each way in which a model of a width cannot be quantised, its
    columns shared by so many tensor-parallel ranks.
    """
    least = NF4_BLOCK * ranks
    yield (
        kind == "nf4" and width % least,
        f"model.quantize=nf4 needs model.hidden_size to be a multiple of {least}, whole blocks of "
        f"columns on a tensor-parallel rank, and {width} is none: choose int8 or float8",
    )
