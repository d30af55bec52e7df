"""Tensor parallelism: ranks share the heads and the MLP's width of each block.

Weights keep their names and full shapes, as DTensors. B batch, L tokens, N heads, D head width.
"""

import fnmatch
from copy import copy
from functools import partial

from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fluxlite.nets.quantized import QuantizedLinear


def tensor_plan(sequence):
    """How linears are split: {name: style} of a double block, of a single block, of the two ends.

    Columns: each rank has the rows of W that make its heads' q, k, v or its part of the MLP. Rows:
    it has the columns of W that read them, and the products are added up. Between them x (B, L, H)
    is whole on every rank, or with `sequence` a part of L.
    """
    tokens = Shard(1) if sequence else Replicate()
    columns, rows = ColwiseParallel(input_layouts=tokens), RowwiseParallel(output_layouts=tokens)
    # (B, L, N, D) by N; the gradient of the scales is summed
    per_head = SequenceParallel(sequence_dim=2, use_local_output=True)
    stream = {
        # what q, k and v read is gathered once
        "qkv": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=Replicate()),
        **{f"qkv.{x}": ColwiseParallel() for x in "qkv"},
        "qkv.q_norm": per_head,
        "qkv.k_norm": per_head,
        "proj": rows,
        "mlp.linear_in": columns,
        "mlp.linear_out": rows,
    }
    double = {f"img.{name}": style for name, style in stream.items()}
    double |= {f"txt.{name}": style for name, style in stream.items()}
    # attention's and the MLP's products are added up together
    share = RowwiseParallel(output_layouts=Partial())
    single = stream | {
        "enter": PrepareModuleOutput(
            output_layouts=tokens, desired_output_layouts=Replicate(), use_local_output=False
        ),
        "proj": share,
        "mlp.linear_in": ColwiseParallel(),
        "mlp.linear_out": share,
        "leave": PrepareModuleInput(
            input_layouts=Partial(), desired_input_layouts=tokens, use_local_output=True
        ),
    }
    into = ColwiseParallel(output_layouts=Shard(1))
    within = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1))
    ends = dict.fromkeys(("img_in", "txt_in", "hint_in"), into)
    ends |= dict.fromkeys(("double_out.*", "single_out.*"), within)
    ends |= {"out": RowwiseParallel(input_layouts=Shard(1))}
    return double, single, ends if sequence else {}


def shard_heads(model, mesh, *, sequence):
    """Tensor parallelism: the blocks, and with `sequence` the two ends, by `tensor_plan`."""
    double, single, ends = tensor_plan(sequence)
    # some styles make parameters anew, all trainable
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for blocks, plan in ((model.double_blocks, double), (model.single_blocks, single)):
        for block in blocks:
            parallelize_module(block, mesh, plan_quantized(block, plan))
    names = [name for name, _ in model.named_modules()]  # of the ends a model has some
    there = {name: style for name, style in ends.items() if fnmatch.filter(names, name)}
    parallelize_module(model, mesh, there)
    for name, p in model.named_parameters():
        p.requires_grad_(trained[name])


def plan_quantized(block, plan):
    """A block's plan, in which styles split the codes and scales of its quantised linears."""
    found = dict(plan)
    for name, linear in block.named_modules():
        if isinstance(linear, QuantizedLinear):
            found[name] = copy(plan[name])
            columns = isinstance(plan[name], ColwiseParallel)
            found[name]._partition_linear_fn = partial(split_codes, columns)
    return found


def split_codes(columns, _name, linear, mesh):
    """Split a quantised linear as `ColwiseParallel` and `RowwiseParallel` split a weight: rows, or
    columns with their blocks' scales.
    """
    if not isinstance(linear, QuantizedLinear):
        return
    for name, p in list(linear.named_parameters(recurse=False)):
        within = Shard(1) if p.ndim > 1 and p.shape[1] > 1 else Replicate()
        split = distribute_tensor(p, mesh, [Shard(0) if columns else within])
        linear.register_parameter(name, nn.Parameter(split, requires_grad=p.requires_grad))
