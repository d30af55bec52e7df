"""Clipping, the moving average and what masks them, beside plain code; how few operators they
take.
"""

import copy
import math

import pytest
import torch
from reference import randomise
from torch.utils._python_dispatch import TorchDispatchMode

from fluxlite import parallel
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import Flux
from fluxlite.train import optim

SHAPE = FluxConfig(2, 2, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6))
DEV_DEPTH = FluxConfig(19, 38, 32, 2, 4, 4, 4, 8, 8, True, (4, 6, 6))


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    parallel.start_ranks(parallel.ParallelConfig(), "cpu")
    yield
    parallel.stop_ranks()


def model_with_gradients(seed=0, shape=SHAPE):
    model, generator = randomise(Flux(shape), seed), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


def step_with(optimizers, norm, clip, skipped=0.0):
    for optimizer in optimizers:
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.grad_scale = optim.clip_scale(norm, clip)
        optimizer.step()


def test_gathered_steps_are_torchs_bit_for_bit(monkeypatch):
    """Scaled, skipped, with fewer gradients than before, and gone on from a state."""
    ours, options = model_with_gradients(), dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    theirs = copy.deepcopy(ours)
    optimizers = [optim.GatheredAdamW(ours.parameters(), **options)]
    optimizers.append(torch.optim.AdamW(theirs.parameters(), fused=True, **options))
    own, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a: own.append(a[0]) or real(*a))
    for step, skipped in enumerate([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]):
        given = [p.grad for p in model_with_gradients(step).parameters()]
        if step in (3, 4):
            given[3] = None
        for model in (ours, theirs):
            for p, gradient in zip(model.parameters(), given):
                p.grad = None if gradient is None else gradient.clone()
        if step == 6:
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        step_with(optimizers, torch.tensor(3.0), clip=0.5, skipped=skipped)
        assert all(map(torch.equal, ours.parameters(), theirs.parameters())), step
        both = [[*o.state_dict()["state"].values()] for o in optimizers]
        assert all(torch.equal(a[n], b[n]) for a, b in zip(*both) for n in a), step
    assert own.count(optimizers[0]) == 4 and own.count(optimizers[1]) == 7


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("clip", [0.5, 1e6, 0])  # which scales, does not need to, is none
def test_clipped_steps_are_those_of_torchs_clipping(kind, clip):
    """Two steps: the moments of the first are the second's."""
    config = optim.OptimConfig(kind=kind, clip=clip, lr=1e-2)
    ours = model_with_gradients()
    theirs = copy.deepcopy(ours)
    our_optimizers, their_optimizers = (optim.make_optimizers(m, config) for m in (ours, theirs))
    for step in range(2):
        for model in (ours, theirs):
            for p, other in zip(model.parameters(), model_with_gradients(step).parameters()):
                p.grad = other.grad
        norm = optim.gradient_norm(optim.group_by_share(ours))
        step_with(our_optimizers, norm, clip)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or 1e9)
        for optimizer in their_optimizers:
            optimizer.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    bound = 1e-6 if kind == "adamw" else 2e-2  # Muon's iteration is in bfloat16
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert (a - b).norm() <= bound * b.norm() + 1e-7


def test_a_gradient_that_needs_no_clipping_is_not_rounded():
    """Divided by exactly 1, it gives the bits of a step without clipping."""
    results = []
    for clip in (1e6, 0):
        model = model_with_gradients()
        norm = optim.gradient_norm(optim.group_by_share(model))
        step_with(optim.make_optimizers(model, optim.OptimConfig()), norm, clip)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_parameters_without_a_gradient_count_as_zero():
    model = model_with_gradients()
    groups, whole = optim.group_by_share(model), optim.gradient_norm(optim.group_by_share(model))
    model.img_in.weight.grad = None
    rest = optim.gradient_norm(groups)
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert rest.item() == pytest.approx(torch.stack(norms).norm().item(), rel=1e-6)
    assert rest < whole


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_makes_the_norm_so(bad):
    groups = optim.group_by_share(model_with_gradients())
    assert optim.gradient_norm(groups, torch.tensor(2.0)).isfinite()
    assert not optim.gradient_norm(groups, torch.tensor(bad)).isfinite()


@pytest.mark.parametrize("step", [0, 3, 100, 100_000])
def test_the_moving_average_is_a_lerp_and_a_skipped_one_changes_no_bit(step):
    model = randomise(Flux(SHAPE), 0)
    ema = optim.EMA(model, 0.999)
    randomise(model, 1)
    decay = min(0.999, (2 + step) / (11 + step))
    before = {name: value.clone() for name, value in ema.average.items()}
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema.update(step, torch.tensor(1.0))
    assert all(torch.equal(ema.average[name], value) for name, value in before.items())
    ema.update(step, torch.tensor(0.0))
    for name, average in ema.average.items():
        expected = before[name].double().lerp(live[name].double(), 1 - decay)
        assert torch.allclose(average.double(), expected, rtol=1e-6, atol=1e-7), name
        assert not torch.equal(average, before[name])
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())


def test_swapping_exchanges_every_bit_and_twice_brings_all_back():
    model = randomise(Flux(SHAPE), 0)
    ema = optim.EMA(model, 0.999)
    randomise(model, 1)
    pairs = [(p, ema.average[name]) for name, p in model.named_parameters()]
    assert len(pairs) > 2 * optim.SWAPPED_AT_ONCE and len(pairs) % optim.SWAPPED_AT_ONCE
    before = [(p.detach().clone(), average.clone()) for p, average in pairs]
    for exchanged in (True, False):
        ema.swap()
        for (p, average), (live, mean) in zip(pairs, before):
            expected = (mean, live) if exchanged else (live, mean)
            assert torch.equal(p, expected[0]) and torch.equal(average, expected[1])


class OperatorCount(TorchDispatchMode):
    """Counts what is launched, a list of tensors at once."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_clipping_and_moving_average_are_a_few_operators_whatever_the_depth():
    counts = []
    for shape in (SHAPE, DEV_DEPTH):
        model = model_with_gradients(shape=shape)
        ema, groups = optim.EMA(model, 0.999), optim.group_by_share(model)
        with OperatorCount() as counted:
            norm = optim.gradient_norm(groups, torch.tensor(1.0))
            optim.clip_scale(norm, 1.0)
            ema.update(5, (~norm.isfinite()).float())
        counts.append(counted.count)
    assert counts[0] == counts[1] <= 20, counts
