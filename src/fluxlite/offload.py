"""A transformer larger than the accelerator: its blocks stay in host memory and pass through two buffers on the device.

While one block computes, the next one's weights are copied on a stream of their own. On the CPU there is nothing to stream: weights
are mapped from the disk, and the system drops pages that it needs for something else.
"""

import torch


def stream_blocks(model, device):
    """Move all but the blocks of `model` to `device`, and make each block fetch its weights there just before it runs."""
    blocks = [*model.double_blocks, *model.single_blocks]
    homes = [{name: pinned(p.data) for name, p in block.named_parameters()} for block in blocks]
    for name, child in model.named_children():
        if name not in ("double_blocks", "single_blocks"):
            child.to(device)
    feed = Feed(blocks, homes, torch.device(device))
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: feed.enter(number))
        block.register_forward_hook(lambda *_, number=number: feed.leave(number))
    return model


def pinned(tensor):
    """`tensor` in page-locked memory, from which copies to a GPU run beside its work; itself where there is no GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class Feed:
    """Two sets of weights on the device: that of the running block and that of the next, which is on its way."""

    def __init__(self, blocks, homes, device):
        self.blocks, self.homes, self.device = blocks, homes, device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = {}  # block number → ({name: tensor}, event)

    def fetch(self, number):
        """Start to copy a block's weights, unless they are on their way."""
        if number in self.ahead:
            return
        if self.side is None:
            self.ahead[number] = {k: v.to(self.device, copy=True) for k, v in self.homes[number].items()}, None
            return
        with torch.cuda.stream(self.side):
            weights = {k: v.to(self.device, non_blocking=True) for k, v in self.homes[number].items()}
            event = torch.cuda.Event()
            event.record(self.side)
        self.ahead[number] = weights, event

    def enter(self, number):
        """Give a block its weights, and send for the next block's."""
        self.fetch(number)
        weights, event = self.ahead.pop(number)
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for weight in weights.values():
                weight.record_stream(current)  # the allocator must not reuse them before this block is done
        for name, parameter in self.blocks[number].named_parameters():
            parameter.data = weights[name]
        self.fetch((number + 1) % len(self.blocks))

    def leave(self, number):
        """Take a block's weights off the device again."""
        for name, parameter in self.blocks[number].named_parameters():
            parameter.data = self.homes[number][name]
