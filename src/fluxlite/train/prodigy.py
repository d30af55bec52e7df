"""Prodigy (arXiv 2306.06101), AdamW that finds its learning rate, by its authors' package."""

import torch

FOUND = "d", "d_max", "d_numerator", "k"  # numbers of a group, which a resumed run must have


def make_prodigy(groups, *, lr, betas, eps):
    """Their optimizer of whole tensors, which steps as torch's fused ones do: it looks at
    `found_inf` and `grad_scale`, for which the host waits, and keeps its numbers as tensors.
    """
    from prodigyopt import Prodigy

    class SteadyProdigy(Prodigy):
        @torch.no_grad()
        def step(self, closure=None):
            if getattr(self, "found_inf", None) is not None and self.found_inf.item():
                return
            scale = getattr(self, "grad_scale", None)
            for group in self.param_groups if scale is not None else ():
                if grads := [p.grad for p in group["params"] if p.grad is not None]:
                    torch._foreach_div_(grads, scale)
            recall_numbers(self)
            super().step(closure)
            keep_numbers(self)

    options = dict(safeguard_warmup=True, use_bias_correction=True)
    return SteadyProdigy(groups, lr=lr, betas=betas, eps=eps, **options)


def recall_numbers(optimizer):
    """Give the groups the numbers that the parameters' state has, as a checkpoint's does."""
    held = next((s["found"] for s in optimizer.state.values() if "found" in s), None)
    for group in optimizer.param_groups if held is not None else ():
        group.update(zip(FOUND, held.tolist()))


def keep_numbers(optimizer):
    """Put the groups' numbers into each parameter's state, in float32 as torch loads them."""
    group = optimizer.param_groups[0]
    held = torch.tensor([float(group[name]) for name in FOUND])
    for state in optimizer.state.values():
        state["found"] = held.clone()
