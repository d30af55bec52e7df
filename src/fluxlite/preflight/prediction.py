"""What a run would take on ranks that one does not own: `predict`, from the real step on fake
tensors.

The model is wrapped, filled, trained and updated by the trainer's own functions; nothing is
computed and nothing is sent.
"""

import os
import weakref
from collections import Counter

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxlite import parallel
from fluxlite.cli.command_line import load_config
from fluxlite.nets.latents import num_image_tokens
from fluxlite.settings import TrainConfig
from fluxlite.train import loop

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
HEAVY = (
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten._fused_adamw_,
    aten.gelu_backward,
)  # where memory is looked at


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends, {(collective, mesh dimension): bytes}, and the most
    that its tensors take at once.

    `groups` is {name of a process group: mesh dimension}. CommDebugMode of torch counts calls only.
    """

    def __init__(self, groups):
        super().__init__()
        self.groups, self.sent, self.calls = groups, Counter(), Counter()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its parts come here one by one
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("_c10d_functional", "c10d", "_c10d_functional_autograd"):
            self._count(func, args, out)
        for tensor in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = weakref.ref(storage)
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        if func.overloadpacket in HEAVY:
            self.peak = max(
                self.peak, self.now()
            )  # FSDP2 resizes storages behind our back: look when it matters
        return out

    def reset(self):
        """Forget what has been counted."""
        self.sent.clear()
        self.calls.clear()
        self.peak = 0

    def now(self):
        """Bytes of all tensors alive."""
        return sum(
            storage.nbytes()
            for storage in (ref() for ref in list(self.live.values()))
            if storage is not None
        )

    def _count(self, func, args, out):
        name = NAMES.get(func.overloadpacket._qualified_op_name.split("::")[1])
        if name is None:
            return
        group = next(
            a
            for a in args
            if isinstance(a, (str, dist.ProcessGroup, torch.ScriptObject))
            and _group_name(a) in self.groups
        )
        dimension, ranks = self.groups[_group_name(group)]
        size = max(
            sum(t.nbytes for t in tree_leaves(part) if isinstance(t, torch.Tensor))
            for part in (args, out)
        )
        if (
            name != "all_reduce" and func.namespace == "c10d"
        ):  # output and input are both among the arguments
            size = max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        self.calls[name, dimension] += 1
        self.sent[name, dimension] += size * COLLECTIVES[name] * (ranks - 1) // ranks


def _group_name(group):
    if isinstance(group, str):
        return group
    return (
        dist.ProcessGroup.unbox(group) if isinstance(group, torch.ScriptObject) else group
    ).group_name


def groups_of(mesh):
    """{name of a process group: (mesh dimension, ranks)} of a `parallel.Mesh`."""
    found = {}
    for part in (
        mesh.world,
        mesh.cp,
        mesh.tp,
        mesh.fsdp,
    ):  # of meshes that share a group the last names it
        for dimension in part.mesh_dim_names:
            group = part.get_group(dimension)
            found[group.group_name] = dimension, group.size()
    return found


def predict(arguments, ranks):
    """{"memory": bytes of each kind, "sent": {(collective, dimension): bytes}, "calls"} of one step
    of `train.py arguments`.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = dict(os.environ)
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks))
    try:
        config = load_config(TrainConfig, "train", on_fake_ranks(arguments))
        about = {
            "mesh": dict(zip(("dp_replicate", "dp_shard", "cp", "tp"), config.parallel.sizes())),
            "dtype": config.dtype,
        }
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        device = torch.device("cpu")
        mesh = parallel.make_mesh(config.parallel, device)
        beside = config.controlnet.train
        model = loop.wrap_controlnet(config, mesh) if beside else loop.wrap_flux(config, mesh)
        base = loop.wrap_flux(config, mesh, frozen=True) if beside else None
        with FakeTensorMode(allow_non_fake_inputs=True), Traffic(groups_of(mesh)) as meter:
            model, base = (part and part.to_empty(device=device) for part in (model, base))
            run = loop.assemble(config, device, mesh, model, loop.Parts(None, None), base=base)
            parameters = list(run.model.parameters())
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            loop.update(
                run, 0, torch.ones(())
            )  # makes the optimizer's state, which later steps find
            meter.reset()
            step(run, config)
            loop.update(run, 1, torch.ones(()))
    finally:
        parallel.stop_ranks()
        os.environ.clear()
        os.environ.update(environment)
    states = [
        t
        for optimizer in run.optimizers
        for state in optimizer.state.values()
        for t in state.values()
    ]
    memory = {
        "weights": local_bytes(parameters),
        "frozen transformer": local_bytes(base.parameters()) if base else 0,
        "gradients": local_bytes(p for p in parameters if p.requires_grad),
        "optimizer": local_bytes(states),
        "average": local_bytes(run.ema.average.values()) if run.ema else 0,
        "peak": meter.peak,
    }
    return about | {"memory": memory, "sent": dict(meter.sent), "calls": dict(meter.calls)}


def on_fake_ranks(arguments):
    """The arguments of `train.py` for ranks that compute nothing: device and resume do not
    matter.
    """
    kept = [a for a in arguments if not a.startswith(("device=", "resume="))]
    typed = any(a.startswith("dtype=") for a in kept)
    return [*kept, "device=cpu"] if typed else [*kept, "device=cpu", "dtype=bfloat16"]


def step(run, config):
    """The forwards and backwards of a training step on made-up samples."""
    data, model, control, size = (
        config.data,
        config.model,
        config.controlnet,
        config.data.micro_batch,
    )
    tokens = num_image_tokens(data.height // 8, data.width // 8)
    slices = data.global_batch // (size * run.mesh.dp_size)
    for i in range(slices):
        parallel.reduce_gradients(run.model, i == slices - 1)
        x0, noise = (
            torch.randn(size, tokens, model.in_channels),
            torch.randn(size, tokens, model.in_channels),
        )
        txt = torch.randn(size, model.max_sequence_length, model.text_width)
        pooled = torch.randn(size, model.pooled_width)
        steer = (
            {
                "hint": torch.randn(size, 3, data.height, data.width)
                if control.hint == "pixel"
                else x0
            }
            if run.base
            else {}
        )
        steer |= (
            {"mode": torch.zeros(size, dtype=torch.long)} if run.base and control.num_modes else {}
        )
        loss = loop.flow_loss(
            run,
            x0,
            txt,
            pooled,
            noise=noise,
            t=torch.rand(size),
            guidance=torch.ones(size),
            **steer,
        )
        (loss.mean() / slices).backward()


def local_bytes(tensors):
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
