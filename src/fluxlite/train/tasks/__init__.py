"""What can be trained: each task is a `Task` in a file of its own."""

from fluxlite.train.tasks.controlnet import CONTROLNET
from fluxlite.train.tasks.full import FULL


def choose_task(config):
    """The `Task` that a `TrainConfig` asks for."""
    return CONTROLNET if config.controlnet.train else FULL
