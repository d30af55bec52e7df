"""What a run writes down while it lives: a progress bar, `metrics.jsonl`, TensorBoard or wandb,
pictures; its speed.

A run's folder gets:

    folder/metrics.jsonl   one JSON line per call of `log`: {"step": …, "time": …, "loss": …}
    folder/images/         pictures, `<name>-<step>.png`
    folder/tensorboard/    tensorboard --logdir folder
"""

import importlib.util
import json
import math
import re
import sys
import textwrap
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fluxlite.cli.atomic import naming_errors
from fluxlite.cli.descriptions import check_regular, read_text
from fluxlite.cli.options import check_options, option
from fluxlite.cli.stage_times import memory_of_process
from fluxlite.weights.tensor_files import atomic_weights

# Dense bf16 TFLOP/s from NVIDIA's data sheets (half of the figure "with sparsity"); the first name
# found in the device's wins.
PEAK_TFLOPS = (
    ("GB200", 2500),
    ("B200", 2250),
    ("H200 NVL", 836),
    ("H200", 989),
    ("GH200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 836),
    ("H100", 989),
    ("H800 PCIe", 756),
    ("H800", 989),
    ("H20", 148),
    ("A100", 312),
    ("A800", 312),
    ("A40", 150),
    ("A30", 165),
    ("A10", 125),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX A6000", 155),
    ("RTX 5090", 210),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)
PICTURE_NAME = re.compile(r".+-(\d{6,})\.png")  # of a step
# How `progress` shows what it knows, in this order.
SHOWN = (
    ("loss", "loss {:.4f}"),
    ("val", "val {:.4f}"),
    ("samples_per_s", "{:.4g} samples/s"),
    ("tflops", "{:.3g} TFLOP/s"),
    ("mfu", "MFU {:.1%}"),
    ("memory_gb", "{:.2f} GB"),
)


@dataclass
class MetricsConfig:
    """What a run writes down, and where."""

    log_every: int = option(
        10, "steps between two lines of metrics.jsonl", at_least=1, at_most=10**9
    )
    tensorboard: bool = option(True, "write TensorBoard events to the run's folder")
    wandb: bool = option(False, "log to Weights & Biases (needs pip install wandb)")
    progress: bool = option(True, "a bar on a terminal, else a plain line every log_every steps")
    peak_tflops: float | None = option(
        None,
        "bf16 peak of one device for MFU; null: looked up by its name",
        above=0,
        at_most=1_000_000,
    )


def require_package(name, key):
    """Raise `ValueError` with the remedy where package `name`, asked for by `key`, is not
    installed.
    """
    spec = importlib.util.find_spec(name)
    if (
        spec is None or spec.origin is None
    ):  # without an origin it is a mere folder, such as the ./wandb that wandb itself makes
        raise ValueError(
            f"{key}=true needs the package {name}: pip install {name}, or set {key}=false"
        )


def read_metrics(folder):
    """The rows of `folder/metrics.jsonl`, in order; none where there is no file. A half-written
    last line is left out.

    A value that was not finite is NaN. Raises `ValueError` that names the line.
    """
    path, rows = Path(folder) / "metrics.jsonl", []
    if not path.exists():
        return rows
    check_regular(path)
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_row(line))
        except (ValueError, RecursionError, OverflowError) as error:  # UnicodeDecodeError too
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {path} is no row of metrics ({error}): remove that line"
                ) from None
    return rows


def seen_of_step(folder, step):
    """What a run's folder has of a step: the names of its rows' values and of its pictures."""
    rows = [row for row in read_metrics(folder) if row["step"] == step]
    pictures = Path(folder, "images").glob(f"*-{step:06d}.png")
    return {path.name.rpartition("-")[0] for path in pictures}.union(*rows)


def parse_row(line):
    """One line of metrics.jsonl as {name: number}."""
    row = json.loads(line)
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        raise ValueError("it has no step")
    if not all(value is None or type(value) in (int, float) for value in row.values()):
        raise ValueError("it holds something other than numbers")
    return {
        name: math.nan if value is None or math.isinf(value) else value
        for name, value in row.items()
    }


def format_row(row):
    """{name: number} as a line of metrics.jsonl; JSON knows no NaN, which is null there."""
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def rewind_metrics(folder, step):
    """Drop the rows and pictures later than `step`, which a killed run left after its last
    checkpoint; all of them where `step` is 0.
    """
    path = Path(folder) / "metrics.jsonl"
    rows = [row for row in read_metrics(folder) if 0 < step >= row["step"]]
    with atomic_weights(path, overwrite=True) as part, open(part, "w") as file:
        file.writelines(format_row(row) for row in rows)
    for picture in Path(folder, "images").glob("*.png"):
        number = PICTURE_NAME.fullmatch(picture.name)
        if number and not 0 < step >= int(number[1]):
            picture.unlink()


class Metrics:
    """Everything that a run writes down, on rank 0; with `enabled=False` (the other ranks) every
    method does nothing.

    A run that resumes names the step of its checkpoint as `start_step`, and its files then read as
    an uninterrupted run's. Raises `ValueError`, on every rank, where TensorBoard or wandb is asked
    for and not installed.
    """

    def __init__(self, config, folder, *, total_steps, start_step=0, run_config=None, enabled=True):
        check_options(config, "metrics.")
        for package in ("tensorboard", "wandb"):
            if getattr(config, package):
                require_package(package, f"metrics.{package}")
        self.config, self.folder, self.enabled = config, Path(folder), enabled
        self.total_steps, self.start_step = total_steps, start_step
        self.writer = self.wandb = self.bar = None
        self.shown, self.began, self.hook = {}, time.perf_counter(), threading.excepthook
        self.unwritten = []  # what TensorBoard's thread could not write
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rewind_metrics(self.folder, start_step)
        if config.tensorboard:
            threading.excepthook = self._keep_error
            with self._events():
                self.writer = open_tensorboard(self.folder, start_step, run_config or {})
        if config.wandb:
            self.wandb = open_wandb(self.folder, start_step, run_config or {})
        if config.progress and sys.stderr.isatty():
            self.bar = tqdm(
                total=total_steps, initial=start_step, unit=" steps", dynamic_ncols=True
            )

    def _keep_error(self, about):
        """`threading.excepthook`: a disk's refusal in TensorBoard's thread is no traceback."""
        ours = type(about.thread).__module__.startswith("tensorboard")
        if ours and isinstance(about.exc_value, OSError):
            self.unwritten.append(about.exc_value)
        else:
            self.hook(about)

    @contextmanager
    def _events(self):
        """Raise `OSError`, naming the folder, where TensorBoard's events cannot be written."""
        with naming_errors(self.folder / "tensorboard"):
            yield
            for error in self.unwritten:
                raise error

    def log(self, step, values):
        """Write `values` (name → number) of `step` to all logs; floats are exact in the file."""
        if not self.enabled:
            return
        values = {name: v if isinstance(v, int) else float(v) for name, v in values.items()}
        path = self.folder / "metrics.jsonl"
        with naming_errors(path), open(path, "a") as file:
            file.write(format_row({"step": step, "time": round(time.time(), 3), **values}))
        if self.writer:
            with self._events():
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({"step": step, **values})

    def image(self, step, name, picture):
        """Save a PIL picture as `images/<name>-<step>.png` and show it in TensorBoard and wandb;
        returns its path.
        """
        if not self.enabled:
            return None
        path = self.folder / "images" / f"{name}-{step:06d}.png"
        with atomic_weights(path, overwrite=True) as part:
            picture.save(part, "PNG")
        if self.writer:
            with self._events():
                pixels = np.array(picture.convert("RGB"))
                self.writer.add_image(name, pixels, step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({"step": step, name: sys.modules["wandb"].Image(picture)})
        return path

    def progress(self, step, values=None):
        """Show that `step` is done; `values` (see `SHOWN`; all optional) stay on display until they
        are replaced.
        """
        if not (self.enabled and self.config.progress):
            return
        values = values or {}
        self.shown.update(values)
        text = ", ".join(
            form.format(self.shown[name])
            for name, form in SHOWN
            if self.shown.get(name) is not None
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.config.log_every == 0 or step == self.total_steps or "val" in values:
            parts = [f"step {step}/{self.total_steps}", text, self.time_left(step)]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def time_left(self, step):
        """`01:30 left`, as fast as until now; empty before the first step."""
        taken = step - self.start_step
        if not taken:
            return ""
        each = (time.perf_counter() - self.began) / taken
        return f"{tqdm.format_interval(each * (self.total_steps - step))} left"

    def announce(self, text):
        """Show why the next step takes long, until it is done."""
        if not (self.enabled and self.config.progress):
            return
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            print(f"step {self.start_step}/{self.total_steps}, {text}", file=sys.stderr, flush=True)

    def close(self):
        """Flush and close everything; may be called again."""
        bar, writer, wandb = self.bar, self.writer, self.wandb
        self.bar = self.writer = self.wandb = None
        self.enabled = False
        if bar is not None:
            bar.close()
        if wandb:
            wandb.finish()
        if writer:
            try:
                with self._events():
                    writer.close()
            finally:
                threading.excepthook = self.hook


def open_tensorboard(folder, start_step, run_config):
    """A SummaryWriter that hides the events of steps later than `start_step`, with the run's
    configuration as a text.
    """
    from torch.utils.tensorboard import SummaryWriter

    first = start_step + 1 if start_step else 0
    writer = SummaryWriter(folder / "tensorboard", purge_step=first, flush_secs=10)
    text = textwrap.indent(json.dumps(run_config, indent=2, default=str), "    ")
    writer.add_text("config", text, first)
    return writer


def open_wandb(folder, start_step, run_config):
    """A wandb run that goes on under the id kept in `folder/wandb_id`; a run from step 0 gets a new
    one.

    `step` is logged as a value and named as the axis: wandb's own counter refuses the steps that a
    resumed run repeats.
    """
    import wandb

    kept = folder / "wandb_id"
    if not (start_step and kept.exists()):
        with atomic_weights(kept, overwrite=True) as part:
            part.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project="fluxlite",
        name=folder.resolve().name,
        id=read_text(kept),
        resume="allow",
        dir=str(folder),
        config=run_config,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def peak_tflops(device):
    """Dense bf16 TFLOP/s of a known NVIDIA GPU, else None; `device` is a torch device or a GPU's
    name.

    A MIG slice or a laptop's GPU has less than its name says, so its peak counts as unknown.
    """
    if isinstance(device, torch.device) or device in ("cpu", "cuda", "mps"):
        device = torch.device(device)
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", device):
        return None
    return next((peak for name, peak in PEAK_TFLOPS if re.search(rf"\b{name}\b", device)), None)


def memory_gb(device):
    """Memory in use in 10^9 bytes: the peak of allocated memory on a GPU, else what of this process
    is resident.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return memory_of_process()[1] / 1e9


class Throughput:
    """Samples per second since the last reading, with the time of `paused` blocks (validation,
    sampling, saving) left out.

    `flops_per_sample` is the work of a whole training step per sample and `num_devices` how many
    share it: TFLOP/s and MFU are those of one device. GPUs run behind the host, so read after
    something that waits for them, such as `loss.item()`.
    """

    def __init__(
        self,
        *,
        device="cpu",
        flops_per_sample=None,
        num_devices=1,
        peak=None,
        clock=time.perf_counter,
    ):
        self.device, self.clock = device, clock
        self.flops_per_sample, self.num_devices = flops_per_sample, num_devices
        self.peak = peak if peak is not None else peak_tflops(device)
        self.samples, self.elapsed, self.since = 0, 0.0, clock()

    def add(self, samples):
        """Count `samples` of a finished step, summed over all devices."""
        self.samples += samples

    @contextmanager
    def paused(self):
        """Stop the clock inside the block; blocks may be nested."""
        outermost = self.since is not None
        if outermost:
            self.elapsed, self.since = self.elapsed + self.clock() - self.since, None
        try:
            yield
        finally:
            if outermost:
                self.since = self.clock()

    def read(self):
        """`samples_per_s`, `memory_gb` and, where they are known, `tflops` and `mfu`; starts the
        next interval.
        """
        if self.since is not None:
            now = self.clock()
            self.elapsed, self.since = self.elapsed + now - self.since, now
        rate = self.samples / max(self.elapsed, 1e-9)
        self.samples, self.elapsed = 0, 0.0
        values = {"samples_per_s": rate, "memory_gb": memory_gb(self.device)}
        if self.flops_per_sample:
            values["tflops"] = rate * self.flops_per_sample / 1e12 / self.num_devices
            if self.peak:
                values["mfu"] = values["tflops"] / self.peak
        return values
