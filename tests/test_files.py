"""Files that people have: all-in-one checkpoints, encoders in one file, GGUF. Each is read as the
plain files are, or refused in a line that says what it is.
"""

import logging
import re
import runpy
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scaled_fp8 import FP8, add_old_keys

import fluxlite
from fluxlite.cli.command_line import load_config
from fluxlite.nets.quantized import QuantizedLinear
from fluxlite.settings import TrainConfig
from fluxlite.train.building import open_base
from fluxlite.train.setup import load_parts
from fluxlite.weights import conversion, gguf_files, hub, sources
from fluxlite.weights.encoder_files import T5, locate_encoder, quiet_transformers
from fluxlite.weights.hub import ASSETS
from fluxlite.weights.sources import open_source
from fluxlite.weights.tensor_files import Tensors
from fluxlite.weights.text_encoders import load_text_encoders

ROOT, TINY = Path(__file__).parents[1], ASSETS / "flux-tiny"
PROMPT = "red circle with dark blue background"
PARTS = "transformer", "text_encoder_2", "text_encoder", "vae"
PREFIXES = {
    "today": ("model.diffusion_model.", "text_encoders.t5xxl.transformer.")
    + ("text_encoders.clip_l.transformer.", "vae."),
    "older": ("model.diffusion_model.", "cond_stage_model.t5xxl.transformer.")
    + ("cond_stage_model.clip_l.transformer.", "first_stage_model."),
}
DRAWN = dict(steps=2, guidance=2.0, shift="none", height=64, width=64, max_sequence_length=16)
convert = runpy.run_path(str(ROOT / "convert_hf.py"))["body"]
needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="needs gguf")


def save_all(states, file, named="today"):
    """An all-in-one file, beside it what its small autoencoder's shapes do not show."""
    save_file(prefixed(states, PREFIXES[named]), file)
    shutil.copy(TINY / "vae" / "config.json", file.parent)


@pytest.fixture(scope="module")
def states():
    """{part: state} of the shipped pipeline, transformer and autoencoder with BFL's names."""
    found = {part: load_file(TINY / part / "model.safetensors") for part in PARTS[1:3]}
    for part in ("transformer", "vae"):
        source = open_source(TINY, part=part)
        found[part] = in_bfl(source)
    return {part: {k: t.contiguous() for k, t in found[part].items()} for part in PARTS}


def in_bfl(source):
    return dict(conversion.convert_weights(source.read, source.layout, "bfl", source.config))


def prefixed(states, prefixes):
    """An all-in-one file's tensors, with what ComfyUI adds to encoders."""
    found = {}
    for part, prefix in zip(PARTS, prefixes):
        found |= {prefix + key: tensor for key, tensor in states[part].items()}
    for prefix in prefixes[1:3]:
        found[f"{prefix.removesuffix('transformer.')}logit_scale"] = torch.tensor(4.6)
    return found


def load_encoders(t5, clip, tokenizers=None, dtype=torch.bfloat16):
    return load_text_encoders(
        str(t5), str(clip), device="cpu", dtype=dtype, tokenizers=tokenizers and str(tokenizers)
    )


def encodings(*places, **options):
    return load_encoders(*places, **options).encode([PROMPT], 16)


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


# --- all-in-one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", PREFIXES)
def test_an_all_in_one_file_draws_what_its_parts_draw(named, states, tmp_path):
    file = tmp_path / "all.safetensors"
    save_all(states, file, named)
    options = dict(device="cpu", dtype=torch.float32, **DRAWN)
    [ours] = fluxlite.generate(PROMPT, checkpoint=str(file), tokenizers="flux-tiny", **options)
    [theirs] = fluxlite.generate(PROMPT, checkpoint="flux-tiny", **options)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs)) and np.asarray(ours).std() > 5


def test_a_transformer_without_a_prefix_is_that_of_its_all_in_one_file(states, tmp_path, caplog):
    named = ("", *PREFIXES["today"][1:])
    save_file(prefixed(states, named), tmp_path / "all.safetensors")
    ours, plain = (open_source(place) for place in (tmp_path / "all.safetensors", TINY))
    plain = dict(sources.weights_of(plain))
    assert ours.layout == "bfl" and not [r for r in caplog.records if "left out" in r.message]
    assert all(torch.equal(tensor, plain[name]) for name, tensor in sources.weights_of(ours))


def test_keys_of_no_part_of_an_all_in_one_file_are_said(states, tmp_path, caplog):
    others = {"model_ema.decay": torch.zeros(2), "denoiser.sigmas": torch.zeros(3)}
    save_file(prefixed(states, PREFIXES["today"]) | others, tmp_path / "all.safetensors")
    assert open_source(tmp_path / "all.safetensors").what == "transformer"
    assert "2 keys of no part are left out, denoiser.sigmas first" in caplog.text


def in_fp8(state):
    """Every tensor as a plain fp8 file has it."""
    return {k: t.to(FP8) if t.is_floating_point() else t for k, t in state.items()}


def in_scaled_fp8(add_keys):
    def change(state):
        state = dict(state)
        names = [k for k in state if k.endswith(".weight") and state[k].ndim == 2]
        for name in [k for k in names if ".block" in k or "blocks." in k or ".layers." in k]:
            add_keys(state, name, False)
        return state

    return change


FP8_KINDS = {
    "plain": in_fp8,
    "scaled": in_scaled_fp8(add_old_keys),
}


def unscaled(state):
    """A state's weights times their scales, in bfloat16, by the definition."""
    found = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        scales = [state[k] for k in (f"{stem}.weight_scale", f"{stem}.scale_weight") if k in state]
        if name.endswith(".weight") and scales:
            tensor = tensor.double() * scales[0].double()
        if not re.search(r"_scale$|scale_(weight|input)$|comfy_quant$", name):
            found[name] = tensor.to(torch.bfloat16)
    return found


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_each_part_of_an_fp8_all_in_one_file_is_its_own(kind, states, tmp_path):
    changed = {part: FP8_KINDS[kind](states[part]) for part in PARTS[:3]} | {"vae": states["vae"]}
    save_all(changed, tmp_path / "all.safetensors")
    shutil.copytree(TINY, tmp_path / "plain")
    for part in PARTS[1:3]:
        save_file(unscaled(changed[part]), tmp_path / "plain" / part / "model.safetensors")
    save_file(unscaled(changed["transformer"]), tmp_path / "plain.safetensors")
    place = tmp_path / "all.safetensors"
    ours, plain = (open_source(file) for file in (place, tmp_path / "plain.safetensors"))
    weights = dict(sources.weights_of(ours))
    for name, tensor in sources.weights_of(plain):
        assert torch.equal(weights[name].to(tensor.dtype), tensor), name
    theirs = encodings(tmp_path / "plain", tmp_path / "plain")
    assert equal(encodings(place, place, tokenizers=TINY), theirs)
    assert not equal(encodings(TINY, TINY), theirs)


def test_training_and_the_converter_take_an_all_in_one_file(states, tmp_path):
    file = tmp_path / "all.safetensors"
    save_all(states, file)
    names = [f"model.{part}={file}" for part in ("checkpoint", "t5", "clip", "autoencoder")]
    given = ["model=flux_tiny", *names, "model.tokenizers=flux-tiny", "device=cpu", "data=fill50k"]
    config = load_config(TrainConfig, "train", given)
    assert open_base(config).what == "transformer"
    parts = load_parts(config, "cpu", None)
    [theirs] = [sources.load_autoencoder(TINY, dtype=torch.bfloat16)]
    assert equal([*parts.autoencoder.state_dict().values()], [*theirs.state_dict().values()])
    assert equal(parts.encoders.encode([PROMPT], 16), encodings(TINY, TINY))
    for part, other in (("transformer", []), ("vae", ["--part", "vae"])):
        arguments = ["--src", str(file), *other, "--dst", str(tmp_path / part), "--to", "diffusers"]
        convert(arguments)
        ours, plain = (Tensors(place / part) for place in (tmp_path, TINY))
        assert sorted(ours.keys()) == sorted(plain.keys())
        assert equal([ours.read(k) for k in plain.keys()], [plain.read(k) for k in plain.keys()])
    with pytest.raises(ValueError, match="--part vae: --src .* is one transformer, and no pipel"):
        convert(["--src", f"{tmp_path}/transformer", "--part", "vae", "--dst", f"{tmp_path}/x"])


def test_a_part_that_an_all_in_one_file_lacks_is_named(states, tmp_path):
    found = prefixed(states, PREFIXES["today"])
    file = tmp_path / "all.safetensors"
    save_file({key: t for key, t in found.items() if not key.startswith("vae.")}, file)
    with pytest.raises(ValueError, match="has no model.autoencoder= beside it"):
        fluxlite.load_pipeline(str(file), device="cpu")
    with pytest.raises(
        ValueError, match="all-in-one checkpoint without vae, of transformer, .*: name a fi"
    ):
        sources.load_autoencoder(file)
    with pytest.raises(ValueError, match="it is an all-in-one checkpoint .*: name it as model.che"):
        sources.load_controlnet(file)


# --- encoders in one file -------------------------------------------------------------------------


SAVED = {"logit_scale": torch.tensor(4.6)}  # beside T5 by ComfyUI's CLIPSave


def test_encoders_in_files_are_those_in_folders(states, tmp_path):
    files = [tmp_path / "t5xxl_fp16.safetensors", tmp_path / "clip_l.safetensors"]
    t5 = states["text_encoder_2"]
    t5 = {"encoder.embed_tokens.weight": t5["shared.weight"].clone()} | t5
    save_file(t5 | {"spiece_model": torch.zeros(9, dtype=torch.uint8)} | SAVED, files[0])
    clip = states["text_encoder"] | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(clip | {"text_projection.weight": torch.zeros(128, 128)}, files[1])
    save_file(clip | {"text_projection": torch.zeros(128, 128)}, tmp_path / "bare.safetensors")
    theirs = encodings(TINY, TINY)
    assert equal(encodings(*files, tokenizers=TINY), theirs)
    assert equal(encodings(files[0], tmp_path / "bare.safetensors", tokenizers=TINY), theirs)
    assert equal(encodings(TINY / "text_encoder_2" / "model.safetensors", files[1], TINY), theirs)
    bare = {key.removeprefix("text_model."): tensor for key, tensor in clip.items()}
    save_file(bare, files[1])
    assert equal(encodings(*files, tokenizers=TINY), theirs)
    for name in ("tokenizer", "tokenizer_2", "text_encoder"):
        shutil.copytree(TINY / name, tmp_path / name)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    assert equal(encodings(*files), theirs)
    assert load_encoders(*files).digest != load_encoders(TINY, TINY).digest


def test_a_file_in_a_repository_is_fetched_alone(monkeypatch):
    import huggingface_hub

    fetched = []

    def snapshot_download(name, *, allow_patterns, **_):
        fetched.append((name, allow_patterns))
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    file = "text_encoder_2/model.safetensors"
    place = TINY / "text_encoder_2" / "model.safetensors"
    assert locate_encoder(f"owner/name/{file}", T5) == (place, TINY / "tokenizer_2")
    assert hub.local_path(f"owner/name/{file}", ["*.json"]) == place
    assert fetched == [("owner/name", [file])] * 2


def test_what_no_config_says_is_as_in_flux(states, tmp_path, caplog):
    """CLIP of width 64 a head; T5 of version 1.1."""
    from transformers import CLIPTextConfig, CLIPTextModel

    caplog.set_level("INFO", "fluxlite")
    config = CLIPTextConfig.from_pretrained(TINY / "text_encoder", num_attention_heads=2)
    whole = CLIPTextModel(config).to(torch.bfloat16)
    for folder, clip in (("named", whole), ("tokenizers", None)):
        shutil.copytree(TINY, tmp_path / folder, ignore=shutil.ignore_patterns("transformer"))
        if clip:
            clip.save_pretrained(tmp_path / folder / "text_encoder")
            shutil.copy(tmp_path / folder / "text_encoder" / "model.safetensors", tmp_path / "clip")
    for name in ("text_encoder", "text_encoder_2"):
        (tmp_path / "tokenizers" / name / "config.json").unlink()
    save_file(states["text_encoder_2"], tmp_path / "t5")
    ours = encodings(tmp_path / "t5", tmp_path / "clip", tokenizers=tmp_path / "tokenizers")
    assert equal(ours, encodings(tmp_path / "named", tmp_path / "named"))
    told = [r.getMessage() for r in caplog.records if "has no config.json" in r.getMessage()]
    assert len(told) == 2 and str(tmp_path / "t5") in told[0]


def test_what_torchao_remarks_is_kept_from_who_loads_encoders(caplog):
    log = logging.getLogger("torchao.kernel")
    with quiet_transformers():
        log.warning("within")
    log.warning("after")
    assert [record.getMessage() for record in caplog.records] == ["after"]


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(file, tensors, arch="flux"):
    """A file of {name: (array or bytes of blocks, name of its type)} by llama.cpp's own writer."""
    import gguf

    writer = gguf.GGUFWriter(file, arch)
    writer.add_array("tokenizer.ggml.tokens", ["a", "\u2581circle", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 3.0])
    writer.add_quantization_version(2)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def quantised_kinds():
    """Names of the types that gguf dequantises, and that are no plain numbers."""
    if not find_spec("gguf"):
        return []
    from gguf import GGML_QUANT_SIZES

    plain = "F32", "F16", "F64", "BF16"
    return [
        k.name for k in GGML_QUANT_SIZES if gguf_files.can_dequantize(k) and k.name not in plain
    ]


def pack(values, kind):
    """(blocks of bytes, values that they stand for, float32) of a matrix, by gguf's functions."""
    import gguf

    known = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quants.quantize(values.float().numpy(), known)
    return blocks, torch.from_numpy(gguf.quants.dequantize(blocks, known))


@needs_gguf
@pytest.mark.parametrize("kind", quantised_kinds())
def test_each_type_is_read_as_gguf_dequantises_it(kind, tmp_path):
    import gguf

    known = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[known]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (7, 3 * size), np.uint8)
    file = write_gguf(tmp_path / "x.gguf", {"a": (data, kind), "b": (data[0], kind)})
    tensors, values = Tensors(file), gguf.quants.dequantize(data, known)
    assert tensors.described() == {
        "a": (torch.bfloat16, (7, 3 * block)),
        "b": (torch.bfloat16, (3 * block,)),
    }
    exact = tensors.read("a", exact=True)
    assert exact.dtype == torch.float32 and np.array_equal(exact.numpy(), values, equal_nan=True)
    rounded = torch.from_numpy(values).to(torch.bfloat16)
    for start, stop in ((0, None), (2, 5)):
        ours = tensors.read("a", start, stop)
        assert torch.equal(ours.view(torch.int16), rounded[start:stop].view(torch.int16))
    ours = tensors.read("b", 1, 9)
    assert torch.equal(ours.view(torch.int16), rounded[0, 1:9].view(torch.int16))


@needs_gguf
def test_plain_types_are_views_of_the_file(tmp_path):
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    bits = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint8)
    kinds = {"F32": values.numpy(), "F16": values.half().numpy(), "BF16": bits}
    tensors = Tensors(write_gguf(tmp_path / "x.gguf", {k: (v, k) for k, v in kinds.items()}))
    assert torch.equal(tensors.read("F32", 1, 2), values[1:2])
    assert torch.equal(tensors.read("F16"), values.half())
    assert torch.equal(tensors.read("BF16"), values.to(torch.bfloat16))
    assert tensors.read("F32").data_ptr() == tensors.read("F32").data_ptr()


KINDS = "Q8_0", "Q4_0", "Q5_1", "Q4_1", "Q5_0"


def flux_gguf(state, file):
    """A transformer as city96 writes it; its state with the values that it stands for."""
    packed, plain = {}, {}
    for number, (name, tensor) in enumerate(state.items()):
        high = tensor.ndim < 2 or re.search(r"(time|txt|vector|img|guidance)_in|final_layer", name)
        kind = "F32" if high else KINDS[number % len(KINDS)]
        packed[name], plain[name] = (tensor.float().numpy(), kind), tensor.float()
        if not high:
            blocks, plain[name] = pack(tensor, kind)
            packed[name] = blocks, kind
    return write_gguf(file, packed), plain


@pytest.fixture(scope="module")
def flux(states, tmp_path_factory):
    """(GGUF file, plain file of its values in float32) of the shipped transformer."""
    folder = tmp_path_factory.mktemp("gguf")
    file, plain = flux_gguf(states["transformer"], folder / "flux1-tiny.gguf")
    save_file(plain, folder / "plain.safetensors")
    return file, folder / "plain.safetensors"


@needs_gguf
def test_a_gguf_transformer_is_loaded_as_the_plain_one_of_its_values(flux, caplog):
    caplog.set_level("INFO", "fluxlite")
    ours, plain = (sources.load_transformer(file, dtype="bfloat16") for file in flux)
    told = [r.getMessage() for r in caplog.records if "dequantis" in r.getMessage()]
    assert re.search(r"dequantising .*6 Q8_0.*, 0\.0 GB", told[0]), told
    assert re.search(r"dequantised in \d+\.\d s$", told[1]) and len(told) == 2
    for (name, p), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, other), name
    exact = [sources.load_transformer(f, dtype="bfloat16", quantize="int8") for f in flux]
    pairs = [[m for m in net.modules() if isinstance(m, QuantizedLinear)] for net in exact]
    assert len(pairs[0]) > 20
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(*pairs, strict=True))


@needs_gguf
def test_a_gguf_transformer_draws_what_the_plain_one_draws(flux):
    parts = {part: "flux-tiny" for part in ("t5", "clip", "autoencoder")}
    options = parts | DRAWN | dict(device="cpu", dtype=torch.bfloat16)
    ours, plain = (fluxlite.generate(PROMPT, checkpoint=str(f), **options)[0] for f in flux)
    assert np.array_equal(np.asarray(ours), np.asarray(plain)) and np.asarray(ours).std() > 5


@needs_gguf
def test_the_converter_writes_a_gguf_file_to_diffusers(states, tmp_path, capsys):
    named = states["transformer"].items()
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in named}
    file, plain = flux_gguf(state, tmp_path / "x.gguf")
    options = ["--to", "diffusers", "--dtype", "bfloat16"]
    convert(["--src", str(file), "--dst", str(tmp_path / "ours"), *options])
    save_file(plain, tmp_path / "plain.safetensors")
    convert(["--src", f"{tmp_path}/plain.safetensors", "--dst", f"{tmp_path}/plain", *options])
    ours, theirs = (Tensors(tmp_path / name) for name in ("ours", "plain"))
    assert ours.keys() == theirs.keys()
    assert equal([ours.read(k) for k in ours.keys()], [theirs.read(k) for k in ours.keys()])
    assert "transformer, bfl layout" in capsys.readouterr().out


T5_NAMES = {  # transformers': llama.cpp's
    "shared": "token_embd",
    "encoder.final_layer_norm": "enc.output_norm",
    "SelfAttention.q": "attn_q",
    "SelfAttention.k": "attn_k",
    "SelfAttention.v": "attn_v",
    "SelfAttention.o": "attn_o",
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.layer_norm": "ffn_norm",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
}


def llama_name(name):
    block = re.match(r"encoder\.block\.(\d+)\.", name)
    [theirs] = [new for old, new in T5_NAMES.items() if f"{old}.weight" in name]
    return f"enc.blk.{block[1]}.{theirs}.weight" if block else f"{theirs}.weight"


@needs_gguf
def test_a_t5_in_gguf_encodes_as_the_plain_one_of_its_values(states, tmp_path):
    packed, plain = {}, {}
    for name, tensor in states["text_encoder_2"].items():
        high = tensor.ndim < 2 or "relative" in name
        blocks, plain[name] = (tensor.float().numpy(), tensor) if high else pack(tensor, "Q5_1")
        packed[llama_name(name)] = blocks, "F32" if high else "Q5_1"
    packed["dec.blk.0.attn_q.weight"] = np.zeros((2, 2), np.float32), "F32"
    file = write_gguf(tmp_path / "t5-v1_1-xxl-encoder-Q5_1.gguf", packed, "t5")
    save_file({k: t.to(torch.bfloat16) for k, t in plain.items()}, tmp_path / "t5.safetensors")
    theirs = encodings(tmp_path / "t5.safetensors", TINY, tokenizers=TINY)
    assert equal(encodings(file, TINY, tokenizers=TINY), theirs)
    assert not equal(encodings(TINY, TINY), theirs)


# --- refused --------------------------------------------------------------------------------------

OTHER_GGUF = {
    "a language model": "blk.0.attn_q.weight",
    "Stable Diffusion 3": "joint_blocks.0.x_block.attn.qkv.weight",
    "FLUX.2": "single_stream_modulation.lin.weight",
    "Qwen-Image": "transformer_blocks.0.img_mod.1.weight",
    "a T5 text encoder .*name it as model.t5=": "enc.blk.0.attn_q.weight",
    "a LoRA": "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
}


@needs_gguf
@pytest.mark.parametrize("named", OTHER_GGUF)
def test_a_gguf_file_of_something_else_is_told_by_its_keys(named, tmp_path):
    data = {OTHER_GGUF[named]: (np.zeros((2, 32), np.float32), "F32")}
    file = write_gguf(tmp_path / "other.gguf", data, "other")
    for place in (file, tmp_path):
        with pytest.raises(ValueError, match=f"it is {named}"):
            open_source(place)


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
TENSOR = struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 1, 8)  # of 8 values
BROKEN = {
    "GGUF file .unpack": HEADER[:9],
    "version 1, not 2 or 3": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "version 50331648, not": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "18446744073709551615 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0),
    "9999999 dimensions": HEADER + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9999999),
    "1099511627776 bytes": HEADER + struct.pack("<Q", 1 << 40),
    "can't decode": HEADER + struct.pack("<Q", 1) + b"\xff",
    "a is there twice": b"GGUF"
    + struct.pack("<IQQ", 3, 2, 0)
    + 2 * (TENSOR + struct.pack("<IQ", 0, 0))
    + bytes(99),
    "999 is not a valid": HEADER + TENSOR + struct.pack("<IQ", 999, 0),
    "a has 32 bytes of which 31": (HEADER + TENSOR + struct.pack("<IQ", 0, 0)).ljust(95, b"\0"),
    "a has 32 bytes of which 0": HEADER + TENSOR + struct.pack("<IQ", 0, 2**64 - 1),
    r"a has the shape \[8\], no whole": HEADER + TENSOR + struct.pack("<IQ", 8, 0) + bytes(99),
    "a is of type I8, which no w": (HEADER + TENSOR + struct.pack("<IQ", 24, 0)).ljust(99, b"\0"),
    "a is of type Q8_K, which no": HEADER
    + struct.pack("<Q", 1)
    + b"a"
    + struct.pack("<IQIQ", 1, 256, 15, 0)
    + bytes(999),
}


@needs_gguf
@pytest.mark.parametrize("named", BROKEN)
def test_a_broken_gguf_file_is_one_line_that_names_it(named, tmp_path):
    (tmp_path / "x.gguf").write_bytes(BROKEN[named])
    with pytest.raises(ValueError, match=named) as error:
        Tensors(tmp_path / "x.gguf").described()
    assert f"{tmp_path}/x.gguf" in str(error.value) and "\n" not in str(error.value)


@needs_gguf
def test_a_gguf_file_cut_anywhere_is_refused(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", {"a": (np.zeros((2, 4), np.float32), "F32")})
    whole = file.read_bytes().rstrip(b"\0")
    for length in range(4, len(whole), 5):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="x.gguf"):
            Tensors(file)


def test_without_the_package_a_gguf_file_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(HEADER)
    with pytest.raises(ValueError, match="is a GGUF file, .* pip install gguf"):
        open_source(tmp_path / "x.gguf")


@pytest.mark.parametrize("part", ["t5", "clip"])
def test_an_encoder_of_another_width_is_refused_before_it_is_loaded(part, tmp_path, monkeypatch):
    """As T5-XL, or CLIP-G."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    kinds = {"t5": ("text_encoder_2", T5Config, T5EncoderModel, "d_model")}
    kinds["clip"] = "text_encoder", CLIPTextConfig, CLIPTextModel, "hidden_size"
    folder, config, model, width = kinds[part]
    model(config.from_pretrained(TINY / folder, **{width: 64})).save_pretrained(tmp_path / folder)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TINY / name, tmp_path / name)
    monkeypatch.setattr("fluxlite.weights.text_encoders.load_model", None)
    key = {"t5": "text_width", "clip": "pooled_width"}[part]
    told = f"model.{part} gives 64 channels, but the transformer has model.{key}=128"
    named = {part: str(tmp_path)}
    with pytest.raises(ValueError, match=told):
        fluxlite.generate(PROMPT, **named, **DRAWN, device="cpu")
    given = ["model=flux_tiny", "device=cpu", "data=fill50k", "model.autoencoder=flux-tiny"]
    given += [f"model.{p}={named.get(p, 'flux-tiny')}" for p in ("t5", "clip")]
    with pytest.raises(ValueError, match=told):
        load_parts(load_config(TrainConfig, "train", given), "cpu", None)


WRONG = {
    "model.clip=.*it is a T5 text encoder .*: name it as model.t5=": ("text_encoder_2", "clip"),
    "model.t5=.*it is a CLIP text encoder .*: name it as model.clip=": ("text_encoder", "t5"),
    "model.t5=.*it is a transformer, not a T5 text encoder": ("transformer", "t5"),
    "model.clip=.*it is an autoencoder, not a CLIP text encoder": ("vae", "clip"),
}


@pytest.mark.parametrize("named", WRONG)
def test_a_file_of_another_part_is_refused_as_an_encoder(named, states, tmp_path):
    part, place = WRONG[named]
    save_file(states[part], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=named) as error:
        load_encoders(**{"t5": TINY, "clip": TINY, place: tmp_path / "x.safetensors"})
    assert "\n" not in str(error.value)


def test_an_encoder_in_a_file_without_a_tokenizer_says_where_to_put_one(states, tmp_path):
    save_file(states["text_encoder_2"], tmp_path / "t5xxl_fp16.safetensors")
    place = re.escape(str(tmp_path))
    with pytest.raises(
        ValueError, match=f"model.t5=.* no tokenizer: put .* into {place}/tok.*or n"
    ):
        load_encoders(tmp_path / "t5xxl_fp16.safetensors", TINY)
    with pytest.raises(ValueError, match="model.tokenizers=.* has no tokenizer"):
        load_encoders(TINY, TINY, tokenizers=tmp_path)
    with pytest.raises(ValueError, match="model.tokenizers=nowhere does not exist"):
        load_encoders(TINY, TINY, tokenizers="nowhere")
