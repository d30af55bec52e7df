"""What only a GPU can show, marked `gpu`: skipped without one, all of it by `pytest -m gpu`.

What a CPU can do too is checked on both, so that a check which a GPU meets first is known to run.
"""

import copy
import functools
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from reference import diffusers_flux, made_up_inputs, ours_from, randomise, relative_error
from test_host_memory import FULL, steps_of
from test_lora_drawing import draw, save_lora
from test_parallel import BOUNDS, assert_same, run_meshes
from test_trainer import MOCK, configure, losses, train
from torch.nn.attention import SDPBackend, sdpa_kernel

import fluxlite
from fluxlite import parallel
from fluxlite.cli import devices
from fluxlite.draw import offload
from fluxlite.draw.offload import stream_blocks
from fluxlite.nets import quantized
from fluxlite.nets.autoencoder import Autoencoder
from fluxlite.nets.configs import AutoencoderConfig, FluxConfig
from fluxlite.nets.flux import ContiguousGradient, Flux, attend, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.nets.quantized import QUANTIZED_KINDS
from fluxlite.parallel import host_memory
from fluxlite.parallel.weights import local_tensor
from fluxlite.train import loop, setup, small_adamw, training_step
from fluxlite.weights import conversion
from fluxlite.weights.verify import diffusers_inputs

needs_gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
SLOW_ON_CPU = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]
WIDE = dict(attention_head_dim=64, num_attention_heads=4, axes_dims_rope=(8, 28, 28))
SHAPE = FluxConfig(1, 2, 256, 4, 4, 12, 12, 20, 14, True, (8, 28, 28))
CHECKPOINTING = "none", "selective", "full", "2"
WHOLE = ["dtype=float32", "optim.ema_decay=0", "compile=false", FULL]
FROZEN = [*WHOLE, "lora=default", "lora.rank=4"]
ROUNDED = ["dtype=bfloat16", "optim.weights=bfloat16"]


def inputs_of(config, device, dtype, tokens=(16, 64)):
    drawn = made_up_inputs(config, dtype, tokens)
    ids = position_ids(16, 16, tokens[0]).to(device)
    return {name: value.to(device) for name, value in drawn.items()}, ids


# --- beside diffusers -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_forward_and_every_gradient_are_diffusers(device, dtype, bound):
    theirs = diffusers_flux(**WIDE)
    ours = ours_from(theirs).to(device, dtype)
    theirs, config = theirs.to(device, dtype), ours.config
    inputs, ids = inputs_of(config, device, dtype)
    out = ours(rope=rope_table(ids, config), **inputs)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):  # see ContiguousGradient
        expected = theirs(**diffusers_inputs(inputs, ids))[0]
    assert relative_error(out.float(), expected.float()) < bound
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(towards)
    expected.backward(towards)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    gradients = conversion.from_fluxlite(gradients, config, "diffusers")
    for name, p in theirs.named_parameters():
        assert relative_error(gradients[name].float(), p.grad.float()) < 3 * bound, name


def test_a_gradient_is_laid_out_as_its_tensor_is():
    x, seen = torch.randn(2, 5, 12, requires_grad=True), []
    inner = x * 1
    inner.register_hook(lambda g: seen.append(g.is_contiguous()))
    torch.cat([ContiguousGradient.apply(inner)] * 2, dim=2).backward(torch.randn(2, 5, 24))
    assert seen == [True] and x.grad.shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_gradients_of_attention_are_those_of_any_layout(device, dtype, bound):
    """A kernel's plan kept for one layout of the gradient must not serve another."""
    draw = torch.Generator().manual_seed(1)
    q, k, v, towards = (torch.randn(2, 80, 4, 64, generator=draw).to(dtype) for _ in range(4))
    rope = rope_table(position_ids(16, 16, 16), SHAPE)
    wide = torch.cat([towards.flatten(2)] * 5, dim=2)

    def gradients(layout, device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, [table.to(device) for table in rope])
        return torch.autograd.grad(out, leaves, layout(wide.to(device, dtype)))

    layouts = [
        lambda wide: wide[..., :256],
        lambda wide: wide[..., :256].contiguous(),
        lambda wide: wide[..., :256].transpose(1, 2).contiguous().transpose(1, 2),
    ]
    expected = gradients(layouts[1], "cpu", torch.float32)
    for layout in layouts:
        for found, right in zip(gradients(layout, device, dtype), expected):
            assert relative_error(found.float().cpu(), right) < bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["flash", "math", "cudnn", "efficient"])
def test_every_attention_kernel_computes_the_same(device, attention):
    if device == "cpu" and attention in ("cudnn", "efficient"):
        pytest.skip("a kernel of CUDA")
    model = randomise(Flux(SHAPE, attention)).to(device, torch.bfloat16)
    reference = randomise(Flux(SHAPE)).to(device)
    inputs, ids = inputs_of(SHAPE, device, torch.bfloat16)
    with torch.no_grad():
        out = model(rope=rope_table(ids, SHAPE), **inputs)
        inputs, _ = inputs_of(SHAPE, device, torch.float32)
        assert relative_error(out.float(), reference(rope=rope_table(ids, SHAPE), **inputs)) < 5e-2


@pytest.mark.parametrize("device", DEVICES)
def test_the_autoencoder_is_diffusers(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds convolutions
    theirs = randomise(
        AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    ).to(device)
    config = AutoencoderConfig((16, 32), theirs.config.layers_per_block, 4, norm_num_groups=4)
    ours = Autoencoder(config).to(device)
    ours.load_state_dict(theirs.state_dict())
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    unscaled = latents / ours.config.scaling_factor + ours.config.shift_factor
    with torch.no_grad():
        assert relative_error(ours.decode(latents), theirs.decode(unscaled).sample) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_a_picture_is_that_of_a_cpu(device):
    options = dict(height=64, width=64, steps=4, dtype="float32", seed=3)
    ours = fluxlite.generate("red circle with blue background", device=device, **options)[0]
    expected = fluxlite.generate("red circle with blue background", device="cpu", **options)[0]
    difference = np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int)
    assert np.abs(difference).max() <= 2


# --- a training step ------------------------------------------------------------------------------


@pytest.fixture
def alone():
    yield
    parallel.stop_ranks()
    torch._dynamo.reset()


def run_of(device, *options):
    """A run on made-up data whose weights are all random, and its micro-batches."""
    config = configure(
        *MOCK,
        f"device={device}",
        "data.height=64",
        "data.width=64",
        "data.micro_batch=2",
        "data.global_batch=2",
        *options,
    )
    run = setup.set_up(config, *parallel.start_ranks(config.parallel, config.device))
    whole = randomise(Flux(config.model.shape()))
    parallel.fill_weights(run.flux, ((name, p.detach()) for name, p in whole.named_parameters()))
    training, _ = setup.open_data(config, run)
    return run, run.loader(training, global_batch=2, start_index=0)


def step_of(run, batches, step=0):
    """A step's loss and gradients."""
    gradients, real = {}, training_step.optimizer_step

    def update(run, *options):
        gradients.update({n: p.grad.clone() for n, p in run.model.named_parameters()})
        return real(run, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "optimizer_step", update)
        loss, *_ = training_step.train_step(run, [next(batches)], step)
    return loss.item(), gradients


@pytest.mark.timeout(1500)  # inductor, on a CPU
@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_compiled_under_every_checkpointing_computes_the_same(device, kind, alone):
    options = ["dtype=float32", f"parallel.activation_checkpointing={kind}"]
    assert_compiled_is_eager(device, options, 1e-4)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_compiled_in_bfloat16_computes_the_same(device, alone):
    """With cuDNN's attention, on a GPU that has it."""
    assert_compiled_is_eager(device, ["dtype=bfloat16"], 5e-2)


def assert_compiled_is_eager(device, options, bound):
    loss, gradients = step_of(*run_of(device, *options, "compile=true"))
    expected, theirs = step_of(*run_of(device, options[0], "compile=false"))
    assert loss == pytest.approx(expected, rel=bound / 10)
    for name, gradient in gradients.items():
        assert relative_error(gradient, theirs[name]) < bound, name


LORA = [*FROZEN[1:], "optim.ema_decay=0.9"]
STEPS = {  # each of which takes steps without a wait
    "all weights": ["optim.ema_decay=0.9"],
    "8-bit moments": [*WHOLE[1:], "optim.kind=adamw8bit", *ROUNDED],
    "LoRA": [*LORA, "lora.dropout=0.2"],
    "DoRA on int8": [*LORA, "lora.dora=true", "model.quantize=int8"],
    "nf4, swapped": [*LORA, "model.quantize=nf4", "parallel.swap_blocks=2"],
    "activations on the host": [*LORA, "parallel.activation_offload=true"],
}
SEVERAL = [("cpu", "all weights"), *(pytest.param("cuda", n, marks=needs_gpu) for n in STEPS)]
SEVERAL += [pytest.param("cpu", n, marks=pytest.mark.slow) for n in list(STEPS)[1:]]


@pytest.mark.parametrize("device, name", SEVERAL)
def test_a_step_does_not_wait_for_the_device(device, name, alone):
    """Nor does what ranks tell each other of it; its numbers are read afterwards."""
    run, batches = run_of(device, "dtype=float32", *STEPS[name])
    launch = functools.partial(loop.launch_step, run, batches, {"number": 0})
    earlier = [launch(step) for step in (1, 2)]  # what is made once is made here
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [launch(step) for step in (3, 4)]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for step in (*earlier, *launched):
        norm, loss, *_ = step.read()
        assert 0 < norm < 1e6 and 0 < loss < 1e6


@needs_gpu
def test_batches_lie_in_page_locked_memory(alone):
    _, batches = run_of("cuda")
    batch = next(batches)
    assert all(batch[name].is_pinned() for name in ("mean", "logvar", "txt", "pooled", "noise"))


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(device, tmp_path):
    options = [*MOCK, f"device={device}", "dtype=float32", "checkpoint.every=2", "sample.every=0"]
    whole = losses(train(*options, "steps=4", f"output={tmp_path}/whole"))
    train(*options, "steps=4", f"output={tmp_path}/two", "checkpoint.keep=0")
    (tmp_path / "two" / "checkpoints" / "last").unlink()
    (tmp_path / "two" / "checkpoints" / "last").symlink_to("step-000002")
    resumed = losses(train(*options, "steps=4", f"output={tmp_path}/two", "resume=auto"))
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        assert resumed[key] == pytest.approx(value, rel=1e-4), key


@needs_gpu
def test_a_profile_on_a_gpu_has_kernels_and_a_snapshot_of_the_memory(tmp_path):
    options = [*MOCK, "device=cuda", "steps=3", "profile=2-3", f"output={tmp_path}/run"]
    folder = train(*options)
    events = json.loads((folder / "profile-rank0.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert (folder / "memory-rank0.pickle").stat().st_size > 1000


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", [0, 3])
def test_streamed_blocks_compute_what_resident_ones_do(device, resident):
    """Two forwards one after the other, so that buffers are used again while copies go on."""
    model = randomise(Flux(FluxConfig(3, 5, 256, 4, 4, 12, 12, 20, 14, True, (8, 28, 28))))
    model.to(torch.bfloat16).requires_grad_(False)
    whole = copy.deepcopy(model).to(device)
    for name in model.conditioning:  # which the steps of a drawing do not need
        getattr(model, name).to(device)
    streamed = stream_blocks(model, device, resident)
    inputs, ids = inputs_of(model.config, device, torch.bfloat16, tokens=(64, 192))
    rope = rope_table(position_ids(16, 48, 64).to(device), model.config)
    with torch.inference_mode():
        for _ in range(3):
            found = streamed(rope=rope, **inputs), whole(rope=rope, **inputs)
            assert torch.equal(*found)
    blocks = [*streamed.double_blocks, *streamed.single_blocks]
    there = sum(next(block.parameters()).device.type == "cpu" for block in blocks)
    assert there == (8 if device == "cpu" else 8 - resident)


@needs_gpu
def test_training_with_weights_in_host_memory_is_that_with_weights_on_the_gpu(alone):
    found = []
    for offloaded in ("false", "true"):
        options = "dtype=float32", "compile=false", f"parallel.cpu_offload={offloaded}"
        run, batches = run_of("cuda", *options, "optim.warmup=0", "optim.ema_decay=0.9")
        stepped = [step_of(run, batches, step)[0] for step in range(2)]
        parts = {name: local_tensor(p) for name, p in run.model.named_parameters()}
        averages = [local_tensor(average).cpu() for average in run.ema.average.values()]
        found.append((stepped, {name: part.cpu() for name, part in parts.items()}, averages))
    assert all(part.is_pinned() for part in parts.values())
    (losses_there, weights_there, average_there), (stepped, weights, averages) = found
    assert stepped == pytest.approx(losses_there, rel=1e-5)
    for name, part in weights.items():
        assert relative_error(part, weights_there[name]) < 1e-4, name
    assert all(relative_error(*pair) < 1e-4 for pair in zip(averages, average_there))


NF4, SWAPPED = "model.quantize=nf4", "parallel.swap_blocks=3"
SMALL = {  # ways to train in less memory: (settings, those of the run that it is to equal, bound)
    "LoRA": (FROZEN, FROZEN, 1e-4),
    "swapped": ([*FROZEN, SWAPPED], FROZEN, 1e-4),
    "on the host": ([*FROZEN, SWAPPED, "parallel.activation_offload=true"], FROZEN, 1e-4),
    "int8": ([*FROZEN, "model.quantize=int8"],) * 2 + (1e-4,),
    "float8": ([*FROZEN, "model.quantize=float8"],) * 2 + (1e-4,),
    "nf4, swapped": ([*FROZEN, NF4, SWAPPED], [*FROZEN, NF4], 1e-4),
    "prodigy": ([*FROZEN, "optim.kind=prodigy", "optim.lr=1"],) * 2 + (1e-2,),
    # codes and rounded weights are whole steps apart where two devices' last bits differ
    "8-bit moments": ([*WHOLE, "optim.kind=adamw8bit"],) * 2 + (1e-2,),
    "bfloat16 weights": ([*WHOLE, *ROUNDED],) * 2 + (3e-2,),
}


@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize("name", SMALL)
def test_training_in_little_memory_is_that_of_a_cpu(device, name, alone):
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    options, plain, bound = SMALL[name]
    found, run = steps_of(*options, device=device)
    parallel.stop_ranks()
    expected, _ = steps_of(*plain)
    for (loss, norm), (their_loss, their_norm) in zip(found, expected):
        assert loss == pytest.approx(their_loss, rel=bound)
        assert norm == pytest.approx(their_norm, rel=10 * bound)
    assert expected[0][0] != expected[2][0]
    assert {p.device.type for p in run.model.parameters()} == {device}


@needs_gpu
def test_what_waits_in_host_memory_is_page_locked_and_off_the_gpu(alone, monkeypatch):
    made, real = [], host_memory.host_buffer

    def noted(*args, **options):
        made.append(real(*args, **options))
        return made[-1]

    for owner in (host_memory, offload):
        monkeypatch.setattr(owner, "host_buffer", noted)
    ways = "parallel.swap_blocks=3", "parallel.activation_offload=true"
    steps_of(*FROZEN, *ways, device="cuda")
    assert len(made) == 3 + 3 * (2 + 3) and all(tensor.is_pinned() for tensor in made)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", QUANTIZED_KINDS[1:])
def test_a_device_quantises_and_dequantises_as_a_cpu(device, kind):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 3, 96)[:, None]
    dense = [
        quantized.computed_weight("modulation.", w, kind, w.dtype).cpu()
        for w in (weight, weight.to(device))
    ]
    assert relative_error(dense[1], dense[0]) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_bits_of_stochastic_rounding_are_those_of_a_cpu(device):
    part = slice(3, 400), slice(100, 612)
    key, values = (1 << 61) + 12345, torch.randn(397, 512)
    bits = [small_adamw.element_bits(part, key, place) for place in ("cpu", device)]
    assert torch.equal(bits[0], bits[1].cpu())
    rounded = [small_adamw.round_randomly(values.to(b.device), b).cpu() for b in bits]
    assert torch.equal(*rounded)


@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_picture_with_a_lora_is_that_of_a_cpu(device, merge, quantize, tmp_path):
    save_lora(file := tmp_path / "lora.safetensors")
    options = dict(lora=str(file), lora_merge=merge, quantize=quantize, dtype=torch.float32)
    drawn = [
        draw(fluxlite.load_pipeline(device=place, compile=False, **options))
        for place in (device, "cpu")
    ]
    plain = draw(fluxlite.load_pipeline(device="cpu", dtype=torch.float32))
    ours, expected, without = (np.asarray(picture, dtype=int) for picture in (*drawn, plain))
    assert np.abs(ours - expected).max() <= 2 and np.abs(expected - without).max() > 20


@needs_gpu
def test_a_host_copy_of_streamed_blocks_is_page_locked():
    model = randomise(Flux(SHAPE)).to(torch.bfloat16).requires_grad_(False)
    stream_blocks(model, "cuda")
    assert all(p.is_pinned() for p in model.double_blocks.parameters())


# --- float8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["rowwise", "tensorwise"])
def test_float8_products_of_the_device_are_the_emulated_ones(device, kind):
    pytest.importorskip("torchao")
    if device == "cuda" and not devices.has_float8(device):
        pytest.skip("this GPU has no float8")
    found = []
    for place in ("cpu", device):
        with pytest.MonkeyPatch.context() as patch:
            if place == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            model = randomise(Flux(SHAPE)).bfloat16()
            parallel.train_in_float8(model, kind)
        model.to(place)
        inputs, ids = inputs_of(SHAPE, place, torch.bfloat16)
        out = model(rope=rope_table(ids, SHAPE), **inputs)
        out.float().square().mean().backward()
        gradient = model.single_blocks[0].mlp.linear_in.weight.grad
        found.append((out.float().cpu(), gradient.float().cpu()))
    for ours, theirs in zip(*found):
        assert relative_error(ours, theirs) < 0.1


@needs_gpu
def test_weights_rounded_for_drawing_take_half_the_memory():
    pytest.importorskip("torchao")
    if not devices.has_float8("cuda"):
        pytest.skip("this GPU has no float8")
    model = randomise(Flux(SHAPE)).to("cuda", torch.bfloat16).requires_grad_(False)
    inputs, ids = inputs_of(SHAPE, "cuda", torch.bfloat16)
    call = functools.partial(model, rope=rope_table(ids, SHAPE), **inputs)
    with torch.inference_mode():
        expected, before = call(), torch.cuda.memory_allocated()
        parallel.quantize_linears(model, "cuda")
        freed = before - torch.cuda.memory_allocated()
        linears = parallel.block_linears(model).values()
        assert freed > 0.9 * sum(linear.weight.numel() for linear in linears)
        assert 1e-3 < relative_error(call().float(), expected.float()) < 0.2


# --- several GPUs ---------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mesh_computes_the_same_run_over_nccl(ranks, tmp_path, monkeypatch):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"there are fewer than {ranks} GPUs")
    monkeypatch.setenv("FLUXLITE_MESH_DEVICE", "cuda")
    # kernels of a GPU add up in another order on another number of samples
    for kind, bounds in BOUNDS.items():
        monkeypatch.setitem(BOUNDS, kind, tuple(5 * bound for bound in bounds))
    reference = run_meshes(1, tmp_path)
    assert_same(run_meshes(ranks, tmp_path), reference)
