"""`benchmarks/gpu.py`: every section runs here on a tiny scale, so that a GPU is not the first to
run it.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu
import gpu_sections as sections
import pytest
import torch

from fluxlite import parallel
from fluxlite.cli import devices
from fluxlite.parallel import compilation

ROOT = Path(__file__).parents[1]
BASES = "bfloat16", "int8", "nf4"


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch):
    """Blocks are traced, and run as they are."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    parallel.stop_ranks()


def rows_of(section, scale=sections.TINY, seconds=300):
    rows = list(sections.SECTIONS[section][0](scale, sections.Clock(seconds)))
    assert rows and all(set(row) >= {"what", "note"} for row in rows)
    json.dumps(rows)
    return rows


@pytest.mark.slow
def test_a_step_is_measured_beside_diffusers_eager_and_compiled():
    rows = rows_of("forward")
    sides, suffixes = sections.TINY.sides, ("", ", compiled")
    expected = [f"{s}², {who}{c}" for c in suffixes for s in sides for who in ("diffusers", "ours")]
    assert [row["what"] for row in rows] == expected
    for row in rows:
        assert row["ms"] > 0 and row["tflops"] > 0 and row["mfu"] is None and row["ratio"] > 0
        if "ours" in row["what"]:  # the two compute the same
            assert float(row["note"].split("differs by ")[1]) < 3e-2


@pytest.mark.slow
def test_a_training_step_is_measured_under_each_checkpointing():
    rows = rows_of("train")
    assert len(rows) == 7 and not any(row["note"].startswith("skipped") for row in rows)
    for kind in ("none", "selective", "full"):
        assert any(f"ours, checkpointing {kind}" in row["what"] for row in rows)
    of_ours = [row["loss"] for row in rows if "ours" in row["what"]]
    assert all(loss == pytest.approx(of_ours[0], rel=0.05) for loss in of_ours)


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_less_deep_and_its_row_says_so():
    whole = replace(
        sections.TINY,
        shape=replace(sections.TINY.shape, num_double_blocks=4, num_single_blocks=8),
    )
    size = 2.4 * sum(p.numel() for p in sections.Flux(whole.shape).parameters())
    small = replace(whole, memory=int(size / 1.9 / sections.FITTING), sides=(32,))
    rows = rows_of("forward", small)
    assert all("of 4 + 8 blocks" in row["note"] for row in rows)
    assert small.fitted(2.4, small.memory).shape.num_double_blocks == 2
    assert whole.fitted(2.4, whole.memory) == whole


@pytest.mark.slow
def test_a_step_of_a_lora_is_measured_beside_each_base():
    rows = rows_of("lora")
    assert [row["what"].split("beside ")[1].split(",")[0] for row in rows] == list(BASES)
    for row in rows:
        assert row["ms"] > 0 and row["loss"] == pytest.approx(rows[0]["loss"], rel=0.05)


@pytest.mark.slow
def test_float8_is_skipped_with_its_reason_and_measured_where_it_can_be(monkeypatch):
    [row] = rows_of("float8")
    assert "needs a GPU of compute capability 8.9" in row["note"]
    quant_api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(devices, "has_float8", lambda device: True)
    rows = rows_of("float8")
    assert len(rows) == 5 and sum("lossy" in row["what"] for row in rows) == 3
    assert float(rows[1]["note"].split("differs by ")[1]) > 1e-3


def test_loading_and_the_autoencoder_are_measured():
    assert [row["what"] for row in rows_of("loading")] == [
        f"{layout}, {cache} page cache"
        for layout in ("diffusers' folder", "our layout")
        for cache in ("cold", "warm")
    ]
    theirs, ours = rows_of("autoencoder")
    assert float(ours["note"].split("differs by ")[1]) < 5e-2 and theirs["ratio"] == 1


@pytest.mark.slow
def test_meshes_are_skipped_on_one_gpu_and_a_rank_is_measured():
    [row] = rows_of("meshes")
    assert row["note"] == "skipped: there is one GPU"
    [row] = sections.rank_rows(sections.TINY, sections.Clock(60))
    assert row["what"] == "FSDP2" and row["ms"] > 0 and "1 ranks, selective" in row["note"]


def test_what_does_not_fit_the_memory_or_the_time_is_named(monkeypatch):
    monkeypatch.setattr(sections, "free_memory", lambda: None)

    def measure(seconds, fault=None):
        time.sleep(seconds)
        if fault:
            raise fault
        return {"note": ""}

    variants = {
        "quick": (0.0,),
        "too large": (0.0, torch.OutOfMemoryError("CUDA out of memory")),
        "slow": (0.5,),
        "late": (0.0,),
    }
    rows = list(sections.attempt_each(variants, measure, sections.Clock(0.6)))
    assert [row["what"] for row in rows] == list(variants)
    notes = [row["note"] for row in rows]
    assert notes == ["", "skipped: out of memory", "", "skipped: 0 s were left"]


def test_a_section_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert sections.run_limited([sys.executable, "-c", parent], 1, start_new_session=True) is None
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()
    quick = sections.run_limited([sys.executable, "-c", "print(3)"], 60, start_new_session=True)
    assert (quick.returncode, quick.stdout) == (0, "3\n")


def test_sections_share_the_time_and_later_ones_keep_theirs(monkeypatch):
    given = {}

    def run(scale, name, seconds):
        given[name] = seconds
        return [{"what": name, "note": ""}]

    found = gpu.measure_sections(sections.TINY, list(sections.SECTIONS), 8, run)
    assert list(found) == list(sections.SECTIONS) == list(given)
    assert all(given[name] >= sections.SECTIONS[name][1] - 1 for name in given)
    assert sum(seconds for _, seconds in sections.SECTIONS.values()) <= 60 * gpu.MINUTES
    found = gpu.measure_sections(sections.TINY, ["train", "meshes"], 0, run)
    assert [row["note"] for [row] in found.values()] == ["skipped: no time was left"] * 2


def test_the_report_is_a_table_a_json_line_and_markdown(capsys):
    found = {
        "forward": [
            {"what": "ours", "ms": 123.4, "ratio": 1.5, "tflops": 600.0, "mfu": 0.61, "note": "a"},
            {"what": "late", "note": "skipped: 3 s were left"},
        ],
        "tests": [{"what": "pytest -m gpu", "note": "1 failed", "failed": True}],
    }
    about = gpu.describe_machine(sections.TINY)
    assert gpu.report_sections(found, about) is False
    assert gpu.report_sections({"forward": found["forward"]}, about) is True
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("{"))
    assert json.loads(line)["sections"] == found
    assert "| ours | 123.4 | 1.50 | 600 | 61% |  | a |" in out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def run_script(*arguments):
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_is_one_line_and_exit_code_2():
    result = run_script()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: there is no GPU") and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_whole_script_runs_on_a_cpu():
    result = run_script("--tiny", "--minutes", "20")
    assert result.returncode == 0, result.stdout + result.stderr
    line = next(line for line in result.stdout.splitlines() if line.startswith("{"))
    found = json.loads(line)["sections"]
    assert list(found) == list(sections.SECTIONS)
    assert not any(row.get("failed") for rows in found.values() for row in rows)
    assert "skipped" in found["tests"][0]["note"]
    assert len(found["train"]) == 7 and found["train"][0]["ms"] > 0


@pytest.mark.slow
def test_ranks_are_measured_under_torchrun():
    rows = list(sections.mesh_rows(replace(sections.TINY, ranks=2), sections.Clock(240)))
    assert [row["what"] for row in rows] == list(sections.MESHES)
    assert all("2 ranks" in row["note"] for row in rows)
