"""Run by `test_parallel.py` under torchrun: training on every mesh that this number of ranks
allows, through the trainer itself.

    python -m torch.distributed.run --nproc_per_node 4 tests/meshes.py OUT.pt

Writes {name of the case: {"loss": of the first step, "gradients", and {"weights", "average"} after
each of `COMPARED` steps that it makes}}, all whole, float32.
"""

import copy
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from reference import last_of_each, randomise

from fluxlite import parallel
from fluxlite.cli import devices
from fluxlite.cli.command_line import load_config
from fluxlite.cli.processes import leave_process
from fluxlite.data.mock import MockSamples
from fluxlite.parallel import compilation, plan
from fluxlite.settings import TrainConfig
from fluxlite.train import building, optim, setup, training_step
from fluxlite.train.tasks import controlnet, lora

MODEL = [
    "data=mock",
    f"device={os.environ.get('FLUXLITE_MESH_DEVICE', 'cpu')}",
    "model.t5=null",
    "model.clip=null",
    "model.autoencoder=null",
    "model.num_double_blocks=1",
    "model.num_single_blocks=1",
    "model.num_heads=24",
    "model.hidden_size=192",
    "model.rope_axes=[2,2,4]",
    "model.in_channels=12",
    "model.out_channels=12",
    "model.text_width=20",
    "model.pooled_width=14",
    "model.max_sequence_length=8",
    "data.height=32",
    "data.width=64",
    "data.global_batch=8",
    "data.workers=0",
    "steps=10",
    "optim.warmup=0",
    "optim.lr=1e-3",
    "optim.clip=0.5",
    "optim.ema_decay=0.9",
    "flow.guidance=uniform[1,5]",
]

MESHES = {
    1: {"one": []},
    2: {
        "dp2": [],
        "tp2": ["tp=2"],
        "tp2, sequence parallel": ["tp=2", "sequence_parallel=true"],
        "cp2": ["cp=2"],
    },
    3: {"tp3": ["tp=3"]},
    4: {
        "dp4": [],
        "hsdp 2 x 2": ["dp_replicate=2"],
        "dp2 x tp2": ["tp=2"],
        "dp2 x cp2": ["cp=2"],
    },
}
PLAIN = ["dtype=float32"]
CONTROL = [
    *PLAIN,
    "controlnet=default",
    "controlnet.num_double_blocks=1",
    "controlnet.num_single_blocks=1",
    "controlnet.init_from_base=false",
]
# in part out of any gradient's reach
DOUBLES = [*CONTROL, "controlnet.num_single_blocks=0", "optim.weight_decay=0.5"]
# beside a modulation that is spread, and of all linears, the modulation's too
LORA = [*PLAIN, "lora=default", "lora.rank=3", "lora.alpha=2", "lora.dropout=0.25"]
DORA = [
    *PLAIN,
    "lora=default",
    "lora.targets=['*','*.proj_out:5']",
    "lora.rank=2",
    "lora.dora=true",
]
SEEN = {  # what kinds see beside noise
    "fill": [*PLAIN, "model.kind=fill"],
    "kontext": [*PLAIN, "model.kind=kontext", "data.control=png"],
}
SHORT_LORA = {"one, LoRA", "one, DoRA", "dp2, LoRA", "tp2, sequence parallel, DoRA"}
# text and image tokens, for float8
SIXTEEN = ["model.max_sequence_length=16", "data.height=64", "data.width=64"]
# after how many steps weights are compared: the suite makes the fewer, its slow part all
COMPARED = 4, 10
NAMED = "compiled:", "inductor:", "more:", "float8:"
# which the suite leaves to its slow part
LATER = {
    *(f"{name}, activation_checkpointing 2" for name in ("dp2", "tp2, sequence parallel", "cp2")),
    *(f"{name}, frozen" for name in ("tp2", "tp2, sequence parallel")),
    *(f"{name}, activation_checkpointing full" for name in ("dp2", "cp2")),
    *(f"{name}, activation_checkpointing selective" for name in ("dp2", "tp2, sequence parallel")),
    *(f"{name}, bfloat16" for name in ("dp2", "tp2, sequence parallel", "cp2", "tp3")),
    *("tp2, controlnet", "cp2, controlnet", "tp2, double blocks alone", "dp2, muon"),
    *("tp2, frozen, accumulation 2", "hsdp 2 x 2, accumulation 2", "dp2 x tp2, half trained"),
    *("dp2 x tp2, muon", "dp2 x cp2, accumulation 1, shard_modulation true"),
    *(f"dp2 x tp2, {what}" for what in ("accumulation 4", "double blocks alone", "bfloat16")),
    "dp4, bfloat16",
    "dp2 x cp2, bfloat16",
}
# accumulation, shard_modulation, and whether the suite leaves it to its slow part
COMBINATIONS = (1, "true", ""), (2, "false", ""), (1, "false", "more: "), (2, "true", "more: ")
# frozen weights lie in the compute dtype: also some of the modulation's linears, and of a linear
HALF = [
    "dtype=bfloat16",
    "optim.freeze=['double_blocks.*','modulation.img.*','modulation.single.*.weight','img_in.*']",
]


def cases(ranks):
    """{name: (options of parallel., accumulation, other options)} of all that this number of ranks
    trains.
    """
    found = {}
    for name, mesh in MESHES[ranks].items():
        for accumulation, sharded, kind in COMBINATIONS:
            options = [*mesh, f"shard_modulation={sharded}"]
            found[f"{kind}{name}, accumulation {accumulation}, shard_modulation {sharded}"] = (
                options,
                accumulation,
                PLAIN,
            )
        found[f"{name}, bfloat16"] = mesh, 1, ["dtype=bfloat16"]
        if name in ("one", "dp2", "tp2", "dp2 x tp2"):
            found[f"{name}, half trained"] = mesh, 1, HALF
        if name in ("one", "dp2", "tp2", "tp2, sequence parallel", "cp2", "dp2 x tp2"):
            found[f"{name}, controlnet"] = mesh, 1, CONTROL
        if name in ("one", "dp2", "tp2", "dp2 x tp2"):
            found[f"{name}, double blocks alone"] = mesh, 1, DOUBLES
        for kind, options in (("LoRA", LORA), ("DoRA", DORA)):
            case = f"{name}, {kind}"
            found[case if case in SHORT_LORA else f"more: {case}"] = mesh, 1, options
        for kind, options in SEEN.items():
            quick = name == "one" or (name, kind) == ("cp2", "kontext")
            found[f"{name}, {kind}" if quick else f"more: {name}, {kind}"] = mesh, 1, options
    if ranks == 2:
        found["more: cp2, accumulation 2, DoRA"] = ["cp=2"], 2, DORA
        checkpointed = ["tp=2", "activation_checkpointing=full"]
        found["more: tp2, accumulation 2, checkpointed, LoRA"] = checkpointed, 2, LORA
        for name in ("dp2", "tp2, sequence parallel", "cp2"):
            for kind in ("full", "2", "selective"):
                options = [*MESHES[2][name], f"activation_checkpointing={kind}"]
                found[f"{name}, activation_checkpointing {kind}"] = options, 1, PLAIN
        found["dp2, prefetch, no reshard"] = ["prefetch=2", "reshard_after_forward=false"], 1, PLAIN
        reduced = ["dtype=bfloat16", "parallel.reduce_dtype=bfloat16"]
        found["dp2, offloaded"] = found["dp2, prefetch, no reshard"]
        found["dp2, bfloat16 reduced in it"] = [], 2, reduced
    if ranks == 4:
        found["hsdp 2 x 2, accumulation 2"] = MESHES[4]["hsdp 2 x 2"], 2, PLAIN
        found["dp2 x tp2, accumulation 4"] = MESHES[4]["dp2 x tp2"], 4, PLAIN
        found["dp4 on two nodes"] = [], 1, PLAIN
        found["hsdp 2 x tp2"] = ["dp_replicate=2", "tp=2"], 1, PLAIN
        found["tp2 x cp2, sequence parallel"] = ["tp=2", "cp=2", "sequence_parallel=true"], 1, PLAIN
    if ranks in (1, 2):
        some = [
            "optim.trainable=['*_norm.weight','txt_in.*']",
            *PLAIN,
        ]  # of which tensor parallelism sums the gradients over ranks
        for mesh_name in ("one",) if ranks == 1 else ("tp2", "tp2, sequence parallel"):
            found[f"{mesh_name}, frozen"] = MESHES[ranks][mesh_name], 1, some
            found[f"{mesh_name}, frozen, accumulation 2"] = MESHES[ranks][mesh_name], 2, some
    if ranks == 1:
        found["one, accumulation 2, offloaded"] = [], 2, PLAIN
    for name in MESHES[ranks].keys() & {"one", "dp2"}:
        for kind in ("rowwise", "tensorwise"):
            emulated = ["dtype=bfloat16", f"parallel.float8={kind}", *SIXTEEN]
            found[f"float8: {name}, float8 {kind}"] = MESHES[ranks][name], 1, emulated
    for name in MESHES[ranks]:
        both = name in ("one", "dp2", "dp2 x tp2")
        for kind in ("muon", "muon in float64") if both else ("muon in float64",):
            quick = both or name in ("tp2", "tp3", "hsdp 2 x 2")
            case = MESHES[ranks][name], 1, [*PLAIN, "optim.kind=muon"]
            found[f"{name}, {kind}" if quick else f"more: {name}, {kind}"] = case
    found |= compiled_cases(ranks)
    return {f"more: {name}" if name in LATER else name: case for name, case in found.items()}


def compiled_cases(ranks):
    """The same of compiled blocks: each mesh with each checkpointing, `IN_SHORT` of them always,
    and with inductor's code.
    """
    found = {}
    for name, mesh in MESHES[ranks].items():
        for kind in ("none", "full", "2", "selective"):
            options = [*mesh, f"activation_checkpointing={kind}"]
            case = options, 1, [*PLAIN, "compile=true"]
            found[f"compiled: {name}, {kind}"] = case
            if (name, kind) in IN_SHORT:
                found[f"{name}, compiled, {kind}"] = found[f"inductor: {name}, {kind}"] = case
        for kind, options in (("LoRA", LORA), ("DoRA", DORA), *SEEN.items()):
            found[f"compiled: {name}, {kind}, none"] = mesh, 1, [*options, "compile=true"]
        if name in ("one", "dp2"):
            found[f"compiled: {name}, controlnet"] = mesh, 1, [*CONTROL, "compile=true"]
    return found


IN_SHORT = {("dp2", "selective"), ("tp2, sequence parallel", "full"), ("cp2", "selective")}


def configure(mesh, accumulation, rest):
    given = [*MODEL, "data.micro_batch=1", *(f"parallel.{m}" for m in mesh), *rest]
    config = load_config(TrainConfig, "train", last_of_each(given))
    replicate, shard, _, _ = config.parallel.sizes()
    config.data.micro_batch = config.data.global_batch // (replicate * shard * accumulation)
    config.validate()
    return config


def random_weights(model, seed, device, _values_of=None):
    """Non-trivial values for every parameter, the same for every mesh."""
    whole = randomise(copy.deepcopy(model).to_empty(device="cpu"), seed)
    return ((name, p.detach()) for name, p in whole.named_parameters())


def random_adapters(config, net, _device):
    return random_weights(net, config.seed, "cpu")


def whole(tensors):
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().float().clone()
        for name, t in tensors.items()
    }


def batches_of(config, run):
    """The micro-batches of each step, for this rank."""
    data, model = config.data, config.model
    widths = dict(
        latent_shape=run.latent_shape, text_shape=(model.max_sequence_length, model.text_width)
    )
    samples = MockSamples(
        data, split="train", seed=config.seed, pooled_width=model.pooled_width, **widths
    )
    loader = run.loader(samples, global_batch=data.global_batch, start_index=0)
    while True:
        yield [next(loader) for _ in range(run.micro_batches)]


def train(config, steps):
    """The figures of a short run of this many steps."""
    with (
        mock.patch.object(building, "random_weights", random_weights),
        mock.patch.object(controlnet, "random_weights", random_weights),
        mock.patch.object(lora, "unchanging_weights", random_adapters),
    ):
        state_of = partial(setup.state_per_rank, config)
        run = setup.set_up(config, *parallel.start_ranks(config.parallel, config.device, state_of))
    figures, loaded = {"mesh": (*run.mesh.fsdp.shape,), "steps": steps}, batches_of(config, run)
    real_step = training_step.optimizer_step

    def update(run, step, loss):
        if step == 0:
            figures["gradients"] = whole(
                {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
            )
        return real_step(run, step, loss)

    with mock.patch.object(training_step, "optimizer_step", update):
        for step in range(steps):
            loss, norm = training_step.train_step(run, next(loaded), step)
            if step == 0:
                dist.all_reduce(loss)
                mean = loss.item() / dist.get_world_size()
                figures |= {"loss": mean, "norm": norm.item()}
            if step + 1 in COMPARED:
                weights = whole(dict(run.model.named_parameters()))
                figures[step + 1] = {"weights": weights, "average": whole(run.ema.average)}
    figures["trained"] = sorted(name for name, p in run.model.named_parameters() if p.requires_grad)
    return figures


@contextmanager
def counting_graphs(name):
    """{"graphs": how many are made for each kind of block, "runs": how often they run, "breaks"} of
    a case's compiled blocks.
    """
    backend = "inductor" if name.startswith("inductor") else "aot_eager"
    found = {"graphs": Counter(), "runs": Counter(), "breaks": 0}

    def lower(kind, graph, inputs):
        found["graphs"][kind.__name__] += 1
        lowered = torch._dynamo.lookup_backend(backend)(graph, inputs)

        def run(*inputs):
            found["runs"][kind.__name__] += 1
            return lowered(*inputs)

        return run

    if "compiled" not in name and backend != "inductor":
        yield {}
        return
    torch.compiler.reset()
    with mock.patch.object(compilation, "lower_graph", lower):
        yield found
    found["breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())


def plain_autograd(config):
    """The first step's loss and gradients of a Flux that nothing is wrapped around."""
    with (
        mock.patch.object(parallel, "parallelize", lambda model, *_args, **_options: model),
        mock.patch.object(
            parallel,
            "fill_weights",
            lambda model, _weights, device: randomise(model.to_empty(device=device), config.seed),
        ),
    ):
        run = setup.set_up(config, *parallel.start_ranks(config.parallel, config.device))
    gradients = {}

    def update(run, _step, _loss):
        gradients.update({name: p.grad.clone() for name, p in run.model.named_parameters()})

    with mock.patch.object(training_step, "optimizer_step", update):
        loss, _ = training_step.train_step(run, next(batches_of(config, run)), 0)
    return {"loss": loss.item(), "gradients": gradients}


def main():
    """All cases of this number of ranks whose names start as the arguments say; those of `NAMED`
    only where they are named.
    """
    torch.set_num_threads(1)
    devices.has_float8 = lambda device: True  # a CPU emulates it
    ranks, figures, names = parallel.world_size(), {}, tuple(sys.argv[2:])
    steps = max(COMPARED) if names or ranks == 1 else min(COMPARED)
    on_gpu = torch.cuda.is_available()  # without one nothing can be pinned
    policy = partial(plan.CPUOffloadPolicy, pin_memory=on_gpu)
    for name, case in cases(ranks).items():
        if name.startswith(names) if names else not name.startswith(NAMED):
            began = time.perf_counter()
            inexact = optim.orthogonalise_matrices
            exact = partial(inexact, dtype=torch.float64) if "in float64" in name else inexact
            counted = mock.Mock(side_effect=exact)
            nodes = {"LOCAL_WORLD_SIZE": "2"} if "two nodes" in name else {}
            with (
                counting_graphs(name) as graphs,
                mock.patch.object(optim, "orthogonalise_matrices", counted),
                mock.patch.dict(os.environ, nodes),
                mock.patch.object(plan, "CPUOffloadPolicy", policy),
            ):
                config = configure(*case)
                config.parallel.cpu_offload = "offloaded" in name  # which a CPU refuses
                figures[name] = train(config, steps)
            figures[name] |= graphs  # whose breaks are counted by now
            calls = torch.tensor(sum(len(call.args[0]) for call in counted.call_args_list))
            dist.all_reduce(calls)
            figures[name]["orthogonalised"] = calls.item()
            print(f"{time.perf_counter() - began:.1f} s  {name}", flush=True)
    if ranks == 1 and not names:
        figures["plain autograd"] = plain_autograd(configure([], 1, PLAIN))
    if parallel.rank() == 0:
        torch.save(figures, sys.argv[1])
    parallel.stop_ranks()
    leave_process(0)


if __name__ == "__main__":
    main()
