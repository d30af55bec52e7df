"""A run's folder: which checkpoints it holds, who may write there, and the training state in them.

    runs/a/.lock                       held by rank 0 for as long as the run lives
    runs/a/checkpoints/step-000100/    torch.distributed.checkpoint's files, and meta.json
    runs/a/checkpoints/last            a link that always names a whole checkpoint
    runs/a/checkpoints/.step-000200/   one that is being written, or whose writer was killed

`meta.json` says what a checkpoint is, has the size and CRC-32 of each of its files, and a checksum
of itself: a changed byte is noticed wherever a checkpoint is read.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fluxlite import parallel
from fluxlite.cli.atomic import naming_errors, sync_folder
from fluxlite.cli.descriptions import read_json
from fluxlite.cli.messages import one_line
from fluxlite.parallel.weights import local_tensor
from fluxlite.weights.run_folder import (
    SOON_CHECKED,
    STEP_NAME,
    check_files,
    list_checkpoints,
    open_checkpoint,
    read_meta,
    total_bytes,
    write_meta,
)
from fluxlite.weights.run_tensors import (
    RunReader,
    RunWriter,
    TensorPlanner,
    file_checksum,
    plain_errors,
)
from fluxlite.weights.tensor_files import all_finite

log = logging.getLogger("fluxlite")

# what a run writes at once or adds to, beside its checkpoints
WRITTEN = {"config.json", "metrics.jsonl", "images", "losses.png", "control.png"}

# what a file system without links says
NO_LINKS = errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS

# --- going on -------------------------------------------------------------------------------------


def held_names(run):
    """What lies among a run's checkpoints, less what killed writers left there; raises `ValueError`
    where their folder is a file, or a link to what is not there, as a disk that is not mounted.
    """
    root = Path(run) / "checkpoints"
    if os.path.lexists(root) and not root.is_dir():
        linked = root.is_symlink() and f"a link to {os.readlink(root)}, which is no folder"
        what = linked or "a file"
        raise ValueError(f"output={run}: {root} is {what}: bring it back, or set another output=")
    return [p.name for p in root.iterdir() if not p.name.startswith(".")] if root.is_dir() else []


def check_unused(run):
    """Raise `ValueError` where a run's folder holds checkpoints, or what may be some, or files of
    somebody else's that would be lost.
    """
    if held_names(run):
        raise ValueError(
            f"output={run} holds a run: resume=auto goes on with it; or set another output="
        )
    check_others(run)


def check_others(run):
    """Raise `ValueError` where a run that begins would write over files that are no run's; say so
    where there are others.
    """
    names = {path.name for path in Path(run).glob("*") if path.name[0] != "."}
    if not names or _is_begun(run):
        return
    if taken := sorted(names & WRITTEN):
        raise ValueError(
            f"output={run} holds {taken[0]}, which is no run's: name a new folder, or move it away"
        )
    others = f"{min(names)}{' …' if len(names) > 1 else ''}"
    log.warning("output=%s holds other files (%s): the run's come beside them", run, others)


def _is_begun(run):
    """Whether a folder has the config.json of a run."""
    try:
        return {"model", "flow", "optim"} <= read_json(Path(run) / "config.json").keys()
    except (ValueError, OSError):
        return False


def choose_checkpoint(run):
    """The folder of the newest whole checkpoint to go on from, or None in a new run; collective.

    Newer ones that are damaged are said and set aside. Raises `ValueError` where none is whole.
    """
    damaged = []
    for folder in parallel.first_rank_does(lambda: _candidates(run)):
        faults = [fault for fault in parallel.gather_values(find_fault(folder)) if fault]
        if not faults:
            return parallel.first_rank_does(partial(settle_checkpoints, run, folder, damaged))
        damaged.append((folder, faults[0]))
    names = parallel.first_rank_does(lambda: held_names(run))
    if names:
        why = "; ".join(fault for _, fault in damaged[:3]) or f"there is {', '.join(names[:3])}"
        nodes = " Do all nodes see this folder?" if parallel.world_size() > 1 else ""
        raise ValueError(
            f"resume=auto: no checkpoint of output={run} is whole: {why}. Bring one back, or move "
            f"what is there away to start anew.{nodes}"
        )
    return None


def _candidates(run):
    """The checkpoints to try, newest first; of a copied run also the folder `last`."""
    found, last = list_checkpoints(run), Path(run) / "checkpoints" / "last"
    if last.is_dir() and not last.is_symlink():
        found.append(last)
    return sorted(found, key=_claimed_step, reverse=True)


def _claimed_step(folder):
    """The step in a checkpoint's name; of a folder `last` what it says, less a bit."""
    match = STEP_NAME.fullmatch(folder.name)
    try:
        return int(match[1]) if match else read_meta(folder).step - 0.5
    except ValueError:
        return -1


def find_fault(folder):
    """What is wrong with a checkpoint, in one line, or None; a rank checks its share of files."""
    try:
        meta, _ = open_checkpoint(folder)
        match = STEP_NAME.fullmatch(folder.name)
        if match and int(match[1]) != meta.step:
            raise ValueError(f"{folder} says that it is step {meta.step}: it is another's copy")
        if parallel.rank() == 0 and total_bytes(meta) > SOON_CHECKED:
            log.info("checking the checksums of %s, %.1f GB", folder.name, total_bytes(meta) / 1e9)
        check_files(folder, meta, slice(parallel.rank(), None, parallel.world_size()))
    except (ValueError, OSError) as error:
        return one_line(error)
    return None


def settle_checkpoints(run, chosen, damaged):
    """Point `last` at the chosen checkpoint and set damaged ones aside; returns the chosen folder.

    In a copied run the folder `last` gets the name of its step; where that is there, another name.
    """
    root = Path(run) / "checkpoints"
    last = root / "last"
    copied = last.is_dir() and not last.is_symlink()
    if not copied:  # before what it may name is moved
        point_last(root, chosen.name)
    for folder, fault in damaged:
        place = free_name(root / f"damaged-{folder.name}")
        os.rename(folder, place)
        names = folder.name, place.name, chosen.name
        log.warning("%s; %s is now %s: going on from %s", fault, *names)
    if copied and chosen == last:
        chosen = root / f"step-{read_meta(last).step:06d}"
        os.rename(last, chosen)
    elif last.is_dir() and not last.is_symlink():
        os.rename(last, free_name(root / "copy-of-last"))
    if copied:
        point_last(root, chosen.name)
    if not read_meta(chosen).files:
        log.warning("%s has no checksums of its files: they are taken as they are", chosen)
    return chosen


def free_name(path):
    """`path`, or the first of `path-2`, `path-3` … that does not exist."""
    number, free = 1, path
    while os.path.lexists(free):
        number, free = number + 1, path.with_name(f"{path.name}-{number + 1}")
    return free


def point_last(root, name):
    """Make the link `last` name a checkpoint, in one step. A file system without links, as of a USB
    stick, has none, which is said: readers take the newest step.
    """
    link = root / ".last"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return log.warning("%s gets no link `last` (%s): %s counts", root, error.strerror, name)
    os.replace(link, root / "last")
    sync_folder(root)


def changed_data(before, now):
    """How the data differ from those a run was trained on, in words; empty where they do not."""
    words = []
    if before.digest and before.digest != now.digest:
        gone, new = set(before.names) - set(now.names), set(now.names) - set(before.names)
        words = [f"{before.samples} samples then, {now.samples} now"]
        words += [f"without {', '.join(sorted(gone)[:3])}"] if gone else []
        words += [f"with {', '.join(sorted(new)[:3])}"] if new else []
    if before.held_out and before.held_out != now.held_out:
        words.append("another validation set")
    return ", ".join(words)


# --- one run to a folder --------------------------------------------------------------------------


@contextmanager
def locked_run(folder):
    """Keep other runs out of a run's folder until the block ends; collective.

    Raises `ValueError`, on every rank, where another run is in it.
    """
    held = []
    parallel.first_rank_does(lambda: held.append(lock_folder(Path(folder))))
    try:
        yield
    finally:
        for file in held:
            file.close()


def lock_folder(folder):
    """An open file whose lock is this process's: it goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / ".lock"  # somebody else's folder may have a link of that name
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(place, flags, 0o666), "r+")
    try:
        # not flock, which the loader's forked workers would hold on to
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        file.close()
        raise ValueError(
            f"output={folder} is in use by {holder}: wait until that run ends, or set another "
            "output="
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no second run there", place, error.strerror)
    with naming_errors(place):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


# --- saving and loading ---------------------------------------------------------------------------


BY_NAME = StateDictOptions(  # groups of parameters differ from mesh to mesh
    strict=True, flatten_optimizer_state_dict=True
)


def training_state(model, optimizers, ema):
    """{"model", "optimizer", "ema": {name: tensor}}, and the optimizers' whole state.

    The numbers in that, such as learning rates, follow from the configuration and are not saved.
    """
    whole = get_optimizer_state_dict(model, optimizers, options=BY_NAME)
    moments = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
    state = {"model": dict(model.state_dict()), "optimizer": moments}
    return state | ({"ema": ema.average} if ema else {}), whole


def check_all_finite(state, what):
    """Raise `ValueError`, on every rank, where a tensor of a training state is not finite."""
    found = None
    for group, tensors in state.items():
        for name, tensor in tensors.items():
            if found is None and not all_finite(local_tensor(tensor)):
                found = f"{group}.{name}"
    bad = [name for name in parallel.gather_values(found) if name]
    if bad:
        raise ValueError(f"{what} is not finite ({bad[0]})")


def save_training(run, *, step, model, optimizers, ema, meta, keep, write=lambda folder: None):
    """Write a checkpoint aside, rename it, point `last` at it, drop all but `keep`; collective.

    `write` adds files of its own to the folder; it is collective too.

    Raises `ValueError`, on every rank, where the state is not finite or the disk refuses; a
    checkpoint before it is then whole, and nothing of this one is left.
    """
    root = Path(run) / "checkpoints"
    name = f"step-{step:06d}"
    state, _ = training_state(model, optimizers, ema)
    check_all_finite(state, f"step {step} is not saved ({saved_words(run)}): its state")
    writer = RunWriter(root / f".{name}")
    try:
        parallel.first_rank_does(lambda: clear_leftovers(root))
        with plain_errors():
            dcp.save(state, storage_writer=writer, planner=TensorPlanner())
        write(root / f".{name}")
        files = {}
        for records in parallel.gather_values(writer.fs.records):
            files |= records
        files |= parallel.first_rank_does(lambda: describe_others(root / f".{name}", files))
        about = meta | {"step": step, "files": files}
        parallel.first_rank_does(lambda: publish_checkpoint(root, name, about))
    except (ValueError, OSError, MemoryError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(root / f".{name}", ignore_errors=True)
        raise ValueError(
            f"the checkpoint of step {step} could not be written ({one_line(error)}); "
            f"{saved_words(run)}"
        ) from None
    try:
        parallel.first_rank_does(lambda: point_last(root, name))
    except OSError as error:
        raise ValueError(
            f"checkpoints/last could not be pointed at {name} ({one_line(error)}), which is whole: "
            "resume=auto goes on from it"
        ) from None
    parallel.first_rank_does(lambda: drop_older(root, step, keep))


def describe_others(folder, known):
    """{name: bytes and checksum} of a folder's files that are not `known`."""
    others = [file for file in folder.iterdir() if file.name not in known]
    return {f.name: {"bytes": f.stat().st_size, "crc32": file_checksum(f)} for f in others}


def saved_words(run):
    """What of a run lies on the disk, in words for an error."""
    try:
        found = list_checkpoints(run)
    except OSError as error:
        return f"what is saved cannot be read: {one_line(error)}"
    if not found:
        return "there is no checkpoint to go on from yet"
    return f"{found[0].name} is whole, and resume=auto goes on from there"


def clear_leftovers(root):
    """Make the folder for checkpoints, without what killed writers left there."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".step-*"):
        remove_folder(left)


def remove_folder(path):
    """Remove a folder, or a link to one that lies elsewhere, or a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def publish_checkpoint(root, name, meta):
    """Give what lies whole in `.step-…` its name."""
    aside = root / f".{name}"
    write_meta(aside / "meta.json", meta)
    sync_folder(aside)
    if os.path.lexists(root / name):  # not this run's
        os.rename(root / name, free_name(root / f"replaced-{name}"))
    os.rename(aside, root / name)


def drop_older(root, step, keep):
    """Remove the checkpoints before a step's but the newest, `keep` with its own; 0 keeps all."""
    older = [path for path in list_checkpoints(root.parent) if int(path.name[5:]) < step]
    for path in older[keep - 1 :] if keep else []:
        drop_checkpoint(path)


def drop_checkpoint(path):
    """Remove a checkpoint, out of sight first: a half removed one must not look whole."""
    try:
        aside = path.with_name(f".{path.name}")
        os.rename(path, aside)
        remove_folder(aside)
    except OSError as error:
        log.warning("an old checkpoint could not be removed: %s", one_line(error))


def load_training(folder, *, model, optimizers, ema):
    """Read a checkpoint into a sharded model, its optimizers and average; returns its step.

    Collective; whatever mesh wrote it. Raises `ValueError` where it is damaged.
    """
    meta, tensors = open_checkpoint(folder)
    state, whole = training_state(model, optimizers, ema)
    for group, entries in state.items():
        for name in entries:
            tensors.described(f"{group}.{name}")
    with plain_errors():
        dcp.load(state, storage_reader=RunReader(tensors))
    check_all_finite(state, f"{folder} cannot be gone on from: it")
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizers, whole, options=BY_NAME)
    return meta.step
