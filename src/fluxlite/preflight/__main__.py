"""What a run would take on ranks that one does not own: memory and traffic of rank 0, from the real
step on fake tensors.

    python -m fluxlite.preflight --ranks 8 recipe=controlnet data.global_batch=8

Takes the keys of `train.py`, a ControlNet's too; weights, data and encoders need not be there, a
`lora.checkpoint=` must. The model is wrapped, filled, trained and updated by the trainer's own
functions; nothing is computed and nothing is sent. Text encoders and autoencoder are not in it:
their outputs are made up. The compute dtype is bfloat16 unless `dtype=` says otherwise; `compile=`
and `parallel.float8=` change nothing here; parallel.cpu_offload and what CUDA's allocator adds
cannot be predicted. Where a
process group holds all ranks of FSDP2, what travels among all ranks (the modulation's vectors,
norms) is counted with it. Several nodes have `--per-node` ranks each, with `--memory` GB.
"""

import json
from dataclasses import MISSING, dataclass

from fluxlite.cli.options import option
from fluxlite.cli.programs import run_program, stopping_at_once


@dataclass
class PreflightConfig:
    """What this module takes beside the keys of `train.py`."""

    ranks: int = option(MISSING, "processes of the run", at_least=1, at_most=65_536)
    per_node: int = option(8, "processes of a node", at_least=1, at_most=65_536)
    memory: float = option(
        80, "GB of each GPU, which parallel.dp_replicate=-1 asks", at_least=1, at_most=100_000
    )


def print_prediction(found):
    """Print a prediction as two tables."""
    print(
        " x ".join(f"{name} {size}" for name, size in found["mesh"].items()),
        f"in {found['dtype']}\n",
    )
    print(f"{'memory of rank 0':<34}{'GB':>9}")
    for name, size in found["memory"].items():
        label = "at once at most, activations included" if name == "peak" else name
        if size:
            print(f"{label:<38}{size / 1e9:>8.2f}")
    print(f"\n{'sent by rank 0 in a step':<26}{'over':<14}{'calls':>7}{'GB':>10}")
    for (name, dimension), size in sorted(found["sent"].items(), key=lambda item: -item[1]):
        print(f"{name:<26}{dimension:<14}{found['calls'][name, dimension]:>7}{size / 1e9:>10.4f}")
    print(f"{'in all':<47}{sum(found['sent'].values()) / 1e9:>10.4f}")


def usage():
    from fluxlite.cli.command_line import flags_help

    return flags_help(PreflightConfig, __doc__)


def body(arguments):
    with stopping_at_once():
        from fluxlite.cli.command_line import parse_flags
        from fluxlite.preflight.prediction import predict_step

    config, rest = parse_flags(PreflightConfig, arguments, rest=True)
    found = predict_step(rest, config.ranks, config.per_node, config.memory * 1e9)
    print_prediction(found)
    sent = {" over ".join(key): size for key, size in found["sent"].items()}
    calls = {" over ".join(key): count for key, count in found["calls"].items()}
    print(
        json.dumps(
            {"ranks": config.ranks, "arguments": rest, **found, "sent": sent, "calls": calls}
        )
    )


if __name__ == "__main__":
    run_program(body, usage=usage, ranks=False)
