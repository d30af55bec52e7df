"""Moments in 8 bits and weights in bfloat16: beside AdamW, on two ranks, and what is refused."""

import importlib.util
import math
from functools import partial
from itertools import islice
from unittest import mock

import pytest
import torch
from meshes import batches_of, configure, random_weights
from on_ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fluxlite import parallel
from fluxlite.train import building, loop, run_state, setup, small_adamw, training_step

MATRIX = (96, 256)


def small_optimizer(p, bits=8, lr=1e-2):
    group = [{"params": [p], "weight_decay": 0.01}]
    about = dict(betas=(0.9, 0.95), eps=1e-8, bits=bits, numbers={p: 5})
    return small_adamw.SmallAdamW(group, lr=lr, **about)


def gradient_of(shape, step):
    """Rows of very different sizes, as gradients have."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator) * torch.logspace(-6, 0, shape[0])[:, None]


@pytest.mark.parametrize("signed", [True, False])
def test_moments_in_a_byte_are_the_nearest_levels(signed):
    levels = small_adamw.dynamic_levels(signed)
    assert len(levels.unique()) == 256 and levels.max() == 1 and (levels == 0).any()
    values = gradient_of(MATRIX, 0)
    values = values if signed else values.abs()
    codes, scales = small_adamw.encode_moments(values, 128, levels)
    found = small_adamw.decode_moments(codes, scales, levels)
    largest = scales.repeat_interleave(128, dim=1)
    gaps = levels.diff().max() / 2
    assert ((found - values).abs() <= (gaps + 1e-6) * largest).all()
    assert codes.nbytes + scales.nbytes == values.numel() * (1 + 4 / 128)
    again, _ = small_adamw.encode_moments(found, 128, levels)
    assert (codes != again).float().mean() < (0.01 if signed else 1e-9)  # no -1 among the levels


@pytest.mark.parametrize("bits, bound", [(32, 1e-6), (8, 0.02)])
def test_small_adamw_tracks_adamw(bits, bound):
    start = torch.randn(MATRIX, generator=torch.Generator().manual_seed(9))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        small_optimizer(ours, bits),
        torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01),
    )
    for step in range(50):
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = gradient_of(MATRIX, step)
            optimizer.step()
    moved = theirs.detach() - start
    assert (ours - theirs).norm() <= bound * moved.norm()
    assert (optimizers[0].state[ours]["mean"].dtype == torch.uint8) == (bits == 8)


def test_a_skipped_step_of_small_adamw_changes_no_bit():
    p = torch.nn.Parameter(torch.randn(MATRIX).bfloat16())
    optimizer = small_optimizer(p)
    p.grad = gradient_of(MATRIX, 0).bfloat16()
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[p].items()}
    weight, optimizer.found_inf = p.detach().clone(), torch.tensor(1.0)
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert torch.equal(p, weight)
    assert all(torch.equal(optimizer.state[p][name], value) for name, value in before.items())


def test_stochastic_rounding_is_unbiased_and_its_bits_are_uniform():
    values = torch.tensor([1.0, 1 + 1 / 1024, -3.7, 1e-30, 0.0])
    whole = (slice(0, 400), slice(0, 500))
    bits = small_adamw.element_bits(whole, 123456789, "cpu")
    assert bits.shape == (400, 500) and bits.min() >= 0 and bits.max() < 1 << 16
    counts = torch.bincount(bits.flatten() >> 8, minlength=256).float()
    assert ((counts - 781.25).square() / 781.25).sum() < 330  # chi-square of 255: 1 in 1,000
    assert abs(torch.corrcoef(torch.stack([bits[1:].flatten(), bits[:-1].flatten()]))[0, 1]) < 0.01
    for value in values:
        rounded = small_adamw.round_randomly(value.expand(400, 500).contiguous(), bits).double()
        near = value.bfloat16().double()
        step = (rounded.max() - rounded.min()).item()
        assert ((rounded - value.double()).abs() <= max(step, 0)).all()
        assert abs(rounded.mean() - value.double()) <= 4 * step / 2 / 200_000**0.5
        assert step > 0 or near == value


def test_another_step_or_parameter_has_other_bits_and_a_part_has_those_of_the_whole():
    whole = small_adamw.element_bits((slice(0, 64), slice(0, 32)), 77, "cpu")
    part = small_adamw.element_bits((slice(10, 20), slice(8, 16)), 77, "cpu")
    assert torch.equal(part, whole[10:20, 8:16])
    keys = [small_adamw.mix_key(step, number) for step in (1, 2) for number in (0, 1)]
    others = [small_adamw.element_bits((slice(0, 64), slice(0, 32)), key, "cpu") for key in keys]
    for i, one in enumerate(others):
        assert all((one == other).float().mean() < 0.01 for other in others[:i])


def stepped_parts(dtype, placements=None):
    """The weight and the state after three steps: of one rank, or of each of two that share it."""
    generator = torch.Generator().manual_seed(3)
    p = torch.nn.Parameter(torch.randn(97, 256, generator=generator).to(dtype))
    if placements:
        parallel.start_ranks(parallel.ParallelConfig(), "cpu")
        mesh = init_device_mesh("cpu", (2,))
        p = torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements))
    optimizer = small_optimizer(p)
    for step in range(3):
        gradient = gradient_of((97, 256), step).to(dtype)
        p.grad = distribute_tensor(gradient, mesh, placements) if placements else gradient
        optimizer.round_key = step + 1000
        optimizer.step()
    held = {"weight": p.detach()} | optimizer.state[p]
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in held.items()}


@pytest.mark.parametrize("axis", [0, 1])
def test_ranks_that_share_a_matrix_step_it_bit_for_bit_as_one(axis, tmp_path):
    expected = stepped_parts(torch.bfloat16)
    body = partial(stepped_parts, torch.bfloat16, [Shard(axis)])
    for found in on_ranks(2, body, tmp_path):
        assert found.keys() == expected.keys() and len(found) == 6
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_columns_that_do_not_divide_in_whole_blocks_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="blocks of 64 columns, which parallel.tp=2 splits"):
        configure(["tp=2"], 1, ["optim.kind=adamw8bit"])


@pytest.mark.parametrize(
    "options, told",
    [
        (["dtype=float32"], "needs dtype=bfloat16"),
        (["dtype=bfloat16", "optim.kind=muon", "optim.ema_decay=0"], "rounds to the nearest"),
        (["dtype=bfloat16"], "does not work with optim.ema_decay"),
    ],
)
def test_what_bfloat16_weights_cannot_do_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        configure([], 1, [*options, "optim.weights=bfloat16"])


SMALL = ["dtype=bfloat16", "optim.kind=adamw8bit", "optim.weights=bfloat16", "optim.ema_decay=0"]


def started(config):
    with mock.patch.object(building, "random_weights", random_weights):
        return setup.set_up(config, *parallel.start_ranks(config.parallel, "cpu"))


PRODIGY = ["dtype=float32", "optim.kind=prodigy", "optim.lr=1", "lora=default", "lora.rank=4"]


def test_prodigy_is_refused_by_what_it_needs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install prodigyopt"):
        configure([], 1, PRODIGY)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="set optim.lr=1"):
        configure([], 1, [*PRODIGY, "optim.lr=1e-4"])


@pytest.mark.parametrize("kind", ["adamw8bit", "prodigy"])
def test_a_run_is_gone_on_from_bit_for_bit(kind, tmp_path):
    if kind == "prodigy":
        pytest.importorskip("prodigyopt")
    options = SMALL if kind == "adamw8bit" else PRODIGY
    config = configure([], 1, [*options, f"output={tmp_path}"])
    run, found = started(config), []
    for step, batches in enumerate(islice(batches_of(config, run), 4)):
        if step == 2:
            loop.save_checkpoint(run, step)
            again = started(config)
            folder = tmp_path / "checkpoints" / "last"
            assert run_state.load_training(folder, **loop.trained_state(again)) == 2
        for each in (run, again) if step > 1 else (run,):
            found.append(training_step.train_step(each, batches, step))
    parallel.stop_ranks()
    assert found[2] == found[3] and found[4] == found[5]
    for (name, p), other in zip(run.model.named_parameters(), again.model.parameters()):
        assert torch.equal(p, other), name
    [state], [other] = ([o.state for o in each.optimizers] for each in (run, again))
    assert len(other) == len(state)
    if kind == "adamw8bit":
        kinds = {t.dtype for values in state.values() for t in values.values()}
        assert kinds == {torch.uint8, torch.float32} and p.dtype == torch.bfloat16
    else:
        assert run.optimizers[0].param_groups[0]["d"] > 1e-6  # it has found some
