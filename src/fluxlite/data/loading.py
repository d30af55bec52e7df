"""Samples read by worker processes that end with the process they work for, and not before it.

Ctrl-C and schedulers signal a whole process group. A worker that died of it would take the run's last steps along.
"""

import os
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

from fluxlite.cli.processes import deferred_signals, end_children_at_exit, serve_parent


def load_batches(dataset, *, workers, **options):
    """The batches of a DataLoader with so many worker processes, each with one thread; 0 reads in this process.

    The workers are forked: a start takes milliseconds, and the data set is shared and not copied.
    """
    if workers:
        options["worker_init_fn"] = partial(_start_worker, os.getpid())
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
        end_children_at_exit()
    own = torch.Generator()  # else the global one would be drawn from
    loader = DataLoader(dataset, num_workers=workers, generator=own, **options)
    with deferred_signals():  # a worker of a few moments has its parent's handlers still
        batches = iter(loader)
    yield from batches


def _start_worker(parent, _number):
    serve_parent(parent)
