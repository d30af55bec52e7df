"""A LoRA made of two checkpoints: what tuning changed, to the nearest of a rank.

Of each linear the difference is cut to its largest singular values (Eckart and Young: no other
matrix of that rank is nearer). What is left out is measured and said.
"""

from dataclasses import dataclass

import torch

from fluxlite.nets.lora import LowRank
from fluxlite.weights import conversion
from fluxlite.weights.lora_adapters import Adapter
from fluxlite.weights.lora_keys import adapter_rules
from fluxlite.weights.lora_writing import DIALECTS

EXACT_SIDE = 512  # the shorter side up to which all singular values are computed
OVERSAMPLED, POWER_STEPS = 16, 6  # of a randomised one (Halko, Martinsson and Tropp, 2011)


@dataclass
class Extracted:
    """Adapters of a transformer, and how much of the difference they leave out, by norms."""

    adapters: list
    difference: float  # ‖tuned − base‖ of the linears' weights
    left: float  # ‖tuned − base − ΔW‖
    others: float  # ‖tuned − base‖ of biases and norms, which a LoRA does not hold

    def describe(self):
        """One line."""
        share = self.left / self.difference if self.difference else 0.0
        return (
            f"{len(self.adapters)} linears; ‖tuned − base‖ {self.difference:.4g}, left out "
            f"{self.left:.4g} ({100 * share:.2f} %); biases and norms differ by {self.others:.4g}, "
            "which a LoRA does not hold"
        )


def extract_lora(base, tuned, rank, to="peft", dtype=torch.float32, progress=lambda count: None):
    """The `Extracted` adapters of two `Source`s of one shape; raises `ValueError`."""
    if base.config != tuned.config:
        raise ValueError(
            f"--extract {base.where} and --src {tuned.where} are transformers of different shapes"
        )
    layout = DIALECTS[to].layout
    rules = {rule.theirs[0]: rule for rule in adapter_rules(layout, base.config)}
    pairs = zip(
        conversion.convert_weights(base.read, base.layout, layout, base.config),
        conversion.convert_weights(tuned.read, tuned.layout, layout, base.config),
    )
    found, totals = [], {"difference": 0.0, "left": 0.0, "others": 0.0}
    for (name, old), (_, new) in pairs:
        change = new.float() - old.float()
        size = float(change.double().square().sum())
        progress(old.nbytes)
        if change.ndim != 2:
            totals["others"] += size
        elif size:
            form = nearest_low_rank(change, rank)
            totals["difference"] += size
            totals["left"] += float((change - form.dense()).double().square().sum())
            form = LowRank(*(factor.to(dtype) for factor in form))
            found.append(Adapter(rules[name], layout, form))
    if not found:
        raise ValueError("no linear differs between the two checkpoints")
    return Extracted(found, **{name: total**0.5 for name, total in totals.items()})


def nearest_low_rank(change, rank):
    """The `LowRank` nearest to a matrix; the singular values are shared by both factors."""
    rank = min(rank, *change.shape)
    if min(change.shape) <= EXACT_SIDE:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        torch.manual_seed(0)  # the same file each time
        wide = min(rank + OVERSAMPLED, *change.shape)
        u, s, v = torch.svd_lowrank(change, q=wide, niter=POWER_STEPS)
        vh = v.T
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * vh[:rank], u[:, :rank] * root)
