"""Run by `test_processes.py`, under torchrun or alone: steps whose gradient is not finite, on one
rank or on all.

    python -m torch.distributed.run --nproc_per_node 2 tests/poison.py

Fails with an `AssertionError` that names the case.
"""

from contextlib import contextmanager
from functools import partial
from itertools import count
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
    clip, calls = optim.clip_gradients, count(1)

    def poison(model, *rest):
        if next(calls) == call and dist.get_rank() == dist.get_world_size() - 1:
            p = next(
                p for p in model.parameters() if p.grad is not None and local_part(p.grad).numel()
            )
            local_part(p.grad).view(-1)[0] = value
        return clip(model, *rest)

    with mock.patch.object(optim, "clip_gradients", poison):
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
        assert loop.read_flags(run, {"number": 0}, norm) == (None, False)
    _, norm = training_step.train_step(run, next(batches), 1)
    after = state_of(run)
    assert torch.isfinite(norm) and all(torch.isfinite(value).all() for value in after.values())
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2, f"{options} {kind}: {len(moved)} moved"


def check_samples():
    """An error names the samples of the rank whose loss is bad, on all ranks."""
    last = dist.get_world_size() - 1
    loss = torch.tensor(float("inf") if dist.get_rank() == last else 1.0)
    try:
        loop.check_finite(
            False, loss, loss, 7, [{"keys": [f"sample {dist.get_rank()}"]}], "nowhere"
        )
    except ValueError as error:
        assert f"the loss of step 7 is inf; its samples: sample {last}. Try" in str(error), error
    else:
        raise AssertionError("a bad step was accepted")


def main():
    torch.set_num_threads(1)
    for options in MESHES[parallel.world_size()].values():
        for kind, accumulation in (("adamw", 1), ("muon", 2)):
            check_poisoned_steps(options, kind, accumulation)
    check_samples()
    parallel.stop_ranks()


if __name__ == "__main__":
    main()
