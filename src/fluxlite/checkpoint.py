"""Checkpoints: transformers and autoencoders from files of any layout and back to them, and a run's sharded training state.

A run's folder holds `checkpoints/step-000100/` (torch.distributed.checkpoint files and `meta.json`, which says what they are) and
`checkpoints/last`, a link that always names a whole one.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from tqdm import tqdm

from fluxlite import __version__, convert, hub, streams
from fluxlite.autoencoder import Autoencoder, AutoencoderConfig
from fluxlite.data.shards import locked
from fluxlite.model import Flux, FluxConfig


@dataclass
class CheckpointConfig:
    """When a run saves, and how much it keeps."""

    every: int = field(default=1000, metadata={"help": "steps between checkpoints; the last step always saves"})
    keep: int = field(default=2, metadata={"help": "checkpoints kept, the newest; 0 keeps all"})

    def validate(self):
        if self.every < 1 or self.keep < 0:
            raise ValueError(f"checkpoint.every={self.every} must be at least 1 and checkpoint.keep={self.keep} not negative")


# --- what a path holds ----------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A transformer or an autoencoder on disk, described and checked; its tensors are read by name when they are needed."""

    where: str
    what: str  # transformer or autoencoder
    layout: str
    config: FluxConfig | AutoencoderConfig
    described: dict  # {name: (dtype, shape)}
    get: Callable  # name → tensor, mapped where it lies in a safetensors file
    metadata: dict
    files: list

    def num_bytes(self):
        return streams.num_bytes(self.described)

    def fingerprint(self):
        """A digest of the files' names, sizes and times of change, to know them again without reading them."""
        lines = [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in self.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_run(path):
    """Whether `path` is a run folder or one of its checkpoints."""
    return (Path(path) / "checkpoints" / "last").is_dir() or (Path(path) / "meta.json").is_file()


def open_source(where, *, setting="model.checkpoint", ema=True, part="transformer"):
    """The `Source` that a path or hub repository holds, recognised by its keys and files.

    A pipeline's folder stands for its `part` (transformer or vae); of a run, `ema` chooses the moving average where it has one.
    Raises `ValueError`, naming `setting`, for anything that is not exactly a transformer or an autoencoder.
    """
    path = Path(where).expanduser()
    if not path.exists():
        if not hub.is_repository(str(where)):
            raise ValueError(f"{setting}={where} does not exist")
        folder = hub.fetch(str(where), [f"{part}/*", "config.json", "diffusion_pytorch_model*"], key=setting)
        path = folder
    if not os.access(path, os.R_OK):
        raise ValueError(f"{setting}={where} cannot be read: no permission")
    path = path / part if (path / part).is_dir() else path
    try:
        source = _open_run(path, ema) if is_run(path) else _open_tensors(path)
        convert.check(source.layout, source.config, {name: shape for name, (_, shape) in source.described.items()})
    except ValueError as error:
        raise ValueError(f"{setting}={where}: {error}") from None
    return source


def _open_tensors(path):
    tensors = streams.Tensors(path)
    what, layout, prefix = convert.recognise(tensors.keys())
    described = tensors.without(prefix).described()
    shapes = {name: shape for name, (_, shape) in described.items()}
    values = tensors.metadata.get("config")
    beside = (path if path.is_dir() else path.parent) / "config.json"
    try:
        if what == "autoencoder":
            values = json.loads(values) if values else _diffusers_values(beside, "AutoencoderKL")
            config = convert.infer_autoencoder_config(layout, shapes, values)
        elif values:
            config = flux_config(json.loads(values))
        elif layout == "diffusers" and _diffusers_values(beside, "FluxTransformer2DModel"):
            config = convert.config_from_diffusers(_diffusers_values(beside, "FluxTransformer2DModel"))
        else:
            config = convert.infer_config(layout, shapes)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its configuration is damaged: {error!r} is missing or unknown") from None
    if what == "transformer":
        config.validate()
    return Source(str(path), what, layout, config, described, tensors.__getitem__, tensors.metadata, tensors.files)


def _diffusers_values(file, class_name):
    """A diffusers config.json of `class_name`, or None where there is none."""
    try:
        values = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"{file} is damaged: fetch it again") from None
    return values if values.get("_class_name", class_name) == class_name and values else None


def _open_run(path, ema):
    """A run's last checkpoint, or one of its checkpoints: the moving average in place of the weights that have one."""
    folder = last_checkpoint(path) or Path(path)
    meta = read_meta(folder)
    config, averaged = flux_config(meta["model"]), set(meta["ema"] if ema else ())
    shapes = {name: tuple(tensor.shape) for name, tensor in convert.our_shapes(config).items()}

    def get(name):
        group = "ema" if name in averaged else "model"
        tensor = torch.empty(shapes[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose: one process reads
            dcp.load({group: {name: tensor}}, checkpoint_id=folder, no_dist=True)
        return tensor

    metadata = {"training": json.dumps(meta["flow"] | {"step": meta["step"], "ema": bool(averaged)})}
    files = sorted(p for p in folder.iterdir() if p.is_file())
    described = {name: (torch.float32, shape) for name, shape in shapes.items()}
    return Source(str(path), "transformer", "fluxlite", config, described, get, metadata, files)


def flux_config(values):
    """A `FluxConfig` from its JSON."""
    return FluxConfig(**(values | {"rope_axes": tuple(values["rope_axes"])}))


# --- loading --------------------------------------------------------------------------------------------------------------------


def load_state(source):
    """A state dict in our layout: of our own files mapped and not copied, of others only what changes is copied."""
    if source.layout == "fluxlite" or (source.what == "autoencoder" and source.layout == "diffusers"):
        return {name: source.get(name) for name in source.described}
    pieces = convert.convert(source.get, source.layout, "fluxlite", source.config)
    return convert.assemble(pieces, convert.our_shapes(source.config))


def _into(model, source, dtype, device):
    model.load_state_dict(load_state(source), strict=True, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_transformer(where, *, ema=True, attention="auto", dtype=None, device="cpu"):
    """A Flux from what `open_source` takes, or from a `Source`; raises `ValueError`."""
    source = where if isinstance(where, Source) else open_source(where, ema=ema)
    if source.what != "transformer":
        raise ValueError(f"model.checkpoint={source.where} is an autoencoder: name a transformer")
    with torch.device("meta"):
        model = Flux(source.config, attention)
    return _into(model, source, dtype, device)


def load_autoencoder(where, *, dtype=None, device="cpu"):
    """An Autoencoder from a diffusers `vae/` folder (or the pipeline folder that holds it) or BFL's `ae.safetensors`."""
    source = where if isinstance(where, Source) else open_source(where, setting="model.autoencoder", part="vae")
    if source.what != "autoencoder":
        raise ValueError(f"model.autoencoder={source.where} is a transformer: name an autoencoder")
    with torch.device("meta"):
        model = Autoencoder(source.config)
    return _into(model, source, dtype, device)


# --- converting -----------------------------------------------------------------------------------------------------------------

FILE_NAMES = {"fluxlite": "fluxlite_{}.safetensors", "bfl": "flux1.safetensors", "nemo": "nemo_flux_transformer.safetensors"}
DIFFUSERS_SHARD_BYTES = 10 * 10**9  # as diffusers splits


def write_converted(source, dst, *, to="fluxlite", dtype=None, max_shard_bytes=None, overwrite=False, progress=None):
    """Write `source` to `dst` in the layout `to`, a few linears at a time; returns the files and the digest of the source.

    `dst` is a file where it ends in .safetensors, else a folder; diffusers is always a folder. Nothing appears under that name
    before it is whole. `progress` is called with the number of bytes of each write. Raises `ValueError`.
    """
    dst = Path(dst)
    to_folder = dst.suffix != ".safetensors"
    if source.what == "autoencoder" and to == "nemo":
        raise ValueError("--to nemo: NeMo has no autoencoder layout of its own; it reads ae.safetensors (--to bfl)")
    if to == "diffusers" and not to_folder:
        raise ValueError(f"--dst {dst}: diffusers' layout is a folder, with config.json beside the weights; name one")
    if any(file.resolve() == dst.resolve() or file.resolve().parent == dst.resolve() for file in source.files):
        raise ValueError(f"--dst {dst} is the source itself: name another")
    shapes = convert.shapes(to, source.config)
    of = dtype or next(iter(source.described.values()))[0]
    described = {name: (of, shape) for name, shape in shapes.items()}
    if not dtype:  # a checkpoint of several types keeps them where a tensor goes over whole
        described |= {name: (source.described[name][0], shape) for name, shape in shapes.items() if name in source.described}
    shards = streams.split_shards(described, max_shard_bytes or (DIFFUSERS_SHARD_BYTES if to == "diffusers" else None))
    if len(shards) > 1 and not to_folder:
        raise ValueError(f"--dst {dst}: {len(shards)} shards need a folder; name one, or raise --max-shard-size")
    streams.check_room(dst, streams.num_bytes(described))
    digests = streams.Digests()
    try:
        with streams.aside(dst, overwrite=overwrite, folder=to_folder) as path:
            names = _file_names(source.what, to, len(shards))
            files = [path / name for name in names] if to_folder else [path]
            rewrites = _write_shards(source, to, shards, files, digests, progress or (lambda count: None))
            for name in source.described.keys() - digests.found.keys():  # what no layout but the source's keeps: NeMo's second bias
                digests.add(name, source.get(name))
            total = digests.total()
            for rewrite in rewrites:
                rewrite({"source_digest": total})
            if to_folder:
                _write_beside(path, source, to, names, shards)
    finally:
        digests.close()
    return [dst / name for name in names] if to_folder else [dst], total


def _file_names(what, to, count):
    stem = "diffusion_pytorch_model.safetensors" if to == "diffusers" else FILE_NAMES[to].format(what)
    if what == "autoencoder" and to == "bfl":
        stem = "ae.safetensors"
    if count == 1:
        return [stem]
    return [stem.replace(".safetensors", f"-{i + 1:05d}-of-{count:05d}.safetensors") for i in range(count)]


def _write_shards(source, to, shards, files, digests, progress):
    def get(name):
        tensor = source.get(name)
        digests.add(name, tensor)
        return tensor

    pieces = ((piece.name, tensor) for piece, tensor in convert.convert(get, source.layout, to, source.config))
    rewrites, held = [], []

    def of(shard):
        """The pieces of one shard; the first of the next is held back for it."""
        while held or (nxt := next(pieces, None)):
            name, tensor = held.pop() if held else nxt
            if name not in shard:
                held.append((name, tensor))
                return
            yield name, tensor

    for shard, file in zip(shards, files, strict=True):
        rewrites.append(streams.write(file, shard, of(shard), _metadata(source, to), progress))
    return rewrites


def _metadata(source, to):
    kept = {k: v for k, v in source.metadata.items() if k == "training"}
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
        stem = "diffusion_pytorch_model" if to == "diffusers" else Path(names[0]).stem.rsplit("-00001-of-", 1)[0]
        streams.write_index(folder / f"{stem}.safetensors.index.json", shards, names)
    if to == "diffusers":
        flux = source.what == "transformer"
        values = (convert.config_to_diffusers if flux else convert.autoencoder_config_to_diffusers)(source.config)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def converted(where, save_converted, *, ema=True):
    """The `Source` of `model.checkpoint`; with `model.save_converted` that file, written first where it is not there yet.

    Ranks that share a disk may call this together: one writes, the others wait. Raises `ValueError` where the file was made from
    something else.
    """
    source = open_source(where, ema=ema)
    if not save_converted or source.layout == "fluxlite" and not is_run(where):
        return source
    file = Path(save_converted).expanduser()
    if file.suffix != ".safetensors":
        raise ValueError(f"model.save_converted={save_converted} must end in .safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_name(f".{file.name}.lock")):
        if not file.exists():
            with tqdm(total=source.num_bytes(), unit="B", unit_scale=True, desc=f"writing {file}") as bar:
                write_converted(source, file, progress=bar.update)
    kept = open_source(file, setting="model.save_converted")
    if kept.metadata.get("source_files") != source.fingerprint():
        raise ValueError(f"model.save_converted={file} was not made from model.checkpoint={where}: remove it, or name another")
    return kept


# --- a run's training state -----------------------------------------------------------------------------------------------------


def last_checkpoint(run):
    """The newest whole checkpoint of a run folder, or None."""
    link = Path(run) / "checkpoints" / "last"
    return link.resolve() if link.is_dir() else None


def read_meta(folder):
    """What a checkpoint says it is."""
    return json.loads((Path(folder) / "meta.json").read_text())


def _training_state(model, optimizers, ema):
    state = {"model": dict(model.state_dict()), "optimizer": get_optimizer_state_dict(model, optimizers)}
    return state | ({"ema": ema.average} if ema else {})


def save_training(run, *, step, model, optimizers, ema, meta, keep):
    """Write `checkpoints/step-…` aside, rename it, point `last` at it, and drop all but the newest `keep`; collective."""
    root = Path(run) / "checkpoints"
    name = f"step-{step:06d}"
    aside = root / f".{name}"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dcp.save(_training_state(model, optimizers, ema), checkpoint_id=aside)
    if dist.get_rank() == 0:
        (aside / "meta.json").write_text(json.dumps(meta | {"step": step}, indent=2) + "\n")
        _sync(aside)
        shutil.rmtree(root / name, ignore_errors=True)
        os.rename(aside, root / name)
        link = root / ".last"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, root / "last")
        _sync(root)
        for old in sorted(root.glob("step-*"))[:-keep] if keep else []:
            shutil.rmtree(old)
    dist.barrier()


def _sync(folder):
    """Put a folder and its files on the disk."""
    for path in [*(p for p in folder.iterdir() if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load_training(folder, *, model, optimizers, ema):
    """Read a checkpoint into a sharded model, its optimizer and average, in place, whatever mesh wrote it; returns its step."""
    state = _training_state(model, optimizers, ema)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"], options=StateDictOptions(strict=True))
    return read_meta(folder)["step"]
