"""Parallelism, applied to a model from outside; `parallelize` has the wrap order, and one process
is a mesh of one.

A run's ranks form a mesh of dp_replicate x dp_shard x cp x tp, tp innermost:
* FSDP2 over dp_shard x cp, and over dp_replicate the all-reduce of HSDP: a block is a unit; float32
  masters and reduction.
* Tensor parallelism: `tensor_plan`. Weights keep their names and full shapes, as DTensors.
* Context parallelism (Ulysses, arXiv 2309.14509): ranks hold parts of the tokens, and in attention
  all tokens of some heads.
* The modulation, 27 % of FLUX's parameters, is spread over all ranks by output features and never
  gathered.

Gradients: every rank's loss is its samples' mean, so the ranks' gradients are averaged over dp and
cp. The tp and cp ranks of a sample compute the same loss; where they hold different tokens, what
they find for shared weights is summed.

B batch, L tokens, H hidden width, N heads, D head width.
"""

import fnmatch
import importlib.util
import logging
import os
import re
import shutil
import socket
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fluxlite.cli.options import option

MAX_RANKS = 65_536


@dataclass
class ParallelConfig:
    """The mesh, and what each of its ranks keeps."""

    dp_replicate: int = option(
        1, "copies of the sharded weights (HSDP)", at_least=1, at_most=MAX_RANKS
    )
    dp_shard: int = option(
        -1,
        "ranks that share one copy of the weights (FSDP2); -1: all that are left",
        at_least=-1,
        at_most=MAX_RANKS,
    )
    cp: int = option(
        1,
        "context-parallel ranks, which share the tokens of a sample (Ulysses)",
        at_least=1,
        at_most=MAX_RANKS,
    )
    tp: int = option(
        1,
        "tensor-parallel ranks, which share the heads and the width of each block",
        at_least=1,
        at_most=MAX_RANKS,
    )
    sequence_parallel: bool = option(
        False, "tensor-parallel ranks share the tokens between the blocks' linears too: less memory"
    )
    shard_modulation: bool = option(
        True,
        "spread the modulation's features over all ranks and never gather them: 27 % less traffic",
    )
    shard_encoders: bool = option(
        False,
        "shard the T5 encoder over all ranks, gathered block by block: less memory, more traffic",
    )
    reshard_after_forward: bool = option(
        True,
        "free gathered weights between forward and backward: less memory, one more all-gather",
    )
    prefetch: int = option(
        0,
        "blocks gathered ahead of the one that computes; 0: what FSDP2 does, one",
        at_least=0,
        at_most=1000,
    )
    cpu_offload: bool = option(
        False, "keep sharded weights, gradients and optimizer in host memory"
    )
    activation_checkpointing: str = option(
        "none",
        "recompute in the backward: none, full (each block), a number k (each k-th block), or "
        "selective (all but matrix products and fused attention)",
        verbatim=True,
    )
    timeout_s: int = option(
        600,
        "seconds after which a rank that waits for another gives up",
        at_least=1,
        at_most=1_000_000,
    )

    def validate(self):
        self.sizes()
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "parallel.sequence_parallel=true needs parallel.tp above 1, whose ranks share the "
                "tokens"
            )
        if not (
            self.activation_checkpointing in ("none", "full", "selective")
            or _every(self.activation_checkpointing)
        ):
            raise ValueError(
                f"parallel.activation_checkpointing={self.activation_checkpointing}: choose none, "
                "full, selective or a number "
                "k of 1 or more, for each k-th block"
            )

    def sizes(self):
        """(dp_replicate, dp_shard, cp, tp), with -1 filled in; raises `ValueError` unless their
        product is the number of ranks.
        """
        ranks, fixed = (
            world_size(),
            {name: getattr(self, name) for name in ("dp_replicate", "cp", "tp")},
        )
        product = self.dp_replicate * self.cp * self.tp
        shown = " x ".join(f"{name}={value}" for name, value in fixed.items() if value > 1)
        if ranks == 1 and product > 1:
            raise ValueError(
                f"parallel.{shown} needs {product} processes or a multiple: torchrun "
                f"--nproc_per_node {product} train.py …"
            )
        if ranks % product:
            raise ValueError(
                f"parallel.{shown} does not divide the {ranks} processes: {_choices(ranks)}"
            )
        dp_shard = ranks // product if self.dp_shard == -1 else self.dp_shard
        if dp_shard * product != ranks:
            raise ValueError(
                f"parallel.dp_shard={self.dp_shard}{f' x {shown}' if shown else ''} is not the "
                f"number of processes, {ranks}: "
                f"set parallel.dp_shard={ranks // product} or -1"
            )
        return self.dp_replicate, dp_shard, self.cp, self.tp

    def check_model(self, shape, num_text_tokens, num_image_tokens):
        """Raise `ValueError` where heads, widths or tokens of a model of `shape` do not divide
        among the ranks.
        """
        heads = shape.num_heads
        if heads % (self.tp * self.cp):
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"parallel.tp={self.tp} x parallel.cp={self.cp} does not divide "
                f"model.num_heads={heads}: "
                f"their product must be one of {fitting}"
            )
        blocks = shape.num_double_blocks + shape.num_single_blocks
        if _every(self.activation_checkpointing) > max(blocks, 1):
            raise ValueError(
                f"parallel.activation_checkpointing={self.activation_checkpointing}: there are "
                f"{blocks} blocks"
            )
        parts = self.cp * (self.tp if self.sequence_parallel else 1)
        for name, count in (
            ("model.max_sequence_length", num_text_tokens),
            ("image tokens, height/16 x width/16,", num_image_tokens),
        ):
            if count % parts:
                what = (
                    "parallel.cp x parallel.tp (sequence_parallel)"
                    if self.sequence_parallel
                    else "parallel.cp"
                )
                raise ValueError(
                    f"{count} {name} do not divide among {what} = {parts} ranks: choose a multiple "
                    f"of {parts}"
                )


def _choices(ranks):
    fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
    return f"the product of dp_replicate, cp and tp must be one of {fitting}"


def _every(text):
    """The k of activation_checkpointing=k, or 0."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0


# --- processes and devices ------------------------------------------------------------------------


def world_size():
    """Processes of this run, before and after the process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """This process's number, before and after the process group exists."""
    return int(os.environ.get("RANK", 0))


# gloo raises a bare RuntimeError, its text after the place in gloo's source
GLOO_FAILURE = re.compile(
    r"\[\S*gloo/(transport|rendezvous)/\S+:\d+\] (Connection closed by peer|Connect timeout"
    r"|Read timeout|Write timeout|Timed out waiting|timed out connecting"
    r"|Application timeout caused pair closure|Socket closed|Socket unexpectedly closed"
    r"|Pair is not connected|Read error|writev|send )"
)


@contextmanager
def watching_ranks(config):
    """Turn the failure of a collective, which tells little, into a `ValueError` that says what has
    happened and what to do.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or GLOO_FAILURE.search(text)):
            raise
        raise ValueError(
            "another rank died, or kept this one waiting for "
            f"parallel.timeout_s={config.timeout_s} s. The rank that failed first "
            "says why, above or in torchrun's list; resume=auto goes on from the last checkpoint. "
            f"({text.split('. ')[0]})"
        ) from error


def default_device():
    """The machine's accelerator, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_compiler(device):
    """Raise `ValueError` where torch.compile has nothing to compile with: a C++ compiler on the
    CPU, Triton on a GPU.
    """
    if str(device).startswith("cuda"):
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                "compile=true needs Triton on a GPU: pip install triton, or leave compile=false"
            )
        return
    wanted = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (wanted, "clang++")):
        raise ValueError(
            f"compile=true needs a C++ compiler, and there is no {wanted}: install g++, or leave "
            "compile=false"
        )


def has_bf16(device):
    """Whether the device computes in bfloat16 in hardware."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


@dataclass
class Mesh:
    """A run's ranks, seen as each kind of parallelism needs them."""

    fsdp: DeviceMesh  # (dp_shard·cp,), or with HSDP (dp_replicate, dp_shard·cp)
    cp: DeviceMesh
    tp: DeviceMesh
    world: DeviceMesh
    dp_rank: int  # which samples this rank has
    dp_size: int


def check_launcher():
    """Raise `ValueError` where torchrun, in whose store its ranks meet, is gone: they would wait
    for it in vain.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(place, timeout=60).close()
    except OSError as error:
        raise ValueError(
            f"torchrun is gone: {place[0]}:{place[1]} does not answer ({error}). Start it again"
        ) from None


def start(config, device):
    """Join torchrun's process group, or make one of this process alone; returns this rank's device
    and the `Mesh`.
    """
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device.type]
        if "RANK" in os.environ:
            check_launcher()
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    mesh = make_mesh(config, device)
    for part in (mesh.fsdp, mesh.cp, mesh.tp, mesh.world):
        for group in part.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(
                timeout, group
            )  # new groups have their backend's default
    return device, mesh


def make_mesh(config, device):
    """The `Mesh` of a process group that exists."""
    for name in (
        "_collective_utils",
        "_redistribute",
    ):  # DTensor's remarks on gloo, and on its own use of two meshes
        logging.getLogger(f"torch.distributed.tensor.{name}").setLevel(logging.ERROR)
    replicate, shard, cp, tp = config.sizes()
    by_tokens = init_device_mesh(
        device.type, (replicate * shard, cp, tp), mesh_dim_names=("dp", "cp", "tp")
    )
    by_weights = init_device_mesh(
        device.type, (replicate, shard * cp, tp), mesh_dim_names=("dp_replicate", "fsdp", "tp")
    )
    world = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("world",))
    fsdp = by_weights["dp_replicate", "fsdp"] if replicate > 1 else by_weights["fsdp"]
    return Mesh(
        fsdp,
        by_tokens["cp"],
        by_weights["tp"],
        world,
        by_tokens.get_local_rank("dp"),
        replicate * shard,
    )


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --- the wrap order -------------------------------------------------------------------------------


def parallelize(model, mesh, config, dtype, *, compile=False):
    """Wrap a Flux or a ControlNet, on any device or meta, as `config` says: tp → cp → modulation →
    checkpointing → compile → FSDP2.

    Compute is in `dtype`; weights, gradients and their reduction stay float32. `fill` then gives a
    model on meta its weights.
    """
    if mesh.tp.size() > 1:
        shard_heads(model, mesh.tp, sequence=config.sequence_parallel)
    if mesh.cp.size() > 1 or config.sequence_parallel:
        share_tokens(model, mesh.cp, mesh.tp if config.sequence_parallel else None)
    alone, spread = mesh.fsdp.size() == 1, config.shard_modulation and mesh.world.size() > 1
    if spread:
        spread_modulation(model.modulation, mesh.world, dtype)
    if alone:
        compute_in(model, dtype, spread)
    checkpoint_activations(model, config.activation_checkpointing)
    if compile:
        compile_blocks(model)
    if config.sequence_parallel:
        model.modulation.register_forward_hook(
            lambda _module, _args, out: SumGradient.apply(out, mesh.tp)
        )
    return model if alone else shard(model, mesh.fsdp, config, dtype, spread)


# --- tensor parallelism ---------------------------------------------------------------------------


def tensor_plan(sequence):
    """How the linears of double and single blocks and of the whole model are split: {name: style},
    three tables.

    Columns: each rank has the rows of W that make its heads' q, k, v or its part of the MLP. Rows:
    it has the columns of W that read them, and the products are added up. Between them x (B, L, H)
    is whole on every rank, or with `sequence` a part of L.
    """
    tokens = Shard(1) if sequence else Replicate()
    columns, rows = ColwiseParallel(input_layouts=tokens), RowwiseParallel(output_layouts=tokens)
    # (B, L, N, D) by N; the gradient of the scales is summed
    per_head = SequenceParallel(sequence_dim=2, use_local_output=True)
    stream = {
        "qkv": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=Replicate()),
        **{f"qkv.{x}": ColwiseParallel() for x in "qkv"},  # what they read is gathered once
        "qkv.q_norm": per_head,
        "qkv.k_norm": per_head,
        "proj": rows,
        "mlp.linear_in": columns,
        "mlp.linear_out": rows,
    }
    double = {f"{name}.{key}": style for name in ("img", "txt") for key, style in stream.items()}
    share = RowwiseParallel(
        output_layouts=Partial()
    )  # attention's and the MLP's products are added up together
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
    ends = {
        name: ColwiseParallel(output_layouts=Shard(1)) for name in ("img_in", "txt_in", "hint_in")
    }
    ends |= {"out": RowwiseParallel(input_layouts=Shard(1))}
    ends |= {
        f"{kind}_out.*": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1))
        for kind in ("double", "single")
    }
    return double, single, ends if sequence else {}


def shard_heads(model, mesh, *, sequence):
    """Tensor parallelism: the blocks, and with `sequence` the two ends, by `tensor_plan`."""
    double, single, ends = tensor_plan(sequence)
    trained = {
        name: p.requires_grad for name, p in model.named_parameters()
    }  # some styles make parameters anew, all trainable
    for block in model.double_blocks:
        parallelize_module(block, mesh, double)
    for block in model.single_blocks:
        parallelize_module(block, mesh, single)
    names = [
        name for name, _ in model.named_modules()
    ]  # out is Flux's, hint_in and the outputs are a ControlNet's
    parallelize_module(
        model, mesh, {name: style for name, style in ends.items() if fnmatch.filter(names, name)}
    )
    for name, p in model.named_parameters():
        p.requires_grad_(trained[name])


class SumGradient(torch.autograd.Function):
    """The same value on all ranks of a mesh, which use it for different tokens: its gradient is the
    sum of theirs.
    """

    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return collectives.wait_tensor(
            collectives.all_reduce(gradient.contiguous(), "sum", ctx.mesh)
        ), None


# --- tokens shared among ranks --------------------------------------------------------------------


def share_tokens(model, cp, tp):
    """Give each rank of `cp`, and of `tp` unless it is None, its part of the text and of the image;
    join the parts of the output.

    What is between, `residuals` included, has the rank's tokens alone. The joint sequence is then
    (text, image) of the first rank, (text, image) of the second, …; so are the rotations.
    """
    joint = {}

    def enter(_module, args, kwargs):
        img, txt, rope = args
        if "hint" in kwargs:
            kwargs["hint"] = kwargs["hint"].chunk(cp.size(), dim=1)[cp.get_local_rank()]
        parts = [x.chunk(cp.size(), dim=1)[cp.get_local_rank()] for x in (img, txt)]
        joint["double"] = deal(rope, txt.shape[1], cp.size())
        joint["single"] = deal(rope, txt.shape[1], cp.size() * (tp.size() if tp else 1))
        return (*parts, joint["double"]), kwargs

    def enter_single(_module, args):
        x, modulation, _, attend = args
        return x, modulation, joint["single"], attend

    model.register_forward_pre_hook(enter, with_kwargs=True)
    if tp is not None:
        for block in model.single_blocks:
            block.register_forward_pre_hook(enter_single)
    if cp.size() > 1:
        model.attend = partial(attend_by_heads, model.attend, cp)
        if model.joins_tokens:
            model.register_forward_hook(lambda _module, _args, out: JoinTokens.apply(out, cp))


def deal(rope, num_text_tokens, parts):
    """Tables for (text | image), reordered to (text, image) of the first of so many parts, of the
    second, …
    """
    if parts == 1:
        return rope
    streams = [table.split([num_text_tokens, len(table) - num_text_tokens]) for table in rope]
    return tuple(
        torch.cat([piece for pair in zip(*(s.chunk(parts) for s in pair)) for piece in pair])
        for pair in streams
    )


def exchange(x, mesh, received=None, sent=None):
    """Send the i-th part of x to rank i and receive one from each, joined: differentiable.

    Parts are of equal length, or of the lengths `sent` and `received`.
    """
    return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, mesh.get_group())


def attend_by_heads(attend, mesh, q, k, v, rope):
    """`attend` for q, k, v (B, L/cp, N, D): for all tokens and N/cp heads, then (B, L/cp, N·D)."""
    ranks = mesh.size()
    heads = rearrange(torch.stack([q, k, v]), "three b l (c n) d -> c three b l n d", c=ranks)
    q, k, v = rearrange(exchange(heads, mesh), "c three b l n d -> three b (c l) n d")
    out = attend(q, k, v, rope)
    return rearrange(
        exchange(rearrange(out, "b (c l) h -> c b l h", c=ranks), mesh), "c b l h -> b l (c h)"
    )


def newest_name(*names):
    """The first of some names that this version of torch has a collective for."""
    return next(getattr(collectives, name) for name in names if hasattr(collectives, name))


class JoinTokens(torch.autograd.Function):
    """The parts (B, L/cp, C) of all ranks as (B, L, C). They go on alike, and gradients will be
    averaged: hence the factor.
    """

    @staticmethod
    def forward(ctx, x, mesh):
        ctx.mesh = mesh
        gather = newest_name("all_gather_single", "all_gather_tensor")
        return collectives.wait_tensor(gather(x.contiguous(), 1, mesh))

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(ctx.mesh.size(), dim=1)[
            ctx.mesh.get_local_rank()
        ] * ctx.mesh.size(), None


# --- activation checkpointing and compilation -----------------------------------------------------

SAVED = (
    # what selective checkpointing keeps: the linears' products and fused attention; the rest is
    # recomputed
    {
        getattr(torch.ops.aten, name).default
        for name in (
            "mm",
            "addmm",
            "linear",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
        if hasattr(torch.ops.aten, name)
    }
    | {torch.ops._c10d_functional.all_to_all_single.default}
)


def checkpoint_activations(model, kind):
    """Make blocks recompute their forward in the backward: all with "full", each k-th with "k", in
    part with "selective".
    """
    if kind == "none":
        return

    def policy(_context, operator, *_args, **_kwargs):
        return (
            CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
        )

    options = dict(
        use_reentrant=False, preserve_rng_state=False, early_stop=False
    )  # an early stop may leave a collective unwaited
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    blocks = [*model.double_blocks, *model.single_blocks]
    for block in blocks[:: _every(kind) or 1]:
        block.forward = partial(checkpoint, block.forward, **options)


def compile_blocks(model):
    """Compile each block by itself: one compilation serves all blocks of a kind."""
    for block in [*model.double_blocks, *model.single_blocks]:
        block.compile()
    return model


# --- modulation and FSDP2 -------------------------------------------------------------------------


class ScaleGradient(torch.autograd.Function):
    """x itself, with a gradient `factor` times its own."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def gather_rows(vec, mesh):
    """The rows (B, H) of all ranks, (ranks·B, H); the gradient of each rank's is the sum of
    theirs.
    """
    gather = newest_name("all_gather_single_autograd", "all_gather_tensor_autograd")
    return gather(vec.contiguous(), 0, mesh)


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


def modulate_spread(modulation, mesh, counts, order, dtype, vec):
    """`Modulation.forward` where each rank has some features of each linear, `counts` of them in
    all.

    The vectors travel, not the weights: each rank's rows vec (B, H) go to all, are multiplied by
    each rank's features, and come back whole as (B, features). That is one all-gather and one
    all-to-all of a few MB a sample. The weights' gradient, a sum over the rows of all ranks, is
    averaged as FSDP2 does. So few rows do not pay a cast of the weights: they compute in the
    weights' type, and only what travels is in `dtype`.
    """
    ranks, mine = mesh.size(), counts[mesh.get_local_rank()]
    linears = [(lin.weight.to_local(), lin.bias.to_local()) for lin in modulation.linears()]
    rows = ScaleGradient.apply(gather_rows(vec, mesh).to(linears[0][0].dtype), ranks)
    out = torch.cat([F.linear(rows, weight, bias) for weight, bias in linears], dim=-1)
    out = ScaleGradient.apply(out, 1 / ranks).to(dtype)
    out = rearrange(out, "(r b) f -> (r f) b", r=ranks)
    return exchange(out, mesh, counts, [mine] * ranks).index_select(0, order).T


def shard(model, mesh, config, dtype, spread):
    """FSDP2 over `mesh`: a unit for each block, for the modulation unless `spread`, for the two
    ends.

    Inputs are not cast: t, guidance and RoPE tables stay float32.
    """
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view"
    )  # nothing here writes to outputs in place
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
    options = dict(
        mesh=mesh,
        mp_policy=policy,
        offload_policy=offload,
        reshard_after_forward=config.reshard_after_forward,
    )
    blocks = [*model.double_blocks, *model.single_blocks]
    for block in blocks:
        fully_shard(block, **options)
    if not spread:
        fully_shard(model.modulation, **options)
    fully_shard(
        model, ignored_params=set(model.modulation.parameters()) if spread else None, **options
    )
    if config.prefetch:
        for order, prefetch in (
            (blocks, "set_modules_to_forward_prefetch"),
            (blocks[::-1], "set_modules_to_backward_prefetch"),
        ):
            for i, block in enumerate(order):
                getattr(block, prefetch)(order[i + 1 : i + 1 + config.prefetch])
    return model


def shard_frozen(model, blocks, mesh):
    """FSDP2 over `mesh` of a model that is only used: a unit for each of `blocks`, gathered when it
    is needed and freed at once.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compute_in(model, dtype, spread):
    """Mixed precision where there is nothing to shard: blocks and ends see their weights in `dtype`
    while they run.

    FSDP2 on one rank does the same with two more copies of everything, an eighth of a step on a
    CPU. The modulation computes in the type of its weights: so few rows pass through it that to
    cast them costs more than to use them. Where it is `spread` it does so already.
    """
    blocks = [*model.double_blocks, *model.single_blocks]
    inside = {p for block in blocks for p in block.parameters()} | set(
        model.modulation.parameters()
    )
    if not spread:
        forward, stored = model.modulation.forward, next(model.modulation.parameters()).dtype
        model.modulation.forward = partial(_as_stored, forward, stored, dtype)
    for part in (*blocks, model):
        owners = [
            (m, name)
            for m in part.modules()
            for name, p in m.named_parameters(recurse=False)
            if part is not model or p not in inside
        ]
        part.forward = partial(_with_cast, part.forward, owners, dtype)


def _as_stored(forward, stored, dtype, vec):
    return forward(vec.to(stored)).to(dtype)


def _with_cast(forward, owners, dtype, *args, **kwargs):
    kept = [module._parameters[name] for module, name in owners]
    for (module, name), p in zip(owners, kept):
        module._parameters[name] = p.to(dtype)
    try:
        return forward(*args, **kwargs)
    finally:
        for (module, name), p in zip(owners, kept):
            module._parameters[name] = p


def reduce_gradients(model, flag):
    """Whether the next backward reduces gradients over the ranks, or adds them up for a later one
    that does.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(flag)


def reshard(model):
    """Free gathered weights, which FSDP2 keeps after a forward without a backward: needed after
    writing to the sharded ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# --- weights and numbers --------------------------------------------------------------------------


def local_part(tensor):
    """The slices of the whole that this rank's part of a DTensor is; of another tensor all of
    it.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    begin, size = [0] * tensor.ndim, list(tensor.shape)
    splits = [
        s
        for s in zip(
            tensor.device_mesh.shape, tensor.device_mesh.get_coordinate(), tensor.placements
        )
        if hasattr(s[2], "dim")
    ]
    for ranks, number, placement in sorted(splits, key=lambda s: hasattr(s[2], "split_factor")):
        # FSDP2 splits what tensor parallelism has split, though its mesh dimension comes first:
        # that is what split_factor says
        step = -(-size[placement.dim] // ranks)
        offset = min(number * step, size[placement.dim])
        begin[placement.dim] += offset
        size[placement.dim] = min(step, size[placement.dim] - offset)
    return tuple(slice(first, first + count) for first, count in zip(begin, size))


@torch.no_grad()
def fill(model, weights, device=None):
    """Give a parallelized model its weights, on `device` where it is on meta yet; returns it.

    `weights` yields (name, whole values): no more than a few are whole in memory, on each rank.
    """
    if device is not None:
        model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name, values in weights:
        p = parameters[name]
        local = p.to_local() if isinstance(p, DTensor) else p
        local.copy_(values[local_part(p)])
    return model


def mean_over_ranks(value):
    """A float32 scalar tensor averaged over all ranks."""
    value = value.detach().float().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def wait_for_all():
    """Wait for the other ranks for as long as it takes: set-up may be much slower on one node than
    on another.
    """
    dist.barrier(group=dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def max_over_ranks(values):
    """The greatest of each of some numbers, a float tensor (n,), over all ranks: a list."""
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def gather_values(value):
    """What each rank has as `value`, a small Python object, as a list in their order;
    collective.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_rank_does(work):
    """What `work()` returns on rank 0, on every rank; collective.

    What a disk can cause there, `ValueError`, `OSError` or `MemoryError`, is raised on every rank.
    """
    if not dist.is_initialized():
        return work()
    told = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told = [(work(), None)]
        except (ValueError, OSError, MemoryError) as error:
            told = [(None, error)]
    dist.broadcast_object_list(told)
    result, error = told[0]
    if error is not None:
        raise error
    return result
