"""Training transformers that see a picture: Control, Fill and Kontext, whole or as LoRAs, beside
diffusers' transformer with the same inputs. Meshes are in `test_parallel.py`.
"""

from collections import Counter
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from reference import diffusers_flux, last_of_each, relative_error
from test_lora_training import SHAPE, ready_run
from test_trainer import MOCK, configure, train

import fluxlite
from fluxlite.data import holes, rings
from fluxlite.data.fill50k import circle_caption, draw_sample
from fluxlite.data.loading import make_loader
from fluxlite.data.mock import MockPictures
from fluxlite.draw import proof
from fluxlite.preflight.prediction import predict_step
from fluxlite.settings import load_settings
from fluxlite.train import loop, training_step
from fluxlite.train.draws import DrawnSamples
from fluxlite.train.tasks.conditions import draw_hole, encode_hole
from fluxlite.weights import lora_merging, sources
from fluxlite.weights.lora_files import Lora

CHANNELS = {"control": 24, "fill": 24 + 256, "kontext": 12}
SMALL = [*MOCK, *SHAPE, "model.num_single_blocks=1", "dtype=float32", "data.global_batch=2"]


def kind_of(kind):
    return [f"model.kind={kind}", *["data.control=png"] * (kind != "fill")]


def packed(batch, mean, logvar, noise=None):
    """Latents of a batch as diffusers packs them: of their posterior, or their mode."""
    latents = batch[mean]
    if noise:
        latents = latents + (batch[logvar] / 2).exp() * batch[noise]
    return FluxPipeline._pack_latents(latents, *latents.shape)


def beside(kind, batch):
    """What diffusers' pipelines put beside the noisy latents: channels, and further tokens."""
    if kind != "fill":
        noise = "control_noise" if kind == "control" else None
        control = packed(batch, "control_mean", "control_logvar", noise)
        return (control, None) if noise else (None, control)
    count, height, width = len(batch["masks"]), *batch["masks"].shape[2:]
    mask = (batch["masks"][:, 0] / 255).view(count, height // 8, 8, width // 8, 8)
    mask = mask.permute(0, 2, 4, 1, 3).reshape(count, 64, height // 8, width // 8)
    masked = packed(batch, "mean", "logvar", "hole_noise")
    return torch.cat([masked, FluxPipeline._pack_latents(mask, *mask.shape)], dim=2), None


def their_loss(theirs, kind, batch):
    """The loss of diffusers' model on a batch of made-up latents."""
    x0, noise, t = packed(batch, "mean", "logvar", "posterior_noise"), batch["noise"], batch["t"]
    x = (1 - t)[:, None, None] * x0 + t[:, None, None] * noise
    channels, reference = beside(kind, batch)
    x = x if channels is None else torch.cat([x, channels], dim=2)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0))
    if reference is not None:
        x, behind = torch.cat([x, reference], dim=1), ids.clone()
        behind[:, 0] = 1
        ids = torch.cat([ids, behind])
    velocity = theirs(
        hidden_states=x,
        encoder_hidden_states=batch["txt"],
        pooled_projections=batch["pooled"],
        timestep=t,
        guidance=batch["guidance"],
        txt_ids=torch.zeros(batch["txt"].shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity[:, :4], noise - x0)


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_step_is_that_of_diffusers_transformer_with_the_same_inputs(kind, tmp_path):
    theirs = diffusers_flux(singles=1, in_channels=CHANNELS[kind], out_channels=12)
    theirs.save_pretrained(tmp_path / "base")
    given = [*SMALL, *kind_of(kind), f"model.checkpoint={tmp_path}/base"]

    def gradient(run, *_):
        return run.model.img_in.weight.grad

    with (
        ready_run(*given) as (made, batches),
        mock.patch.object(training_step, "optimizer_step", gradient),
    ):
        [batch] = next(batches)
        ours, ours_grad = training_step.train_step(made, [batch], 1)
        expected = their_loss(theirs, kind, batch)
        expected.backward()
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        assert relative_error(ours_grad, theirs.x_embedder.weight.grad) < 1e-5
        tokens = 8 if kind == "kontext" else 4
        assert loop.step_flops(made) == 3 * made.flux.forward_flops(5, tokens)


LORA = ["lora=default", "lora.rank=4", "lora.targets=['x_embedder','*.attn.*']"]


@pytest.mark.parametrize("kind", ["control", "fill"])
@pytest.mark.parametrize("task", [[], LORA], ids=["full", "lora"])
def test_a_new_kind_is_at_first_its_base_whatever_it_sees(task, kind, tmp_path):
    diffusers_flux(singles=1).save_pretrained(tmp_path / "base")
    base = sources.load_transformer(tmp_path / "base", attention="auto")
    given = [*SMALL, *kind_of(kind), *task, f"model.checkpoint={tmp_path}/base"]
    with ready_run(*given) as (made, batches), torch.no_grad():
        [batch] = next(batches)
        texts = dict(t=batch["t"], pooled=batch["pooled"], guidance=batch["guidance"])
        x, more = batch["noise"], CHANNELS[kind] - 12
        seen = (torch.zeros(2, 4, more), torch.randn(2, 4, more))
        drawn = [made.velocity(x, batch["txt"], made.rope, channels=c, **texts) for c in seen]
        assert torch.equal(*drawn), "at first it does not look"
        assert relative_error(drawn[0], base(x, batch["txt"], made.rope, **texts)) < 1e-6
        trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
        assert trained & {"img_in.weight", "x_embedder.down"}


def test_a_loras_run_is_a_control_lora_that_makes_a_control_model(tmp_path):
    diffusers_flux(singles=1).save_pretrained(tmp_path / "base")
    given = [*SMALL, *kind_of("control"), *LORA, f"model.checkpoint={tmp_path}/base", "steps=2"]
    folder = train(*given, "optim.warmup=0", f"output={tmp_path}/run")
    base = sources.open_source(tmp_path / "base")
    baked = lora_merging.bake_source(base, [Lora(str(folder))])
    wide = sources.load_transformer(baked).img_in.weight
    assert wide.shape == (48, 24) and wide[:, 12:].norm() > 0
    again = [a for a in given if not a.startswith(("lora.rank", "lora.targets"))]
    train(*again, f"lora.checkpoint={folder}", f"output={tmp_path}/again")


# --- holes ----------------------------------------------------------------------------------------


def test_holes_are_boxes_strokes_and_whole_pictures():
    found, areas = Counter(), []
    for seed in range(300):
        hole = holes.random_hole(48, 64, seed)
        assert hole.shape == (1, 48, 64) and hole.dtype == torch.uint8
        assert set(hole.unique().tolist()) <= {0, 255} and hole.any()
        areas.append((hole > 0).float().mean().item())
        rows, columns = hole[0].any(1).sum(), hole[0].any(0).sum()
        solid = (hole > 0).sum() == rows * columns
        found["whole" if areas[-1] == 1 else "one box" if solid else "other"] += 1
    assert 15 <= found["whole"] <= 50 and found["one box"] >= 40 and found["other"] >= 100
    assert 0.2 < np.mean(areas) < 0.5 and np.std(areas) > 0.2
    assert torch.equal(holes.random_hole(48, 64, 3), holes.random_hole(48, 64, 3))


def test_a_samples_hole_is_keyed_by_it_and_its_epoch_for_any_workers_and_ranks():
    config = configure(*MOCK, "model.kind=fill", "data.count=8")
    samples = DrawnSamples(
        MockPictures(config.data, split="train", seed=0), partial(draw_hole, config)
    )

    def drawn(ranks, workers):
        found = {}
        for rank in range(ranks):
            sizes = dict(global_batch=4, micro_batch=2, start_index=0, stop_index=16)
            ways = dict(dp_rank=rank, dp_size=ranks, workers=workers)
            for batch in make_loader(samples, **sizes, **ways):
                found |= dict(zip(batch["indices"].tolist(), batch["masks"]))
        return found

    one, two = drawn(1, 0), drawn(2, 1)
    assert one.keys() == two.keys() == set(range(16))
    assert all(torch.equal(one[i], two[i]) for i in one)
    assert sum(torch.equal(one[i], one[i + 8]) for i in range(8)) <= 1, "each epoch anew"


def test_a_mask_of_the_users_is_the_hole_and_weighs_no_loss():
    config = configure(*MOCK, "model.kind=fill")
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    sample = {"indices": 0, "images": torch.zeros(3, 32, 32, dtype=torch.uint8), "masks": mask}
    assert draw_hole(config, sample)["masks"] is mask
    run = mock.Mock(config=config)
    assert training_step.value_weights(run, {"masks": mask[None]}) is None


@pytest.mark.parametrize("cached", [False, True])
def test_what_a_fill_sees_is_grey_in_the_hole_though_the_whole_is_cached(cached):
    seen, latents = [], torch.zeros(1, 3, 2, 2)
    encoder = mock.Mock(scale=lambda x: x)
    encoder.posterior = lambda pixels: (seen.append(pixels), (latents, latents))[1]
    run = mock.Mock(config=configure(*MOCK, "model.kind=fill"), dtype=torch.float32)
    run.parts.autoencoder = encoder
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    mask[..., 3:11, 5:] = 255
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    batch = {"images": white, "masks": mask, "hole_noise": latents}
    batch |= {"mean": latents + 1, "logvar": latents} if cached else {}
    channels = encode_hole(run, batch)["channels"]
    assert torch.equal(seen[0], 1 - mask.expand(-1, 3, -1, -1) / 255)
    assert channels.shape == (1, 1, 12 + 256) and channels[..., 12:].sum() == (mask > 0).sum()


# --- whole runs -----------------------------------------------------------------------------------

TINY = [
    *("model=flux_tiny", "model.checkpoint=flux-tiny", "dtype=float32", "data.width=64"),
    *("data.height=64", "data.workers=0", "data.micro_batch=2", "data.global_batch=2"),
    *("data.val_count=2", "sample.count=2", "sample.steps=1", "metrics.tensorboard=false"),
    *("optim.warmup=0", "steps=1"),
]


@pytest.fixture(scope="module")
def recoloured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "recoloured"
    rings.write_figures(rings.RingsConfig(str(folder), figure="recoloured", count=6))
    return folder


DRAWN = {  # what is given to a model of a kind
    "control": ("control_image",),
    "fill": ("image", "mask"),
    "kontext": ("reference",),
}


@pytest.mark.parametrize(
    "kind", ["control", "fill", pytest.param("kontext", marks=pytest.mark.slow)]
)
def test_a_run_is_previewed_validated_cached_and_drawn_with_as_what_it_is(
    kind, recoloured, tmp_path
):
    given = [*TINY, "data=folder", f"data.path={recoloured}", f"model.kind={kind}"]
    given += [f"data.cache={tmp_path}/cache", f"output={tmp_path}/run"]
    given += LORA if kind == "control" else []
    given += ["data.cache_pictures=true"] if kind == "fill" else ["data.control=ref.png"]
    if kind == "control":
        train(*given, "preview=true")
        assert Image.open(tmp_path / "run/preview/batch-0.png").width == 8 + 4 * (128 + 8)
    folder = train(*given)
    grid = Image.open(next((folder / "images").rglob("*grid*.png")))
    assert grid.width == 8 + 6 * (128 + 8), "input, target and picture, of two samples"
    shown = Image.open(recoloured / "00000.ref.png"), Image.new("L", (64, 64), 255)
    seen = dict(zip(DRAWN[kind], shown))
    [drawn] = fluxlite.generate("a", checkpoint=folder, steps=1, dtype="float32", **seen)
    assert drawn.size == (64, 64)
    if kind != "kontext":
        with pytest.raises(ValueError, match="it needs "):
            fluxlite.generate("a", checkpoint=folder)
    if kind == "control":
        with pytest.raises(ValueError, match="lora.merge=false cannot widen the model's input"):
            fluxlite.load_pipeline(folder, lora_merge=False)


def test_beside_a_lora_of_the_shipped_pipeline_a_picture_to_follow_is_the_transformers(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    given = ["prompt=a", "device=cpu", f"control_image={tmp_path}/a.png"]
    for more, nets in (([], 1), (["lora=x.safetensors"], 0)):
        config = load_settings("infer", [*given, *more])
        assert len(config.controls()) == nets
        assert len(config.pictures()["control_image"]) == 1 - nets


CP = ["parallel.cp=2", "model.max_sequence_length=6", "data.micro_batch=1", "model.num_heads=2"]
CP += ["model.rope_axes=[8,8,8]"]


@pytest.mark.parametrize("kind", [pytest.param("fill", marks=pytest.mark.slow), "kontext"])
def test_preflight_counts_what_a_kind_sees(kind):
    plain, own = (
        predict_step(last_of_each([*SMALL, *CP, *more]), 4) for more in ([], kind_of(kind))
    )
    assert own["memory"]["peak"] > plain["memory"]["peak"]
    if kind == "kontext":
        assert own["sent"]["all_to_all", "cp"] > 1.3 * plain["sent"]["all_to_all", "cp"]


def test_recipes_have_the_customary_figures():
    parts = [f"model.{part}=flux-tiny" for part in ("t5", "clip", "autoencoder")]
    for kind, guidance in (("control", "30"), ("fill", "30"), ("kontext", "1.0")):
        config = configure(f"recipe={kind}", "data.path=photos", *parts)
        assert (config.model.kind, config.flow.guidance) == (kind, guidance)
        assert kind == "kontext" or config.sample.guidance == float(guidance)
        assert config.lora.train == (kind == "kontext")
        assert configure(f"recipe={kind}_tiny").model.kind == kind


# --- what they are for ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_kind_is_proven_by_perfect_pictures_and_not_by_what_it_is_given(kind):
    chosen = proof.choose_pairs(12, 0)

    def perfect(cases):
        named = dict(size=64, seed=1_000_003)
        drawn = (draw_sample(i, choices=[pair], **named)[0] for i, pair in enumerate(chosen))
        return [Image.fromarray(picture) for picture in drawn]

    def unchanged(cases):
        return [next(iter(case.given.values())) for case in cases]

    named = dict(num=12, size=64, seed=0)
    report, _, results = proof.prove_kind(perfect, kind, **named)
    assert report["right"] > 0.95 and report["shuffled_right"] == 0
    assert report["shuffled_place"] < 0.4
    report, *_ = proof.prove_kind(unchanged, kind, **named)
    assert report["right"] == 0
    prompts = {circle_caption(*pair) for pair in chosen}
    assert ({one["prompt"] for one in results} == prompts) == (kind != "kontext")


# --- misuse ---------------------------------------------------------------------------------------

FILL, KONTEXT = ["model.kind=fill"], ["model.kind=kontext", "data.control=png"]
PICTURES = ["model=flux_tiny", "data=folder", "data.path=photos"]
MISUSES = {
    "no reference": (["model.kind=kontext"], "sees a picture: set data.control=ref.jpg"),
    "no control": (["model.kind=control"], "sees a picture: set data.control=control.png"),
    "a control of a Fill": ([*FILL, "data.control=png"], "leave data.control= out"),
    "a mask of what is there": (
        [*PICTURES, *FILL, "data.mask=alpha"],
        "data.mask=alpha marks what is there: name an ending, as mask.png",
    ),
    "a control of nobody": (["data.control=png"], "controlnet=default or model.kind=control too"),
    "a kind of nobody": (["model.kind=redux"], "choose one of plain, control, fill, kontext"),
    "beside a ControlNet": ([*KONTEXT, "controlnet=default"], "beside a plain transformer"),
    "modes": ([*KONTEXT, "data.control_mode=canny"], "is for a union ControlNet"),
    "latents alone": (
        [*PICTURES, *FILL, "data.cache=c"],
        "masks pictures, and data.cache holds latents: set data.cache_pictures=true",
    ),
    "pictures of nobody": (
        [*PICTURES, "data.cache=c", "data.cache_pictures=true"],
        "data.cache_pictures=true is for model.kind=fill",
    ),
    "pictures in no cache": ([*PICTURES, *FILL, "data.cache_pictures=true"], "needs data.cache="),
    "channels of another kind": ([*FILL, "model.in_channels=24"], "set model.kind=control"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_are_one_line(name):
    arguments, said = MISUSES[name]
    base = [] if "model=flux_tiny" in arguments else [*MOCK, *SHAPE]
    with pytest.raises(ValueError, match=said) as refused:
        configure(*base, *arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "channels,arguments,said",
    [
        (24, FILL, "as a FLUX.1-Canny or FLUX.1-Depth: set model.kind=control to train it"),
        (280, KONTEXT, "as a FLUX.1-Fill: set model.kind=fill to train it"),
        (280, [], "set model.kind=fill to train it"),
        (20, FILL, "neither drawn with nor trained"),
        (12, [*FILL, "lora=default"], "of a LoRA name x_embedder among lora.targets"),
        (12, [*FILL, "optim.freeze=['img_in.*']"], "leave img_in to optim.trainable"),
        (12, [*FILL, "model.guidance_embed=false"], "guidance_embed: True there, False here"),
    ],
)
def test_a_checkpoint_of_another_kind_is_one_line(channels, arguments, said, tmp_path):
    base = diffusers_flux(singles=1, in_channels=channels, out_channels=12)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=said) as refused:
        with ready_run(*SMALL, *arguments, f"model.checkpoint={tmp_path}/base"):
            pass
    assert "\n" not in str(refused.value)
