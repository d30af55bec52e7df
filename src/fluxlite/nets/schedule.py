"""The times at which a published pipeline is drawn, as its scheduler/scheduler_config.json says.

That file describes diffusers' FlowMatchEulerDiscreteScheduler. Without one FLUX.1-dev's is assumed
of a model that has a guidance input, and FLUX.1-schnell's of any other.
"""

import math
from dataclasses import dataclass

import torch

from fluxlite import __version__
from fluxlite.cli.options import check_options, option, shortened, typed_description
from fluxlite.nets import flow
from fluxlite.nets.latents import MAX_SIDE, check_size

SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
SHIFT_REMEDY = "name shift= (resolution, none or a factor) to draw with Euler steps all the same"


@dataclass
class SchedulerConfig:
    """What is read of a scheduler_config.json; the defaults are diffusers'."""

    shift: float = option(1.0, "factor of the time shift at any resolution", above=0, at_most=1e6)
    use_dynamic_shifting: bool = option(False, "whether the factor follows from the resolution")
    base_shift: float = option(0.5, "mu at base_image_seq_len", at_least=-20, at_most=20)
    max_shift: float = option(1.15, "mu at max_image_seq_len", at_least=-20, at_most=20)
    base_image_seq_len: int = option(256, "image tokens", at_least=1, at_most=1 << 30)
    max_image_seq_len: int = option(4096, "image tokens", at_least=1, at_most=1 << 30)
    time_shift_type: str = option("exponential", "of mu", choices=("exponential", "linear"))
    shift_terminal: float | None = option(None, "the last time before 0", at_least=0, below=1)
    num_train_timesteps: int = option(1000, "what t = 1 is to the model", at_least=1)
    invert_sigmas: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    stochastic_sampling: bool = False
    _class_name: str = SCHEDULER_CLASS


DEV_SCHEDULER, SCHNELL_SCHEDULER = (
    SchedulerConfig(use_dynamic_shifting=True, shift=3.0),
    SchedulerConfig(),
)
# Those of its settings that other models' schedulers have, and ours does not follow.
FIXED_FIELDS = (
    "num_train_timesteps",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
)
FIXED_FIELDS += ("use_beta_sigmas", "stochastic_sampling", "_class_name")


def read_scheduler(file, values):
    """The `SchedulerConfig` of the `values` that a file holds; `ValueError` names the file."""
    return typed_description(file, SchedulerConfig, values, foreign=True)


def is_schnell(scheduler):
    """Whether the times are not shifted at all, which tells FLUX.1-schnell from other models."""
    return not scheduler.use_dynamic_shifting and scheduler.shift == 1


def scheduled_factor(scheduler, num_image_tokens):
    """The factor of the time shift for so many packed tokens, as FluxPipeline computes it."""
    if not scheduler.use_dynamic_shifting:
        return scheduler.shift
    ends = scheduler.base_image_seq_len, scheduler.max_image_seq_len
    if ends[0] == ends[1]:
        raise ValueError(
            f"base_image_seq_len and max_image_seq_len are both {ends[0]}: {SHIFT_REMEDY}"
        )
    mu = flow.time_shift_mu(num_image_tokens, (scheduler.base_shift, scheduler.max_shift), ends)
    factor = math.exp(min(mu, 100)) if scheduler.time_shift_type == "exponential" else mu
    if not 0 < factor < 1e12:
        raise ValueError(
            f"the time shift for {num_image_tokens} tokens is {factor:.3g}: {SHIFT_REMEDY}"
        )
    return factor


def scheduled_times(scheduler, steps, num_image_tokens):
    """Sampling times (steps + 1,) from 1 to 0. Raises `ValueError` for what is not followed."""
    for name in FIXED_FIELDS:
        value = getattr(scheduler, name)
        if value != getattr(SCHNELL_SCHEDULER, name):
            raise ValueError(
                f"scheduler_config.json says {name}={value}, not supported: {SHIFT_REMEDY}"
            )
    if scheduler.shift_terminal and steps < 2:
        raise ValueError("scheduler_config.json says shift_terminal, which takes steps=2 or more")
    factor = scheduled_factor(scheduler, num_image_tokens)
    return flow.schedule(steps, factor, terminal=scheduler.shift_terminal)


@dataclass
class SampleConfig:
    """How pictures are drawn."""

    height: int = option(1024, "height in pixels", at_least=16, at_most=MAX_SIDE)
    width: int = option(1024, "width in pixels", at_least=16, at_most=MAX_SIDE)
    steps: int = option(28, "Euler steps of a picture", at_least=1, at_most=10_000)
    guidance: float = option(
        3.5,
        "guidance embedding of a picture, for models that have one (dev)",
        at_least=0,
        at_most=1000,
    )
    true_cfg: float = option(
        1.0,
        "strength of classifier-free guidance away from negative_prompt; 1 for none",
        at_least=1,
        at_most=1000,
    )
    shift: str = option(
        "auto",
        "shift of t: auto (the checkpoint's scheduler_config.json, else resolution, or none "
        "without guidance), resolution, none, or a factor, t' = s*t / (1 + (s - 1)*t)",
    )
    max_sequence_length: int = option(
        512, "T5 tokens that prompts are padded and cut to", at_least=1, at_most=10_000
    )

    def validate(self, downsampling=1):
        """Raise `ValueError` for what no autoencoder can draw, or not one of so many pixels a
        cell.
        """
        check_options(self)
        check_size(self.height, self.width, downsampling)
        if self.shift != "auto":
            flow.shift_factor(self.shift, 256, "shift")


def read_settings(where, values):
    """{field of SampleConfig: value} of fluxlite.json or of a checkpoint's metadata, checked.

    `version` says which fluxlite wrote them: to 0.1 a shift of 3 was the factor e^3, and still is.
    Without a version a numeric shift could be either, and is refused. Raises `ValueError` that
    names the file, `where`.
    """
    version = values.get("version", "")
    given = {name: value for name, value in values.items() if name != "version"}
    config = typed_description(where, SampleConfig, given)
    try:
        if config.shift not in ("auto", "resolution", "none"):
            config.shift = shift_as_factor(config.shift, version)
        config.validate()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return {name: getattr(config, name) for name in given}


def shift_as_factor(shift, version):
    """A numeric shift that a version of fluxlite wrote, as the factor that it is today."""
    if not version:
        raise ValueError(
            f'shift={shift} and no "version": to fluxlite 0.1 that was a factor of e^{shift}; '
            "write "
            f'"version": "{__version__}" beside the factor that is meant'
        )
    if not str(version).startswith("0.1."):
        return shift
    return str(math.exp(min(float(shift), 100)))


def times_for(config, model_config, num_image_tokens):
    """Sampling times (steps + 1,) of `config.shift`, or with "auto" of the model's own scheduler.

    Without one they are FLUX.1-dev's, and of a model without guidance FLUX.1-schnell's.
    """
    if config.shift != "auto":
        factor = flow.shift_factor(config.shift, num_image_tokens, "shift")
        return flow.schedule(config.steps, factor)
    assumed = DEV_SCHEDULER if model_config.guidance_embed else SCHNELL_SCHEDULER
    return scheduled_times(model_config.scheduler or assumed, config.steps, num_image_tokens)


def check_times(times):
    """Times that a caller names as a float32 tensor (steps + 1,); raises `ValueError`."""
    try:
        times = torch.as_tensor(times, dtype=torch.float32).cpu()
    except (TypeError, ValueError):
        raise ValueError(f"times={shortened(times)} must be numbers that fall") from None
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"times={shortened(times.tolist())}: name two or more, one after the other"
        )
    if not (times.diff() < 0).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError(
            f"times={shortened(times.tolist())} must fall, from 1 for noise to 0 for a picture"
        )
    return times


def cut_times(times, start_time):
    """What is left of times at `start_time`: that, then those below it; raises `ValueError`."""
    start = torch.tensor([start_time], dtype=torch.float32)
    left = times[times < start]
    if not 0 < start_time <= 1 or not len(left):
        raise ValueError(
            f"start_time={start_time} must be above {times[-1]:g}, the last time, and at most 1"
        )
    return torch.cat([start, left])


def strength_times(times, strength):
    """The last of times, of which a drawing from a picture takes so large a part: as many steps as
    diffusers takes.
    """
    steps = len(times) - 1
    return times[int(max(steps - min(steps * strength, steps), 0)) :]
