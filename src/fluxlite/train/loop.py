"""Training: take steps, validate, draw, save.

The way to the network is `train → train_step → flow_loss → Flux.forward`. A run is a pure function
of (config, seed, data): every random draw is keyed by the sample's global index.
"""

import json
import logging
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from fluxlite import parallel
from fluxlite.cli.processes import STOP_SIGNALS, held_signals
from fluxlite.cli.profiling import StepProfile, parse_steps
from fluxlite.data.transfers import begin_read
from fluxlite.train import run_state
from fluxlite.train.grids import draw_grid, encode_grid
from fluxlite.train.metrics import Metrics, Throughput, seen_of_step
from fluxlite.train.plots import plot_losses
from fluxlite.train.preview import write_preview
from fluxlite.train.resume import describe_data, describe_run, find_resume, warn_of_changed_data
from fluxlite.train.setup import find_data, open_data, set_up, state_per_rank
from fluxlite.train.training_step import train_step
from fluxlite.train.validation import averaged_weights, encode_validation, validation_losses
from fluxlite.weights.tensor_files import atomic_weights

log = logging.getLogger("fluxlite")

MAX_SKIPPED = 100  # steps in a row that are not finite: such weights will not recover


@dataclass
class RunMonitor:
    """What a run is watched with."""

    metrics: Metrics
    speed: Throughput
    held_out: list
    grid: list
    meter: object  # the task's, or None
    skipped: int = 0  # steps in a row that were not finite


def train(config):
    """Train as `config`, a `TrainConfig`, says; returns the run's folder."""
    state_of = partial(state_per_rank, config)
    device, mesh = parallel.start_ranks(config.parallel, config.device, state_of)
    with run_state.locked_run(config.output):
        if config.preview:
            return write_preview(config)
        last = find_resume(config)
        run, monitor, batches, start = start_run(config, device, mesh, last)
        with held_signals() as caught, closing(monitor.metrics), closing(batches):
            if start:
                with monitor.speed.paused():
                    complete_step(run, monitor, start)
            if config.compile and start < config.steps:
                monitor.metrics.announce("compiling: the first step takes longer")
            take_steps(run, monitor, batches, start, caught)
            if parallel.rank() == 0:
                plot_losses(config.output)
                if monitor.meter:
                    monitor.meter.plot(config.output)
    return Path(config.output)


def take_steps(run, monitor, batches, start, caught):
    """Take the steps after step `start`, to the last one or to one that is stopped and saved.

    An accelerator is given a step before the numbers of the step before are read: it never waits
    for the host. Where something is due after a step, that step is read first: nothing is measured,
    drawn or saved after a step that is not known to be good.
    """
    earlier = stopped_by = None
    steps = range(start + 1, run.config.steps + 1)
    for step in profile_of(run.config, run.device).over(steps):
        launched = launch_step(run, batches, caught, step)
        if earlier:
            stopped_by = settle_step(run, monitor, earlier)
        earlier = launched
        if stopped_by or is_settled_at_once(run, monitor, step):
            stopped_by = settle_step(run, monitor, launched) or stopped_by
            earlier = None
            with monitor.speed.paused():
                finish_step(run, monitor, step, stopped_by)
        if stopped_by:
            break


def start_run(config, device, mesh, last):
    """The run, set up or gone on with from the checkpoint `last`, its monitor, its micro-batches
    and the steps it has taken.
    """
    found = find_data(config)
    run, start, size = set_up(config, device, mesh), 0, config.data.global_batch
    training, validation = open_data(config, run, found)
    run.data = describe_data(training, validation)
    if last:
        start = run_state.load_training(last, **trained_state(run))
    monitor = start_monitor(run, validation, start)
    if last:
        warn_of_changed_data(last, run.data)
    if start >= config.steps:
        log.info("step %d of steps=%d is taken already: no step is left", start, config.steps)
    elif last:
        log.info(
            "resuming after step %d with sample %d, the very next one, whatever the mesh and the "
            "workers",
            start,
            start * size,
        )
    elif monitor.meter:
        with monitor.speed.paused():
            monitor.metrics.log(0, monitor.meter.measure(0))
    batches = run.loader(
        training, global_batch=size, start_index=start * size, workers=config.data.workers
    )
    return run, monitor, batches, start


def profile_of(config, device):
    """The `StepProfile` that `profile=` asks for."""
    return StepProfile(parse_steps(config.profile, config.steps), config.output, device)


def trained_state(run):
    """What a checkpoint holds tensors of."""
    return dict(model=run.model, optimizers=run.optimizers, ema=run.ema)


@dataclass
class LaunchedStep:
    """A step that a device may still be at."""

    number: int
    keys: list  # of this rank's samples
    loss: torch.Tensor  # of this rank
    learning_rate: float
    read: Callable  # waits for the step: the list of `shared_numbers`


def launch_step(run, batches, caught, step):
    """Give the device a step: a `LaunchedStep`; collective."""
    micro = [next(batches) for _ in range(run.micro_batches)]
    loss, norm = train_step(run, micro, step - 1)
    keys = sum((batch["keys"] for batch in micro), [])
    rate = run.optimizers[0].param_groups[0]["lr"]
    return LaunchedStep(step, keys, loss, rate, begin_read(shared_numbers(loss, norm, caught)))


def shared_numbers(loss, norm, caught):
    """What ranks must know of a step, a tensor on their devices: the gradient's norm, the sum of
    the ranks' losses, and for each of `STOP_SIGNALS` how many ranks were sent it; collective.
    """
    asked = [torch.full_like(loss, caught["number"] == number) for number in STOP_SIGNALS]
    told = torch.stack([loss, *asked])
    dist.all_reduce(told)
    return torch.cat([norm.to(told.device, non_blocking=True)[None], told])


def reads_late(device):
    """Whether a step is read while the next one runs. A CPU does nothing beside the host."""
    return device.type != "cpu"


def is_settled_at_once(run, monitor, step):
    """Whether a step is waited for before the next is launched: something is due after it."""
    config, meter = run.config, monitor.meter
    periods = [config.checkpoint.every, config.validate_every, config.sample.every]
    periods += [meter.every] if meter else []
    return not reads_late(run.device) or any(is_due(run, step, every) for every in periods)


def settle_step(run, monitor, launched):
    """Wait for a step and write it down: the name of a signal that asks any rank to stop after it,
    or None; collective.

    It is the one place where the host waits for a step. Raises `ValueError` for a step that is not
    finite, or with optim.nonfinite=skip counts it.
    """
    norm, loss, *asked = launched.read()
    if math.isfinite(norm):
        monitor.skipped = 0
    else:
        skip_step(run, monitor, launched, norm)
    log_step(run, monitor, launched, loss / parallel.world_size(), norm)
    return next((n.name for n, count in zip(STOP_SIGNALS, asked) if count), None)


def skip_step(run, monitor, launched, norm):
    """Count a step that was not taken, or raise `ValueError` with its samples, what to try and what
    the run's folder has; collective.
    """
    what = describe_bad_step(launched, norm)
    monitor.skipped += 1
    if run.config.optim.nonfinite == "skip" and monitor.skipped < MAX_SKIPPED:
        if parallel.rank() == 0:
            log.warning("the %s The step is skipped", what)
        return monitor.metrics.log(launched.number, {"skipped": 1})
    many = f" (and of the {MAX_SKIPPED - 1} steps before)" if monitor.skipped == MAX_SKIPPED else ""
    raise ValueError(
        f"the {what}{many} Try a lower optim.lr, a longer optim.warmup, dtype=float32, or look at "
        "these samples. The step was not taken and nothing of it is saved: "
        f"{run_state.saved_words(run.config.output)}"
    )


def describe_bad_step(launched, norm):
    """What of a step is not finite, and the samples of the ranks where it is so; collective."""
    found = parallel.gather_values((launched.loss.item(), launched.keys))
    guilty = [entry for entry in found if not math.isfinite(entry[0])]
    samples = list(dict.fromkeys(sum((keys for _, keys in guilty or found), [])))
    step = launched.number
    what = (
        f"loss of step {step} is {guilty[0][0]}"
        if guilty
        else f"gradient's norm of step {step} is {norm}"
    )
    return f"{what}; its samples: {', '.join(samples[:8])}{' …' if len(samples) > 8 else ''}."


def finish_step(run, monitor, step, stopped_by):
    """Save, validate and draw where step `step` is due for it, or was told to stop.

    A step that is due for saving is saved first: a failure or a kill while it validates or draws
    then loses no step, and a run that goes on makes up for it (`complete_step`).
    """
    if stopped_by or is_due(run, step, run.config.checkpoint.every):
        save_checkpoint(run, step)
    if stopped_by:
        log.info(
            "stopped by %s after step %d, which is saved; resume=auto goes on", stopped_by, step
        )
    validate_and_draw(run, monitor, step)


def complete_step(run, monitor, step):
    """Validate and draw what step `step` was due for and the run was killed before. Collective."""
    seen = parallel.first_rank_does(partial(seen_of_step, run.config.output, step))
    if due := due_after(run, monitor, step, seen):
        log.info("step %d was saved before it was looked at; now first: %s", step, ", ".join(due))
    validate_and_draw(run, monitor, step, seen)


def due_after(run, monitor, step, seen):
    """What is due after a step and not `seen` yet: val/loss, control/gain, grid."""
    every = {"val/loss": run.config.validate_every}
    if monitor.meter:
        every["control/gain"] = monitor.meter.every
    if monitor.grid:
        every["grid"] = run.config.sample.every
    return [what for what, often in every.items() if what not in seen and is_due(run, step, often)]


def is_due(run, step, every):
    """Whether something that happens every so many steps (0: never), and after the last, is due
    after `step`.
    """
    return step == run.config.steps or (every > 0 and step % every == 0)


# --- what a watcher sees --------------------------------------------------------------------------


def start_monitor(run, validation, start):
    """Open the run's folder and metrics and encode what it looks at; with a cache the text encoders
    are then freed.
    """
    config, main = run.config, parallel.rank() == 0
    rounded = {"parallel.float8": config.parallel.float8, "model.quantize": config.model.quantize}
    if config.optim.weights != "float32":
        rounded["optim.weights"] = config.optim.weights
    if config.optim.kind == "adamw8bit":
        rounded["optim.kind"] = config.optim.kind
    if config.parallel.reduce_dtype != "float32":
        rounded["parallel.reduce_dtype"] = config.parallel.reduce_dtype
    settings = asdict(config) | parallel.lossy_settings(rounded)
    if main:
        with atomic_weights(Path(config.output) / "config.json", overwrite=True) as part:
            part.write_text(json.dumps(settings, indent=2, allow_nan=False) + "\n")
    metrics = Metrics(
        config.metrics,
        config.output,
        total_steps=config.steps,
        start_step=start,
        run_config=settings,
        enabled=main,
    )
    held_out, grid = encode_validation(run, validation), encode_grid(run, validation)
    if config.data.cache:
        run.parts.encoders = None
    speed = Throughput(
        device=run.device,
        flops_per_sample=step_flops(run),
        num_devices=parallel.world_size(),
        peak=config.metrics.peak_tflops,
    )
    return RunMonitor(metrics, speed, held_out, grid, run.task.make_meter(run, held_out))


def step_flops(run):
    """Floating-point operations of a sample's training step: three forwards, or of what is frozen
    two. None where samples differ.
    """
    if run.config.data.shapes() != [[(run.config.data.height, run.config.data.width)]]:
        return None  # they differ from step to step
    tokens = run.config.model.max_sequence_length, run.config.image_tokens()
    trained, *frozen = (model.forward_flops(*tokens) for model in run.models)
    return 3 * trained + 2 * sum(frozen)


def log_step(run, monitor, launched, loss, norm):
    """Count a step, and every log_every of them write its mean loss and the speed down."""
    monitor.speed.add(run.config.data.global_batch)
    values, step = {}, launched.number
    if is_due(run, step, run.config.metrics.log_every):
        values = {"loss": loss, "grad_norm": norm, "lr": launched.learning_rate}
        values |= monitor.speed.read()
        monitor.metrics.log(step, values)
    monitor.metrics.progress(step, values)


def validate_and_draw(run, monitor, step, seen=()):
    """Measure, validate and draw, with the averaged weights, where step `step` is due for it and
    what it gives is not `seen` already.
    """
    metrics, due = monitor.metrics, due_after(run, monitor, step, seen)
    if "control/gain" in due:
        metrics.log(step, monitor.meter.measure(step))
    if not {"val/loss", "grid"}.intersection(due):
        return
    with averaged_weights(run):
        if "val/loss" in due:
            values = validation_losses(run, monitor.held_out)
            metrics.log(step, values)
            metrics.progress(step, {"val": values["val/loss"]})
        if "grid" in due:
            metrics.image(step, "grid", draw_grid(run, monitor.grid))


def save_checkpoint(run, step):
    """Write a checkpoint of step `step`."""
    about = dict(step=step, meta=describe_run(run), keep=run.config.checkpoint.keep)
    write = partial(run.task.write_files, run)
    run_state.save_training(run.config.output, **about, **trained_state(run), write=write)
