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
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fluxlite import rng
from fluxlite.nets import flow
from fluxlite.nets.latents import pack_latents

log = logging.getLogger("fluxlite")

TIMES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
# standard errors by which the right control must be better: of 64 samples once in 10,000 looks by
# chance, of 8 in 400
Z = 4.0
GAIN = 0.003  # and by this share of the loss
DOUBT = 2.0  # standard errors below which a gain may be none at all
DEAD = 1e-6  # of the hidden state's norm


@dataclass
class Meter:
    """Looks at a run with `look(step)`, and keeps the last verdict: "learning", "not yet" or "not
    learning".
    """

    run: object
    held_out: list
    # (x0, txt, pooled, *, noise, t, guidance, **steer) → (B,), the trainer's `flow_loss` for this
    # run
    losses_of: object
    verdict: str = "not yet"
    alone: list | None = None  # losses without control, which never change

    @torch.no_grad()
    def look(self, step):
        """{name: value} of all that was measured, for the metrics; logs one line, and loudly where
        nothing happens. Collective.
        """
        self.run.model.eval()
        losses, differences = self.measure()
        self.alone = losses["none"]
        self.run.model.train()
        gain, z = significance(differences, losses["right"])
        means = {kind: sum(by_t) / len(by_t) for kind, by_t in losses.items()}
        before, self.verdict = (
            self.verdict,
            judge(gain, z, step, self.run.config.controlnet.patience),
        )
        ratios = self.ratios()
        report(
            step,
            self.verdict,
            means,
            gain,
            z,
            ratios,
            loudly=self.verdict == "not learning" != before,
        )
        values = {f"control/{kind}": mean for kind, mean in means.items()} | {
            "control/gain": gain,
            "control/z": z,
        }
        values |= {
            f"control/{kind}_t{t:.3f}": loss
            for kind, by_t in losses.items()
            for t, loss in zip(TIMES, by_t)
        }
        return values | {f"control/residual_{name}": ratio for name, ratio in ratios.items()}

    def measure(self):
        """Losses {"right", "shuffled", "none": one for each of TIMES}, and (count, sum, sum of
        squares) of each sample's gain.
        """
        kinds, device = ("right", "shuffled") + (() if self.alone else ("none",)), self.run.device
        sums, gains = (
            torch.zeros(len(kinds), len(TIMES), device=device),
            torch.zeros(3, device=device),
        )
        count = torch.zeros((), device=device)
        hints = torch.cat([steer["hint"] for *_, steer, _, _ in self.held_out])
        others, first = hints[self.partners()], 0
        for x0, txt, pooled, steer, indices, weights in self.held_out:
            noise = pack_latents(
                rng.normal(self.run.latent_shape, seed=0, indices=indices, stream="meter")
            ).to(device)
            guidance = torch.full((len(x0),), self.guidance(), device=device)
            shuffled = steer | {"hint": others[first : first + len(x0)]}
            first += len(x0)
            gain = torch.zeros(len(x0), device=device)
            for k, time in enumerate(TIMES):
                t = torch.full((len(x0),), time, device=device)
                found = [
                    self.losses_of(x0, txt, pooled, noise=noise, t=t, guidance=guidance, **given)
                    for given in (steer, shuffled, {})[: len(kinds)]
                ]
                sums[:, k] += torch.stack([(losses * weights).sum() for losses in found])
                gain += (found[1] - found[0]) / len(TIMES)
            count += weights.sum()
            gains += torch.stack(
                [weights.sum(), (gain * weights).sum(), (gain.square() * weights).sum()]
            )
        for tensor in (sums, count, gains):
            dist.all_reduce(tensor)
        repeats = (
            self.run.mesh.tp.size() * self.run.mesh.cp.size()
        )  # ranks that have the same samples
        return {"none": self.alone} | {k: (row / count).tolist() for k, row in zip(kinds, sums)}, (
            gains / repeats
        ).tolist()

    def partners(self):
        """For each of this rank's samples the place of another one, the one before it unless that
        is the same (padding repeats).
        """
        numbers = [number for *_, indices, _ in self.held_out for number in indices.tolist()]
        return [
            next((p - k for k in range(1, len(numbers)) if numbers[p - k] != numbers[p]), p)
            for p in range(len(numbers))
        ]

    def guidance(self):
        low, high = flow.guidance_range(self.run.config.flow.guidance)
        return (low + high) / 2

    def ratios(self):
        """Norm of what is added after each block of the transformer over that of its output:
        {"double_0": ratio, …}, at t = 0.5.
        """
        x0, txt, pooled, steer, indices, _ = self.held_out[0]
        found, added = {}, {}
        base = self.run.base

        def record(name):
            def hook(_module, _args, out):
                found[name] = (out[0] if isinstance(out, tuple) else out).float().norm()

            return hook

        def keep(_module, _args, kwargs):
            for kind, tensors in zip(("double", "single"), kwargs["residuals"]):
                added.update(
                    {f"{kind}_{i}": tensor.float().norm() for i, tensor in enumerate(tensors)}
                )

        blocks = {f"double_{i}": b for i, b in enumerate(base.double_blocks)} | {
            f"single_{i}": b for i, b in enumerate(base.single_blocks)
        }
        hooks = [block.register_forward_hook(record(name)) for name, block in blocks.items()]
        hooks.append(base.register_forward_pre_hook(keep, with_kwargs=True))
        noise = pack_latents(
            rng.normal(self.run.latent_shape, seed=0, indices=indices, stream="meter")
        ).to(x0.device)
        half = torch.full((len(x0),), 0.5, device=x0.device)
        try:
            guidance = torch.full_like(half, self.guidance())
            self.losses_of(x0, txt, pooled, noise=noise, t=half, guidance=guidance, **steer)
        finally:
            for hook in hooks:
                hook.remove()
        pairs = torch.stack([torch.stack([added[name], found[name]]).square() for name in added])
        dist.all_reduce(pairs)
        return {name: math.sqrt(a / max(b, 1e-30)) for name, (a, b) in zip(added, pairs.tolist())}


def significance(differences, right):
    """(gain, z): by which share of the loss the right control is better than another's, and by how
    many standard errors.
    """
    count, total, squares = differences
    mean = total / count
    variance = max(squares / count - mean**2, 0.0) * count / max(count - 1, 1)
    loss = sum(right) / len(right)
    return mean / loss, mean / math.sqrt(variance / count) if variance > 0 else 0.0


def judge(gain, z, step, patience):
    """The verdict on a gain of so many standard errors at a step; what is between the two is "not
    yet", however late.
    """
    if z > Z and gain > GAIN:
        return "learning"
    return "not learning" if step >= patience and (z < DOUBT or gain < GAIN) else "not yet"


def report(step, verdict, means, gain, z, ratios, *, loudly):
    """One line on how it goes; `loudly`, once, that nothing happens, with the blocks that add
    nothing.
    """
    shown = ", ".join(
        f"{means[kind]:.4f} {name}"
        for kind, name in (("right", "right"), ("shuffled", "another's"), ("none", "none"))
    )
    worse = ", worse than none yet" if means["right"] > means["none"] else ""
    log.info(
        "step %d, control: %s; loss %s (gain %.2f %%, z %.1f%s)",
        step,
        verdict,
        shown,
        100 * gain,
        z,
        worse,
    )
    if loudly and dist.get_rank() == 0:
        log.warning(
            "step %d: THE CONTROL HAS NO EFFECT. Are the control pictures blank or all alike, do "
            "they belong to their targets, "
            "is optim.lr too low, is controlnet.dropout near 1?",
            step,
        )
        dead = [name for name, ratio in ratios.items() if ratio < DEAD]
        if dead:
            log.warning(
                "step %d: nothing is added after the transformer's blocks %s", step, ", ".join(dead)
            )
