"""What can be trained. A new task is a `Task` in this list; the first that a configuration asks for
is its own.
"""

from fluxlite.train.tasks.controlnet import CONTROLNET
from fluxlite.train.tasks.full import FULL

TASKS = (CONTROLNET, FULL)


def choose_task(config):
    """The `Task` that a `TrainConfig` asks for."""
    return next(task for task in TASKS if task.is_asked(config))
