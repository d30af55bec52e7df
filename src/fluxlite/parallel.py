"""Parallelism, applied to a model from outside: process group, mesh, compilation and FSDP2, all in wrap order.

One process without torchrun is a mesh of one and runs the same code.
"""

import importlib.util
import os
import shutil
import warnings
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


@dataclass
class ParallelConfig:
    """The mesh."""

    dp_shard: int = field(default=-1, metadata={"help": "ranks that share one copy of the weights (FSDP2); -1: all that are left"})
    tp: int = field(default=1, metadata={"help": "tensor-parallel ranks"})
    reshard_after_forward: bool = field(
        default=True, metadata={"help": "free gathered weights between forward and backward: less memory, one more all-gather"}
    )
    timeout_s: int = field(default=600, metadata={"help": "seconds after which a rank that waits for another gives up"})

    def validate(self):
        if self.tp != 1:
            raise ValueError(f"parallel.tp={self.tp}: tensor parallelism is not in this version yet; set parallel.tp=1")
        if self.dp_shard not in (-1, world_size()):
            raise ValueError(f"parallel.dp_shard={self.dp_shard} must be the number of processes, {world_size()}, or -1")


def world_size():
    """Processes of this run, before and after the process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """This process's number, before and after the process group exists."""
    return int(os.environ.get("RANK", 0))


def default_device():
    """The machine's accelerator, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_compiler(device):
    """Raise `ValueError` where torch.compile has nothing to compile with: a C++ compiler on the CPU, Triton on a GPU."""
    if str(device).startswith("cuda"):
        if importlib.util.find_spec("triton") is None:
            raise ValueError("compile=true needs Triton on a GPU: pip install triton, or leave compile=false")
        return
    wanted = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (wanted, "clang++")):
        raise ValueError(f"compile=true needs a C++ compiler, and there is no {wanted}: install g++, or leave compile=false")


def compile_blocks(model):
    """Compile each block by itself: one compilation serves all blocks of a kind."""
    for block in [*model.double_blocks, *model.single_blocks]:
        block.compile()
    return model


def has_bf16(device):
    """Whether the device computes in bfloat16 in hardware."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def start(config, device):
    """Join torchrun's process group, or make one of this process alone; returns this rank's device and the mesh."""
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = {"cuda": "nccl", "cpu": "gloo"}[device.type], timedelta(seconds=config.timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device, init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model, mesh, config, dtype):
    """FSDP2 with a unit a block, as `config`, a `ParallelConfig`, says; float32 master weights and reduction, compute in `dtype`.

    Inputs are not cast: t, guidance and RoPE tables stay float32.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing here writes to outputs in place
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = dict(mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    for block in [*model.double_blocks, *model.single_blocks]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def reshard(model):
    """Free gathered weights, which FSDP2 keeps after a forward without a backward: needed after writing to the sharded ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def mean_over_ranks(value):
    """A float32 scalar tensor averaged over all ranks."""
    value = value.detach().float().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def any_rank(flag, device):
    """Whether `flag` is true on any rank."""
    value = torch.tensor(float(bool(flag)), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)
