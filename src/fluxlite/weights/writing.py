"""A checkpoint written in any layout, a few linears at a time, whole or not at all."""

import itertools
import json
import logging
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from fluxlite import __version__
from fluxlite.cli.atomic import locked, naming_setting
from fluxlite.cli.options import expand_home
from fluxlite.weights import conversion, layouts, tensor_files
from fluxlite.weights.diffusers_configs import config_to_diffusers
from fluxlite.weights.run_folder import is_run
from fluxlite.weights.sources import SCHEDULER_FILE, open_part, open_source

log = logging.getLogger("fluxlite")

DIFFUSERS_STEM = "diffusion_pytorch_model"
FILE_STEMS = {  # (part, layout): a file in a folder, without .safetensors
    ("transformer", "fluxlite"): "fluxlite_transformer",
    ("transformer", "bfl"): "flux1",
    ("transformer", "nemo"): "nemo_flux_transformer",
    ("controlnet", "fluxlite"): "fluxlite_controlnet",
    ("controlnet", "bfl"): "flux_controlnet",
    ("controlnet", "nemo"): "nemo_flux_controlnet_transformer",
    ("autoencoder", "fluxlite"): "fluxlite_autoencoder",
    ("autoencoder", "bfl"): "ae",
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
    bar=None,
):
    """Write `source` to `dst` in the layout `to`: (the files, the digest of the source).

    `dst` is a file where it ends in .safetensors, else a folder; diffusers is always a folder.
    Nothing appears under that name before it is whole. `bar` is the text of a progress bar, shown
    once all is checked. Raises `ValueError`, whose text begins with `setting` where `dst` will not
    do.
    """
    dst = Path(expand_home(str(dst), setting.rstrip(" =")))
    to_folder = dst.suffix != ".safetensors"
    check_destination(source, dst, to, to_folder, setting)
    described = described_in(source, to, dtype)
    limit = max_shard_bytes or (DIFFUSERS_SHARD_BYTES if to == "diffusers" else None)
    shards = tensor_files.split_shards(described, limit)
    if len(shards) > 1 and not to_folder:
        raise ValueError(
            f"{setting}{dst}: {len(shards)} shards need a folder; name one, or raise "
            "--max-shard-size"
        )
    tensor_files.check_room(dst, tensor_files.num_bytes(described))
    names = tensor_files.shard_names(FILE_STEMS.get((source.what, to), DIFFUSERS_STEM), len(shards))
    options = dict(overwrite=overwrite, folder=to_folder, remedy=remedy)
    shown = dict(desc=bar, total=source.num_bytes(), unit="B", unit_scale=True, disable=not bar)
    with tensor_files.atomic_weights(dst, **options) as path, tqdm(**shown) as progress:
        files = [path / name for name in names] if to_folder else [path]
        total = _write_shards(source, to, shards, files, progress.update)
        if to_folder:
            _write_beside(path, source, to, names, shards)
    return [dst / name for name in names] if to_folder else [dst], total


def described_in(source, layout, dtype=None):
    """{name: (dtype, shape)} of a source in a layout, in a type of its own or all in `dtype`."""
    theirs = {name: of for name, (of, _) in source.described.items()}
    types = conversion.layout_dtypes(source.layout, layout, source.config, theirs)
    shapes = conversion.layout_shapes(layout, source.config)
    return {name: (dtype or types[name], shape) for name, shape in shapes.items()}


def check_destination(source, dst, to, to_folder, setting="--dst "):
    """Raise `ValueError` where `to` cannot be written to `dst`, or that would touch the source."""
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
    whole = [origin, *(file.resolve() for file in source.files)]
    if any(file.is_relative_to(place) for file in whole):
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
    """Whether whole safetensors files at `place` are none of this kind: a text encoder's, say."""
    try:
        keys = tensor_files.Tensors(place).keys()
    except (ValueError, OSError):
        return False
    try:
        return layouts.recognise_layout(keys)[0] != what
    except ValueError:
        return True


def _write_shards(source, to, shards, files, progress):
    """Write the shards of a checkpoint, each tensor digested as it is read; returns the digest."""
    digests = tensor_files.Digests()

    def read(name):
        digests.add(name, source)
        tensor = source.read(name)
        tensor_files.check_values(f"{source.where}: {name}", tensor)
        return tensor

    pieces = conversion.convert_weights(read, source.layout, to, source.config)
    try:
        rewrites = []
        for shard, file in zip(shards, files, strict=True):
            of_shard = itertools.islice(pieces, len(shard))
            rewrites.append(
                tensor_files.write_tensors(file, shard, of_shard, _metadata(source, to), progress)
            )
        source.check_whole()
        # what no layout but the source's keeps: NeMo's second bias
        for name in source.described.keys() - digests.found.keys():
            digests.add(name, source)
        total = digests.total()
    finally:
        digests.close()
    for rewrite in rewrites:
        rewrite({"source_digest": total})
    return total


def _metadata(source, to):
    kept = {k: v for k, v in source.metadata.items() if k in ("training", "loras")}
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
        index = f"{names[0].rsplit('-00001-of-', 1)[0]}.safetensors.index.json"
        tensor_files.write_index(folder / index, shards, names)
    if to != "diffusers":
        return
    described = {"config.json": config_to_diffusers(source.config)}
    if getattr(source.config, "scheduler", None):
        described[SCHEDULER_FILE] = asdict(source.config.scheduler)
    for name, values in described.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


def _write_once(source, file, setting):
    """Write a `Source` to a file in our layout; of processes that share a disk one does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.with_name(f".{file.name}.lock")):
        if not file.exists():
            write_converted(source, file, setting=setting, bar=f"writing {file}")


def open_converted(where, save_converted, *, part="transformer", **options):
    """The `Source` of `model.checkpoint`, or `model.save_converted`, written where it is not there.

    With part="controlnet", of `controlnet.checkpoint` and `controlnet.save_converted`; `options`
    are those of `open_source`. Ranks that share a disk may call this together: one writes, the
    others wait. Raises `ValueError` where the file was made from something else.
    """
    key = layouts.PART_KEYS[part]
    setting = key.replace("checkpoint", "save_converted")
    source = open_part(where, part, **options)
    if not save_converted:
        return source
    if source.layout == "fluxlite" and not is_run(Path(where).expanduser()):
        log.info("%s: %s is in our own layout already, and is used as it is", setting, where)
        return source
    file = Path(expand_home(str(save_converted), setting))
    if file.suffix != ".safetensors":
        raise ValueError(f"{setting}={save_converted} must end in .safetensors")
    if not file.exists():
        with naming_setting(f"{setting}={save_converted}", "name another file"):
            _write_once(source, file, f"{setting}=")
    kept = open_source(file, setting=setting)
    if kept.metadata.get("source_files") != source.fingerprint():
        raise ValueError(
            f"{setting}={file} was not made from {key}={where}: remove it, or name another"
        )
    return kept
