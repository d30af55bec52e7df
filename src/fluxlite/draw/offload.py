"""A transformer larger than the accelerator: blocks stay in host memory and pass through two
buffers on the device.

While one block computes, the next one's weights are copied on a stream of their own; behind the
last block of a step that is the next step's first. As many blocks as fit stay on the device, evenly
among the others, so that a copy has their time too. On the CPU there is nothing to stream: weights
are mapped from the disk, and the system drops pages that it needs for something else.
"""

from functools import partial

import torch
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from fluxlite.parallel.host_memory import host_buffer

OFFLOAD = ("none", "text", "all")
# What a step holds at once at most, in tensors (B, L, H) of the compute dtype, and decoding in
# tensors (widest channels, H, W): counted, and then some.
STEP_TENSORS, DECODED_TENSORS = 20, 4
ALIGNED = 512  # bytes: weights in one piece begin where kernels can load 16 bytes at once


def place_steps(net, device):
    """Move what the steps use of a net to the device. What they do not use, such as the
    modulation, stays where it is.
    """
    for name, child in net.named_children():
        if name not in net.conditioning:
            child.to(device)


def stream_blocks(net, device, resident=0, *, training=False):
    """`place_steps`, but for all blocks except so many `resident` ones: each of them fetches its
    weights just before it runs. Returns the net.

    In `training` the modulation is placed too, what is trained stays on the device, and a block
    fetches its frozen weights once more for its backward, which computes its forward again.
    """
    device, blocks = torch.device(device), [*net.double_blocks, *net.single_blocks]
    staying = () if training else net.conditioning
    for name, child in net.named_children():
        if name not in (*staying, "double_blocks", "single_blocks"):
            move_module(child, device)
    staying = resident_blocks(len(blocks), resident)
    for number in staying:
        move_module(blocks[number], device)
    streamed = [block for number, block in enumerate(blocks) if number not in staying]
    feed = Feed(streamed, device, training) if streamed else None
    for number, block in enumerate(streamed):
        block.register_forward_pre_hook(lambda *_, number=number: feed.enter(number))
        block.register_forward_hook(lambda *_, number=number: feed.leave(number))
        if training:
            block.register_forward_hook(partial(feed.follow, number))
    return net


def move_module(module, device):
    """Move a module unless it is there: torch refuses some fake tensors that stay where they are
    (`preflight`).
    """
    if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
        module.to(device)


def resident_blocks(count, resident):
    """The numbers of the blocks, of so many, that stay on the device: spread evenly."""
    resident = min(resident, count)
    return {number * count // resident for number in range(resident)}


def fitting_blocks(net, free):
    """How many blocks of a net can stay on a device with so many bytes free, beside its ends and,
    unless that is all of them, the two buffers.
    """
    sizes = [_bytes(block) for block in (*net.double_blocks, *net.single_blocks)]
    outside = (*net.conditioning, "double_blocks", "single_blocks")
    free -= sum(_bytes(child) for name, child in net.named_children() if name not in outside)
    if sum(sizes) <= free:
        return len(sizes)
    return max(0, min(len(sizes), int(free // max(sizes, default=1)) - 2))


def _bytes(module):
    return sum(p.nbytes for p in module.parameters())


def bytes_beside(config, autoencoder, sample, batch, itemsize, residuals=0, references=0, tile=0):
    """Bytes that a drawing takes at most beside the weights: of a step of `batch` pictures, or of
    one that is decoded.

    config and autoencoder are those of the nets, `sample` a `SampleConfig`, `residuals` as many
    tensors as ControlNets give at a step, `references` as many tokens of reference pictures, `tile`
    the side of what is decoded at once, 0 for all.
    """
    pixels = sample.height * sample.width
    tokens = sample.max_sequence_length + pixels // (2 * autoencoder.downsampling) ** 2
    tokens += references
    step = (STEP_TENSORS + residuals) * batch * tokens * config.hidden_size
    decoded = (
        DECODED_TENSORS * (min(pixels, tile**2) or pixels) * max(autoencoder.block_out_channels[:2])
    )
    return itemsize * max(step, decoded)


def free_memory(device):
    """Bytes that PyTorch can still take on a CUDA device; 0 on others, which cannot be asked."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def aligned_size(tensor):
    """The bytes from one tensor to the next in a flat piece of memory: a multiple of `ALIGNED`."""
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


class Feed:
    """Two flat buffers on the device, each large enough for any block: that of the running one, and
    that of the next. Blocks run in turn, again and again; in `training` a backward runs them in the
    opposite turn, and what is trained is not streamed.
    """

    def __init__(self, blocks, device, training=False):
        self.blocks, self.device, self.cuda = blocks, device, device.type == "cuda"
        self.training = training
        self.homes = [self._home(block) for block in blocks]
        size = max(home.numel() for home in self.homes)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.side = torch.cuda.Stream(device) if self.cuda else None
        if self.cuda:
            self.side.wait_stream(
                torch.cuda.current_stream(device)
            )  # whoever had the buffers' memory before must be done
            for buffer in self.buffers:  # nor may another have it while a last copy is on its way
                buffer.record_stream(self.side)
        self.copied, self.used = (
            [None, None],
            [None, None],
        )  # for each buffer: its copy, its block's last use
        self.holds, self.slot = [None, None], 0  # their blocks; the running one's buffer
        self.running = None  # the block that has its weights

    def _home(self, block):
        """A block's weights in one flat piece of host memory, page-locked for a GPU; its parameters
        become views of it. Whatever else it has is moved to the device.
        """
        size = sum(aligned_size(p) for p in self._streamed(block))
        home = host_buffer(size, torch.uint8, pinned=self.cuda)
        self._point(block, home, fill=True)
        for p in block.parameters():
            p.data = p.data.to(self.device) if self.training and p.requires_grad else p.data
        for module in block.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.device))
        return home

    def _streamed(self, block):
        return [p for p in block.parameters() if not (self.training and p.requires_grad)]

    def _point(self, block, flat, fill=False):
        start = 0
        for p in self._streamed(block):
            view = flat[start : start + p.nbytes].view(p.dtype).view(p.shape)
            if fill:
                view.copy_(p.data)
            p.data = view
            start += aligned_size(p)

    def _fetch(self, number):
        """Start to copy a block's weights into the buffer that no block runs from, unless they are
        on the device or on their way.
        """
        if number in self.holds:
            return
        slot, home = 1 - self.slot, self.homes[number]
        self.holds[slot] = number
        with torch.cuda.stream(self.side):  # of None, the current one
            if self.used[slot] is not None:
                self.side.wait_event(self.used[slot])  # the block that has the buffer must be done
            self.buffers[slot][: home.numel()].copy_(home, non_blocking=True)
            self.copied[slot] = self.side.record_event() if self.cuda else None

    def enter(self, number, backward=False):
        """Give a block its weights, and send for the next block's."""
        if self.running is not None:
            self.leave(self.running)
        self._fetch(number)
        self.slot, self.running = self.holds.index(number), number
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.copied[self.slot])
        self._point(self.blocks[number], self.buffers[self.slot])
        self._fetch(self._next(number, backward))

    def _next(self, number, backward):
        """Whose turn it is after a block's: where a gradient is wanted, after the last its own."""
        if backward:
            return max(number - 1, 0)
        last = number + 1 == len(self.blocks)
        turns = self.training and torch.is_grad_enabled()
        return number if last and turns else (number + 1) % len(self.blocks)

    def leave(self, number):
        """Take a block's weights off the device again."""
        if self.cuda:
            self.used[self.slot] = torch.cuda.current_stream(self.device).record_event()
        self._point(self.blocks[number], self.homes[number])
        self.running = None

    def follow(self, number, _block, _args, outputs):
        """Give a block its weights again when the gradient of its outputs is there."""
        found = [x for x in tree_leaves(outputs) if x.requires_grad]
        if found:
            register_multi_grad_hook(found, lambda _: self.enter(number, True), mode="any")
