"""Tensors on their way between the host and an accelerator, which neither waits for.

What is sent lies in page-locked memory: only from there does a copy run beside the host and beside
the kernels of another stream. On the CPU nothing travels.
"""

from functools import cache

import torch


def send_tensor(tensor, device):
    """The tensor on `device`; the host goes on before it is there."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # the allocator keeps it until the copy is over
    return tensor.to(device, non_blocking=True)


def begin_read(values):
    """Start to bring a small tensor to the host: a function that waits for it and returns a list.

    What is launched in between runs on.
    """
    if values.device.type == "cpu":
        return values.tolist
    arrived = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    arrived.copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def finish_read():
        if copied is not None:
            copied.synchronize()
        return arrived.tolist()

    return finish_read


# --- batches --------------------------------------------------------------------------------------

ON_HOST = ("indices",)  # keys of draws and numbers, which the host looks at


@cache
def copy_stream(device):
    """The stream on which batches are copied to a GPU: one, since freed memory stays a stream's."""
    return torch.cuda.Stream(device)


def feed_device(batches, device):
    """Batches with their tensors on `device`, but for `ON_HOST`.

    A GPU is sent each batch while the one before it is worked on.
    """
    if device.type == "cuda":
        return feed_gpu(batches, device)
    return (send_batch(batch, device) for batch in batches)


def feed_gpu(batches, device):
    """`feed_device` on a GPU: copies on a stream of their own, a batch ahead."""
    ahead = None
    for batch in batches:
        with torch.cuda.stream(copy_stream(device)):
            sent = send_batch(batch, device), torch.cuda.current_stream().record_event()
        if ahead is not None:
            yield receive_batch(*ahead)
        ahead = sent
    if ahead is not None:
        yield receive_batch(*ahead)


def send_batch(batch, device):
    """A batch whose tensors are on their way to `device`."""
    travels = {n for n, v in batch.items() if isinstance(v, torch.Tensor) and n not in ON_HOST}
    return {n: send_tensor(v, device) if n in travels else v for n, v in batch.items()}


def receive_batch(batch, copied):
    """A batch for the current stream, which works on it after the event `copied`."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.is_cuda:
            value.record_stream(stream)  # its memory is the copying stream's
    return batch
