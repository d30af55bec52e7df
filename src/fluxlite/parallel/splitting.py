"""Weights that tensor-parallel ranks draw with: views of the files that all of them map."""

from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fluxlite.nets.quantized import quantize_model
from fluxlite.parallel.tensor_parallel import shard_heads
from fluxlite.parallel.weights import fill_weights, local_part


@torch.no_grad()
def split_weights(mesh, model, weights, *, dtype, device, quantize="none"):
    """Give a model on meta its weights, split over `mesh` by `shard_heads`, to draw with.

    `weights` yields (name, whole values). This rank's part is a view of the mapped file, rows and
    columns alike, where its type and device are the file's: all ranks of a machine then share the
    pages. Else it is a copy of the part alone.
    """
    model.to(dtype)
    if quantize != "none":
        quantize_model(model, quantize)
    shard_heads(model, mesh, sequence=False)
    for block in (*model.double_blocks, *model.single_blocks):
        block.forward = partial(without_gradients, block.forward)
    if quantize != "none":
        fill_weights(model, weights, device)
        return
    parameters = dict(model.named_parameters())
    for name, values in weights:
        place, _, leaf = name.rpartition(".")
        own = own_parameter(parameters[name], values, device, dtype)
        model.get_submodule(place).register_parameter(leaf, own)


def without_gradients(forward, *args):
    """A forward in no_grad's mode: in inference mode DTensor takes each linear apart in Python,
    which costs a first step seconds.
    """
    with torch.inference_mode(False), torch.no_grad():
        return forward(*args)


def own_parameter(parameter, values, device, dtype):
    """This rank's part of whole values, as a parameter that lies as another on meta does."""
    mapped = not values.untyped_storage().resizable()  # else a view would keep the whole in memory
    part = values[local_part(parameter)].to(device, dtype, copy=not mapped)
    if isinstance(parameter, DTensor):
        shaped = dict(shape=parameter.shape, stride=parameter.stride())
        where = parameter.device_mesh, parameter.placements
        part = DTensor.from_local(part, *where, run_check=False, **shaped)
    return nn.Parameter(part, requires_grad=False)
