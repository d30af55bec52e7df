"""Losses over held-out samples, which are encoded once and measured with the same noise each
time.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fluxlite import parallel
from fluxlite.data.transfers import feed_device, send_tensor
from fluxlite.nets import flow
from fluxlite.train.training_step import encode_batch, fixed_draws, flow_loss


@dataclass
class HeldOutBatch:
    """Samples that are measured again and again, encoded: x0 (B, L, C), txt, pooled, the task's
    inputs, numbers of the samples and what each weighs (B,).
    """

    x0: torch.Tensor
    txt: torch.Tensor
    pooled: torch.Tensor
    inputs: dict
    indices: torch.Tensor
    weights: torch.Tensor

    @property
    def clean(self):
        """x0, txt, pooled: what `flow_loss` measures."""
        return self.x0, self.txt, self.pooled


@contextmanager
def averaged_weights(run):
    """The moving average in place of the weights, where there is one."""
    swap_average(run)
    try:
        yield
    finally:
        swap_average(run)


def swap_average(run):
    """Exchange weights and moving average."""
    if run.ema:
        run.ema.swap()
        parallel.reshard(run.model)


def encode_validation(run, dataset):
    """This rank's share of the validation set, encoded once: a list of `HeldOutBatch`.

    Every rank gets as many batches; the surplus samples of the last ones weigh nothing.
    """
    count, stride = run.config.data.val_count, run.mesh.dp_size * run.config.data.micro_batch
    rounded = -(-count // stride) * stride
    batches = []
    options = dict(draws=(), global_batch=stride, start_index=0, stop_index=rounded)
    for batch in feed_device(run.loader(dataset, **options), run.device):
        weights = send_tensor((batch["indices"] < count).float(), run.device)
        batches.append(HeldOutBatch(*encode_batch(run, batch), batch["indices"] % count, weights))
    return batches


@torch.no_grad()
def validation_losses(run, batches):
    """The loss at 8 fixed t with fixed noise, over the validation set: {"val/loss_t0.000": …,
    "val/loss": their mean}.

    With validation=round_robin sample i is measured at the i-th t alone, modulo 8, as MLPerf does:
    an eighth of the work.
    """
    run.model.eval()
    times = send_tensor(torch.tensor(flow.VALIDATION_T), run.device)
    sums = torch.zeros(2, len(times), device=run.device)  # of losses, and of samples
    for held in batches:
        drawn = fixed_draws(run, held.indices, "validation")
        for k in time_numbers(run, held.indices, len(times)):
            losses = flow_loss(run, *held.clean, t=times[k], **drawn, **held.inputs)
            sums.index_add_(1, k, torch.stack([losses * held.weights, held.weights]))
    run.model.train()
    dist.all_reduce(sums)
    losses = (sums[0] / sums[1]).tolist()
    by_t = {f"val/loss_t{t:.3f}": loss for t, loss in zip(flow.VALIDATION_T, losses)}
    return by_t | {"val/loss": sum(losses) / len(losses)}


def time_numbers(run, indices, count):
    """For each pass over some samples which of `count` times each is measured at: (B,) each."""
    if run.config.validation == "round_robin":
        return [send_tensor(indices % count, run.device)]
    return torch.arange(count, device=run.device)[:, None].expand(count, len(indices))
