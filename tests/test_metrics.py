import io
import json
import math
import sys
import types

import numpy as np
import pytest
from PIL import Image

from fluxlite.draw.contact_sheet import contact_sheet
from fluxlite.train import metrics
from fluxlite.train.metrics import (
    Metrics,
    MetricsConfig,
    Throughput,
    peak_tflops,
    read_metrics,
)
from fluxlite.train.plots import plot_losses

QUIET = MetricsConfig(tensorboard=False, progress=False)


def log_steps(folder, steps, *, start=0, total=100):
    run = Metrics(QUIET, folder, total_steps=total, start_step=start)
    for step in steps:
        run.log(step, {"loss": 1 / step})
    run.close()


def test_logged_floats_are_exact(tmp_path):
    run = Metrics(QUIET, tmp_path, total_steps=2)
    run.log(1, {"loss": 0.1 + 0.2, "samples": 7, "lr": np.float32(0.1)})
    row = read_metrics(tmp_path)[0]  # before close: lines are flushed
    assert (row["step"], row["loss"], row["samples"]) == (1, 0.1 + 0.2, 7)
    assert row["lr"] == float(np.float32(0.1)) and row["time"] > 1e9
    run.close()


def test_resume_reads_as_an_uninterrupted_run(tmp_path):
    log_steps(tmp_path, range(1, 8))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # the process died while it wrote
    log_steps(tmp_path, range(5, 11), start=4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [
        (step, 1 / step) for step in range(1, 11)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_run_from_step_0_starts_an_empty_file(tmp_path):
    log_steps(tmp_path, [1, 2, 3])
    log_steps(tmp_path, [1])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_damage_within_the_file_is_an_error_that_names_the_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl"):
        Metrics(QUIET, tmp_path, total_steps=9, start_step=3)


def test_tensorboard_gets_scalars_and_pictures_and_forgets_a_killed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = MetricsConfig(progress=False)
    for start, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        run = Metrics(
            config, tmp_path, total_steps=3, start_step=start, run_config={"optim": {"lr": 1e-3}}
        )
        for step in steps:
            run.log(step, {"loss": step + start / 2})
        path = run.image(3, "samples", Image.new("RGB", (8, 8), "red"))
        run.close()
        run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1),
        (2, 2.5),
        (3, 3.5),
    ]
    assert "samples" in events.Tags()["images"]
    assert path == tmp_path / "images" / "samples-000003.png" and Image.open(path).size == (8, 8)


def test_missing_package_is_an_error_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    for enabled in (True, False):
        with pytest.raises(ValueError, match="pip install wandb"):
            Metrics(
                MetricsConfig(tensorboard=False, wandb=True),
                tmp_path,
                total_steps=1,
                enabled=enabled,
            )


def test_wandb_goes_on_under_its_id(tmp_path, monkeypatch):
    ids, logged = [], []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None
    )
    fake = types.SimpleNamespace(
        init=lambda **options: ids.append(options["id"]) or run, Image=lambda picture: picture.size
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "require_package", lambda *a: None)
    for start in (0, 5, 0):
        run_metrics = Metrics(
            MetricsConfig(tensorboard=False, wandb=True, progress=False),
            tmp_path,
            total_steps=9,
            start_step=start,
        )
        run_metrics.log(6, {"loss": 0.5})
        run_metrics.image(6, "samples", Image.new("RGB", (4, 4)))
        run_metrics.close()
    assert ids[0] == ids[1] != ids[2]
    assert logged[:2] == [{"step": 6, "loss": 0.5}, {"step": 6, "samples": (4, 4)}]


def test_other_ranks_write_nothing(tmp_path, capsys):
    run = Metrics(MetricsConfig(), tmp_path / "run", total_steps=10, enabled=False)
    run.log(10, {"loss": 1.0})
    run.progress(10, {"loss": 1.0})
    assert run.image(10, "samples", Image.new("RGB", (8, 8))) is None
    run.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_without_a_terminal_progress_is_plain_lines(tmp_path, capsys):
    run = Metrics(MetricsConfig(log_every=10, tensorboard=False), tmp_path, total_steps=25)
    for step in range(1, 26):
        values = (
            {"loss": 0.5, "samples_per_s": 123.4, "tflops": 2.0, "mfu": 0.41, "memory_gb": 3.0}
            if step % 10 == 0
            else None
        )
        run.progress(step, values)
    run.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 10/25", "step 20/25", "step 25/25"]
    for part in (
        "loss 0.5000",
        "123.4 samples/s",
        "2 TFLOP/s",
        "MFU 41.0%",
        "3.00 GB",
        "00:00 left",
    ):
        assert part in lines[-1]


def test_on_a_terminal_progress_is_a_bar_that_starts_at_the_resumed_step(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run = Metrics(MetricsConfig(tensorboard=False), tmp_path, total_steps=100, start_step=50)
    run.progress(75, {"loss": 0.25})
    assert run.bar.n == 75
    run.close()
    assert "50/100" in terminal.getvalue() and "loss 0.2500" in terminal.getvalue()


def test_throughput_leaves_out_pauses_and_knows_mfu():
    now = [0.0]
    throughput = Throughput(flops_per_sample=1e12, num_devices=4, peak=100.0, clock=lambda: now[0])
    for _ in range(2):  # the second reading counts its own interval only
        now[0] += 2
        throughput.add(100)
        with throughput.paused():
            now[0] += 50
            with throughput.paused():
                now[0] += 50
            now[0] += 50
        values = throughput.read()
        assert values["samples_per_s"] == 50
        assert values["tflops"] == 12.5 and values["mfu"] == 0.125
        assert 0.01 < values["memory_gb"] < 100


def test_unknown_peak_gives_no_mfu():
    assert peak_tflops("cpu") is None
    assert set(Throughput(flops_per_sample=1e9).read()) == {"samples_per_s", "memory_gb", "tflops"}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_found_by_device_name(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize("evaluations", [0, 1, 2, 5])
def test_plot_shows_whatever_was_logged(tmp_path, evaluations):
    run = Metrics(QUIET, tmp_path, total_steps=100)
    for step in range(1, 101) if evaluations else ():
        run.log(step, {"loss": math.nan if step == 50 else 1 / step})
    for step in range(evaluations):
        run.log(
            step, {"val/loss": 0.5, **{f"val/loss_t{t / 8:.3f}": 0.1 * t + step for t in range(8)}}
        )
    run.close()
    picture = Image.open(plot_losses(tmp_path))
    assert picture.size == (1650, 630)
    has_curve = (np.abs(np.int64(picture.convert("RGB")) - (0x1F, 0x5A, 0xA8)).sum(-1) < 9)[
        :, 1000:
    ].any()
    assert has_curve == (evaluations > 0)


def test_contact_sheet_enlarges_small_pictures_by_a_whole_factor():
    picture = Image.effect_noise((48, 64), 90).convert("RGB")
    sheet = contact_sheet([picture] * 5, columns=3)
    assert sheet.size == (8 + 3 * (144 + 8), 8 + 2 * (192 + 8))
    assert np.array_equal(
        np.asarray(sheet)[8 : 8 + 192, 8 : 8 + 144], np.asarray(picture).repeat(3, 0).repeat(3, 1)
    )


def test_contact_sheet_makes_room_for_captions_and_shortens_them():
    pictures = [Image.new("L", (256, 256))] * 4
    plain, short, long = (
        contact_sheet(pictures, captions=text) for text in (None, ["a"] * 4, ["word " * 500] * 4)
    )
    assert plain.width == short.width == long.width == 8 + 2 * (256 + 8)
    assert plain.height < short.height < long.height < 2 * plain.height
    below = np.asarray(short)[8 + 256 + 2 : short.height // 2, 8:264]
    assert below.min() < 128


def test_contact_sheet_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        contact_sheet([Image.new("RGB", (8, 8))] * 2, captions=["a"])
