import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import fluxlite
from fluxlite.draw import sampling
from fluxlite.draw.pipeline import picture_seed
from fluxlite.nets import schedule
from fluxlite.nets.latents import unpack_latents
from fluxlite.weights import sources
from fluxlite.weights.sources import ASSETS

ROOT = Path(__file__).parents[1]
TINY = ASSETS / "flux-tiny"
PROMPT = "red circle with dark blue background"


@pytest.fixture(scope="module")
def pipeline():
    return fluxlite.load_pipeline(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs():
    return FluxPipeline.from_pretrained(TINY, torch_dtype=torch.float32)


def pixels(pictures):
    return np.stack([np.asarray(p, np.int64) for p in pictures])


@pytest.mark.parametrize(
    "height,width,options", [(64, 64, {}), (96, 64, {"guidance": 2.0}), (64, 64, {"true_cfg": 2.5})]
)
def test_pictures_match_diffusers(pipeline, theirs, height, width, options):
    """The same latents through 4 steps: within 1/255."""
    cells = (16, height // 8, width // 8)
    prompts = [PROMPT, "gold circle with teal background"]
    noise = sampling.initial_noise(cells, [picture_seed(5, j, 0) for j in range(2)])
    negative = "green circle with gold background" if "true_cfg" in options else ""
    ours = fluxlite.generate(
        prompts,
        checkpoint=pipeline,
        seed=5,
        height=height,
        width=width,
        steps=4,
        max_sequence_length=16,
        negative_prompt=negative,
        **options,
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt=prompts,
        negative_prompt=[negative] * 2 if negative else None,
        true_cfg_scale=options.get("true_cfg", 1.0),
        guidance_scale=options.get("guidance", 3.5),
        height=height,
        width=width,
        num_inference_steps=4,
        max_sequence_length=16,
        latents=noise,
    ).images
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 1
    assert pixels(ours).std() > 20


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    def draw(prompts, **options):
        return pixels(
            fluxlite.generate(
                prompts,
                checkpoint=pipeline,
                height=64,
                width=64,
                steps=3,
                max_sequence_length=16,
                **options,
            )
        )

    whole = draw([PROMPT, "lime circle with pink background"], images_per_prompt=2, batch=4)
    assert (
        np.abs(
            draw([PROMPT, "lime circle with pink background"], images_per_prompt=2, batch=1) - whole
        ).max()
        <= 1
    )
    assert np.abs(draw(PROMPT) - whole[:1]).max() <= 1
    assert (
        np.abs(draw(PROMPT, seed=1) - whole[:1]).max() > 20
        and np.abs(whole[0] - whole[1]).max() > 20
    )


def test_steps_modulated_together_equal_steps_one_by_one(pipeline):
    txt, pooled = pipeline.encoders.encode([PROMPT, "gold circle with teal background"], 16)
    noise = sampling.initial_noise((16, 8, 8), [0, 1])
    config = schedule.SampleConfig(height=64, width=64, steps=3)
    times = schedule.times_for(config, pipeline.transformer.config, noise.shape[1])
    together = sampling.sample_latents(
        pipeline.transformer,
        sampling.condition_net(pipeline.transformer, txt, pooled, times, 3.5),
        noise,
        times,
        config,
    )
    one_by_one = sampling.sample_sharded(
        pipeline.transformer, pipeline.transformer.config, txt, pooled, noise, config, torch.float32
    )
    assert (together - one_by_one).norm() / one_by_one.norm() < 1e-5 and unpack_latents(
        together, 8, 8
    ).shape == (2, 16, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_the_same_bit_for_bit_whatever_is_freed(dtype):
    options = dict(height=64, width=64, steps=3, max_sequence_length=16, dtype=dtype, device="cpu")
    prompts = [PROMPT, "lime circle with pink background"]
    none, text, every = (
        pixels(fluxlite.generate(prompts, offload=o, **options)) for o in ("none", "text", "all")
    )
    assert (none == text).all() and (none == every).all() and none.std() > 20


def test_freed_modulation_cannot_be_used_and_is_kept_where_it_is_smaller(pipeline, monkeypatch):
    model = fluxlite.load_pipeline(device="cpu", dtype=torch.float32).transformer
    before = sum(p.nbytes for p in model.parameters())
    model.drop_conditioning()
    assert sum(p.nbytes for p in model.parameters()) < 0.75 * before
    with pytest.raises(ValueError, match="load the model again"):
        model.modulate(torch.ones(1), torch.zeros(1, 128), torch.ones(1))
    options = dict(
        height=64,
        width=64,
        steps=3,
        max_sequence_length=16,
        dtype=torch.float32,
        device="cpu",
        batch=1,
    )
    prompts = [PROMPT, "lime circle with pink background"]
    whole = pixels(fluxlite.generate(prompts, **options))
    # too many prompts: conditions are made batch by batch
    monkeypatch.setattr(sampling, "conditions_fit", lambda *_: False)
    assert np.abs(pixels(fluxlite.generate(prompts, **options)) - whole).max() <= 1


def test_denoise_takes_any_velocity():
    """The exact velocity towards a target lands on it in any number of steps."""
    noise, target = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    for steps in (1, 7):
        times = torch.linspace(1, 0, steps + 1)
        assert torch.allclose(
            sampling.sample_euler(lambda x, i: noise - target, noise, times), target, atol=1e-5
        )


def test_a_loaded_pipeline_and_a_converted_file_keep_their_own_settings(pipeline, tmp_path):
    assert fluxlite.generate(PROMPT, checkpoint=pipeline, steps=2)[0].size == (64, 64)
    sources.write_converted(sources.open_source(TINY), tmp_path / "tiny.safetensors")
    parts = dict(t5=TINY, clip=TINY, autoencoder=TINY)
    assert fluxlite.generate(PROMPT, checkpoint=tmp_path / "tiny.safetensors", steps=2, **parts)[
        0
    ].size == (64, 64)


def test_a_hub_repository_is_fetched_whole_and_drawn_from(monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repository, *, allow_patterns, **_):
        asked.append((repository, allow_patterns))
        return TINY

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fluxlite.generate(PROMPT, checkpoint="someone/flux-tiny", steps=2)[0].size == (64, 64)
    assert (
        asked[0][0] == "someone/flux-tiny" and "text_encoder*/*" in asked[0][1] and len(asked) == 1
    )


def test_what_cannot_be_drawn_is_refused(pipeline):
    for options, named in (
        ({"height": 70}, "64 and 80"),
        ({"steps": 0}, "steps"),
        ({"shift": "much"}, "shift"),
    ):
        with pytest.raises(ValueError, match=named):
            fluxlite.generate(
                PROMPT, checkpoint=pipeline, **({"width": 64, "height": 64} | options)
            )
    with pytest.raises(ValueError, match="model.checkpoint"):
        fluxlite.generate(PROMPT, checkpoint="/nowhere", t5=TINY, clip=TINY, autoencoder=TINY)


def test_every_layout_of_the_same_weights_draws_the_same_picture(tmp_path):
    """From a diffusers folder, BFL's file, NeMo's and our own; text encoders and autoencoder are
    found beside each.
    """
    source = sources.open_source(TINY)
    options = dict(height=64, width=64, steps=3, max_sequence_length=16, device="cpu", seed=2)
    reference = pixels(fluxlite.generate(PROMPT, **options))
    for layout in ("fluxlite", "bfl", "nemo", "diffusers"):
        folder = tmp_path / layout
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("transformer"))
        where = folder / ("transformer" if layout == "diffusers" else f"{layout}.safetensors")
        sources.write_converted(source, where, to=layout)
        assert (
            pixels(fluxlite.generate(PROMPT, checkpoint=where, **options)) == reference
        ).all(), layout
    bare = tmp_path / "elsewhere" / "flux.safetensors"
    sources.write_converted(source, bare)
    with pytest.raises(ValueError, match="model.t5=, model.clip=, model.autoencoder="):
        fluxlite.generate(PROMPT, checkpoint=bare, **options)
    parts = dict(t5=TINY, clip=TINY, autoencoder=TINY)
    assert (
        pixels(fluxlite.generate(PROMPT, checkpoint=bare, **parts, **options)) == reference
    ).all()


def test_a_shape_that_the_checkpoint_has_not_is_refused():
    with pytest.raises(ValueError, match="model.num_double_blocks=19, but .*flux-tiny has 2"):
        fluxlite.generate(PROMPT, expected={"num_double_blocks": 19})


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_draw_the_same_picture():
    options = dict(
        height=64, width=64, steps=3, max_sequence_length=16, device="cpu", dtype=torch.float32
    )
    plain, compiled = (
        pixels(fluxlite.generate(PROMPT, compile=c, **options)) for c in (False, True)
    )
    assert np.abs(plain - compiled).max() <= 1 and plain.std() > 20


def infer(*arguments):
    return subprocess.run(
        [sys.executable, "infer.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_infer_writes_pictures_with_their_settings(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("it's a red circle, on #1 blue\n\n../../etc/红色圆\n", encoding="utf-8")
    options = [
        "steps=2",
        f"output={tmp_path}/out",
        f"prompt_file={file}",
        "images_per_prompt=2",
        "seed=3",
    ]
    for _ in range(2):
        result = infer(*options)
        assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "out").iterdir())
    assert (
        len(files) == 10
        and {f.suffix for f in files} == {".png"}
        and len(list(tmp_path.iterdir())) == 2
    )
    settings = [
        json.loads(Image.open(f).text["fluxlite"]) for f in files if "contact" not in f.name
    ]
    assert {s["prompt"] for s in settings} == {"it's a red circle, on #1 blue", "../../etc/红色圆"}
    assert all(s["seed"] == 3 and s["steps"] == 2 for s in settings)
    assert all(
        s["height"] == 64 and s["guidance"] == 3.5 for s in settings
    )  # what the checkpoint settled, not null


@pytest.mark.parametrize(
    "arguments,named",
    [
        ([], "prompt="),
        (["prompt=a", "height=100"], "96 and 112"),
        (["prompt=a", "model.checkpoint=/nowhere"], "model."),
        (["prompt_file=/nowhere"], "prompt_file"),
        (["prompt=a", "stepps=3"], "steps"),
        (["prompt=a", "model=flux_schnell"], "num_double_blocks=19"),
        (["prompt=a", "model=flux_shnell"], "flux_schnell"),
        (["prompt=a", "offload=disk"], "none, text, all"),
    ],
)
def test_infer_refuses_in_one_line(arguments, named, tmp_path):
    result = infer(*arguments, f"output={tmp_path}/out")
    assert (
        result.returncode == 2
        and named in result.stderr
        and result.stderr.count("\n") == 1
        and not result.stdout
    )
