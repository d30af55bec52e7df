"""What a person watching a run sees: a progress bar, `metrics.jsonl`, TensorBoard or wandb, sample
pictures, plots of the losses.

A run's folder gets:

    folder/metrics.jsonl   one JSON line per call of `log`: {"step": …, "time": …, "loss": …}
    folder/images/         pictures, `<name>-<step>.png`
    folder/tensorboard/    tensorboard --logdir folder
    folder/losses.png      written by `plot_losses`
"""

import importlib.util
import json
import math
import os
import re
import resource
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from fluxlite.cli.atomic import naming_errors
from fluxlite.cli.descriptions import check_regular, read_text
from fluxlite.cli.options import check_options, option
from fluxlite.weights.tensor_files import aside

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
    """Drop the rows later than `step`, which a killed run wrote after its last checkpoint; all of
    them where `step` is 0.
    """
    path = Path(folder) / "metrics.jsonl"
    rows = [row for row in read_metrics(folder) if 0 < step >= row["step"]]
    with aside(path, overwrite=True) as part, open(part, "w") as file:
        file.writelines(format_row(row) for row in rows)


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
        values = {
            name: value if isinstance(value, int) else float(value)
            for name, value in values.items()
        }
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
        with aside(path, overwrite=True) as part:
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
        self.shown.update(values or {})
        text = ", ".join(
            form.format(self.shown[name])
            for name, form in SHOWN
            if self.shown.get(name) is not None
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.config.log_every == 0 or step == self.total_steps:
            left = (
                (time.perf_counter() - self.began)
                / max(1, step - self.start_step)
                * (self.total_steps - step)
            )
            parts = [f"step {step}/{self.total_steps}", text, f"{tqdm.format_interval(left)} left"]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)

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

    writer = SummaryWriter(
        folder / "tensorboard", purge_step=start_step + 1 if start_step else 0, flush_secs=10
    )
    text = json.dumps(run_config, indent=2, default=str)
    writer.add_text(
        "config",
        "\n".join("    " + line for line in text.splitlines()),
        start_step + 1 if start_step else 0,
    )
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
        with aside(kept, overwrite=True) as part:
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
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: the peak, in bytes


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


class Stages:
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
        self.device, self.clock, self.flops_per_sample, self.num_devices = (
            device,
            clock,
            flops_per_sample,
            num_devices,
        )
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


def smooth(values, window):
    """Centred running mean over `window` values, fewer at both ends."""
    sums = np.convolve(values, np.ones(window), "same")
    return sums / np.convolve(np.ones(len(values)), np.ones(window), "same")


def plot_losses(folder):
    """Draw `folder/losses.png` from `metrics.jsonl`: losses over steps, and the validation loss
    over t; returns its path.
    """
    rows = read_metrics(folder)
    figure, (left, right) = two_axes()
    plot_loss_over_steps(left, rows)
    plot_loss_over_t(right, rows)
    return save_axes(figure, (left, right), Path(folder) / "losses.png")


def two_axes():
    """A figure of two axes side by side, the left one wider."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no display, no global figures
    return figure, figure.subplots(1, 2, width_ratios=(1.35, 1))


def save_axes(figure, both, path):
    """Give all axes their common look, and save."""
    for axes in both:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.6")
        axes.tick_params(colors="0.35", labelsize=9)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    with aside(path, overwrite=True) as part:
        figure.savefig(part, format="png")
    return path


def plot_control(folder):
    """Draw `folder/control.png` from `metrics.jsonl`: what `meter` saw, over steps, and last over
    t; returns its path.
    """
    rows = [row for row in read_metrics(folder) if "control/right" in row]
    figure, (left, right) = two_axes()
    styles = {
        "right": ("#1f5aa8", "its own control"),
        "shuffled": ("#e0802f", "another's"),
        "none": ("0.5", "none"),
    }
    for kind, (colour, label) in styles.items():
        series = [(row["step"], row[f"control/{kind}"]) for row in rows]
        left.plot(*zip(*series), color=colour, linewidth=1.6, label=label)
        last = {
            float(k.split("_t")[1]): v
            for k, v in rows[-1].items()
            if k.startswith(f"control/{kind}_t")
        }
        right.plot(*zip(*sorted(last.items())), "o-", color=colour, linewidth=1.6, label=label)
    left.set(
        xlabel="step", ylabel="held-out loss", title=f"gain {100 * rows[-1]['control/gain']:.1f} %"
    )
    right.set(xlabel="t", title="at the last look")
    return save_axes(figure, (left, right), Path(folder) / "control.png")


def plot_loss_over_steps(axes, rows):
    """Training loss, raw and smoothed, and the validation loss, which is a mean over t."""
    train, val = (
        np.array(
            [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
        ).reshape(-1, 2)
        for key in ("loss", "val/loss")
    )
    highest = []
    if len(train):
        window = 1 + 2 * (len(train) // 40)  # odd: an even one would shift the curve by half a step
        smoothed = smooth(train[:, 1], window)
        axes.plot(*train.T, color="#3b76c4", alpha=0.22, linewidth=0.9)
        axes.plot(
            train[:, 0],
            smoothed,
            color="#1f5aa8",
            linewidth=1.8,
            label=f"training, {smoothed[-1]:.3f} at the end",
        )
        highest += [np.quantile(train[:, 1], 0.99), smoothed[len(smoothed) // 20 :].max()]
    if len(val):
        axes.plot(
            *val.T,
            "o-",
            color="#e0802f",
            linewidth=1.5,
            markersize=4.5,
            label=f"validation, {val[-1, 1]:.3f} at the end",
        )
        highest += [val[:, 1].max()]
    if highest:
        lowest = min(series[:, 1].min() for series in (train, val) if len(series))
        margin = 0.08 * (max(highest) - lowest) or 0.1
        axes.set_ylim(
            max(0, lowest - margin), max(highest) + margin
        )  # a spike at the start must not flatten the rest
    else:
        say_nothing_yet(axes, "no losses yet")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Loss", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared error of the velocity")


def plot_loss_over_t(axes, rows):
    """Validation loss over t of the first, a middle and the last evaluation."""
    curves = []
    for row in rows:
        points = sorted(
            (float(key[len("val/loss_t") :]), value)
            for key, value in row.items()
            if key.startswith("val/loss_t")
        )
        if points:
            curves.append((row["step"], np.array(points)))
    chosen = sorted({0, len(curves) // 2, len(curves) - 1} & set(range(len(curves))))
    for index, color in zip(chosen, ("#b9c2cc", "#6f9bd1", "#1f5aa8")[-len(chosen) :]):
        step, points = curves[index]
        axes.plot(
            *points.T, "o-", color=color, linewidth=1.8, markersize=4.5, label=f"step {step:,}"
        )
    if not curves:
        say_nothing_yet(axes, "no validation yet")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(bottom=0)
    axes.set_title("Validation loss by noise level", loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("t  (0 = picture, 1 = noise)")
    axes.set_ylabel("mean squared error of the velocity")


def say_nothing_yet(axes, text):
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.5")


def wrap_caption(text, *, font, width, max_lines):
    """`text` as at most `max_lines` lines of at most `width` pixels; what does not fit ends in an
    ellipsis.
    """
    lines = []
    for paragraph in text[:1000].split("\n"):  # a caption of a million letters would take for ever
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    cut = lines[:max_lines]
    if len(lines) > max_lines:
        cut[-1] += "…"
    for i, line in enumerate(cut):
        while len(line) > 1 and font.getlength(line) > width:
            line = line.rstrip("…")[:-1] + "…"
        cut[i] = line
    return cut


def contact_sheet(images, *, columns=None, captions=None):
    """A grid of PIL pictures with a caption of up to four lines under each, if any.

    Pictures narrower than 128 pixels are enlarged by a whole factor, the same for all, without
    smoothing. Raises `ValueError` where there are no pictures or not as many captions.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    if captions is not None and len(captions) != len(images):
        raise ValueError(
            f"{len(captions)} captions for {len(images)} pictures: give one for each, '' for none"
        )
    factor = max(1, math.ceil(128 / max(image.width for image in images)))
    images = [
        image.convert("RGB").resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
        for image in images
    ]
    width, height = max(image.width for image in images), max(image.height for image in images)
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    font = ImageFont.load_default(size=max(12, width // 24))
    wrapped = [
        wrap_caption(text or "", font=font, width=width, max_lines=4)
        for text in captions or [""] * len(images)
    ]
    line_height = math.ceil(1.2 * sum(font.getmetrics()))
    has_captions = any(text for text in captions or ())
    below = 4 + line_height * max(len(lines) for lines in wrapped) if has_captions else 0
    margin = max(8, width // 32)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(
        "RGB",
        (margin + columns * (width + margin), margin + rows * (height + below + margin)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        x, y = (
            margin + i % columns * (width + margin),
            margin + i // columns * (height + below + margin),
        )
        left, top = x + (width - image.width) // 2, y + (height - image.height) // 2
        draw.rectangle(
            (left - 1, top - 1, left + image.width, top + image.height), outline=(205, 205, 205)
        )
        sheet.paste(image, (left, top))
        for j, line in enumerate(lines if has_captions else ()):
            draw.text((x, y + height + 4 + j * line_height), line, fill=(60, 60, 60), font=font)
    return sheet
