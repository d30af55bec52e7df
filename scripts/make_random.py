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
from functools import partial
from pathlib import Path

from fluxlite.cli.programs import run_program, stop_at_once

if __name__ == "__main__":
    stop_at_once()

import torch
from tqdm import tqdm

from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.options import option, same_option
from fluxlite.nets.configs import AutoencoderConfig, FluxConfig
from fluxlite.weights import conversion, diffusers_configs, tensor_files
from fluxlite.weights.writing import DIFFUSERS_SHARD_BYTES, DIFFUSERS_STEM

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


def draw_tensor(shape, pool, generator, *, norm):
    """A random bfloat16 tensor: about 1 for a norm's scale, else of variance 1 over its inputs."""
    count = torch.Size(shape).numel()
    start = torch.randint(POOL // 2, (), generator=generator).item()
    repeated = pool if count <= POOL - start else pool.repeat(-(-(count + start) // POOL))
    values = repeated[start : start + count].view(shape)
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
            (key, draw_tensor(shape, pool, generator, norm="norm" in key and len(shape) == 1))
            for key, (_, shape) in shard.items()
        )
        tensor_files.write_tensors(folder / name, shard, pieces, {"format": "pt"}, bar.update)
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
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)
        values = config.to_dict() | {"architectures": [cls.__name__], "dtype": "bfloat16"}
        found[folder] = "model", shapes, values
    return found


def diffusers_part(config):
    """(stem, {name: shape}, config) of a transformer or an autoencoder in diffusers' layout."""
    shapes = conversion.layout_shapes("diffusers", config)
    return DIFFUSERS_STEM, shapes, diffusers_configs.config_to_diffusers(config)


@dataclass
class RandomConfig:
    """What this script takes."""

    dst: str = option(MISSING, "folder to write", path=True)
    model: str = option("dev", "with guidance or without", choices=("dev", "schnell"))
    encoders: bool = option(False, "also T5-XXL, CLIP-L and the autoencoder, with tiny tokenizers")
    doubles: int = same_option(FluxConfig, "num_double_blocks")
    singles: int = same_option(FluxConfig, "num_single_blocks")
    seed: int = option(0, "of the weights", at_least=0, at_most=2**63 - 1)


def body(arguments):
    args = parse_flags(RandomConfig, arguments)
    dst = Path(args.dst)
    flux = FluxConfig(args.doubles, args.singles, guidance_embed=args.model == "dev")
    flux.validate()
    parts = {"transformer": diffusers_part(flux)}
    if args.encoders:
        parts |= encoder_parts() | {"vae": diffusers_part(AutoencoderConfig())}
    total = 0
    for _, shapes, _ in parts.values():
        total += sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(args.seed)
    pool = torch.randn(POOL, generator=generator).bfloat16()
    with tensor_files.atomic_weights(dst, folder=True) as folder:
        tensor_files.check_room(dst, total)
        with tqdm(total=total, unit="B", unit_scale=True, desc=str(dst)) as bar:
            for name, (stem, shapes, config) in parts.items():
                write_part(folder / name, stem, shapes, config, pool, generator, bar)
        for name in ("tokenizer", "tokenizer_2") if args.encoders else ():
            shutil.copytree(TINY / name, folder / name)
    print(f"{dst}: {tensor_files.format_bytes(total)}")


if __name__ == "__main__":
    run_program(body, usage=partial(flags_help, RandomConfig, __doc__), ranks=False)
