"""The modulation, 27 % of FLUX's parameters, spread over all ranks and never gathered.

B batch, H hidden width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from fluxlite.parallel.exchange import ScaleGradient, exchange_parts, gather_rows


def spread_modulation(modulation, mesh, dtype):
    """Spread the output features of all its linears over all ranks, where they stay.

    The weights are DTensors then, by rows; `modulate_spread` is the forward.
    """
    for linear in modulation.linears():
        for name, p in list(linear.named_parameters()):
            spread = distribute_tensor(p, mesh, [Shard(0)])
            linear.register_parameter(name, nn.Parameter(spread, requires_grad=p.requires_grad))
    widths = [linear.out_features for linear in modulation.linears()]
    counts, order = feature_order(widths, mesh.size())
    order = order.to(mesh.device_type)
    modulation.forward = partial(modulate_spread, modulation, mesh, counts, order, dtype)


def feature_order(widths, ranks):
    """How many features each rank has, and where each is among all ranks', one after the other.

    Linears of `widths` features are each split among `ranks` as `Shard(0)` does.
    """
    starts = torch.tensor([0, *widths]).cumsum(0)
    features = [torch.arange(a, b) for a, b in zip(starts, starts[1:])]
    empty = torch.empty(0, dtype=torch.long)
    shares = [(*f.chunk(ranks), *[empty] * ranks)[:ranks] for f in features]
    of_rank = [torch.cat(parts) for parts in zip(*shares)]
    return [len(part) for part in of_rank], torch.cat(of_rank).argsort()


def stored_dtype(parameters, otherwise):
    """The type of all of some parameters, or `otherwise` where they differ: frozen ones lie in the
    compute dtype, trained ones in float32.
    """
    kinds = {p.dtype for p in parameters}
    return kinds.pop() if len(kinds) == 1 else otherwise


def modulate_spread(modulation, mesh, counts, order, dtype, vec):
    """`Modulation.forward` where each rank has some features of each linear, `counts` of them in
    all.

    The vectors travel, not the weights: each rank's rows vec (B, H) go to all, are multiplied by
    each rank's features, and come back whole as (B, features). That is one all-gather and one
    all-to-all of a few MB a sample. The weights' gradient, a sum over the rows of all ranks, is
    averaged as FSDP2 does. So few rows do not pay a cast of the weights: they compute in the
    weights' type, and only what travels is in `dtype`. Nor do they pay a copy: weights in host
    memory (`parallel.cpu_offload`) compute there.
    """
    ranks, mine = mesh.size(), counts[mesh.get_local_rank()]
    stored = stored_dtype(modulation.parameters(), dtype)
    linears = modulation.linears()
    place = linears[0].bias.to_local().device
    rows = ScaleGradient.apply(gather_rows(vec, mesh).to(place, stored), ranks)
    out = torch.cat([multiply_rows(rows, linear) for linear in linears], dim=-1)
    out = ScaleGradient.apply(out, 1 / ranks).to(vec.device, dtype)
    out = rearrange(out, "(r b) f -> (r f) b", r=ranks)
    return exchange_parts(out, mesh, counts, [mine] * ranks).index_select(0, order).T


def multiply_rows(rows, linear):
    """What this rank's features of a spread linear make of rows (B, H)."""
    weight, bias = (p.to_local().to(rows.dtype) for p in (linear.weight, linear.bias))
    return F.linear(rows, weight, bias)
