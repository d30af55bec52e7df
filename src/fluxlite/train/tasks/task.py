"""What is trained is a task: a few functions, which are all that differs from run to run.

The loop, validation, grids, checkpoints and preflight call them and know no task by name. Inputs
are {name: tensor (B, …)}: what the velocity takes beside noisy latents, text and t.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fluxlite import parallel


@dataclass(frozen=True)
class Task:
    """What is trained, beside what, and on which inputs."""

    name: str  # of what is trained, as a checkpoint says it
    is_asked: Callable  # (config) → whether a `TrainConfig` asks for it
    check_settings: Callable  # (config); raises `ValueError` where it cannot be trained so
    wrap_models: Callable  # (config, mesh) → wrapped, on meta: the trained first, a Flux last
    model_weights: Callable  # (config, device) → for each of these its (name, values), one by one
    velocity_of: Callable  # (models) → velocity(img, txt, rope, *, t, pooled, guidance, **inputs)
    encode_inputs: Callable = lambda run, batch: {}  # → inputs
    drop_inputs: Callable = lambda run, inputs, indices: inputs  # some emptied, for a step
    make_meter: Callable = lambda run, held_out: None  # → `every`, `measure(step)`, `plot(folder)`
    shown: tuple = ()  # ("control", "controls"): captions and names of pictures that grids show too

    def build_models(self, config, device, mesh):
        """The models, sharded and filled."""
        weights, place = self.model_weights(config, device), device
        if config.parallel.cpu_offload:
            place = "cpu"
        models = self.wrap_models(config, mesh)
        return [parallel.fill(model, values, place) for model, values in zip(models, weights)]
