"""Files of jobs, pictures drawn again from what they say of themselves, and pictures on the way."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fluxlite
from fluxlite.draw import pipeline as draw_pipeline
from fluxlite.draw import preview
from fluxlite.settings import job_settings, load_settings
from fluxlite.weights import sources

ROOT = Path(__file__).parents[1]
infer = runpy.run_path(str(ROOT / "infer.py"))
FAST = ["device=cpu", "steps=2", "height=32", "width=32", "compile=false"]
PROMPTS = ["red circle with blue background", "gold circle with teal background", "a"]


def pixels(path):
    return np.asarray(Image.open(path), np.int64)


def about(path):
    return json.loads(Image.open(path).text["fluxlite"])


def saved(folder):
    found = sorted(Path(folder).glob("*.png"))
    return [path for path in found if not path.name.startswith("contact-sheet")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_picture_is_drawn_again_alone_bit_for_bit(tmp_path, dtype, monkeypatch):
    """Of three prompts, two pictures each, in batches of four: the place in its batch is kept."""
    named = [f"prompt={prompt}" for prompt in PROMPTS]
    options = [*FAST, f"dtype={dtype}", "images_per_prompt=2", "batch=4", "seed=5", "true_cfg=2"]
    infer["body"]([*named, *options, "negative_prompt=a fox", f"output={tmp_path}/a"])
    places = []
    for number, path in enumerate(saved(tmp_path / "a")):
        again = about(path)["again"]
        places.append((again.get("batch", 8), again["place"]))
        if number % 2:  # half of them, from each batch
            continue
        infer["body"]([f"from={path}", f"output={tmp_path}/b{number}"])
        [drawn] = saved(tmp_path / f"b{number}")
        assert (pixels(drawn) == pixels(path)).all() and about(drawn)["again"] == again
    assert sorted(places) == [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]


def test_a_picture_drawn_again_takes_other_keys_of_the_command_line(tmp_path):
    photo = Image.new("RGB", (48, 32), "navy")
    photo.save(tmp_path / "photo.png")
    made = [f"image={os.path.relpath(tmp_path)}/photo.png", "strength=0.5", "solver=heun"]
    infer["body"]([*FAST[:2], *made, "prompt=a", "batch=1", f"output={tmp_path}/a"])
    [path] = saved(tmp_path / "a")
    again = about(path)["again"]
    assert again["image"] == f"{tmp_path}/photo.png" and again["strength"] == 0.5
    text = Image.open(path).text["parameters"]
    assert text.startswith("a\nSteps: 1, Sampler: heun, CFG scale: 1.0, ") and "Size: 64x48" in text
    infer["body"]([f"from={path}", f"output={tmp_path}/b", "strength=1", "prompt=red"])
    [drawn] = saved(tmp_path / "b")
    changed = {"strength": 1.0, "prompt": ["red"]}
    assert about(drawn)["again"] == again | changed and (pixels(drawn) != pixels(path)).any()


def write_jobs(path, count):
    """Jobs of several prompts, two LoRAs' worth of settings and sizes."""
    jobs = [
        {"prompt": PROMPTS[n % 3], "seed": n, "guidance": 1.0 + n % 2, "solver": "euler"}
        for n in range(count)
    ]
    path.write_text("\n\n".join(map(json.dumps, jobs)) + "\n")
    return jobs


def test_jobs_are_drawn_once_each_whatever_is_moved_or_added(tmp_path, capsys):
    jobs = write_jobs(tmp_path / "jobs.jsonl", 5)
    arguments = [*FAST, f"jobs={tmp_path}/jobs.jsonl", f"output={tmp_path}/out"]
    infer["body"](arguments)
    first = {path.name: path.stat().st_mtime_ns for path in saved(tmp_path / "out")}
    assert len(first) == 5 == len(capsys.readouterr().out.split())
    more = [{"prompt": "new", "height": 48}, *jobs[::-1], jobs[0]]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, more)))
    infer["body"](arguments)
    now = {path.name: path.stat().st_mtime_ns for path in saved(tmp_path / "out")}
    assert first.items() < now.items() and len(now) == 7 == 5 + len(capsys.readouterr().out.split())
    twice = [name for name in now if name.endswith(".2.png")]
    alike = (pixels(tmp_path / "out" / name) for name in (twice[0], twice[0].replace(".2.", ".")))
    assert np.array_equal(*alike)
    single = [*FAST, f"prompt={jobs[1]['prompt']}", "seed=1", "guidance=2", f"output={tmp_path}/b"]
    infer["body"](single)
    [alone] = saved(tmp_path / "b")
    [same] = [p for p in saved(tmp_path / "out") if about(p)["seed"] == 1]
    assert (pixels(alone) == pixels(same)).all()


def test_a_job_that_another_program_has_drawn_meanwhile_stays(tmp_path, monkeypatch, caplog):
    write_jobs(tmp_path / "jobs.jsonl", 2)
    arguments = [*FAST, f"jobs={tmp_path}/jobs.jsonl", f"output={tmp_path}/out"]
    draw = infer["body"].__globals__["draw_pictures"]

    def draw_late(*given, **options):
        """Another program draws all of them, while this one has begun."""
        monkeypatch.setitem(infer["body"].__globals__, "draw_pictures", draw)
        infer["body"](arguments)
        return draw(*given, **options)

    monkeypatch.setitem(infer["body"].__globals__, "draw_pictures", draw_late)
    infer["body"](arguments)
    assert len(saved(tmp_path / "out")) == 2
    assert caplog.text.count("drawn by another program meanwhile: it stays") == 2


def test_a_picture_too_large_to_be_read_is_one_line(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="from=.*vast.png is no whole PNG"):
        infer["body"]([f"from={tmp_path}/vast.png", f"output={tmp_path}/out"])


def test_what_the_command_line_gives_is_checked_with_each_line_of_jobs(tmp_path):
    (tmp_path / "jobs.jsonl").write_text("{}")
    given = [f"jobs={tmp_path}/jobs.jsonl", "controlnet.checkpoint=net", "lora.scale=0.5"]
    base, line = load_settings("infer", given), {"prompt": "a", "lora": "style.safetensors"}
    config = job_settings(base, line | {"control_image": "a.png"}, "line 1")
    assert config.controls()[0].checkpoint == "net" and config.lora.loras()[0].scale == 0.5
    with pytest.raises(ValueError, match="line 2: controlnet.checkpoint= is given 1 times"):
        job_settings(base, line, "line 2")


def test_jobs_of_one_pipeline_encode_their_prompts_once(tmp_path, monkeypatch):
    """And load the transformer once for each run of jobs that differ in prompt and seed alone."""
    jobs = [{"prompt": PROMPTS[n % 3], "seed": n, "guidance": n // 3} for n in range(6)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    loaded = Counter()

    def count(name, load, *given, **options):
        loaded[name] += 1
        return load(*given, **options)

    for where, name in ((draw_pipeline, "load_text_encoders"), (sources, "load_transformer")):
        monkeypatch.setattr(where, name, partial(count, name, getattr(where, name)))
    infer["body"]([*FAST, f"jobs={tmp_path}/jobs.jsonl", f"output={tmp_path}/out"])
    assert loaded == {"load_text_encoders": 1, "load_transformer": 2}
    paths = {about(path)["seed"]: path for path in saved(tmp_path / "out")}
    assert [about(paths[n])["guidance"] for n in range(6)] == [0, 0, 0, 1, 1, 1]
    infer["body"]([f"from={paths[5]}", f"output={tmp_path}/again"])
    [again] = saved(tmp_path / "again")
    assert (pixels(again) == pixels(paths[5])).all()


@pytest.mark.slow
def test_jobs_that_are_killed_are_drawn_once_and_the_same(tmp_path):
    """SIGKILL, then SIGTERM, in the middle of 24 jobs; run again: 24 pictures, none drawn twice."""
    write_jobs(tmp_path / "jobs.jsonl", 24)
    command = [sys.executable, "infer.py", *FAST, f"jobs={tmp_path}/jobs.jsonl"]
    drawn = {}
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        out = f"output={tmp_path}/out"
        run = subprocess.Popen([*command, out], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        target = len(drawn) + 7
        while number and len(saved(tmp_path / "out")) < target and run.poll() is None:
            time.sleep(0.01)
        if number:
            run.send_signal(number)
        run.communicate(timeout=200)
        assert run.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, None: 0}[number]
        now = {path.name: path.stat().st_mtime_ns for path in saved(tmp_path / "out")}
        assert drawn.items() <= now.items() and (number is None or 7 <= len(now) < 24)
        drawn = now
    assert len(drawn) == 24
    subprocess.run([*command, f"output={tmp_path}/whole"], cwd=ROOT, check=True, timeout=200)
    for name in drawn:
        assert (pixels(tmp_path / "out" / name) == pixels(tmp_path / "whole" / name)).all()
    left = [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".png"]
    assert all(name.startswith(".") for name in left)


def test_previews_of_one_batch_are_not_made_of_the_one_before(tmp_path):
    pipeline = fluxlite.load_pipeline(device="cpu", dtype=torch.float32)
    with preview.previewing(pipeline, 1, tmp_path / "preview.live.png", "colours") as look:
        options = dict(checkpoint=pipeline, steps=2, batch=2, height=64, width=64)
        assert len(list(fluxlite.generate(["a", "b", "c"], on_step=look, **options))) == 3


def test_previews_show_what_is_drawn_and_go(tmp_path):
    pipeline = fluxlite.load_pipeline(device="cpu", dtype=torch.float32)
    seen, file = {}, tmp_path / "new" / "preview.live.png"
    for how in preview.PREVIEWS:
        with preview.previewing(pipeline, 3, file, how) as look:

            def on_step(numbers, step, times, latents, look=look, how=how):
                look(numbers, step, times, latents)
                if file.exists():
                    seen[how, step] = pixels(file)

            options = dict(checkpoint=pipeline, steps=10, seed=2, height=128, width=128)
            [picture] = fluxlite.generate(PROMPTS[0], on_step=on_step, **options)
        assert not file.exists()
    assert {step for _, step in seen} == set(range(3, 11))
    margin = (seen["decoder", 9].shape[0] - 128) // 2
    inside = slice(margin, margin + 128)
    exact = seen["decoder", 9][inside, inside][:128, :128]
    assert np.abs(exact - np.asarray(picture)).mean() < 12
    blurred, exact = (
        np.asarray(one.resize((16, 16)), float)
        for one in (Image.fromarray(seen["colours", 9][inside, inside].astype(np.uint8)), picture)
    )
    assert np.square(blurred - exact).mean() < 0.5 * exact.var()


def test_a_decoded_preview_has_the_tiles_of_the_picture(tmp_path, monkeypatch):
    pipeline, tiled = fluxlite.load_pipeline(device="cpu", dtype=torch.float32), []
    decode = type(pipeline.autoencoder).decode_tiled
    monkeypatch.setattr(
        type(pipeline.autoencoder),
        "decode_tiled",
        lambda self, latents, tile: tiled.append(tile) or decode(self, latents, tile),
    )
    with preview.previewing(pipeline, 1, tmp_path / "live.png", "decoder", 64) as look:
        options = dict(checkpoint=pipeline, steps=3, height=128, width=64, tile=64)
        fluxlite.generate("a", on_step=look, **options)
    assert tiled == [8, 8, 8]  # two previews, and the picture


def test_colours_of_latents_are_fitted_to_the_autoencoder():
    autoencoder = fluxlite.load_pipeline(device="cpu", dtype=torch.float32).autoencoder
    values = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pictures = torch.nn.functional.interpolate(values, scale_factor=16)
    with torch.inference_mode():
        latents = autoencoder.encode(pictures)
        fitted = preview.fit_colours(autoencoder)
        found = preview.colours_of(latents, fitted)
    wanted = torch.nn.functional.avg_pool2d(pictures, 8)
    assert fitted.shape == (17, 3) and found.shape == wanted.shape
    assert (found - wanted).square().mean() < 0.1 * wanted.var()
