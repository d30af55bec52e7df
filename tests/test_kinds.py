"""Drawing from pictures, into holes, along edges and after references, beside diffusers' pipelines
with the same weights and draws.
"""

import shutil
from pathlib import Path

import diffusers
import kinds
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from reference import our_controlnet_from, randomise
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import fluxlite
from fluxlite.data import images
from fluxlite.draw import canvas
from fluxlite.draw.redux import open_redux
from fluxlite.nets.latents import position_ids
from fluxlite.weights.hub import ASSETS

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
        shutil.copytree(
            TINY,
            folder,
            ignore=shutil.ignore_patterns("transformer", "controlnet", "fluxlite.json"),
        )
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


# --- FLUX.1-Redux ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redux(ours, tmp_path_factory):
    """A folder as FLUX.1-Redux-dev's, tiny and random, for the tiny transformer."""
    folder, width = tmp_path_factory.mktemp("redux"), ours["plain"].model_config.text_width
    small = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    config = SiglipVisionConfig(**small, image_size=28, patch_size=14)
    randomise(SiglipVisionModel(config)).save_pretrained(folder / "image_encoder")
    linears = ReduxImageEncoder(redux_dim=24, txt_in_features=width)
    randomise(linears, seed=1).save_pretrained(folder / "image_embedder")
    return folder


CHANGED_LINEARS = {  # what becomes of the tensors, and what is said
    "a bias that is gone": (
        lambda t: t.pop("redux_up.bias"),
        "redux_up.bias is of shape None, not",
    ),
    "of another SigLIP": (
        lambda t: t.update({"redux_up.weight": torch.ones(len(t["redux_up.bias"]), 32)}),
        "redux_up.weight is of shape .*, 32., not .*, 24.",
    ),
    "a flat one": (
        lambda t: t.update({"redux_down.weight": torch.ones(len(t["redux_down.bias"]))}),
        "redux_up.weight is of shape",
    ),
}


@pytest.mark.parametrize("name", CHANGED_LINEARS)
def test_linears_that_do_not_fit_siglip_are_refused_at_once(name, ours, redux, photo, tmp_path):
    change, said = CHANGED_LINEARS[name]
    folder = shutil.copytree(redux, tmp_path / "redux")
    file = folder / "image_embedder" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    width = ours["plain"].model_config.text_width
    with pytest.raises(ValueError, match=said):
        open_redux(fluxlite.Redux(folder, photo), width)


@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_redux_matches_diffusers(ours, theirs, redux, photo, reference, true_cfg):
    """Two pictures with their scales, added up, and a prompt: within 1/255."""
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=3)
    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel.from_pretrained(redux / "image_encoder"),
        image_embedder=ReduxImageEncoder.from_pretrained(redux / "image_embedder"),
        feature_extractor=processor,
        **{k: v for k, v in theirs["plain"].items() if "text" in k or "token" in k},
    )
    likened, scales = [photo, reference], ([0.5, 0.3], [0.8, 0.4])
    embedded = prior(likened, PROMPTS[0], None, None, None, *scales)
    embeds = embedded.prompt_embeds
    pipe = FluxPipeline(**theirs["plain"])
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(7))
    options = dict(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(7))
    pooled = embedded.pooled_prompt_embeds
    both = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=HEIGHT, width=WIDTH)
    if true_cfg > 1:
        txt, away, _ = pipe.encode_prompt(NEGATIVE, None)
        padded = torch.nn.functional.pad(txt, (0, 0, 0, 4))  # it wants as many tokens of both
        both |= dict(negative_prompt_embeds=padded, negative_pooled_prompt_embeds=away)
    both["true_cfg_scale"] = true_cfg

    def cut(module, args, kwargs):
        if not kwargs["encoder_hidden_states"][:, 512:].any():
            kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"][:, :512]
            kwargs["txt_ids"] = kwargs["txt_ids"][:512]
        return args, kwargs

    hook = pipe.transformer.register_forward_pre_hook(cut, with_kwargs=True)
    expected = pixels(pipe(**both, **options, guidance_scale=3.5).images)
    hook.remove()
    given = [fluxlite.Redux(redux, *one) for one in zip(likened, *scales)]
    common = dict(checkpoint=ours["plain"], steps=STEPS, latents=noise, guidance=3.5)
    common |= dict(height=HEIGHT, width=WIDTH, max_sequence_length=512, true_cfg=true_cfg)
    common |= {"negative_prompt": NEGATIVE} if true_cfg > 1 else {}
    got = fluxlite.generate(PROMPTS[0], redux=given, **common)
    assert np.abs(pixels(got) - expected).max() <= 1 and embeds.shape[1] == 512 + 4
    described = got[0].info["sampling"]["redux"]
    assert [one["scale"] for one in described] == [0.5, 0.3]
    if true_cfg == 1:
        alone = fluxlite.generate(PROMPTS[0], redux=given[0], **common)
        assert np.abs(pixels(alone) - expected).max() > 5


# --- ours -----------------------------------------------------------------------------------------


def drawn(ours, kind="plain", prompts=PROMPTS, **options):
    common = COMMON | dict(steps=STEPS, seed=3, checkpoint=ours[kind])
    return fluxlite.generate(prompts, **common | options)


def test_a_picture_from_a_picture_does_not_depend_on_its_batch(ours, photo, mask):
    """Its posterior is drawn from its seed; prompts have a picture each."""
    given = dict(image=[photo, photo.rotate(180)], mask=mask, images_per_prompt=2)
    whole = pixels(drawn(ours, **given, batch=4))
    assert np.abs(pixels(drawn(ours, **given, batch=1)) - whole).max() <= 1
    second = dict(image=photo.rotate(180), mask=mask, prompt_number=1, picture_number=1)
    assert np.abs(pixels(drawn(ours, prompts=PROMPTS[1], **second)) - whole[3:]).max() <= 1
    assert np.abs(whole[0] - whole[1]).max() > 20 < np.abs(whole[1] - whole[3]).max()


@pytest.mark.parametrize("kind", ["plain", "fill"])
def test_what_is_pasted_leaves_the_outside_as_it_is(ours, photo, mask, kind):
    """At the size of the picture, which is not that of the drawing; a grey mask blends."""
    soft = mask.copy()
    soft.paste(100, (0, 90, 144, 96))
    white, black = np.asarray(soft) == 255, np.asarray(soft) == 0
    for options in (dict(paste=True), dict(crop=5)):
        [got] = drawn(ours, kind, PROMPTS[0], image=photo, mask=soft, **options)
        changed = (pixels([got])[0] != pixels([photo])[0]).any(-1)
        assert got.size == photo.size and not changed[black].any() and changed[white].mean() > 0.9
        assert got.info["sampling"]["height"] == HEIGHT


def test_a_size_that_is_left_out_follows_the_picture(ours, photo):
    """Its proportions, in as many pixels as the checkpoint draws: those of 64 x 64."""
    free = dict(height=None, width=None)
    for given in (dict(image=photo), dict(reference=[photo, photo])):
        assert drawn(ours, prompts="a", **given, **free)[0].size == (64, 48)
    assert drawn(ours, prompts="a", image=photo)[0].size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (2, 1000), (1, 1)])
def test_a_picture_of_a_few_pixels_is_seen_and_pasted_into(size):
    """Where a part of it with the drawing's proportions has less than a pixel a side."""
    picture, white = Image.new("RGB", size, (200, 0, 0)), Image.new("RGB", size, "white")
    opened = canvas.open_canvas(picture, white, 32, 128)
    assert (opened.pixels()[0] > 0.5).all() and opened.holes().all()
    pasted = np.asarray(opened.paste(Image.new("RGB", (128, 32), "blue")))
    assert pasted.shape[1::-1] == size and (pasted == (0, 0, 255)).all(-1).any()


def test_references_are_sized_as_kontext_was_trained():
    theirs = diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    assert list(canvas.REFERENCE_SIZES) == theirs
    for size in ((1000, 1000), (300, 900), (1920, 1080), (31, 17), (5000, 100)):
        aspect = size[0] / size[1]
        _, w, h = min((abs(aspect - w / h), w, h) for w, h in theirs)
        assert canvas.reference_size(size, 1024 * 1024, 16) == (h // 16 * 16, w // 16 * 16)


def test_several_references_are_told_apart_by_their_positions(ours, reference):
    ids = position_ids(4, 6, 2, [(4, 4), (2, 6)])
    assert len(ids) == 2 + 6 + 4 + 3 and ids[:, 0].tolist() == [0] * 8 + [1] * 4 + [2] * 3
    assert ids[-1].tolist() == [2, 0, 2] and ids[7].tolist() == [0, 1, 2]
    other = reference.rotate(180)
    given = [reference, other], [other, reference], reference, [reference] * 2
    found = [drawn(ours, prompts="a", reference=one, decode=False)[0] for one in given]
    changes = [(found[0] - one).norm() / found[0].norm() for one in found[1:]]
    assert min(changes) > 1e-3


def test_a_canny_model_follows_edges_that_are_made_here(ours, photo):
    edges = images.canny_edges(photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    given = (dict(control_image=photo, canny=True), dict(control_image=edges))
    own, made = (pixels(drawn(ours, "control", **one)) for one in given)
    assert (own == made).all()
    assert np.abs(pixels(drawn(ours, "control", control_image=photo)) - own).max() > 5


@pytest.mark.parametrize("kind", ["fill", "control", "plain"])
def test_a_controlnet_guides_every_kind(ours, controlnet, photo, mask, reference, kind):
    """It sees noisy latents alone, whatever its base sees beside them."""
    given = {
        "fill": dict(image=photo, mask=mask),
        "control": dict(control_image=photo),
        "plain": dict(image=photo, mask=mask, reference=reference),
    }[kind]
    control = fluxlite.Control(our_controlnet_from(controlnet), photo, scale=0.5)
    with_net, without = (
        pixels(drawn(ours, kind, controls=controls, **given)) for controls in ([control], [])
    )
    assert np.abs(with_net - without).max() > 10
    none = fluxlite.Control(control.checkpoint, photo, scale=0)
    assert np.abs(pixels(drawn(ours, kind, controls=[none], **given)) - without).max() <= 1


def test_a_picture_from_pictures_is_the_same_whatever_is_freed(folders, photo, mask, reference):
    given = dict(image=photo, mask=mask, reference=reference, dtype="bfloat16", device="cpu")
    none, text, every = (
        pixels(drawn(folders, offload=kept, **given)) for kept in ("none", "text", "all")
    )
    assert (none == text).all() and (none == every).all() and none.std() > 20


def test_references_for_a_pipeline_that_is_no_kontext_are_told(ours, reference, caplog):
    drawn(ours, prompts="a", reference=reference)
    assert "model_index.json is a FluxPipeline: trained without references" in caplog.text


def test_metadata_say_what_was_drawn_from_what(ours, photo, mask, tmp_path):
    photo.save(tmp_path / "photo.png")
    [got] = drawn(ours, prompts="a", image=tmp_path / "photo.png", mask=mask)
    about = got.info["sampling"]
    assert about["image"] == f"{tmp_path}/photo.png" and about["mask"] is None
    assert (about["strength"], about["steps"], len(about["times"])) == (0.6, 3, 4)
    [got] = drawn(ours, prompts="a", image=photo, start_time=0.5)
    about = got.info["sampling"]
    assert about["times"][0] == 0.5 and "strength" not in about


def test_a_kind_has_its_own_settings_and_a_model_without_guidance_draws_from_pictures(
    ours, theirs, tmp_path, photo
):
    assert ours["fill"].settings | {"steps": 50, "guidance": 30.0} == ours["fill"].settings
    assert "guidance" not in ours["plain"].settings or ours["plain"].settings["guidance"] == 3.5
    base = theirs["plain"]["transformer"]
    values = {k: v for k, v in base.config.items() if not k.startswith("_")}
    model = FluxTransformer2DModel(**values | dict(guidance_embeds=False))
    model.load_state_dict(base.state_dict(), strict=False)
    parts = theirs["plain"] | {"transformer": model}
    FluxPipeline(**parts).save_pretrained(tmp_path / "pipeline")
    pipeline = fluxlite.load_pipeline(tmp_path / "pipeline", device="cpu", dtype=torch.float32)
    noise = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    posterior = {"image": torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))}
    ours_too = dict(latents=noise, posteriors=posterior, guidance=None)
    got = drawn({"plain": pipeline}, image=photo, strength=0.5, **ours_too)
    assert pixels(got).std() > 20 and got[0].info["sampling"]["steps"] == 2


@pytest.mark.slow
def test_circles_drawn_from_circles_keep_their_place_or_get_their_colours(ours):
    """The measures of benchmarks/kinds.py on the shipped pipeline, 100 pictures."""
    found = kinds.measure_kinds(ours["plain"], 100)
    assert found["strength 0.3: circle in its place"] >= 0.9
    assert found["strength 0.3: in another's place"] <= 0.05
    changed = found["strength 0.3: mean change of pixels"]
    assert changed > found["autoencoder alone: mean change"]
    assert found["strength 0.9: colours of the prompt"] >= 0.9
    assert found["strength 0.9: colours of another prompt"] <= 0.05
    assert found["inpainting: share of levels changed outside"] == 0
    assert found["inpainting: share of levels changed inside"] > 0.5
