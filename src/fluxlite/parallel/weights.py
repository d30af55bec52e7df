"""The weights of a wrapped model: which part of each a rank has, and how it is filled."""

import torch
from torch.distributed.tensor import DTensor

from fluxlite.nets.quantized import QuantizedLinear, level_pairs, quantize_rows


def local_tensor(tensor):
    """This rank's part of a tensor, which may be a DTensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def plain_values(tensor):
    """All of a parameter's values, of one that is rounded to float8 too. Collective."""
    return tensor.dequantize() if hasattr(tensor, "qdata") else whole_tensor(tensor)


def whole_tensor(tensor):
    """All of a tensor, which may be a DTensor, in host memory. Collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def local_part(tensor, coordinate=None):
    """The slices of the whole that this rank's part of a DTensor is, or that of the rank at a
    `coordinate` of its mesh; of others, all of it.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    begin, size = [0] * tensor.ndim, list(tensor.shape)
    mesh = tensor.device_mesh
    splits = zip(tensor.placements, mesh.shape, coordinate or mesh.get_coordinate())
    splits = [split for split in splits if hasattr(split[0], "dim")]
    # FSDP2 splits what tensor parallelism has split, though its mesh dimension comes first: that is
    # what split_factor says
    for placement, ranks, number in sorted(splits, key=lambda s: hasattr(s[0], "split_factor")):
        step = -(-size[placement.dim] // ranks)
        offset = min(number * step, size[placement.dim])
        begin[placement.dim] += offset
        size[placement.dim] = min(step, size[placement.dim] - offset)
    return tuple(slice(first, first + count) for first, count in zip(begin, size))


@torch.no_grad()
def fill_weights(model, weights, device=None):
    """Give a parallelized model its weights, on `device` where it is on meta yet; returns it.

    `weights` yields (name, whole values): no more than a few are whole in memory, on each rank.
    What is frozen and whole stays where it is, a view of a mapped file, if that is of its type and
    on its device. Of quantised linears each rank quantises its own rows.
    """
    if device is not None:
        model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    linears = {f"{name}.weight": module for name, module in model.named_modules()}
    for name, values in weights:
        if isinstance(linears.get(name), QuantizedLinear):
            fill_codes(linears[name], values)
        else:
            p, part = parameters[name], values[local_part(parameters[name])]
            stays = not (
                p.requires_grad or isinstance(p, DTensor) or 0 in part.stride()
            )  # expanded
            if stays and (part.dtype, part.device) == (p.dtype, p.device):
                p.data = part
            else:
                local_tensor(p).copy_(part)
    return model


def fill_codes(linear, values):
    """Give a quantised linear this rank's codes and scales of its whole weight (out, in)."""
    rows, _ = local_part(linear.codes)
    made = quantize_rows(values[rows].to(linear.codes.device), linear.quantized_kind)
    for p, found in zip((linear.codes, linear.scales), made):
        local_tensor(p).copy_(found[:, local_part(p)[1]])
    if linear.pairs is not None:  # which nothing has filled
        local_tensor(linear.pairs).copy_(level_pairs())
