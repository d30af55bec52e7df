"""Our forward beside diffusers' and beside the bare matrix products, at FLUX.1's full width and
reduced depth, in one process.

    python benchmarks/forward.py  # bf16, 256², 512² and 1024², eager and compiled
    python benchmarks/forward.py --dtype float32 --sizes 256 --no-compile

Measured alternately, medians of `--repeats`. One denoising step as each pipeline runs it: diffusers
computes the modulation and the text projection in every step; we compute them for all steps before
the first, and `ours, whole` is our forward with both in it. The floor is the same linears and
attentions with nothing between them. Prints a table and, last, one JSON line.
"""

import argparse
import gc
import json
import platform
import resource
import sys
from functools import partial

import torch
import torch.nn.functional as F
from side_by_side import (
    TEXT_TOKENS,
    alternate_steps,
    diffusers_step,
    make_inputs,
    make_models,
    our_steps,
)

from fluxlite import parallel
from fluxlite.cli.stage_times import memory_of_process
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import Flux
from fluxlite.nets.latents import num_image_tokens


def floor_step(ours, inputs):
    """The linears and attentions of a step alone, on tensors of the right shapes."""
    config, num_img = ours.config, inputs["img"].shape[1]
    tokens, hidden = TEXT_TOKENS + num_img, config.hidden_size
    draw = partial(torch.randn, dtype=inputs["img"].dtype)
    lengths = (TEXT_TOKENS, num_img, tokens)
    x = {length: draw(1, length, hidden) for length in lengths}
    wide = {length: draw(1, length, 4 * hidden) for length in lengths}
    q, k, v = (draw(1, config.num_heads, tokens, config.head_width) for _ in range(3))

    def linear(part, given):
        return F.linear(given, part.weight, part.bias)

    def step():
        linear(ours.img_in, inputs["img"])
        for block in ours.double_blocks:
            for stream, length in ((block.txt, TEXT_TOKENS), (block.img, num_img)):
                qkv = stream.qkv
                for part in (qkv.q, qkv.k, qkv.v, stream.proj, stream.mlp.linear_in):
                    linear(part, x[length])
                linear(stream.mlp.linear_out, wide[length])
            F.scaled_dot_product_attention(q, k, v)
        for block in ours.single_blocks:
            for part in (block.qkv.q, block.qkv.k, block.qkv.v, block.mlp.linear_in):
                linear(part, x[tokens])
            F.scaled_dot_product_attention(q, k, v)
            linear(block.proj, x[tokens])
            linear(block.mlp.linear_out, wide[tokens])
        linear(ours.out, x[num_img])

    return step


@torch.inference_mode()
def measure(args, dtype, sides):
    config = FluxConfig(num_double_blocks=args.doubles, num_single_blocks=args.singles)
    theirs, ours = make_models(config, dtype)
    results = {side: {} for side in sides}
    for suffix in ("", ", compiled") if args.compile else ("",):
        if suffix:
            torch._dynamo.reset()
            for block in (*theirs.transformer_blocks, *theirs.single_transformer_blocks):
                block.compile()
            parallel.compile_blocks(ours)
        for side in sides:
            print(f"measuring {side}²{suffix} …", file=sys.stderr, flush=True)
            inputs, ids = make_inputs(config, side, dtype)
            step, whole = our_steps(ours, inputs, ids)
            steps = {
                "diffusers" + suffix: diffusers_step(theirs, inputs, ids),
                "ours" + suffix: step,
                "ours, whole" + suffix: whole,
            }
            if not suffix:
                steps["floor"] = floor_step(ours, inputs)
            reference = steps["diffusers" + suffix]().float()
            error = ((step().float() - reference).norm() / reference.norm()).item()
            results[side] |= alternate_steps(steps, args.repeats) | {"error" + suffix: error}
    rows = []
    for side in sides:
        tflop = ours.forward_flops(TEXT_TOKENS, num_image_tokens(side // 8, side // 8)) / 1e12
        rows.append({"side": side, "dtype": args.dtype, "tflop": tflop} | results[side])
    return rows, memory(theirs, ours)


def memory(theirs, ours):
    """Bytes of weights that the denoising loop of each needs."""
    before = sum(p.nbytes for p in theirs.parameters())
    ours.drop_conditioning()
    after = sum(p.nbytes for p in ours.parameters())
    with torch.device("meta"):
        model = Flux(FluxConfig())
    whole = model.num_parameters()
    model.drop_conditioning()
    saved = 1 - model.num_parameters() / whole
    return {"diffusers": before, "ours": after, "FLUX.1-dev saved": saved}


def peak_gb():
    """The most memory that this process has had resident, in 10^9 bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def print_table(rows, weights):
    for row in rows:
        print(
            f"\n{row['side']}² ({TEXT_TOKENS} text tokens), {row['dtype']}, {row['tflop']:.2f} "
            "TFLOP"
        )
        print(f"{'':<24}{'seconds':>9}{'TFLOP/s':>9}{'× diffusers':>13}{'of the floor':>14}")
        for name, seconds in row.items():
            if name in ("side", "dtype", "tflop") or name.startswith("error"):
                continue
            base = row["diffusers, compiled" if "compiled" in name else "diffusers"]
            print(
                f"{name:<24}{seconds:>9.3f}{row['tflop'] / seconds:>9.2f}{base / seconds:>13.2f}"
                f"{row['floor'] / seconds:>14.0%}"
            )
        print(f"{'relative difference':<24}{row['error']:>9.1e}")
    print(
        f"\nweights in the loop: diffusers {weights['diffusers'] / 1e9:.2f} GB, ours "
        f"{weights['ours'] / 1e9:.2f} GB at this depth; "
        f"{weights['FLUX.1-dev saved']:.1%} fewer for FLUX.1-dev"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides in pixels"
    )
    parser.add_argument("--doubles", type=int, default=1)
    parser.add_argument("--singles", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, weights = measure(args, getattr(torch, args.dtype), args.sizes)
    gc.collect()
    print_table(rows, weights)
    print(
        f"memory of this process, both models in it: {memory_of_process()[1] / 1e9:.2f} GB "
        f"resident, {peak_gb():.2f} GB at most"
    )
    found = {"rows": rows, "weights": weights, "peak_gb": peak_gb(), **vars(args)}
    found |= {"resident_bytes": memory_of_process()[1], "machine": platform.machine()}
    print(json.dumps(found | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
