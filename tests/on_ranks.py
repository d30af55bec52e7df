"""A few gloo ranks, forked off a test: no import for each."""

import multiprocessing
import os
import socket

import torch

from fluxlite import parallel


def on_ranks(count, body, tmp_path, seconds=60):
    """What `body()` returns on each of so many forked ranks; here must be no process group."""
    assert not torch.distributed.is_initialized()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("fork")

    def run(rank):
        told = dict(RANK=rank, WORLD_SIZE=count, MASTER_ADDR="localhost", MASTER_PORT=port)
        os.environ.update({key: str(value) for key, value in told.items()})
        torch.set_num_threads(1)
        torch.save(body(), tmp_path / f"{rank}.pt")
        parallel.stop_ranks()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
