"""Every mesh computes the same run: losses, each parameter's gradient, and weights and averages after ten clipped steps.

The meshes run under torchrun (`meshes.py`); the reference is one process. All parameters are random, so that no gradient is zero.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# ‖Δ‖/‖reference‖: of the loss, of each gradient, of each parameter after ten steps. bfloat16 and Muon's iteration round.
BOUNDS = {"float32": (1e-6, 1e-5, 2e-5), "bfloat16": (2e-3, 5e-2, 1e-2), "muon": (1e-6, 1e-5, 2e-3)}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run_meshes(1, tmp_path_factory.mktemp("meshes"))


def run_meshes(ranks, folder, *names):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "tests/meshes.py"]
    result = subprocess.run([*launch, f"{folder}/{ranks}.pt", *names], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / f"{ranks}.pt")


def assert_same(figures, reference):
    for name, run in figures.items():
        kind = next((k for k in ("bfloat16", "muon") if k in name), "float32")
        expected = reference[f"one, {kind}" if kind != "float32" else "one, accumulation 1, shard_modulation true"]
        loss, gradient, weight = BOUNDS[kind]
        assert run["loss"] == pytest.approx(expected["loss"], rel=loss), name
        assert run["norm"] == pytest.approx(expected["norm"], rel=max(gradient, 2e-5)), name
        for key, bound in (("gradients", gradient), ("weights", weight), ("average", weight)):
            assert run[key].keys() == expected[key].keys()
            errors = {p: relative(run[key][p], expected[key][p]) for p in expected[key]}
            worst = max(errors, key=errors.get)
            assert errors[worst] <= bound, f"{name}: {key} of {worst} differ by {errors[worst]:.1e}"


def test_the_wrapped_model_has_the_gradients_of_plain_autograd(reference):
    plain = reference.pop("plain autograd")
    wrapped = reference["one, accumulation 1, shard_modulation true"]
    assert plain["loss"] == pytest.approx(wrapped["loss"], rel=1e-6)
    assert plain["gradients"].keys() == wrapped["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        assert gradient.norm() > 1e-3, name
        assert relative(wrapped["gradients"][name], gradient) < 1e-5, name
    assert_same(reference, reference)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_mesh_computes_the_same_run(reference, tmp_path, ranks):
    assert_same(run_meshes(ranks, tmp_path), reference)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_the_same_run(reference, tmp_path):
    assert_same(run_meshes(2, tmp_path, "compiled:"), reference)
