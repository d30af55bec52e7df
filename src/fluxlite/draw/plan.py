"""What a drawing takes, settled and checked before anything is loaded.

C channels, h and w in latent cells.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fluxlite.cli.options import (
    check_options,
    naming_place,
    refuse_first,
    shortened,
    typed_options,
)
from fluxlite.draw import canvas, kinds
from fluxlite.draw.control import Control, open_control
from fluxlite.draw.pipeline import (
    SAMPLE_FIELDS,
    DrawConfig,
    Pipeline,
    check_negative,
    check_tile,
    one_or_several,
)
from fluxlite.draw.posteriors import Posteriors
from fluxlite.draw.redux import Redux, open_redux
from fluxlite.draw.sampling import initial_noise
from fluxlite.draw.sharing import picture_conflicts
from fluxlite.draw.solvers import SOLVERS
from fluxlite.nets.latents import PATCH, num_image_tokens, pack_latents
from fluxlite.nets.schedule import SampleConfig, check_times, cut_times, strength_times, times_for


@dataclass
class Plan:
    """All of a drawing that is settled before anything is loaded.

    `controls` are as they were given, `opened` by `open_control`; `pictures` are (index of its
    prompt, seed of its draws) each; `noise(numbers)` is their `start_latents`.
    """

    pipeline: Pipeline
    config: DrawConfig
    prompts: list
    inputs: kinds.Inputs
    sample: SampleConfig
    scene: kinds.Scene
    times: torch.Tensor
    controls: list
    opened: list
    pictures: list
    noise: Callable
    posteriors: Posteriors
    batches: list  # of `list_batches`
    strength: float | None  # that cut the times
    solver: Callable
    redux: list

    @property
    def size(self):
        """Height and width of what is drawn, in pixels."""
        return self.sample.height, self.sample.width

    @property
    def shape(self):
        """(C, h, w) of its latents."""
        return self.pipeline.latent_shape(*self.size)

    def texts(self):
        """What is encoded: the prompts and, for classifier-free guidance, the negative one."""
        return [*self.prompts, *[self.config.negative_prompt] * (self.sample.true_cfg > 1)]


def plan_drawing(
    pipeline,
    config,
    prompt,
    controls=(),
    given=(),
    latents=None,
    posteriors=None,
    solver="euler",
    **times_given,
) -> Plan:
    """The `Plan` of what `generate` takes, its pictures by name in `given`; raises `ValueError`."""
    prompts = one_or_several(prompt, str, "prompt", "a text or a list of texts")
    controls = one_or_several(controls, Control, "controls", "a Control or a list of them")
    refuse_first([(not prompts, "prompt=[] is empty: name what to draw")])
    given = dict(given)
    redux = one_or_several(given.pop("redux", ()), Redux, "redux", "a Redux or a list of them")
    seeds = settle_seeds(given.pop("seeds", None), config, len(prompts))
    inputs = kinds.open_inputs(len(prompts), **given)
    kinds.check_inputs(pipeline.kind, inputs, config, pipeline.where)
    if inputs.reference and not pipeline.loras:  # a LoRA may have been trained with them
        kinds.warn_untrained(pipeline.sources["transformer"].where)
    sample = settle_sample(pipeline, config, inputs.size)
    scene = settle_scene(pipeline, config, inputs, sample)
    cells = [pipeline.latent_shape(sample.height, sample.width)[1:]]
    cells += reference_cells(pipeline, scene)
    refuse_first(picture_conflicts(pipeline.sharing, sample, cells, redux))
    strength = None
    if times_given.get("start_time") is None:
        strength = kinds.settle_strength(pipeline.kind, inputs, config)
    times = settle_times(pipeline, config, sample, strength=strength, **times_given)
    size, width = (sample.height, sample.width), pipeline.model_config.text_width
    likened = [open_redux(one, width) for one in redux]
    opened = [open_control(control, pipeline, *size, len(prompts)) for control in controls]
    pictures, shape = list_pictures(seeds, config), pipeline.latent_shape(*size)
    noise = start_latents(latents, times, pictures, shape, from_noise=bool(inputs.image))
    draws = kinds.check_posteriors(posteriors, pictures, controls, shape)
    batches = list_batches(len(pictures), config)
    pipeline.check_encoders()
    found = sample, scene, times, controls, opened, pictures, noise, draws, batches, strength
    return Plan(pipeline, config, prompts, inputs, *found, find_solver(solver), likened)


def find_solver(solver):
    """A function from a name of `SOLVERS` or from itself; raises `ValueError`."""
    if callable(solver):
        return solver
    if solver not in SOLVERS:
        names = ", ".join(SOLVERS)
        raise ValueError(f"solver={shortened(solver)}: choose one of {names}, or pass a function")
    return SOLVERS[solver]


def solver_name(solver):
    """What metadata call a solver."""
    known = {function: name for name, function in SOLVERS.items()}
    return known.get(solver, getattr(solver, "__name__", "own"))


def settle_sample(pipeline, config, picture=None):
    """The checked `SampleConfig` of a `DrawConfig`: what that leaves open is the checkpoint's own,
    but a size that of a given `picture` (width, height), in as many pixels.
    """
    named = {name: getattr(config, name) for name in SAMPLE_FIELDS}
    given = {name: value for name, value in named.items() if value is not None}
    sample = typed_options(SampleConfig, pipeline.settings | given)
    if picture and not {"height", "width"} & given.keys():
        area, multiple = sample.height * sample.width, PATCH * pipeline.cell
        height, width = canvas.fitting_size(picture, area, multiple)
        sample = replace(sample, height=height, width=width)
        with naming_place("in the proportions of a picture of {}x{} pixels".format(*picture)):
            check_options(sample)
    check_negative(config.negative_prompt, sample.true_cfg)
    check_tile(config.tile, pipeline.cell)
    sample.validate(pipeline.cell)
    if "guidance" in given and not pipeline.model_config.guidance_embed:
        raise ValueError(
            "guidance: this model (as schnell) has no guidance input; leave the setting out"
        )
    return sample


def settle_scene(pipeline, config, inputs, sample):
    """The `kinds.Scene` of given pictures for a `SampleConfig`; raises `ValueError`."""
    if config.canny and not importlib.util.find_spec("cv2"):
        raise ValueError("canny=true needs OpenCV: pip install opencv-python-headless")
    own = typed_options(SampleConfig, pipeline.settings)
    size, area = (sample.height, sample.width), own.height * own.width
    return kinds.frame_inputs(inputs, config, size, area, PATCH * pipeline.cell)


def reference_cells(pipeline, scene):
    """(height, width) of a `Scene`'s references, in latent cells."""
    return [pipeline.latent_shape(*one.shape[2:])[1:] for one in scene.references]


def settle_times(pipeline, config, sample, times=None, start_time=None, strength=None):
    """The times (steps + 1,) of a drawing; raises `ValueError`."""
    if times is None:
        _, height, width = pipeline.latent_shape(sample.height, sample.width)
        model_config = pipeline.model_config
        times = times_for(sample, model_config, num_image_tokens(height, width))
    elif config.steps or config.shift:
        raise ValueError("times= takes the place of steps= and shift=: leave those out")
    else:
        times = check_times(times)
    if start_time is not None:
        refuse_first([(config.strength, "start_time= takes the place of strength=: name one")])
        return cut_times(times, start_time)
    return strength_times(times, strength) if strength else times


def settle_seeds(seeds, config, num_prompts):
    """(seed, number) of each prompt: of seeds that are given, each is that of one prompt alone.

    Raises `ValueError`.
    """
    if seeds is None:
        return [(config.seed, config.prompt_number + j) for j in range(num_prompts)]
    found = one_or_several(seeds, int, "seeds", "a whole number for each prompt")
    if len(found) != num_prompts:
        raise ValueError(f"seeds= has {len(found)} for {num_prompts} prompts: give one for each")
    return [(seed, config.prompt_number) for seed in found]


def list_pictures(seeds, config):
    """(index of its prompt, seed of its noise) of each picture, of prompts' (seed, number)."""
    found = []
    for j, (seed, number) in enumerate(seeds):
        for i in range(config.images_per_prompt):
            found.append((j, picture_seed(seed, number, config.picture_number + i)))
    return found


def picture_seed(seed, prompt_number, picture_number):
    """The seed of one picture's noise."""
    return f"{seed}.{prompt_number}.{picture_number}"


def list_batches(count, config):
    """(numbers of the pictures that are drawn together, places in it of those that are kept)."""
    batch = config.batch
    if config.place < 0:
        starts = range(0, count, batch)
        found = [range(first, min(first + batch, count)) for first in starts]
        return [(numbers, range(len(numbers))) for numbers in found]
    if config.place >= batch:
        raise ValueError(f"place={config.place} must be below batch={batch}")
    return [([number] * batch, [config.place]) for number in range(count)]


def start_latents(latents, times, pictures, shape, from_noise=False) -> Callable:
    """A function from some pictures' numbers to their packed latents (B, L, C) at times[0] or,
    `from_noise`, at 1.

    They are noise or, where they are given, those of `latents` (pictures, C, h, w). Raises
    `ValueError`.
    """
    if latents is None:
        if times[0] < 1 and not from_noise:
            raise ValueError(
                f"drawing begins at time {float(times[0]):g}, not at the noise of 1: give latents= "
                "at that time"
            )
        return lambda rows: initial_noise(shape, [pictures[i][1] for i in rows])
    stacked = stack_latents(latents)
    if stacked.shape != (len(pictures), *shape):
        raise ValueError(
            f"latents= of shape {(*stacked.shape,)}: {len(pictures)} pictures of this size take "
            f"{(len(pictures), *shape)}"
        )
    return lambda rows: pack_latents(stacked[list(rows)].float())


def stack_latents(latents):
    """One tensor of a tensor, an array or a list of them; raises `ValueError`."""
    try:
        stacked = torch.stack([torch.as_tensor(one) for one in latents])
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"latents={shortened(latents)} must be a tensor (pictures, C, h, w), or a list of "
            "(C, h, w)"
        ) from None
    if not stacked.is_floating_point():
        raise ValueError(f"latents= are {stacked.dtype}: give them as float32")
    return stacked
