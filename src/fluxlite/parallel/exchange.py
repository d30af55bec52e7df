"""Collectives with a gradient: what ranks send each other inside a forward.

B batch, L tokens, C channels, H hidden width.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives


def newest_name(*names):
    """The first of some names that this version of torch has a collective for."""
    return next(getattr(collectives, name) for name in names if hasattr(collectives, name))


def exchange_parts(x, mesh, received=None, sent=None):
    """Send the i-th part of x to rank i and receive one from each, joined: differentiable.

    Parts are of equal length, or of the lengths `sent` and `received`.
    """
    return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, mesh.get_group())


def gather_rows(vec, mesh):
    """The rows (B, H) of all ranks, (ranks·B, H); each rank's gradient is the sum of theirs."""
    gather = newest_name("all_gather_single_autograd", "all_gather_tensor_autograd")
    return gather(vec.contiguous(), 0, mesh)


def compute_apart(mesh, passes):
    """What some functions without arguments return, alike in shape: each rank of `mesh` calls its
    own, and has them all.
    """
    own = passes[mesh.get_local_rank()]().contiguous()
    found = [torch.empty_like(own) for _ in passes]
    dist.all_gather(found, own, group=mesh.get_group())
    return found


class JoinTokens(torch.autograd.Function):
    """The parts (B, L/cp, C) of all ranks as (B, L, C).

    The ranks go on alike, and gradients will be averaged: hence the factor.
    """

    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mesh = mesh
        gather = newest_name("all_gather_single", "all_gather_tensor")
        return collectives.wait_tensor(gather(x.contiguous(), 1, mesh))

    @staticmethod
    def backward(ctx, gradient):
        ranks = ctx.mesh.size()
        return gradient.chunk(ranks, dim=1)[ctx.mesh.get_local_rank()] * ranks, None


class SumGradient(torch.autograd.Function):
    """The same value on all ranks, which use it for different tokens: gradients are summed."""

    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        summed = collectives.all_reduce(gradient.contiguous(), "sum", ctx.mesh)
        return collectives.wait_tensor(summed), None


class ScaleGradient(torch.autograd.Function):
    """x itself, with a gradient `factor` times its own."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None
