"""Convert FLUX.1 checkpoints between layouts, at constant memory: diffusers, BFL (ComfyUI), NeMo
and fluxlite.

  python convert_hf.py --src FLUX.1-dev --dst flux1-dev-fluxlite.safetensors  # to our own
  python convert_hf.py --src flux1-dev.safetensors --dst FLUX.1-dev/transformer --to diffusers
  python convert_hf.py --src runs/finetune --dst finetuned.safetensors --to bfl # a run → ComfyUI
  python convert_hf.py --src nemo_flux_transformer.safetensors --dst flux.safetensors --verify
  python convert_hf.py --src FLUX.1-dev/vae --dst ae.safetensors --to bfl  # the autoencoder
  python convert_hf.py --src FLUX.1-dev-Controlnet-Canny --dst canny.safetensors  # a ControlNet
  python convert_hf.py --src FLUX.1-dev --digests  # SHA-256 of every tensor

The source's layout is recognised by its keys. Every key and shape is checked before a byte is
written; the result appears under its name only when it is whole. Errors are one line, with exit
code 2.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.options import option
from fluxlite.cli.programs import run_program, stopping_at_once

LAYOUTS = ("fluxlite", "diffusers", "bfl", "nemo")
REMEDY = "pass --overwrite, or name another"
WRITTEN_DTYPES = ("bfloat16", "float16", "float32")


def size_of(text):
    """`10GB`, `500MB` or a number of bytes as an int."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"--max-shard-size {text}: write a size such as 10GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


@dataclass
class ConvertConfig:
    """What `convert_hf.py` takes."""

    src: str = option(dataclasses.MISSING, "folder, file, run, or hub repository", path=True)
    dst: str | None = option(
        None,
        "file that ends in .safetensors, or folder; for --to diffusers a folder",
        path=True,
    )
    to: str | None = option(
        None, "layout to write, else fluxlite; of a ControlNet bfl is x-flux's", choices=LAYOUTS
    )
    dtype: str | None = option(None, "type to write, else the source's", choices=WRITTEN_DTYPES)
    max_shard_size: int | None = option(
        None, "of a file in a folder, as 10GB; diffusers' is 10GB", at_least=1, parse=size_of
    )
    no_ema: bool = option(False, "of a run, take the weights themselves, not their moving average")
    overwrite: bool = option(False, "replace DST if it exists")
    verify: bool = option(
        False, "read DST back: every byte, and one forward beside diffusers' model"
    )
    digests: bool = option(False, "print the SHA-256 of every tensor of SRC, and write nothing")

    def validate(self):
        """Raise `ValueError` for flags that contradict each other."""
        writing = ("dst", "to", "dtype", "max_shard_size", "overwrite", "verify")
        given = [name.replace("_", "-") for name in writing if getattr(self, name)]
        if self.digests and given:
            raise ValueError(f"--digests writes nothing: leave out --{given[0]}")
        if not self.digests and not self.dst:
            raise ValueError("--dst is missing: name a file or a folder")


def bar(total, text):
    return tqdm(total=total, unit="B", unit_scale=True, desc=text, mininterval=0.5)


def convert(args):
    with stopping_at_once():
        import torch

        from fluxlite.weights import sources, verify, writing
        from fluxlite.weights.tensor_files import format_bytes

    source = sources.open_source(args.src, setting="--src", ema=not args.no_ema)
    if args.no_ema and not sources.is_run(Path(args.src)):
        raise ValueError(f"--no-ema is for runs, and --src {args.src} is none: leave it out")
    if args.digests:
        with bar(source.num_bytes(), "reading") as progress:
            each, total = verify.digests_of(source, progress.update)
        print("\n".join(f"{digest}  {name}" for name, digest in each.items()))
        print(f"{total}  all {len(each)} tensors")
        return
    to = args.to or "fluxlite"
    size = format_bytes(source.num_bytes())
    print(f"{args.src}: {source.what}, {source.layout} layout, {size}")
    files, digest = writing.write_converted(
        source,
        args.dst,
        to=to,
        dtype=args.dtype and getattr(torch, args.dtype),
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
        remedy=REMEDY,
        bar=f"writing {to} to {args.dst}",
    )
    print("\n".join(f"{file}  {format_bytes(file.stat().st_size)}" for file in files))
    print(f"source digest {digest}")
    if args.verify:
        with bar(source.num_bytes(), "verifying") as progress:
            lines = verify.verify_conversion(source, args.dst, progress.update)
        print("\n".join(lines))


def body(arguments):
    config = parse_flags(ConvertConfig, arguments)
    config.validate()
    convert(config)


if __name__ == "__main__":
    run_program(body, usage=partial(flags_help, ConvertConfig, __doc__), ranks=False)
