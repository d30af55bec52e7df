"""bitsandbytes' NF4 files: its own dequantised values, bit for bit, or its own codes and scales."""

import json
from pathlib import Path

import pytest
import torch
from reference import diffusers_flux, relative_error
from safetensors.torch import save_file

from fluxlite.nets.quantized import NF4_LEVELS, QuantizedLinear
from fluxlite.weights import nf4_files, sources, tensor_files
from fluxlite.weights.writing import write_converted

GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes-nf4.safetensors"  # it wrote that itself
WIDE = dict(attention_head_dim=64, axes_dims_rope=(16, 24, 24))
FIRST = "transformer_blocks.0.attn.to_q.weight"
STATE = nf4_files.STATE


@pytest.mark.parametrize("name", ["plain", "nested", "half"])
def test_a_weight_that_bitsandbytes_wrote_has_its_own_dequantised_values(name):
    tensors = nf4_files.attach_nf4(tensor_files.Tensors(GOLDEN))
    expected = tensors.read(f"{name}.expected")
    assert tensors.described()[f"{name}.weight"] == (expected.dtype, (24, 128))
    assert torch.equal(tensors.read(f"{name}.weight"), expected)
    assert torch.equal(tensors.read(f"{name}.weight", 5, 9), expected[5:9])
    exact = tensors.read(f"{name}.weight", exact=True)
    assert exact.dtype == torch.float32 and torch.equal(exact.to(expected.dtype), expected)
    assert len(tensors.keys()) == 6


def pack(weight, nested):
    """{ending: tensor} of a weight, by the published format and by hand."""
    blocks = weight.float().reshape(-1, 64)
    scales = blocks.abs().amax(1)
    codes = ((blocks / scales[:, None])[..., None] - torch.tensor(NF4_LEVELS)).abs().argmin(-1)
    codes = codes.flatten().to(torch.uint8)
    state = dict(quant_type="nf4", blocksize=64, dtype="bfloat16", shape=list(weight.shape))
    found = {"": (codes[::2] * 16 + codes[1::2])[:, None], ".absmax": scales}
    found[".quant_map"] = torch.tensor(NF4_LEVELS)
    if nested:
        offset, levels = scales.mean(), torch.linspace(-1, 1, 256)
        groups = (scales - offset).split(256)
        factors = torch.stack([group.abs().amax() for group in groups])
        parts = [group / factor for group, factor in zip(groups, factors)]
        nearest = [(part[:, None] - levels).abs().argmin(-1) for part in parts]
        found |= {".absmax": torch.cat(nearest).to(torch.uint8), ".nested_absmax": factors}
        found[".nested_quant_map"] = levels
        state |= dict(nested_blocksize=256, nested_dtype="float32", nested_offset=offset.item())
    text = json.dumps(state).encode()
    return found | {STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def nf4_state(nested=True):
    """(a model of diffusers' in bfloat16, its state dict with the blocks' matrices in NF4)."""
    theirs = diffusers_flux(**WIDE).to(torch.bfloat16)
    state = dict(theirs.state_dict())
    for name in [name for name, t in state.items() if "blocks." in name and t.ndim == 2]:
        state |= {name + ending: t.contiguous() for ending, t in pack(state[name], nested).items()}
    return theirs, state


def opened(state, folder):
    save_file(state, folder / "x.safetensors")
    return sources.open_source(folder / "x.safetensors")


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_in_nf4_is_read_as_a_plain_one_and_converted(nested, tmp_path):
    theirs, state = nf4_state(nested)
    source = opened(state, tmp_path)
    model = sources.load_transformer(source)
    plain = sources.load_transformer(opened(theirs.state_dict(), tmp_path / "."))
    for (name, p), other in zip(model.named_parameters(), plain.parameters()):
        assert relative_error(p.float(), other.float()) < 0.11, name
    write_converted(source, tmp_path / "bfl.safetensors", to="bfl")
    again = sources.load_transformer(tmp_path / "bfl.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_quantised_to_nf4_the_file_keeps_its_codes_and_scales(tmp_path):
    _, state = nf4_state()
    source = opened(state, tmp_path)
    model = sources.load_transformer(source, dtype="bfloat16", quantize="nf4")
    rounded = sources.load_transformer(source, dtype="bfloat16")
    assert torch.equal(model.double_blocks[0].img.qkv.q.codes.flatten(), state[FIRST].flatten())
    last = state["single_transformer_blocks.0.proj_out.weight"].view(192, -1)  # split by columns
    assert torch.equal(model.single_blocks[0].mlp.linear_out.codes, last[:, 96:])
    kept = [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    for name in [n for n in kept if not n.startswith("modulation.")]:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, rounded.get_submodule(name).weight), name


@pytest.mark.parametrize(
    "key, change, told",
    [
        (FIRST + ".absmax", lambda t: t[:-1].clone(), "absmax is U8 of 575 values, not U8 of 576"),
        (FIRST + ".quant_map", lambda t: None, "quant_map is None of 0 values"),
        (FIRST + STATE, lambda t: torch.zeros(9, dtype=torch.uint8), "quant_state"),
        (FIRST + ".SCB", lambda t: torch.ones(3), "bitsandbytes"),
    ],
)
def test_a_damaged_file_is_refused_by_the_key(key, change, told, tmp_path):
    _, state = nf4_state()
    changed = change(state.get(key))
    state = {k: v for k, v in state.items() if k != key}
    with pytest.raises(ValueError, match=told):
        opened(state if changed is None else state | {key: changed}, tmp_path)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_blocks_that_are_rounded_to_nf4_once_more_are_counted(tmp_path, caplog, quantize):
    _, state = nf4_state()
    state[FIRST][:32] = 0x78  # a block without its largest value
    sources.load_transformer(opened(state, tmp_path), quantize=quantize)
    lost = [r.getMessage() for r in caplog.records if "rounded again" in r.getMessage()]
    told = f"{FIRST}: quantised to nf4, 1 of 576 blocks are rounded again"
    assert lost == ([told] if quantize == "nf4" else [])
