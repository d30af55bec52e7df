"""What this machine computes on: its device, in which precision, and whether it can compile."""

import importlib.util
import os
import re
import shutil
from dataclasses import replace

import torch

CPU_BF16 = "avx512_bf16", "amx_bf16", "bf16", "arm_bf16"  # as torch names what computes in it


def default_device():
    """The machine's accelerator, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """Raise `ValueError` where the machine has no device of a name: cpu, cuda or cuda:1."""
    known, count = re.fullmatch(r"cpu|cuda(:\d{1,4})?", name), torch.cuda.device_count()
    if not known:
        raise ValueError(f"device={name}: fluxlite computes on cpu and cuda: choose one of them")
    if name != "cpu" and default_device() != "cuda":
        reason = "finds no GPU" if torch.backends.cuda.is_built() else "is built without CUDA"
        raise ValueError(
            f"device={name}: torch {torch.__version__} {reason}: choose cpu, or install a torch "
            "for this machine's GPU"
        )
    if known[1] and int(known[1][1:]) >= count:
        raise ValueError(f"device={name}: there are {count} GPUs")


def check_compiler(device):
    """Raise `ValueError` where torch.compile has nothing to compile with: a C++ compiler on the
    CPU, Triton on a GPU.
    """
    if device.startswith("cuda"):
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


def default_dtype(device):
    """What a device computes in fast: bfloat16 where it is in hardware, else float32."""
    if device.startswith("cuda"):
        in_hardware = torch.cuda.get_device_capability() >= (8, 0)
    else:
        has = torch.cpu.get_capabilities()
        in_hardware = any(has.get(name) for name in CPU_BF16)
    return "bfloat16" if in_hardware else "float32"


def has_float8(device):
    """Whether the device multiplies in float8 in hardware."""
    return device.startswith("cuda") and torch.cuda.get_device_capability() >= (8, 9)


def settle_machine(config):
    """A copy of a configuration with `device` and `dtype` set: where they are None, to what the
    machine has.

    Raises `ValueError` where it has no such device.
    """
    device = str(config.device or default_device())
    check_device(device)
    return replace(config, device=device, dtype=config.dtype or default_dtype(device))
