"""Diffusers' model and ours side by side: the same weights, inputs and steps, on any device.

What the benchmarks of a forward, of a training step and of a GPU have in common.
"""

import statistics
import time
from functools import partial
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxlite import parallel
from fluxlite.cli.command_line import load_config
from fluxlite.nets import flow
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import num_image_tokens, position_ids
from fluxlite.settings import TrainConfig
from fluxlite.train import optim
from fluxlite.train.setup import set_up
from fluxlite.train.training_step import flow_loss, optimizer_step
from fluxlite.weights import conversion
from fluxlite.weights.verify import build_diffusers, diffusers_inputs

TEXT_TOKENS = 512
HEAD_WIDTH = 128

# --- a forward ------------------------------------------------------------------------------------


def random_state(shapes, dtype, device="cpu", seed=0):
    """{name: values} of a model that computes something: norms near 1, all else N(0, 0.02)."""
    generator, state = torch.Generator(device).manual_seed(seed), {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        of_norm = "norm" in name and len(shape) == 1 and name.endswith("weight")
        state[name] = 1 + 0.1 * drawn if of_norm else 0.02 * drawn
    return state


def make_models(config, dtype, device="cpu"):
    """Diffusers' model and ours with the same random weights, most of them shared."""
    with torch.device("meta"):
        theirs, ours = build_diffusers(config), Flux(config)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    state = random_state(shapes, dtype, device)
    theirs.load_state_dict(state, assign=True)
    state = conversion.to_fluxlite(state, config, "diffusers")
    if str(device) != "cpu":  # as weights lie that were moved there
        state = {name: value.contiguous() for name, value in state.items()}
    ours.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


def make_inputs(config, side, dtype, device="cpu", text=TEXT_TOKENS):
    """(arguments of our forward but `rope`, positions) for a picture of `side` x `side` pixels."""
    cells = side // 8
    generator = torch.Generator().manual_seed(1)
    shapes = dict(
        img=(1, num_image_tokens(cells, cells), config.in_channels),
        txt=(1, text, config.text_width),
        pooled=(1, config.pooled_width),
    )
    drawn = {k: torch.randn(of, generator=generator).to(dtype) for k, of in shapes.items()}
    inputs = drawn | dict(t=torch.tensor([0.5]), guidance=torch.tensor([4.0]))
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return inputs, position_ids(cells, cells, text).to(device)


def diffusers_step(theirs, inputs, ids):
    """A step of diffusers' pipeline."""
    call = diffusers_inputs(inputs, ids)
    return lambda: theirs(**call)[0]


def our_steps(ours, inputs, ids):
    """(a step of our sampler, our whole forward)."""
    rope = rope_table(ids, ours.config)
    modulation = ours.modulate(inputs["t"], inputs["pooled"], inputs["guidance"])
    txt = ours.txt_in(inputs["txt"])
    return (lambda: ours.velocity(inputs["img"], txt, rope, modulation)), (
        lambda: ours(rope=rope, **inputs)
    )


# --- a training step ------------------------------------------------------------------------------


def configure_step(shape, *, side, dtype, device="cpu", text=TEXT_TOKENS, options=()):
    """The `TrainConfig` of a step on made-up data; `shape` is {field of the model: value},
    `options` are keys of `train.py`.
    """
    return load_config(
        TrainConfig,
        "train",
        [
            "model=flux_dev",
            *(f"model.{name}={value}" for name, value in shape.items()),
            f"model.max_sequence_length={text}",
            "data=mock",
            f"data.height={side}",
            f"data.width={side}",
            f"data.global_batch={parallel.world_size()}",
            f"device={device}",
            f"dtype={dtype}",
            "optim.warmup=0",
            *options,
        ],
    )


def shape_of_heads(doubles, singles, heads):
    """Fields of a model with so many blocks and attention heads of FLUX.1's width."""
    depth = dict(num_double_blocks=doubles, num_single_blocks=singles)
    return depth | dict(hidden_size=heads * HEAD_WIDTH, num_heads=heads)


def sample_inputs(config, seed=1):
    """A sample's clean tokens, text, pooled vector, noise, t and guidance."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    model, data = config.model, config.data
    of_image = 1, num_image_tokens(data.height // 8, data.width // 8), model.in_channels
    x0, txt = draw(of_image), draw(1, model.max_sequence_length, model.text_width)
    pooled, noise = draw(1, model.pooled_width), draw(of_image)
    drawn = dict(noise=noise, t=torch.tensor([0.5]), guidance=torch.tensor([3.5]))
    on_device = {name: value.to(config.device) for name, value in drawn.items()}
    return *(x.to(config.device) for x in (x0, txt, pooled)), on_device


def our_step(config):
    """(a function that takes one of our steps and returns its loss, a tensor, the model)."""
    run = set_up(config, *parallel.start_ranks(config.parallel, config.device))
    x0, txt, pooled, drawn = sample_inputs(config)

    def step():
        loss = flow_loss(run, x0, txt, pooled, **drawn).mean()
        loss.backward()
        optimizer_step(run, 0)
        return loss.detach()

    return step, run.model


def their_step(config, checkpointing, weights=None, prepare=lambda model: None):
    """The same of diffusers' model, with `weights` in our layout where they are given.

    `prepare(model)` is called before the first step. Attention is not cuDNN's: its backward serves
    one layout of the gradient in a process, and diffusers' comes in two (`ContiguousGradient`).
    """
    with torch.device(config.device):
        model = build_diffusers(config.model.shape())
    if weights is not None:
        model.load_state_dict(conversion.from_fluxlite(weights, config.model.shape(), "diffusers"))
    if checkpointing != "none":
        model.enable_gradient_checkpointing()
    prepare(model)
    optimizers = optim.make_optimizers(
        SimpleNamespace(named_parameters=model.named_parameters), config.optim
    )
    x0, txt, pooled, drawn = sample_inputs(config)
    text = config.model.max_sequence_length
    ids = position_ids(config.data.height // 8, config.data.width // 8, text).to(config.device)
    inputs = dict(txt=txt, pooled=pooled, t=drawn["t"], guidance=drawn["guidance"])
    inputs, mixed = diffusers_inputs(inputs, ids), config.dtype == "bfloat16"

    def step():
        # around the backward too, which recomputes
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            with torch.autocast(config.device, torch.bfloat16, enabled=mixed):
                noisy = flow.add_noise(x0, drawn["noise"], drawn["t"])
                velocity = model(hidden_states=noisy, **inputs)[0]
            loss = flow.velocity_loss(velocity, x0, drawn["noise"]).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.optim.lr
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


# --- time -----------------------------------------------------------------------------------------


def wait_for_device():
    """Wait until a GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step, count=1):
    """(seconds of one of `count` steps in a row, what the last returned)."""
    wait_for_device()
    began = time.perf_counter()
    for _ in range(count):
        result = step()
    wait_for_device()
    return (time.perf_counter() - began) / count, result


def alternate_steps(steps, repeats, count=1):
    """{name: median seconds}, `count` steps of each after the other; the first round warms up."""
    times = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            seconds, _ = seconds_of(step, count)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
