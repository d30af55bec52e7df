"""Checkpoints: transformers, ControlNets, autoencoders from and to files of any layout, and from
runs (see `run_state`).
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fluxlite import __version__
from fluxlite.cli.atomic import locked
from fluxlite.cli.descriptions import parse_json, read_description, read_json
from fluxlite.cli.options import expand_home, option, shortened
from fluxlite.nets import schedule
from fluxlite.nets.autoencoder import AutoencoderConfig
from fluxlite.nets.controlnet import ControlNetConfig
from fluxlite.nets.flux import FluxConfig
from fluxlite.nets.schedule import read_scheduler
from fluxlite.weights import foreign, hub, layouts, net_configs, run_folder, tensor_files
from fluxlite.weights.run_folder import is_run, last_checkpoint

log = logging.getLogger("fluxlite")

TINY = "flux-tiny"
ASSETS = Path(__file__).parents[3] / "assets"


@dataclass
class CheckpointConfig:
    """When a run saves, and how much it keeps."""

    every: int = option(
        1000, "steps between checkpoints; the last step always saves", at_least=1, at_most=10**9
    )
    keep: int = option(
        2, "checkpoints kept, the newest; 0 keeps all", at_least=0, at_most=1_000_000
    )


# --- what a path holds ----------------------------------------------------------------------------


@dataclass
class Source:
    """A model on disk, described and checked; its tensors are mapped, and read when they are
    used.
    """

    where: str
    what: str  # transformer, controlnet or autoencoder
    layout: str
    config: FluxConfig | ControlNetConfig | AutoencoderConfig
    described: dict  # {name: (dtype, shape)}
    read: Callable  # (name, start=0, stop=None) → a tensor, or its rows from start to stop
    metadata: dict
    files: list
    # for sampling, where the checkpoint has some of its own: {field of SampleConfig: value}
    settings: dict
    averaged: bool = False  # whether it is the moving average of a run
    check_whole: Callable = lambda: (
        None
    )  # raises `ValueError` where a run's files are not as they were written

    def num_bytes(self):
        return tensor_files.num_bytes(self.described)

    def fingerprint(self):
        """A digest of the files' names, sizes and times of change, and of what is taken of them,
        without reading them.
        """
        lines = [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in self.files]
        return hashlib.sha256("\n".join([*lines, f"averaged {self.averaged}"]).encode()).hexdigest()


def resolve(path):
    """`flux-tiny` names the pipeline that comes with the code; anything else stands for itself."""
    if path != TINY:
        return path
    if not (ASSETS / TINY).is_dir():
        raise ValueError(
            f"{ASSETS / TINY} is missing: work in a clone of the repository, or name a checkpoint "
            "of your own"
        )
    return str(ASSETS / TINY)


def local(where, patterns, *, setting="model.checkpoint"):
    """The path that `where` is or, of a hub repository, that its files matching `patterns` have
    been fetched to.
    """
    path = Path(expand_home(str(where), setting))
    if path.exists():
        return path
    if not hub.is_repository(str(where)):
        raise ValueError(f"{setting}={where} does not exist")
    return hub.fetch(str(where), patterns, key=setting)


def open_source(where, *, setting="model.checkpoint", ema=True, part="transformer", given=None):
    """The `Source` that a path or hub repository holds, recognised by its keys and files.

    A pipeline's folder stands for its `part` (transformer, controlnet or vae); of a run, `ema`
    chooses the moving average where it has one. `given` are {field: value} of the rotations, for
    weights without a configuration. Raises `ValueError`, naming `setting`, for what is not exactly
    a transformer, a ControlNet or an autoencoder.
    """
    loose = ["*.safetensors"] if part == "controlnet" else []  # as XLabs publishes
    files = [f"{part}/*", "config.json", "diffusion_pytorch_model*", f"scheduler/{SCHEDULER_FILE}"]
    path = local(where, [*files, *loose], setting=setting)
    if not os.access(path, os.R_OK):
        raise ValueError(f"{setting}={where} cannot be read: no permission")
    path = path / part if (path / part).is_dir() else path
    try:
        source = _open_run(path, ema) if is_run(path) else _open_tensors(path, given)
        layouts.check(
            source.layout,
            source.config,
            {name: shape for name, (_, shape) in source.described.items()},
        )
    except ValueError as error:
        raise ValueError(f"{setting}={where}: {error}") from None
    return source


def _open_tensors(path, given=None):
    tensors = tensor_files.Tensors(path)
    foreign.check_keys(tensors.keys())
    what, layout, prefix = layouts.recognise(tensors.keys())
    described = tensors.without(prefix).described()
    shapes = {name: shape for name, (_, shape) in described.items()}
    about = (
        tensors.metadata if "fluxlite_version" in tensors.metadata else {}
    )  # others' metadata may use the same words
    beside = (path if path.is_dir() else path.parent) / "config.json"
    told = dict(saved=about.get("config"), where=path, beside=beside, given=given)
    config, settings = net_configs.read_net_config(what, layout, shapes, **told), {}
    if what == "transformer":
        settings = sampling_settings(path, about)
        config.scheduler = scheduler_of(path, about)
    return Source(
        str(path), what, layout, config, described, tensors.read, about, tensors.files, settings
    )


def sampling_settings(path, about):
    """{field of SampleConfig: value} of our own metadata, or fluxlite.json beside a transformer."""
    file, saved = path.parent / "fluxlite.json", about.get("sampling")
    if saved:
        by, version = f"{path}'s metadata", about["fluxlite_version"]
        return schedule.read_settings(by, parse_json(saved, by) | {"version": version})
    return schedule.read_settings(file, read_json(file)) if file.exists() else {}


def scheduler_of(path, about):
    """The `SchedulerConfig` of our own metadata, or beside a transformer's file or folder; or None.

    A pipeline has it in its folder `scheduler`; where we wrote diffusers' layout it lies beside
    config.json.
    """
    if about.get("scheduler"):
        by = f"{path}'s metadata"
        return read_scheduler(by, parse_json(about["scheduler"], by))
    folder = path if path.is_dir() else path.parent
    roots = [folder.parent] if path.is_dir() or folder.name == "transformer" else []
    places = [folder, *(root / "scheduler" for root in [folder, *roots])]
    found = next((p for p in (place / SCHEDULER_FILE for place in places) if p.exists()), None)
    return read_scheduler(found) if found else None


SCHEDULER_FILE = "scheduler_config.json"


def _open_run(path, ema):
    """A run's last checkpoint, or one of its checkpoints: the moving average in place of the
    weights that have one.

    A tensor's checksum is checked when it is read; a small checkpoint's files at once, a large
    one's by `check_whole`.
    """
    folder = path if (Path(path) / "meta.json").is_file() else last_checkpoint(path)
    meta, tensors = run_folder.open_checkpoint(folder)
    averaged = set(meta.ema if ema else ())
    config = _run_config(folder, meta, tensors)

    def key(name):
        return f"{'ema' if name in averaged else 'model'}.{name}"

    def read(name, start=0, stop=None):
        return tensors.read(key(name), start, stop)

    check_whole = partial(run_folder.check_files, folder, meta)
    if run_folder.total_bytes(meta) <= run_folder.SOON_CHECKED:
        check_whole()
    described = {name: tensors.described(key(name)) for name in layouts.our_shapes(config)}
    metadata = {"training": json.dumps(meta.flow | {"step": meta.step, "ema": bool(averaged)})}
    files = sorted(p for p in folder.iterdir() if p.is_file())
    settings = run_folder.run_settings(folder, meta)
    config.scheduler = scheduler_beside(run_folder.saved_base(folder, meta), config)
    source = Source(
        str(path),
        meta.what,
        "fluxlite",
        config,
        described,
        read,
        metadata,
        files,
        settings,
        bool(averaged),
    )
    source.check_whole = check_whole
    return source


def _run_config(folder, meta, tensors):
    """The configuration of a run's model; raises `ValueError` for one that its tensors cannot
    have.
    """
    file = folder / "meta.json"
    config = read_description(
        file, ControlNetConfig if meta.what == "controlnet" else FluxConfig, meta.model
    )
    widest = max((size for tensor in tensors.tensors.values() for size in tensor.shape), default=0)
    for f in fields(config):  # 10⁹ blocks would be built before they are missed
        value, limit = (
            getattr(config, f.name),
            len(tensors.tensors) if f.name.endswith("_blocks") else widest,
        )
        numbers = value if isinstance(value, tuple) else [value] if f.type is int else []
        if any(type(number) is not int or not 0 <= number <= limit for number in numbers):
            raise ValueError(
                f"{file}: model.{f.name}={shortened(value)} does not fit the tensors beside it"
            )
    try:
        config.validate()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def scheduler_beside(checkpoint, config):
    """The `SchedulerConfig` of a transformer that a run started from, None where that is gone.

    `config` is the run's `FluxConfig`.
    """
    if not checkpoint or not Path(resolve(checkpoint)).expanduser().exists():
        return None
    try:
        return open_source(resolve(checkpoint), given=asdict(config)).config.scheduler
    except ValueError as error:
        log.warning("the scheduler of a run's base is not known (%s): FLUX.1's is assumed", error)
        return None


# --- loading --------------------------------------------------------------------------------------


def load_state(source):
    """A state dict in our layout: views of the mapped files, and copies of what they hold
    otherwise.
    """
    return dict(weights_of(source))


def weights_of(source):
    """A source's tensors in our layout, a few linears at a time: (name, values)."""
    return layouts.convert(source.read, source.layout, "fluxlite", source.config)


def _load(source, dtype, device, *options):
    model = layouts.on_meta(source.config, *options)
    model.load_state_dict(load_state(source), strict=True, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_part(source, what, setting):
    """Raise `ValueError`, naming `setting`, where a `Source` is something other than `what`."""
    if source.what != what:
        raise ValueError(
            f"{setting}={source.where} holds the wrong part, {source.what}: name {ARTICLED[what]}"
        )


ARTICLED = {
    "transformer": "a transformer",
    "controlnet": "a ControlNet",
    "autoencoder": "an autoencoder",
}


def load_transformer(where, *, ema=True, attention="auto", dtype=None, device="cpu"):
    """A Flux from what `open_source` takes, or from a `Source`; raises `ValueError`."""
    source = where if isinstance(where, Source) else open_source(resolve(where), ema=ema)
    check_part(source, "transformer", "model.checkpoint")
    return _load(source, dtype, device, attention)


def load_controlnet(where, *, attention="auto", dtype=None, device="cpu"):
    """A ControlNet from what `open_source` takes, or from a `Source`; raises `ValueError`."""
    source = (
        where
        if isinstance(where, Source)
        else open_source(where, setting="controlnet.checkpoint", part="controlnet")
    )
    check_part(source, "controlnet", "controlnet.checkpoint")
    return _load(source, dtype, device, attention)


def load_autoencoder(where, *, dtype=None, device="cpu"):
    """An Autoencoder from a diffusers `vae/` folder (or the pipeline folder that holds it) or BFL's
    `ae.safetensors`.
    """
    source = (
        where
        if isinstance(where, Source)
        else open_source(where, setting="model.autoencoder", part="vae")
    )
    check_part(source, "autoencoder", "model.autoencoder")
    return _load(source, dtype, device)


# --- converting -----------------------------------------------------------------------------------

FILE_NAMES = {  # of a file in a folder, without .safetensors
    "transformer": {
        "fluxlite": "fluxlite_transformer",
        "bfl": "flux1",
        "nemo": "nemo_flux_transformer",
    },
    "controlnet": {
        "fluxlite": "fluxlite_controlnet",
        "bfl": "flux_controlnet",
        "nemo": "nemo_flux_controlnet_transformer",
    },
    "autoencoder": {"fluxlite": "fluxlite_autoencoder", "bfl": "ae"},
}
DIFFUSERS_SHARD_BYTES = 10 * 10**9  # as diffusers splits


def write_converted(
    source,
    dst,
    *,
    to="fluxlite",
    dtype=None,
    max_shard_bytes=None,
    overwrite=False,
    remedy="name another",
    setting="--dst ",
    progress=None,
):
    """Write `source` to `dst` in the layout `to`, a few linears at a time; returns the files and
    the digest of the source.

    `dst` is a file where it ends in .safetensors, else a folder; diffusers is always a folder.
    Nothing appears under that name before it is whole. `progress` is called with the number of
    bytes of each write. Raises `ValueError`, whose text begins with `setting` where `dst` will not
    do.
    """
    dst = Path(expand_home(str(dst), setting.rstrip(" =")))
    to_folder = dst.suffix != ".safetensors"
    check_destination(source, dst, to, to_folder, setting)
    shapes = layouts.shapes(to, source.config)
    types = layouts.dtypes(
        source.layout, to, source.config, {name: of for name, (of, _) in source.described.items()}
    )
    described = {name: (dtype or types[name], shape) for name, shape in shapes.items()}
    shards = tensor_files.split_shards(
        described, max_shard_bytes or (DIFFUSERS_SHARD_BYTES if to == "diffusers" else None)
    )
    if len(shards) > 1 and not to_folder:
        raise ValueError(
            f"{setting}{dst}: {len(shards)} shards need a folder; name one, or raise "
            "--max-shard-size"
        )
    tensor_files.check_room(dst, tensor_files.num_bytes(described))
    digests = tensor_files.Digests()
    try:
        with tensor_files.aside(dst, overwrite=overwrite, folder=to_folder, remedy=remedy) as path:
            names = _file_names(source.what, to, len(shards))
            files = [path / name for name in names] if to_folder else [path]
            rewrites = _write_shards(
                source, to, shards, files, digests, progress or (lambda count: None)
            )
            source.check_whole()
            for name in (
                source.described.keys() - digests.found.keys()
            ):  # what no layout but the source's keeps: NeMo's second bias
                digests.add(name, source)
            total = digests.total()
            for rewrite in rewrites:
                rewrite({"source_digest": total})
            if to_folder:
                _write_beside(path, source, to, names, shards)
    finally:
        digests.close()
    return [dst / name for name in names] if to_folder else [dst], total


def check_destination(source, dst, to, to_folder, setting="--dst "):
    """Raise `ValueError` where `to` cannot be written to `dst`, or where that would touch the
    source.
    """
    if source.what == "autoencoder" and to == "nemo":
        raise ValueError(
            "--to nemo: NeMo has no autoencoder layout of its own; it reads ae.safetensors (--to "
            "bfl)"
        )
    _check_layout_holds(source, to)
    if to_folder and dst.suffix in (".ckpt", ".pt", ".pth", ".bin", ".sft", ".gguf"):
        raise ValueError(f"{setting}{dst}: a file must end in .safetensors")
    if to == "diffusers" and not to_folder:
        raise ValueError(
            f"{setting}{dst}: diffusers' layout is a folder, with config.json beside the weights; "
            "name one"
        )
    place, origin = dst.resolve(), Path(source.where).resolve()
    if (
        place == origin
        or place in origin.parents
        or any(place in (file.resolve(), *file.resolve().parents) for file in source.files)
    ):
        raise ValueError(f"{setting}{dst} is the source or holds it: name another")
    if place.exists() and _holds_another_part(place, source.what):
        raise ValueError(
            f"{setting}{dst} holds something other than a FLUX {source.what}: name another, or "
            "remove it first"
        )
    if origin.is_dir() and origin in place.parents:
        raise ValueError(
            f"{setting}{dst} lies in the source's folder, which it would spoil: name another"
        )


def _check_layout_holds(source, to):
    """Raise `ValueError` where programs that read the layout `to` know no such ControlNet."""
    if source.what != "controlnet" or to == source.layout:
        return
    config = source.config
    if to == "nemo" and config.num_modes:
        raise ValueError(
            "--to nemo: NeMo's ControlNet knows no modes, and this union net has "
            f"{config.num_modes}"
        )
    if to == "bfl" and (config.hint, config.num_single_blocks, config.num_modes) != ("pixel", 0, 0):
        raise ValueError(
            "--to bfl: of a ControlNet that is x-flux's layout, of pixel hints, without single "
            "blocks and modes; this one has "
            f"hint={config.hint}, {config.num_single_blocks} single blocks and {config.num_modes} "
            "modes: choose --to diffusers"
        )


def _holds_another_part(place, what):
    """Whether whole safetensors files lie at `place` and are not a checkpoint of this kind, a text
    encoder's for instance.
    """
    try:
        keys = tensor_files.Tensors(place).keys()
    except (ValueError, OSError):
        return False
    try:
        return layouts.recognise(keys)[0] != what
    except ValueError:
        return True


def _file_names(what, to, count):
    return tensor_files.shard_names(
        "diffusion_pytorch_model" if to == "diffusers" else FILE_NAMES[what][to], count
    )


def _write_shards(source, to, shards, files, digests, progress):
    def read(name):
        digests.add(name, source)
        tensor = source.read(name)
        tensor_files.check_values(f"{source.where}: {name}", tensor)
        return tensor

    pieces = layouts.convert(read, source.layout, to, source.config)
    rewrites, held = [], []

    def of(shard):
        """The tensors of one shard; the first of the next is held back for it."""
        while held or (nxt := next(pieces, None)):
            name, tensor = held.pop() if held else nxt
            if name not in shard:
                held.append((name, tensor))
                return
            yield name, tensor

    for shard, file in zip(shards, files, strict=True):
        rewrites.append(tensor_files.write(file, shard, of(shard), _metadata(source, to), progress))
    return rewrites


def _metadata(source, to):
    kept = {k: v for k, v in source.metadata.items() if k == "training"}
    if source.settings:
        kept["sampling"] = json.dumps(source.settings)
    if getattr(source.config, "scheduler", None):
        kept["scheduler"] = json.dumps(asdict(source.config.scheduler))
    return kept | {
        "format": "pt",
        "what": source.what,
        "layout": to,
        "config": json.dumps(asdict(source.config)),
        "source_layout": source.layout,
        "source_files": source.fingerprint(),
        "source_digest": "0" * 64,  # written when all has been read
        "fluxlite_version": __version__,
    }


def _write_beside(folder, source, to, names, shards):
    """What a folder needs beside its weights: an index, and in diffusers' layout config.json."""
    if len(shards) > 1:
        stem = (
            "diffusion_pytorch_model"
            if to == "diffusers"
            else Path(names[0]).stem.rsplit("-00001-of-", 1)[0]
        )
        tensor_files.write_index(folder / f"{stem}.safetensors.index.json", shards, names)
    if to == "diffusers":
        of_net = source.what != "autoencoder"
        values = (
            layouts.config_to_diffusers if of_net else layouts.autoencoder_config_to_diffusers
        )(source.config)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        if getattr(source.config, "scheduler", None):
            about = json.dumps(asdict(source.config.scheduler), indent=2)
            (folder / SCHEDULER_FILE).write_text(about + "\n")


def converted(where, save_converted, *, ema=True, group="model", part="transformer", given=None):
    """The `Source` of `model.checkpoint`; with `model.save_converted` that file, written first
    where it is not there yet.

    With group="controlnet" and that `part`, of `controlnet.checkpoint` and
    `controlnet.save_converted`. Ranks that share a disk may call this together: one writes, the
    others wait. Raises `ValueError` where the file was made from something else.
    """
    setting = f"{group}.save_converted"
    options = dict(setting=f"{group}.checkpoint", ema=ema, part=part, given=given)
    source = open_source(where, **options)
    check_part(source, part, f"{group}.checkpoint")
    if not save_converted:
        return source
    if source.layout == "fluxlite" and not is_run(Path(where).expanduser()):
        log.info("%s: %s is in our own layout already, and is used as it is", setting, where)
        return source
    file = Path(expand_home(str(save_converted), setting))
    if file.suffix != ".safetensors":
        raise ValueError(f"{setting}={save_converted} must end in .safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_name(f".{file.name}.lock")):
        if not file.exists():
            with tqdm(
                total=source.num_bytes(), unit="B", unit_scale=True, desc=f"writing {file}"
            ) as bar:
                write_converted(source, file, setting=f"{setting}=", progress=bar.update)
    kept = open_source(file, setting=setting)
    if kept.metadata.get("source_files") != source.fingerprint():
        raise ValueError(
            f"{setting}={file} was not made from {group}.checkpoint={where}: remove it, or name "
            "another"
        )
    return kept
