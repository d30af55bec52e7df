import json
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fluxlite
from fluxlite.draw import offload, sampling, solvers
from fluxlite.draw.control import Control
from fluxlite.draw.generation import prepare_drawing, settle_options
from fluxlite.draw.pipeline import DrawConfig
from fluxlite.draw.plan import picture_seed, plan_drawing
from fluxlite.nets import flow, schedule
from fluxlite.nets.autoencoder import Autoencoder
from fluxlite.nets.configs import AutoencoderConfig, FluxConfig
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import position_ids, unpack_latents
from fluxlite.weights import sources, writing
from fluxlite.weights.hub import ASSETS

ROOT = Path(__file__).parents[1]
TINY = ASSETS / "flux-tiny"
PROMPT = "red circle with dark blue background"
CONDITIONING = "modulation", "time_in", "guidance_in", "pooled_in", "txt_in"


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
    rope = rope_table(position_ids(8, 8, 16), pipeline.model_config)
    together = sampling.sample_latents(
        pipeline.transformer,
        sampling.condition_net(pipeline.transformer, txt, pooled, times, 3.5),
        noise,
        rope,
        times,
    )
    one_by_one = sampling.sample_sharded(
        *(pipeline.transformer, pipeline.model_config, txt, pooled, noise, rope),
        *(config, torch.float32),
    )
    assert (together - one_by_one).norm() / one_by_one.norm() < 1e-5 and unpack_latents(
        together, 8, 8
    ).shape == (2, 16, 8, 8)


def test_a_grid_guides_away_from_the_empty_caption_as_a_drawing_does(pipeline):
    texts, empty = (pipeline.encoders.encode([prompt], 16) for prompt in (PROMPT, ""))
    noise, rope = (
        sampling.initial_noise((16, 8, 8), [0]),
        rope_table(position_ids(8, 8, 16), pipeline.model_config),
    )
    config = schedule.SampleConfig(height=64, width=64, steps=3, true_cfg=2.5)
    times = schedule.times_for(config, pipeline.transformer.config, noise.shape[1])
    conditions = [
        sampling.condition_net(pipeline.transformer, *of, times, 3.5) for of in (texts, empty)
    ]
    drawn = sampling.sample_latents(
        *(pipeline.transformer, conditions[0], noise, rope, times),
        **dict(true_cfg=2.5, negative=conditions[1]),
    )
    options = *texts, noise, rope, config, torch.float32
    grid, plain = (
        sampling.sample_sharded(pipeline.transformer, pipeline.model_config, *options, negative)
        for negative in (empty, None)
    )
    assert (grid - drawn).norm() / drawn.norm() < 1e-5 < 0.1 < (grid - plain).norm() / plain.norm()


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
            solvers.sample_euler(lambda x, i: noise - target, noise, times), target, atol=1e-5
        )


CIRCLES = [PROMPT, "gold circle with teal background"]
SMALL = dict(height=64, width=96, steps=4, max_sequence_length=16, seed=3, batch=2)


@pytest.fixture(scope="module")
def undisturbed(pipeline):
    """Pictures of `CIRCLES` in batches of two and one, {(number, step): latents}, and the times."""
    seen, shown = {}, []

    def on_step(numbers, step, times, latents):
        shown.append(times)
        seen.update({(n, step): row.clone() for n, row in zip(numbers, latents, strict=True)})

    prompts = [*CIRCLES, "lime circle with pink background"]
    pictures = fluxlite.generate(prompts, checkpoint=pipeline, on_step=on_step, **SMALL)
    assert len(shown) == 2 * 5 and all(torch.equal(times, shown[0]) for times in shown)
    return prompts, pictures, seen, shown[0]


def test_every_step_is_told_from_noise_to_the_latents_of_the_picture(pipeline, undisturbed):
    prompts, pictures, seen, times = undisturbed
    assert seen.keys() == {(n, step) for n in range(3) for step in range(5)}
    assert times[0] == 1 and times[-1] == 0
    for n in range(3):
        noise = sampling.initial_noise((16, 8, 12), [picture_seed(3, n, 0)])
        assert torch.equal(seen[n, 0], unpack_latents(noise, 8, 12)[0])
        [decoded] = sampling.pictures_of(pipeline.autoencoder.decode(seen[n, 4][None]))
        assert (pixels([decoded]) == pixels([pictures[n]])).all()
        changes = [(seen[n, i] - seen[n, i + 1]).norm() for i in range(4)]
        assert min(changes) > 0.1


def test_latents_come_in_place_of_pictures(pipeline, undisturbed):
    prompts, _, seen, _ = undisturbed
    told = []
    latents = fluxlite.generate(
        prompts,
        checkpoint=pipeline,
        decode=False,
        on_picture=lambda number, latents: told.append((number, latents)),
        **SMALL,
    )
    assert [number for number, _ in told] == [0, 1, 2]
    for n in range(3):
        assert torch.equal(latents[n], seen[n, 4]) and told[n][1] is latents[n]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_drawing_from_latents_at_a_time_is_the_rest_of_the_drawing(pipeline, undisturbed, step):
    prompts, pictures, seen, times = undisturbed
    latents, steps = [seen[n, step] for n in range(3)], []
    options = SMALL | dict(checkpoint=pipeline, on_step=lambda n, i, t, x: steps.append(len(t)))
    options |= dict(seed=99, latents=latents)  # no noise is drawn
    again = fluxlite.generate(prompts, start_time=float(times[step]), **options)
    bound = 0 if step == 0 else 1  # the modulation of fewer steps may round otherwise
    assert set(steps) == {5 - step} and np.abs(pixels(again) - pixels(pictures)).max() <= bound
    options |= dict(steps=None, times=times[step:].tolist(), latents=torch.stack(latents))
    assert (pixels(fluxlite.generate(prompts, **options)) == pixels(again)).all()


def test_own_times_are_the_only_truth_about_steps(pipeline, undisturbed):
    prompts, pictures, _, times = undisturbed
    options = SMALL | dict(checkpoint=pipeline, steps=None)
    same = fluxlite.generate(prompts, times=times, **options)
    assert (pixels(same) == pixels(pictures)).all()
    assert same[0].info["sampling"] == pictures[0].info["sampling"]
    other = fluxlite.generate(prompts, times=[1, 0.5, 0], **options)
    assert np.abs(pixels(other) - pixels(pictures)).max() > 5
    about = other[0].info["sampling"]
    assert (about["steps"], about["times"]) == (2, [1, 0.5, 0])


def test_drawing_may_begin_between_two_times(pipeline, undisturbed):
    prompts, _, seen, times = undisturbed
    found = []
    fluxlite.generate(
        prompts[0],
        checkpoint=pipeline,
        latents=seen[0, 2][None],
        start_time=0.5,
        on_step=lambda numbers, step, own, latents: found.append(own),
        **SMALL,
    )
    assert found[0].tolist() == [0.5, *times[times < 0.5].tolist()]


@pytest.mark.parametrize(
    "options,named",
    [
        (dict(times=[1, 0], steps=2), "times= takes the place of steps="),
        (dict(times=[1, 0], shift="none"), "times= takes the place of steps= and shift="),
        (dict(times=[1]), "name two or more"),
        (dict(times=[0, 1]), "must fall"),
        (dict(times=[1, 0.5, 0.5, 0]), "must fall"),
        (dict(times=[1.5, 0]), "must fall, from 1"),
        (dict(times=[1, float("nan"), 0]), "must fall"),
        (dict(times=[0.5, 0]), "begins at time 0.5.*give latents="),
        (dict(start_time=0.5), "begins at time 0.5.*give latents="),
        (dict(start_time=0), "start_time=0 must be above 0"),
        (dict(start_time=1.5), "at most 1"),
        (dict(latents=torch.zeros(1, 16, 4, 4)), r"\(1, 16, 4, 4\).*take \(1, 16, 8, 8\)"),
        (dict(latents=torch.zeros(2, 16, 8, 8)), r"take \(1, 16, 8, 8\)"),
        (dict(heigth=64), "heigth= is no argument of generate: did you mean height"),
        (dict(num_inference_steps=4), "num_inference_steps= is no arg.* did you mean steps"),
        (dict(generator=torch.Generator()), "generator= is no argument.* did you mean seed"),
        (dict(output_type="latent"), "did you mean decode"),
        (dict(imgs_per_prompt=4), "did you mean images_per_prompt"),
        (dict(qqq=1), "^qqq= is no argument of generate$"),
        (dict(config=DrawConfig(), steps=7), "steps= beside config="),
        (dict(config={"steps": 7}), "config={'steps': 7} must be a DrawConfig, not dict"),
        (dict(checkpoint=3), "checkpoint=3 must be a path"),
        (dict(prompt=[]), r"prompt=\[\] is empty"),
        (dict(prompt=None), "prompt=None must be a text"),
        (dict(prompt=5), "prompt=5 must be a text"),
        (dict(prompt=b"x"), "prompt=b'x' must be a text"),
        (dict(prompt=["a", 1]), "prompt=1 must be a text"),
        (dict(prompt={"a": 1}), "prompt={'a': 1} must be a text"),
        (dict(controls=["x.png"]), "controls='x.png' must be a Control"),
        (dict(controls=Control("flux-tiny", np.zeros((4, 4, 3)))), "a PIL image, not ndarray"),
        (dict(controls=Control("flux-tiny", torch.zeros(3, 4, 4))), "a PIL image, not Tensor"),
        (dict(controls=Control(5, "x.png")), "controlnet.checkpoint=5 must be a path"),
        (dict(latents=np.zeros((1, 16, 8, 8), np.int64)), "latents= are torch.int64"),
        (dict(latents=5), "latents=5 must be a tensor"),
        (dict(solver="ddim"), "solver='ddim': choose one of euler, heun, dpmpp_2m, or pass a fun"),
        (dict(latents=[torch.zeros(1), torch.zeros(2)]), "latents=.* must be a tensor"),
        (dict(times="abc"), "times='abc' must be numbers"),
        (dict(start_time="x"), "start_time='x' must be a number"),
        (dict(negative_prompt="a fox"), "negative_prompt= needs true_cfg above 1, not 1.0"),
        (dict(negative_prompt=["a"], true_cfg=2.0), "negative_prompt=.* must be str, not list"),
        (dict(height="512"), "height='512' must be int or null, not str"),
        (dict(images_per_prompt=1.5), "images_per_prompt=1.5 must be int, not float"),
        (dict(config=DrawConfig(batch="8")), "batch='8' must be int, not str"),
        (dict(seed=None), "seed=None must be int, not NoneType"),
        (dict(t5="x"), "pass them to load_pipeline"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_drawn(options, named, pipeline):
    given = dict(prompt=PROMPT, checkpoint=pipeline) | options
    with pytest.raises(ValueError, match=named) as error:
        fluxlite.generate(on_step=lambda *_: pytest.fail("drawn"), **given)
    assert "\n" not in str(error.value) and "--help" not in str(error.value)


def test_numbers_of_numpy_are_numbers(pipeline):
    options = dict(seed=np.int64(3), guidance=np.float32(2.5), batch=np.uint8(4))
    _, config = settle_options(pipeline, None, options)
    assert config == DrawConfig(seed=3, guidance=2.5, batch=4)
    assert [type(v) for v in (config.seed, config.guidance, config.batch)] == [int, float, int]


def test_latents_may_be_an_array_and_a_control_stand_alone(pipeline, undisturbed):
    latents = torch.randn(1, 16, 8, 12)
    options = dict(checkpoint=pipeline, **SMALL)
    a, b = (fluxlite.generate(PROMPT, latents=x, **options) for x in (latents, latents.numpy()))
    assert (pixels(a) == pixels(b)).all()
    control = Control("flux-tiny", Image.new("RGB", (96, 64), "white"))
    a, b = (fluxlite.generate(PROMPT, controls=c, **options) for c in (control, [control]))
    assert (pixels(a) == pixels(b)).all() and (pixels(a) != pixels(undisturbed[1][:1])).any()


@pytest.mark.parametrize(
    "options,named",
    [
        (dict(dtype="foo"), "dtype=foo: choose one of float32, bfloat16"),
        (dict(dtype="float16"), "dtype=float16: choose one of float32, bfloat16"),
        (dict(dtype=16), "dtype=16 must be float32 or bfloat16"),
        (dict(device="gpu"), "device=gpu: fluxlite computes on cpu and cuda: choose one"),
        (dict(device="mps"), "device=mps: fluxlite computes on cpu and cuda: choose one"),
        (dict(device="cuda"), r"device=cuda: torch \S+ .*: choose cpu, or install a torch for"),
        (dict(torch_dtype=torch.float32), "no argument of load_pipeline: did you mean dtype"),
        (dict(qqq=1), "^qqq= is no argument of load_pipeline$"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_before_it_is_loaded(options, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=named):
        fluxlite.load_pipeline(**options)


def test_a_net_is_not_loaded_to_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", torch.device("cuda", 1)):
        with pytest.raises(ValueError, match=f"device={device}: torch .*: choose cpu"):
            fluxlite.load_transformer("flux-tiny", device=device)
    with pytest.raises(ValueError, match="device=xpu: fluxlite computes on cpu and cuda"):
        sources.load_autoencoder("flux-tiny", device="xpu")


def test_a_transformer_takes_the_name_of_a_type():
    assert fluxlite.load_transformer("flux-tiny", dtype="bfloat16").img_in.weight.dtype == (
        torch.bfloat16
    )
    with pytest.raises(ValueError, match="dtype=foo: choose one of"):
        fluxlite.load_transformer("flux-tiny", dtype="foo")


def test_a_solver_is_a_function_of_any_velocity(pipeline, undisturbed):
    """Heun's method from the same parts: exact for a velocity that changes linearly with t."""

    def sample_heun(velocity, x, times, callback=lambda step, x: x):
        x = callback(0, x)
        for i in range(len(times) - 1):
            first, width = velocity(x, i), times[i + 1] - times[i]
            second = velocity(x + width * first, i + 1)
            x = callback(i + 1, x + width * (first + second) / 2)
        return x

    times, noise = torch.tensor([1, 0.3, 0]), torch.randn(2, 4, 3)
    exact = noise - 0.5  # the integral of t from 0 to 1
    linear = sample_heun(lambda x, i: times[i], noise, times)
    assert torch.allclose(linear, exact, atol=1e-6)
    euler = solvers.sample_euler(lambda x, i: times[i], noise, times)
    assert not torch.allclose(euler, exact, atol=0.1)
    seen = []

    def halve(step, x):
        seen.append(step)
        return x / 2

    halved = solvers.sample_euler(lambda x, i: torch.zeros(()), noise, times, halve)
    assert seen == [0, 1, 2] and torch.allclose(halved, noise / 8)


TIMES = flow.schedule(7, 2.0)


@pytest.mark.parametrize("times", [TIMES, TIMES[2:]])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_solvers_match_diffusers_schedulers(name, times):
    """Along a velocity that bends: the published methods, from noise or from later on."""
    if name == "heun":
        theirs = diffusers.FlowMatchHeunDiscreteScheduler()
        theirs.set_timesteps(len(times) - 1)
        inner = times[1:-1].repeat_interleave(2)
        theirs.sigmas = torch.cat([times[:1], inner, times[-1:]])
    else:
        options = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
        theirs = diffusers.DPMSolverMultistepScheduler(**options)
        theirs.sigmas, theirs.num_inference_steps = times, len(times) - 1
    theirs.timesteps = 1000 * theirs.sigmas[:-1]
    theirs.set_begin_index(0)

    def bend(x, t):
        return torch.sin(3 * x + t) + x * t

    x = start = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    for t, sigma in zip(theirs.timesteps, theirs.sigmas):
        x = theirs.step(bend(x, sigma), t, x).prev_sample
    ours, euler = (
        solvers.SOLVERS[of](lambda x, i: bend(x, times[i]), start, times) for of in (name, "euler")
    )
    assert torch.allclose(ours, x, atol=2e-6) and not torch.allclose(ours, euler, atol=1e-2)


def test_a_solver_has_a_name_which_metadata_say(pipeline):
    options = dict(checkpoint=pipeline, steps=3, max_sequence_length=16)
    found = {}
    for solver in ("euler", "heun", solvers.sample_heun, "dpmpp_2m"):
        [found[solver]] = fluxlite.generate(PROMPT, solver=solver, **options)
    named = [picture.info["sampling"]["solver"] for picture in found.values()]
    assert named == ["euler", "heun", "heun", "dpmpp_2m"]
    euler, heun, same, dpm = (pixels([picture]) for picture in found.values())
    assert (heun == same).all() and min(np.abs(euler - heun).max(), np.abs(dpm - heun).max()) > 3


def test_pictures_are_drawn_by_the_solver_that_is_given(pipeline):
    """Heun's, whose last step is Euler's: alike in one step, in several not."""

    def sample_heun(velocity, x, times, callback=lambda step, x: x):
        x = callback(0, x)
        for i in range(len(times) - 1):
            first, width = velocity(x, i), times[i + 1] - times[i]
            if i + 2 < len(times):
                first = (first + velocity(x + width * first, i + 1)) / 2
            x = callback(i + 1, x + width * first)
        return x

    for steps in (1, 3):
        options = dict(checkpoint=pipeline, decode=False, height=64, width=64, steps=steps)
        options |= dict(max_sequence_length=16)
        [euler] = fluxlite.generate(PROMPT, **options)
        [heun] = fluxlite.generate(PROMPT, solver=sample_heun, **options)
        assert torch.allclose(heun, euler, atol=1e-6) == (steps == 1) and heun.isfinite().all()


def test_parts_are_loaded_when_they_are_used_and_dropped_or_kept(pipeline):
    options = dict(device="cpu", dtype=torch.float32)
    parts = {"encoders", "transformer", "autoencoder"}
    assert parts <= vars(pipeline).keys()
    freed = fluxlite.load_pipeline(offload="text", **options)
    assert not parts & vars(freed).keys()
    seen = []

    def on_step(numbers, step, times, latents):
        seen.append(parts & vars(freed).keys())
        assert freed.transformer.modulation is None

    drawn = [
        pixels(fluxlite.generate(PROMPT, checkpoint=freed, on_step=on_step, **SMALL))
        for _ in range(2)
    ]
    assert seen[0] == {"transformer"} and parts & vars(freed).keys() == {"autoencoder"}
    kept = pixels(fluxlite.generate(PROMPT, checkpoint=pipeline, **SMALL))
    assert (drawn[0] == kept).all() and (drawn[1] == kept).all()
    assert pipeline.transformer.modulation is not None


def test_a_drawing_that_was_stopped_does_not_spoil_the_next(pipeline):
    freed = fluxlite.load_pipeline(offload="text", device="cpu", dtype=torch.float32)

    def stop(numbers, step, times, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fluxlite.generate(PROMPT, checkpoint=freed, on_step=stop, **SMALL)
    again, kept = (fluxlite.generate(PROMPT, checkpoint=p, **SMALL) for p in (freed, pipeline))
    assert (pixels(again) == pixels(kept)).all()


def test_a_loaded_pipeline_and_a_converted_file_keep_their_own_settings(pipeline, tmp_path):
    assert fluxlite.generate(PROMPT, checkpoint=pipeline, steps=2)[0].size == (64, 64)
    writing.write_converted(sources.open_source(TINY), tmp_path / "tiny.safetensors")
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
        writing.write_converted(source, where, to=layout)
        assert (
            pixels(fluxlite.generate(PROMPT, checkpoint=where, **options)) == reference
        ).all(), layout
    bare = tmp_path / "elsewhere" / "flux.safetensors"
    writing.write_converted(source, bare)
    with pytest.raises(ValueError, match="model.t5=, model.clip=, model.autoencoder="):
        fluxlite.generate(PROMPT, checkpoint=bare, **options)
    parts = dict(t5=TINY, clip=TINY, autoencoder=TINY)
    assert (
        pixels(fluxlite.generate(PROMPT, checkpoint=bare, **parts, **options)) == reference
    ).all()


def test_a_shape_that_the_checkpoint_has_not_is_refused():
    with pytest.raises(ValueError, match="model.num_double_blocks=19, but .*flux-tiny has 2"):
        fluxlite.generate(PROMPT, expected={"num_double_blocks": 19})


@pytest.mark.slow
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


# --- an accelerator, which is not there -----------------------------------------------------------


class DeviceMemory(TorchDispatchMode):
    """The bytes on the meta device, which stands in for a GPU: of what is alive, and at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def attend_as_a_gpu(q, k, v, **_):
    """Fused attention, which keeps no weights."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def test_flux_dev_at_1024_takes_less_than_18_gb_of_a_card(monkeypatch):
    """Weights, conditions of 28 steps, a step's tensors; and the picture's decoding takes less.
    Counted in bfloat16, and what `offload=all` leaves free for them is not less.
    """
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_as_a_gpu)
    half, sample = dict(dtype=torch.bfloat16, device="meta"), schedule.SampleConfig()
    config, tokens, hidden = FluxConfig(), 512 + 64 * 64, FluxConfig().hidden_size
    with DeviceMemory() as memory, torch.device("meta"), torch.no_grad():
        model = Flux(config).to(torch.bfloat16)
        model.drop_conditioning()
        conditions = torch.empty(28, sum(config.modulation_chunks), 1, 1, hidden, **half)
        txt, img = torch.empty(1, 512, hidden, **half), torch.empty(1, 64 * 64, 64)
        rope = torch.empty(tokens, 1, 128), torch.empty(tokens, 1, 128)
        held = sum(memory.alive.values())
        assert held == pytest.approx(17.29e9, rel=1e-3)
        memory.peak = 0
        model.velocity(img, txt, rope, conditions[0])
        step, peak = memory.peak - held, memory.peak
        autoencoder = Autoencoder(AutoencoderConfig()).to(torch.bfloat16)
        memory.peak = held = sum(memory.alive.values())
        autoencoder.decode(torch.empty(1, 16, 128, 128))
        decoding = memory.peak - held
    assert 17.5e9 < peak < 18e9, peak
    beside = partial(offload.bytes_beside, config, AutoencoderConfig(), batch=1, itemsize=2)
    assert beside(sample) == pytest.approx(max(step, decoding), rel=0.5), (step, decoding)
    assert beside(sample) > max(step, decoding), (step, decoding)


@pytest.mark.parametrize("fit", [True, False])
def test_on_an_accelerator_the_modulation_is_never_there(monkeypatch, fit):
    """The transformer is mapped, conditions the prompts where it lies, and only then moves what its
    steps use: each byte of that once.
    """
    if not fit:  # too many prompts: they are conditioned batch by batch, still in host memory
        monkeypatch.setattr(sampling, "conditions_fit", lambda *_: False)
    opened = fluxlite.load_pipeline(offload="text", device="cpu", dtype=torch.float32)
    texts = [opened.encode_text(PROMPT, 16)]
    opened.device, config = torch.device("meta"), DrawConfig(height=64, width=64, steps=3)
    plan = plan_drawing(opened, config, PROMPT)
    _ = opened.transformer  # built on meta, in fact
    monkeypatch.setattr(opened, "release", lambda part: None)
    with DeviceMemory() as memory:
        prepare_drawing(plan, texts)
    model = opened.transformer
    of_steps = {n: p for n, p in model.named_parameters() if n.split(".")[0] not in CONDITIONING}
    kept = {n: p for n, p in model.named_parameters() if n not in of_steps}
    assert bool(kept) != fit and {p.device.type for p in kept.values()} <= {"cpu"}
    assert {p.device.type for p in of_steps.values()} == {"meta"}
    moved = sum(p.nbytes for p in of_steps.values())
    assert moved <= memory.peak < 1.01 * moved  # and the rotations


def test_a_pipeline_in_memory_moves_nothing_when_it_draws(pipeline, monkeypatch):
    moved, move = [], torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *a, **k: moved.append(type(self)) or move(self, *a, **k)
    )
    for _ in range(2):
        fluxlite.generate(PROMPT, checkpoint=pipeline, **SMALL)
    assert not moved
    fluxlite.load_pipeline(device="cpu", dtype=torch.float32)
    assert len(moved) >= 4  # each of the parts when it is loaded


def test_large_pictures_are_decoded_in_tiles_which_their_metadata_say(pipeline):
    options = dict(checkpoint=pipeline, height=128, width=128, steps=1, max_sequence_length=16)
    whole, covered, tiled = (
        fluxlite.generate(PROMPT, tile=tile, **options)[0] for tile in (0, 128, 64)
    )
    assert (pixels([whole]) == pixels([covered])).all()
    error = np.abs(pixels([whole]) - pixels([tiled]))
    assert error.max() > 0 and error.mean() < 20, error.mean()
    assert tiled.info["sampling"]["tile"] == 64 and "tile" not in whole.info["sampling"]
    for tile in (12, 24):
        with pytest.raises(ValueError, match=f"tile={tile} must be 0, or a multiple of 8 from 32"):
            fluxlite.generate(PROMPT, tile=tile, **options)
