"""float8: which linears are in it, what it leaves as it was, how far it rounds, what it refuses.

Products are emulated here: on a GPU `tests/test_gpu.py` holds them against these.
"""

import json
import logging

import pytest
import torch
from reference import made_up_inputs, randomise, relative_error
from test_parallel import assert_same, run_meshes
from test_trainer import MOCK, configure, losses, train, weights
from torch import nn

import fluxlite
from fluxlite import parallel
from fluxlite.cli import devices
from fluxlite.cli.command_line import load_config
from fluxlite.draw import pipeline
from fluxlite.nets import flux
from fluxlite.nets.configs import ControlNetConfig, FluxConfig
from fluxlite.nets.controlnet import ControlNet
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.preflight.prediction import on_fake_ranks
from fluxlite.settings import InferConfig

torchao = pytest.importorskip("torchao.float8.float8_linear")

SHAPE = FluxConfig(2, 3, 64, 4, 4, 12, 12, 20, 14, True, (4, 6, 6))
KINDS = "rowwise", "tensorwise"
ROUNDING = 2**-4  # half of the last of e4m3's three bits


@pytest.fixture
def able(monkeypatch):
    """As if the device could: the products are emulated."""
    monkeypatch.setattr(devices, "has_float8", lambda device: True)


def converted(kind, net=None):
    model = net or Flux(SHAPE)
    parallel.train_in_float8(model, kind)
    return model


def names_in_float8(model):
    return {n for n, module in model.named_modules() if isinstance(module, torchao.Float8Linear)}


def inputs_of(config, dtype=torch.float32):
    rope = rope_table(position_ids(8, 8, 16), config)
    return made_up_inputs(config, dtype, (16, 16)) | {"rope": rope}


# --- what is converted ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_linears_of_the_blocks_multiply_in_float8_and_no_others(kind):
    stream = ["qkv.q", "qkv.k", "qkv.v", "proj", "mlp.linear_in", "mlp.linear_out"]
    expected = {
        f"double_blocks.{i}.{s}.{n}" for i in range(2) for s in ("img", "txt") for n in stream
    }
    expected |= {f"single_blocks.{i}.{name}" for i in range(3) for name in stream}
    model = converted(kind)
    assert names_in_float8(model) == expected and len(expected) == 12 * 2 + 6 * 3
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in expected]
    assert {name.split(".")[0] for name in others} == {
        *("img_in", "txt_in", "time_in", "guidance_in", "pooled_in", "modulation", "out")
    }


def test_of_a_controlnet_neither_hints_nor_outputs_are_in_float8():
    net = ControlNet(ControlNetConfig.beside(SHAPE, num_double_blocks=1, num_single_blocks=1))
    names = names_in_float8(converted("rowwise", net))
    assert len(names) == 18 and all(
        n.startswith(("double_blocks.", "single_blocks.")) for n in names
    )


def test_names_types_and_what_is_trained_stay_as_they_were():
    model = Flux(SHAPE)
    model.double_blocks[0].requires_grad_(False)
    before = {name: (p, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    after = dict(converted("rowwise", model).named_parameters())
    assert list(after) == list(before)
    for name, (p, dtype, trained) in before.items():
        assert after[name] is p and (p.dtype, p.requires_grad) == (dtype, trained)


# --- how far it rounds ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradients_are_as_near_as_the_format_allows(kind):
    torch.manual_seed(0)
    plain = nn.Linear(128, 64).bfloat16()
    block = nn.ModuleDict({"double_blocks": nn.ModuleList([nn.Sequential(nn.Linear(128, 64))])})
    parallel.train_in_float8(block, kind)
    linear = block["double_blocks"][0][0].bfloat16()
    linear.load_state_dict(plain.state_dict())
    x, towards = torch.randn(2, 48, 128).bfloat16(), torch.randn(2, 48, 64).bfloat16()
    found = []
    for module in (plain, linear):
        given = x.clone().requires_grad_()
        out = module(given)
        out.backward(towards)
        found.append((out, given.grad, module.weight.grad))
    for ours, theirs in zip(found[1], found[0]):
        assert ours.dtype == torch.bfloat16
        # e5m2, in which tensorwise has gradients, has a bit less
        assert 2**-8 < relative_error(ours.float(), theirs.float()) < 2 * ROUNDING
    assert relative_error(found[1][0].float(), found[0][0].float()) < ROUNDING


def test_rows_are_scaled_by_their_own_largest_value():
    """A row 10⁴ times as large leaves the others' rounding as it is."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"double_blocks": nn.ModuleList([nn.Sequential(nn.Linear(64, 32))])})
    parallel.train_in_float8(block, "rowwise")
    linear = block["double_blocks"][0][0]
    x = torch.randn(16, 64)
    alone = linear(x)
    x[3] *= 1e4
    rows = [i for i in range(16) if i != 3]
    assert torch.equal(linear(x)[rows], alone[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_forward_and_its_gradients_are_near_those_of_bfloat16(kind):
    config, found = SHAPE, []
    for in_float8 in (False, True):
        model = randomise(Flux(config)).bfloat16()
        model = converted(kind, model) if in_float8 else model
        out = model(**inputs_of(config, torch.bfloat16))
        out.float().square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((out, gradients))
    (plain, plain_gradients), (rounded, gradients) = found
    assert gradients.keys() == plain_gradients.keys()
    assert 1e-3 < relative_error(rounded.float(), plain.float()) < 0.2
    for name in ("double_blocks.0.img.qkv.q.weight", "single_blocks.1.mlp.linear_in.weight"):
        error = relative_error(gradients[name].float(), plain_gradients[name].float())
        assert 1e-3 < error < 0.5, name


# --- what must not pass it by ---------------------------------------------------------------------


def test_no_fast_path_passes_float8_by(monkeypatch):
    """Queries, keys and values are three products of float8 linears, with gradients and without."""
    model, called = converted("rowwise"), []
    monkeypatch.setattr(flux, "FanOut", None)  # whose use would raise
    model.modulation.forward = lambda vec: vec.new_zeros(2, sum(SHAPE.modulation_chunks) * 64)
    for name, module in model.named_modules():
        if name in names_in_float8(model):
            assert not flux.is_plain_linear(module)
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(**inputs_of(SHAPE))
    assert sorted(called) == sorted(names_in_float8(model))
    block, seen = model.bfloat16().single_blocks[0], []
    monkeypatch.setattr(
        torchao.Float8Linear,
        "forward",
        lambda self, x: seen.append(self) or nn.Linear.forward(self, x),
    )
    with torch.no_grad():
        block.mlp(torch.randn(1, 16, 64).bfloat16())
    assert len(seen) == 2


class ScaledProduct(torch.autograd.Function):
    """The operator that a GPU multiplies by."""

    @staticmethod
    def forward(ctx, x, weight):
        one = torch.ones(())
        return torch._scaled_mm(x.to(torch.float8_e4m3fn), weight, one, one, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_selective_checkpointing_keeps_float8_products():
    weight, counted = torch.ones(16, 16).to(torch.float8_e4m3fn).t(), []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    block = nn.Module()
    block.forward = lambda x: ScaledProduct.apply(x.exp(), weight).sin()
    blocks = nn.Module()
    blocks.double_blocks, blocks.single_blocks = [block], []
    parallel.checkpoint_activations(blocks, "selective")
    with Count():
        block.forward(torch.ones(16, 16, dtype=torch.bfloat16).requires_grad_()).sum().backward()
    assert (counted.count("_scaled_mm"), counted.count("exp")) == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_compute_the_same(kind):
    config, found = SHAPE, []
    for compiled in (False, True):
        model = converted(kind, randomise(Flux(config)))
        for block in (*model.double_blocks, *model.single_blocks) if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        out = model(**inputs_of(config))
        out.square().mean().backward()
        found.append((out, model.double_blocks[1].img.qkv.k.weight.grad))
    torch._dynamo.reset()
    for ours, theirs in zip(*found):
        assert relative_error(ours, theirs) < 1e-3


@pytest.mark.slow
def test_ranks_that_share_weights_train_as_one_does(tmp_path):
    """FSDP2 on two ranks: scales over other tokens round otherwise, and no more."""
    reference = run_meshes(1, tmp_path, "float8: ")
    figures = run_meshes(2, tmp_path, "float8: ")
    assert len(figures) == len(reference) == 2
    assert_same(figures, reference)


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_in_float8_leaves_a_plain_checkpoint_and_says_that_it_is_lossy(
    able, tmp_path, caplog
):
    options = [*MOCK, "model.max_sequence_length=16", "dtype=bfloat16", "data.micro_batch=4"]
    options += [f"output={tmp_path}/run", "data.height=64", "data.width=64", "validate_every=2"]
    options += ["optim.warmup=0"]
    with caplog.at_level(logging.INFO):
        folder = train(*options, "parallel.float8=rowwise", "steps=4")
    said = [r.message for r in caplog.records if "float8" in r.message]
    assert said == [
        "parallel.float8=rowwise: 18 linears of the blocks multiply in float8, which is lossy"
    ]
    assert json.loads((folder / "config.json").read_text())["lossy"] == ["parallel.float8=rowwise"]
    loaded = weights(folder)
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    assert loaded.keys() == Flux(configure(*options).model.shape()).state_dict().keys()
    rounded = losses(folder)
    train(*options, "parallel.float8=none", "steps=5", "resume=auto")
    assert (5, "loss") in losses(folder)
    plain = losses(train(*options, "steps=4", f"output={tmp_path}/plain"))
    assert "lossy" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert rounded[4, "loss"] == pytest.approx(plain[4, "loss"], rel=0.05)
    assert rounded[4, "loss"] != plain[4, "loss"]  # before, gates of zero hide the blocks


def test_a_frozen_transformer_stays_in_bfloat16(able, monkeypatch):
    model = Flux(SHAPE).requires_grad_(False)
    config = parallel.ParallelConfig(float8="rowwise")
    _, mesh = parallel.start_ranks(config, "cpu")
    try:
        parallel.parallelize(model, mesh, config, torch.bfloat16)
        assert not names_in_float8(model)
        model = Flux(SHAPE)
        parallel.parallelize(model, mesh, config, torch.bfloat16)
        assert len(names_in_float8(model)) == 42
    finally:
        parallel.stop_ranks()


# --- refusals -------------------------------------------------------------------------------------

ENABLED = [*MOCK, "model.max_sequence_length=16", "data.height=64", "data.width=64"]
ENABLED += ["dtype=bfloat16", "parallel.float8=rowwise"]


def refusal(*arguments):
    with pytest.raises(ValueError) as caught:
        configure(*ENABLED, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_a_gpu_that_can_float8_is_refused():
    assert "parallel.float8=rowwise needs a GPU of compute capability 8.9" in refusal()


def test_without_torchao_float8_names_the_extra(able, monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert "pip install torchao" in refusal()


def test_float8_is_refused_with_what_it_does_not_work_with(able, monkeypatch):
    assert "parallel.cpu_offload" in refusal("parallel.cpu_offload=true")
    assert "dtype=bfloat16" in refusal("dtype=float32")
    assert "hidden_size=72" in refusal(
        "model.hidden_size=72", "model.num_heads=3", "model.rope_axes=[8,8,8]"
    )
    odd = refusal("model.max_sequence_length=12")
    assert "2 x 12 and 2 x 16" in odd and "set data.micro_batch=4" in odd
    assert configure(*ENABLED, "model.max_sequence_length=12", "data.micro_batch=4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "parallel.tp: leave one" in refusal("parallel.tp=2")


def test_preflight_predicts_a_run_in_float8_without_a_gpu():
    assert on_fake_ranks(["parallel.float8=rowwise", "data=mock"])[0] == "data=mock"


def test_drawing_in_float8_is_refused_where_it_cannot_be(able, monkeypatch):
    def refused(**options):
        with pytest.raises(ValueError) as caught:
            fluxlite.load_pipeline(float8=True, **({"device": "cpu"} | options))
        return str(caught.value)

    assert "offload=all" in refused(offload="all", dtype="bfloat16")
    assert "dtype=bfloat16, not float32" in refused(dtype="float32")
    assert "leave lora.merge=false out" in refused(dtype="bfloat16", lora_merge=False)
    monkeypatch.setattr(devices, "has_float8", lambda device: False)
    assert "float8=true needs a GPU of compute capability 8.9" in refused(dtype="bfloat16")


# --- drawing --------------------------------------------------------------------------------------


@pytest.fixture
def able_to_draw(able, monkeypatch):
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)


def test_for_drawing_weights_are_rounded_once(able_to_draw):
    model = randomise(Flux(SHAPE)).bfloat16().requires_grad_(False)
    inputs = inputs_of(SHAPE, torch.bfloat16)
    with torch.inference_mode():
        expected = model(**inputs)
    parallel.quantize_linears(model, "cpu")
    linears = parallel.block_linears(model)
    assert {linear.weight.qdata.dtype for linear in linears.values()} == {torch.float8_e4m3fn}
    assert {p.dtype for p in model.modulation.parameters()} == {torch.bfloat16}
    assert not any(map(flux.is_plain_linear, linears.values()))
    with torch.inference_mode():
        assert 1e-3 < relative_error(model(**inputs).float(), expected.float()) < 0.2


def test_a_picture_drawn_in_float8_says_that_it_is_lossy(able_to_draw):
    options = dict(height=32, width=32, steps=2, device="cpu", dtype="bfloat16")
    rounded = fluxlite.generate("red circle", float8=True, **options)[0]
    plain = fluxlite.generate("red circle", **options)[0]
    assert rounded.info["sampling"]["lossy"] == ["float8=true"]
    assert "lossy" not in plain.info["sampling"]
    assert rounded.tobytes() != plain.tobytes()


def test_a_drawing_in_float8_that_is_not_finite_names_the_tensor(able_to_draw):
    options = dict(device="cpu", dtype="bfloat16", float8=True, offload="none")
    opened = fluxlite.load_pipeline(**options)
    name, linear = list(parallel.block_linears(opened.transformer).items())[3]
    linear.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=f"NaN or infinite after step 1 of 1, and {name}.bias"):
        fluxlite.generate("a", checkpoint=opened, height=32, width=32, steps=1)


def test_infer_takes_float8(tmp_path):
    given = ["prompt=a", f"output={tmp_path}", "float8=true", "dtype=bfloat16", "device=cpu"]
    config = load_config(InferConfig, "infer", given)
    with pytest.raises(ValueError, match="float8=true needs a GPU"):
        pipeline.open_pipeline(config)
