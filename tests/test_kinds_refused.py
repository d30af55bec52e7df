"""What cannot be drawn from pictures is refused: in one line, before an encoder is loaded, with
nothing left behind.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import fluxlite
from fluxlite.cli.programs import one_line
from fluxlite.draw import pipeline as draw_pipeline
from fluxlite.weights.hub import ASSETS

ROOT, TINY = Path(__file__).parents[1], ASSETS / "flux-tiny"
infer = runpy.run_path(str(ROOT / "infer.py"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures, masks, a Fill, a Canny, a Redux that is none, files of jobs; single
    files of a pipeline's parts, and what is no FLUX.
    """
    folder = tmp_path_factory.mktemp("place")
    for kind, channels in (("fill", 384), ("canny", 128)):
        shutil.copytree(TINY, folder / kind, ignore=shutil.ignore_patterns("controlnet"))
        file = folder / kind / "transformer" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        old = state["x_embedder.weight"]
        state["x_embedder.weight"] = torch.cat([old, old.new_zeros(256, channels - 64)], 1)
        save_file(state, file)
        config = json.loads((file.parent / "config.json").read_text())
        config |= {"in_channels": channels, "out_channels": 64}
        (file.parent / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (64, 64), "navy").save(folder / "photo.png")
    Image.new("L", (64, 64)).save(folder / "black.png")
    Image.new("L", (64, 32), 255).save(folder / "wide.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(folder / "mask.png")
    Image.new("L", (1, 70_000)).save(folder / "thin.png")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:60])
    (folder / "empty").mkdir()
    shutil.copytree(TINY / "text_encoder_2", folder / "cut" / "text_encoder_2")
    shutil.copytree(TINY / "tokenizer_2", folder / "cut" / "tokenizer_2")
    os.truncate(folder / "cut" / "text_encoder_2" / "model.safetensors", 100_000)
    part = load_file(TINY / "text_encoder_2" / "model.safetensors")
    save_file(part, folder / "t5.safetensors")
    named = {f"text_encoders.t5xxl.transformer.{key}": part[key] for key in part}
    save_file(named, folder / "encoders.safetensors")
    (folder / "cut.gguf").write_bytes(b"GGUF\3\0\0\0\1")
    (folder / "old.gguf").write_bytes(b"GGUF\1\0\0\0".ljust(99, b"\0"))
    jobs = {
        "none": "\n",
        "broken": '{"prompt": "a"}\n{"prompt": ',
        "list": '["a"]',
        "unknown": '{"prompt": "a", "stepps": 3}',
        "bounds": '{"prompt": "a"}\n\n{"prompt": "a", "steps": 0}',
        "two": '{"prompt": ["a", "b"]}',
        "session": '{"prompt": "a", "output": "x"}',
        "nested": '{"prompt": "a", "model": {"save_converted": "x"}}',
        "hollow": '{"prompt": "a", "seed": {}}',
        "spelled": '{"prompt": "a", "lora": "x", "lora.file": "y"}',
        "encoder": '{"prompt": "a"}\n{"prompt": "a", "model.t5": "CUT"}',
        "picture": '{"prompt": "a"}\n{"prompt": "a", "mask": "MASK"}',
    }
    for name, text in jobs.items():
        (folder / f"{name}.jsonl").write_text(
            text.replace("MASK", f"{folder}/mask.png").replace("CUT", f"{folder}/cut")
        )
    for name, text in (("old", '{"prompt": "a"}'), ("odd", '{"again": {"pormpt": "a"}}')):
        info = PngInfo()
        info.add_itxt("fluxlite", text)
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png", pnginfo=info)
    return folder


needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="needs gguf")
MISUSES = [
    ("mask={p}/mask.png", "mask= needs image="),
    ("strength=0.5", "strength= is read with image=: name that too"),
    ("paste=true image={p}/photo.png", "paste= is read with mask="),
    ("crop=4 image={p}/photo.png", "crop= is read with mask="),
    ("canny=true", "canny= is read with a FLUX.1-Canny's own control_image="),
    ("preview=decoder", "preview=decoder needs preview_every="),
    ("from={p}/photo.png prompt_file=a.txt", "prompt_file= and from=: name one of them"),
    ("strength=0 image={p}/photo.png", "strength=0.0 must be at least 0.001"),
    ("strength=1.5 image={p}/photo.png", "strength=1.5 must be at least 0.001 and at most 1"),
    ("image={p}/none.png", "image={p}/none.png is not a file"),
    (
        "image={p}/text.png",
        "image={p}/text.png cannot be read (no picture of a known format, but a text file)",
    ),
    ("image={p}/cut.png", "image={p}/cut.png cannot be read (unreadable picture"),
    ("image={p}/photo.png mask={p}/black.png", "mask= is black"),
    ("image={p}/photo.png mask={p}/wide.png", "mask= has other proportions than image= (64x32"),
    (
        "image={p}/photo.png mask={p}/mask.png width=16 height=64",
        "mask= marks nothing of the part of image= that is drawn",
    ),
    ("model.checkpoint={p}/fill", "is a FLUX.1-Fill: it needs image= and mask="),
    (
        "model.checkpoint={p}/fill image={p}/photo.png",
        "is a FLUX.1-Fill: it needs image= and mask=",
    ),
    (
        "model.checkpoint={p}/fill image={p}/photo.png mask={p}/mask.png reference={p}/photo.png",
        "reference= is not for model.checkpoint={p}/fill, a FLUX.1-Fill: leave it out",
    ),
    ("model.checkpoint={p}/canny", "is a FLUX.1-Canny or FLUX.1-Depth: it needs control_image="),
    (
        "model.checkpoint={p}/canny control_image={p}/photo.png reference={p}/photo.png",
        "reference= is not for model.checkpoint={p}/canny",
    ),
    (
        "model.checkpoint={p} model.t5={t} model.clip={t} model.autoencoder={t}",
        "model.checkpoint={p}:",
    ),
    (
        "model.checkpoint={t} control_image={p}/photo.png",
        "control_image= is not for model.checkpoint={t}, which sees noise alone: name controlnet.c",
    ),
    (
        "image={p}/thin.png",
        "in the proportions of a picture of 1x70000 pixels: height=16928 must be at least 16 and",
    ),
    ("reference={p}/none.png", "reference={p}/none.png is not a file"),
    ("redux={p}/photo.png", "redux= and redux.checkpoint= belong together"),
    ("redux={p}/photo.png redux.checkpoint={p}/empty", "has no folder image_encoder"),
    ("redux.checkpoint={p}/empty", "redux= and redux.checkpoint= belong together"),
    (
        "redux={p}/photo.png redux.checkpoint={p}/empty redux.scale=1 redux.scale=2",
        "redux.scale= is given 2 times, and redux= 1",
    ),
    ("solver=ddim", "solver=ddim: choose one of euler, heun, dpmpp_2m"),
    ("times=[0,1]", "must fall"),
    ("times=[1,0] steps=3", "times= takes the place of steps="),
    ("preview=fast", "preview=fast: choose one of colours, decoder"),
    ("place=8", "place=8 must be below batch=8"),
    ("jobs={p}/none.jsonl", "prompt= and jobs=: name one of them"),
    ("-prompt jobs={p}/nowhere.jsonl", "jobs={p}/nowhere.jsonl is not a file"),
    ("-prompt jobs={p}/none.jsonl", "jobs={p}/none.jsonl holds no job"),
    ("-prompt jobs={p}/broken.jsonl", "jobs={p}/broken.jsonl, line 2 is no JSON"),
    ("-prompt jobs={p}/list.jsonl", "jobs={p}/list.jsonl, line 1 holds list, not an object"),
    ("-prompt jobs={p}/unknown.jsonl", "line 1: stepps is not a key: did you mean steps"),
    ("-prompt jobs={p}/bounds.jsonl", "line 3: steps=0 must be at least 1"),
    ("-prompt jobs={p}/two.jsonl", "line 1: one picture is drawn here: name one prompt"),
    ("-prompt jobs={p}/session.jsonl", "line 1: output belongs to the command line"),
    ("-prompt jobs={p}/nested.jsonl", "line 1: model.save_converted belongs to the command line"),
    ("-prompt jobs={p}/hollow.jsonl", "line 1: seed={{}} must be int, not dict"),
    ("-prompt jobs={p}/spelled.jsonl", "line 1: lora.file is there twice: name it once"),
    (
        "-prompt jobs={p}/encoder.jsonl",
        "line 2: model.t5: the weights do not load whole: {p}/cut/te",
    ),
    ("-prompt jobs={p}/picture.jsonl", "line 2: mask= needs image="),
    ("model.checkpoint={p}/t5.safetensors", "it is a T5 text encoder (it has encoder.block.0"),
    ("model.checkpoint={p}/encoders.safetensors", "an all-in-one checkpoint without transformer"),
    ("model.checkpoint={t} model.autoencoder={p}/t5.safetensors", "name it as model.t5="),
    ("model.checkpoint={t} model.clip={p}/t5.safetensors", "it is a T5 text encoder (it has enc"),
    (
        "model.checkpoint={t} model.clip={t}/vae/diffusion_pytorch_model.safetensors",
        "it is an autoencoder, not a CLIP text encoder",
    ),
    (
        "model.checkpoint={t} model.t5={t}/transformer/diffusion_pytorch_model.safetensors",
        "it is a transformer, not a T5 text encoder",
    ),
    ("model.checkpoint={t} model.t5={p}/t5.safetensors", "or name a pipeline's folder as model.to"),
    (
        "model.checkpoint={t} model.t5={p}/t5.safetensors model.tokenizers={p}/empty",
        "model.tokenizers={p}/empty has no tokenizer: put tokenizer.json or spiece.model into",
    ),
    pytest.param(
        "model.checkpoint={p}/cut.gguf", "{p}/cut.gguf is no whole GGUF file", marks=needs_gguf
    ),
    pytest.param(
        "model.checkpoint={t} model.t5={p}/old.gguf", "(version 1, not 2 or 3)", marks=needs_gguf
    ),
    ("-prompt from={p}/photo.png", "from={p}/photo.png does not say how it is drawn again"),
    ("-prompt from={p}/old.png", "from={p}/old.png does not say how it is drawn again"),
    ("-prompt from={p}/odd.png", "from={p}/odd.png: pormpt is not a key: did you mean prompt"),
    ("-prompt from={p}/text.png", "from={p}/text.png is no whole PNG"),
    ("-prompt from={p}/cut.png", "from={p}/cut.png is no whole PNG"),
]


def fill_in(text, place):
    return text.format(p=place, t=TINY)


@pytest.mark.parametrize("arguments,named", MISUSES)
def test_a_misuse_is_refused_in_a_line_before_an_encoder_is_loaded(
    arguments, named, place, tmp_path, monkeypatch
):
    monkeypatch.setattr(draw_pipeline, "load_text_encoders", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(os.listdir(place))
    given = fill_in(arguments, place).split()
    given = given[1:] if given[0] == "-prompt" else ["prompt=a", *given]
    with pytest.raises((ValueError, OSError)) as error:
        infer["body"]([*given, f"output={tmp_path}/out", "device=cpu"])
    line = one_line(error.value)
    assert fill_in(named, place) in line and "\n" not in line
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(place)) == before


@pytest.mark.slow
def test_a_misuse_ends_the_program_with_code_2_and_one_line(place, tmp_path):
    arguments = [f"jobs={place}/picture.jsonl", f"output={tmp_path}/out"]
    result = subprocess.run(
        [sys.executable, "infer.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and not result.stdout and not os.listdir(tmp_path)
    assert result.stderr.splitlines()[-1].startswith(f"error: jobs={place}/picture.jsonl, line 2")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options,named",
    [
        (dict(image=np.zeros((4, 4, 3))), "image=.* must be a path or a PIL image, not"),
        (dict(image=["a", "b"]), "image= is given 2 pictures for 1 prompts"),
        (dict(image=Image.new("F", (8, 8))), "the image cannot be read .*: pass it as RGB"),
        (dict(posteriors=[1]), "posteriors=.* must be normal draws by name, not list"),
        (dict(posteriors={"x": torch.zeros(1, 16, 8, 8)}), "posteriors=x: give image, masked_"),
        (dict(posteriors={"image": torch.zeros(3, 16, 8, 8)}), "posteriors=image: give .*1, 16, 8"),
        (dict(redux="a.png"), "redux='a.png' must be a Redux"),
        (dict(seeds=[1, 2]), "seeds= has 2 for 1 prompts: give one for each"),
        (dict(seeds=["x"]), "seeds='x' must be a whole number for each prompt"),
        (dict(image=Image.new("RGB", (64, 64)), start_time=0.5, strength=0.5), "name one"),
        (dict(mask_image="x"), "mask_image= is no argument of generate: did you mean mask"),
        (dict(padding_mask_crop=3), "did you mean crop"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(options, named, monkeypatch):
    monkeypatch.setattr(draw_pipeline, "load_text_encoders", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=named) as error:
        fluxlite.generate("a", device="cpu", **options)
    assert "\n" not in str(error.value)
