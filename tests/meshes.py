"""Run by `test_parallel.py` under torchrun: training on every mesh that this number of ranks allows, through the trainer itself.

    python -m torch.distributed.run --nproc_per_node 4 tests/meshes.py OUT.pt

Writes {name of the case: {"loss": of the first step, "gradients", "weights" and "average" after ten}}, all whole, float32.
"""

import sys
import time
from unittest import mock

import torch
from reference import randomise

from fluxlite import parallel, trainer
from fluxlite.config import TrainConfig, load_config
from fluxlite.convert import Piece
from fluxlite.data import MockSamples
from fluxlite.model import Flux

MODEL = ["data=mock", "model.t5=null", "model.clip=null", "model.autoencoder=null", "model.num_double_blocks=2",
         "model.num_single_blocks=2", "model.num_heads=24", "model.hidden_size=192", "model.rope_axes=[2,2,4]",
         "model.in_channels=12", "model.out_channels=12", "model.text_width=20", "model.pooled_width=14",
         "model.max_sequence_length=8", "data.height=32", "data.width=64", "data.global_batch=8", "data.workers=0", "steps=10",
         "optim.warmup=0", "optim.lr=1e-3", "optim.clip=0.5", "optim.ema_decay=0.9", "flow.guidance=uniform[1,5]"]  # fmt: skip

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
        "hsdp 2x2": ["dp_replicate=2"],
        "dp2 x tp2": ["tp=2"],
        "dp2 x tp2, sequence parallel": ["tp=2", "sequence_parallel=true"],
        "dp2 x cp2": ["cp=2"],
        "hsdp 2 x tp2": ["dp_replicate=2", "tp=2"],
        "tp2 x cp2, sequence parallel": ["tp=2", "cp=2", "sequence_parallel=true"],
    },
}  # fmt: skip
CHECKPOINTING = {2: [[], ["tp=2", "sequence_parallel=true"], ["cp=2"]], 4: [["tp=2"]]}


def cases(ranks):
    """{name: command line} of all that this number of ranks trains."""
    found = {}
    for name, mesh in MESHES[ranks].items():
        for accumulation in (1, 2):
            for sharded in ("true", "false"):
                found[f"{name}, accumulation {accumulation}, shard_modulation {sharded}"] = (
                    mesh + [f"shard_modulation={sharded}"], accumulation, ["dtype=float32"])  # fmt: skip
        found[f"{name}, bfloat16"] = mesh, 1, ["dtype=bfloat16"]
        found[f"{name}, muon"] = mesh, 1, ["dtype=float32", "optim.kind=muon"]
    for mesh in CHECKPOINTING.get(ranks, ()):
        for kind in ("full", "2", "selective"):
            found[f"{' '.join(mesh) or 'dp'}, {kind} checkpointing"] = (
                [*mesh, f"activation_checkpointing={kind}"], 1, ["dtype=float32"])  # fmt: skip
    if ranks == 2:
        found["dp2, prefetch, no reshard"] = ["prefetch=2", "reshard_after_forward=false"], 1, ["dtype=float32"]
    return found


def configure(mesh, accumulation, rest):
    config = load_config(TrainConfig, "train", [*MODEL, "data.micro_batch=1", *(f"parallel.{m}" for m in mesh), *rest])
    replicate, shard, _, _ = config.parallel.sizes()
    config.data.micro_batch = config.data.global_batch // (replicate * shard * accumulation)
    config.validate()
    return config


def random_pieces(model, seed, device):
    """Non-trivial values for every parameter, the same for every mesh."""
    whole = randomise(Flux(model.config), seed)
    return ((Piece(name), p.detach()) for name, p in whole.named_parameters())


def whole(tensors):
    return {name: t.full_tensor().detach().float().clone() for name, t in tensors.items()}


def train(config, steps=10):
    """The figures of a short run."""
    with mock.patch.object(trainer, "random_pieces", random_pieces):
        run = trainer.set_up(config)
    data, model = config.data, config.model
    widths = dict(latent_shape=run.latent_shape, text_shape=(model.max_sequence_length, model.text_width))
    samples = MockSamples(data, split="train", seed=config.seed, pooled_width=model.pooled_width, **widths)
    loader = trainer.rank_loader(run, samples, global_batch=data.global_batch, start_index=0)
    slices = data.global_batch // (data.micro_batch * run.mesh.dp_size)
    figures = {}

    def update(run, step):
        if step == 0:
            figures["gradients"] = whole({name: p.grad for name, p in run.model.named_parameters()})
        return real_update(run, step)

    real_update = trainer.update
    with mock.patch.object(trainer, "update", update):
        for step in range(steps):
            loss, norm = trainer.train_step(run, [next(loader) for _ in range(slices)], step)
            if step == 0:
                figures |= {"loss": parallel.mean_over_ranks(loss).item(), "norm": norm.item()}
    parameters = dict(run.model.named_parameters())
    return figures | {"weights": whole(parameters), "average": whole(run.ema.average)}


def main():
    torch.set_num_threads(1)
    ranks, figures = parallel.world_size(), {}
    try:
        for name, case in ((n, c) for n, c in cases(ranks).items() if n.startswith(tuple(sys.argv[2:]) or "")):
            began = time.perf_counter()
            figures[name] = train(configure(*case))
            if parallel.rank() == 0:
                print(f"{time.perf_counter() - began:.1f} s  {name}", flush=True)
    finally:
        if parallel.rank() == 0:
            torch.save(figures, sys.argv[1])
        parallel.stop()


if __name__ == "__main__":
    main()
