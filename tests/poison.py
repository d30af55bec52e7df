"""Run by `test_processes.py`, under torchrun or alone: steps whose gradient is not finite, on one
rank or on all.

    python -m torch.distributed.run --nproc_per_node 2 tests/poison.py

Fails with an `AssertionError` that names the case.
"""

import math
import os
import signal
import tempfile
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from meshes import MODEL, batches_of, random_weights
from reference import last_of_each
from torch.distributed.tensor import DTensor

from fluxlite import parallel
from fluxlite.cli.command_line import load_config
from fluxlite.settings import TrainConfig
from fluxlite.train import building, loop, optim, setup, training_step
from fluxlite.weights import run_folder

MESHES = {1: {"one": []}, 2: {"dp2": [], "tp2": ["parallel.tp=2"]}}


def local_part(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def state_of(run):
    """All numbers that a step may change, of this rank, copied."""
    named = {f"weight {name}": p for name, p in run.model.named_parameters()}
    named |= {f"average {name}": p for name, p in run.ema.average.items()}
    for number, optimizer in enumerate(run.optimizers):
        for place, state in enumerate(optimizer.state.values()):
            named |= {f"{number}.{place}.{key}": value for key, value in state.items()}
    return {name: local_part(value).clone() for name, value in named.items()}


@contextmanager
def poisoned_gradient(value, call=1):
    """One number of the last rank's gradient becomes `value` before the norm is taken for the
    `call`-th time.
    """
    take_norm, calls = optim.gradient_norm, count(1)

    def poison(groups, *rest):
        if next(calls) == call and dist.get_rank() == dist.get_world_size() - 1:
            gradients = (p.grad for _, parameters in groups for p in parameters)
            parts = (local_part(gradient) for gradient in gradients if gradient is not None)
            next(part for part in parts if part.numel()).view(-1)[0] = value
        return take_norm(groups, *rest)

    with mock.patch.object(optim, "gradient_norm", poison):
        yield


@contextmanager
def infinite_loss():
    """The last rank's loss becomes infinite, its gradient stays as it is."""
    step = training_step.optimizer_step

    def poison(run, number, loss):
        return step(
            run, number, loss + float("inf") * (dist.get_rank() == dist.get_world_size() - 1)
        )

    with mock.patch.object(training_step, "optimizer_step", poison):
        yield


POISONS = {
    "nan": partial(poisoned_gradient, float("nan")),
    "inf": partial(poisoned_gradient, float("inf")),
    "overflow": partial(poisoned_gradient, 3e38),
    "loss": infinite_loss,
}


def check_poisoned_steps(options, kind, accumulation):
    """A good step, then one of each poison, which changes no bit, then a good one, which does."""
    config = load_config(
        TrainConfig,
        "train",
        last_of_each([*MODEL, "data.micro_batch=1", f"optim.kind={kind}", *options]),
    )
    config.data.micro_batch = config.data.global_batch // (
        accumulation * (parallel.world_size() if not options else 1)
    )
    config.validate()
    with mock.patch.object(building, "random_weights", random_weights):  # none is zero, all move
        run = setup.set_up(config, *parallel.start_ranks(config.parallel, config.device))
    batches = batches_of(config, run)
    training_step.train_step(run, next(batches), 0)
    before = state_of(run)
    assert len(before) > 2 * len(dict(run.model.named_parameters()))
    for name, poison in POISONS.items():
        with poison():
            loss, norm = training_step.train_step(run, next(batches), 1)
        assert not torch.isfinite(norm) and torch.isfinite(loss), name
        after = state_of(run)
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert not changed, f"{options} {kind} {name}: {changed[:3]}"
        seen, _, *asked = loop.shared_numbers(loss, norm, {"number": 0}).tolist()
        assert not math.isfinite(seen) and asked == [0, 0]
    _, norm = training_step.train_step(run, next(batches), 1)
    after = state_of(run)
    assert torch.isfinite(norm) and all(torch.isfinite(value).all() for value in after.values())
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2, f"{options} {kind}: {len(moved)} moved"


def check_samples():
    """An error names the samples of the rank whose loss is bad, on all ranks."""
    last = dist.get_world_size() - 1
    loss = torch.tensor(float("inf") if dist.get_rank() == last else 1.0)
    launched = loop.LaunchedStep(7, [f"sample {dist.get_rank()}"], loss, 0.0, None)
    found = loop.describe_bad_step(launched, math.nan)
    assert found == f"loss of step 7 is inf; its samples: sample {last}.", found


def check_signals():
    """A signal that one rank was sent is known to all, and SIGTERM goes before SIGINT."""
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    caught = {"number": signal.SIGTERM if first else signal.SIGINT}
    numbers = loop.shared_numbers(torch.tensor(2.0), torch.tensor(3.0), caught).tolist()
    assert numbers == [3, 2 * ranks, 1, ranks - 1], numbers


def check_late_stop():
    """A signal that only the last rank is sent, while steps are read late, stops all after the same
    step.
    """
    real, last = loop.train_step, dist.get_rank() == dist.get_world_size() - 1

    def signalled(run, batches, step):
        if last and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, batches, step)

    [folder] = parallel.first_rank_does(lambda: [tempfile.mkdtemp()])
    config = load_config(
        TrainConfig,
        "train",
        last_of_each(
            [*MODEL, "data.micro_batch=1", "steps=9", "metrics.tensorboard=false"]
            + ["metrics.progress=false", f"output={folder}/run"]
        ),
    )
    late = mock.patch.object(loop, "reads_late", lambda device: True)
    with late, mock.patch.object(loop, "train_step", signalled):
        loop.train(config)
    step = run_folder.read_meta(Path(folder) / "run/checkpoints/last").step
    assert step == 4, step


def main():
    torch.set_num_threads(1)
    for options in MESHES[parallel.world_size()].values():
        for kind, accumulation in (("adamw", 1), ("muon", 2)):
            check_poisoned_steps(options, kind, accumulation)
    check_samples()
    check_signals()
    check_late_stop()
    parallel.stop_ranks()


if __name__ == "__main__":
    main()
