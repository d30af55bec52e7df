"""Parallelism, applied to a model from outside; one process is a mesh of one.

A run's ranks form a mesh of dp_replicate x dp_shard x cp x tp. The rooms:
* `plan`: the order in which a model is wrapped, compiled, checkpointed and sharded (FSDP2).
* `compilation`: its blocks, compiled and recomputed in the backward.
* `tensor_parallel`, `tokens`, `modulation`: what ranks share inside a model.
* `mesh`, `ranks`, `exchange`: the process group, this process in it, what ranks send each other.
* `adapters`: LoRA's, beside the linears of a wrapped model.
* `float8`: linears that multiply in float8.
* `weights`, `dealing`: which part of a weight a rank has, and whole ones dealt out over ranks.
* `config`: the settings.

Gradients: every rank's loss is its samples' mean, so the ranks' gradients are averaged over dp and
cp. The tp and cp ranks of a sample compute the same loss; where they hold different tokens, what
they find for shared weights is summed.
"""

# ruff: noqa: F401 (what other wings call)

from fluxlite.parallel.adapters import attach_adapters, average_gradients, shard_adapters
from fluxlite.parallel.compilation import checkpoint_activations, compile_blocks
from fluxlite.parallel.config import ParallelConfig, SharingConfig
from fluxlite.parallel.exchange import compute_apart
from fluxlite.parallel.float8 import (
    block_linears,
    lossy_settings,
    quantize_linears,
    train_in_float8,
    warn_of_rounding,
)
from fluxlite.parallel.mesh import (
    Mesh,
    make_mesh,
    settle_copies,
    share_ranks,
    start_ranks,
    stop_ranks,
)
from fluxlite.parallel.plan import (
    parallelize,
    reduce_gradients,
    reshard,
    shard_frozen,
    split_weights,
)
from fluxlite.parallel.ranks import (
    first_rank_does,
    gather_on_first,
    gather_values,
    rank,
    wait_for_all,
    watching_ranks,
    world_size,
)
from fluxlite.parallel.tokens import share_velocity
from fluxlite.parallel.weights import fill_weights, local_part, plain_values, whole_tensor
