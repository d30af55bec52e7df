"""A transformer larger than the accelerator: its blocks stay in host memory and pass through two
buffers on the device.

While one block computes, the next one's weights are copied on a stream of their own. On the CPU
there is nothing to stream: weights are mapped from the disk, and the system drops pages that it
needs for something else.
"""

import torch

OFFLOAD = ("none", "text", "all")


def stream_blocks(model, device):
    """Move all but the blocks of `model` to `device`, and make each block fetch its weights there
    just before it runs.
    """
    device = torch.device(device)
    for name, child in model.named_children():
        if name not in ("double_blocks", "single_blocks"):
            child.to(device)
    blocks = [*model.double_blocks, *model.single_blocks]
    feed = Feed(blocks, device)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: feed.enter(number))
        block.register_forward_hook(lambda *_, number=number: feed.leave(number))
    return model


class Feed:
    """Two flat buffers on the device, each large enough for any block: that of the running one, and
    that of the next.
    """

    def __init__(self, blocks, device):
        self.blocks, self.cuda = blocks, device.type == "cuda"
        self.homes = [self._home(block) for block in blocks]
        size, dtype = max(home.numel() for home in self.homes), self.homes[0].dtype
        self.buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        self.side = torch.cuda.Stream(device) if self.cuda else None
        if self.cuda:
            self.side.wait_stream(
                torch.cuda.current_stream(device)
            )  # whoever had the buffers' memory before must be done
        self.copied, self.used = (
            [None, None],
            [None, None],
        )  # for each buffer: its copy, its block's last use
        self.holds = [None, None]

    def _home(self, block):
        """A block's weights in one flat piece of host memory, page-locked for a GPU; its parameters
        become views of it.
        """
        parameters = list(block.parameters())
        home = torch.empty(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, pin_memory=self.cuda
        )
        self._point(block, home, fill=True)
        return home

    @staticmethod
    def _point(block, flat, fill=False):
        start = 0
        for p in block.parameters():
            view = flat[start : start + p.numel()].view(p.shape)
            if fill:
                view.copy_(p.data)
            p.data = view
            start += p.numel()

    def _fetch(self, number):
        """Start to copy a block's weights into its buffer, unless they are there or on their
        way.
        """
        slot = number % 2
        if self.holds[slot] == number:
            return
        self.holds[slot] = number
        home = self.homes[number]
        if not self.cuda:
            self.buffers[slot][: home.numel()].copy_(home)
            return
        with torch.cuda.stream(self.side):
            if self.used[slot] is not None:
                self.side.wait_event(self.used[slot])  # the block that has the buffer must be done
            self.buffers[slot][: home.numel()].copy_(home, non_blocking=True)
            self.copied[slot] = self.side.record_event()

    def enter(self, number):
        """Give a block its weights, and send for the next block's."""
        self._fetch(number)
        if self.cuda:
            torch.cuda.current_stream().wait_event(self.copied[number % 2])
        self._point(self.blocks[number], self.buffers[number % 2])
        if number + 1 < len(self.blocks):
            self._fetch(number + 1)

    def leave(self, number):
        """Take a block's weights off the device again."""
        if self.cuda:
            self.used[number % 2] = torch.cuda.current_stream().record_event()
        self._point(self.blocks[number], self.homes[number])
