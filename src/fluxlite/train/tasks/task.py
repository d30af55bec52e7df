"""What is trained is a task: a few functions, which are all that differs from run to run.

The loop, validation, grids, checkpoints and preflight call them and know no task by name. Inputs
are {name: tensor (B, …)}: what the velocity takes beside noisy latents, text and t.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fluxlite import parallel
from fluxlite.draw.offload import stream_blocks
from fluxlite.train.draws import draw_nothing


@dataclass(frozen=True)
class Task:
    """What is trained, beside what, and on which inputs."""

    name: str  # of what is trained, as a checkpoint says it
    # of the trained model first, of a Flux last: (config, mesh) → wrapped on meta, for no mesh as
    # it is, and (config, device) → its (name, values), one by one
    models: tuple
    velocity_of: Callable  # (models) → velocity(img, txt, rope, *, t, pooled, guidance, **inputs)
    check_settings: Callable = lambda config: None  # raises `ValueError`
    draw_inputs: Callable = draw_nothing  # (config, sample) → its draws, in a loader's process
    encode_inputs: Callable = lambda run, batch: {}  # → inputs, by those draws
    drop_inputs: Callable = lambda run, inputs, batch: inputs  # some emptied, for a step
    make_meter: Callable = lambda run, held_out: None  # → `every`, `measure(step)`, `plot(folder)`
    # (run, folder): what else a checkpoint's folder holds is written; collective
    write_files: Callable = lambda run, folder: None
    shown: tuple = ()  # ("control", "controls"): captions and names of pictures that grids show too

    def build_models(self, config, device, mesh):
        """The models, sharded and filled."""
        found, swapped = [], config.parallel.swap_blocks
        for wrap, weights_of in self.models:
            model = wrap(config, mesh)
            away = config.parallel.cpu_offload and not model.is_whole  # FSDP2 offloads
            away = away or swapped and wrap is self.models[-1][0]
            place = "cpu" if away else device
            found.append(parallel.fill_weights(model, weights_of(config, device), place))
        return place_models(found, device, swapped)


def place_models(models, device, swapped):
    """A task's models, so many blocks of the last one, which is frozen, streamed to the device."""
    if swapped:
        blocks = len(models[-1].double_blocks) + len(models[-1].single_blocks)
        stream_blocks(models[-1], device, blocks - swapped, training=True)
    return models
