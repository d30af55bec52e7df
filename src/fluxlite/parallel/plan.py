"""How a model is wrapped: `parallelize` has the order in view."""

import warnings
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from fluxlite.nets.quantized import quantize_model
from fluxlite.parallel.compilation import blocks_of, checkpoint_activations, compile_blocks
from fluxlite.parallel.exchange import SumGradient
from fluxlite.parallel.float8 import train_in_float8
from fluxlite.parallel.modulation import spread_modulation, stored_dtype
from fluxlite.parallel.tensor_parallel import shard_heads
from fluxlite.parallel.tokens import share_tokens
from fluxlite.parallel.weights import fill_weights, local_part


def parallelize(model, mesh, config, dtype, *, compile=False):
    """Wrap a model as `config` says: float8 → tp → cp → modulation → compile → checkpointing →
    FSDP2.

    The model, on any device or meta, has double_blocks, single_blocks and a modulation. Compute is
    in `dtype`; trained weights and gradients stay float32. `fill_weights` then gives a model on
    meta its weights.
    """
    trained = any(p.requires_grad for p in model.parameters())
    streamed = config.swap_blocks > 0 and not trained  # whole on each rank, from its host's memory
    if config.float8 != "none" and trained:
        train_in_float8(model, config.float8)
    if mesh.tp.size() > 1:
        shard_heads(model, mesh.tp, sequence=config.sequence_parallel)
    if mesh.cp.size() > 1 or config.sequence_parallel:
        share_tokens(model, mesh.cp, mesh.tp if config.sequence_parallel else None)
    # FSDP2 does the offloading
    alone = streamed or mesh.fsdp.size() == 1 and not config.cpu_offload
    spread = config.shard_modulation and mesh.world.size() > 1 and not streamed
    if spread:
        spread_modulation(model.modulation, mesh.world, dtype)
    checkpointing = config.activation_checkpointing
    if compile:
        compile_blocks(model, checkpointing)
    if alone:
        compute_in(model, dtype, spread)
    if not (compile and checkpointing == "selective"):  # which is in the graphs already
        checkpoint_activations(model, checkpointing, config.activation_offload)
    if config.sequence_parallel:
        model.modulation.register_forward_hook(
            lambda _module, _args, out: SumGradient.apply(out, mesh.tp)
        )
    return model if alone else shard_weights(model, mesh.fsdp, config, dtype, spread)


# --- drawing -------------------------------------------------------------------------------------


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


# --- FSDP2 ---------------------------------------------------------------------------------------


def shard_weights(model, mesh, config, dtype, spread):
    """FSDP2 over `mesh`: a unit for each block, for the modulation unless `spread`, for the ends.

    Inputs are not cast: t, guidance and RoPE tables stay float32.
    """
    # nothing here writes to outputs in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    reduced = getattr(torch, config.reduce_dtype)
    # what is frozen lies in `dtype` already, but for scales, which stay float32
    cast = dtype if any(p.requires_grad for p in model.parameters()) else None
    precision = dict(param_dtype=cast, reduce_dtype=reduced, cast_forward_inputs=False)
    options = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(**precision),
        offload_policy=CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        reshard_after_forward=config.reshard_after_forward,
    )
    for block in blocks_of(model):
        fully_shard(block, **options)
    if not spread:
        fully_shard(model.modulation, **options)
    elsewhere = set(model.modulation.parameters()) if spread else None
    fully_shard(model, ignored_params=elsewhere, **options)
    if config.prefetch:
        prefetch_blocks(blocks_of(model), config.prefetch)
    return model


def prefetch_blocks(blocks, count):
    """Gather so many blocks ahead of the one that computes, in the forward and in the backward."""
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + count])
        block.set_modules_to_backward_prefetch(blocks[max(0, i - count) : i][::-1])


def shard_frozen(model, blocks, mesh):
    """FSDP2 over `mesh` of a model that is only used: a unit for each of `blocks`."""
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reduce_gradients(model, last):
    """How the next backward, the `last` of a step or one before it, reduces gradients over ranks.

    Each adds them up over the ranks that share the weights, so that none holds more of them than
    its part. Only the last does so over the copies of the weights (HSDP).
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def reshard(model):
    """Free gathered weights, which FSDP2 keeps after a forward without a backward.

    This is needed after writing to the sharded ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# --- mixed precision on one rank -----------------------------------------------------------------


def compute_in(model, dtype, spread):
    """Mixed precision on one rank: blocks and ends see their weights in `dtype` while they run.

    FSDP2 on one rank does the same with two more copies of everything, an eighth of a step on a
    CPU. The modulation computes in the type of its weights, unless some are frozen and some are
    not: so few rows pass through it that to cast them costs more than to use them. Where it is
    `spread` it does so already.
    """
    blocks, modulation = blocks_of(model), model.modulation
    inside = {*modulation.parameters()}.union(*(block.parameters() for block in blocks))
    if not spread:
        stored, forward = stored_dtype(modulation.parameters(), dtype), modulation.forward
        if any(p.dtype != stored for p in modulation.parameters()):
            forward = partial(_with_cast, forward, _owners(modulation, ()), stored)
        modulation.forward = partial(_as_stored, forward, stored, dtype)
    for block in blocks:
        block.forward = partial(_with_cast, block.forward, _owners(block, ()), dtype)
    model.forward = partial(_with_cast, model.forward, _owners(model, inside), dtype)


def _owners(part, elsewhere):
    """(module, name) of each trained parameter of a part of a model, without those elsewhere; what
    is frozen lies in the compute dtype already, but for scales of quantised weights.
    """
    found = []
    for module in part.modules():
        own = module.named_parameters(recurse=False)
        found += [(module, name) for name, p in own if p.requires_grad and p not in elsewhere]
    return found


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
