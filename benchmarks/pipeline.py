"""Whole pictures beside diffusers' FluxPipeline, from the prompt to the pixels, on the CPU: with
the same weights, prompt, noise and steps.

    python benchmarks/pipeline.py  # the shipped model, processes and blocks of FLUX.1's width
    python benchmarks/pipeline.py --cases tiny process --rounds 9
    python benchmarks/pipeline.py --cases wide --sizes 512 1024 --doubles 2 --singles 4

`tiny` and `wide` alternate in one process, with everything loaded. `process` is the shipped model
again from nothing: infer.py and a program of diffusers', each in a process of its own until its
picture is a file. Weights of `wide` are random: blocks of FLUX.1's width, its CLIP and autoencoder,
one block of its T5. Medians of `--rounds` after one that warms up. Prints a table and, last, one
JSON line.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from side_by_side import alternate_steps, random_state
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import fluxlite
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.latents import pack_latents
from fluxlite.weights.hub import ASSETS
from fluxlite.weights.verify import build_diffusers

TINY, ROOT = ASSETS / "flux-tiny", Path(__file__).parents[1]
PROMPT = "red circle with dark blue background"
GUIDANCE = 3.5
CASES = "tiny", "process", "wide"
ASKED = {"tiny": 2.0, "process": 2.0, "wide": 1.03}  # times as fast as diffusers
THEIR_PROGRAM = """
import sys, torch
from diffusers import FluxPipeline
folder, prompt, side, steps, guidance, text, dtype, out = sys.argv[1:]
pipe = FluxPipeline.from_pretrained(folder).to(getattr(torch, dtype))
call = dict(height=int(side), width=int(side), max_sequence_length=int(text))
call |= dict(num_inference_steps=int(steps), guidance_scale=float(guidance))
pipe(prompt, **call).images[0].save(out)
"""
AUTOENCODER = dict(  # FLUX.1's
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
SHIFT = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)


@dataclass
class Drawing:
    """What is drawn, by both."""

    folder: Path  # a pipeline in diffusers' layout
    side: int  # pixels
    steps: int
    text: int  # tokens of T5
    dtype: str

    def settings(self):
        return dict(height=self.side, width=self.side, max_sequence_length=self.text)


# --- in one process -------------------------------------------------------------------------------


def wide_pipeline(doubles, singles, dtype):
    """A FluxPipeline of FLUX.1's widths at reduced depth, with random weights."""
    transformer = build_wide(
        FluxConfig(num_double_blocks=doubles, num_single_blocks=singles), dtype
    )
    clip_tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    end = clip_tokenizer.eos_token_id
    clip = CLIPTextConfig.from_pretrained(TINY / "text_encoder", eos_token_id=end)
    clip.update(dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    clip.num_hidden_layers = 12
    t5 = T5Config.from_pretrained(TINY / "text_encoder_2", num_layers=1, num_heads=64)
    t5.update(dict(d_model=4096, d_ff=10240, d_kv=64))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFT),
        vae=AutoencoderKL(**AUTOENCODER).to(dtype),
        text_encoder=CLIPTextModel(clip).to(dtype),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5).to(dtype),
        tokenizer_2=T5TokenizerFast.from_pretrained(TINY / "tokenizer_2"),
        transformer=transformer,
    )


def build_wide(config, dtype):
    """Diffusers' transformer of such a shape with random weights."""
    with torch.device("meta"):
        model = build_diffusers(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(random_state(shapes, dtype), assign=True)
    return model


def make_pictures(theirs, ours, drawing):
    """{whose: a function that draws a picture} of a FluxPipeline and a `Pipeline`, from the same
    noise.
    """
    cells = drawing.side // ours.cell
    shape = 1, theirs.vae.config.latent_channels, cells, cells
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(noise).to(theirs.dtype)
    own = drawing.settings() | dict(steps=drawing.steps, guidance=GUIDANCE, latents=noise)
    call = drawing.settings() | dict(num_inference_steps=drawing.steps, guidance_scale=GUIDANCE)
    theirs.set_progress_bar_config(disable=True)
    return {
        "diffusers": lambda: theirs(PROMPT, latents=packed, **call).images[0],
        "ours": lambda: fluxlite.generate(PROMPT, checkpoint=ours, **own)[0],
    }


def measure_loaded(theirs, drawing, rounds):
    """{whose: seconds a picture} of both, and the mean difference of their pictures in levels."""
    dtype = getattr(torch, drawing.dtype)
    ours = fluxlite.load_pipeline(str(drawing.folder), dtype=dtype, device="cpu")
    pictures = make_pictures(theirs, ours, drawing)
    drawn = [np.asarray(draw(), np.int64) for draw in pictures.values()]
    difference = float(np.abs(drawn[0] - drawn[1]).mean())
    return alternate_steps(pictures, rounds) | {"difference": difference}


# --- a process for each ---------------------------------------------------------------------------


def list_commands(drawing, folder):
    """{whose: a command that draws a picture into a folder}."""
    how = drawing.side, drawing.steps, GUIDANCE, drawing.text, drawing.dtype
    theirs = ["-c", THEIR_PROGRAM, drawing.folder, PROMPT, *how, f"{folder}/theirs.png"]
    own = drawing.settings() | dict(steps=drawing.steps, guidance=GUIDANCE, dtype=drawing.dtype)
    ours = [ROOT / "infer.py", f"prompt={PROMPT}", f"model.checkpoint={drawing.folder}"]
    ours += [f"output={folder}/ours", "device=cpu", *(f"{key}={own[key]}" for key in own)]
    both = {"diffusers": theirs, "ours": ours}
    return {name: [sys.executable, *map(str, command)] for name, command in both.items()}


def measure_processes(drawing, rounds, threads):
    """{whose: seconds from the start of a process to its picture's file}."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def runner(command):
        return lambda: subprocess.run(command, env=environment, check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        commands = list_commands(drawing, folder)
        return alternate_steps({name: runner(of) for name, of in commands.items()}, rounds)


# --- all of them ----------------------------------------------------------------------------------


def measure_cases(args):
    """Yield {what and how long} for each case."""
    tiny = Drawing(TINY, args.tiny_size, args.tiny_steps, 16, args.dtype)
    if "tiny" in args.cases:
        pipe = FluxPipeline.from_pretrained(TINY).to(getattr(torch, args.dtype))
        yield vars(tiny) | {"case": "tiny"} | measure_loaded(pipe, tiny, args.rounds)
    if "process" in args.cases:
        rounds = args.process_rounds
        yield vars(tiny) | {"case": "process"} | measure_processes(tiny, rounds, args.threads)
    if "wide" in args.cases:
        yield from measure_wide(args)


def measure_wide(args):
    """The same for each size of the blocks of full width, which lie in a folder meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = wide_pipeline(args.doubles, args.singles, getattr(torch, args.dtype))
        pipe.save_pretrained(folder)
        for side in args.sizes:
            wide = Drawing(Path(folder), side, args.steps, args.text, args.dtype)
            yield vars(wide) | {"case": "wide"} | measure_loaded(pipe, wide, args.rounds)


def format_row(row):
    """A line of the table."""
    what = f"{row['case']}, {row['side']}², {row['steps']} steps, {row['dtype']}"
    times = f"{row['diffusers']:>11.3f}{row['ours']:>9.3f}{row['diffusers'] / row['ours']:>9.2f}"
    difference = f"{row['difference']:>12.2f}" if "difference" in row else f"{'':>12}"
    return f"{what:<40}{times}{ASKED[row['case']]:>9}{difference}"


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--process-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny-size", type=int, default=64, help="side in pixels")
    parser.add_argument("--tiny-steps", type=int, default=28)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="wide: sides in pixels")
    parser.add_argument("--steps", type=int, default=4, help="wide: denoising steps")
    parser.add_argument("--text", type=int, default=512, help="wide: tokens of T5")
    parser.add_argument("--doubles", type=int, default=1, help="wide: double blocks")
    parser.add_argument("--singles", type=int, default=2, help="wide: single blocks")
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(
        f"{'seconds a picture':<40}{'diffusers':>11}{'ours':>9}{'×':>9}{'asked':>9}{'levels':>12}"
    )
    rows = []
    for row in measure_cases(args):
        rows.append({name: value for name, value in row.items() if name != "folder"})
        print(format_row(row), flush=True)
    print("levels: mean difference of the two pictures, of 255")
    machine = {"machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"rows": rows, **vars(args), **machine}))


if __name__ == "__main__":
    main()
