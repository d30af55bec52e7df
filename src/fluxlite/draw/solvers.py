"""Solvers: ways to follow a velocity from one time to the next.

    x = sample_euler(velocity, x, times, callback)

x (B, L, C) float32 at times[0]; `velocity(x, i)` is that at times[i], of all times but the last.
`callback(i, x)` sees the x at times[i], from the first to the last, and gives the x to go on with.
Any function of this signature is a solver. The times lie on the host, where to look at them is to
wait for nothing.
"""

import math

from fluxlite.nets import flow


def sample_euler(velocity, x, times, callback=lambda step, x: x):
    """Euler's method, FLUX.1's own: one velocity a step."""
    x = callback(0, x)
    for i in range(len(times) - 1):
        x = callback(i + 1, flow.euler_step(x, velocity(x, i), times[i], times[i + 1]))
    return x


def sample_heun(velocity, x, times, callback=lambda step, x: x):
    """Heun's method: two velocities a step, but one in the last (arXiv 2206.00364, algorithm 1)."""
    x, last = callback(0, x), len(times) - 2
    for i in range(last + 1):
        first = velocity(x, i).float()
        ahead = flow.euler_step(x, first, times[i], times[i + 1])
        if i < last:
            mean = (first + velocity(ahead, i + 1).float()) / 2
            ahead = flow.euler_step(x, mean, times[i], times[i + 1])
        x = callback(i + 1, ahead)
    return x


def sample_dpmpp_2m(velocity, x, times, callback=lambda step, x: x):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) for x_t = (1 - t) * x0 + t * noise: one
    velocity a step, and the step before it. The first step, that from noise at 1 and the last one,
    to 0, are Euler's.
    """
    x, before = callback(0, x), None
    ratios = [log_ratio(t) for t in times.double().tolist()]
    for i in range(len(times) - 1):
        t, after = times[i], times[i + 1]
        clean = guess = x - t * velocity(x, i).float()  # the picture that x seems to lead to
        if i and math.isfinite(ratios[i - 1]) and math.isfinite(ratios[i + 1]):
            weight = (ratios[i + 1] - ratios[i]) / (ratios[i] - ratios[i - 1]) / 2
            guess = clean + weight * (clean - before)
        x, before = callback(i + 1, after / t * x + (1 - after / t) * guess), clean
    return x


def log_ratio(t):
    """The logarithm of signal over noise at time t: log((1 - t) / t)."""
    if 0 < t < 1:
        return math.log((1 - t) / t)
    return math.inf if t == 0 else -math.inf


SOLVERS = {"euler": sample_euler, "heun": sample_heun, "dpmpp_2m": sample_dpmpp_2m}
