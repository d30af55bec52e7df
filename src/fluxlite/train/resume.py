"""Whether a run may begin or go on, and what its checkpoints say of it."""

import json
import logging
from dataclasses import asdict

from fluxlite import __version__, parallel
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import flat_values, place_keys, resumable_keys
from fluxlite.train import run_state
from fluxlite.train.building import changed_keys, list_changes
from fluxlite.weights import run_folder

log = logging.getLogger("fluxlite")


def check_resume(saved, config):
    """Say which changed keys a resumed run accepts; raise `ValueError` for the others."""
    new = dict(flat_values(json.loads(json.dumps(asdict(config)))))
    # what an older version did not know has its default
    defaults = dict(flat_values(json.loads(json.dumps(asdict(type(config)())))))
    old = defaults | dict(flat_values(saved))
    changed = changed_keys(old, new)
    moved = {key for key in changed & place_keys(type(config)) if old.get(key) and new[key]}
    accepted = changed & resumable_keys(type(config)) | moved
    refused = changed - accepted
    if refused:
        listed = list_changes(old, new, refused)
        raise ValueError(
            f"resume=auto: {config.output} was started with other settings ({listed}); restore "
            "them, or set another output="
        )
    if moved:
        told = list_changes(old, new, moved)
        warn_for_all("resuming with other places, taken for copies of the same: %s", told)
    if accepted - {"resume"}:
        log.info("resuming with changed %s", ", ".join(sorted(accepted - {"resume"})))
    if "steps" in changed and config.optim.schedule != "constant":
        jump = config.optim.schedule, config.steps
        log.info("optim.schedule=%s now ends at step %d: the learning rate jumps", *jump)


def find_resume(config):
    """The checkpoint to go on from, or None; collective.

    Raises `ValueError` where a run would be overwritten or another one continued.
    """
    folder = run_state.choose_checkpoint(config.output) if config.resume == "auto" else None
    if folder is None:
        return parallel.first_rank_does(lambda: run_state.check_unused(config.output))
    meta = run_folder.read_meta(folder)
    check_resume(meta.config, config)
    if meta.step > config.steps:
        raise ValueError(
            f"output={config.output} is at step {meta.step} already: set steps above that, not "
            f"{config.steps}"
        )
    return folder


def describe_data(training, validation):
    """What a checkpoint says of the data: digests, how many samples are trained on, their files'
    names.
    """
    names = training.file_names()
    return run_folder.DataRecord(training.digest(), len(training), names, validation.digest())


def warn_of_changed_data(folder, data):
    """Say it loudly where a resumed run's data are not those it was trained on."""
    changes = run_state.changed_data(run_folder.read_meta(folder).data, data)
    if changes:
        warn_for_all(
            "resuming on other data: the samples have changed (%s); this is no longer the same run",
            changes,
        )


def describe_run(run):
    """What a checkpoint says of itself: layout, shape, training math, data, the whole
    configuration.
    """
    return {
        "layout": "fluxlite",
        "version": __version__,
        "what": run.task.name,
        "model": asdict(run.model.config),
        "flow": asdict(run.config.flow),
        "config": asdict(run.config),
        "data": asdict(run.data),
        "ema": sorted(run.ema.average) if run.ema else [],
    }
