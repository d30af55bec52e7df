"""The host waits for no device: in a training step, in the loop around it, in sampling.

Meta tensors stand in for a GPU's (`benchmarks/waits.py`).
"""

import pytest
import torch

from benchmarks.waits import LATENTS, WaitCount, count_sampling_waits, count_training_waits
from fluxlite.nets import flow
from fluxlite.train import loop, optim, training_step

DEVICE = torch.device("meta")


def make_meta(*shape):
    return torch.empty(shape, device=DEVICE)


WAITS = {  # name: what a step might do
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "a branch": lambda x: 1 if x.isfinite().all() else 0,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "to the host": lambda x: x.to("cpu"),
    "to the device": lambda x: torch.ones(2).to(x.device),
    "a copy to the device": lambda x: x.copy_(torch.ones(x.shape)),
    "a copy to the host": lambda x: torch.ones(x.shape).copy_(x),
    "a constant": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "a list of places": lambda x: x[[0, 1]],
    "places on the host": lambda x: x[torch.tensor([0, 1])],
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.flatten().repeat_interleave(x.flatten().long()),
}
NO_WAITS = {
    "not blocking": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "a read begun": lambda x: torch.empty(x.shape).copy_(x, non_blocking=True),
    "a fill": lambda x: torch.full((2,), 3.5, device=x.device),
    "a number": lambda x: (x * 2 + 1).clamp(min=0.5),
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "an item of the host": lambda x: torch.tensor(2.0).item(),
    "places on the device": lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)],
    "where of three": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_what_waits_is_counted_once_and_what_does_not_is_not(name):
    with WaitCount() as count:
        {**WAITS, **NO_WAITS}[name](make_meta(3, 4))
    assert len(count.waits) == (name in WAITS), count.waits
    assert all("test_waits.py" in place for place in count.waits)


CONTROL = ["controlnet=default", "controlnet.num_double_blocks=1", "controlnet.dropout=0.5"]
CONTROL += ["data.control=canny", "controlnet.num_single_blocks=0"]
CIRCLES = ["data=fill50k", "data.count=40", "data.generate_size=32", "data.path={folder}/data"]
UNION = ["controlnet.num_modes=3", "data.control_mode=depth"]
LORA = [*LATENTS, "lora=default", "lora.rank=2"]
FULL = "parallel.activation_checkpointing=full"
SMALL = ["optim.kind=adamw8bit", "optim.weights=bfloat16", "optim.ema_decay=0"]
RUNS = {
    "pictures and captions": [],
    "circles": CIRCLES,
    "latents": LATENTS,
    "accumulation": [*LATENTS, "data.micro_batch=1"],
    "muon": [*LATENTS, "optim.kind=muon"],
    "no clipping": [*LATENTS, "optim.clip=0", "optim.ema_decay=0"],
    "float32": [*LATENTS, "dtype=float32", "flow.density=mode", "flow.guidance=uniform[1,5]"],
    "checkpointing": [*LATENTS, "parallel.activation_checkpointing=full"],
    "selective": [*LATENTS, "parallel.activation_checkpointing=selective"],
    "loader processes": [*LATENTS, "data.workers=1"],
    "bad steps are skipped": [*LATENTS, "optim.nonfinite=skip"],
    "8-bit moments": [*LATENTS, *SMALL],
    "a LoRA": [*LORA, "lora.dropout=0.2"],
    "a DoRA beside int8": [*LORA, "lora.dora=true", "model.quantize=int8"],
    "swapped nf4": [*LORA, "model.quantize=nf4", "parallel.swap_blocks=2", FULL],
    "activations on the host": [*LORA, "parallel.activation_offload=true", FULL],
    "a ControlNet": [*CONTROL, *UNION],
    "a ControlNet on latents": [*LATENTS, *CONTROL],
    "a ControlNet on pixels": [*CIRCLES, *CONTROL, "controlnet.hint=pixel"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_training_step_and_the_loop_around_it_never_wait(name, tmp_path):
    arguments = [argument.format(folder=tmp_path) for argument in RUNS[name]]
    assert count_training_waits(*arguments) == []


def waits_inside(monkeypatch, owner, name, wait):
    """Have a function wait for the device when it is called, in one way."""
    real = getattr(owner, name)

    def waiting(*args, **options):
        result = real(*args, **options)
        first = result[0] if isinstance(result, tuple) else result
        wait(first if isinstance(first, torch.Tensor) else make_meta(2, 2))
        return result

    monkeypatch.setattr(owner, name, waiting)


PLACES = {  # of a wait in a step with one micro-batch: a function, and how it waits
    "the loss": (training_step, "flow_loss", "item"),
    "noise is added": (flow, "add_noise", "to the device"),
    "the norm": (optim, "gradient_norm", "a branch"),
    "the step": (loop, "train_step", "tolist"),
    "the log": (loop, "log_step", "to the host"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_single_wait_in_a_training_step_is_caught(monkeypatch, place):
    *function, wait = PLACES[place]
    waits_inside(monkeypatch, *function, WAITS[wait])
    found = count_training_waits(*LATENTS, "data.micro_batch=4")
    assert len(found) == 3 and all("test_waits.py" in line for line in found), found


def test_sampling_never_waits_and_a_single_wait_is_caught(monkeypatch):
    assert count_sampling_waits() == []
    assert count_sampling_waits(true_cfg=2.0, negative_prompt="a fish") == []
    waits_inside(monkeypatch, flow, "euler_step", WAITS["item"])
    found = count_sampling_waits()
    assert len(found) == 3 and all("test_waits.py" in place for place in found), found
