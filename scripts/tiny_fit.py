"""The optimisation of the small parts of `assets/flux-tiny`, which `train.py` does not train.

A part of `make_tiny.py`.
"""

if __name__ == "__main__":
    print(f"{__doc__}\nRun scripts/make_tiny.py; its --help says how.")
    raise SystemExit

import math
import time

import torch


def cosine_schedule(progress, warmup):
    """The share of the peak learning rate at a progress in [0, 1]."""
    return min(1.0, progress / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fit_parameters(parameters, step, *, minutes, lr=2e-3, warmup=0.02, log_every=200):
    """AdamW with a cosine schedule over wall time; `step()` returns a loss.

    The parameters end as the mean of their last values.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    shadow = [p.detach().clone() for p in parameters]
    start, count = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = lr * cosine_schedule(progress, warmup)
        loss = step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        count += 1
        decay = min(0.995, (1 + count) / (10 + count))
        torch._foreach_lerp_(shadow, parameters, 1 - decay)
        if count % log_every == 0:
            line = f"{progress:5.1%} of {minutes:.1f} min, step {count}, loss {loss.item():.5f}"
            print(line, flush=True)
    with torch.no_grad():
        for p, mean in zip(parameters, shadow):
            p.copy_(mean)
