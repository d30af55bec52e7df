"""Convert FLUX.1 checkpoints between layouts, at constant memory: diffusers, BFL (ComfyUI), NeMo
and fluxlite.

  python convert_hf.py --src FLUX.1-dev --dst flux1-dev-fluxlite.safetensors  # to our own
  python convert_hf.py --src flux1-dev.safetensors --dst FLUX.1-dev/transformer --to diffusers
  python convert_hf.py --src runs/finetune --dst finetuned.safetensors --to bfl # a run → ComfyUI
  python convert_hf.py --src nemo_flux_transformer.safetensors --dst flux.safetensors --verify
  python convert_hf.py --src FLUX.1-dev/vae --dst ae.safetensors --to bfl  # the autoencoder
  python convert_hf.py --src flux1-dev-Q4_K_S.gguf --dst transformer --to diffusers  # dequantised
  python convert_hf.py --src all-in-one.safetensors --part vae --dst ae.safetensors --to bfl
  python convert_hf.py --src FLUX.1-dev-Controlnet-Canny --dst canny.safetensors  # a ControlNet
  python convert_hf.py --src FLUX.1-dev --digests  # SHA-256 of every tensor

LoRAs are baked into a model, written in another dialect, or made of two models:

  python convert_hf.py --src FLUX.1-dev --lora style.safetensors:0.8 --dst styled --to diffusers
  python convert_hf.py --src style.safetensors --dst style-kohya.safetensors --to kohya
  python convert_hf.py --src tuned.safetensors --extract FLUX.1-dev --rank 64 --dst lora.safetensors

The source's layout is recognised by its keys. Every key and shape is checked before a byte is
written; the result appears under its name only when it is whole. Errors are one line, with exit
code 2.
"""

import dataclasses
import logging
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.options import option
from fluxlite.cli.programs import run_program, stopping_at_once

LAYOUTS = ("fluxlite", "diffusers", "bfl", "nemo")
LORA_DIALECTS = ("peft", "kohya", "comfy")
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
    part: str | None = option(
        None,
        "what is taken of a pipeline's folder or an all-in-one file, else its transformer",
        choices=("transformer", "controlnet", "vae"),
    )
    to: str | None = option(
        None,
        "layout to write, else fluxlite; of a ControlNet bfl is x-flux's; of a LoRA peft, which "
        "diffusers reads, kohya or comfy",
        choices=LAYOUTS + LORA_DIALECTS,
    )
    lora: list[str] = option(
        [], "FILE or FILE:SCALE, merged into SRC; several add up: give it once for each"
    )
    split_qkv: str | None = option(
        None,
        "of a LoRA that kohya trained with split_qkv: readers' strength, the default, or that of "
        "its training",
        choices=("readers", "training"),
    )
    extract: str | None = option(
        None, "a base: write what SRC changed of it as a LoRA of --rank", path=True
    )
    rank: int | None = option(None, "of --extract", at_least=1, at_most=10_000)
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
        writing = ("dst", "to", "dtype", "max_shard_size", "overwrite", "verify", "lora", "extract")
        given = [name.replace("_", "-") for name in writing if getattr(self, name)]
        if self.digests and given:
            raise ValueError(f"--digests writes nothing: leave out --{given[0]}")
        if not self.digests and not self.dst:
            raise ValueError("--dst is missing: name a file or a folder")
        if self.extract and (not self.rank or self.lora):
            other = "leave out --lora" if self.rank else "name its --rank"
            raise ValueError(f"--extract {self.extract} makes a LoRA of two models: {other}")
        if self.rank and not self.extract:
            raise ValueError(
                "--rank is that of a LoRA to --extract BASE: name that, or leave it out"
            )
        if self.extract and self.to in LAYOUTS:
            named = ", ".join(LORA_DIALECTS)
            raise ValueError(f"--to {self.to}: a LoRA is written as one of {named}")


def bar(total, text):
    return tqdm(total=total, unit="B", unit_scale=True, desc=text, mininterval=0.5)


def parse_lora(text):
    """A `Lora` of FILE or FILE:SCALE."""
    from fluxlite.weights.lora_files import Lora

    match = re.fullmatch(r"(.+):([-+.\deE]+)", text)
    if not match or Path(text).exists():
        return Lora(text)
    try:
        return Lora(match[1], float(match[2]))
    except ValueError:
        raise ValueError(
            f"--lora {text}: write FILE or FILE:SCALE, as in a.safetensors:0.8"
        ) from None


def check_lora_output(args, others):
    """Raise `ValueError` unless a LoRA can be written as the flags say; `others` say nothing."""
    if Path(args.dst).suffix != ".safetensors":
        raise ValueError(f"--dst {args.dst}: a LoRA is one file; end it in .safetensors")
    for name in others:
        if getattr(args, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for models, and a LoRA is written: leave it out")


def save_options(args):
    return dict(overwrite=args.overwrite, remedy=REMEDY)


def exchange(args):
    """Write a LoRA in another dialect."""
    from fluxlite.weights import lora_files, lora_writing

    if args.digests:
        raise ValueError(f"--digests is for models, and --src {args.src} is a LoRA: name another")
    if args.to not in LORA_DIALECTS:
        raise ValueError(
            f"--src {args.src} is a LoRA: choose --to {', '.join(LORA_DIALECTS)}, or name the "
            "model as --src and this as --lora"
        )
    check_lora_output(args, ("lora", "dtype", "max_shard_size", "no_ema", "verify", "part"))
    split = args.split_qkv or "readers"
    found = lora_files.read_lora(args.src, setting="--src ", split_qkv=split)
    lora_writing.exchange_lora(found, args.dst, args.to, **save_options(args))
    print(args.dst)


def extract(args):
    """Write a LoRA of what one model changed of another."""
    import torch

    from fluxlite.weights import lora_extract, lora_writing, sources

    check_lora_output(args, ("max_shard_size", "verify", "part"))
    base = sources.open_part(args.extract, "transformer", setting="--extract")
    tuned = sources.open_part(args.src, "transformer", setting="--src", ema=not args.no_ema)
    to = args.to or "peft"
    dtype = getattr(torch, args.dtype or "float32")
    with bar(base.num_bytes(), "extracting") as progress:
        made = lora_extract.extract_lora(base, tuned, args.rank, to, dtype, progress.update)
    lora_writing.write_lora(
        {"transformer": made.adapters}, args.dst, to, base.config, **save_options(args)
    )
    print(f"{args.dst}: rank {args.rank}, {made.describe()}")


def open_asked(args):
    """The `Source` of --src; raises `ValueError` where it is not the --part that is asked for."""
    from fluxlite.weights import sources

    how = dict(ema=not args.no_ema, part=args.part or "transformer")
    source = sources.open_source(args.src, setting="--src", **how)
    if args.part and args.part != sources.PART_FOLDERS[source.what]:
        raise ValueError(
            f"--part {args.part}: --src {args.src} is one {source.what}, and no pipeline nor "
            "all-in-one file: leave --part out, or name another --src"
        )
    return source


def with_loras(source, args, dtype):
    """A `Source` with the LoRAs of --lora in it; itself without any."""
    from fluxlite.weights import lora_merging

    loras = [parse_lora(text) for text in args.lora]
    if args.split_qkv and not loras:
        raise ValueError("--split-qkv is for LoRAs, and there is none: leave it out")
    for lora in loras:
        lora.split_qkv = args.split_qkv or lora.split_qkv
    return lora_merging.bake_source(source, loras, dtype) if loras else source


def print_digests(source):
    """Print the digest of every tensor of a `Source`, and of all."""
    from fluxlite.weights import verify

    with bar(source.num_bytes(), "reading") as progress:
        each, total = verify.digests_of(source, progress.update)
    print("\n".join(f"{digest}  {name}" for name, digest in each.items()))
    print(f"{total}  all {len(each)} tensors")


def convert(args):
    with stopping_at_once():
        import torch

        from fluxlite.weights import lora_files, sources, verify, writing
        from fluxlite.weights.tensor_files import format_bytes

    if args.extract:
        return extract(args)
    if args.to in LORA_DIALECTS or lora_files.is_lora(args.src):
        return exchange(args)
    source = open_asked(args)
    dtype = args.dtype and getattr(torch, args.dtype)
    source = with_loras(source, args, dtype)
    if args.no_ema and not sources.is_run(Path(args.src)):
        raise ValueError(f"--no-ema is for runs, and --src {args.src} is none: leave it out")
    if args.digests:
        return print_digests(source)
    to = args.to or "fluxlite"
    size = format_bytes(source.num_bytes())
    print(f"{args.src}: {source.what}, {source.layout} layout, {size}")
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # other threads digest and write
    files, digest = writing.write_converted(
        source,
        args.dst,
        to=to,
        dtype=dtype,
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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    convert(config)


if __name__ == "__main__":
    run_program(body, usage=partial(flags_help, ConvertConfig, __doc__), ranks=False)
