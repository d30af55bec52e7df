"""The process group, and its ranks as a mesh of dp_replicate x dp_shard x cp x tp, tp innermost."""

import logging
import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fluxlite.cli.devices import memory_bytes
from fluxlite.parallel.ranks import gather_values, num_nodes, patient_group, world_size

log = logging.getLogger("fluxlite")


@dataclass
class Mesh:
    """A run's ranks, seen as each kind of parallelism needs them."""

    fsdp: DeviceMesh  # (dp_shard·cp,), or with HSDP (dp_replicate, dp_shard·cp)
    cp: DeviceMesh
    tp: DeviceMesh
    shards: DeviceMesh  # (dp_shard·cp·tp,): the ranks that share one copy of the weights
    node: DeviceMesh  # the ranks of this machine
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


def check_nodes():
    """Raise `ValueError` unless all nodes have as many ranks, which is counted on. Collective."""
    here = sorted({*gather_values(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))})
    if len(here) > 1:
        counts = " and ".join(map(str, here))
        raise ValueError(
            f"nodes of this run have {counts} ranks: give all the same --nproc_per_node of torchrun"
        )


STATE_SHARE = 0.6  # of a device's memory; the rest is for activations and gathered blocks


def settle_copies(config, state_of, memory):
    """A `ParallelConfig` with parallel.dp_replicate=-1 replaced: by the number of nodes, where a
    node's ranks can hold a copy and tp x cp divides them, else by 1; the log says which.

    `state_of` gives the bytes of each rank's state where so many ranks share a copy. Each has
    `memory`.
    """
    nodes, per_node = num_nodes(), world_size() // num_nodes()
    if config.dp_replicate != -1 or config.dp_shard != -1 or nodes == 1:
        return config
    if per_node % (config.tp * config.cp):
        said = f"parallel.tp x parallel.cp does not divide a node's {per_node} ranks"
        copies = 1
    else:
        state = state_of(per_node)
        copies = nodes if state <= STATE_SHARE * memory else 1
        said = (
            f"a copy on a node's {per_node} ranks takes {state / 1e9:.1f} GB of each rank's "
            f"{memory / 1e9:.0f}, where up to {STATE_SHARE:.0%} are for it"
        )
    log.info("parallel.dp_replicate=%d on %d nodes: %s", copies, nodes, said)
    return replace(config, dp_replicate=copies)


def least_memory(device, offload):
    """Bytes that each rank may keep its state in, the least of all ranks: the GPU's or, with
    `offload` and on CPUs, a share of the machine's. Collective.
    """
    if device.type == "cuda" and not offload:
        return min(gather_values(memory_bytes(device)))
    here = world_size() // num_nodes()
    return min(gather_values(memory_bytes(torch.device("cpu")) // here))


def start_ranks(config, device, state_of=None):
    """Join torchrun's process group, or make one of this process alone: (device, `Mesh`).

    `state_of` is as in `settle_copies`, which is asked where it is given.
    """
    timeout = timedelta(seconds=config.timeout_s)
    device = join_group(device, timeout)
    if state_of:
        config = settle_copies(config, state_of, least_memory(device, config.cpu_offload))
    mesh = make_mesh(config, device)
    for part in (mesh.fsdp, mesh.cp, mesh.tp, mesh.shards, mesh.node, mesh.world):
        limit_waits(part, timeout)
    return device, mesh


def join_group(device, timeout):
    """Join torchrun's process group, or make one of this process alone; returns this process's
    device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        device = own_gpu()
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device.type]
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
        if "RANK" in os.environ:
            check_launcher()
            alone = {}
        dist.init_process_group(backend, timeout=timeout, **alone)
    check_nodes()
    return device


def limit_waits(mesh, timeout):
    """Have ranks of a mesh wait so long for each other: new groups have their backend's default."""
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def own_gpu():
    """The GPU of this process on its machine; raises `ValueError` where there are too few."""
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"device=cuda: process {number + 1} of this machine has no GPU, of which there are "
            f"{count}: torchrun --nproc_per_node {count}"
        )
    return torch.device("cuda", number)


def silence_remarks():
    """Keep DTensor's remarks to itself: on gloo, and on its own use of two meshes."""
    for name in ("_collective_utils", "_redistribute"):
        logging.getLogger(f"torch.distributed.tensor.{name}").setLevel(logging.ERROR)


def share_ranks(config, device):
    """Join the process group as ranks that draw, of a `SharingConfig`: a mesh of groups x cfg x cp
    x tp, and a group of all ranks that waits as long as it takes.

    Ranks that share a picture wait `timeout_s` for each other. But one may have drawn all of its
    pictures long before the others.
    """
    silence_remarks()
    timeout = timedelta(seconds=config.timeout_s)
    device = join_group(device, timeout)
    sizes = (world_size() // config.ranks, config.cfg, config.cp, config.tp)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("groups", "cfg", "cp", "tp"))
    limit_waits(mesh, timeout)
    return mesh, patient_group()


def make_mesh(config, device):
    """The `Mesh` of a process group that exists."""
    silence_remarks()
    replicate, shard, cp, tp = config.sizes()
    by_tokens = init_device_mesh(
        device.type, (replicate * shard, cp, tp), mesh_dim_names=("dp", "cp", "tp")
    )
    by_weights = init_device_mesh(
        device.type, (replicate, shard * cp, tp), mesh_dim_names=("dp_replicate", "fsdp", "tp")
    )
    world = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("world",))
    return Mesh(
        fsdp=by_weights["dp_replicate", "fsdp"] if replicate > 1 else by_weights["fsdp"],
        cp=by_tokens["cp"],
        tp=by_weights["tp"],
        shards=by_weights["fsdp", "tp"]._flatten("shards") if tp > 1 else by_weights["fsdp"],
        node=node_mesh(device) if num_nodes() > 1 else world,
        world=world,
        dp_rank=by_tokens.get_local_rank("dp"),
        dp_size=replicate * shard,
    )


def node_mesh(device):
    """The ranks of this machine, of several with as many ranks each."""
    sizes = num_nodes(), dist.get_world_size() // num_nodes()
    return init_device_mesh(device.type, sizes, mesh_dim_names=("nodes", "node"))["node"]


def stop_ranks():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
