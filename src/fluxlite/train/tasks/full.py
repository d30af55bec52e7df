"""Training the transformer itself, from random weights or a checkpoint's."""

from operator import itemgetter

from fluxlite.train.building import flux_weights, wrap_flux
from fluxlite.train.tasks.task import Task

FULL = Task(name="transformer", models=((wrap_flux, flux_weights),), velocity_of=itemgetter(0))
