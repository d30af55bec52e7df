"""Activation checkpointing and compilation of the blocks, in an order in which both hold.

What is compiled is a block's own forward. Whatever is around it stays outside of the graph: hooks
(FSDP2's, offloading's), the cast of one rank, and checkpointing, which then runs the graph again in
the backward. Selective checkpointing alone is traced into the graph: run eagerly it is a Python
dispatch mode, and that sees no operator of a compiled graph.
"""

import inspect
import logging
from functools import cache, partial
from types import FunctionType
from weakref import WeakSet

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fluxlite.cli.messages import warn_for_all
from fluxlite.parallel.host_memory import keep_on_host

log = logging.getLogger("fluxlite")

BACKEND = "inductor"
# Graphs of a kind of block, which torch bounds by 8: a size of its own for one sample, another for
# all others, each with a gradient, without and in inference mode, for each dtype or mesh.
MOST_GRAPHS = 64

# What selective checkpointing keeps: the linears' products, fused attention, and what ranks sent.
SAVED_NAMES = """mm addmm linear _scaled_mm _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"""
SAVED_OPERATORS = {torch.ops._c10d_functional.all_to_all_single.default} | {
    getattr(torch.ops.aten, name).default
    for name in SAVED_NAMES.split()
    if hasattr(torch.ops.aten, name)
}


def blocks_of(model):
    """All blocks of a model, in the order of its forward."""
    return [*model.double_blocks, *model.single_blocks]


# --- activation checkpointing --------------------------------------------------------------------


def keep_products(_context, operator, *_args, **_kwargs):
    """Selective checkpointing's policy: whether an operator's result is kept or computed again."""
    kept = operator in SAVED_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# an early stop may leave a collective unwaited
WHOLE = dict(use_reentrant=False, preserve_rng_state=False, early_stop=False)
SELECTIVE = WHOLE | {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}


def checkpoint_interval(text):
    """The k of activation_checkpointing=k, or 0."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0


def checkpoint_activations(model, kind, offload=False):
    """Make blocks recompute their forward in the backward.

    That is all of them with "full", each k-th with "k", all in part with "selective". With
    `offload` the inputs that they keep for it wait in host memory.
    """
    if kind == "none":
        return
    options = SELECTIVE if kind == "selective" else WHOLE
    for block in blocks_of(model)[:: checkpoint_interval(kind) or 1]:
        block.forward = partial(checkpoint, block.forward, **options)
        if offload:
            block.forward = partial(keep_on_host, block.forward)


# --- compilation ---------------------------------------------------------------------------------


def compile_blocks(model, checkpointing="none"):
    """Compile each block's own forward: one graph serves all blocks of a kind.

    With `checkpointing` "selective" the graphs recompute what that recomputes. Every other kind is
    put around them, by `checkpoint_activations`.
    """
    for block in blocks_of(model):
        block.forward = partial(run_compiled, type(block), checkpointing == "selective", block)
    log.info(
        "%s compiles %d double and %d single blocks, activation checkpointing: %s",
        *(BACKEND, len(model.double_blocks), len(model.single_blocks), checkpointing),
    )
    return model


def run_compiled(kind, selective, block, *args):
    """A block's forward, compiled; eager, with a warning, where `MOST_GRAPHS` are there already, or
    where what is in the block, as somebody's adapter, makes no whole graph.
    """
    eager, compiled = compile_kind(kind, selective and torch.is_grad_enabled())
    if block in EAGER_BLOCKS:
        return eager(block, *args)
    try:
        return compiled(block, *args)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        warn_of_limit(kind)
    except torch._dynamo.exc.Unsupported as error:
        EAGER_BLOCKS.add(block)
        warn_of_break(kind, str(error).split("\n")[0])
    return eager(block, *args)


EAGER_BLOCKS = WeakSet()  # that cannot be compiled


@cache
def compile_kind(kind, selective):
    """(eager, compiled) forward of all blocks of a class, with a code object of its own.

    By that torch counts graphs and remembers which sizes change.
    """

    def run_selectively(*args):
        return checkpoint(kind.forward, *args, **SELECTIVE)

    def lower_kind(graph, inputs):
        return lower_graph(kind, graph, inputs)

    # a remark on policies in a graph: nothing is changed in place here
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    eager = copy_code(run_selectively, kind.__name__) if selective else kind.forward
    known = inspect.signature(torch.compile).parameters  # of this version of torch
    limit = {"recompile_limit": MOST_GRAPHS} if "recompile_limit" in known else {}
    return eager, torch.compile(eager, backend=lower_kind, fullgraph=True, **limit)


def copy_code(function, name):
    """A function with a copy of its code object."""
    code, closure = function.__code__.replace(co_name=name), function.__closure__
    return FunctionType(code, function.__globals__, name, closure=closure)


def lower_graph(kind, graph, inputs):
    """torch.compile's backend: it says what takes so long."""
    purpose = "training" if torch.is_grad_enabled() else "drawing and validation"
    log.info("compiling %s for %s: this step takes longer", kind.__name__, purpose)
    return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


@cache
def warn_of_break(kind, reason):
    """Say once for each kind of block and reason that something in it cannot be compiled."""
    warn_for_all(
        "%s with what is in it cannot be compiled and runs eagerly, slower: %s",
        *(kind.__name__, reason),
    )


@cache
def warn_of_limit(kind):
    """Say once for each kind of block that a new size will not be compiled any more."""
    warn_for_all(
        "%s has as many graphs as may be compiled: other sizes run eagerly, slower", kind.__name__
    )
