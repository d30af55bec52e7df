"""What a run would take on ranks that one does not own: `predict_step`, from the real step on fake
tensors.

The model is wrapped, filled, trained and updated by the trainer's own functions; nothing is
computed and nothing is sent.
"""

import math
import os
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxlite import parallel
from fluxlite.cli.command_line import compose_config
from fluxlite.cli.devices import check_device_name
from fluxlite.data.images import POSTERIORS
from fluxlite.draw.pipeline import BESIDE_FOLDERS
from fluxlite.nets.latents import num_image_tokens
from fluxlite.parallel.host_memory import HOST_TENSORS
from fluxlite.parallel.weights import local_tensor
from fluxlite.settings import TrainConfig
from fluxlite.train.setup import FrozenParts, assemble_run, state_per_rank
from fluxlite.train.tasks import choose_task
from fluxlite.train.tasks.task import place_models
from fluxlite.train.training_step import optimizer_step, train_step
from fluxlite.weights.hub import TINY

# Bytes that a rank sends for each byte of the larger of its input and output, in a ring of n or
# pairwise: times (n - 1) / n.
COLLECTIVES = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}
NAMES = {  # torch's operators, those of functional collectives first
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
}


aten = torch.ops.aten
# where memory is looked at
HEAVY = (aten.mm, aten.addmm, aten.bmm, aten._fused_adamw_, aten.gelu_backward)
HEAVY += (aten.mul_, aten.bucketize, aten.lerp)  # what is dequantised, and a step in 8 bits


GROUPS = (str, dist.ProcessGroup, torch.ScriptObject)  # as which an operator is given its group


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends, {(collective, mesh dimension): bytes}, and the most
    that its tensors take at once.

    `groups` is {name of a process group: mesh dimension}. CommDebugMode of torch counts calls only.
    """

    def __init__(self, groups):
        super().__init__()
        self.groups, self.sent, self.calls = groups, Counter(), Counter()
        self.live, self.peak = {}, 0
        self.made = 0  # bytes of what is alive, each storage as large as it was made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its parts come here one by one
        if func.overloadpacket is aten._fused_sgd_:
            return None  # torch knows no fake one; it makes no tensor
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("_c10d_functional", "c10d", "_c10d_functional_autograd"):
            self._count(func, args, out)
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = weakref.ref(storage)
                self.made += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        # FSDP2 makes storages smaller behind our back: look at each where it matters
        if func.overloadpacket in HEAVY and self.made > self.peak:
            self.peak = max(self.peak, self.now())
        return out

    def _forget(self, storage, size):
        self.live.pop(storage, None)
        self.made -= size

    def reset(self):
        """Forget what has been counted."""
        self.sent.clear()
        self.calls.clear()
        self.peak = 0

    def now(self):
        """Bytes of all tensors alive but those that wait in host memory."""
        storages = [reference() for reference in list(self.live.values())]
        total = sum(storage.nbytes() for storage in storages if storage is not None)
        waiting = [tensor.untyped_storage() for tensor in [*HOST_TENSORS]]
        return total - sum(s.nbytes() for s in waiting if s._cdata in self.live)

    def _count(self, func, args, out):
        name = NAMES.get(func.overloadpacket._qualified_op_name.split("::")[1])
        if name is None:
            return
        names = (_group_name(a) for a in args if isinstance(a, GROUPS))  # the group comes first
        dimension, ranks = next(self.groups[n] for n in names if n in self.groups)
        size = max(local_bytes(tensors_in(part)) for part in (args, out))
        if name != "all_reduce" and func.namespace == "c10d":  # arguments hold output and input
            size = max(tensor.nbytes for tensor in tensors_in(args))
        self.calls[name, dimension] += 1
        self.sent[name, dimension] += size * COLLECTIVES[name] * (ranks - 1) // ranks


def tensors_in(tree):
    """The tensors in nested lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _group_name(group):
    if isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
    return group if isinstance(group, str) else group.group_name


def groups_of(mesh):
    """{name of a process group: (mesh dimension, ranks)} of a `parallel.Mesh`."""
    found = {}
    # of meshes that share a group the last names it
    for part in (mesh.world, mesh.shards, mesh.cp, mesh.tp, mesh.fsdp):
        for dimension in part.mesh_dim_names:
            group = part.get_group(dimension)
            found[group.group_name] = dimension, group.size()
    return found


@contextmanager
def fake_ranks(ranks, per_node):
    """A process group of so many ranks, of which this is rank 0 and the others are pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = dict(os.environ)
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(min(per_node, ranks)))
    try:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        yield
    finally:
        parallel.stop_ranks()
        os.environ.clear()
        os.environ.update(environment)


def predict_step(arguments, ranks, per_node=8, memory=80e9):
    """{"memory": bytes of each kind, "sent": {(collective, dimension): bytes}, "calls"} of one step
    of `train.py arguments` on nodes of `per_node` ranks, each of `memory` bytes.
    """
    if ranks > per_node and ranks % per_node:
        raise ValueError(f"--ranks {ranks} is no multiple of --per-node {per_node}, as nodes have")
    with fake_ranks(ranks, per_node):
        # which checks what makes no difference here
        check_device_name(compose_config(TrainConfig, "train", arguments).device or "cpu")
        config = compose_config(TrainConfig, "train", on_fake_ranks(arguments))
        name_parts(config)
        config.validate()
        config = config.settled()
        if config.optim.kind == "prodigy":
            raise ValueError(
                "optim.kind=prodigy looks at numbers, and here are none: predict adamw"
            )
        device = torch.device("cpu")
        state_of = partial(state_per_rank, config)
        config.parallel = parallel.settle_copies(config.parallel, state_of, memory)
        mesh = parallel.make_mesh(config.parallel, device)
        task = choose_task(config)
        models = [wrap(config, mesh) for wrap, _ in task.models]
        with FakeTensorMode(allow_non_fake_inputs=True), Traffic(groups_of(mesh)) as meter:
            models = [model.to_empty(device=device) for model in models]
            place_models(models, device, config.parallel.swap_blocks)
            run = assemble_run(config, device, mesh, task, models, FrozenParts())
            take_fake_steps(run, meter)
        sizes = config.parallel.sizes()  # of these ranks
    mesh = dict(zip(("dp_replicate", "dp_shard", "cp", "tp"), sizes))
    about = {"mesh": mesh, "dtype": config.dtype}
    memory = memory_of_run(run) | {"peak": meter.peak}
    return about | {"memory": memory, "sent": dict(meter.sent), "calls": dict(meter.calls)}


def memory_of_run(run):
    """Bytes of this rank's part of all that lives from step to step, but for what waits in host
    memory.
    """
    trained, *frozen = (list(model.parameters()) for model in run.models)
    states = []
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            states += state.values()
    return {
        "weights": local_bytes(trained),
        "frozen transformer": sum(map(device_bytes, frozen)),
        "gradients": local_bytes(p for p in trained if p.requires_grad),
        "optimizer": local_bytes(states),
        "average": local_bytes(run.ema.average.values()) if run.ema else 0,
    }


def take_fake_steps(run, meter):
    """Make the optimizer's state, which a step finds, then count one step."""
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer_step(run, 0, torch.ones(()))
    meter.reset()
    train_step(run, [made_up_batch(run)] * run.micro_batches, 1)


def on_fake_ranks(arguments):
    """The arguments of `train.py` for ranks that compute nothing: device, resume and the type of
    products do not matter.
    """
    ignored = "device=", "resume=", "compile=", "parallel.float8="
    kept = [a for a in arguments if not a.startswith(ignored)]
    typed = any(a.startswith("dtype=") for a in kept)
    return [*kept, "device=cpu"] if typed else [*kept, "device=cpu", "dtype=bfloat16"]


def name_parts(config):
    """Name what a run must have and a step does not see: encoders, autoencoder, tars.

    So a recipe is predicted as it stands.
    """
    for part in BESIDE_FOLDERS:
        setattr(config.model, part, getattr(config.model, part) or TINY)
    if config.data.kind in ("webdataset", "folder"):
        config.data.path = config.data.path or "tars"


def made_up_batch(run):
    """A micro-batch with all that any task may ask of one, as a cache would hold it, in the largest
    shape of the data's.
    """
    data, model = run.config.data, run.config.model
    height, width = max(sum(data.shapes(), []), key=math.prod)
    latents = run.config.latent_shape(height, width)
    size = data.micro_batch
    names = *sum(POSTERIORS.values(), ()), "posterior_noise"
    tokens = num_image_tokens(*latents[1:]), model.out_channels
    sample = {"indices": 0, "modes": 0, "mean": torch.empty(latents)}
    drawn = run.task.draw_inputs(run.config, sample)
    made = {name: value.expand(size, *value.shape) for name, value in drawn.items()}
    made |= {name: torch.randn(size, *latents) for name in names}
    return made | {
        "indices": range(size),
        "controls": torch.zeros(size, 3, height, width, dtype=torch.uint8),
        "modes": torch.zeros(size, dtype=torch.long),
        "txt": torch.randn(size, model.max_sequence_length, model.text_width),
        "pooled": torch.randn(size, model.pooled_width),
        "noise": torch.randn(size, *tokens),
        "t": torch.rand(size),
        "guidance": torch.rand(size),
    }


def device_bytes(tensors):
    """`local_bytes` of those that do not wait in host memory."""
    waiting = {tensor.untyped_storage()._cdata for tensor in [*HOST_TENSORS]}
    stored = ((tensor, local_tensor(tensor).untyped_storage()._cdata) for tensor in tensors)
    return local_bytes(tensor for tensor, storage in stored if storage not in waiting)


def local_bytes(tensors):
    """Bytes of this rank's parts of tensors."""
    return sum(local_tensor(tensor).nbytes for tensor in tensors)
