"""This process among its ranks, and small values that ranks tell each other."""

import os
import re
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


def world_size():
    """Processes of this run, before and after the process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """This process's number, before and after the process group exists."""
    return int(os.environ.get("RANK", 0))


def num_nodes():
    """Machines of this run, each with as many processes; 1 where they have not as many."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return 1 if world_size() % here else world_size() // here


# gloo raises a bare RuntimeError, its text after the place in gloo's source
GLOO_FAILURE = re.compile(
    r"\[\S*gloo/(transport|rendezvous)/\S+:\d+\] (Connection closed by peer|Connect timeout"
    r"|Read timeout|Write timeout|Timed out waiting|timed out connecting"
    r"|Application timeout caused pair closure|Socket closed|Socket unexpectedly closed"
    r"|Pair is not connected|Read error|writev|send )"
)


@contextmanager
def watching_ranks(config, remedy="resume=auto goes on from the last checkpoint."):
    """Turn the failure of a collective, which tells little, into a `ValueError` that says what has
    happened and what to do.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or GLOO_FAILURE.search(text)):
            raise
        waited = f"another rank kept this one waiting for parallel.timeout_s={config.timeout_s} s"
        what = waited if re.search("time(d )?out", text, re.I) else "another rank has ended"
        raise ValueError(
            f"{what}: it says why, above or in torchrun's list (exit code -9: killed, as where "
            f"memory runs out). {remedy} "
            f"({text.split('. ')[0]})"
        ) from error


# --- small values of all ranks -------------------------------------------------------------------


def gather_values(value):
    """What each rank has as `value`, a small Python object, as a list in their order;
    collective.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_rank_does(work, group=None):
    """What `work()` returns on rank 0, on every rank, told in a group of all; collective.

    What a disk can cause there, `ValueError`, `OSError` or `MemoryError`, is raised on every rank.
    """
    if not dist.is_initialized():
        return work()
    told = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told = [(work(), None)]
        except (ValueError, OSError, MemoryError) as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, group=group)
    result, error = told[0]
    if error is not None:
        raise error
    return result


def gather_on_first(value, group):
    """On rank 0 what each rank of a group of all has as `value`, as a list in their order; on
    others None. Collective.
    """
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, group=group)
    return values


def patient_group():
    """A group of all ranks that wait for each other for as long as it takes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def wait_for_all():
    """Wait for the other ranks for as long as it takes: set-up may be much slower on one node than
    on another.
    """
    dist.barrier(group=patient_group())
