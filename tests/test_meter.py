"""The meter's verdict, and a whole small run of a ControlNet with all that watches it."""

import dataclasses
import json
import logging

import pytest
import torch
from test_trainer import SMALL, configure, losses, train

from fluxlite import parallel
from fluxlite.train import meter, setup
from fluxlite.train.tasks import controlnet
from fluxlite.train.tasks.controlnet import CONTROLNET
from fluxlite.train.training_step import flow_loss, optimizer_step
from fluxlite.train.validation import HeldOutBatch
from fluxlite.weights import sources
from fluxlite.weights.hub import ASSETS

TINY = [
    "model=flux_tiny",
    "model.checkpoint=flux-tiny",
    "controlnet=default",
    "controlnet.num_double_blocks=1",
    "controlnet.num_single_blocks=0",
    "data=fill50k",
    "data.count=60",
    "data.generate_size=64",
    "data.height=64",
    "data.width=64",
    "data.workers=0",
    "data.micro_batch=8",
    "data.global_batch=8",
    "data.val_count=8",
    "optim.warmup=0",
    "optim.lr=1e-3",
    "metrics.log_every=1",
    "metrics.tensorboard=false",
    "sample.count=2",
    "sample.steps=2",
    "controlnet.meter_every=2",
    "controlnet.patience=4",
    "dtype=float32",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"data.path={tmp_path_factory.mktemp('data')}/fill50k"


def test_a_clear_gain_is_learning_and_none_is_not():
    assert meter.judge_gain(0.02, 8.0, 10, 300) == "learning"
    assert (
        meter.judge_gain(0.02, 2.0, 10, 300) == meter.judge_gain(0.0005, 8.0, 10, 300) == "not yet"
    )
    assert (
        meter.judge_gain(0.0, 0.0, 300, 300)
        == meter.judge_gain(0.0005, 9.0, 300, 300)
        == "not learning"
    )
    assert meter.judge_gain(9.8, 3.5, 300, 300) == "not yet"


def test_significance_is_that_of_paired_differences():
    values = torch.tensor([0.02, 0.01, 0.03, 0.02])
    sums = [len(values), values.sum().item(), values.square().sum().item()]
    gain, z = meter.paired_gain(sums, [0.4, 0.6])
    assert gain == pytest.approx(0.04) and z == pytest.approx(
        (values.mean() / values.std()).item() * 2, rel=1e-4
    )
    assert meter.paired_gain([4, 0.0, 0.0], [0.5]) == (0.0, 0.0)


def built(*arguments):
    """A run that is set up and not trained."""
    config = configure(*TINY, *arguments)
    return setup.set_up(config, *parallel.start_ranks(config.parallel, "cpu"))


def batch_of(run, count=4):
    g = torch.Generator().manual_seed(3)
    x0, noise, hint = (torch.randn(count, 16, 64, generator=g) for _ in range(3))
    txt, pooled = torch.randn(count, 16, 128, generator=g), torch.randn(count, 128, generator=g)
    rest = dict(noise=noise, t=torch.linspace(0.1, 0.9, count), guidance=torch.full((count,), 3.5))
    return (x0, txt, pooled), rest, hint


def test_before_training_the_base_is_as_it_was_and_by_the_third_step_all_has_a_gradient(data):
    try:
        run = built(data)
        texts, rest, hint = batch_of(run)
        before = {name: p.clone() for name, p in run.flux.named_parameters()}
        alone, steered = (flow_loss(run, *texts, **rest, **given) for given in ({}, {"hint": hint}))
        assert torch.equal(alone, steered)
        for step in range(3):
            flow_loss(run, *texts, **rest, hint=hint).mean().backward()
            seen = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
            optimizer_step(run, step)
        assert all(gradient is not None and gradient.norm() > 0 for gradient in seen.values())
        assert all(
            torch.equal(p, before[name]) and p.grad is None
            for name, p in run.flux.named_parameters()
        )
        assert not torch.equal(
            *(flow_loss(run, *texts, **rest, **given) for given in ({}, {"hint": hint}))
        )
    finally:
        parallel.stop_ranks()


def test_what_no_gradient_reaches_stays_as_it_is_under_weight_decay(data):
    """With no single blocks: the last text stream's queries, projection and MLP."""
    try:
        run = built(data, "optim.weight_decay=0.5", "optim.lr=0.1")
        held = {name: (p.detach().clone(), p) for name, p in run.model.named_parameters()}
        texts, rest, hint = batch_of(run)
        for step in range(3):
            flow_loss(run, *texts, **rest, hint=hint).mean().backward()
            optimizer_step(run, step)
        unused = controlnet.unused_parameters(run.model, run.flux.config)
        assert any(".txt.qkv.q." in name for name in unused) and len(unused) < len(held) / 2
        for name, (before, p) in held.items():
            assert torch.equal(p, before) == (name in unused), name
    finally:
        parallel.stop_ranks()


def test_a_run_leaves_pictures_plots_metrics_and_a_net_that_draws(data, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fluxlite"):
        folder = train(*TINY, data, f"output={tmp_path}/run", "steps=4", "optim.ema_decay=0.5")
    for name in (
        "control.png",
        "losses.png",
        "images/grid-000004.png",
        "checkpoints/last/meta.json",
    ):
        assert (folder / name).is_file(), name
    text = (folder / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if "control/gain" in row]
    assert (
        len({row["control/none"] for row in rows})
        == 1
        < len({row["control/right"] for row in rows})
    )
    assert (
        text.count('"control/gain"') == 3
        and '"control/residual_double_1"' in text
        and '"control/none_t0.875"' in text
    )
    assert (
        "double_blocks.0.txt.mlp.linear_out.weight" in caplog.text
        and "step 4, control: " in caplog.text
    )
    net = sources.load_controlnet(folder)
    base = sources.load_transformer(ASSETS / "flux-tiny")
    assert net.config.num_double_blocks == 1 and net.double_out[0].weight.norm() > 0
    assert net.num_parameters() < base.num_parameters()
    size = sum(f.stat().st_size for f in (folder / "checkpoints/last").iterdir())
    assert (
        size < 4.5 * 4 * net.num_parameters()
    )  # weights, average and two moments: nothing of the base
    parts = [*TINY, data, f"output={tmp_path}/parts", "optim.ema_decay=0.5", "checkpoint.every=2"]
    train(*parts, "steps=2")
    a, b = losses(folder), losses(train(*parts, "steps=4", "resume=auto"))
    assert all(b[k] == a[k] for k in a if k[0] in (3, 4))
    text = (tmp_path / "parts/metrics.jsonl").read_text()
    assert text.count('"control/gain"') == 3  # after steps 0, 2 and 4, and none twice


def encode_blank_control(run, batch):
    inputs = CONTROLNET.encode_inputs(run, batch)
    return {name: torch.zeros_like(values) for name, values in inputs.items()}


@pytest.mark.parametrize("blank", [False, True], ids=["right", "blank"])
def test_blank_controls_are_not_learnt_and_that_is_said_loudly(
    tmp_path, caplog, monkeypatch, blank
):
    """The shipped net, which follows its controls, and the same net shown the same empty control
    for each picture.
    """
    if blank:
        emptied = dataclasses.replace(CONTROLNET, encode_inputs=encode_blank_control)
        monkeypatch.setattr(setup, "choose_task", lambda config: emptied)
    with caplog.at_level(logging.INFO, "fluxlite"):
        train(
            *TINY,
            f"data.path={tmp_path}/data",
            f"output={tmp_path}/run",
            "steps=2",
            "data.val_count=24",
            "controlnet.checkpoint=flux-tiny",
            "optim.lr=1e-6",
            "controlnet.patience=2",
            "controlnet.meter_every=1",
        )
    for step, verdict in (
        ((1, "not yet"), (2, "not learning")) if blank else ((1, "learning"), (2, "learning"))
    ):
        assert f"step {step}, control: {verdict};" in caplog.text
    assert ("THE CONTROL HAS NO EFFECT" in caplog.text) is blank


def test_a_control_is_compared_with_another_samples_where_padding_repeats_some():
    rows = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 0]), torch.tensor([1, 1])]
    held_out = [HeldOutBatch(*[None] * 3, {}, indices, None) for indices in rows]
    numbers = torch.cat(rows)
    partners = meter.ControlMeter(None, held_out).partners()
    assert (
        all(numbers[partner] != own for partner, own in zip(partners, numbers)) and partners[2] == 1
    )


def test_wasteful_depths_name_the_nearest_that_wastes_none(caplog):
    config = configure(
        *TINY,
        "controlnet.num_single_blocks=3",
        "model.checkpoint=null",
        "controlnet.init_from_base=false",
    )
    shape = config.controlnet.shape(config.model.shape())
    unused = controlnet.unused_parameters(controlnet.ControlNet(shape), config.model.shape())
    controlnet.log_unused(shape, config.model.shape(), unused)
    assert (
        "num_single_blocks=3: the transformer's 4 blocks take the outputs of 2" in caplog.text
        and "2 would waste none" in caplog.text
    )


def test_a_random_base_gets_an_output_layer_and_says_so(tmp_path, caplog):
    folder = train(
        *SMALL,
        "data=mock",
        "model.t5=null",
        "model.clip=null",
        "model.autoencoder=null",
        "data.count=20",
        "controlnet=default",
        "controlnet.num_double_blocks=1",
        "controlnet.num_single_blocks=1",
        "steps=3",
        f"output={tmp_path}/run",
        "flow.guidance=1.0",
        "optim.lr=1e-2",
        "data.val_count=8",
    )
    assert (
        "model.checkpoint is null: the frozen transformer is random, its output layer too"
        in caplog.text
    )
    assert sources.load_controlnet(folder).double_out[0].weight.norm() > 0


@pytest.mark.parametrize(
    "given, said",
    [
        (["data.control=null"], "data.control=png"),
        (["controlnet.num_double_blocks=3"], "the transformer to start from has 2"),
        (["controlnet.num_double_blocks=0"], "leave nothing"),
        (["controlnet.dropout=1"], "dropout=1.0 must be at least 0 and below 1"),
        (["controlnet.hint=pixel", "data.cache=/tmp/none"], "hint=pixel needs pictures"),
        (["data.val_count=7"], "set data.val_count=8 or more"),
        (["controlnet.num_modes=2"], "only a union net has both"),
        (["controlnet.num_modes=2", "data.control_mode=depth"], "control_mode=depth is kind 2"),
        (["controlnet=none"], "set controlnet=default too"),
        (["controlnet.dropuot=0.1"], "controlnet.dropout"),
        (["sample.count=0"], "sample.count=0 must be at least 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        configure(*TINY, *given)
