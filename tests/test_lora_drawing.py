"""Drawing with LoRAs and taking them off, baking, exchanging and extracting by the programs."""

import copy
import json
import logging
import pickle
import re
import runpy
from pathlib import Path

import lora_writers as write
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fluxlite
from fluxlite import Lora
from fluxlite.draw import pipeline as draw_pipeline
from fluxlite.weights import lora_merging, sources
from fluxlite.weights.lora_files import read_lora

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "flux-tiny"
infer = runpy.run_path(str(ROOT / "infer.py"))["body"]
convert = runpy.run_path(str(ROOT / "convert_hf.py"))["body"]
LINEARS = {  # of flux-tiny
    "transformer_blocks.0.attn.to_q": (256, 256),
    "transformer_blocks.1.ff.net.2": (256, 1024),
    "single_transformer_blocks.0.proj_mlp": (1024, 256),
    "single_transformer_blocks.3.proj_out": (256, 1280),
    "norm_out.linear": (512, 256),
    "proj_out": (64, 256),
}
SMALL = dict(height=32, width=32, steps=2, max_sequence_length=16)
QUICK = [f"{key}={value}" for key, value in SMALL.items()]
PROMPT = "red circle with dark blue background"


def save_lora(file, *, seed=0, alpha=400.0, linears=LINEARS):
    """A LoRA of flux-tiny strong enough to be seen, and what it means."""
    key = write.dotted("transformer.")
    made = write.low_rank_file(linears, key, write.DOWN_UP, alpha=alpha, seed=seed)
    save_file(made.tensors, file)
    return made.meant


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for number, name in enumerate("ab"):
        save_lora(folder / f"{name}.safetensors", seed=number)
    return [str(folder / f"{name}.safetensors") for name in "ab"]


@pytest.fixture(scope="module")
def pipeline():
    return fluxlite.load_pipeline(device="cpu", dtype=torch.float32)


def draw(pipeline, **options):
    [picture] = fluxlite.generate(PROMPT, checkpoint=pipeline, seed=3, **SMALL | options)
    return picture


def pixels(picture):
    return np.asarray(picture, np.int64)


# --- pipelines ------------------------------------------------------------------------------------


def test_a_lora_is_taken_off_again_bit_for_bit(pipeline, files):
    plain, before = draw(pipeline), copy.deepcopy(pipeline.transformer.state_dict())
    pipeline.use_loras(Lora(files[0], 0.8), files[1])
    both = draw(pipeline)
    pipeline.use_loras()
    after = pipeline.transformer.state_dict()
    assert np.abs(pixels(both) - pixels(plain)).max() > 20
    assert np.array_equal(pixels(draw(pipeline)), pixels(plain))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert both.info["sampling"]["loras"] == [
        {"file": files[0], "scale": 0.8, "split_qkv": "readers"},
        {"file": files[1], "scale": 1.0, "split_qkv": "readers"},
    ]
    assert "loras" not in plain.info["sampling"]


def test_scale_0_draws_the_bases_picture(pipeline, files):
    plain = draw(pipeline)
    pipeline.use_loras(Lora(files[0], 0.0))
    assert np.array_equal(pixels(draw(pipeline)), pixels(plain))
    pipeline.use_loras()


def test_a_lora_acts_in_a_loaded_pipeline_as_in_generate(pipeline, files):
    where = dict(device="cpu", dtype=torch.float32)
    pipeline.use_loras(files[0])
    loaded, plain = draw(pipeline), pipeline.use_loras() or draw(pipeline)
    [direct] = fluxlite.generate(PROMPT, seed=3, lora=files[0], **SMALL, **where)
    apart = fluxlite.load_pipeline(lora=[Lora(files[0])], lora_merge=False, **where)
    assert np.abs(pixels(loaded) - pixels(plain)).max() > 20
    assert np.array_equal(pixels(direct), pixels(loaded))
    assert np.abs(pixels(draw(apart)) - pixels(loaded)).max() <= 1


def test_a_control_lora_takes_its_settings_with_it(pipeline, tmp_path):
    """The guidance that suits a FLUX.1-Depth, and then again the checkpoint's own."""
    before, linears = pipeline.settings, {"img_in": (256, 128)}
    made = write.low_rank_file(linears, write.dotted("diffusion_model."), write.AB)
    save_file(made.tensors, tmp_path / "control.safetensors")
    pipeline.use_loras(tmp_path / "control.safetensors")
    assert pipeline.kind == "control" and pipeline.settings == {"guidance": 10.0} | before
    pipeline.use_loras()
    assert pipeline.kind == "plain" and pipeline.settings == before


@pytest.mark.parametrize("merge", [True, False])
def test_a_lora_acts_beside_a_controlnet_offload_and_true_cfg(files, merge, tmp_path):
    """Each of them draws otherwise without it, and streamed as kept."""
    edges = tmp_path / "edges.png"
    Image.new("RGB", (32, 32), "white").save(edges)
    options = dict(device="cpu", dtype=torch.float32, lora_merge=merge)
    control = fluxlite.Control("flux-tiny", edges)
    drawn = [
        draw(
            fluxlite.load_pipeline(lora=lora, offload=offload, **options),
            controls=[control],
            true_cfg=2.0,
            negative_prompt="gold circle",
        )
        for lora, offload in (((), "all"), (files, "all"), (files, "none"))
    ]
    plain, streamed, kept = map(pixels, drawn)
    assert np.abs(plain - streamed).max() > 20 and np.abs(streamed - kept).max() <= 1


# --- text encoders --------------------------------------------------------------------------------

CLIP_MODULE, T5_MODULE = "encoder.layers.1.mlp.fc1", "encoder.block.2.layer.1.DenseReluDense.wo"
TEXT_KEYS = {  # as each program calls these two
    "kohya": (
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        "lora_te3_encoder_block_2_layer_1_DenseReluDense_wo",
    ),
    "OneTrainer": (
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        "lora_te2_encoder_block_2_layer_1_DenseReluDense_wo",
    ),
    "ComfyUI": (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1",
        "text_encoders.t5xxl.transformer.encoder.block.2.layer.1.DenseReluDense.wo",
    ),
    "diffusers": (
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        "text_encoder_2.encoder.block.2.layer.1.DenseReluDense.wo",
    ),
    "diffusers of transformers 5": (
        "text_encoder.encoder.layers.1.mlp.fc1",
        "text_encoder_2.encoder.block.2.layer.1.DenseReluDense.wo",
    ),
}


def save_text_lora(file, keys):
    draw, tensors, meant = write.Draw(2), {}, []
    for key, (rows, columns) in zip(keys, ((256, 128), (128, 256))):
        down, up = draw(4, columns), draw(rows, 4)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(40.0)
        meant.append(10 * up.double() @ down.double())
    save_file(tensors, file)
    return meant


@pytest.mark.parametrize("dialect", TEXT_KEYS)
def test_text_encoders_are_merged_under_every_name(dialect, pipeline, tmp_path):
    file = tmp_path / "te.safetensors"
    meant = save_text_lora(file, TEXT_KEYS[dialect])
    source = pipeline.sources["transformer"]
    loras = lora_merging.open_loras([Lora(file, 0.5)], source)
    models = [copy.deepcopy(pipeline.encoders.clip), copy.deepcopy(pipeline.encoders.t5)]
    for part, model, module, change in zip(("clip", "t5"), models, (CLIP_MODULE, T5_MODULE), meant):
        before = copy.deepcopy(model.state_dict())
        lora_merging.merge_encoder(model, loras, part)
        after = model.state_dict()
        [changed] = [name for name in after if not torch.equal(after[name], before[name])]
        assert changed.endswith(f"{module}.weight")
        expected = before[changed].double() + 0.5 * change
        assert (after[changed].double() - expected).abs().max() < 1e-7


UNFIT = {  # (key, shape of its difference, options, what is said)
    "another CLIP": (
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.diff",
        (3072, 768),
        {},
        "encoder.layers.1.mlp.fc1.weight of shape [3072, 768] is for another text encoder: mode",
    ),
    "another T5": (
        "text_encoders.t5xxl.transformer.encoder.block.23.layer.0.SelfAttention.q.diff",
        (2, 2),
        {},
        "model.t5 has no such weight",
    ),
    "a weight that is replaced": (
        "diffusion_model.img_in.set_weight",
        (256, 64),
        {"lora_merge": False},
        "lora.merge=false: img_in.weight is replaced, not added to",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(name, tmp_path):
    key, shape, options, said = UNFIT[name]
    save_file({key: torch.ones(shape)}, tmp_path / "unfit.safetensors")
    config = draw_pipeline.pipeline_config(lora=tmp_path / "unfit.safetensors", **options)
    with pytest.raises(ValueError, match=re.escape(said)):
        draw_pipeline.open_pipeline(config)


def test_a_lora_of_text_alone_draws_another_picture_and_is_taken_off(pipeline, tmp_path):
    save_text_lora(tmp_path / "te.safetensors", TEXT_KEYS["kohya"])
    plain = draw(pipeline)
    pipeline.use_loras(Lora(tmp_path / "te.safetensors", 20.0))
    changed = draw(pipeline)
    pipeline.use_loras()
    assert np.abs(pixels(changed) - pixels(plain)).max() > 5
    assert np.array_equal(pixels(draw(pipeline)), pixels(plain))


def test_text_parts_are_exchanged_too(tmp_path):
    source = sources.open_source("flux-tiny")
    file, models = tmp_path / "te.safetensors", {}
    save_text_lora(file, TEXT_KEYS["OneTrainer"])
    for to in ("peft", "kohya", "comfy"):
        convert(["--src", str(file), "--dst", str(tmp_path / f"{to}.safetensors"), "--to", to])
        models[to] = read_lora(tmp_path / f"{to}.safetensors", source.config)
    keys = load_file(tmp_path / "kohya.safetensors").keys()
    assert "lora_te3_encoder_block_2_layer_1_DenseReluDense_wo.alpha" in keys
    original = read_lora(file, source.config)
    for found in models.values():
        for part in ("clip", "t5"):
            [a], [b] = found.adapters[part], original.adapters[part]
            same = a.scale * a.form.dense() - b.scale * b.form.dense()
            assert same.abs().max() < 1e-7 and a.name == b.name


# --- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_a_reference_to_what_no_reference_trained_is_warned_of_but_a_lora_may_have(
    adapted, pipeline, files, caplog
):
    pipeline.use_loras(*files[:adapted])
    draw(pipeline, reference=Image.new("RGB", (64, 64), "red"))
    pipeline.use_loras()
    assert ("it may ignore reference=" in caplog.text) is not adapted


def drawn_settings(folder):
    [file] = folder.glob("red*.png")
    return json.loads(Image.open(file).text["fluxlite"]), pixels(Image.open(file))


def test_infer_draws_with_several_loras_and_says_which(files, tmp_path, pipeline):
    more = ["dtype=float32", "device=cpu", "seed=3", *QUICK]
    infer(
        [
            *(f"prompt={PROMPT}", f"lora={files[0]}", f"lora={files[1]}"),
            *("lora.scale=0.5", "lora.scale=-1", f"output={tmp_path}", *more),
        ]
    )
    settings, picture = drawn_settings(tmp_path)
    assert [lora["scale"] for lora in settings["loras"]] == [0.5, -1.0]
    assert [lora["file"] for lora in settings["loras"]] == files
    pipeline.use_loras(Lora(files[0], 0.5), Lora(files[1], -1.0))
    assert np.array_equal(picture, pixels(draw(pipeline)))
    pipeline.use_loras()


def test_a_baked_model_has_the_lora_in_it(files, tmp_path):
    """Written in each layout: the base and the difference, in whatever layout they come back."""
    meant = save_lora(tmp_path / "a.safetensors", alpha=3.0)
    base = sources.open_source("flux-tiny")
    for to, dst in (("diffusers", "baked"), ("bfl", "b.safetensors"), ("nemo", "n.safetensors")):
        convert(
            [
                *("--src", "flux-tiny", "--lora", f"{tmp_path}/a.safetensors:-0.5"),
                *("--dst", str(tmp_path / dst), "--to", to, "--verify"),
            ]
        )
        baked = sources.open_source(tmp_path / dst)
        before, after = sources.load_state(base), sources.load_state(baked)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert baked.layout == to and "double_blocks.0.img.qkv.q.weight" in changed
        assert len(changed) == len(LINEARS) + 1  # of the single block's last linear we have two
        name = "double_blocks.0.img.qkv.q.weight"
        exact = before[name].double() - 0.5 * meant["transformer_blocks.0.attn.to_q.weight"]
        assert (after[name].double() - exact).abs().max() <= 0.004 * exact.abs().max()
        assert "a.safetensors" in baked.metadata.get("loras", "a.safetensors")


def test_baking_and_drawing_are_the_same_picture(files, tmp_path, pipeline):
    convert(
        [
            *("--src", "flux-tiny", "--lora", files[0], "--dtype", "float32"),
            *("--dst", str(tmp_path / "transformer"), "--to", "diffusers"),
        ]
    )
    where = dict(device="cpu", dtype=torch.float32, t5="flux-tiny", clip="flux-tiny")
    baked = fluxlite.load_pipeline(tmp_path / "transformer", autoencoder="flux-tiny", **where)
    pipeline.use_loras(files[0])
    expected = draw(pipeline)
    pipeline.use_loras()
    assert np.abs(pixels(draw(baked)) - pixels(expected)).max() <= 2


@pytest.mark.parametrize("to", ["peft", "kohya", "comfy"])
def test_what_was_tuned_is_extracted_and_its_error_told(to, tmp_path, capsys):
    linears = LINEARS | {"transformer_blocks.0.attn.add_k_proj": (256, 256)}
    save_lora(tmp_path / "a.safetensors", linears=linears)
    bake = ["--src", "flux-tiny", "--dst", str(tmp_path / "tuned.safetensors")]
    convert([*bake, "--lora", f"{tmp_path}/a.safetensors", "--dtype", "float32"])
    for rank in (8, 2):
        dst = tmp_path / f"r{rank}.safetensors"
        source = ["--src", str(tmp_path / "tuned.safetensors"), "--extract", "flux-tiny"]
        convert([*source, "--rank", str(rank), "--dst", str(dst), "--to", to])
        line = capsys.readouterr().out.strip().splitlines()[-1]
        share = float(line.split("(")[1].split(" %")[0])
        assert share < 0.01 if rank == 8 else 5 < share < 80
    base = sources.open_source("flux-tiny")
    found = read_lora(tmp_path / "r8.safetensors", base.config)
    original = read_lora(tmp_path / "a.safetensors", base.config)
    states = [
        sources.load_state(
            lora_merging.merged_source(base, lora_merging.open_loras([Lora(one)], base))
        )
        for one in (found, original)
    ]
    for name, tensor in states[0].items():
        error = (tensor.float() - states[1][name].float()).norm() / states[1][name].float().norm()
        assert error < 0.01  # both are rounded to the base's bfloat16


# --- misuse ---------------------------------------------------------------------------------------


def garbage(tmp_path, name):
    """A file or value that is no LoRA for flux-tiny, and a word of what is said."""
    file, good = tmp_path / f"{name}.safetensors", {}
    key = write.dotted("transformer.")
    good = write.low_rank_file(LINEARS, key, write.AB).tensors
    first = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    double = "transformer_blocks.0.attn.to_q"
    cases = {
        "empty": ({}, "holds no tensors"),
        "nan": (good | {first: torch.full((4, 256), float("nan"))}, "NaN or infinite"),
        "wide": (good | {first: torch.zeros(4, 300)}, "of another model"),
        "ranks": (good | {first: torch.zeros(3, 256)}, "no common rank"),
        "half": ({k: v for k, v in good.items() if k != first}, "lacks down"),
        "unknown": (good | {"transformer.transformer_blocks.9.attn.to_q.diff": torch.ones(2, 2)},
                    "match no weight of this model, which has 2 double and 4 single blocks"),
        "model": (load_file(TINY / "transformer" / "diffusion_pytorch_model.safetensors"),
                  "it is a transformer, not a LoRA: name it as model.checkpoint="),
        "vae": (load_file(TINY / "vae" / "diffusion_pytorch_model.safetensors"),
                "it is an autoencoder, not a LoRA: name it as model.autoencoder="),
        "t5": (load_file(TINY / "text_encoder_2" / "model.safetensors"), "it is a T5 text encoder"),
        "unet": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)},
                 "it is a UNet"),
        "sdxl": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 2)}, "SDXL"),
        "sd": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)},
               "SDXL"),
        "wan": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}, "Wan"),
        "flux2": ({"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight":
                   torch.ones(2, 2)}, "FLUX.2"),
        "chroma": (good | {"diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight":
                           torch.ones(2, 2)}, "Chroma"),
        "oft": ({f"lycoris_{double.replace('.', '_')}.oft_blocks": torch.ones(2, 2)}, "OFT"),
        "embedding": (good | {"bundle_emb.fox.t5": torch.ones(2, 2)}, "textual inversion"),
        "alpha": ({f"transformer.{double}.alpha": torch.tensor(1.0)}, "alpha alone"),
        "patterns": (good, "says rank 9"),
        "began": (good, "init_lora_weights=pissa_niter_4: it adds to weights that peft had"),
        "vast": (good, "r=4, lora_alpha=a number of 1329 bits of "),
        "reshaped": (good | {"diffusion_model.img_in.lora_A.weight": torch.ones(4, 64),
                             "diffusion_model.img_in.lora_B.weight": torch.ones(256, 4),
                             "diffusion_model.img_in.reshape_weight": torch.tensor([256, 128])},
                     "img_in.reshape_weight is [256, 128], and its factors make [256, 64]"),
        "a shape alone": ({"diffusion_model.img_in.reshape_weight": torch.tensor([256, 128])},
                          "img_in has shape alone"),
    }  # fmt: skip
    tensors, said = cases[name]
    about = {
        "patterns": {"transformer.r": 9, "transformer.lora_alpha": 9},
        "vast": {"transformer.r": 4, "transformer.lora_alpha": 10**400},
        "began": {"transformer.init_lora_weights": "pissa_niter_4"},
    }
    metadata = {"lora_adapter_metadata": json.dumps(about[name])} if name in about else None
    save_file(tensors, file, metadata=metadata)
    return file, said


GARBAGE = (
    *("empty", "nan", "wide", "ranks", "half", "unknown", "model", "sdxl", "sd", "wan", "flux2"),
    *("vae", "t5", "unet"),
    *(
        "chroma",
        "oft",
        "embedding",
        "alpha",
        "patterns",
        "began",
        "reshaped",
        "a shape alone",
        "vast",
    ),
)


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_lora_of_this_model_is_one_line(name, tmp_path):
    file, said = garbage(tmp_path, name)
    arguments = [f"prompt={PROMPT}", f"lora={file}", f"output={tmp_path}/out", *QUICK]
    with pytest.raises(ValueError, match="lora=") as refused:
        infer(arguments)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_pickle_is_refused_and_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("x",))

    file = tmp_path / "lora.safetensors"
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="a pickle"):
        read_lora(file)
    assert not (tmp_path / "ran").exists()


MISUSES = {
    "a scale without a LoRA": (["lora.scale=1"], "lora.scale= is given 1 times, and lora= 0"),
    "scales of others": (["lora=A", "lora.scale=1", "lora.scale=2"], "lora= 1 times"),
    "a word for a scale": (["lora=A", "lora.scale=strong"], "must be a number"),
    "no such file": (["lora=./nowhere.safetensors"], "does not exist"),
    "nothing": (["lora="], "names no file or folder"),
    "a scale beyond sense": (["lora=A", "lora.scale=1e6"], "must be at least -100"),
    "a LoRA as the model": (["model.checkpoint=A"], "a LoRA or its like"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_of_infer_are_one_line(name, files, tmp_path):
    arguments, said = MISUSES[name]
    arguments = [argument.replace("=A", f"={files[0]}") for argument in arguments]
    with pytest.raises(ValueError) as refused:
        infer([f"prompt={PROMPT}", f"output={tmp_path}/out", *QUICK, *arguments])
    assert said in str(refused.value) and "\n" not in str(refused.value)


CONVERT_MISUSES = {
    "no dialect": (["--src", "A", "--dst", "OUT"], "is a LoRA: choose --to peft, kohya, comfy"),
    "a layout": (["--src", "A", "--dst", "OUT", "--to", "bfl"], "choose --to peft, kohya, comfy"),
    "a folder": (["--src", "A", "--dst", "x", "--to", "peft"], "end it in .safetensors"),
    "a model": (["--src", "MODEL", "--dst", "OUT", "--to", "peft"], "it is a transformer"),
    "a LoRA of a vae": (
        ["--src", "flux-tiny/vae", "--lora", "A", "--dst", "OUT"],
        "changes a transformer",
    ),
    "digests of a LoRA": (["--src", "A", "--digests"], "--digests is for models"),
    "a vae to extract": (
        ["--src", "flux-tiny", "--extract", "flux-tiny/vae", "--rank", "4", "--dst", "OUT"],
        "--extract=",
    ),
    "digests of one": (["--src", "flux-tiny", "--lora", "A", "--digests"], "leave out --lora"),
    "no rank": (
        ["--src", "flux-tiny", "--extract", "flux-tiny", "--dst", "OUT"],
        "name its --rank",
    ),
    "a rank alone": (["--src", "flux-tiny", "--rank", "4", "--dst", "OUT"], "--extract BASE"),
    "nothing tuned": (
        ["--src", "flux-tiny", "--extract", "flux-tiny", "--rank", "4", "--dst", "OUT"],
        "no linear differs",
    ),
    "rank 0": (
        ["--src", "flux-tiny", "--extract", "flux-tiny", "--rank", "0", "--dst", "OUT"],
        "must be at least 1",
    ),
}


@pytest.mark.parametrize("name", CONVERT_MISUSES)
def test_misuses_of_the_converter_are_one_line(name, files, tmp_path):
    arguments, said = CONVERT_MISUSES[name]
    model = TINY / "transformer" / "diffusion_pytorch_model.safetensors"
    named = {"A": files[0], "OUT": str(tmp_path / "o.safetensors"), "MODEL": str(model)}
    named["flux-tiny/vae"] = str(TINY / "vae")
    with pytest.raises(ValueError) as refused:
        convert([named.get(argument, argument) for argument in arguments])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "o.safetensors").exists()


def test_a_lora_in_a_folder_is_found_as_its_programs_name_it(tmp_path):
    save_lora(tmp_path / "pytorch_lora_weights.safetensors")
    save_lora(tmp_path / "checkpoint-100.safetensors")
    assert read_lora(tmp_path).where.endswith("pytorch_lora_weights.safetensors")
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds 2 .safetensors files"):
        read_lora(tmp_path)


def test_a_lora_of_the_hub_is_named_by_owner_name_and_file(tmp_path, monkeypatch):
    asked = []

    def fetch(where, patterns, *, key):
        asked.append((where, patterns, key))
        return tmp_path

    monkeypatch.setattr("fluxlite.weights.hub.fetch_repository", fetch)
    save_lora(tmp_path / "style.safetensors")
    assert read_lora("owner/name/style.safetensors").where == str(tmp_path / "style.safetensors")
    assert asked == [("owner/name", ["style.safetensors"], "lora")]


def test_peft_folder_settings_are_read(tmp_path):
    """adapter_config.json beside adapter_model.safetensors, as peft's save_pretrained writes."""
    made = write.low_rank_file(LINEARS, write.dotted("base_model.model."), write.AB)
    save_file(made.tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12}))
    assert {a.scale for a in read_lora(tmp_path).adapters["transformer"]} == {3.0}


def test_a_baked_files_metadata_name_the_lora(files, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    dst = str(tmp_path / "x.safetensors")
    convert(["--src", "flux-tiny", "--lora", f"{files[0]}:0.25", "--dst", dst])
    with safe_open(dst, "pt") as file:
        [lora] = json.loads(file.metadata()["loras"])
    assert lora == {"file": files[0], "scale": 0.25, "split_qkv": "readers"}
