import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from fluxlite.nets import flow
from fluxlite.nets.flow import FlowConfig

INDICES = range(4000)


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_schedule_matches_diffusers(tokens, steps):
    mu = calculate_shift(tokens)
    assert flow.time_shift_mu(tokens) == pytest.approx(mu, rel=1e-12)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    retrieve_timesteps(scheduler, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert torch.allclose(flow.schedule(steps, math.exp(mu)), scheduler.sigmas, atol=1e-6)


def test_schnell_schedule_is_unshifted():
    assert torch.allclose(flow.schedule(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_euler_step_matches_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    x, v = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    theirs = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.allclose(
        flow.euler_step(x, v, scheduler.sigmas[0], scheduler.sigmas[1]), theirs, atol=1e-6
    )


def test_loss_is_the_written_out_formula():
    x0, noise, v = (torch.randn(3, 5, 4) for _ in range(3))
    t = torch.tensor([0.0, 0.3, 1.0])
    noisy = flow.add_noise(x0, noise, t)
    for b in range(3):
        assert torch.allclose(noisy[b], (1 - t[b]) * x0[b] + t[b] * noise[b])
        expected = (
            sum(
                (v[b, i, j] - (noise[b, i, j] - x0[b, i, j])) ** 2
                for i in range(5)
                for j in range(4)
            )
            / 20
        )
        assert torch.allclose(flow.velocity_loss(v, x0, noise)[b], expected)


def test_densities_have_their_shape():
    def draw(density, shift="none", **options):
        return flow.sample_t(
            FlowConfig(density=density, shift=shift, **options), 256, seed=0, indices=INDICES
        )

    assert abs(draw("uniform").mean() - 0.5) < 0.02 and abs(draw("uniform").std() - 12**-0.5) < 0.01
    logits = torch.logit(draw("logit_normal", logit_mean=0.5, logit_std=0.7))
    assert abs(logits.mean() - 0.5) < 0.05 and abs(logits.std() - 0.7) < 0.05
    u = draw("uniform").double()
    written_out = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    assert torch.allclose(draw("mode").double(), written_out, atol=1e-6)
    assert ((draw("mode") >= 0) & (draw("mode") <= 1)).all()
    t = draw("uniform")
    mu = flow.time_shift_mu(256)
    assert torch.allclose(
        draw("uniform", shift="resolution"), math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t)
    )
    assert torch.allclose(draw("uniform", shift="3"), 3 * t / (1 + 2 * t))


def test_draws_depend_on_the_sample_alone():
    config = FlowConfig(guidance="uniform[1,7]")
    whole = flow.sample_t(config, 256, seed=3, indices=range(10))
    assert torch.equal(flow.sample_t(config, 256, seed=3, indices=[7, 2]), whole[[7, 2]])
    assert not torch.equal(flow.sample_t(config, 256, seed=4, indices=range(10)), whole)
    guidance = flow.sample_guidance(config, seed=3, indices=INDICES)
    assert 1 <= guidance.min() < 1.1 and 6.9 < guidance.max() <= 7
    assert flow.sample_guidance(FlowConfig(), seed=3, indices=range(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_stratified_times_have_their_density_and_one_in_each_share_of_a_batch(density):
    config = FlowConfig(density=density, stratified=True, shift="none")
    draw = partial(flow.sample_t, config, 256, seed=3, batch=8)
    times = draw(indices=INDICES)
    plain = flow.sample_t(replace(config, stratified=False), 256, seed=3, indices=INDICES)
    for q in (0.1, 0.5, 0.9):
        assert abs(times.quantile(q) - plain.quantile(q)) < 0.03
    assert times.view(-1, 8).mean(1).std() < plain.view(-1, 8).mean(1).std() / 3
    assert torch.equal(draw(indices=[13, 2]), times[[13, 2]])
    u = flow.stratified_uniform(8, seed=3, indices=INDICES).view(-1, 8)
    shares = (8 * u).floor()
    assert torch.equal(shares.sort(1).values, torch.arange(8.0).expand(500, 8))
    assert all(len(place.unique()) == 8 for place in shares.T)  # no place keeps its share


def test_sigma_form_and_t_form_of_the_shift_agree():
    t, mu = torch.linspace(0.01, 1, 50, dtype=torch.float64), 1.15
    assert torch.allclose(
        flow.shift_time(t, math.exp(mu)), math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    )
