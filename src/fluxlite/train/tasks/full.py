"""Training the transformer itself, from random weights or a checkpoint's."""

from fluxlite.train.building import flux_weights, wrap_flux
from fluxlite.train.tasks.controlnet import ControlNetTrainConfig
from fluxlite.train.tasks.task import Task


def check_no_control(config):
    """Raise `ValueError` where settings are for a ControlNet, which is not trained."""
    if config.controlnet != ControlNetTrainConfig() or config.data.control:
        raise ValueError(
            "controlnet.* and data.control= are for training a ControlNet: set "
            "controlnet=default too, or leave them out"
        )


FULL = Task(
    name="transformer",
    is_asked=lambda config: True,
    check_settings=check_no_control,
    wrap_models=lambda config, mesh: [wrap_flux(config, mesh)],
    model_weights=lambda config, device: [flux_weights(config, device)],
    velocity_of=lambda models: models[0],
)
