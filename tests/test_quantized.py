"""Quantised frozen linears: the format's error, gradients beside them, every mesh, drawing."""

import copy
import itertools
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from meshes import CONTROL, batches_of, configure, random_weights
from on_ranks import on_ranks
from reference import made_up_inputs, randomise, relative_error
from torch import nn

import fluxlite
from fluxlite import parallel
from fluxlite.draw import offload
from fluxlite.nets import quantized
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.nets.lora import AdapterTerm, LowRank, adapt_linears
from fluxlite.parallel.weights import local_tensor
from fluxlite.train import building, setup, training_step

KINDS = quantized.QUANTIZED_KINDS[1:]
SHAPE = FluxConfig(1, 2, 256, 4, 4, 12, 12, 20, 14, True, (16, 24, 24))


def model_of(seed=0, dtype=torch.float32):
    return randomise(Flux(SHAPE), seed).to(dtype).requires_grad_(False)


def inputs_of(dtype=torch.float32):
    given = made_up_inputs(SHAPE, dtype, (8, 16))
    return given | {"rope": rope_table(position_ids(8, 8, 8), SHAPE)}


def dequantized(model):
    """A plain copy of a quantised model, with the weights that it computes with."""
    plain = Flux(SHAPE)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, quantized.QuantizedLinear):
            state[f"{name}.weight"] = module.weight
    state = {k: v for k, v in state.items() if not k.endswith(("codes", "scales"))}
    plain.load_state_dict(state, strict=True, assign=True)
    return plain.requires_grad_(False)


# --- the formats ----------------------------------------------------------------------------------


def error_bound(weight, kind):
    """The largest error that rounding to the nearest code may leave, of each element."""
    rows = weight.abs().amax(1, keepdim=True)
    if kind == "int8":
        return rows / 127 / 2 * torch.ones_like(weight)
    if kind == "float8":  # 3 bits of mantissa, and below 2^-6 of the scale steps of 2^-9
        return torch.maximum(weight.abs() / 16, rows / 448 * 2**-10)
    gap = (torch.tensor(quantized.NF4_LEVELS).diff() / 2).max()
    blocks = weight.unflatten(1, (-1, 64))
    return (gap * blocks.abs().amax(2, keepdim=True)).expand_as(blocks).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_is_within_its_formats_error_and_so_is_a_linear(kind):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator) * torch.logspace(-3, 3, 48)[:, None]
    weight[5], weight[7, 64:] = 0, 0
    linear = nn.Linear(128, 48)
    linear.weight.data, x = weight.clone(), torch.randn(9, 128, generator=generator)
    expected = linear(x).detach()
    quantized.quantize_linear(linear.requires_grad_(False), kind)
    bound = error_bound(weight, kind)
    assert ((linear.weight - weight).abs() <= bound * 1.001).all()
    assert not linear.weight[5].any() and not linear.weight[7, 64:].any()
    assert not torch.equal(linear.weight, weight)
    assert ((linear(x) - expected).abs() <= x.abs() @ bound.T * 1.001 + 1e-5).all()
    bits = 8 * (linear.codes.nbytes + linear.scales.nbytes) / weight.numel()
    assert bits == {"nf4": 4.5}.get(kind, 8.25)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_been_quantised_once_is_kept_when_it_is_quantised_again(kind):
    quantized.quantize_linear(linear := nn.Linear(128, 48), kind)
    codes, scales = quantized.quantize_rows(linear.weight, kind)
    assert torch.equal(codes.float(), linear.codes.float())
    assert torch.allclose(scales, linear.scales, rtol=1e-6)


# --- gradients ------------------------------------------------------------------------------------


def adapted(model):
    """LoRA terms beside a few linears, trained."""
    generator, terms = torch.Generator().manual_seed(3), {}
    for name in ("double_blocks.0.img.qkv.q", "single_blocks.1.mlp.linear_out"):
        linear = model.get_submodule(name)
        down = torch.randn(4, linear.in_features, generator=generator) / 16
        up = torch.randn(linear.out_features, 4, generator=generator)
        terms[name] = [AdapterTerm(LowRank(down, up), 0.5)]
    adapt_linears(model, terms)
    for name, p in model.named_parameters():
        p.requires_grad_(".terms." in name)
    return model


def gradients_of(model, **given):
    model(**given).float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_the_gradients_of_the_dequantised_base(kind):
    base, given = model_of(), inputs_of()
    plain = adapted(dequantized(quantized.quantize_model(copy.deepcopy(base), kind)))
    found = quantized.quantize_model(adapted(base), kind)
    linear = found.double_blocks[0].img.qkv.q
    assert isinstance(linear, quantized.QuantizedLinear) and linear.terms
    expected, gradients = gradients_of(plain, **given), gradients_of(found, **given)
    assert gradients.keys() == expected.keys() and len(expected) == 4
    for name, gradient in expected.items():
        assert gradient.norm() > 0 and relative_error(gradients[name], gradient) < 1e-6, name


def test_no_graph_keeps_a_dequantised_weight():
    linear, kept = nn.Linear(64, 64).requires_grad_(False), []
    quantized.quantize_linear(linear, "int8")
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        linear(torch.randn(3, 64, requires_grad=True))
    assert {t.dtype for t in kept if t.shape == (64, 64)} == {torch.int8}


# the others are left to the slow part
QUICK = {("nf4", "full")}
COMPILED = [
    pytest.param(kind, how, marks=[] if (kind, how) in QUICK else pytest.mark.slow)
    for kind, how in itertools.product(KINDS, ("none", "full", "selective"))
]


@pytest.mark.parametrize("kind, checkpointing", COMPILED)
def test_compiled_and_checkpointed_blocks_compute_the_same(kind, checkpointing, monkeypatch):
    monkeypatch.setattr(parallel.compilation, "BACKEND", "aot_eager")
    model, given = quantized.quantize_model(adapted(model_of()), kind), inputs_of()
    expected = gradients_of(model, **given)
    for p in model.parameters():
        p.grad = None
    parallel.compile_blocks(model, checkpointing)
    if checkpointing == "full":
        parallel.checkpoint_activations(model, checkpointing)
    found = gradients_of(model, **given)
    assert not parallel.compilation.EAGER_BLOCKS
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-6, name


# --- ranks ----------------------------------------------------------------------------------------


def outputs_of(model, dtype):
    """The velocity of a base, and the gradient of its text, through all blocks."""
    given = inputs_of(dtype)
    given["txt"].requires_grad_()
    velocity = model(**given)
    velocity.float().square().mean().backward()
    return velocity.detach(), given["txt"].grad


def sharded_outputs(dtype, compile=False, **options):
    """{kind: `outputs_of`} of a quantised base on this rank's mesh, filled part by part."""
    config, found = parallel.ParallelConfig(**options), {}
    _, mesh = parallel.start_ranks(config, "cpu")
    for kind in KINDS:
        with torch.device("meta"):
            model = Flux(SHAPE).to(dtype).requires_grad_(False)
        quantized.quantize_model(model, kind)
        parallel.parallelize(model, mesh, config, dtype, compile=compile)
        parallel.fill_weights(model, model_of(dtype=dtype).named_parameters(), "cpu")
        codes = local_tensor(model.double_blocks[0].img.proj.codes)
        assert codes.numel() == (0.5 if kind == "nf4" else 1) * 256 * 128  # this rank's half
        found[kind] = outputs_of(model, dtype)
    return found


def test_a_base_on_two_fsdp2_ranks_is_that_of_one_bit_for_bit(tmp_path):
    found = on_ranks(2, partial(sharded_outputs, torch.bfloat16), tmp_path)
    for kind in KINDS:
        model = quantized.quantize_model(model_of(dtype=torch.bfloat16), kind)
        for expected, *others in zip(outputs_of(model, torch.bfloat16), *(f[kind] for f in found)):
            assert all(torch.equal(other, expected) for other in others), kind


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_base_under_tensor_parallelism_is_that_of_one_rank(compile, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.compilation, "BACKEND", "aot_eager")
    found = on_ranks(2, partial(sharded_outputs, torch.float32, compile, tp=2), tmp_path)
    for kind in KINDS:
        model = quantized.quantize_model(model_of(), kind)
        for expected, *others in zip(outputs_of(model, torch.float32), *(f[kind] for f in found)):
            assert all(relative_error(other, expected) < 1e-5 for other in others), kind


# --- drawing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_quantised_blocks_compute_the_same(kind):
    model, given = quantized.quantize_model(model_of(), kind), inputs_of()
    expected = model(**given)
    streamed = offload.stream_blocks(model, "cpu", 1)
    for _ in range(2):
        assert torch.equal(streamed(**given), expected)


@pytest.mark.parametrize("kind, options", [("int8", {}), ("nf4", {"offload": "none"})])
def test_pictures_are_drawn_with_a_quantised_model(kind, options, caplog):
    given = dict(steps=2, seed=1, dtype="float32", **options)
    [plain] = fluxlite.generate("red circle with blue background", **given)
    [picture] = fluxlite.generate("red circle with blue background", quantize=kind, **given)
    difference = np.abs(np.asarray(plain, float) - np.asarray(picture, float)).mean()
    assert 0 < difference < 20, difference
    assert picture.info["sampling"]["lossy"] == [f"model.quantize={kind}"]
    assert f"model.quantize={kind} rounds the linears" in caplog.text
    assert quantized.LOSSES[kind] in caplog.text


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_controlnet_beside_a_quantised_base_learns_as_beside_its_dequantised_one(kind):
    losses = []
    for how in (kind, "none"):
        config = configure([], 1, [*CONTROL, f"model.quantize={kind}"])
        config.model.quantize = how
        with mock.patch.object(building, "random_weights", partial(rounded_weights, kind)):
            run = setup.set_up(config, *parallel.start_ranks(config.parallel, "cpu"))
        batches = batches_of(config, run)
        steps = [training_step.train_step(run, next(batches), step) for step in range(3)]
        losses.append([loss.item() for loss, _ in steps])
        codes = [name for name, _ in run.flux.named_parameters() if name.endswith(".codes")]
        assert (len(codes) > 0) == (how != "none")
    parallel.stop_ranks()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def rounded_weights(kind, model, *given):
    """Random weights, those of blocks and modulation on the format's grid."""
    for name, values in random_weights(model, *given):
        matrix = name.endswith(".weight") and values.ndim == 2
        yield (
            name,
            quantized.computed_weight(name, values, kind if matrix else "none", values.dtype),
        )


@pytest.mark.parametrize(
    "options, told",
    [
        (["model.quantize=int8"], "stays as it is"),
        (["model.quantize=int4"], "choose one of none, int8, float8, nf4"),
        ([*CONTROL, "model.quantize=nf4", "model.hidden_size=48", "model.num_heads=6"], "of 64"),
    ],
)
def test_what_cannot_be_quantised_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        configure([], 1, options)
