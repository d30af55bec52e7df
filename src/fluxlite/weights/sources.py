"""What a path holds: transformers, ControlNets and autoencoders in files of any layout, and runs.

`open_source` describes and checks a checkpoint, and reads no tensor; `load_transformer` and its
like make a network of it. `writing` writes one.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fluxlite.cli.descriptions import parse_json, read_json
from fluxlite.cli.devices import check_device
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import check_bounds, check_kind, shortened, typed_description
from fluxlite.nets import schedule
from fluxlite.nets.configs import NET_CONFIGS, AutoencoderConfig, ControlNetConfig, FluxConfig
from fluxlite.nets.quantized import quantize_linear, quantized_linears
from fluxlite.nets.schedule import read_scheduler
from fluxlite.weights import (
    conversion,
    gguf_files,
    hub,
    layouts,
    net_configs,
    part_files,
    run_folder,
    tensor_files,
)
from fluxlite.weights.run_folder import is_run, last_checkpoint

COMPUTE_DTYPES = "float32", "bfloat16"
SCHEDULER_FILE = "scheduler_config.json"


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
    # (name, start=0, stop=None, exact=False) → a tensor, or its rows from start to stop; with
    # `exact`, which may name what it is quantised to, not rounded to its type
    read: Callable
    metadata: dict
    files: list
    # for sampling, where the checkpoint has some of its own: {field of SampleConfig: value}
    settings: dict
    averaged: bool = False  # whether it is the moving average of a run
    # of a GGUF file: how many tensors are of which types, and dequantised when they are read
    quantised: str = ""
    # raises `ValueError` where a run's files are not as they were written
    check_whole: Callable = lambda: None
    base: object = None  # the `Source` that this one is with LoRAs in it: digests are the base's

    def num_bytes(self):
        return tensor_files.num_bytes(self.described)

    def fingerprint(self):
        """A digest of the files' names, sizes and times of change; none of them is read."""
        lines = [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in self.files]
        return hashlib.sha256("\n".join([*lines, f"averaged {self.averaged}"]).encode()).hexdigest()


def open_source(where, *, setting="model.checkpoint", ema=True, part="transformer", given=None):
    """The `Source` that a path or hub repository holds, recognised by its keys and files.

    A pipeline's folder or an all-in-one file stands for its `part` (transformer, controlnet or
    vae); of a run, `ema` chooses the moving average where it has one. `given` are {field: value} of
    the rotations, for weights without a configuration. Raises `ValueError`, naming `setting`, for
    what is not exactly a transformer, a ControlNet or an autoencoder.
    """
    loose = ["*.safetensors"] if part == "controlnet" else []  # as XLabs publishes
    files = [f"{part}/*", "config.json", "diffusion_pytorch_model*", f"scheduler/{SCHEDULER_FILE}"]
    path = hub.local_path(where, [*files, *loose], setting=setting)
    if not os.access(path, os.R_OK):
        raise ValueError(f"{setting}={where} cannot be read: no permission")
    path = path / part if (path / part).is_dir() else path
    try:
        source = _open_run(path, ema) if is_run(path) else _open_tensors(path, part, given)
        shapes = {name: shape for name, (_, shape) in source.described.items()}
        conversion.check_layout(source.layout, source.config, shapes)
    except ValueError as error:
        raise ValueError(f"{setting}={where}: {error}") from None
    return source


def _open_tensors(path, part, given=None):
    tensors = part_files.own_weights(tensor_files.Tensors(path), part)
    what, layout, prefix = layouts.recognise_layout(tensors.keys())
    described = tensors.without(prefix).described()
    shapes = {name: shape for name, (_, shape) in described.items()}
    # others' metadata may use the same words
    about = tensors.metadata if "fluxlite_version" in tensors.metadata else {}
    beside = (path if path.is_dir() else path.parent) / "config.json"
    told = dict(saved=about.get("config"), where=path, beside=beside, given=given)
    config, settings = net_configs.read_net_config(what, layout, shapes, **told), {}
    if what == "transformer":
        settings = sampling_settings(path, about)
        config.scheduler = scheduler_of(path, about)
    found = str(path), what, layout, config, described, tensors.read, about, tensors.files
    return Source(*found, settings, quantised=tensors.metadata.get(gguf_files.TYPES, ""))


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
    files = [place / SCHEDULER_FILE for place in places]
    found = next((file for file in files if file.exists()), None)
    return read_scheduler(found, read_json(found)) if found else None


def _open_run(path, ema):
    """A run's last checkpoint, or one of its checkpoints: the moving average in place of the
    weights that have one.

    A tensor's checksum is checked when it is read; a small checkpoint's files at once, a large
    one's by `check_whole`.
    """
    folder = last_checkpoint(path)
    meta, tensors = run_folder.open_checkpoint(folder)
    if meta.what == "lora":
        base = run_folder.saved_parts(folder, meta).checkpoint
        raise ValueError(
            f"it is the run of a LoRA: name that as lora= (in training lora.checkpoint=), and as "
            f"this its base{f', {base}' if base else ''}"
        )
    averaged = set(meta.ema if ema else ())
    config = _run_config(folder, meta, tensors)

    def key(name):
        return f"{'ema' if name in averaged else 'model'}.{name}"

    def read(name, start=0, stop=None, exact=False):
        return tensors.read(key(name), start, stop)

    check_whole = partial(run_folder.check_files, folder, meta)
    if run_folder.total_bytes(meta) <= run_folder.SOON_CHECKED:
        check_whole()
    described = {name: tensors.described(key(name)) for name in conversion.our_tensors(config)}
    metadata = {"training": json.dumps(meta.flow | {"step": meta.step, "ema": bool(averaged)})}
    files = sorted(p for p in folder.iterdir() if p.is_file())
    settings = run_folder.run_settings(folder, meta)
    config.scheduler = scheduler_beside(run_folder.saved_parts(folder, meta).checkpoint, config)
    found = str(path), meta.what, "fluxlite", config, described, read, metadata, files, settings
    return Source(*found, bool(averaged), check_whole=check_whole)


def _run_config(folder, meta, tensors):
    """The configuration of a run's model; raises `ValueError` for one that its tensors cannot
    have.
    """
    file = folder / "meta.json"
    config = typed_description(file, NET_CONFIGS[meta.what], meta.model)
    widest = max((max(tensor.shape, default=0) for tensor in tensors.tensors.values()), default=0)
    for f in fields(config):  # 10⁹ blocks would be built before they are missed
        value = getattr(config, f.name)
        limit = len(tensors.tensors) if f.name.endswith("_blocks") else widest
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
    if not checkpoint or not Path(hub.resolve_tiny(checkpoint)).expanduser().exists():
        return None
    try:
        return open_source(checkpoint, given=asdict(config)).config.scheduler
    except ValueError as error:
        warn_for_all("the scheduler of a run's base is not known (%s): FLUX.1's is assumed", error)
        return None


# --- loading --------------------------------------------------------------------------------------


def load_state(source):
    """A state dict in our layout: views of the mapped files, and copies of what they hold
    otherwise.
    """
    return dict(weights_of(source))


def weights_of(source, quantize="none"):
    """A source's tensors in our layout, a few linears at a time: (name, values); where they are to
    be quantised, those that the file has quantised are float32.
    """
    exact = quantize != "none" and quantize
    read, told = partial(source.read, exact=exact), (source.where, source.quantised)
    with gguf_files.timed_reading(*told, source.num_bytes()):
        yield from conversion.convert_weights(read, source.layout, "fluxlite", source.config)


def named_dtype(dtype):
    """A torch type from itself or its name, None for None; raises `ValueError`."""
    if isinstance(dtype, str):
        check_bounds(dtype, {"choices": COMPUTE_DTYPES}, "dtype")
        return getattr(torch, dtype)
    check_kind(dtype, (torch.dtype, type(None)), "dtype", " or ".join(COMPUTE_DTYPES))
    return dtype


def _load(source, dtype, device, *options, quantize="none", fill=None):
    """The network of a `Source`, frozen, in evaluation mode; raises `ValueError`.

    `fill(model, weights, dtype=, device=, quantize=)` may give a model on meta its weights.
    """
    check_device(str(device))
    dtype = named_dtype(dtype)
    model = conversion.build_on_meta(source.config, *options)
    if fill:
        weights = weights_of(source, quantize)
        fill(model, weights, dtype=dtype, device=device, quantize=quantize)
        return model.eval().requires_grad_(False)
    if quantize != "none":
        load_quantized(model, weights_of(source, quantize), quantize, dtype, device)
        return model.eval().requires_grad_(False)
    model.load_state_dict(load_state(source), strict=True, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_quantized(model, weights, kind, dtype, device):
    """Give a model on meta its (name, values) on a device, quantised one by one as they come."""
    linears = quantized_linears(model)
    for name, values in weights:
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        if leaf == "weight" and place in linears:
            quantize_linear(module, kind, values.to(device), dtype or values.dtype)
        else:
            module.register_parameter(leaf, nn.Parameter(values.to(device=device, dtype=dtype)))


PART_FOLDERS = {"transformer": "transformer", "controlnet": "controlnet", "autoencoder": "vae"}


def open_part(where, part, *, setting=None, **options):
    """The `Source` of a part from what `open_source` takes, or from a `Source`.

    Raises `ValueError`, naming `setting` or the part's key, where it is something else.
    """
    key = setting or layouts.PART_KEYS[part]
    if not isinstance(where, Source):
        where = open_source(where, setting=key, part=PART_FOLDERS[part], **options)
    if where.what != part:
        raise ValueError(
            f"{key}={where.where} holds the wrong part, {where.what}: name {layouts.ARTICLED[part]}"
        )
    return where


def load_transformer(
    where, *, ema=True, attention="auto", dtype=None, device="cpu", quantize="none", fill=None
):
    """A Flux from what `open_source` takes, or from a `Source`.

    `dtype` is a torch type or its name; None for the checkpoint's own. `quantize` is int8, float8
    or nf4: how its linears lie in memory; `fill` as in `_load`. Raises `ValueError`.
    """
    source = open_part(where, "transformer", ema=ema)
    return _load(source, dtype, device, attention, quantize=quantize, fill=fill)


def load_controlnet(
    where, *, attention="auto", dtype=None, device="cpu", quantize="none", fill=None
):
    """A ControlNet, as `load_transformer` loads a Flux; raises `ValueError`."""
    source = open_part(where, "controlnet")
    return _load(source, dtype, device, attention, quantize=quantize, fill=fill)


def load_autoencoder(where, *, dtype=None, device="cpu"):
    """An Autoencoder from a diffusers `vae/` folder, the pipeline's around it, or `ae.safetensors`;
    raises `ValueError`.
    """
    return _load(open_part(where, "autoencoder"), dtype, device)
