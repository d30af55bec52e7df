"""Drawing from pictures, into holes, along edges and after references, beside diffusers' pipelines
with the same weights and draws.
"""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from reference import our_controlnet_from, randomise

import fluxlite
from fluxlite.weights.sources import ASSETS

ROOT, TINY = Path(__file__).parents[1], ASSETS / "flux-tiny"
PROMPTS = ["red circle with dark blue background", "gold circle with teal background"]
NEGATIVE = "green circle with gold background"
CHANNELS = {"plain": 64, "control": 128, "fill": 384}
HEIGHT, WIDTH, STEPS = 64, 96, 4


def pixels(pictures):
    return np.stack([np.asarray(p, np.int64) for p in pictures])


def their_transformer(channels, tiny):
    """A FluxTransformer2DModel like the tiny one that sees so many channels, what it sees beside
    noise weighing as much.
    """
    if channels == 64:
        return tiny
    values = {k: v for k, v in tiny.config.items() if not k.startswith("_")}
    model = FluxTransformer2DModel(**values | dict(in_channels=channels, out_channels=64))
    state, wide = tiny.state_dict(), model.state_dict()["x_embedder.weight"]
    draw = torch.Generator().manual_seed(channels)
    others = torch.randn(wide.shape[0], channels - 64, generator=draw) / channels**0.5
    state["x_embedder.weight"] = torch.cat([state["x_embedder.weight"], others], 1)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def theirs():
    """{kind: components of a diffusers pipeline}."""
    tiny = FluxPipeline.from_pretrained(TINY, torch_dtype=torch.float32).components
    parts = {k: v for k, v in tiny.items() if k not in ("image_encoder", "feature_extractor")}
    kinds = CHANNELS.items()
    own = {kind: their_transformer(count, tiny["transformer"]) for kind, count in kinds}
    return {kind: parts | {"transformer": model} for kind, model in own.items()}


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    """{kind: folder of a pipeline}."""
    found = {"plain": TINY}
    for kind in ("control", "fill"):
        folder = found[kind] = tmp_path_factory.mktemp(kind) / "pipeline"
        shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("transformer", "controlnet"))
        theirs[kind]["transformer"].save_pretrained(folder / "transformer")
    return found


@pytest.fixture(scope="module")
def ours(folders):
    """{kind: our Pipeline}."""
    options = dict(device="cpu", dtype=torch.float32)
    return {kind: fluxlite.load_pipeline(where, **options) for kind, where in folders.items()}


@pytest.fixture(scope="module")
def photo():
    """A picture of the proportions that are drawn, but larger."""
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((144, 96), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask():
    """Of the same size; white marks no whole cells."""
    made = Image.new("L", (144, 96))
    made.paste(255, (33, 20, 101, 76))
    return made


@pytest.fixture(scope="module")
def reference():
    """A reference of the size that ours are resized to beside the tiny pipeline."""
    values = np.random.default_rng(1).integers(0, 256, (4, 16, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((128, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def controlnet(theirs):
    """A ControlNet of the tiny transformer, theirs, with random outputs."""
    base = theirs["plain"]["transformer"]
    values = {k: v for k, v in base.config.items() if not k.startswith("_")}
    net = FluxControlNetModel.from_config(values | dict(num_layers=1, num_single_layers=1))
    state = {k: v for k, v in base.state_dict().items() if k in net.state_dict()}
    net.load_state_dict(state, strict=False)
    for name, module in net.named_children():
        if name.startswith("controlnet"):
            randomise(module)
    return net.eval()


CFG = (
    dict(negative_prompt=[NEGATIVE] * 2, true_cfg_scale=2.5),
    dict(negative_prompt=NEGATIVE, true_cfg=2.5),
)
KONTEXT = dict(max_area=HEIGHT * WIDTH, _auto_resize=False)
CASES = {  # kind, their pipeline, their pictures, ours, what they draw in turn and for how many
    "img2img": ("plain", "FluxImg2ImgPipeline", "image", "image", "image 1 noise 4"),
    "inpaint": (
        *("plain", "FluxInpaintPipeline", "image mask_image", "image mask"),
        "image 1 noise 4 masked_image 1",
    ),
    "fill": (
        *("fill", "FluxFillPipeline", "image mask_image", "image mask"),
        "image 1 noise 4 masked_image 1",
    ),
    "control": (
        *("control", "FluxControlPipeline", "control_image", "control_image"),
        "control_image 4 noise 4",
    ),
    "control_img2img": (
        *("control", "FluxControlImg2ImgPipeline", "image control_image", "image control_image"),
        "control_image 4 image 1 noise 4",
    ),
    "control_inpaint": (
        *("control", "FluxControlInpaintPipeline"),
        *("image control_image mask_image", "image control_image mask"),
        "masked_image 1 control_image 4 image 1 noise 4",
    ),
    "kontext": ("plain", "FluxKontextPipeline", "image:reference", "reference", "noise 4"),
    "kontext_inpaint": (
        *("plain", "FluxKontextInpaintPipeline"),
        *("image mask_image image_reference:reference", "image mask reference", "noise 4"),
    ),
    "controlnet_img2img": (
        *("plain", "FluxControlNetImg2ImgPipeline", "image control_image", "image"),
        "controlnet_0 4 image 1 noise 4",
    ),
    "controlnet_inpaint": (
        *("plain", "FluxControlNetInpaintPipeline", "image control_image mask_image", "image mask"),
        "controlnet_0 4 image 1 noise 4 masked_image 1",
    ),
}
MORE = {  # case: (case of CASES, their options, our options)
    **{name: (name, {}, {}) for name in CASES},
    "img2img_weak": ("img2img", dict(strength=0.4), dict(strength=0.4)),
    "img2img_cfg": ("img2img", *CFG),
    "inpaint_whole": ("inpaint", dict(strength=1.0), dict(strength=1.0)),
    "inpaint_cfg": ("inpaint", *CFG),
    "inpaint_crop": ("inpaint", dict(padding_mask_crop=7), dict(crop=7)),
    "fill_half": ("fill", dict(strength=0.5), dict(strength=0.5)),
    "kontext": ("kontext", KONTEXT, {}),
    "kontext_cfg": ("kontext", KONTEXT | CFG[0], CFG[1]),
    "kontext_inpaint": (  # whose posteriors are their modes
        *("kontext_inpaint", KONTEXT),
        dict(posteriors={"image": torch.zeros(1, 16, 8, 12)}),
    ),
}
COMMON = dict(height=HEIGHT, width=WIDTH, max_sequence_length=16)


def their_pictures(kind, name, parts, **options):
    """Pictures of two prompts, two each, drawn by a pipeline of diffusers in 4 steps."""
    pipe = getattr(diffusers, name)(**parts[kind], **options.pop("extra", {}))
    pipe.set_progress_bar_config(disable=True)
    common = COMMON | dict(num_inference_steps=STEPS, num_images_per_prompt=2, guidance_scale=3.5)
    generator = torch.Generator().manual_seed(7)
    return pixels(pipe(prompt=PROMPTS, generator=generator, **common | options).images)


def our_pictures(kind, ours, order, **options):
    """The same of ours, with what their generator draws in that order."""
    generator, cells = torch.Generator().manual_seed(7), (16, HEIGHT // 8, WIDTH // 8)
    counts = zip(order.split()[::2], map(int, order.split()[1::2]))
    drawn = {name: torch.randn(count, *cells, generator=generator) for name, count in counts}
    common = COMMON | dict(steps=STEPS, images_per_prompt=2, guidance=3.5)
    common |= dict(latents=drawn.pop("noise"), posteriors=drawn)
    return pixels(fluxlite.generate(PROMPTS, checkpoint=ours[kind], **common | options))


@pytest.mark.parametrize("case", MORE)
def test_pictures_match_diffusers(ours, theirs, photo, mask, reference, controlnet, case):
    """Two prompts, two pictures each, of other proportions than square, 4 steps: within 1/255."""
    base, their_options, our_options = MORE[case]
    kind, name, their_names, our_names, order = CASES[base]
    small = photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    given = {"image": small if "kontext" in case else photo, "mask": mask, "mask_image": mask}
    given |= {"control_image": photo.rotate(180), "reference": reference}
    pairs = [(key.partition(":")[0], key.split(":")[-1]) for key in their_names.split()]
    asked = {key: given[source] for key, source in pairs} | their_options
    pictures = {key: given[key] for key in our_names.split()} | our_options
    if "controlnet" in case:
        asked["extra"] = {"controlnet": controlnet}
        own = fluxlite.Control(our_controlnet_from(controlnet), given["control_image"], scale=0.5)
        asked["controlnet_conditioning_scale"], pictures["controls"] = 0.5, own
    expected = their_pictures(kind, name, theirs, **asked)
    got = our_pictures(kind, ours, order, **pictures)
    assert np.abs(got - expected).max() <= 1
    assert expected.std() > 20 and np.abs(got[0] - got[1]).max() > 5
    for key in {"image", "control_image", "reference"} & pictures.keys():
        if kind != "fill" or case == "fill":
            others = pictures | {key: pictures[key].rotate(180)}
            assert np.abs(our_pictures(kind, ours, order, **others) - got).max() > 5
