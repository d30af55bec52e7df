"""Is a ControlNet learning? Measured on fixed held-out pairs and noise, a few times in the first
minutes and then all along.

The loss with each picture's own control is compared with the loss under another picture's control,
sample by sample: a net that follows its control does better with the right one. The loss without
any control says what the frozen transformer does alone. The size of what the net adds after each
block of the transformer, beside that block's output, shows blocks that are dead.

B samples, L tokens, H hidden width.
"""

import logging
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from fluxlite.cli.messages import warn_for_all
from fluxlite.train.plots import plot_control
from fluxlite.train.training_step import fixed_draws, flow_loss

log = logging.getLogger("fluxlite")

METER_T = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
CONTROL_KINDS = {
    "right": "right",
    "shuffled": "another's",
    "none": "none",
}  # of controls, and in the log
# standard errors by which the right control must be better: of 64 samples once in 10,000 looks by
# chance, of 8 in 400
Z = 4.0
GAIN = 0.003  # and by this share of the loss
DOUBT = 2.0  # standard errors below which a gain may be none at all
DEAD = 1e-6  # of the hidden state's norm


@dataclass
class ControlMeter:
    """Looks at a run with `measure(step)`, and keeps the last verdict: "learning", "not yet" or
    "not learning".
    """

    run: object
    held_out: list  # of `HeldOutBatch`
    every: int = 1  # steps between two measurements
    plot: Callable = plot_control  # (folder): draws what was measured so far
    verdict: str = "not yet"
    alone: list | None = None  # losses without control, which never change

    @torch.no_grad()
    def measure(self, step):
        """{name: value} of all that was measured, for the metrics; logs one line, and loudly where
        nothing happens. Collective.
        """
        self.run.model.eval()
        losses, differences = self.compare_controls()
        self.alone = losses["none"]
        self.run.model.train()
        gain, z = paired_gain(differences, losses["right"])
        means = {kind: sum(by_t) / len(by_t) for kind, by_t in losses.items()}
        ratios, before = self.residual_ratios(), self.verdict
        self.verdict = judge_gain(gain, z, step, self.run.config.controlnet.patience)
        log_verdict(step, self.verdict, means, gain, z)
        if self.verdict == "not learning" != before:
            warn_of_no_effect(step, ratios)
        values = {f"control/{kind}": mean for kind, mean in means.items()}
        values |= {"control/gain": gain, "control/z": z}
        for kind, by_t in losses.items():
            values |= {f"control/{kind}_t{t:.3f}": loss for t, loss in zip(METER_T, by_t)}
        return values | {f"control/residual_{name}": ratio for name, ratio in ratios.items()}

    def compare_controls(self):
        """Losses {"right", "shuffled", "none": one for each of METER_T}, and (count, sum, sum of
        squares) of each sample's gain.
        """
        run, first = self.run, 0
        kinds = [kind for kind in CONTROL_KINDS if kind != "none" or not self.alone]
        sums = torch.zeros(len(kinds), len(METER_T), device=run.device)
        gains = torch.zeros(3, device=run.device)
        others = torch.cat([held.inputs["hint"] for held in self.held_out])[self.partners()]
        for held in self.held_out:
            shuffled = held.inputs | {"hint": others[first : first + len(held.x0)]}
            first += len(held.x0)
            losses = self.losses_by_time(held, (held.inputs, shuffled, {})[: len(kinds)])
            sums += (losses * held.weights).sum(dim=-1)
            gain = (losses[1] - losses[0]).mean(dim=0)
            powers = torch.stack([torch.ones_like(gain), gain, gain.square()])
            gains += (powers * held.weights).sum(dim=-1)
        dist.all_reduce(sums)
        dist.all_reduce(gains)
        repeats = run.mesh.tp.size() * run.mesh.cp.size()  # ranks that have the same samples
        found = dict(zip(kinds, (sums / gains[0]).tolist()))
        return {"none": self.alone} | found, (gains / repeats).tolist()

    def losses_by_time(self, held, controls):
        """The losses (controls, METER_T, B) of a `HeldOutBatch` under each of the controls."""
        run, rows = self.run, []
        drawn = fixed_draws(run, held.indices, "meter")
        for given in controls:
            for time in METER_T:
                t = torch.full((len(held.x0),), time, device=run.device)
                rows.append(flow_loss(run, *held.clean, t=t, **drawn, **given))
        return torch.stack(rows).unflatten(0, (len(controls), len(METER_T)))

    def partners(self):
        """For each of this rank's samples the place of another one, the one before it unless that
        is the same (padding repeats).
        """
        numbers = torch.cat([held.indices for held in self.held_out]).tolist()
        return [other_place(numbers, place) for place in range(len(numbers))]

    def residual_ratios(self):
        """Norm of what is added after each block of the transformer over that of its output:
        {"double_0": ratio, …}, at t = 0.5.
        """
        held = self.held_out[0]
        half = torch.full((len(held.x0),), 0.5, device=held.x0.device)
        drawn = fixed_draws(self.run, held.indices, "meter")
        with block_norms(self.run.flux) as (found, added):
            flow_loss(self.run, *held.clean, t=half, **drawn, **held.inputs)
        pairs = torch.stack([torch.stack([added[name], found[name]]).square() for name in added])
        dist.all_reduce(pairs)
        return {name: math.sqrt(a / max(b, 1e-30)) for name, (a, b) in zip(added, pairs.tolist())}


def other_place(numbers, place):
    """The nearest place before `place`, around the end too, with another number; else itself."""
    around = [place - k for k in range(1, len(numbers))]
    return next((other for other in around if numbers[other] != numbers[place]), place)


@contextmanager
def block_norms(flux):
    """Norms seen in a forward of the transformer: of each block's output and of what is added to
    it, ({"double_0": norm}, the same).
    """
    found, added, hooks = {}, {}, []

    def keep_output(name, _module, _args, out):
        found[name] = (out[0] if isinstance(out, tuple) else out).float().norm()

    def keep_residuals(_module, _args, kwargs):
        for kind, tensors in zip(("double", "single"), kwargs["residuals"]):
            added.update({f"{kind}_{i}": tensor.float().norm() for i, tensor in enumerate(tensors)})

    for kind, blocks in (("double", flux.double_blocks), ("single", flux.single_blocks)):
        for i, block in enumerate(blocks):
            hooks.append(block.register_forward_hook(partial(keep_output, f"{kind}_{i}")))
    hooks.append(flux.register_forward_pre_hook(keep_residuals, with_kwargs=True))
    try:
        yield found, added
    finally:
        for hook in hooks:
            hook.remove()


def paired_gain(differences, right):
    """(gain, z): by which share of the loss the right control is better than another's, and by how
    many standard errors.
    """
    count, total, squares = differences
    mean = total / count
    variance = max(squares / count - mean**2, 0.0) * count / max(count - 1, 1)
    loss = sum(right) / len(right)
    return mean / loss, mean / math.sqrt(variance / count) if variance > 0 else 0.0


def judge_gain(gain, z, step, patience):
    """The verdict on a gain of so many standard errors at a step; what is between the two is "not
    yet", however late.
    """
    if z > Z and gain > GAIN:
        return "learning"
    return "not learning" if step >= patience and (z < DOUBT or gain < GAIN) else "not yet"


def log_verdict(step, verdict, means, gain, z):
    """One line on how it goes."""
    shown = ", ".join(f"{means[kind]:.4f} {name}" for kind, name in CONTROL_KINDS.items())
    worse = ", worse than none yet" if means["right"] > means["none"] else ""
    values = verdict, shown, 100 * gain, z, worse
    log.info("step %d, control: %s; loss %s (gain %.2f %%, z %.1f%s)", step, *values)


def warn_of_no_effect(step, ratios):
    """Say loudly that nothing happens, with the blocks that add nothing."""
    warn_for_all(
        "step %d: THE CONTROL HAS NO EFFECT. Are the control pictures blank or all alike, do "
        "they belong to their targets, "
        "is optim.lr too low, is controlnet.dropout near 1?",
        step,
    )
    dead = ", ".join(name for name, ratio in ratios.items() if ratio < DEAD)
    if dead:
        warn_for_all("step %d: nothing is added after the transformer's blocks %s", step, dead)
