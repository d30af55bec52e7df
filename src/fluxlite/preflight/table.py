"""What fits one GPU: the peak memory of a training step of FLUX.1-dev, for each way to save some.

    python -m fluxlite.preflight.table

Each figure is `predict_step`'s, of one sample at a time, its latents and texts cached, and each
block checkpointed: a minute on a core. It prints a Markdown table. GB are 10^9 bytes. A card is
taken to fit what leaves 1 of its GB to CUDA and its allocator.
"""

from fluxlite.cli.programs import run_program, stopping_at_once

CARDS = 12, 16, 24, 48, 80
BESIDE = 1e9  # bytes
SIZES = 512, 1024
COMMON = ["model=flux_dev", "data=mock", "data.global_batch=1", "data.micro_batch=1"]
COMMON += ["parallel.activation_checkpointing=full"]
ROWS = """recipe=lora
    recipe=lora parallel.swap_blocks=28
    recipe=lora parallel.swap_blocks=50
    recipe=lora model.quantize=int8
    recipe=lora model.quantize=int8 parallel.swap_blocks=28
    recipe=lora model.quantize=nf4
    recipe=lora model.quantize=nf4 parallel.activation_offload=true
    recipe=lora model.quantize=nf4 parallel.activation_offload=true parallel.swap_blocks=50
    optim.kind=adamw
    optim.kind=adamw8bit
    optim.kind=adamw optim.weights=bfloat16
    optim.kind=adamw8bit optim.weights=bfloat16
    optim.kind=adamw8bit optim.weights=bfloat16 parallel.activation_offload=true"""


def peak_of(settings, size):
    """Bytes at once at most in a step with these settings, at size x size pixels."""
    from fluxlite.preflight.prediction import predict_step

    recipe = [one for one in settings if one.startswith("recipe=")]
    others = [one for one in settings if one not in recipe]
    given = *recipe, *COMMON, f"data.height={size}", f"data.width={size}", *others
    return predict_step([*given], 1)["memory"]["peak"]


def smallest_card(peak):
    """The GB of the smallest card that a peak fits, in words."""
    return next((f"{card}" for card in CARDS if peak + BESIDE <= card * 1e9), "none")


def print_table(arguments):
    sizes = " | ".join(f"{size}², GB | card" for size in SIZES)
    print(f"| predicted | {sizes} |\n|---|{'---|---|' * len(SIZES)}")
    with stopping_at_once():
        for row in ROWS.splitlines():
            peaks = [peak_of(row.split(), size) for size in SIZES]
            cells = [f"{peak / 1e9:.1f} | {smallest_card(peak)}" for peak in peaks]
            print(f"| `{row.strip()}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_program(print_table, usage=lambda: __doc__, ranks=False)
