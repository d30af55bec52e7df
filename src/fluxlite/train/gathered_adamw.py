"""torch's fused AdamW with its tensors gathered once.

torch gathers weights, moments and counts anew in each step. On the host that takes longer than the
step itself, and each list of DTensors passes DTensor's dispatch. A step is element by element:
parts of ranks, which stay where they are, need none.
"""

import torch

from fluxlite.nets.quantized import local_values

MOMENTS = "exp_avg", "exp_avg_sq"


class GatheredAdamW(torch.optim.AdamW):
    """AdamW whose steps are bit for bit those of torch's `fused=True`, on any mesh."""

    def __init__(self, groups, **options):
        super().__init__(groups, fused=True, **options)
        self.with_gradient = None  # whether each parameter had one when its tensors were gathered

    def load_state_dict(self, state_dict):
        """As torch's; the new state is gathered in the next step."""
        super().load_state_dict(state_dict)
        self.with_gradient = None

    @torch.no_grad()
    def step(self, closure=None):
        """As torch's, `found_inf` and `grad_scale` too. A first step is torch's own, which makes
        the state.
        """
        found = [p.grad is not None for group in self.param_groups for p in group["params"]]
        if closure is not None or found != self.with_gradient:
            loss = super().step(closure)
            self.with_gradient = found
            self.gathered = [self.gather_parts(group["params"]) for group in self.param_groups]
            return loss
        for group, gathered in zip(self.param_groups, self.gathered):
            if gathered:
                self.step_parts(group, *gathered)

    def gather_parts(self, parameters):
        """(parameters with a gradient, this rank's parts of them, of their two moments, and the
        counts of their steps), or None without any.
        """
        live = [p for p in parameters if p.grad is not None]
        names = *MOMENTS, "step"
        held = ([local_values(self.state[p][name]) for p in live] for name in names)
        return (live, [*map(local_values, live)], *held) if live else None

    def step_parts(self, group, live, parts, means, squares, steps):
        """torch's fused kernel on gathered parts of a group."""
        gradients, (beta1, beta2) = [local_values(p.grad) for p in live], group["betas"]
        flags = {name: getattr(self, name, None) for name in ("found_inf", "grad_scale")}
        device = parts[0].device
        flags = {n: f if f is None else f.to(device, non_blocking=True) for n, f in flags.items()}
        # not a number, of which a CPU would make a tensor for each of them
        torch._foreach_add_(steps, [torch.ones_like(steps[0])] * len(steps))
        names = "lr", "weight_decay", "eps", "amsgrad", "maximize"
        about = {name: group[name] for name in names} | dict(beta1=beta1, beta2=beta2)
        torch._fused_adamw_(parts, gradients, means, squares, [], steps, **about, **flags)
        if flags["found_inf"] is not None:
            torch._foreach_sub_(steps, [flags["found_inf"]] * len(steps))
