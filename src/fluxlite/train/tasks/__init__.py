"""What can be trained: the transformer itself, and each other task in a file of its own."""

from operator import itemgetter

from fluxlite.train.building import flux_weights, wrap_flux
from fluxlite.train.tasks.conditions import condition_task
from fluxlite.train.tasks.controlnet import CONTROLNET
from fluxlite.train.tasks.lora import LORA
from fluxlite.train.tasks.task import Task

# from random weights or a checkpoint's
FULL = Task(name="transformer", models=((wrap_flux, flux_weights),), velocity_of=itemgetter(0))


def choose_task(config):
    """The `Task` that a `TrainConfig` asks for."""
    if config.controlnet.train and config.lora.train:
        raise ValueError("controlnet=default and lora=default: train one at a time")
    task = CONTROLNET if config.controlnet.train else LORA if config.lora.train else FULL
    kind = config.model.kind
    return task if kind == "plain" else condition_task(task, kind)
