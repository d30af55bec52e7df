"""Convert FLUX.1 checkpoints between layouts, at constant memory: diffusers, BFL (ComfyUI), NeMo and fluxlite.

  python convert_hf.py --src FLUX.1-dev --dst flux1-dev-fluxlite.safetensors                  # diffusers folder → fluxlite
  python convert_hf.py --src flux1-dev.safetensors --dst FLUX.1-dev/transformer --to diffusers
  python convert_hf.py --src runs/finetune --dst finetuned.safetensors --to bfl --dtype bfloat16   # a run → ComfyUI
  python convert_hf.py --src nemo_flux_transformer.safetensors --dst flux.safetensors --verify
  python convert_hf.py --src FLUX.1-dev/vae --dst ae.safetensors --to bfl                     # the autoencoder
  python convert_hf.py --src FLUX.1-dev-Controlnet-Canny --dst canny.safetensors              # a ControlNet
  python convert_hf.py --src FLUX.1-dev --digests                                             # SHA-256 of every tensor

The source's layout is recognised by its keys. Every key and shape is checked before a byte is written; the result appears under
its name only when it is whole. Errors are one line, with exit code 2.
"""

import argparse
import re
import signal
import sys
from pathlib import Path

from tqdm import tqdm

LAYOUTS = ("fluxlite", "diffusers", "bfl", "nemo")
REMEDY = "pass --overwrite, or name another"
DTYPES = ("bfloat16", "float16", "float32")


def size(text):
    """`10GB`, `500MB` or a number of bytes as an int."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: write a size such as 10GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="folder, file, run, or hub repository")
    parser.add_argument("--dst", help="file that ends in .safetensors, or folder; for --to diffusers a folder")
    parser.add_argument("--to", choices=LAYOUTS, help="layout to write (default: fluxlite); of a ControlNet bfl is x-flux's")
    parser.add_argument("--dtype", choices=DTYPES, help="type to write (default: the source's)")
    parser.add_argument("--max-shard-size", type=size, metavar="SIZE", help="of a file in a folder (default: diffusers 10GB)")
    parser.add_argument("--no-ema", action="store_true", help="of a run, take the weights themselves, not their moving average")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--verify", action="store_true", help="read DST back: every byte, and one forward beside diffusers' model")
    parser.add_argument("--digests", action="store_true", help="print the SHA-256 of every tensor of SRC, and write nothing")
    args = parser.parse_args(argv)
    writing = [name for name in ("dst", "to", "dtype", "max_shard_size", "overwrite", "verify") if getattr(args, name)]
    if args.digests and writing:
        parser.error(f"--digests writes nothing: leave out --{writing[0].replace('_', '-')}")
    if not args.digests and not args.dst:
        parser.error("--dst is missing: name a file or a folder")
    return args


def bar(total, text):
    return tqdm(total=total, unit="B", unit_scale=True, desc=text, mininterval=0.5)


def convert(args):
    import torch

    from fluxlite import checkpoint, verify
    from fluxlite.pipeline import resolve

    source = checkpoint.open_source(resolve(args.src), setting="--src", ema=not args.no_ema)
    if args.no_ema and not checkpoint.is_run(Path(args.src).expanduser()):
        raise ValueError(f"--no-ema is for runs, and --src {args.src} is none: leave it out")
    if args.digests:
        with bar(source.num_bytes(), "reading") as progress:
            each, total = verify.digests_of(source, progress.update)
        print("\n".join(f"{digest}  {name}" for name, digest in each.items()))
        print(f"{total}  all {len(each)} tensors")
        return
    to = args.to or "fluxlite"
    print(f"{args.src}: {source.what}, {source.layout} layout, {source.num_bytes() / 1e9:.2f} GB; writing {to} to {args.dst}")
    dtype = args.dtype and getattr(torch, args.dtype)
    options = dict(dtype=dtype, max_shard_bytes=args.max_shard_size, overwrite=args.overwrite, remedy=REMEDY)
    with bar(source.num_bytes(), "converting") as progress:
        files, digest = checkpoint.write_converted(source, args.dst, to=to, progress=progress.update, **options)
    print("\n".join(f"{file}  {file.stat().st_size / 1e9:.2f} GB" for file in files))
    print(f"source digest {digest}")
    if args.verify:
        with bar(source.num_bytes(), "verifying") as progress:
            lines = verify.verify(source, args.dst, progress.update)
        print("\n".join(lines))


def run(argv=None):
    """The script; returns its exit code."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half written stays
    try:
        convert(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
