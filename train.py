"""Train a Flux: `python train.py recipe=laptop`, or `torchrun --nproc_per_node 8 train.py
model=flux_dev data=fill50k …`.
"""

import logging

from fluxlite.cli.programs import run_program, stopping_at_once

USAGE = """
Train a Flux.

  python train.py recipe=laptop  flux_tiny from scratch on fill50k, on a CPU in minutes
  torchrun --nproc_per_node 2 train.py recipe=debug  1 + 1 blocks at full width, mock data
  torchrun --nproc_per_node 8 train.py recipe=convergence model.t5=FLUX.1-dev \\
      model.clip=FLUX.1-dev model.autoencoder=FLUX.1-dev
  python train.py recipe=laptop resume=auto  go on from the last checkpoint
"""


def usage():
    from fluxlite.cli.command_line import help_text
    from fluxlite.settings import TrainConfig

    return help_text(TrainConfig, "train", USAGE)


def body(arguments):
    with stopping_at_once():
        from fluxlite import parallel
        from fluxlite.settings import load_settings
        from fluxlite.train.loop import train

    config = load_settings("train", arguments)
    logging.basicConfig(
        level=logging.INFO if parallel.rank() == 0 else logging.WARNING, format="%(message)s"
    )
    try:
        with parallel.watching_ranks(config.parallel):
            folder = train(config)
    finally:
        parallel.stop_ranks()
    if parallel.rank() == 0:
        left = "checkpoints/last", "images", "losses.png", "metrics.jsonl", "config.json", "preview"
        print(f"{folder}: {', '.join(name for name in left if (folder / name).exists())}")


if __name__ == "__main__":
    run_program(body, usage=usage)
