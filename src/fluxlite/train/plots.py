"""Plots of a run's losses, drawn from its `metrics.jsonl` without a display."""

import math
from pathlib import Path

import numpy as np

from fluxlite.train.metrics import read_metrics
from fluxlite.weights.tensor_files import aside


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
