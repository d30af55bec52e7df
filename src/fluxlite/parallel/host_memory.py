"""Tensors that wait in host memory until a device needs them again.

A copy goes beside the computation, on a stream of its own. `HOST_TENSORS` are those that wait: on
fake ranks, where device and host are one, preflight counts them apart.
"""

from functools import cache
from weakref import WeakSet

import torch
from torch.autograd.graph import saved_tensors_hooks

HOST_TENSORS = WeakSet()


def host_buffer(size, dtype, *, pinned):
    """An empty tensor in host memory, page-locked for copies to and from a GPU."""
    buffer = torch.empty(size, dtype=dtype, pin_memory=pinned)
    HOST_TENSORS.add(buffer)
    return buffer


@cache
def host_stream(device):
    """The stream on which a device's tensors go to the host."""
    return torch.cuda.Stream(device)


def send_to_host(tensor):
    """A tensor (B, L, H) as (device, its copy in host memory); others, which are small or shared by
    all blocks, as they are.
    """
    if tensor.ndim != 3:
        return None, tensor
    there = host_buffer(tensor.shape, tensor.dtype, pinned=tensor.is_cuda)
    side = host_stream(tensor.device) if tensor.is_cuda else None
    if side:
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        tensor.record_stream(side)
    with torch.cuda.stream(side):  # of None, the current one
        there.copy_(tensor, non_blocking=True)
    return tensor.device, there


def bring_back(sent):
    """The tensor that `send_to_host` was given."""
    device, tensor = sent
    if device is None:
        return tensor
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(host_stream(device))
    return tensor.to(device, non_blocking=True, copy=True)


def keep_on_host(forward, *args):
    """A forward whose tensors (B, L, H) for the backward wait in host memory."""
    with saved_tensors_hooks(send_to_host, bring_back):
        return forward(*args)
