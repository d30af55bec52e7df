"""The optimizer, its schedule, clipping and the moving average of the weights."""

import fnmatch
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from fluxlite.cli.options import option
from fluxlite.parallel.dealing import collect_parts, deal_tensors
from fluxlite.parallel.weights import local_tensor
from fluxlite.train.gathered_adamw import GatheredAdamW
from fluxlite.train.prodigy import make_prodigy
from fluxlite.train.small_adamw import SmallAdamW, columns_of_block

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adamw8bit", "muon", "prodigy")
AT_ONCE = 1 << 24  # values of the matrices that Muon orthogonalises in one product
SWAPPED_AT_ONCE = 8  # weights and averages, of which copies are held meanwhile


@dataclass
class OptimConfig:
    """The optimizer and what surrounds it."""

    kind: str = option(
        "adamw",
        "adamw; adamw8bit: its moments in 8 bits, a quarter of their memory, lossy; muon: Muon "
        "for the blocks' matrices and AdamW for the rest; or prodigy: AdamW that finds its "
        "learning rate, of which lr is a share; needs prodigyopt",
        choices=OPTIMIZERS,
    )
    weights: str = option(
        "float32",
        "how trained weights lie: float32, or bfloat16, rounded stochastically: half the memory of "
        "weights and gradients, lossy",
        choices=("float32", "bfloat16"),
    )
    lr: float = option(1e-4, "peak learning rate", at_least=0, at_most=10)
    beta1: float = option(0.9, "AdamW's decay of the gradient's mean", at_least=0, below=1)
    beta2: float = option(0.95, "AdamW's decay of the gradient's square", at_least=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", at_least=0, at_most=1)
    momentum: float = option(
        0.95,
        "Muon's decay of the gradient's mean",
        at_least=0,
        below=1,
        only_with={"optim.kind": ("muon",)},
    )
    weight_decay: float = option(
        0.01,
        "decoupled weight decay of matrices; biases and norms have none",
        at_least=0,
        at_most=100,
    )
    warmup: int = option(500, "steps of linear warm-up", at_least=0, at_most=10**9)
    schedule: str = option("constant", "after the warm-up, down to min_lr_ratio", choices=SCHEDULES)
    min_lr_ratio: float = option(
        0.0,
        "where cosine and linear end, as a share of lr",
        at_least=0,
        at_most=1,
        only_with={"optim.schedule": SCHEDULES[1:]},
    )
    clip: float = option(
        1.0, "largest norm of the whole gradient; 0 for none", at_least=0, at_most=1e9
    )
    ema_decay: float = option(
        0.0,
        "decay of the moving average of the weights, 0 for none; it warms up",
        at_least=0,
        below=1,
    )
    nonfinite: str = option(
        "stop",
        "a step whose loss or gradient is not finite is not taken; then stop the run, or skip to "
        "the next step",
        choices=("stop", "skip"),
        resume=True,
    )
    trainable: list[str] = option(["*"], "name patterns of the parameters to train")
    freeze: list[str] = option([], "name patterns of parameters to freeze, after trainable")


def freeze_parameters(model, config):
    """Set `requires_grad` by the name patterns; raises `ValueError` for a pattern that matches
    nothing or if none is left.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in [*config.trainable, *config.freeze]:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"optim.trainable / optim.freeze: no parameter matches {pattern}; names look like "
                f"{names[len(names) // 2]}"
            )
    for name, parameter in model.named_parameters():
        chosen = any(fnmatch.fnmatchcase(name, p) for p in config.trainable)
        parameter.requires_grad_(
            chosen and not any(fnmatch.fnmatchcase(name, p) for p in config.freeze)
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("optim.trainable and optim.freeze leave nothing to train")


def muon_names(model, config):
    """Names of the parameters that Muon updates: with optim.kind=muon the blocks' matrices."""
    named = model.named_parameters() if config.kind == "muon" else ()
    return {name for name, p in named if p.requires_grad and p.ndim == 2 and "_blocks." in name}


def state_bytes(model, config):
    """{parameter: bytes that it takes with its gradient, optimizer and average}; of a frozen one
    its own.
    """
    in_muon, found = muon_names(model, config), {}
    for name, p in model.named_parameters():
        small = config.kind == "adamw8bit" and columns_of_block(p.shape)
        moments = 2 + 8 / small if small else 4 if name in in_muon else 8
        moments *= 1 + (config.kind == "prodigy")
        each = 2 * p.itemsize + moments + 4 * (config.ema_decay > 0)
        found[name] = p.numel() * each if p.requires_grad else p.nbytes
    return found


def make_optimizers(model, config, mesh=None):
    """The optimizers of the trainable parameters, a list: AdamW of a kind alone, or Muon for the
    blocks' matrices before it.

    Weight decay is on matrices only. All follow one learning rate. A sharded model is so over a
    `parallel.Mesh`.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_muon = muon_names(model, config)
    groups = {}
    for name, p in named.items():
        if name not in in_muon:  # a fused step takes tensors of one mesh and device
            key = p.ndim > 1, getattr(p, "device_mesh", None), p.device
            groups.setdefault(
                key, {"params": [], "weight_decay": config.weight_decay * (p.ndim > 1)}
            )["params"].append(p)
    options = dict(lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    if config.kind == "prodigy":
        return [make_prodigy(list(groups.values()), **options)]
    if config.kind == "adamw8bit" or config.weights == "bfloat16":
        numbers = {p: number for number, p in enumerate(model.parameters())}
        small = dict(bits=8 if config.kind == "adamw8bit" else 32, numbers=numbers)
        return [SmallAdamW(list(groups.values()), **options, **small)]
    optimizers = [GatheredAdamW(list(groups.values()), **options)] if groups else []
    if in_muon:
        matrices = [named[name] for name in named if name in in_muon]
        options = dict(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        optimizers.insert(0, Muon(matrices, mesh=mesh, **options))
    return optimizers


def orthogonalise_matrices(matrices, steps=5, dtype=torch.bfloat16):
    """Matrices (n, rows, columns), each with all its singular values moved to about 1, by
    Newton-Schulz iteration in `dtype`.

    The quintic's coefficients are those of Muon (Jordan et al., 2024), the steepest at zero that
    converge to within 0.3 of 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices (Jordan et al., 2024), scaled to
    AdamW's usual size (arXiv 2502.16982).

    Sharded matrices are dealt out over the ranks that share them: each is whole on one, which
    computes its update and sends the others their parts. That is exact on any mesh.
    """

    def __init__(self, parameters, *, lr, momentum, weight_decay, mesh=None):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.mesh = mesh

    @torch.no_grad()
    def step(self, closure=None):
        """One step; none where the tensor `found_inf`, if it is set, is 1. Gradients are divided by
        the tensor `grad_scale` first, if that is set. torch's fused optimizers do the same.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure")
        self.scale_gradients()
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            # those of a round cost the same
            found.sort(key=lambda p: (p.numel(), p.shape), reverse=True)
            while found:
                size = self.size_of_round(found)
                self.step_round(group, found[:size])
                del found[:size]

    def size_of_round(self, matrices):
        """How many of the matrices are stepped at once: of sharded ones as many as there are ranks
        to deal them to, of whole ones those of the first's shape, in one product if they are small.
        """
        first = matrices[0]
        if isinstance(first, DTensor):
            return self.mesh.shards.size()
        return max(1, sum(p.shape == first.shape for p in matrices[: AT_ONCE // first.numel()]))

    def step_round(self, group, matrices):
        """Update the matrices of a round."""
        means, grads = [], []
        for p in matrices:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            means.append(local_tensor(self.state[p]["momentum"]))
            grads.append(local_tensor(p.grad))
        moved = [mean.lerp(grad, 1 - group["momentum"]) for mean, grad in zip(means, grads)]
        updates = [grad.lerp(new, group["momentum"]) for grad, new in zip(grads, moved)]
        skipped = getattr(self, "found_inf", None)
        for p, mean, new, update in zip(matrices, means, moved, self.shared(matrices, updates)):
            stepped = local_tensor(p) * (1 - group["lr"] * group["weight_decay"])
            stepped.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
            replace_unless(skipped, mean, new)
            replace_unless(skipped, local_tensor(p), stepped)

    def shared(self, matrices, updates):
        """This rank's parts of the orthogonalised updates, each computed on one rank."""
        if not isinstance(matrices[0], DTensor):
            return orthogonalise_matrices(torch.stack(updates)).unbind()
        whole = deal_tensors(updates, matrices, self.mesh)
        if whole is not None:
            whole = orthogonalise_matrices(whole[None])[0]
        return collect_parts(whole, updates, matrices, self.mesh)

    def scale_gradients(self):
        """Divide this rank's parts of the gradients by `grad_scale`, in one pass."""
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups if scale is not None else ():
            parts = [local_tensor(p.grad) for p in group["params"] if p.grad is not None]
            if parts:
                torch._foreach_div_(parts, scale)


def replace_unless(skipped, old, new):
    """Write `new` into `old`, unless the tensor `skipped` is 1; the host does not wait for it."""
    old.copy_(new if skipped is None else torch.where(skipped.to(old.device) > 0, old, new))


def learning_rate(config, step, total_steps):
    """The learning rate of step 0, 1, …"""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, total_steps - config.warmup))
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def group_by_share(model):
    """[(share, parameters)] of what is trained, alike in `share_of_rank`, device and kind of
    tensor, vectors apart: biases and scales are more than half of all, and small.

    Norms of a group are taken by a few kernels, however many parameters it has.
    """
    ranks, groups = dist.get_world_size(), {}
    for p in model.parameters():
        if p.requires_grad:
            key = share_of_rank(p, ranks), p.device, isinstance(p, DTensor), p.ndim == 1
            groups.setdefault(key, []).append(p)
    return [(share, parameters) for (share, *_), parameters in groups.items()]


@torch.no_grad()
def gradient_norm(groups, loss=0.0):
    """The norm of the whole gradient, a tensor, of `group_by_share`'s groups. Collective.

    Where the gradient or the `loss` of a single rank is not finite, the norm is not on any rank.

    Parameters may lie on different meshes: each rank adds up its parts, a part that several ranks
    hold in equal shares.
    """
    devices = {parameters[0].device for _, parameters in groups}
    # of weights on two devices the host's optimizer needs it first, and must not read it too early
    device = min(devices, key=lambda device: device.type != "cpu")
    total = 0 * torch.as_tensor(loss, device=device)
    for share, parameters in groups:
        parts = local_gradients(parameters)
        if parts:
            total = total.add(sum_of_squares(parts).to(device), alpha=share)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.sqrt_()


def sum_of_squares(parts):
    """Of all values of tensors, vectors or none of them, in float32."""
    if parts[0].ndim == 1:
        values = torch.cat(parts).float()
    else:
        values = torch.stack(torch._foreach_norm(parts, dtype=torch.float32))
    return values.dot(values)


def local_gradients(parameters):
    """This rank's parts of the gradients of parameters that are all DTensors, or none of them."""
    if not isinstance(parameters[0], DTensor):
        return [gradient for p in parameters if (gradient := p.grad) is not None]
    found = [p for p in parameters if p.grad is not None]
    # where FSDP2 has nothing to reduce, what tensor parallelism left to be summed is not summed yet
    for p in found:
        if p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    return [p.grad.to_local() for p in found]


def clip_scale(norm, clip):
    """What a gradient of this norm is divided by, a tensor of at least 1, to have a norm of `clip`
    at most; None without clipping.
    """
    return ((norm + 1e-6) / clip).clamp(min=1.0) if clip else None


def share_of_rank(tensor, ranks):
    """This rank's share in its part of a tensor: one over the number of ranks that hold the
    same.
    """
    if not isinstance(tensor, DTensor):
        return 1 / ranks
    parts = [
        n
        for n, placement in zip(tensor.device_mesh.shape, tensor.placements)
        if not isinstance(placement, Replicate)
    ]
    return math.prod(parts) / ranks


class EMA:
    """A moving average of the trainable weights, sharded as they are, in float32."""

    def __init__(self, model, decay):
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.live.items()}
        self.pairs = self.pair_parts()  # which stay where they are

    @torch.no_grad()
    def update(self, step, skipped):
        """After optimizer step 0, 1, …: the decay rises as (1 + n) / (10 + n), so that the random
        start is forgotten.

        Where the tensor `skipped` is 1, nothing changes.
        """
        share = 1 - min(self.decay, (2 + step) / (11 + step))
        for averages, lives in self.pairs:
            # SGD that goes by `share` of live - average: one pass, which can be skipped on the
            # device, as no lerp can. By two minus signs, since torch's first CUDA kernel had
            # `maximize` turn the decay too
            torch._fused_sgd_(
                averages,
                lives,
                [],
                lr=-share,
                weight_decay=-1.0,
                maximize=False,
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                is_first_step=False,
                found_inf=skipped.to(averages[0].device),
            )

    @torch.no_grad()
    def pair_parts(self):
        """[(averages, live weights)], this rank's parts, for each device."""
        groups = {}
        for name, average in self.average.items():
            averages, lives = groups.setdefault(average.device, ([], []))
            averages.append(local_tensor(average))
            lives.append(local_tensor(self.live[name]))
        return [*groups.values()]

    @torch.no_grad()
    def swap(self):
        """Exchange the average and the live weights, in place; call it twice to have both back."""
        for averages, lives in self.pairs:
            for first in range(0, len(lives), SWAPPED_AT_ONCE):
                some = slice(first, first + SWAPPED_AT_ONCE)
                kept = [live.clone() for live in lives[some]]
                torch._foreach_copy_(lives[some], averages[some])
                torch._foreach_copy_(averages[some], kept)
