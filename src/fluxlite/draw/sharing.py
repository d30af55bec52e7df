"""Drawing by several processes: whole batches are dealt to groups of ranks, in the order of one
process, and the ranks of a group share each picture of theirs.

    torchrun --nproc_per_node 4 infer.py prompt_file=prompts.txt parallel.tp=2   # two groups of two

The first rank of a group, which leads it, decodes and saves. Rank 0 encodes the prompts for all.
"""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from fluxlite import parallel
from fluxlite.cli.messages import warn_for_all
from fluxlite.data.transfers import send_tensor
from fluxlite.nets.latents import num_image_tokens
from fluxlite.nets.quantized import quantize_conflicts

REMEDY = "Pictures that are finished are saved; jobs= goes on with the others."


@dataclass
class Sharing:
    """What this process draws, and with whom; of one process everything, alone.

    `mesh` and `everyone` are those of `parallel.share_ranks`, `dealt` how many batches all groups
    have got.
    """

    mesh: DeviceMesh | None = None
    everyone: object = None
    dealt: int = 0

    def part(self, way):
        """The ranks that share a picture in a way, cfg, cp or tp; None where this one is alone."""
        return self.mesh[way] if self.mesh is not None and self.mesh[way].size() > 1 else None

    def size(self, way):
        """How many they are."""
        return 1 if self.mesh is None else self.mesh[way].size()

    @property
    def group(self):
        """The number of this rank's group."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("groups")

    @property
    def leads(self):
        """Whether this rank speaks for its group."""
        return self.mesh is None or not any(self.mesh.get_coordinate()[1:])

    def deal(self, batches):
        """Those of some batches that this group draws: they go to all groups in turn, and so do
        those of the next call.
        """
        groups, first = self.size("groups"), self.dealt
        self.dealt += len(batches)
        return [batch for n, batch in enumerate(batches, first) if n % groups == self.group]

    def first_does(self, work) -> object:
        """What `work()` returns on rank 0, on every rank; collective."""
        if self.mesh is None:
            return work()
        return parallel.first_rank_does(work, self.everyone)

    def first_makes(self, make, device):
        """The tensors that `make()` returns on rank 0, on every rank's device; collective."""
        if self.mesh is None:
            return make()
        made = self.first_does(lambda: [x.cpu() for x in make()])
        return tuple(send_tensor(x, device) for x in made)

    def gather_drawn(self, drawn):
        """On rank 0 the pictures of all ranks, by number, of {number: picture} of each; collective.
        On others none.
        """
        if self.mesh is None:
            return drawn
        found = {}
        for own in parallel.gather_on_first(drawn, self.everyone) or ():
            found |= own
        return dict(sorted(found.items()))

    def compute(self, passes) -> list:
        """What some functions return, on all ranks of a picture, each called on its rank of cfg."""
        ranks = self.part("cfg")
        return [one() for one in passes] if ranks is None else parallel.compute_apart(ranks, passes)


def join_sharing(config, device):
    """The `Sharing` of this process among those that torchrun has started, by a `SharingConfig`."""
    if parallel.world_size() == 1:
        return Sharing()
    return Sharing(*parallel.share_ranks(config, device))


def warn_idle(sharing, count, batch):
    """Say where so many pictures are too few batches for all groups."""
    batches, groups = -(-count // batch), sharing.size("groups")
    if batches < min(groups, count):
        text = "%d pictures at batch=%d leave some of %d groups of ranks without work: set batch=%d"
        warn_for_all(text, *(count, batch, groups, max(1, count // groups)))


# --- what cannot be shared ------------------------------------------------------------------------


def split_conflicts(sharing, config, shape):
    """(whether it is so, text) of each way in which a `PipelineConfig` and a `FluxConfig` cannot be
    drawn with by the ranks of a picture.
    """
    tp, cp = sharing.size("tp"), sharing.size("cp")
    split = f"parallel.tp={tp} splits"
    yield (
        shape.num_heads % (tp * cp),
        f"parallel.tp={tp} x parallel.cp={cp} does not divide the {shape.num_heads} heads of "
        f"model.checkpoint={config.model.checkpoint}: choose others",
    )
    yield (
        tp > 1 and config.float8,
        f"{split} weights, which float8=true rounds whole: leave one of them out, or take "
        "model.quantize=float8",
    )
    yield (
        tp > 1 and config.offload == "all",
        f"{split} blocks, which offload=all streams whole: set offload=text",
    )
    yield (
        tp > 1 and not config.lora.merge,
        f"{split} weights, and lora.merge=false keeps LoRAs whole beside them: leave that out",
    )
    yield (
        sharing.mesh is not None and ":" in config.device,
        f"device={config.device}: each process has a GPU of its own: name device=cuda",
    )
    yield from quantize_conflicts(config.model.quantize, shape.hidden_size, tp)


def picture_conflicts(sharing, sample, cells, redux):
    """The same of a `SampleConfig`, (height, width) in latent cells of a picture and its
    references, and redux pictures.
    """
    cp, tokens = sharing.size("cp"), sum(num_image_tokens(*one) for one in cells)
    counts = {"max_sequence_length": sample.max_sequence_length}
    counts["image tokens, of height= x width= and reference=,"] = tokens
    yield (
        sharing.size("cfg") > 1 and not sample.true_cfg > 1,
        f"parallel.cfg=2 shares the two passes of true_cfg, which is {sample.true_cfg}: set it "
        "above 1, or leave parallel.cfg out",
    )
    yield (
        cp > 1 and redux,
        f"parallel.cp={cp} does not share the tokens of redux=: choose parallel.tp instead",
    )
    for name, count in counts.items():
        yield (
            count % cp,
            f"{count} {name} do not divide among parallel.cp={cp} ranks: choose a multiple of {cp}",
        )
