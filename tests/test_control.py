"""Drawing with ControlNets, beside diffusers' pipeline with the same nets."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
)
from PIL import Image
from reference import our_controlnet_from, randomise

import fluxlite
from fluxlite import rng
from fluxlite.cli.command_line import load_config
from fluxlite.data.circles import figure_mask
from fluxlite.draw import sampling
from fluxlite.draw.control import Control, open_control, prepare_hint, read_picture
from fluxlite.draw.plan import picture_seed
from fluxlite.nets.configs import ControlNetConfig
from fluxlite.nets.controlnet import ControlNet
from fluxlite.nets.latents import pack_latents
from fluxlite.settings import InferConfig
from fluxlite.weights import sources, writing
from fluxlite.weights.hub import ASSETS

TINY, ROOT = ASSETS / "flux-tiny", Path(__file__).parents[1]
PROMPT = "red circle with dark blue background"
SIZE = dict(height=64, width=64, max_sequence_length=16)


@pytest.fixture(scope="module")
def pipeline():
    return fluxlite.load_pipeline(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs():
    return FluxPipeline.from_pretrained(TINY, torch_dtype=torch.float32)


def their_net(theirs, *, doubles=1, singles=2, pixel=False, modes=None, seed=0):
    """A FluxControlNetModel from the transformer of `theirs`, with random outputs and hint."""
    values = dict(theirs.transformer.config) | dict(
        num_layers=doubles, num_single_layers=singles, num_mode=modes
    )
    values |= (
        dict(patch_size=2, conditioning_embedding_channels=values["in_channels"] // 4)
        if pixel
        else {}
    )
    net = FluxControlNetModel.from_config(
        {k: v for k, v in values.items() if not k.startswith("_")}
    )
    state = theirs.transformer.state_dict()
    net.load_state_dict({k: v for k, v in state.items() if k in net.state_dict()}, strict=False)
    for name, module in net.named_children():
        if name.startswith(("controlnet", "input_hint")):
            randomise(module, seed)
    return net.eval()


@pytest.fixture(scope="module")
def nets(theirs):
    """{kind: their net} for the tiny transformer."""
    return {
        "latent": their_net(theirs),
        "doubles": their_net(theirs, singles=0, seed=3),
        "pixel": their_net(theirs, doubles=2, singles=0, pixel=True, seed=1),
        "union": their_net(theirs, modes=3, seed=2),
    }


@pytest.fixture(scope="module")
def pictures():
    """Two control pictures of the size that is drawn."""
    values = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(v).resize((64, 64), Image.Resampling.BICUBIC) for v in values]


def pixels(pictures):
    return np.stack([np.asarray(p, np.int64) for p in pictures])


def draw_theirs(theirs, nets, images, monkeypatch, *, prompts, **options):
    """Pictures of diffusers' pipeline with our noise, of latents and of each hint's posterior."""
    calls, seeds = iter(range(9)), [picture_seed(5, j, 0) for j in range(len(prompts))]

    def noise(shape, **_):
        return rng.normal(shape[1:], seed=next(calls), indices=seeds, stream="control")

    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", noise)
    parts = {
        k: v
        for k, v in theirs.components.items()
        if k not in ("image_encoder", "feature_extractor")
    }
    several = isinstance(nets, list)
    pipe = FluxControlNetPipeline(
        **parts, controlnet=FluxMultiControlNetModel(nets) if several else nets
    )
    pipe.set_progress_bar_config(disable=True)
    latents = sampling.initial_noise((16, 8, 8), seeds)
    return pipe(
        prompts,
        control_image=images,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=3.5,
        **SIZE,
        **options,
    ).images


CASES = {  # kind of net, what our Control is told, what their pipeline is
    "latent": ("latent", dict(scale=0.5), dict(controlnet_conditioning_scale=0.5)),
    "doubles": ("doubles", {}, {}),
    "pixel": ("pixel", dict(scale=0.5), dict(controlnet_conditioning_scale=0.5)),
    "union": ("union", dict(mode="depth"), dict(control_mode=2)),
    "interval": (
        "latent",
        dict(start=0.25, end=0.75),
        dict(control_guidance_start=0.25, control_guidance_end=0.75),
    ),
    "cfg": (
        "latent",
        {},
        dict(negative_prompt=["green circle with gold background"] * 2, true_cfg_scale=2.5),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_match_diffusers(pipeline, theirs, nets, pictures, monkeypatch, case):
    kind, ours, options = CASES[case]
    prompts = [PROMPT, "gold circle with teal background"]
    expected = draw_theirs(theirs, nets[kind], pictures[0], monkeypatch, prompts=prompts, **options)
    own = dict(negative_prompt=options["negative_prompt"][0], true_cfg=2.5) if case == "cfg" else {}
    net = our_controlnet_from(nets[kind])
    draw = dict(checkpoint=pipeline, seed=5, steps=4, **SIZE, **own)
    got = fluxlite.generate(prompts, controls=[Control(net, pictures[0], **ours)], **draw)
    assert np.abs(pixels(got) - pixels(expected)).max() <= 1
    assert (
        np.abs(pixels(got) - pixels(fluxlite.generate(prompts, **draw))).max() > 20
    )  # the net has an effect


def test_two_nets_match_diffusers(pipeline, theirs, nets, pictures, monkeypatch):
    """Of equal depth, each with its own picture, scale and interval."""
    both = [nets["latent"], their_net(theirs, seed=7)]
    expected = draw_theirs(
        theirs,
        both,
        pictures,
        monkeypatch,
        prompts=[PROMPT],
        controlnet_conditioning_scale=[0.5, 0.3],
        control_guidance_end=[1.0, 0.5],
    )
    ours = [our_controlnet_from(net) for net in both]
    controls = [
        Control(ours[0], pictures[0], scale=0.5),
        Control(ours[1], pictures[1], scale=0.3, end=0.5),
    ]
    got = fluxlite.generate(PROMPT, checkpoint=pipeline, seed=5, steps=4, controls=controls, **SIZE)
    assert np.abs(pixels(got) - pixels(expected)).max() <= 1
    alone = fluxlite.generate(
        PROMPT, checkpoint=pipeline, seed=5, steps=4, controls=controls[:1], **SIZE
    )
    assert np.abs(pixels(got) - pixels(alone)).max() > 20


def test_a_net_is_not_asked_outside_its_interval(pipeline, nets, pictures, monkeypatch):
    net, asked = our_controlnet_from(nets["latent"]), []
    monkeypatch.setattr(net, "samples", lambda *a, f=net.samples: asked.append(1) or f(*a))
    control = Control(net, pictures[0], start=0.4, end=0.8)
    fluxlite.generate(PROMPT, checkpoint=pipeline, steps=5, controls=[control], **SIZE)
    assert len(asked) == 2 and [control.active(i, 5) for i in range(5)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_the_latent_hint_is_a_sample_for_each_picture_and_each_net(pipeline, nets, pictures):
    opened = open_control(
        Control(our_controlnet_from(nets["latent"]), pictures[0]),
        pipeline,
        64,
        64,
    )
    vae = pipeline.autoencoder
    with torch.inference_mode():
        mean, logvar = vae.posterior(opened.image)
        first, second = (
            prepare_hint(opened, number, vae, torch.device("cpu")) for number in (0, 1)
        )
        got = first([0, 0], ["5.0.0", "5.1.0"])
        noise = rng.normal((16, 8, 8), seed=0, indices=["5.0.0", "5.1.0"], stream="control")
        assert torch.allclose(
            got, pack_latents(vae.scale(mean + torch.exp(logvar / 2) * noise)), rtol=1e-6, atol=1e-6
        )
        assert torch.equal(first([0], ["5.1.0"]), got[1:]) and not torch.equal(got[0], got[1])
        assert not torch.equal(second([0], ["5.1.0"]), got[1:])


@pytest.fixture(scope="module")
def saved(nets, tmp_path_factory):
    """{kind: folder} of the nets as diffusers saves them."""
    folder = tmp_path_factory.mktemp("nets")
    for kind, net in nets.items():
        net.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in nets}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_with_nets_from_disk_are_the_same_whatever_is_freed_or_kept(
    saved, pictures, tmp_path, dtype
):
    options = dict(steps=3, dtype=dtype, device="cpu", images_per_prompt=2, **SIZE)
    kept = tmp_path / "kept.safetensors"
    controls = [
        Control(saved["latent"], pictures[0], save_converted=kept),
        Control(saved["pixel"], pictures[1], scale=0.5),
    ]
    prompts = [PROMPT, "lime circle with pink background"]
    none, text = (
        pixels(fluxlite.generate(prompts, controls=controls, offload=o, **options))
        for o in ("none", "text")
    )
    assert (none == text).all() and none.std() > 20
    again = [Control(kept, pictures[0]), controls[1]]
    assert (pixels(fluxlite.generate(prompts, controls=again, **options)) == none).all()
    one = fluxlite.generate(prompts[0], controls=controls, **(options | {"images_per_prompt": 1}))
    assert np.abs(pixels(one) - none[:1]).max() <= (1 if dtype == torch.float32 else 12)


def test_every_layout_of_the_same_net_draws_the_same_picture(saved, pictures, tmp_path):
    source, drawn = sources.open_source(saved["pixel"]), []
    for layout in ("diffusers", "fluxlite", "bfl", "nemo"):
        where = saved["pixel"] if layout == "diffusers" else tmp_path / layout
        if layout != "diffusers":
            writing.write_converted(source, where, to=layout)
        options = dict(
            steps=2,
            dtype=torch.float32,
            device="cpu",
            controls=[Control(where, pictures[0], scale=0.5)],
            **SIZE,
        )
        drawn.append(pixels(fluxlite.generate(PROMPT, **options)))
    assert all((d == drawn[0]).all() for d in drawn) and drawn[0].std() > 20


def test_conditions_made_batch_by_batch_draw_the_same(saved, pictures, monkeypatch):
    options = dict(
        steps=2,
        dtype=torch.float32,
        device="cpu",
        batch=1,
        controls=[Control(saved["union"], pictures[0], mode=1)],
        **SIZE,
    )
    prompts = [PROMPT, "lime circle with pink background"]
    whole = pixels(fluxlite.generate(prompts, **options))
    monkeypatch.setattr(sampling, "conditions_fit", lambda *_: False)
    assert np.abs(pixels(fluxlite.generate(prompts, **options)) - whole).max() <= 1


# --- pictures and settings that users bring -------------------------------------------------------


def test_every_kind_of_picture_becomes_what_training_makes_of_it(tmp_path):
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    made = {
        "rgb.png": wide,
        "grey.png": wide.convert("L"),
        "deep.png": Image.fromarray(np.asarray(wide.convert("L")).astype(np.uint16) * 257),
        "alpha.png": wide.convert("RGBA"),
        "clear.png": Image.new("RGBA", (90, 40), (255, 0, 0, 0)),
        "inks.tif": wide.convert("CMYK"),
        "palette.gif": wide.convert("P"),
    }
    found = {}
    for name, image in made.items():
        image.save(tmp_path / name)
        found[name] = read_picture(tmp_path / name, 32, 48)
        assert (
            found[name].shape == (3, 32, 48) and found[name].min() >= -1 and found[name].max() <= 1
        )
        assert (
            torch.equal(read_picture(Image.open(tmp_path / name), 32, 48), found[name])
            or name == "palette.gif"
        )
    scale = 40 / 32  # the short side fits, the middle is kept
    box = ((90 - 48 * scale) / 2, 0, (90 + 48 * scale) / 2, 40)
    expected = (
        np.asarray(wide.resize((48, 32), Image.Resampling.LANCZOS, box=box), np.float32) / 127.5 - 1
    )
    assert np.allclose(found["rgb.png"].permute(1, 2, 0), expected)
    assert torch.equal(found["grey.png"], found["deep.png"]) and torch.equal(
        found["rgb.png"], found["alpha.png"]
    )
    assert (found["clear.png"] == 1).all() and (
        found["inks.tif"] - found["rgb.png"]
    ).abs().max() < 0.05


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="the control image cannot be read"):
        read_picture(Image.open(tmp_path / "cut.png"), 32, 32)
    for name, named in (
        ("cut.png", "unreadable"),
        ("text.png", "no picture"),
        ("none.png", "is not a file"),
    ):
        with pytest.raises(ValueError, match=f"control_image=.*{name}.*{named}"):
            read_picture(tmp_path / name, 32, 32)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    pipeline, saved, pictures, tmp_path
):
    base = pipeline.transformer.config
    narrow = ControlNetConfig.beside(base, num_double_blocks=1, num_single_blocks=0, text_width=20)
    source = ControlNet(narrow)
    turned = ControlNet(
        ControlNetConfig.beside(base, num_double_blocks=1, num_single_blocks=0, rope_theta=100)
    )
    for changes, named in (
        (dict(checkpoint=source), f"text_width=20, but the transformer has {base.text_width}"),
        (dict(checkpoint=turned), "rope_theta=100, but the transformer has 10000"),
        (dict(checkpoint="/nowhere"), "controlnet.checkpoint=/nowhere does not exist"),
        (
            dict(checkpoint=TINY / "transformer"),
            "controlnet.checkpoint=.*holds the wrong part, transformer",
        ),
        (dict(mode="canny"), "controlnet.mode=canny, but .* is no union net"),
        (dict(checkpoint=saved["union"]), "is a union net: choose controlnet.mode= .canny 0"),
        (dict(checkpoint=saved["union"], mode="lq"), "controlnet.mode=lq: choose .* from 0 to 2"),
        (dict(checkpoint=saved["union"], mode=3), "controlnet.mode=3"),
        (dict(checkpoint=saved["union"], mode="edges"), "controlnet.mode=edges"),
        (dict(scale=float("nan")), "controlnet.scale=nan"),
        (dict(start=0.8, end=0.5), "controlnet.start=0.8 must be less than controlnet.end=0.5"),
        (dict(start=-0.1), "controlnet.start=-0.1"),
        (dict(end=float("nan")), "controlnet.end=nan"),
        (dict(image=tmp_path / "none.png"), "control_image=.*none.png is not a file"),
        (
            dict(save_converted=tmp_path / "x.bin"),
            "controlnet.save_converted=.*must end in .safetensors",
        ),
    ):
        given = Control(**(dict(checkpoint=saved["latent"], image=pictures[0]) | changes))
        with pytest.raises(ValueError, match=named) as error:
            fluxlite.generate(PROMPT, checkpoint=pipeline, controls=[given], **SIZE)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="float64 on cpu.*float32 on cpu"):
        net = sources.load_controlnet(saved["latent"], dtype=torch.float64)
        fluxlite.generate(PROMPT, checkpoint=pipeline, controls=[Control(net, pictures[0])], **SIZE)
    numbers = [
        open_control(Control(saved["union"], pictures[0], mode=m), pipeline, 64, 64).mode
        for m in ("depth", "1", 0)
    ]
    assert numbers == [2, 1, 0]


def parsed(*arguments):
    return load_config(InferConfig, "infer", ["prompt=a", *arguments])


def test_the_command_line_names_nets_once_each_and_the_rest_once_or_each():
    config = parsed(
        *(
            "controlnet.checkpoint=a",
            "control_image=[x] y.png",
            "controlnet.checkpoint=b",
            "control_image=z.png",
        ),
        *(
            "controlnet.scale=0.5",
            "controlnet.end=0.8",
            "controlnet.end=1",
            "controlnet.mode=canny",
            "controlnet.mode=none",
        ),
    )
    first, second = config.controlnet.controls(config.control_image)
    assert first == Control("a", "[x] y.png", scale=0.5, end=0.8, mode="canny")
    assert second == Control("b", "z.png", scale=0.5, end=1.0, mode="none")
    assert parsed().controlnet.controls([]) == []


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["controlnet.checkpoint=a"], "control_image= 0 times"),
        (
            ["control_image=a.png", "control_image=b.png", "model.checkpoint=x"],
            "controlnet.checkpoint= is given 0 times and control_image= 2 times",
        ),
        (
            ["controlnet.checkpoint=a", *(f"control_image={x}.png" for x in "abc")],
            "control_image= 3 times",
        ),
        (
            ["controlnet.scale=1"],
            "controlnet.scale= is given 1 times, and controlnet.checkpoint= 0 times",
        ),
        (
            [
                "controlnet.checkpoint=a",
                "control_image=a",
                "controlnet.scale=1",
                "controlnet.scale=2",
            ],
            "controlnet.scale= is given 2",
        ),
        (
            ["controlnet.checkpoint=a", "control_image=a", "controlnet.scale=much"],
            "controlnet.scale=much must be a number",
        ),
        (
            ["controlnet.checkpoint=a", "control_image=a", "controlnet.scale=nan"],
            "controlnet.scale=nan must be a finite number",
        ),
        (
            ["controlnet.checkpoint=a", "control_image=a", "controlnet.start=1"],
            "controlnet.start=1.0 must be less",
        ),
        (["controlnet.scal=1"], "did you mean controlnet.scale"),
    ],
)
def test_the_command_line_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        parsed(*arguments)


def test_infer_draws_with_a_net_and_records_it(saved, pictures, tmp_path, capsys):
    pictures[0].save(tmp_path / "edges.png")
    arguments = [
        *(
            "prompt=a",
            f"controlnet.checkpoint={saved['union']}",
            f"control_image={tmp_path}/edges.png",
        ),
        *("controlnet.mode=depth", "controlnet.scale=0.7", "controlnet.end=0.8"),
        *("steps=2", f"output={tmp_path}/out", "dtype=float32"),
    ]
    runpy.run_path(str(ROOT / "infer.py"))["body"](arguments)
    (file,) = (tmp_path / "out").iterdir()
    about = json.loads(Image.open(file).text["fluxlite"])
    own = {"scale": 0.7, "start": 0.0, "end": 0.8, "mode": "depth"}
    assert about["controls"] == [
        {"checkpoint": str(saved["union"]), "image": f"{tmp_path}/edges.png"} | own
    ]
    assert about["controlnet"]["scale"] == [0.7] and about["control_image"] == [
        f"{tmp_path}/edges.png"
    ]


def test_the_shipped_net_puts_the_circle_where_the_control_has_it(tmp_path):
    arguments = [
        "control_image=docs/circle.png",
        "prompt=red circle with blue background",
        f"output={tmp_path}",
    ]
    result = subprocess.run(
        [sys.executable, "infer.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    mask = figure_mask(
        np.asarray(Image.open(result.stdout.split()[0]).convert("RGB")), "red", "blue"
    )
    rows, columns = np.nonzero(
        np.asarray(Image.open(ROOT / "docs/circle.png").convert("L").resize((64, 64))) > 60
    )
    y, x = np.mgrid[:64, :64]
    centre, radius = (
        ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2),
        (rows.max() - rows.min()) / 2,
    )
    disc = np.hypot(y - centre[0], x - centre[1]) <= radius
    assert (mask & disc).sum() / (mask | disc).sum() > 0.8
