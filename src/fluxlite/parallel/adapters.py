"""LoRA adapters beside the linears of a wrapped model, whose weights stay as they are.

They are a model by themselves (`nets.lora.Adapters`), outside of FSDP2: whole on each data-parallel
rank, float32, never gathered and never cast. A rank sends their gradient, once a step. Under
tensor parallelism they are split as their linears are (`shard_adapters`).
"""

from functools import cache

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel

from fluxlite.nets.quantized import FrozenProduct, QuantizedLinear
from fluxlite.parallel.tensor_parallel import tensor_plan
from fluxlite.parallel.weights import local_tensor


def shard_adapters(adapters, mesh, *, sequence):
    """Split `Adapters` on meta over `mesh` as `tensor_plan` splits their linears.

    Beside rows of W lie the rows of up and of the magnitudes, beside columns of W the columns of
    down. The other factor is whole on each rank, and is small.
    """
    double, single, ends = tensor_plan(sequence)
    styles = {"double_blocks": double, "single_blocks": single}
    for adapter in adapters.each.values():
        kind, *rest = adapter.names[0].split(".", 2)
        style = styles[kind].get(rest[-1]) if kind in styles else ends.get(adapter.names[0])
        if style is None:
            continue
        rows = isinstance(style, ColwiseParallel)
        for name, p in list(adapter.named_parameters()):
            split = Shard(0 if rows else 1) if name.startswith("down") != rows else Replicate()
            whole = distribute_tensor(p, mesh, [split])
            adapter.register_parameter(name, nn.Parameter(whole, requires_grad=p.requires_grad))


def attach_adapters(adapters, model):
    """Let the linears of a model, wrapped or not, compute with `Adapters` beside them.

    They are no plain linears then (`flux.is_plain_linear`): no fast path passes an adapter by.
    """
    for adapter in adapters.each.values():
        adapter.linears = tuple(model.get_submodule(name) for name in adapter.names)
        for number, linear in enumerate(adapter.linears):
            linear.__class__ = adapted_class(type(linear))
            linear.__dict__ |= {"adapter": adapter, "number": number}  # no module of its own


@cache
def adapted_class(cls):
    """A class of linears as `cls`, which compute with their adapter too.

    Not a `forward` of each linear's own: torch.compile would make each block a graph of its own.
    """
    names = {"forward": forward_adapted, "plain_forward": cls.forward}
    return type(f"Adapted{cls.__name__}", (cls,), names)


def forward_adapted(linear, x):
    """What a linear makes of x with its adapter, of whose linears it has a `number`."""
    adapter, part = linear.adapter, own_part(x)
    down, up = own_part(adapter.downs()[linear.number]), own_part(adapter.up)
    beside = adapter.product(part, down, up)
    if adapter.magnitude is None:
        return linear.plain_forward(x) + output_like(x, beside)
    base, ratio = base_product(linear, part), dora_ratio(adapter, x)
    # near 1 the ratio itself would be rounded to 1
    changed = (ratio - 1).to(part.dtype) * base + ratio.to(part.dtype) * beside
    out = output_like(x, base + changed)
    return out if linear.bias is None else out + linear.bias


def base_product(linear, x):
    """W·x without bias; of a quantised W no graph keeps what is dequantised."""
    if not isinstance(linear, QuantizedLinear):
        return F.linear(x, own_part(linear.weight))
    held = (own_part(tensor) for tensor in (linear.codes, linear.scales, linear.pairs))
    return FrozenProduct.apply(x, None, *held, linear.weight_dtype)


def dora_ratio(adapter, x):
    """DoRA's magnitudes over the norms of the rows (out,), this rank's of them; x is what enters.

    The norms are taken without gradient, as peft takes them (arXiv 2402.09353, section 4.3).
    """
    with torch.no_grad():
        weights = [own_part(linear.weight) for linear in adapter.linears]
        factors = [own_part(down) for down in adapter.downs()], own_part(adapter.up)
        squares = adapter.row_squares(weights, *factors)
        if reads_columns(x):
            squares = collectives.all_reduce(squares, "sum", x.device_mesh)
        norms = squares.sqrt().clamp(min=1e-30)
    return own_part(adapter.magnitude) / norms


def own_part(tensor):
    """This rank's part of a DTensor; of what each rank has whole, each finds a share of the
    gradient, which is to be summed. Others are as they are.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    shares = [Partial() if p.is_replicate() else p for p in tensor.placements]
    return tensor.to_local(grad_placements=shares)


def reads_columns(x):
    """Whether ranks hold different features of x, so that each computes a share of the output."""
    return isinstance(x, DTensor) and x.placements[0].is_shard(x.ndim - 1)


def output_like(x, part):
    """This rank's part of a linear's output as a DTensor where its input x is one."""
    if not isinstance(x, DTensor):
        return part
    placement = Partial() if reads_columns(x) else Shard(part.ndim - 1)
    return DTensor.from_local(part, x.device_mesh, [placement], run_check=False)


@torch.no_grad()
def average_gradients(model, mesh):
    """Average the gradients of a model that is whole on each rank of `mesh`, as FSDP2 does those
    of others. Collective.
    """
    if not model.is_whole or mesh.size() == 1:
        return
    parts = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
    flat = torch.cat([part.flatten() for part in parts]) / mesh.size()
    for dimension in mesh.mesh_dim_names:
        dist.all_reduce(flat, group=mesh.get_group(dimension))
    for part, values in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(values.view_as(part))
