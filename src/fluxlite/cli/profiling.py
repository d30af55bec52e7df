"""What a program does in some of its steps, recorded by torch's profiler.

folder/profile-rank0.json          a Chrome trace: https://ui.perfetto.dev opens it
folder/memory-rank0.pickle         on a GPU: https://pytorch.org/memory_viz opens it
"""

import logging
import os
import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fluxlite.cli.messages import warn_for_all

log = logging.getLogger("fluxlite")

MAX_ALLOCATIONS = 200_000  # that a snapshot of the memory remembers


def parse_steps(text, last, key="profile"):
    """(first, last) of steps as `10-12` or `10`, of which there are `last`; (0, 0) of None.

    Raises `ValueError`.
    """
    if text is None:
        return 0, 0
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    if not match:
        raise ValueError(f"{key}={text}: write the steps to record, as 10-12 or 10")
    begin, end = int(match[1]), int(match[2] or match[1])
    if not 1 <= begin <= end <= last:
        raise ValueError(f"{key}={text}: steps go from 1 to {last}, the first one first")
    return begin, end


class StepProfile:
    """Records steps `first` to `last` of a program; (0, 0) for none.

    `enter(step)` is called before each step, `leave(step)` after it, `close` in the end, whatever
    happened.
    """

    def __init__(self, steps, folder, device):
        self.steps, self.folder, self.device = steps, Path(folder), torch.device(device)
        self.running, self.expected = None, steps != (0, 0)  # to be recorded yet

    def enter(self, step):
        """Begin to record where a step is the first of those to record."""
        self.entered = step
        if step != self.steps[0] or self.running:
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
        self.running, self.expected = profile(activities=activities), False
        self.running.start()

    def leave(self, step):
        """Write what was recorded once the last of them is over."""
        if step >= self.steps[1]:
            self.close()

    def close(self):
        """Write what has been recorded, or say that there is nothing."""
        running, self.running = self.running, None
        if not running:
            if self.expected:  # a resumed run was past it, or a drawing has fewer steps
                warn_for_all("profile=: step %d was not taken: nothing is recorded", self.steps[0])
            self.expected = False
            return
        rank = os.environ.get("RANK", 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        running.stop()
        running.export_chrome_trace(str(self.folder / f"profile-rank{rank}.json"))
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        taken = self.steps[0], self.entered  # which a stopped run's last step is
        log.info("steps %d to %d are recorded in %s", *taken, self.folder)

    def over(self, steps):
        """The numbers of `steps` as they come, each entered and left."""
        try:
            for step in steps:
                self.enter(step)
                yield step
                self.leave(step)
        finally:
            self.close()

    def watching(self, on_step):
        """An `on_step` of `generate` that calls another, and records steps of the first batch."""

        def watch(numbers, step, times, latents):
            ended = step == len(times) - 1
            self.leave(self.steps[1] if ended else step)
            on_step(numbers, step, times, latents)
            if numbers[0] == 0 and not ended:
                self.enter(step + 1)

        return watch
