"""fp8 files with scales, as ComfyUI, BFL and diffusers publish them: read in bf16, or refused."""

import json

import numpy as np
import pytest
import torch
from reference import diffusers_flux
from safetensors.torch import load_file, save_file
from test_convert import in_layout

from fluxlite.weights import conversion, sources, verify
from fluxlite.weights.sources import open_source
from fluxlite.weights.writing import write_converted

FP8 = torch.float8_e4m3fn
MATRIX = "double_blocks.1.img_attn.qkv"  # of BFL's layout
HEAD_32 = dict(attention_head_dim=32, axes_dims_rope=(4, 14, 14))


@pytest.fixture(scope="module")
def theirs():
    return diffusers_flux(**HEAD_32).to(torch.bfloat16)


def is_quantised(name, tensor):
    """What ComfyUI's files have in fp8: the blocks' matrices."""
    return "blocks." in name and name.endswith(".weight") and tensor.ndim == 2


def quantise(tensor, by_rows):
    """(fp8 values, scale) of a matrix: one scale, or one a row."""
    largest = tensor.float().abs().amax(dim=1) if by_rows else tensor.float().abs().amax()
    scale = largest / torch.finfo(FP8).max
    return (tensor.float() / (scale[:, None] if by_rows else scale)).to(FP8), scale


def add_new_keys(state, name, by_rows):
    """As ComfyUI writes today, and by rows BFL: a scale, one of inputs, and the format."""
    stem = name.removesuffix(".weight")
    state[name], state[f"{stem}.weight_scale"] = quantise(state[name], by_rows)
    state[f"{stem}.input_scale"] = torch.tensor(0.5)
    note = json.dumps({"format": "float8_e4m3fn"}).encode()
    state[f"{stem}.comfy_quant"] = torch.frombuffer(bytearray(note), dtype=torch.uint8)


def add_old_keys(state, name, by_rows):
    """As ComfyUI wrote at first."""
    stem = name.removesuffix(".weight")
    state[name], scale = quantise(state[name], by_rows)
    state[f"{stem}.scale_weight"] = scale if by_rows else scale.reshape(1)
    state[f"{stem}.scale_input"] = torch.ones(1)


def scaled_state(state, add_keys, by_rows=False, prefix=""):
    """(a state dict in scaled fp8, its plain one by the definition)."""
    scaled, plain = dict(state), dict(state)
    for name in [name for name, tensor in state.items() if is_quantised(name, tensor)]:
        values, scale = quantise(state[name], by_rows)
        factors = scale.double()[:, None] if by_rows else scale.double()
        # float32 products of fp8 and float32 are what float64 products round to
        plain[name] = (values.double() * factors).float().bfloat16()
        add_keys(scaled, name, by_rows)
    if add_keys is add_old_keys:
        scaled["scaled_fp8"] = torch.zeros(0, dtype=FP8)
    save = {prefix + name: tensor.clone().contiguous() for name, tensor in scaled.items()}
    return save, plain


FILES = {  # (their keys, a scale a row, layout, prefix)
    "today's ComfyUI": (add_new_keys, False, "bfl", ""),
    "ComfyUI's first": (add_old_keys, False, "bfl", "model.diffusion_model."),
    "BFL's, by rows": (add_new_keys, True, "bfl", ""),
    "diffusers' names": (add_new_keys, True, "diffusers", ""),
    "diffusers' names, old keys": (add_old_keys, False, "diffusers", ""),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_scaled_file_is_read_as_its_products_rounded_once(theirs, tmp_path, kind):
    add_keys, by_rows, layout, prefix = FILES[kind]
    saved, plain = scaled_state(in_layout(theirs, layout), add_keys, by_rows, prefix)
    save_file(saved, tmp_path / "scaled.safetensors")
    source = open_source(tmp_path / "scaled.safetensors")
    assert {dtype for dtype, _ in source.described.values()} == {torch.bfloat16}
    assert sum(t.dtype == FP8 for t in saved.values()) > 10
    for name, tensor in plain.items():
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(source.read(name, 3, 7), tensor[3:7]), name
    loaded = sources.load_transformer(source).state_dict()
    expected = conversion.to_fluxlite(plain, source.config, layout)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_scaled_file_is_converted_to_plain_bfloat16(theirs, tmp_path):
    saved, plain = scaled_state(in_layout(theirs, "bfl"), add_new_keys)
    save_file(saved, tmp_path / "scaled.safetensors")
    source = open_source(tmp_path / "scaled.safetensors")
    write_converted(source, tmp_path / "back.safetensors", to="bfl")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in plain.items())
    write_converted(source, tmp_path / "nemo.safetensors", to="nemo")
    assert "bit for bit" in verify.verify_conversion(source, tmp_path / "nemo.safetensors")[0]


def test_a_scaled_file_is_read_a_tensor_at_a_time(theirs, tmp_path):
    saved, _ = scaled_state(in_layout(theirs, "bfl"), add_new_keys)
    save_file(saved, tmp_path / "scaled.safetensors")
    source = open_source(tmp_path / "scaled.safetensors")
    asked = []

    def read(name):
        asked.append(name)
        return source.read(name)

    pieces = conversion.convert_weights(read, "bfl", "fluxlite", source.config)
    read_by_then = [len(asked) for _ in pieces]
    assert read_by_then[0] == 1 and len(asked) == len(set(asked)) == len(source.described)
    assert np.all(np.diff(read_by_then) <= 1)  # none is read before its turn


def drop(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.update({key: value})


def note_of(values):
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


FAULTS = {  # what the error names: what is done to the file
    f"{MATRIX}.weight is in fp8 and has no scale": drop(f"{MATRIX}.weight_scale"),
    f"{MATRIX}.weight_scale scales nothing": lambda s: s.update(
        {f"{MATRIX}.weight": s[f"{MATRIX}.weight"].bfloat16()}
    ),
    "img_in.weight_scale scales nothing": put("img_in.weight_scale", torch.ones(())),
    f"{MATRIX}.weight is of type I8 with a scale, which is not supp": lambda s: (
        s.pop(f"{MATRIX}.comfy_quant"),
        s.update({f"{MATRIX}.weight": s[f"{MATRIX}.weight"].to(torch.int8)}),
    ),
    "nowhere.weight_scale scales nothing": put("nowhere.weight_scale", torch.ones(())),
    "img_in.input_scale belongs to no weight": put("img_in.input_scale", torch.ones(())),
    f"{MATRIX}.weight has two scales": put(f"{MATRIX}.scale_weight", torch.ones(())),
    "scales of blocks are not supported": put(f"{MATRIX}.weight_scale", torch.ones(2, 2)),
    "which no scale has": put(f"{MATRIX}.weight_scale", torch.ones((), dtype=torch.int32)),
    "in the format 'nvfp4'": put(f"{MATRIX}.comfy_quant", note_of({"format": "nvfp4"})),
    "in the format None": put(f"{MATRIX}.comfy_quant", note_of({})),
    "not a short text": put(f"{MATRIX}.comfy_quant", torch.zeros(2, 2)),
    f"{MATRIX}.comfy_quant is no JSON": put(f"{MATRIX}.comfy_quant", note_of("")[:1]),
}


@pytest.mark.parametrize("named", FAULTS)
def test_a_scale_that_is_missing_or_extra_is_refused_by_name(theirs, tmp_path, named):
    saved, _ = scaled_state(in_layout(theirs, "bfl"), add_new_keys)
    if "has no scale" in named:
        for ending in ("input_scale", "comfy_quant"):
            del saved[f"{MATRIX}.{ending}"]
    FAULTS[named](saved)
    save_file(saved, tmp_path / "scaled.safetensors")
    with pytest.raises(ValueError) as caught:
        open_source(tmp_path / "scaled.safetensors")
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_formats_in_the_metadata_are_looked_at(theirs, tmp_path):
    saved, _ = scaled_state(in_layout(theirs, "bfl"), add_new_keys)
    for kind, wrong in (("float8_e4m3fn", None), ("int8_tensorwise", "int8_tensorwise")):
        said = {"_quantization_metadata": json.dumps({"layers": {MATRIX: {"format": kind}}})}
        save_file(saved, tmp_path / "scaled.safetensors", said)
        if wrong is None:
            assert open_source(tmp_path / "scaled.safetensors").layout == "bfl"
            continue
        with pytest.raises(ValueError, match=f"{MATRIX} is in the format '{wrong}'"):
            open_source(tmp_path / "scaled.safetensors")


def test_plain_fp8_files_are_read_as_before(theirs, tmp_path):
    state = in_layout(theirs, "bfl")
    plain = {n: t.to(FP8) if is_quantised(n, t) else t.clone() for n, t in state.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    source = open_source(tmp_path / "plain.safetensors")
    assert source.described[f"{MATRIX}.weight"][0] == FP8
    assert torch.equal(source.read(f"{MATRIX}.weight").float(), plain[f"{MATRIX}.weight"].float())
