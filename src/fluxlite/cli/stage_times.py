"""Seconds and peak memory of each stage of a program."""

import resource
import threading
import time
from contextlib import contextmanager

import torch


def memory_of_process():
    """(private, resident) memory of this process in bytes: anonymous pages, and those with the
    mapped files' pages that are in.
    """
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:  # macOS: resident alone is known
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))


class StageTimes:
    """Seconds and peak memory of each stage of a program: `with stages("denoising"): …`, then
    `table()`.
    """

    def __init__(self, device="cpu", interval=0.02):
        self.device, self.interval, self.rows = torch.device(device), interval, []

    @contextmanager
    def __call__(self, name):
        done, peaks, began = threading.Event(), [0, 0], time.perf_counter()

        def watch():
            while True:
                for i, value in enumerate(memory_of_process()):
                    peaks[i] = max(peaks[i], value)
                if done.wait(self.interval):
                    return

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            done.set()
            watcher.join()
            on_device = (
                torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            )
            self.rows.append((name, time.perf_counter() - began, *peaks, on_device))

    def table(self):
        """A line for each stage: the seconds of all its times, and the most memory of any."""
        lines = [
            f"{'stage':<28}{'seconds':>9}{'private GB':>12}{'resident GB':>13}"
            + "   GPU GB" * (self.device.type == "cuda")
        ]
        merged = {}
        for name, seconds, *peaks in self.rows:
            before = merged.get(name, (0, *peaks))
            most = [
                peak if peak is None else max(peak, old) for peak, old in zip(peaks, before[1:])
            ]
            merged[name] = before[0] + seconds, *most
        for name, (seconds, private, resident, on_device) in merged.items():
            line = f"{name:<28}{seconds:>9.1f}{private / 1e9:>12.2f}{resident / 1e9:>13.2f}"
            lines.append(line + (f"{on_device / 1e9:>9.2f}" if on_device is not None else ""))
        return "\n".join(lines)
