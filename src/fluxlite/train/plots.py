"""Plots of a run's losses, drawn from its `metrics.jsonl` without a display."""

import math
from pathlib import Path

import numpy as np

from fluxlite.train.metrics import read_metrics
from fluxlite.weights.tensor_files import atomic_weights

CONTROL_CURVES = (  # kind, colour, label
    ("right", "#1f5aa8", "its own control"),
    ("shuffled", "#e0802f", "another's"),
    ("none", "0.5", "none"),
)


def plot_losses(folder):
    """Draw `folder/losses.png` from `metrics.jsonl`: losses over steps, and the validation loss
    over t; returns its path.
    """
    rows = read_metrics(folder)
    figure, (left, right) = two_axes()
    plot_loss_over_steps(left, rows)
    plot_loss_over_t(right, rows)
    for axes in (left, right):
        axes.set_ylabel("mean squared error of the velocity")
    return save_axes(figure, (left, right), Path(folder) / "losses.png")


def plot_control(folder):
    """Draw `folder/control.png` from `metrics.jsonl`: what the meter measured, over steps, and last
    over t; returns its path.
    """
    rows = [row for row in read_metrics(folder) if "control/right" in row]
    figure, (left, right) = two_axes()
    for kind, colour, label in CONTROL_CURVES:
        style = dict(color=colour, linewidth=1.6, label=label)
        left.plot(*finite_points(rows, f"control/{kind}").T, **style)
        right.plot(*losses_over_t(rows[-1], f"control/{kind}_t").T, "o-", **style)
    gain = f"gain {100 * rows[-1]['control/gain']:.1f} %"
    left.set(xlabel="step", ylabel="held-out loss", title=gain)
    right.set(xlabel="t", title="at the last measurement")
    return save_axes(figure, (left, right), Path(folder) / "control.png")


def finite_points(rows, key):
    """(steps, value) of the rows where a key has a finite value: (n, 2)."""
    found = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return np.array(found).reshape(-1, 2)


def losses_over_t(row, prefix):
    """(t, loss) of the keys that are a prefix and t, in the order of t: (n, 2)."""
    keys = sorted(key for key in row if key.startswith(prefix))
    return np.array([(float(key.removeprefix(prefix)), row[key]) for key in keys])


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
        title = axes.get_title()
        axes.set_title("")
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    with atomic_weights(path, overwrite=True) as part:
        figure.savefig(part, format="png")
    return path


def plot_loss_over_steps(axes, rows):
    """Training loss, raw and smoothed, and the validation loss, which is a mean over t."""
    train, val = finite_points(rows, "loss"), finite_points(rows, "val/loss")
    highest = []
    if len(train):
        smoothed = running_mean(train[:, 1], 1 + 2 * (len(train) // 40))
        label = f"training, {smoothed[-1]:.3f} at the end"
        axes.plot(*train.T, color="#3b76c4", alpha=0.22, linewidth=0.9)
        axes.plot(train[:, 0], smoothed, color="#1f5aa8", linewidth=1.8, label=label)
        highest += [np.quantile(train[:, 1], 0.99), smoothed[len(smoothed) // 20 :].max()]
    if len(val):
        label = f"validation, {val[-1, 1]:.3f} at the end"
        axes.plot(*val.T, "o-", color="#e0802f", linewidth=1.5, markersize=4.5, label=label)
        highest += [val[:, 1].max()]
    if highest:  # a spike at the start must not flatten the rest
        lowest = np.concatenate([train, val])[:, 1].min()
        margin = 0.08 * (max(highest) - lowest) or 0.1
        axes.set_ylim(max(0, lowest - margin), max(highest) + margin)
    else:
        say_nothing_yet(axes, "no losses yet")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(title="Loss", xlabel="step")


def running_mean(values, window):
    """Centred mean over `window` values, an odd number (an even one would shift the curve by half a
    step); fewer at both ends.
    """
    sums = np.convolve(values, np.ones(window), "same")
    return sums / np.convolve(np.ones(len(values)), np.ones(window), "same")


def plot_loss_over_t(axes, rows):
    """Validation loss over t of the first, a middle and the last evaluation."""
    rows = [row for row in rows if "val/loss_t0.000" in row]
    chosen = sorted({0, len(rows) // 2, len(rows) - 1} & set(range(len(rows))))
    for index, color in zip(chosen, ("#b9c2cc", "#6f9bd1", "#1f5aa8")[-len(chosen) :]):
        style = dict(color=color, linewidth=1.8, markersize=4.5)
        points = losses_over_t(rows[index], "val/loss_t").T
        axes.plot(*points, "o-", label=f"step {rows[index]['step']:,}", **style)
    if not rows:
        say_nothing_yet(axes, "no validation yet")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(bottom=0)
    axes.set(title="Validation loss by noise level", xlabel="t  (0 = picture, 1 = noise)")


def say_nothing_yet(axes, text):
    """Write a text into axes that have no curve yet."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.5")
