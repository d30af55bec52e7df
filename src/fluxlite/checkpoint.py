"""Checkpoints: transformers and autoencoders from files, and a run's sharded training state.

A run's folder holds `checkpoints/step-000100/` (torch.distributed.checkpoint files and `meta.json`, which says what they are) and
`checkpoints/last`, a link that always names a whole one.
"""

import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from fluxlite import convert
from fluxlite.autoencoder import Autoencoder, AutoencoderConfig
from fluxlite.model import Flux, FluxConfig


@dataclass
class CheckpointConfig:
    """When a run saves, and how much it keeps."""

    every: int = field(default=1000, metadata={"help": "steps between checkpoints; the last step always saves"})
    keep: int = field(default=2, metadata={"help": "checkpoints kept, the newest; 0 keeps all"})

    def validate(self):
        if self.every < 1 or self.keep < 0:
            raise ValueError(f"checkpoint.every={self.every} must be at least 1 and checkpoint.keep={self.keep} not negative")


# --- reading safetensors --------------------------------------------------------------------------------------------------------


class Tensors:
    """The tensors of one safetensors file, or of a folder's files, mapped and read one by one."""

    def __init__(self, path):
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds no .safetensors file")
        self.files, self.metadata = {}, {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from None
            self.metadata |= handle.metadata() or {}
            self.files |= dict.fromkeys(handle.keys(), handle)

    def keys(self):
        return self.files.keys()

    def __getitem__(self, name):
        return self.files[name].get_tensor(name)


def _load_strictly(model, state, where):
    expected = model.state_dict()
    wrong = [
        f"{k}: {tuple(v.shape)}, not {tuple(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if wrong or missing or unknown:
        raise ValueError(
            f"{where} does not fit the model: {len(missing)} missing, {len(unknown)} unknown, {len(wrong)} of another shape; "
            + ", ".join((missing + unknown + wrong)[:5])
        )
    model.load_state_dict(state, assign=True)
    return model


def is_run(path):
    """Whether `path` is a run folder or one of its checkpoints."""
    return (Path(path) / "checkpoints" / "last").is_dir() or (Path(path) / "meta.json").is_file()


def load_transformer(path, *, ema=True, attention="auto", dtype=None, device="cpu"):
    """A Flux from a diffusers `transformer/` folder (or the pipeline folder that holds it), a fluxlite file, or a run.

    Of a run, the moving average where there is one, unless `ema` is false. Raises `ValueError`, naming `model.checkpoint`, for
    anything else.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"model.checkpoint={path} does not exist")
    if is_run(path):
        config, state = _read_run(path, ema)
    else:
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        tensors = Tensors(folder)
        layout = convert.layout_of(tensors.keys())
        config = _transformer_config(folder, tensors, layout)
        state = dict(convert.to_fluxlite(tensors.keys(), tensors.__getitem__, config, layout))
    with torch.device("meta"):
        model = Flux(config, attention)
    model = _load_strictly(model, state, f"model.checkpoint={path}")
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _transformer_config(folder, tensors, layout):
    if layout == "fluxlite":
        return flux_config(json.loads(tensors.metadata["config"]))
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.checkpoint: {folder} has no config.json beside its weights")
    return convert.config_from_diffusers(json.loads((folder / "config.json").read_text()))


def flux_config(values):
    """A `FluxConfig` from its JSON."""
    return FluxConfig(**(values | {"rope_axes": tuple(values["rope_axes"])}))


def load_autoencoder(path, *, dtype=None, device="cpu"):
    """An Autoencoder from a diffusers `vae/` folder (or the pipeline folder that holds it) or BFL's `ae.safetensors`."""
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"model.autoencoder={path} does not exist")
    folder = path / "vae" if (path / "vae").is_dir() else path
    tensors = Tensors(folder)
    config = AutoencoderConfig()
    if folder.is_dir() and (folder / "config.json").is_file():
        values = json.loads((folder / "config.json").read_text())
        config = AutoencoderConfig(**{k: values[k] for k in asdict(config)})
    if "decoder.up.0.block.0.conv1.weight" in tensors.keys():
        names = convert.autoencoder_keys_from_bfl(tensors.keys())
        state = {ours: tensors[theirs] for ours, theirs in names.items()}
        state = {k: v[:, :, 0, 0] if "attentions" in k and v.ndim == 4 else v for k, v in state.items()}
    else:
        state = {k: tensors[k] for k in tensors.keys()}
    with torch.device("meta"):
        model = Autoencoder(config)
    model = _load_strictly(model, state, f"model.autoencoder={path}")
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


# --- a run's training state -----------------------------------------------------------------------------------------------------


def last_checkpoint(run):
    """The newest whole checkpoint of a run folder, or None."""
    link = Path(run) / "checkpoints" / "last"
    return link.resolve() if link.is_dir() else None


def read_meta(folder):
    """What a checkpoint says it is."""
    return json.loads((Path(folder) / "meta.json").read_text())


def _training_state(model, optimizer, ema):
    state = {"model": dict(model.state_dict()), "optimizer": get_optimizer_state_dict(model, optimizer)}
    return state | ({"ema": ema.average} if ema else {})


def save_training(run, *, step, model, optimizer, ema, meta, keep):
    """Write `checkpoints/step-…` aside, rename it, point `last` at it, and drop all but the newest `keep`; collective."""
    root = Path(run) / "checkpoints"
    name = f"step-{step:06d}"
    aside = root / f".{name}"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dcp.save(_training_state(model, optimizer, ema), checkpoint_id=aside)
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


def load_training(folder, *, model, optimizer, ema):
    """Read a checkpoint into a sharded model, its optimizer and average, in place, whatever mesh wrote it; returns its step."""
    state = _training_state(model, optimizer, ema)
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(strict=True))
    return read_meta(folder)["step"]


def _read_run(path, ema):
    """The configuration and weights of a run or of one of its checkpoints."""
    folder = last_checkpoint(path) or Path(path)
    meta = read_meta(folder)
    config = flux_config(meta["model"])
    with torch.device("meta"):
        shapes = Flux(config).state_dict()
    state = {name: torch.empty(tensor.shape) for name, tensor in shapes.items()}
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose: one process reads
    dcp.load({"model": state}, checkpoint_id=folder, no_dist=True)
    if ema and meta["ema"]:
        average = {name: state[name] for name in meta["ema"]}
        dcp.load({"ema": average}, checkpoint_id=folder, no_dist=True)
    return config, state
