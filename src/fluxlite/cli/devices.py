"""What this machine computes on: its device, in which precision, and whether it can compile."""

import importlib.util
import os
import re
import shutil
from dataclasses import replace
from functools import cache

import torch

from fluxlite.cli.messages import warn_for_all

FLOAT8_KINDS = "none", "rowwise", "tensorwise"
FLOAT8_MULTIPLE = 16  # of widths, and in training of tokens

CPU_BF16 = "avx512_bf16", "amx_bf16", "bf16", "arm_bf16"  # as torch names what computes in it


def default_device():
    """The machine's accelerator, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device_name(name):
    """The match of cpu, cuda or cuda:1, whose group 1 is the number; raises `ValueError` for any
    other device.
    """
    known = re.fullmatch(r"cpu|cuda(:\d{1,4})?", name)
    if not known:
        raise ValueError(f"device={name}: fluxlite computes on cpu and cuda: choose one of them")
    return known


def check_device(name):
    """Raise `ValueError` where the machine has no device of a name."""
    known, count = check_device_name(name), torch.cuda.device_count()
    if name != "cpu" and default_device() != "cuda":
        reason = "finds no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise ValueError(
            f"device={name}: torch {torch.__version__} {reason}: choose cpu, or install a torch "
            "for this machine's GPU"
        )
    if known[1] and int(known[1][1:]) >= count:
        raise ValueError(f"device={name}: there are {count} GPUs")


def choose_compile(asked, device):
    """Whether blocks are compiled: as `asked`, true or false; with "auto" on a GPU that can.

    Raises `ValueError` where that is true and there is nothing to compile with.
    """
    on_gpu = device.startswith("cuda")
    if asked is False or (asked == "auto" and not on_gpu):
        return False
    missing = missing_compiler(device)
    if missing and asked is True:
        raise ValueError(f"compile=true needs {missing}, or leave compile=false")
    if missing:
        warn_of_eager(missing)
    return not missing


def missing_compiler(device):
    """What torch.compile lacks for a device, and the remedy, or None.

    It is a C++ compiler on the CPU; on a GPU Triton, a C compiler for Triton's launchers, or Volta.
    """
    if not device.startswith("cuda"):
        wanted = os.environ.get("CXX", "g++")
        there = any(shutil.which(name) for name in (wanted, "clang++"))
        return None if there else f"a C++ compiler, and there is no {wanted}: install g++"
    if importlib.util.find_spec("triton") is None:
        return "Triton on a GPU: pip install triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "clang")):
        return "a C compiler for Triton, and there is no gcc: install it"
    old = torch.cuda.get_device_capability(device) < (7, 0)
    return "a GPU of compute capability 7.0 or more: use another" if old else None


@cache
def warn_of_eager(missing):
    """Say once why compile=auto compiles nothing."""
    warn_for_all("compile=auto compiles nothing, and steps are slower: it needs %s", missing)


def default_dtype(device):
    """What a device computes in fast: bfloat16 where it is in hardware, else float32."""
    if device.startswith("cuda"):
        in_hardware = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = torch.cpu.get_capabilities()
        in_hardware = any(has.get(name) for name in CPU_BF16)
    return "bfloat16" if in_hardware else "float32"


def has_float8(device):
    """Whether the device multiplies in float8 in hardware."""
    return device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 9)


def float8_conflicts(key, device, dtype, hidden_size):
    """(whether it is so, text) of each way in which a machine or a model has no float8.

    `key` is the setting that asks for it.
    """
    yield (
        importlib.util.find_spec("torchao") is None,
        f"{key} needs torchao: pip install torchao, or leave it out",
    )
    yield (
        not has_float8(device),
        f"{key} needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), and "
        f"device={device} is none: leave it out",
    )
    yield dtype != "bfloat16", f"{key} needs dtype=bfloat16, not {dtype}"
    yield (
        hidden_size % FLOAT8_MULTIPLE,
        f"{key} needs widths that are multiples of {FLOAT8_MULTIPLE}, and model.hidden_size="
        f"{hidden_size} is none: leave it out",
    )


def settle_machine(config):
    """A copy of a configuration with `device`, `dtype` and `compile` set: where they are None or
    "auto", to what the machine has.

    Raises `ValueError` where it has no such device, or nothing to compile with.
    """
    device = str(config.device or default_device())
    check_device(device)
    compile = choose_compile(config.compile, device)
    dtype = config.dtype or default_dtype(device)
    return replace(config, device=device, dtype=dtype, compile=compile)


def memory_bytes(device):
    """Bytes of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
