"""The settings of parallelism, and what must divide among the ranks."""

import math
from dataclasses import dataclass

from fluxlite.cli.devices import FLOAT8_KINDS, FLOAT8_MULTIPLE, float8_conflicts
from fluxlite.cli.options import option, refuse_first, same_option
from fluxlite.parallel.compilation import checkpoint_interval
from fluxlite.parallel.ranks import world_size

MAX_RANKS = 65_536


@dataclass
class ParallelConfig:
    """The mesh, and what each of its ranks keeps."""

    dp_replicate: int = option(
        -1,
        "copies of the sharded weights (HSDP); -1: one a node where its ranks can hold the state "
        "and parallel.tp x parallel.cp divides them, else one in all",
        at_least=-1,
        at_most=MAX_RANKS,
    )
    dp_shard: int = option(
        -1,
        "ranks that share one copy of the weights (FSDP2); -1: all that are left",
        at_least=-1,
        at_most=MAX_RANKS,
    )
    cp: int = option(
        1,
        "context-parallel ranks, which share the tokens of a sample (Ulysses)",
        at_least=1,
        at_most=MAX_RANKS,
    )
    tp: int = option(
        1,
        "tensor-parallel ranks, which share the heads and the width of each block",
        at_least=1,
        at_most=MAX_RANKS,
    )
    sequence_parallel: bool = option(
        False, "tensor-parallel ranks share the tokens between the blocks' linears too: less memory"
    )
    shard_modulation: bool = option(
        True,
        "spread the modulation's features over all ranks and never gather them: 27 % less traffic",
    )
    shard_encoders: bool = option(
        False,
        "shard the T5 encoder over a node's ranks, gathered block by block: less memory, more "
        "traffic",
    )
    reshard_after_forward: bool = option(
        True,
        "free gathered weights between forward and backward: less memory, one more all-gather",
    )
    prefetch: int = option(
        0,
        "blocks gathered ahead of the one that computes; 0: what FSDP2 does, one",
        at_least=0,
        at_most=1000,
    )
    reduce_dtype: str = option(
        "float32",
        "what gradients are added up in over the ranks that share weights; bfloat16 sends half, "
        "and rounds",
        choices=("float32", "bfloat16"),
    )
    cpu_offload: bool = option(
        False, "keep sharded weights, gradients and optimizer in host memory"
    )
    activation_checkpointing: str = option(
        "none",
        "recompute in the backward: none, full (each block), a number k (each k-th block), or "
        "selective (all but matrix products and fused attention)",
        verbatim=True,
    )
    activation_offload: bool = option(
        False,
        "keep what checkpointed blocks recompute from in host memory until the backward; with "
        "activation_checkpointing=full or a number",
    )
    swap_blocks: int = option(
        0,
        "blocks of a frozen transformer whose weights lie in host memory and pass through two "
        "buffers on the GPU, forward and backward; each rank has all of it, with "
        "activation_checkpointing=full",
        at_least=0,
        at_most=1000,
    )
    float8: str = option(
        "none",
        "lossy: the blocks' linears multiply in float8 with a scale a row (rowwise) or a tensor "
        "(tensorwise); GPUs only, faster with compile, needs torchao",
        choices=FLOAT8_KINDS,
    )
    timeout_s: int = option(
        600,
        "seconds after which a rank that waits for another gives up",
        at_least=1,
        at_most=1_000_000,
    )

    def validate(self):
        """Raise `ValueError` for settings that do not belong together, or divide no ranks."""
        self.sizes()
        if self.sequence_parallel and self.tp == 1:
            raise ValueError(
                "parallel.sequence_parallel=true needs parallel.tp above 1, whose ranks share the "
                "tokens"
            )
        if self.float8 != "none" and (self.tp > 1 or self.cpu_offload):
            other = "parallel.tp" if self.tp > 1 else "parallel.cpu_offload"
            raise ValueError(
                f"parallel.float8={self.float8} does not work with {other}: leave one of them out"
            )
        refuse_first(self.host_conflicts())
        kind = self.activation_checkpointing
        if kind not in ("none", "full", "selective") and not checkpoint_interval(kind):
            raise ValueError(
                f"parallel.activation_checkpointing={kind}: choose none, full, selective or a "
                "number k of 1 or more, for each k-th block"
            )

    def host_conflicts(self):
        """(whether it is so, text) of each way in which what waits on the host cannot."""
        kind, key = self.activation_checkpointing, f"parallel.swap_blocks={self.swap_blocks}"
        yield (
            self.activation_offload and kind in ("none", "selective"),
            f"parallel.activation_offload=true keeps the inputs of checkpointed blocks, and "
            f"parallel.activation_checkpointing={kind}: set it to full or to a number",
        )
        yield (
            self.swap_blocks and kind != "full",
            f"{key} needs parallel.activation_checkpointing=full: a block's backward computes its "
            "forward again while its weights are there",
        )
        yield (
            self.swap_blocks and self.tp > 1,
            f"{key} streams whole blocks, and parallel.tp={self.tp} splits them: leave one out",
        )
        yield (
            self.swap_blocks and self.cpu_offload,
            f"{key} and parallel.cpu_offload=true both keep weights in host memory: leave one out",
        )

    def sizes(self):
        """(dp_replicate, dp_shard, cp, tp), with -1 filled in: of dp_replicate, which
        `mesh.settle_copies` replaces, with 1, unless dp_shard says how many it takes.

        Raises `ValueError` unless their product is the number of ranks.
        """
        if self.dp_replicate == 0:
            raise ValueError("parallel.dp_replicate=0: set 1 or more copies, or -1")
        ranks, replicate = world_size(), self.dp_replicate
        if replicate == -1:
            copy = self.dp_shard * self.cp * self.tp
            replicate = ranks // copy if copy > 0 and ranks % copy == 0 else 1
        product = replicate * self.cp * self.tp
        fixed = {"dp_replicate": replicate, "cp": self.cp, "tp": self.tp}
        shown = " x ".join(f"{name}={value}" for name, value in fixed.items() if value > 1)
        if ranks == 1 and product > 1:
            raise ValueError(
                f"parallel.{shown} needs {product} processes or a multiple: torchrun "
                f"--nproc_per_node {product} train.py …"
            )
        if ranks % product:
            raise ValueError(
                f"parallel.{shown} does not divide the {ranks} processes: the product of "
                f"dp_replicate, cp and tp must be one of {list_divisors(ranks)}"
            )
        if self.dp_shard not in (-1, ranks // product):
            raise ValueError(
                f"parallel.dp_shard={self.dp_shard}{f' x {shown}' if shown else ''} is not the "
                f"number of processes, {ranks}: "
                f"set parallel.dp_shard={ranks // product} or -1"
            )
        return replicate, ranks // product, self.cp, self.tp

    def check_model(self, shape, num_text_tokens, num_image_tokens):
        """Raise `ValueError` where a model of `shape` does not divide among the ranks.

        That is its heads, its blocks, or the tokens of its text and its pictures.
        """
        if shape.num_heads % (self.tp * self.cp):
            raise ValueError(
                f"parallel.tp={self.tp} x parallel.cp={self.cp} does not divide "
                f"model.num_heads={shape.num_heads}: "
                f"their product must be one of {list_divisors(shape.num_heads)}"
            )
        blocks = shape.num_double_blocks + shape.num_single_blocks
        if checkpoint_interval(self.activation_checkpointing) > max(blocks, 1):
            raise ValueError(
                f"parallel.activation_checkpointing={self.activation_checkpointing}: there are "
                f"{blocks} blocks"
            )
        if self.swap_blocks > blocks:
            raise ValueError(f"parallel.swap_blocks={self.swap_blocks}: there are {blocks} blocks")
        self.check_shares(num_text_tokens, num_image_tokens)

    def check_shares(self, num_text_tokens, num_image_tokens):
        """Raise `ValueError` where tokens do not divide among the ranks that share them."""
        parts, what = self.cp, "parallel.cp"
        if self.sequence_parallel:
            parts, what = self.cp * self.tp, "parallel.cp x parallel.tp (sequence_parallel)"
        counts = {
            "model.max_sequence_length": num_text_tokens,
            "image tokens, of height x width,": num_image_tokens,
        }
        for name, count in counts.items():
            if count % parts:
                raise ValueError(
                    f"{count} {name} do not divide among {what} = {parts} ranks: choose a multiple "
                    f"of {parts}"
                )

    def check_float8(self, config, tokens):
        """Raise `ValueError` where a `TrainConfig` cannot be trained as `float8` says.

        `tokens` are the numbers of text and image tokens of a sample.
        """
        if self.float8 == "none":
            return
        key, micro = f"parallel.float8={self.float8}", config.data.micro_batch
        refuse_first(float8_conflicts(key, config.device, config.dtype, config.model.hidden_size))
        common = math.gcd(*tokens) // self.cp  # both streams' products are over tokens
        if common * micro % FLOAT8_MULTIPLE:
            raise ValueError(
                f"{key} needs micro-batches of a multiple of {FLOAT8_MULTIPLE} text and image "
                f"tokens on a rank, and {micro} x {tokens[0]} and {micro} x {tokens[1]} are not: "
                f"set data.micro_batch={FLOAT8_MULTIPLE // math.gcd(common, FLOAT8_MULTIPLE)}"
            )


@dataclass
class SharingConfig:
    """How many processes draw a picture together, and how; others draw others."""

    tp: int = same_option(ParallelConfig, "tp")
    cp: int = option(
        1,
        "context-parallel ranks, which share the tokens of a picture (Ulysses)",
        at_least=1,
        at_most=MAX_RANKS,
    )
    cfg: int = option(
        1, "2: the two passes of true_cfg, each on ranks of its own", at_least=1, at_most=2
    )
    timeout_s: int = option(
        600,
        "seconds after which ranks of one picture that wait for each other give up",
        at_least=1,
        at_most=1_000_000,
    )

    @property
    def ranks(self):
        """Ranks of a picture."""
        return self.cfg * self.cp * self.tp

    def validate(self):
        """Raise `ValueError` unless the processes are whole groups."""
        shared = [(name, getattr(self, name)) for name in ("tp", "cp", "cfg")]
        shown = " x ".join(f"parallel.{name}={value}" for name, value in shared if value > 1)
        if world_size() % self.ranks:
            raise ValueError(
                f"{shown} needs {self.ranks} processes or a multiple, and there are "
                f"{world_size()}: torchrun --nproc_per_node {self.ranks} infer.py …"
            )


def list_divisors(count):
    """The divisors of a number, as an error lists them."""
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
