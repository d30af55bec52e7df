"""Training: take steps, validate, draw, save.

The way to the network is `train → train_step → flow_loss → Flux.forward`. A run is a pure function
of (config, seed, data): every random draw is keyed by the sample's global index.
"""

import json
import logging
import math
import signal
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from fluxlite import parallel
from fluxlite.cli.processes import held_signals
from fluxlite.cli.profiling import StepProfile, parse_steps
from fluxlite.nets.latents import num_image_tokens
from fluxlite.train import run_state
from fluxlite.train.grids import draw_grid, encode_grid
from fluxlite.train.metrics import Metrics, Throughput
from fluxlite.train.plots import plot_losses
from fluxlite.train.resume import describe_data, describe_run, find_resume, warn_of_changed_data
from fluxlite.train.setup import open_data, set_up, state_per_rank
from fluxlite.train.training_step import train_step
from fluxlite.train.validation import averaged_weights, encode_validation, validation_losses
from fluxlite.weights.tensor_files import atomic_weights

log = logging.getLogger("fluxlite")


@dataclass
class RunMonitor:
    """What a run is watched with."""

    metrics: Metrics
    speed: Throughput
    held_out: list
    grid: list
    meter: object  # the task's, or None


def train(config):
    """Train as `config`, a `TrainConfig`, says; returns the run's folder."""
    state_of = partial(state_per_rank, config)
    device, mesh = parallel.start_ranks(config.parallel, config.device, state_of)
    with run_state.locked_run(config.output):
        last = find_resume(config)
        run, monitor, batches, start = start_run(config, device, mesh, last)
        with held_signals() as caught, closing(monitor.metrics), closing(batches):
            if config.compile and start < config.steps:
                monitor.metrics.announce("compiling: the first step takes longer")
            steps = range(start + 1, config.steps + 1)
            for step in profile_of(config, device).over(steps):
                micro = [next(batches) for _ in range(run.micro_batches)]
                loss, norm = train_step(run, micro, step - 1)
                stopped_by, good = read_flags(run, caught, norm)
                check_finite(good, loss, norm, step, micro, config.output)
                log_step(run, monitor, step, loss, norm)
                with monitor.speed.paused():
                    finish_step(run, monitor, step, stopped_by)
                if stopped_by:
                    break
            if parallel.rank() == 0:
                plot_losses(config.output)
                if monitor.meter:
                    monitor.meter.plot(config.output)
    return Path(config.output)


def start_run(config, device, mesh, last):
    """The run, set up or gone on with from the checkpoint `last`, its monitor, its micro-batches
    and the steps it has taken.
    """
    run, start, size = set_up(config, device, mesh), 0, config.data.global_batch
    training, validation = open_data(config, run)
    run.data = describe_data(training, validation)
    if last:
        start = run_state.load_training(last, **trained_state(run))
    monitor = start_monitor(run, validation, start)
    if last:
        warn_of_changed_data(last, run.data)
    if start >= config.steps:
        log.info("step %d of steps=%d is taken already: nothing is left to do", start, config.steps)
    elif last:
        log.info(
            "resuming after step %d with sample %d, the very next one, whatever the mesh and the "
            "workers",
            start,
            start * size,
        )
    elif monitor.meter:
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


def read_flags(run, caught, norm):
    """The name of a signal that asks any rank to stop, or None, and whether the step was good;
    collective.

    It is the one place of a step where the host waits for the device.
    """
    asked = torch.tensor(float(caught["number"]), device=run.device)
    bad = (~torch.isfinite(norm)).to(run.device, torch.float32)
    number, bad = parallel.max_over_ranks(torch.stack([asked, bad]))
    return signal.Signals(int(number)).name if number else None, not bad


def check_finite(good, loss, norm, step, batches, output):
    """Raise `ValueError` for a step that is not `good`, with its samples, what to try and what the
    run's folder `output` has; collective.
    """
    if good:
        return
    keys = sum((batch["keys"] for batch in batches), [])
    found = parallel.gather_values((loss.item(), keys))
    guilty = [entry for entry in found if not math.isfinite(entry[0])]
    samples = list(dict.fromkeys(sum((keys for _, keys in guilty or found), [])))
    what = (
        f"loss of step {step} is {guilty[0][0]}"
        if guilty
        else f"gradient's norm of step {step} is {norm.item()}"
    )
    raise ValueError(
        f"the {what}; its samples: {', '.join(samples[:8])}{' …' if len(samples) > 8 else ''}. "
        "Try a lower optim.lr, a longer optim.warmup, dtype=float32, or look at these samples. "
        f"The step was not taken and nothing of it is saved: {run_state.saved_words(output)}"
    )


def finish_step(run, monitor, step, stopped_by):
    """Validate, draw and save where step `step` is due for it.

    A run that was told to stop saves first: it may be killed before a picture is drawn.
    """
    if stopped_by:
        save_checkpoint(run, step)
        log.info(
            "stopped by %s after step %d, which is saved; resume=auto goes on", stopped_by, step
        )
    validate_and_draw(run, monitor, step)
    if not stopped_by and is_due(run, step, run.config.checkpoint.every):
        save_checkpoint(run, step)


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
    settings = asdict(config) | parallel.lossy_settings("parallel.float8", config.parallel.float8)
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
    two.
    """
    tokens = run.config.model.max_sequence_length, num_image_tokens(*run.latent_shape[1:])
    trained, *frozen = (model.forward_flops(*tokens) for model in run.models)
    return 3 * trained + 2 * sum(frozen)


def log_step(run, monitor, step, loss, norm):
    """Count a step, and every log_every of them write the loss and the speed down."""
    monitor.speed.add(run.config.data.global_batch)
    values = {}
    if is_due(run, step, run.config.metrics.log_every):
        values = {
            "loss": parallel.mean_over_ranks(loss).item(),
            "grad_norm": norm.item(),
            "lr": run.optimizers[0].param_groups[0]["lr"],
        } | monitor.speed.read()
        monitor.metrics.log(step, values)
    monitor.metrics.progress(step, values)


def validate_and_draw(run, monitor, step):
    """Measure, validate and draw, with the averaged weights, where step `step` is due for it."""
    config, metrics, meter = run.config, monitor.metrics, monitor.meter
    if meter and is_due(run, step, meter.every):
        metrics.log(step, meter.measure(step))
    validate = is_due(run, step, config.validate_every)
    draw = monitor.grid and is_due(run, step, config.sample.every)
    if not (validate or draw):
        return
    with averaged_weights(run):
        if validate:
            values = validation_losses(run, monitor.held_out)
            metrics.log(step, values)
            metrics.progress(step, {"val": values["val/loss"]})
        if draw:
            metrics.image(step, "grid", draw_grid(run, monitor.grid))


def save_checkpoint(run, step):
    """Write a checkpoint of step `step`."""
    about = dict(step=step, meta=describe_run(run), keep=run.config.checkpoint.keep)
    run_state.save_training(run.config.output, **about, **trained_state(run))
