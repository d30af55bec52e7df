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
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from fluxlite import parallel
from fluxlite.cli.stage_times import memory_of_process
from fluxlite.nets.flux import Flux, FluxConfig, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.weights import layouts

TEXT_TOKENS = 512


def make_models(config, dtype, seed=0):
    """Diffusers' model and ours with the same random weights."""
    from diffusers import FluxTransformer2DModel

    values = {k: v for k, v in layouts.config_to_diffusers(config).items() if not k.startswith("_")}
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        theirs, ours = FluxTransformer2DModel(**values), Flux(config)

    def draw(name, shape):
        values = torch.randn(shape, generator=generator, dtype=dtype)
        return (
            1 + 0.1 * values
            if "norm_" in name and len(shape) == 1 and name.endswith("weight")
            else 0.02 * values
        )

    state = {name: draw(name, value.shape) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    ours.load_state_dict(layouts.to_fluxlite(state, config, "diffusers"), assign=True)
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


def make_inputs(config, side, dtype):
    cells = side // 8
    generator = torch.Generator().manual_seed(1)
    img = torch.randn(1, cells * cells // 4, config.in_channels, generator=generator).to(dtype)
    txt = torch.randn(1, TEXT_TOKENS, config.text_width, generator=generator).to(dtype)
    pooled = torch.randn(1, config.pooled_width, generator=generator).to(dtype)
    return dict(
        img=img, txt=txt, pooled=pooled, t=torch.tensor([0.5]), guidance=torch.tensor([4.0])
    ), position_ids(cells, cells, TEXT_TOKENS)


def diffusers_step(theirs, inputs, ids):
    ids = ids.float()
    call = dict(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["pooled"],
        timestep=inputs["t"],
        guidance=inputs["guidance"],
        img_ids=ids[TEXT_TOKENS:],
        txt_ids=ids[:TEXT_TOKENS],
        return_dict=False,
    )
    return lambda: theirs(**call)[0]


def our_steps(ours, inputs, ids):
    """(a step of our sampler, our whole forward)."""
    rope = rope_table(ids, ours.config)
    modulation = ours.modulate(inputs["t"], inputs["pooled"], inputs["guidance"])
    txt = ours.txt_in(inputs["txt"])
    return (lambda: ours.velocity(inputs["img"], txt, rope, modulation)), (
        lambda: ours(rope=rope, **inputs)
    )


def floor_step(ours, inputs):
    """The linears and attentions of a step alone, on tensors of the right shapes."""
    config, num_img = ours.config, inputs["img"].shape[1]
    tokens, hidden = TEXT_TOKENS + num_img, config.hidden_size
    dtype = inputs["img"].dtype
    x = {
        length: torch.randn(1, length, hidden, dtype=dtype)
        for length in (TEXT_TOKENS, num_img, tokens)
    }
    wide = {length: torch.randn(1, length, 4 * hidden, dtype=dtype) for length in x}
    q, k, v = (
        torch.randn(1, config.num_heads, tokens, config.head_width, dtype=dtype) for _ in range(3)
    )

    def linear(part, given):
        return F.linear(given, part.weight, part.bias)

    def step():
        linear(ours.img_in, inputs["img"])
        for block in ours.double_blocks:
            for stream, length in ((block.txt, TEXT_TOKENS), (block.img, num_img)):
                for part in (stream.qkv.q, stream.qkv.k, stream.qkv.v):
                    linear(part, x[length])
                linear(stream.proj, x[length])
                linear(stream.mlp.linear_in, x[length])
                linear(stream.mlp.linear_out, wide[length])
            F.scaled_dot_product_attention(q, k, v)
        for block in ours.single_blocks:
            for part in (block.qkv.q, block.qkv.k, block.qkv.v):
                linear(part, x[tokens])
            linear(block.mlp.linear_in, x[tokens])
            F.scaled_dot_product_attention(q, k, v)
            linear(block.proj, x[tokens])
            linear(block.mlp.linear_out, wide[tokens])
        linear(ours.out, x[num_img])

    return step


def alternate(steps, repeats):
    """{name: median seconds}, one run of each after the other."""
    times = {name: [] for name in steps}
    for round in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round:  # the first warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def measure(args, dtype, sides):
    config = FluxConfig(num_double_blocks=args.doubles, num_single_blocks=args.singles)
    theirs, ours = make_models(config, dtype)
    rows = []
    variants = [False, True] if args.compile else [False]
    results = {side: {} for side in sides}
    for compiled in variants:
        suffix = ", compiled" if compiled else ""
        if compiled:
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
            if not compiled:
                steps["floor"] = floor_step(ours, inputs)
            reference = steps["diffusers" + suffix]().float()
            error = ((step().float() - reference).norm() / reference.norm()).item()
            results[side] |= alternate(steps, args.repeats) | {"error" + suffix: error}
    for side in sides:
        flops = ours.forward_flops(TEXT_TOKENS, (side // 16) ** 2)
        rows.append(
            {
                "side": side,
                "dtype": str(dtype).removeprefix("torch."),
                "tflop": flops / 1e12,
                **results[side],
            }
        )
    return rows, memory(theirs, ours)


def memory(theirs, ours):
    """Bytes of weights that the denoising loop of each needs."""
    before = sum(p.nbytes for p in theirs.parameters())
    ours.drop_conditioning()
    after = sum(p.nbytes for p in ours.parameters())
    with torch.device("meta"):
        whole, part = Flux(FluxConfig()), Flux(FluxConfig())
    part.drop_conditioning()
    count = [sum(p.numel() for p in m.parameters()) for m in (whole, part)]
    return {"diffusers": before, "ours": after, "FLUX.1-dev saved": 1 - count[1] / count[0]}


def peak_gb():
    """The most memory that this process has had resident, in 10^9 bytes."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def report(rows, weights):
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
    report(rows, weights)
    print(
        f"memory of this process, both models in it: {memory_of_process()[1] / 1e9:.2f} GB "
        f"resident, {peak_gb():.2f} GB at most"
    )
    conditions = {
        "torch": torch.__version__,
        "threads": args.threads,
        "repeats": args.repeats,
        "machine": platform.machine(),
    }
    print(
        json.dumps(
            {
                "rows": rows,
                "weights": weights,
                "resident_bytes": memory_of_process()[1],
                "peak_gb": peak_gb(),
                **vars(args),
                **conditions,
            }
        )
    )


if __name__ == "__main__":
    main()
