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
        on_gpu = self.device.type == "cuda"

        def watch():
            while True:
                peaks[:] = map(max, peaks, memory_of_process())
                if done.wait(self.interval):
                    return

        if on_gpu:
            torch.cuda.init()  # else there are no statistics yet to reset
            torch.cuda.reset_peak_memory_stats(self.device)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            if on_gpu:
                torch.cuda.synchronize(self.device)
        finally:
            done.set()
            watcher.join()
            if on_gpu:
                peaks.append(torch.cuda.max_memory_allocated(self.device))
            self.rows.append((name, time.perf_counter() - began, *peaks))

    def table(self):
        """A line for each stage: the seconds of all its times, and the most memory of any."""
        heads = ["private GB", "resident GB"] + ["GPU GB"] * (self.device.type == "cuda")
        merged, lines = {}, [f"{'stage':<28}{'seconds':>9}" + "".join(f"{h:>13}" for h in heads)]
        for name, seconds, *peaks in self.rows:
            total, *most = merged.get(name, (0, *peaks))
            merged[name] = total + seconds, *map(max, peaks, most)
        for name, (seconds, *peaks) in merged.items():
            sizes = "".join(f"{peak / 1e9:>13.2f}" for peak in peaks)
            lines.append(f"{name:<28}{seconds:>9.1f}{sizes}")
        return "\n".join(lines)
