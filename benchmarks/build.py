"""Memory of one rank while the sharded model is built: never more than its shard and one block.
Prints a table and a JSON line.

    python benchmarks/build.py --ranks 8  # FLUX.1-dev, random; seven ranks are pretended
    python benchmarks/build.py --ranks 8 --set model.checkpoint=FLUX.1-random
    torchrun --nproc_per_node 4 benchmarks/build.py --set model.num_single_blocks=2

Private memory is sampled every few milliseconds; pages mapped from a checkpoint are not in it,
since the system takes them back.
"""

import argparse
import json
import os
import threading
import time

import torch
import torch.distributed as dist

from fluxlite import parallel
from fluxlite.cli.command_line import load_config
from fluxlite.cli.stage_times import memory_of_process
from fluxlite.preflight.prediction import local_bytes
from fluxlite.settings import TrainConfig
from fluxlite.train.tasks import FULL


class Peak:
    """The most private memory of this process while it is entered, above what it had before, in
    bytes.
    """

    def __enter__(self):
        self.before = self.most = memory_of_process()[0]
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.005):
            self.most = max(self.most, memory_of_process()[0])

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @property
    def grown(self):
        return self.most - self.before


def start_ranks(args):
    """(configuration, device, mesh) of torchrun's ranks, or of one that pretends to be."""
    pretend = "RANK" not in os.environ
    if pretend:
        os.environ.update(RANK="0", WORLD_SIZE=str(args.ranks))
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
    batch = f"data.global_batch={parallel.world_size()}"
    keys = ["model=flux_dev", "data=mock", "device=cpu", batch, *args.set]
    config, device = load_config(TrainConfig, "train", keys), torch.device("cpu")
    if pretend:
        return config, device, parallel.make_mesh(config.parallel, device)
    return config, *parallel.start_ranks(config.parallel, device)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument(
        "--set", action="append", default=[], help="a key of train.py, as key=value"
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if "RANK" in os.environ else 2)
    config, device, mesh = start_ranks(args)
    began = time.perf_counter()
    with Peak() as peak:
        [model] = FULL.build_models(config, device, mesh)
    shard = local_bytes(model.parameters())
    blocks = []
    for block in (*model.double_blocks, *model.single_blocks):
        blocks.append(sum(4 * p.numel() for p in block.parameters()))
    found = {
        "parameters": model.num_parameters(),
        "ranks": parallel.world_size(),
        "seconds": time.perf_counter() - began,
        "shard": shard,
        "largest block": max(blocks),
        "peak": peak.grown,
        "within shard and block": peak.grown <= shard + max(blocks),
    }
    if parallel.rank() == 0:
        for name, value in found.items():
            in_bytes = name in ("shard", "largest block", "peak")
            print(f"{name:<24}" + (f"{value / 1e9:>9.3f} GB" if in_bytes else f"{value!s:>12}"))
        print(json.dumps(found | {"arguments": args.set}))
    parallel.stop_ranks()


if __name__ == "__main__":
    main()
