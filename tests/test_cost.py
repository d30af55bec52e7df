"""`benchmarks/cost.py`: its rules on single operators, and the counts of whole depth."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import __version__ as diffusers_version

from benchmarks.cost import (
    KernelCount,
    add_up,
    count_graphs,
    count_model,
    dispatch_as_cuda,
    measure_blocks,
    measure_compiled_blocks,
)
from fluxlite.nets.configs import FluxConfig

SIZES = dict(batch=1, side=1024, text=512)
FIGURES = {  # kernels and GB forward, kernels and GB backward, GB saved: none, selective, full
    "ours": (1520, 73.8, 3648, 129.2, 31.3, 17.8, 1.6),
    "diffusers": (2584, 143.7, 4389, 180.9, 32.4, 16.7, 1.6),
}


@pytest.mark.parametrize("who", FIGURES)
def test_counts_of_flux_dev_are_the_known_ones(who):
    if who == "diffusers" and diffusers_version != "0.42.1":
        pytest.skip(f"counted with diffusers 0.42.1, not {diffusers_version}")
    found = count_model(who, "cudnn", **SIZES)
    names = "forward_kernels", "forward_bytes", "backward_kernels", "backward_bytes"
    names += tuple(f"saved_bytes_{kind}" for kind in ("none", "selective", "full"))
    values = (found[n] if n.endswith("kernels") else round(found[n] / 1e9, 1) for n in names)
    assert tuple(values) == FIGURES[who]


def test_full_checkpointing_saves_the_tokens_alone():
    config = FluxConfig(1, 1, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6))
    sizes = dict(config=config, batch=2, side=64, text=5)
    none, selective, full = (
        measure_blocks("ours", "flash", kind, **sizes) for kind in ("none", "selective", "full")
    )
    for block in ("double", "single"):
        tokens = 2 * (5 + 16) * 48 * 2  # B · L · H in bf16
        assert full[block]["saved_bytes"] == tokens
        assert tokens < selective[block]["saved_bytes"] < none[block]["saved_bytes"]
        assert none[block]["forward_kernels"] == full[block]["forward_kernels"]
        assert none[block]["backward_kernels"] < full[block]["backward_kernels"]  # runs it again


COMPILED = {  # kernels and GB forward, kernels and GB backward, as inductor plans them for a CPU
    "none": (513, 37.5, 1254, 89.2),
    "selective": (513, 36.4, 1558, 112.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", COMPILED)
def test_counts_of_compiled_blocks_are_the_known_ones(checkpointing):
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"counted with torch 2.13, not {torch.__version__}")
    found = add_up(measure_compiled_blocks(checkpointing, **SIZES))
    names = "forward_kernels", "forward_bytes", "backward_kernels", "backward_bytes"
    values = (found[n] if n.endswith("kernels") else round(found[n] / 1e9, 1) for n in names)
    assert tuple(values) == COMPILED[checkpointing]


@pytest.mark.slow
def test_graphs_are_counted_without_breaks():
    assert count_graphs("selective") == {"graphs": [6, 14, 14], "breaks": 0}


def make_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


X, WEIGHT = make_meta(6, 8), make_meta(8)  # 192 and 32 bytes
RULES = {  # name: (what runs, kernels, bytes)
    "a view": (lambda: X.view(48)[3:].unsqueeze(0), 0, 0),
    "two operators": (lambda: (X + X).sum(), 2, 2 * 192 + 192 + 192 + 4),
    "a broadcast operand": (lambda: X + WEIGHT.expand(6, 8), 1, 192 + 32 + 192),
    "a change in place": (lambda: X.detach().mul_(2), 1, 192 + 192),
    "a fill": (lambda: torch.zeros_like(X), 1, 192),
    "an allocation": (lambda: torch.empty_like(X), 0, 0),
    "a product": (lambda: X @ X.T, 1, 0),
    "a norm": (lambda: F.rms_norm(X, (8,), WEIGHT), 1, 192 + 32 + 192 + 6 * 4),
    "a norm that copies": (
        lambda: F.rms_norm(X.T, (6,), WEIGHT[:6]),
        2,
        2 * 192 + 192 + 24 + 192 + 8 * 4,
    ),
    "a layer norm that copies": (
        lambda: F.layer_norm(X.T, (6,)),
        2,
        2 * 192 + 192 + 192 + 2 * 8 * 4,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_an_operator_is_counted_by_the_rules(name):
    run, kernels, size = RULES[name]
    with dispatch_as_cuda("cudnn"), KernelCount() as count:
        run()
    assert (count.kernels, count.rest_bytes) == (kernels, size)


@pytest.mark.parametrize("sdpa", ["cudnn", "flash"])
@pytest.mark.parametrize("token_major", [False, True])
def test_cudnn_copies_a_gradient_that_does_not_lie_as_the_output(sdpa, token_major):
    shape = (1, 16, 2, 8) if token_major else (1, 2, 16, 8)
    q, k, v = (make_meta(*shape, dtype=torch.bfloat16) for _ in range(3))
    if token_major:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with dispatch_as_cuda(sdpa):
        out = F.scaled_dot_product_attention(q, k, v)
        gradient = torch.empty(1, 16, 2, 8, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        with KernelCount() as count:
            out.backward(gradient)
    copies = sdpa == "cudnn" and not token_major
    assert out.stride() == q.stride()
    assert (count.kernels, count.rest_bytes) == (1 + copies, 2 * gradient.nbytes * copies)


def test_what_is_imitated_is_put_back():
    before = F.rms_norm, F.scaled_dot_product_attention
    with dispatch_as_cuda("flash"):
        assert F.rms_norm is not before[0] and F.scaled_dot_product_attention is not before[1]
    assert (F.rms_norm, F.scaled_dot_product_attention) == before
