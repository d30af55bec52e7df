"""A data set's samples in batches, read by worker processes.

They end with the process they work for, and not before it.

Ctrl-C and schedulers signal a whole process group. A worker that died of it would take the run's
last steps along.
"""

import itertools
import logging
import os
import signal
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

from fluxlite.cli.processes import deferred_signals, end_children_at_exit, serve_parent

log = logging.getLogger("fluxlite")


# --- one rank's batches ---------------------------------------------------------------------------


def make_loader(
    dataset,
    *,
    global_batch,
    micro_batch,
    dp_rank,
    dp_size,
    start_index,
    stop_index=None,
    workers=0,
    pinned=False,
):
    """One rank's micro-batches from `start_index` to `stop_index` or for ever: an iterator.

    Both are multiples of `global_batch`. Step s, slice a, rank r takes `micro_batch` indices from
    s·global_batch + (a·dp_size + r)·micro_batch on. Batches are dictionaries as samples are (see
    `fluxlite.data`), with a dimension B in front of each tensor, `pinned` in page-locked memory.
    Raises `ValueError` where more than `max_bad_fraction` of 100 samples or more, or of an epoch,
    are bad.
    """
    for name, value, multiple in (
        ("global_batch", global_batch, micro_batch * dp_size),
        ("start_index", start_index, global_batch),
        ("stop_index", stop_index or 0, global_batch),
    ):
        if value % multiple:
            raise ValueError(f"{name}={value} must be a multiple of {multiple}")
    first, stride = start_index + dp_rank * micro_batch, dp_size * micro_batch
    batches = load_batches(
        dataset,
        workers=workers,
        batch_sampler=_slices(first, stop_index, stride, micro_batch),
        prefetch_factor=4 if workers else None,
        collate_fn=collate_samples,
        pin_memory=pinned,
    )
    size, share = len(dataset), -(-len(dataset) // dp_size)
    return _counted(batches, dataset.config.max_bad_fraction, size=size, share=share)


def _slices(first, stop, stride, size):
    """Lists of `size` successive indices, every `stride`-th of them: a DataLoader's sampler."""
    starts = itertools.count(first, stride) if stop is None else range(first, stop, stride)
    return (list(range(start, start + size)) for start in starts)


def collate_samples(items):
    """Samples as a batch: tensors stacked, indices a LongTensor (B,), the rest lists."""
    batch = {}
    for name in items[0]:
        values = [item[name] for item in items]
        batch[name] = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    batch["indices"] = torch.tensor(batch["indices"])
    return batch


def _counted(batches, max_bad_fraction, *, size, share):
    """The batches of one rank's `share` of `size` samples an epoch.

    What they skipped is logged and counted, once by key.
    """
    seen, bad, logged = 0, set(), set()
    for batch in batches:
        skipped = batch.pop("bad")
        seen += len(skipped)
        # what a substitute passed over as well has a place of its own
        bad.update(entries[0] for entries in skipped if entries)
        for entry in itertools.chain.from_iterable(skipped):
            if entry not in logged:
                log.warning("skipped %s", entry)
            logged.add(entry)
        if seen >= min(100, share) and len(bad) > max_bad_fraction * min(seen, size):
            shown, limit = "; ".join(sorted(bad)[:3]), f"data.max_bad_fraction={max_bad_fraction}"
            raise ValueError(
                f"{len(bad)} of {min(seen, size)} samples cannot be used, more than {limit}: "
                f"{shown}"
            )
        yield batch


# --- worker processes -----------------------------------------------------------------------------


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
