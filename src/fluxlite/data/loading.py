"""Samples read by worker processes that end with the process they work for, and not before it.

Ctrl-C and schedulers signal a whole process group. A worker that died of it would take the run's
last steps along.
"""

import os
import signal
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

from fluxlite.cli.processes import deferred_signals, end_children_at_exit, serve_parent


def load_batches(dataset, *, workers, collate_fn, **options):
    """The batches of a DataLoader with so many worker processes, each with one thread; 0 reads in
    this process.

    The workers are forked: a start takes milliseconds, and the data set is shared and not copied.
    Their `ValueError` and `OSError` are raised here as they are, without a worker's traceback, and
    a `ValueError` where one of them dies.
    """
    if workers:
        options["worker_init_fn"] = partial(_start_worker, os.getpid())
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
        end_children_at_exit()
    own = torch.Generator()  # else the global one would be drawn from
    options |= dict(num_workers=workers, collate_fn=partial(_collate, collate_fn), generator=own)
    loader = DataLoader(_PassedErrors(dataset), **options)
    try:
        for batch in _start_workers(loader):
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ValueError(
            f"a loader process died, perhaps of too little memory: try fewer data.workers ({error})"
        ) from error


def _start_workers(loader):
    """An iterator over a DataLoader, its processes started.

    torch's handler of a child's death would raise anywhere, in the middle of a save too; the
    iterator notices a dead worker by itself, when it waits for it.
    """
    before = signal.getsignal(signal.SIGCHLD)
    with deferred_signals():  # a worker of a few moments has its parent's handlers still
        batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return batches


class _PassedErrors:
    """A data set whose `ValueError` and `OSError` are items."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return error


def _collate(collate, items):
    """What `collate` makes of a batch's items, or the first error among them."""
    listed = items if isinstance(items, list) else [items]
    errors = [item for item in listed if isinstance(item, Exception)]
    return errors[0] if errors else collate(items)


def _start_worker(parent, _number):
    serve_parent(parent)
