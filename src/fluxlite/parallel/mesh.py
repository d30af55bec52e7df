"""The process group, and its ranks as a mesh of dp_replicate x dp_shard x cp x tp, tp innermost."""

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


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
    """Raise `ValueError` where torchrun, in whose store ranks meet, is gone: they would wait."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(place, timeout=60).close()
    except OSError as error:
        raise ValueError(
            f"torchrun is gone: {place[0]}:{place[1]} does not answer ({error}). Start it again"
        ) from None


def start_ranks(config, device):
    """Join torchrun's process group, or make one of this process alone: (device, `Mesh`)."""
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device.type]
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
        if "RANK" in os.environ:
            check_launcher()
            alone = {}
        dist.init_process_group(backend, timeout=timeout, **alone)
    mesh = make_mesh(config, device)
    for part in (mesh.fsdp, mesh.cp, mesh.tp, mesh.world):
        for group in part.get_all_groups():
            # new groups have their backend's default
            dist.distributed_c10d._set_pg_timeout(timeout, group)
    return device, mesh


def make_mesh(config, device):
    """The `Mesh` of a process group that exists."""
    # DTensor's remarks on gloo, and on its own use of two meshes
    for name in ("_collective_utils", "_redistribute"):
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
    dp_rank = by_tokens.get_local_rank("dp")
    return Mesh(fsdp, by_tokens["cp"], by_weights["tp"], world, dp_rank, replicate * shard)


def stop_ranks():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
