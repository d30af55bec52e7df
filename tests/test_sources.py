"""What is offered as a model: recognised, held against its weights, or refused by name."""

import json
import math
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from fuzzing import time_limit
from reference import diffusers_flux
from safetensors.torch import load_file, save_file
from test_convert import in_layout

import fluxlite
from fluxlite.cli.command_line import load_config
from fluxlite.draw import pipeline, plan, sampling
from fluxlite.nets import flow, schedule
from fluxlite.nets.flow import FlowConfig
from fluxlite.nets.schedule import SampleConfig, times_for
from fluxlite.settings import TrainConfig
from fluxlite.weights import conversion, foreign, layouts, net_configs, sources, tensor_files
from fluxlite.weights.hub import ASSETS
from fluxlite.weights.sources import open_source
from fluxlite.weights.text_encoders import load_text_encoders
from fluxlite.weights.writing import write_converted

TINY = ASSETS / "flux-tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLOATS = {torch.float8_e4m3fn, torch.bfloat16}
HEAD_32 = dict(attention_head_dim=32, axes_dims_rope=(4, 14, 14))


@pytest.fixture(scope="module")
def theirs():
    return diffusers_flux(**HEAD_32).to(torch.bfloat16)


@pytest.fixture
def folder(theirs, tmp_path):
    """A small transformer as diffusers writes it."""
    theirs.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def bfl_file(theirs, tmp_path):
    save_state(tmp_path / "small.safetensors", in_layout(theirs, "bfl"))
    return tmp_path / "small.safetensors"


@pytest.fixture
def pipe(tmp_path):
    """A copy of the shipped pipeline without settings of its own."""
    shutil.copytree(
        TINY, tmp_path / "pipe", ignore=shutil.ignore_patterns("fluxlite.json", "controlnet")
    )
    return tmp_path / "pipe"


def save_state(file, state):
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, file)


def change_state(file, change):
    state = load_file(file)
    change(state)
    save_file(state, file)


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_header(file, entries, data=b"", *, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def refusal(where, **options):
    """The one line with which a source is refused, within seconds."""
    with time_limit(20), pytest.raises(ValueError) as caught:
        open_source(where, **options)
    return str(caught.value)


# --- what an index names, and files that are none -------------------------------------------------


def write_index(folder, name):
    file = folder / "diffusion_pytorch_model.safetensors.index.json"
    keys = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else ["x_embedder.weight"]
    file.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)}))


def test_an_index_names_only_what_lies_in_its_folder_or_below(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / WEIGHTS, outside)
    (folder / "link.safetensors").symlink_to(outside)
    for name in (
        "../outside.safetensors",
        str(outside),
        "link.safetensors",
        "a/../../outside.safetensors",
    ):
        write_index(folder, name)
        message = refusal(folder)
        assert "index.json names" in message and ("outside" in message or "its folder" in message)
    (folder / "below").mkdir()
    os.rename(folder / WEIGHTS, folder / "below" / WEIGHTS)
    shutil.copy(folder / "below" / WEIGHTS, folder / "all.safetensors")
    write_index(folder, f"below/{WEIGHTS}")
    assert open_source(folder).files == [folder / "below" / WEIGHTS]


def test_the_links_of_a_hub_cache_are_followed_to_its_blobs(folder, tmp_path):
    cache = tmp_path / "models--someone--flux"
    snapshot = cache / "snapshots" / "0123" / "transformer"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    write_index(folder, WEIGHTS)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../../blobs/{number}")
    assert open_source(cache / "snapshots" / "0123").config == open_source(folder).config


@pytest.mark.parametrize("junk", [3, ["a"], {"a": 3}, {"a": ["b"]}, None, {}, {"a": "x\0y"}])
def test_an_index_that_is_no_index_is_refused(folder, junk):
    file = folder / "diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": junk}))
    assert "index.json" in refusal(folder)


def test_a_pipe_a_folder_or_a_dangling_link_is_refused_and_not_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "is not a file" in refusal(tmp_path / "pipe.safetensors")
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert "is not a file" in refusal(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert "is not a file" in refusal(folder)
    (folder / WEIGHTS).rmdir()
    (folder / WEIGHTS).symlink_to("/nowhere")
    with pytest.raises((ValueError, OSError), match="nowhere|No such file"):
        open_source(folder)


# --- headers --------------------------------------------------------------------------------------


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "absurd length": ({"a": ENTRY}, 1 << 60, "no whole safetensors file"),
    "length of nothing": ({"a": ENTRY}, 0, "no whole safetensors file"),
    "beyond the file": (
        {"a": ENTRY | {"data_offsets": [0, 1 << 40], "shape": [1 << 38]}},
        None,
        "whole",
    ),
    "overlapping": ({"a": ENTRY, "b": ENTRY}, None, "no whole safetensors file"),
    "cut short": ({"a": ENTRY | {"shape": [4], "data_offsets": [0, 16]}}, None, "whole"),
    "twice": (
        b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}",
        None,
        "twice",
    ),
    "no UTF-8": (b'{"\xff":' + json.dumps(ENTRY).encode() + b"}", None, "UTF-8"),
    "no JSON": (b'{"a":', None, "no JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
    "negative": ({"a": ENTRY | {"shape": [-2]}}, None, "no whole safetensors file"),
    "unknown type": ({"a": ENTRY | {"dtype": "F3"}}, None, "no whole safetensors file"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_damaged_header_is_refused(fault, tmp_path):
    entries, length, named = HEADERS[fault]
    file = write_header(tmp_path / "a.safetensors", entries, bytes(8), length=length)
    message = refusal(file)
    assert named in message and str(file) in message and "\n" not in message


# --- something else -------------------------------------------------------------------------------

OTHERS = {
    "all-in-one": ["text_encoders.t5xxl.transformer.shared.weight", "vae.decoder.conv_in.weight"],
    "bitsandbytes": [
        "double_blocks.0.img_mod.lin.weight",
        "double_blocks.0.img_mod.lin.weight.absmax",
    ],
    "it is quantised": ["double_blocks.0.img_mod.lin.weight_scale_2"],
    "quantised": ["transformer_blocks.0.attn.to_q.qweight"],
    "a LoRA": ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"],
    "LoRA or its like": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "LoRA": ["double_blocks.0.processor.qkv_lora1.down.weight"],
    "or its like": ["lycoris_double_blocks_0_img_attn_proj.lokr_w1"],
    "name it as lora=": ["lycoris_double_blocks_0_img_attn_proj.hada_w1_a"],
    "Redux": ["redux_up.weight", "redux_down.weight"],
    "it is quantised by torchao": ["img_in._weight_qdata", "img_in._weight_scale"],
    "PuLID": ["pulid_ca.0.to_q.weight"],
    "IP-Adapter": ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"],
    "Chroma": ["distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"],
    "FLUX.2": ["single_stream_modulation.lin.weight", "time_in.in_layer.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "UNet": ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"],
    "SDXL": ["down_blocks.0.resnets.0.conv1.weight"],
    "T5": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "CLIP": ["text_model.embeddings.position_embedding.weight"],
    "language model": ["model.layers.0.self_attn.q_proj.weight"],
    "FLUX.1's ae.safetensors": ["quant_conv.weight", "decoder.conv_in.weight"],
    # FLUX.2's as BFL writes it, Wan's, LTX-Video's
    "an autoencoder, but not": ["encoder.quant_conv.weight", "decoder.conv_in.weight"],
    "an autoencoder, but not FLUX.1's": ["conv1.weight", "encoder.downsamples.0.residual.0.gamma"],
    "autoencoder, but not FLUX.1's": ["encoder.conv_in.conv.weight"],
    "LTX-Video": ["model.diffusion_model.patchify_proj.weight", "vae.encoder.conv_in.conv.weight"],
    "PixArt or LTX-Video": ["caption_projection.linear_1.weight", "scale_shift_table"],
    "PixArt": ["pos_embed.proj.weight", "adaln_single.linear.weight"],
    "Sana": ["patch_embed.proj.weight", "transformer_blocks.0.ff.conv_inverted.weight"],
    "CogVideoX": ["patch_embed.text_proj.weight", "transformer_blocks.0.attn1.to_q.weight"],
    "AuraFlow": ["pos_embed.pos_embed", "joint_transformer_blocks.0.attn.to_q.weight"],
    "as Wan": ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"],
    "a video model": ["net.blocks.0.cross_attn.q_proj.weight"],
    "HunyuanVideo": [
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight",
        "time_text_embed.timestep_embedder.linear_1.weight",
    ],
}


@pytest.mark.parametrize("named", OTHERS)
def test_a_file_of_something_else_is_told_by_its_keys(named, tmp_path):
    save_file({key: torch.zeros(2, 2) for key in OTHERS[named]}, tmp_path / "other.safetensors")
    message = refusal(tmp_path / "other.safetensors")
    assert named in message and message.count(": ") >= 2 and "\n" not in message


@pytest.mark.parametrize("prefix", ["diffusion_model.", "_orig_mod.", "model.diffusion_model."])
def test_what_a_program_puts_before_all_keys_is_left_out(bfl_file, prefix):
    plain = {name: tensor.clone() for name, tensor in sources.weights_of(open_source(bfl_file))}
    save_state(bfl_file, {prefix + name: t for name, t in load_file(bfl_file).items()})
    found = dict(sources.weights_of(open_source(bfl_file)))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_one_of_several_files_says_that_their_folder_is_named(bfl_file):
    for name in ("x-00001-of-00003.safetensors", "x-00002-of-00002.gguf"):
        file = bfl_file.with_name(name)
        shutil.copy(bfl_file, file)
        assert f"{file} is one of {name[15]} files: name their folder" in refusal(file)
    alone = bfl_file.rename(bfl_file.with_name("x-00001-of-00001.safetensors"))
    assert open_source(alone).what == "transformer"


BYTES = {
    "pickles": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x02}q\x00(X\x04\0\0\0" + bytes(100),
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "web page": b"\n  <!DOCTYPE html><html>404</html>",
    "JSON": b'{"error": "Entry not found"}',
    "empty": b"",
    "no whole safetensors": b"\x07nothing of any kind",
    "a text file: name the weights": "# Größe\n\nNotes on a model.\n".encode(),
    "a tar: unpack it": b"a.txt".ljust(257, b"\0") + b"ustar\x0000" + bytes(250),
    "a compressed archive: unpack it": b"\x1f\x8b\x08\0" + bytes(100),
    "a picture: name the weights": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("named", BYTES)
def test_a_file_of_another_kind_is_told_by_its_first_bytes(named, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(BYTES[named])
    assert named in refusal(tmp_path / "other.safetensors")


def test_a_folder_without_safetensors_says_what_it_has(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "pytorch_model.bin" in refusal(tmp_path)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_no_layout_of_ours_is_taken_for_something_else(theirs, layout):
    config = net_configs.config_from_diffusers(theirs.config)
    foreign.check_keys(list(conversion.layout_shapes(layout, config)))
    foreign.check_keys(
        [f"model.diffusion_model.{key}" for key in conversion.layout_shapes("bfl", config)]
    )
    for path in (TINY / "controlnet", TINY / "vae"):
        source = open_source(path)
        if (source.what, layout) != ("autoencoder", "nemo"):
            foreign.check_keys(list(conversion.layout_shapes(layout, source.config)))


SHAPES = {
    "ZeRO-3": lambda s: s.update({"img_in.weight": torch.zeros(0)}),
    "flattened": lambda s: s.update({"img_in.weight": s["img_in.weight"].flatten()}),
    "img_in.weight has the shape []": lambda s: s.update({"img_in.weight": torch.zeros(())}),
    "txt_in.bias": lambda s: s.update({"txt_in.bias": torch.zeros(())}),
    "missing": lambda s: s.pop("img_in.weight"),
    "damaged": lambda s: s.update({"double_blocks.999999999.img_mod.lin.bias": torch.zeros(2)}),
}


@pytest.mark.parametrize("named", SHAPES)
def test_placeholders_scalars_and_absurd_numbers_are_refused(named, bfl_file):
    change_state(bfl_file, SHAPES[named])
    assert named in refusal(bfl_file)


def test_an_autoencoder_without_its_convolutions_is_refused(tmp_path):
    state = load_file(TINY / "vae" / WEIGHTS)
    kept = {name: t for name, t in state.items() if "conv1" not in name}
    save_file(kept, tmp_path / "ae.safetensors")
    assert "missing" in refusal(tmp_path / "ae.safetensors", part="vae")
    save_file({"decoder.conv_in.weight": torch.zeros(4)}, tmp_path / "ae.safetensors")
    assert "decoder.conv_in.weight" in refusal(tmp_path / "ae.safetensors", part="vae")


# --- descriptions ---------------------------------------------------------------------------------

WRONG = [10**9, -1, 0, 1.5, "two", None, [], {}, True]


@pytest.mark.parametrize(
    "key", ["num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads"]
)
def test_a_config_that_promises_other_than_the_weights_is_refused_at_once(folder, key):
    for value in WRONG:
        change_json(folder / "config.json", **{key: value})
        message = refusal(folder)
        assert "config.json" in message and "\n" not in message
    change_json(folder / "config.json", num_layers=2, num_single_layers=3, attention_head_dim=32)
    change_json(folder / "config.json", num_attention_heads=3)
    open_source(folder)


@pytest.mark.parametrize(
    "axes", [[10**9, 14, 14], [-4, 22, 14], ["4", 14, 14], 3, [], [4.0, 14, 14], [3, 14, 15]]
)
def test_rotations_of_no_head_are_refused(folder, axes):
    change_json(folder / "config.json", axes_dims_rope=axes)
    assert "rope" in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "3", "[" * 100_000, '{"num_layers": NaN}', "{}{}", '{"a":1,"a":2}', "\xff"]
)
def test_a_config_that_is_no_json_is_refused_by_name(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    assert "config.json" in refusal(folder)


METADATA = {
    "config": [
        "{",
        "[]",
        {"num_double_blocks": 10**9},
        {"rope_axes": "x"},
        {"rope_theta": -1},
        {"x": 1},
    ],
    "sampling": ["{", "[]", {"steps": 0}, {"shift": "much"}, {"x": 1}],
    "scheduler": ["{", "[]", {"shift": -1}, {"use_dynamic_shifting": "no"}],
}


@pytest.mark.parametrize("key", METADATA)
def test_damaged_metadata_of_our_own_files_is_refused(pipe, tmp_path, key):
    (pipe / "fluxlite.json").write_text('{"steps": 9}')
    file = tmp_path / "ours.safetensors"
    write_converted(open_source(pipe), file)
    state, about = load_file(file), tensor_files.Tensors(file).metadata
    for change in METADATA[key]:
        text = change if isinstance(change, str) else json.dumps(json.loads(about[key]) | change)
        save_file(state, file, about | {key: text})
        assert "ours.safetensors's metadata" in refusal(file)
    save_file(state, file, about)
    assert open_source(file).settings == {"steps": 9}


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_num_groups": 0},
        {"scaling_factor": "a"},
        {"scaling_factor": 0},
        {"block_out_channels": [16] * 9},
        {"layers_per_block": 10**9},
        {"latent_channels": -1},
        {"shift_factor": [1]},
        {"norm_num_groups": 10**12},
    ],
)
def test_a_damaged_description_of_an_autoencoder_is_refused(pipe, changes):
    change_json(pipe / "vae" / "config.json", **changes)
    message = refusal(pipe, part="vae")
    assert list(changes)[0] in message and "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        {"steps": "many"},
        {"steps": 10**9},
        {"stepps": 4},
        {"height": -64},
        {"height": 65},
        [],
        {"guidance": [1]},
    ],
)
def test_damaged_settings_beside_a_model_are_refused_by_the_files_name(pipe, values):
    (pipe / "fluxlite.json").write_text(json.dumps(values))
    assert "fluxlite.json" in refusal(pipe)


def load_encoders(pipe):
    with time_limit(60), pytest.raises(ValueError) as caught:
        load_text_encoders(str(pipe), str(pipe), device="cpu", dtype=torch.float32)
    return str(caught.value)


@pytest.mark.parametrize(
    "part,key",
    [
        ("text_encoder", "num_hidden_layers"),
        ("text_encoder", "vocab_size"),
        ("text_encoder", "intermediate_size"),
        ("text_encoder_2", "num_layers"),
        ("text_encoder_2", "d_ff"),
        ("text_encoder_2", "d_model"),
    ],
)
def test_a_text_encoder_that_promises_more_than_its_weights_is_refused_at_once(pipe, part, key):
    for value in (10**9, -1, 0, "x", None, [1]):
        change_json(pipe / part / "config.json", **{key: value})
        message = load_encoders(pipe)
        assert key in message and "config.json" in message and "\n" not in message


@pytest.mark.parametrize(
    "file",
    ["tokenizer_2/tokenizer.json", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"],
)
@pytest.mark.parametrize("text", ["{", "3", '{"model": 3}', '{"a": [' + "[" * 50_000])
def test_a_damaged_tokenizer_is_one_line_that_names_its_folder(pipe, file, text):
    if "vocab" in file:  # else the other file is read
        (pipe / "tokenizer" / "tokenizer.json").unlink()
    if text == '{"model": 3}' and "config" in file:
        text = '{"model_max_length": -3}'
    (pipe / file).write_text(text)
    message = load_encoders(pipe)
    assert file.split("/")[0] in message and "\n" not in message


@pytest.mark.parametrize(
    "file", ["tokenizer/merges.txt", "tokenizer_2/spiece.model", "text_encoder/extra.json"]
)
def test_a_pipe_beside_an_encoder_is_not_waited_for(pipe, file):
    (pipe / file).unlink(missing_ok=True)
    os.mkfifo(pipe / file)
    message = load_encoders(pipe)
    assert file in message and "is not a file" in message


def test_a_tokenizer_of_another_model_is_refused(pipe):
    tokenizer = json.loads((pipe / "tokenizer_2" / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {
        "special": True
    }
    for number in range(30):
        tokenizer["added_tokens"].append(flags | {"id": 238 + number, "content": f"<new{number}>"})
    (pipe / "tokenizer_2" / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = load_encoders(pipe)
    assert "tokenizer_2" in message and "the model knows 238 tokens" in message


# --- rotations of a bare file ---------------------------------------------------------------------


def test_rotations_of_a_bare_file_are_said_and_can_be_set(bfl_file, caplog):
    with caplog.at_level("INFO", "fluxlite"):
        assert open_source(bfl_file).config.rope_axes == (4, 14, 14)
    assert "rope_axes=(4, 14, 14), rope_theta=10000 is assumed" in caplog.text
    caplog.clear()
    given = {"rope_axes": [8, 12, 12], "rope_theta": 2000, "hidden_size": 7}
    config = open_source(bfl_file, given=given).config
    assert (config.rope_axes, config.rope_theta, config.hidden_size) == ((8, 12, 12), 2000, 96)
    assert "assumed" not in caplog.text
    assert "rope_axes" in refusal(bfl_file, given={"rope_axes": [8, 12, 13]})


def test_rotations_named_for_drawing_are_taken_or_compared(tmp_path):
    bare = tmp_path / "bare.safetensors"
    state = conversion.from_fluxlite(
        sources.load_state(open_source(TINY)), open_source(TINY).config, "bfl"
    )
    save_state(bare, state)
    parts = dict(t5=str(TINY), clip=str(TINY), autoencoder=str(TINY), device="cpu")
    expected = {"rope_axes": [16, 24, 24], "rope_theta": 500}
    found = fluxlite.load_pipeline(bare, expected=expected, offload="text", **parts)
    assert found.transformer.config.rope_axes == (16, 24, 24)
    with pytest.raises(ValueError, match="model.rope_axes=.*16, 24, 24.*but"):
        fluxlite.load_pipeline(TINY, expected=expected, device="cpu")


def test_a_head_width_that_flux_has_not_needs_its_axes_named(tmp_path):
    theirs = diffusers_flux(attention_head_dim=12, axes_dims_rope=(4, 4, 4))
    save_state(tmp_path / "odd.safetensors", in_layout(theirs, "bfl"))
    assert "set model.rope_axes=" in refusal(tmp_path / "odd.safetensors")
    assert (
        open_source(tmp_path / "odd.safetensors", given={"rope_axes": [4, 4, 4]}).config.head_width
        == 12
    )


# --- schedulers -----------------------------------------------------------------------------------

SCHEDULERS = [
    {},
    {"use_dynamic_shifting": False, "shift": 3.0},
    {"use_dynamic_shifting": False, "shift": 1.0},
    {"base_shift": 0.3, "max_shift": 0.9, "base_image_seq_len": 64, "max_image_seq_len": 1000},
    {"time_shift_type": "linear"},
    {"shift_terminal": 0.1},
    {"shift": 6, "unheard_of": [1], "shift_terminal": None},
]


@pytest.mark.parametrize("changes", SCHEDULERS)
def test_times_are_those_of_the_folders_own_scheduler(pipe, changes):
    change_json(pipe / "scheduler" / "scheduler_config.json", **changes)
    found = fluxlite.load_pipeline(pipe, offload="text", device="cpu")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipe / "scheduler")
    about = scheduler.config
    ends = about.base_image_seq_len, about.max_image_seq_len, about.base_shift, about.max_shift
    for steps, tokens in [(2, 16), (4, 256), (28, 1024), (50, 4096), (28, 16_384)]:
        mu = calculate_shift(tokens, *ends)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
        ours = times_for(SampleConfig(steps=steps), found.sources["transformer"].config, tokens)
        assert torch.allclose(ours, scheduler.sigmas, atol=2e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"num_train_timesteps": 500},
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        {"base_image_seq_len": 4096},
        {"max_shift": 20, "max_image_seq_len": 257},
    ],
)
def test_what_a_scheduler_says_and_we_do_not_is_refused_until_shift_is_named(pipe, changes):
    change_json(pipe / "scheduler" / "scheduler_config.json", **changes)
    config = open_source(pipe).config
    with pytest.raises(ValueError, match="name shift="):
        times_for(SampleConfig(), config, 1024)
    assert len(times_for(SampleConfig(shift="3"), config, 1024)) == 29


@pytest.mark.parametrize(
    "changes",
    [
        {"shift": 0},
        {"shift": "3"},
        {"base_shift": [1]},
        {"use_dynamic_shifting": 1},
        {"shift_terminal": 1},
        {"time_shift_type": "cubic"},
        {"max_image_seq_len": 0},
        {"num_train_timesteps": -1},
    ],
)
def test_a_damaged_scheduler_is_refused_by_the_files_name(pipe, changes):
    change_json(pipe / "scheduler" / "scheduler_config.json", **changes)
    message = refusal(pipe)
    assert "scheduler_config.json" in message and list(changes)[0] in message


def without_guidance(pipe):
    file = pipe / "transformer" / WEIGHTS
    change_state(file, lambda s: [s.pop(name) for name in list(s) if "guidance_embedder" in name])
    change_json(pipe / "transformer" / "config.json", guidance_embeds=False)
    return pipe


def test_a_model_without_guidance_is_schnell_only_where_its_scheduler_says_so(pipe, caplog):
    without_guidance(pipe)
    assert pipeline.default_settings(open_source(pipe)) == {}  # FLUX.1-dev's scheduler beside it
    change_json(pipe / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=1.0)
    assert pipeline.default_settings(open_source(pipe)) == {"steps": 4, "max_sequence_length": 256}
    assert not caplog.text
    shutil.rmtree(pipe / "scheduler")
    with caplog.at_level("INFO", "fluxlite"):
        source = open_source(pipe)
        assert pipeline.default_settings(source)["steps"] == 4
    assert "taken for FLUX.1-schnell" in caplog.text and "shift=resolution" in caplog.text
    assert times_for(SampleConfig(steps=4), source.config, 4096).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_a_numeric_shift_is_the_factor_that_it_is_to_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28))
    config = open_source(TINY).config
    for tokens in (256, 4096):
        ours = times_for(SampleConfig(shift="3.0"), config, tokens)
        assert torch.allclose(ours, scheduler.sigmas, atol=1e-6)
    options = dict(seed=0, indices=range(200))
    t = flow.sample_t(FlowConfig(shift="none"), 256, **options)
    assert torch.equal(flow.sample_t(FlowConfig(shift="3"), 256, **options), 3 * t / (1 + 2 * t))
    for shift in ("0", "-1", "nan", "inf", "1e9", "much"):
        with pytest.raises(ValueError, match=f"flow.shift={shift}"):
            FlowConfig(shift=shift).validate()
        with pytest.raises(ValueError, match=f"^shift={shift}"):
            SampleConfig(shift=shift).validate()


def test_the_recipe_that_had_a_number_still_means_the_same():
    recipe = load_config(TrainConfig, "train", ["recipe=controlnet_tiny"])
    assert flow.shift_factor(recipe.flow.shift, 16) == math.exp(1.3)


def test_a_shift_saved_with_its_old_meaning_keeps_it_or_is_refused(folder, tmp_path):
    (tmp_path / "fluxlite.json").write_text('{"shift": "1.3", "steps": 9}')
    assert 'no "version"' in refusal(folder)
    (tmp_path / "fluxlite.json").write_text('{"shift": "1.3", "steps": 9, "version": "0.1.0"}')
    old = open_source(folder)
    assert old.settings == {"shift": str(math.exp(1.3)), "steps": 9}
    (tmp_path / "fluxlite.json").write_text('{"shift": "1.3", "steps": 9, "version": "0.2.0"}')
    assert open_source(folder).settings == {"shift": "1.3", "steps": 9}
    saved = {"shift": "1.3"}
    assert schedule.read_settings("a", saved | {"version": "0.1.0"}) == {
        "shift": str(math.exp(1.3))
    }
    assert schedule.read_settings("a", {"shift": "resolution"}) == {"shift": "resolution"}


def test_a_converted_model_carries_its_scheduler_along(pipe, tmp_path):
    change_json(pipe / "scheduler" / "scheduler_config.json", use_dynamic_shifting=False, shift=3.0)
    source = open_source(pipe)
    for layout in ("fluxlite", "bfl", "nemo"):
        file = tmp_path / "alone" / f"{layout}.safetensors"
        write_converted(source, file, to=layout)
        assert open_source(file).config.scheduler == source.config.scheduler
    folder = tmp_path / "alone" / "transformer"
    write_converted(source, folder, to="diffusers")
    theirs = FlowMatchEulerDiscreteScheduler.from_config(
        json.loads((folder / "scheduler_config.json").read_text())
    )
    assert theirs.config.shift == 3.0 and not theirs.config.use_dynamic_shifting
    again = write_converted(open_source(folder), folder.parent / "again", to="diffusers")[0]
    assert len(again) == 1 and open_source(again[0].parent).config.scheduler.shift == 3.0


def test_true_cfg_steers_away_from_the_empty_prompt_as_diffusers_does():
    options = dict(height=64, width=64, steps=3, max_sequence_length=16)
    cfg = dict(checkpoint=TINY, device="cpu", dtype=torch.float32, seed=5)
    ours = fluxlite.generate("red circle with teal background", true_cfg=3.0, **options, **cfg)
    plain = fluxlite.generate("red circle with teal background", **options, **cfg)
    theirs = FluxPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = sampling.initial_noise((16, 8, 8), [plan.picture_seed(5, 0, 0)])
    expected = theirs(
        prompt="red circle with teal background",
        negative_prompt="",
        true_cfg_scale=3.0,
        height=64,
        width=64,
        num_inference_steps=3,
        max_sequence_length=16,
        latents=noise,
    ).images
    difference = [
        np.abs(np.asarray(a[0], int) - np.asarray(expected[0], int)).max() for a in (ours, plain)
    ]
    assert difference[0] <= 1 and difference[1] > 20


# --- types and values -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.int64])
def test_a_type_that_no_weights_have_is_refused_by_name(bfl_file, dtype):
    change_state(bfl_file, lambda s: s.update({"txt_in.weight": s["txt_in.weight"].to(dtype)}))
    assert "txt_in.weight is of type" in refusal(bfl_file)


def test_the_widest_type_of_a_tensors_pieces_wins(bfl_file, tmp_path):
    """A bf16 final modulation among fp8 blocks, and mixed q, k and v, come out as they are."""

    def narrow(state):
        for name in state:
            if "blocks." in name:
                state[name] = state[name].to(torch.float8_e4m3fn)

    change_state(bfl_file, narrow)
    source, original = open_source(bfl_file), load_file(bfl_file)
    assert {dtype for dtype, _ in source.described.values()} == FLOATS
    loaded = sources.load_transformer(source, dtype=torch.float32).state_dict()
    back = conversion.from_fluxlite(loaded, source.config, "bfl")
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in original.items())
    for layout in ("fluxlite", "nemo", "diffusers"):
        there, home = tmp_path / f"there-{layout}", tmp_path / f"home-{layout}.safetensors"
        write_converted(source, there, to=layout)
        write_converted(open_source(there), home, to="bfl")
        assert all(torch.equal(load_file(home)[n].float(), t.float()) for n, t in original.items())


def test_mixed_queries_keys_and_values_are_joined_in_the_widest_type(folder, tmp_path):
    name = "transformer_blocks.0.attn.to_k.weight"
    change_state(folder / WEIGHTS, lambda s: s.update({name: s[name].to(torch.float8_e4m3fn)}))
    source, narrowed = open_source(folder), load_file(folder / WEIGHTS)[name]
    assert source.described[name][0] == torch.float8_e4m3fn
    write_converted(source, tmp_path / "joined.safetensors", to="bfl")
    joined = load_file(tmp_path / "joined.safetensors")["double_blocks.0.img_attn.qkv.weight"]
    assert joined.dtype == torch.bfloat16 and torch.equal(joined.chunk(3)[1], narrowed.bfloat16())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_that_are_not_finite_are_not_converted(bfl_file, tmp_path, value, dtype):
    name = "single_blocks.2.linear1.weight"

    def poison(state):
        state[name] = state[name].to(dtype)
        state[name].view(-1)[7] = value if dtype == torch.bfloat16 else math.nan

    change_state(bfl_file, poison)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values"):
        write_converted(open_source(bfl_file), tmp_path / "out" / "new.safetensors", to="nemo")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name,where",
    [
        ("single_transformer_blocks.1.proj_mlp.weight", "single_blocks.1"),
        ("norm_out.linear.bias", "modulation"),
    ],
)
def test_weights_that_are_not_finite_draw_no_black_picture(pipe, name, where):
    change_state(pipe / "transformer" / WEIGHTS, lambda s: s[name].view(-1)[0:1].fill_(math.nan))
    with pytest.raises(ValueError, match=f"NaN or infinite after step 1 of 3, and .*{where}"):
        fluxlite.generate(
            "a", checkpoint=pipe, height=64, width=64, steps=3, max_sequence_length=16, device="cpu"
        )


def test_an_autoencoder_that_is_not_finite_draws_no_black_picture(pipe):
    change_state(pipe / "vae" / WEIGHTS, lambda s: s["decoder.conv_in.bias"].fill_(math.inf))
    with pytest.raises(ValueError, match="the autoencoder gives NaN"):
        fluxlite.generate(
            "a", checkpoint=pipe, height=64, width=64, steps=1, max_sequence_length=16, device="cpu"
        )


# --- transformers that see more than noise --------------------------------------------------------


@pytest.mark.parametrize(
    "channels,name", [(384, "FLUX.1-Fill"), (128, "FLUX.1-Canny"), (96, "more than noise")]
)
def test_a_transformer_that_sees_more_than_noise_is_not_trained_but_converted(
    pipe, tmp_path, channels, name
):
    def widen(state):
        old = state["x_embedder.weight"]
        state["x_embedder.weight"] = torch.cat([old, torch.ones(256, channels - 64).to(old)], 1)

    change_state(pipe / "transformer" / WEIGHTS, widen)
    change_json(pipe / "transformer" / "config.json", in_channels=channels)
    for part in ("text_encoder", "text_encoder_2"):
        (pipe / part / "model.safetensors").unlink()  # they are not read before it is clear
    wrong = "takes 96 channels and gives 64" if channels == 96 else "it needs .*image="
    with pytest.raises(ValueError, match=wrong):
        fluxlite.generate("a", checkpoint=pipe, device="cpu")
    with pytest.raises(ValueError, match=name):
        load_config(TrainConfig, "train", ["model=flux_tiny", f"model.in_channels={channels}"])
    write_converted(open_source(pipe), tmp_path / "new.safetensors", to="bfl")
    assert load_file(tmp_path / "new.safetensors")["img_in.weight"].shape == (256, channels)
