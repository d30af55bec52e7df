"""Convert what fluxlite 0.1 wrote, which later versions refuse: its files, and the weights of its
runs.

    python scripts/convert_first_edition.py --src old.safetensors --dst new.safetensors
    python scripts/convert_first_edition.py --src runs/old --dst new.safetensors  # its average
    python scripts/convert_first_edition.py --src runs/old --dst flux1.safetensors --to bfl --no-ema

That edition kept queries, keys and values head by head, rotation pairs as halves of a head, and all
modulation in one linear. A tensor at a time is in memory. The optimizer's state is left behind:
train on with model.checkpoint=new.safetensors. This script goes with the next version.
"""

import json
import re
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path

from fluxlite.cli.programs import run_program, stop_at_once

if __name__ == "__main__":
    stop_at_once()

import torch
from einops import rearrange

from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.descriptions import parse_json
from fluxlite.cli.options import option, typed_description
from fluxlite.nets import schedule
from fluxlite.nets.configs import ControlNetConfig, FluxConfig
from fluxlite.weights import (
    conversion,
    layouts,
    run_folder,
    run_tensors,
    sources,
    tensor_files,
    writing,
)


def interleave_pairs(x, config):
    """Rows of heads with pairs (i, i + D/2) as rows with pairs (2i, 2i + 1)."""
    return rearrange(x, "(n two d) ... -> (n d two) ...", d=config.head_width // 2, two=2)


def first_chunks(part, i, config):
    """The first and last of the H rows, in the one modulation, of a linear of ours: `img.0`,
    `out`.
    """
    doubles, singles = config.num_double_blocks, config.num_single_blocks
    starts = {"img": 12 * i, "txt": 12 * i + 6, "single": 12 * doubles + 3 * i}
    start = starts.get(part, 12 * doubles + 3 * singles)
    return start, start + {"img": 6, "txt": 6, "single": 3, "out": 2}[part]


def read_tensor(read_old, config, name, start=0, stop=None, exact=False):
    """Rows of one of our tensors, from those of the first edition, which has none quantised."""
    if match := re.fullmatch(r"(.*\.qkv)\.([qkv])\.(weight|bias)", name):
        block, kind, leaf = match.groups()
        split = rearrange(
            read_old(f"{block}.linear.{leaf}"),
            "(n three d) ... -> three (n d) ...", three=3, d=config.head_width,
        )["qkv".index(kind)]  # fmt: skip
        return (split if kind == "v" else interleave_pairs(split, config))[start:stop]
    if re.search(r"\.qkv\.[qk]_norm\.", name):
        return interleave_pairs(read_old(name), config)[start:stop]
    if match := re.fullmatch(r"modulation\.(\w+)(?:\.(\d+))?\.(weight|bias)", name):
        part, i, leaf = match.groups()
        edges = [chunk * config.hidden_size for chunk in first_chunks(part, int(i or 0), config)]
        rows = read_old(f"modulation.{leaf}", *edges)
        rows = torch.cat(rows.chunk(2)[::-1]) if part == "out" else rows  # scale comes first now
        return rows[start:stop]
    return read_old(name, start, stop)


def old_name(name):
    """The tensor of the first edition that holds one of ours."""
    name = re.sub(r"\.qkv\.[qkv]\.", ".qkv.linear.", name)
    return re.sub(r"^modulation\..*\.", "modulation.", name)


def open_file(path):
    """(what, configuration, read, {name: dtype}, metadata, files, sampling settings) of a file or
    folder.
    """
    tensors = tensor_files.Tensors(path)
    about, types = (
        tensors.metadata,
        {name: dtype for name, (dtype, _) in tensors.described().items()},
    )
    if not about.get("fluxlite_version", "").startswith("0.1.") or "modulation.weight" not in types:
        raise ValueError(f"--src {path} is no file of fluxlite 0.1: convert_hf.py reads all others")
    saved = parse_json(about.get("sampling", "{}"), path) | {"version": about["fluxlite_version"]}
    settings = schedule.read_settings(path, saved)
    if "training" in about:
        about |= {"training": json.dumps(with_factor(parse_json(about["training"], path)))}
    return (
        about["what"],
        parse_json(about["config"], path),
        tensors.read,
        types,
        about,
        tensors.files,
        settings,
    )


def with_factor(flow):
    """Settings of training, a numeric shift in them as today's factor, e to what it was."""
    if flow.get("shift", "none") in ("resolution", "none"):
        return flow
    return flow | {"shift": schedule.shift_as_factor(flow["shift"], "0.1.0")}


def open_run(path, ema):
    """The same of a run's last checkpoint, or one of its checkpoints."""
    folder = path if (path / "meta.json").is_file() else run_folder.last_checkpoint(path)
    meta, tensors = run_folder.read_meta(folder), run_tensors.RunTensors(folder)
    if not meta.version.startswith("0.1."):
        raise ValueError(f"--src {path} is no run of fluxlite 0.1: convert_hf.py reads all others")
    averaged = set(meta.ema if ema else ())

    def key(name):
        return f"{'ema' if name in averaged else 'model'}.{name}"

    def read(name, start=0, stop=None):
        return tensors.read(key(name), start, stop)

    names = [name.removeprefix("model.") for name in tensors.tensors if name.startswith("model.")]
    types = {name: tensors.described(key(name))[0] for name in names}
    training = with_factor(meta.flow) | {"step": meta.step, "ema": bool(averaged)}
    about = {"training": json.dumps(training)}
    files = sorted(p for p in folder.iterdir() if p.is_file())
    settings = run_folder.run_settings(folder, meta)
    return meta.what, meta.model, read, types, about, files, settings


def open_first_edition(path, *, ema=True):
    """The `Source`, in today's layout, of a file, folder or run of fluxlite 0.1; raises
    `ValueError`.
    """
    opened = open_run(path, ema) if run_folder.is_run(path) else open_file(path)
    what, values, read_old, types, about, files, settings = opened
    kind = ControlNetConfig if what == "controlnet" else FluxConfig
    config = typed_description(path, kind, values)
    shapes = {name: tuple(t.shape) for name, t in conversion.our_tensors(config).items()}
    described = {name: (types[old_name(name)], shape) for name, shape in shapes.items()}
    read = partial(read_tensor, read_old, config)
    return sources.Source(
        str(path), what, "fluxlite", config, described, read, about, files, settings, ema
    )


@dataclass
class FirstEditionConfig:
    """What this script takes."""

    src: str = option(MISSING, "file, folder or run of fluxlite 0.1", path=True)
    dst: str = option(MISSING, "what to write, as convert_hf.py takes it", path=True)
    to: str = option("fluxlite", "layout to write", choices=tuple(layouts.LAYOUTS))
    no_ema: bool = option(False, "of a run, its weights, not their average")


def main(argv):
    args = parse_flags(FirstEditionConfig, argv)
    source = open_first_edition(Path(args.src), ema=not args.no_ema)
    files, _ = writing.write_converted(source, args.dst, to=args.to)
    print("\n".join(f"{file}  {tensor_files.format_bytes(file.stat().st_size)}" for file in files))


if __name__ == "__main__":
    run_program(main, usage=partial(flags_help, FirstEditionConfig, __doc__), ranks=False)
