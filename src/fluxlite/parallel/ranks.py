"""This process among its ranks, its device, and small values that ranks tell each other."""

import importlib.util
import os
import re
import shutil
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def world_size():
    """Processes of this run, before and after the process group exists."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """This process's number, before and after the process group exists."""
    return int(os.environ.get("RANK", 0))


# gloo raises a bare RuntimeError, its text after the place in gloo's source
GLOO_FAILURE = re.compile(
    r"\[\S*gloo/(transport|rendezvous)/\S+:\d+\] (Connection closed by peer|Connect timeout"
    r"|Read timeout|Write timeout|Timed out waiting|timed out connecting"
    r"|Application timeout caused pair closure|Socket closed|Socket unexpectedly closed"
    r"|Pair is not connected|Read error|writev|send )"
)


@contextmanager
def watching_ranks(config):
    """Turn the failure of a collective, which tells little, into a `ValueError` that says what has
    happened and what to do.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or GLOO_FAILURE.search(text)):
            raise
        raise ValueError(
            "another rank died, or kept this one waiting for "
            f"parallel.timeout_s={config.timeout_s} s. The rank that failed first "
            "says why, above or in torchrun's list; resume=auto goes on from the last checkpoint. "
            f"({text.split('. ')[0]})"
        ) from error


# --- the device ----------------------------------------------------------------------------------


def default_device():
    """The machine's accelerator, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """Raise `ValueError` where the machine has no device of a name: cpu, cuda or cuda:1."""
    known, count = re.fullmatch(r"cpu|cuda(:\d{1,4})?", name), torch.cuda.device_count()
    if not known or (name != "cpu" and default_device() != "cuda"):
        raise ValueError(f"device={name}: this machine has {default_device()}")
    if known[1] and int(known[1][1:]) >= count:
        raise ValueError(f"device={name}: there are {count} GPUs")


def check_compiler(device):
    """Raise `ValueError` where torch.compile has nothing to compile with: a C++ compiler on the
    CPU, Triton on a GPU.
    """
    if str(device).startswith("cuda"):
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                "compile=true needs Triton on a GPU: pip install triton, or leave compile=false"
            )
        return
    wanted = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (wanted, "clang++")):
        raise ValueError(
            f"compile=true needs a C++ compiler, and there is no {wanted}: install g++, or leave "
            "compile=false"
        )


def has_bf16(device):
    """Whether the device computes in bfloat16 in hardware."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def has_float8(device):
    """Whether the device multiplies in float8 in hardware."""
    return str(device).startswith("cuda") and torch.cuda.get_device_capability() >= (8, 9)


def default_dtype(device):
    """What a device computes in fast: bfloat16 where it is in hardware, else float32."""
    return "bfloat16" if has_bf16(device) else "float32"


# --- small values of all ranks -------------------------------------------------------------------


def mean_over_ranks(value):
    """A float32 scalar tensor averaged over all ranks."""
    value = value.detach().float().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def max_over_ranks(values):
    """The greatest of each of some numbers, a float tensor (n,), over all ranks: a list."""
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def gather_values(value):
    """What each rank has as `value`, a small Python object, as a list in their order;
    collective.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_rank_does(work):
    """What `work()` returns on rank 0, on every rank; collective.

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
    dist.broadcast_object_list(told)
    result, error = told[0]
    if error is not None:
        raise error
    return result


def wait_for_all():
    """Wait for the other ranks for as long as it takes: set-up may be much slower on one node than
    on another.
    """
    dist.barrier(group=dist.new_group(backend="gloo", timeout=timedelta(days=7)))
