"""Write a full-size FLUX.1 pipeline folder of random weights, for tests of scale: right names,
shapes, types and shards.

    python scripts/make_random.py --dst FLUX.1-random  # FLUX.1-dev's transformer, 23.8 GB
    python scripts/make_random.py --dst FLUX.1-random --model schnell --encoders  # all, 33.7 GB
    python scripts/make_random.py --dst small --doubles 1 --singles 1     # full width, less depth

Weights are bfloat16 and come from one pool of normal draws, scaled by each matrix's width: no more
than one tensor is in memory. Pictures drawn with them are noise. The tokenizers are those of
assets/flux-tiny.
"""

import json
import shutil
from dataclasses import MISSING, dataclass
from pathlib import Path

from fluxlite.cli.programs import run_program, stop_at_once

if __name__ == "__main__":
    stop_at_once()

import torch
from tqdm import tqdm

from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.options import option, same_option
from fluxlite.nets.autoencoder import AutoencoderConfig
from fluxlite.nets.flux import FluxConfig
from fluxlite.weights import layouts, tensor_files
from fluxlite.weights.sources import DIFFUSERS_SHARD_BYTES

TINY = Path(__file__).parents[1] / "assets" / "flux-tiny"
POOL = 1 << 24
T5_XXL = dict(
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
)
CLIP_L = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)


def draw(shape, pool, generator, *, norm):
    """A random bfloat16 tensor: about 1 for a norm's scale, else of variance 1 over its inputs,
    biases small.
    """
    count = torch.Size(shape).numel()
    start = torch.randint(POOL // 2, (), generator=generator).item()
    values = (
        pool[start : start + count]
        if count <= POOL - start
        else pool.repeat(-(-(count + start) // POOL))[start : start + count]
    )
    values = values.view(shape)
    if norm:
        return 1 + 0.02 * values
    return values * (values[0].numel() ** -0.5 if len(shape) > 1 else 0.02)


def write_part(folder, stem, shapes, config, pool, generator, bar):
    """One part's folder: config.json and {name: shape} in shards of 10 GB with an index."""
    folder.mkdir(parents=True)
    described = {name: (torch.bfloat16, tuple(shape)) for name, shape in shapes.items()}
    shards = tensor_files.split_shards(described, DIFFUSERS_SHARD_BYTES)
    names = tensor_files.shard_names(stem, len(shards))
    for shard, name in zip(shards, names):
        pieces = (
            (key, draw(shape, pool, generator, norm="norm" in key and len(shape) == 1))
            for key, (_, shape) in shard.items()
        )
        tensor_files.write(folder / name, shard, pieces, {"format": "pt"}, bar.update)
    if len(shards) > 1:
        tensor_files.write_index(folder / f"{stem}.safetensors.index.json", shards, names)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def encoder_parts():
    """{folder: (stem, {name: shape}, config)} of T5-XXL's encoder and CLIP-L's text model."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tiny = json.loads((TINY / "text_encoder" / "config.json").read_text())
    ids = {k: tiny[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in tiny}
    found = {}
    for folder, cls, config in (
        ("text_encoder", CLIPTextModel, CLIPTextConfig(**CLIP_L, **ids)),
        ("text_encoder_2", T5EncoderModel, T5Config(**T5_XXL)),
    ):
        with torch.device("meta"):
            model = cls(config)
        shapes = {
            k: v.shape for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"
        }
        found[folder] = (
            "model",
            shapes,
            config.to_dict() | {"architectures": [cls.__name__], "dtype": "bfloat16"},
        )
    return found


@dataclass
class RandomConfig:
    """What this script takes."""

    dst: str = option(MISSING, "folder to write", path=True)
    model: str = option("dev", "with guidance or without", choices=("dev", "schnell"))
    encoders: bool = option(False, "also T5-XXL, CLIP-L and the autoencoder, with tiny tokenizers")
    doubles: int = same_option(FluxConfig, "num_double_blocks")
    singles: int = same_option(FluxConfig, "num_single_blocks")
    seed: int = option(0, "of the weights", at_least=0, at_most=2**63 - 1)


def usage():
    return flags_help(RandomConfig, __doc__)


def body(arguments):
    args = parse_flags(RandomConfig, arguments)
    dst = Path(args.dst)
    flux = FluxConfig(args.doubles, args.singles, guidance_embed=args.model == "dev")
    flux.validate()
    parts = {
        "transformer": (
            "diffusion_pytorch_model",
            layouts.shapes("diffusers", flux),
            layouts.config_to_diffusers(flux),
        )
    }
    if args.encoders:
        vae = AutoencoderConfig()
        values = layouts.autoencoder_config_to_diffusers(vae)
        parts |= encoder_parts() | {
            "vae": ("diffusion_pytorch_model", layouts.shapes("diffusers", vae), values)
        }
    total = 2 * sum(
        torch.Size(shape).numel() for _, shapes, _ in parts.values() for shape in shapes.values()
    )
    generator = torch.Generator().manual_seed(args.seed)
    pool = torch.randn(POOL, generator=generator).bfloat16()
    with tensor_files.aside(dst, folder=True) as folder:
        tensor_files.check_room(dst, total)
        with tqdm(total=total, unit="B", unit_scale=True, desc=str(dst)) as bar:
            for name, (stem, shapes, config) in parts.items():
                write_part(folder / name, stem, shapes, config, pool, generator, bar)
        for name in ("tokenizer", "tokenizer_2") if args.encoders else ():
            shutil.copytree(TINY / name, folder / name)
    print(f"{dst}: {total / 1e9:.1f} GB")


if __name__ == "__main__":
    run_program(body, usage=usage, ranks=False)
