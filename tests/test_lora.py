"""LoRA files: each dialect and algorithm read at its true strength, merged, kept apart, exchanged.

The files are written by `lora_writers`, which knows nothing of the reader.
"""


import lora_writers as write
import pytest
import torch
from reference import diffusers_flux
from safetensors.torch import save_file
from test_convert import bfl_by_hand

from fluxlite.weights import conversion, lora_merging, lora_writing, sources
from fluxlite.weights.lora_files import Lora, read_lora

DIFFUSERS, BFL = write.diffusers_linears(), write.bfl_linears()
DOUBLE = {name: shape for name, shape in DIFFUSERS.items() if name.startswith("transformer_blocks")}


@pytest.fixture(scope="module")
def theirs():
    return diffusers_flux(doubles=write.DOUBLES, singles=write.SINGLES)


@pytest.fixture(scope="module")
def base(theirs, tmp_path_factory):
    """A `Source` of the small model, in a file of diffusers' layout."""
    folder = tmp_path_factory.mktemp("base")
    theirs.save_pretrained(folder)
    return sources.open_source(folder)


@pytest.fixture(scope="module")
def states(theirs):
    """{layout: {name: float64 weight}}, BFL's written out by hand."""
    state = theirs.state_dict()
    return {"diffusers": state, "bfl": bfl_by_hand(state, write.DOUBLES, write.SINGLES)}


def save(written, folder, name="lora.safetensors"):
    file = folder / name
    tensors = {key: tensor.contiguous().clone() for key, tensor in written.tensors.items()}
    save_file(tensors, file, metadata=written.metadata or None)
    return file


def differences(file, base, **options):
    """{diffusers' name: float32 difference} of a LoRA file for the base `Source`."""
    state = sources.load_state(base)
    opened = lora_merging.open_loras([Lora(file, **options)], base)
    resolver = lora_merging.Resolver(opened, "transformer", state.__getitem__, base.config)
    ours = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for name, of in resolver.adapters.items():
        for lora, adapter, number in of:
            ours[name] += lora.scale * resolver.difference(name, adapter, number)
    return conversion.from_fluxlite(ours, base.config, "diffusers")


def check_meant(found, meant):
    """Assert that differences are those that are meant, and no others."""
    for name, values in found.items():
        if name not in meant:
            assert not values.any(), name
            continue
        error = (values.double() - meant[name]).norm() / meant[name].norm()
        assert meant[name].any() and error < 1e-6, (name, float(error))


FILES = {
    "PEFT": lambda states: write.peft(),
    "PEFT, alpha and patterns in the header": lambda states: write.peft_metadata(False),
    "PEFT, rslora": lambda states: write.peft_metadata(True),
    "PEFT of several ranks": lambda states: write.peft(ranks=[1, 4, 8]),
    "ai-toolkit, the second generation": lambda states: write.low_rank_file(
        BFL, write.dotted("diffusion_model."), write.AB
    ),
    "lora_down under diffusers' names": lambda states: write.low_rank_file(
        DIFFUSERS, write.dotted("transformer."), write.DOWN_UP, alpha=1.0
    ),
    "lora.down under diffusers' names": lambda states: write.low_rank_file(
        DIFFUSERS, write.dotted("transformer."), ("lora.down.weight", "lora.up.weight")
    ),
    "peft's own": lambda states: write.low_rank_file(
        DIFFUSERS, write.dotted("base_model.model."), write.AB
    ),
    "fal": lambda states: write.low_rank_file(BFL, write.dotted("base_model.model."), write.AB),
    "names without a prefix": lambda states: write.low_rank_file(
        DIFFUSERS, write.dotted(""), write.AB
    ),
    "kohya": lambda states: write.kohya(),
    "kohya, split_qkv": lambda states: write.kohya_split(training=False),
    "XLabs": lambda states: write.xlabs(),
    "XLabs in ComfyUI": lambda states: write.xlabs("diffusion_model."),
    "BFL's control LoRA": lambda states: write.bfl_control(),
    "OneTrainer, legacy": lambda states: write.low_rank_file(
        DIFFUSERS, write.underscored("lora_transformer_"), write.DOWN_UP, alpha=1.0
    ),
    "OneTrainer, original names": lambda states: write.low_rank_file(
        BFL, write.dotted(""), write.AB, alpha=1.0
    ),
    "ComfyUI": lambda states: write.low_rank_file(
        BFL, write.dotted("diffusion_model."), write.DOWN_UP, alpha=8.0
    ),
    "ComfyUI with whole differences": lambda states: write.comfy_diffs(),
    "LoHa of SimpleTuner": lambda states: write.loha(DIFFUSERS, write.underscored("lycoris_")),
    "LoHa of kohya": lambda states: write.loha(BFL, write.underscored("lora_unet_")),
    "LoKr, whole factors": lambda states: write.lokr(
        BFL, write.dotted("diffusion_model."), full=True
    ),
    "LoKr of SimpleTuner": lambda states: write.lokr(
        DIFFUSERS, write.underscored("lycoris_"), full=False
    ),
    "LoKr of kohya": lambda states: write.lokr(BFL, write.underscored("lora_unet_"), full=False),
    "DoRA per output, fused": lambda states: write.dora(
        BFL, write.underscored("lora_unet_"), states["bfl"], True
    ),
    "DoRA per input, fused": lambda states: write.dora(
        BFL, write.dotted("diffusion_model."), states["bfl"], False
    ),
    "DoRA per output": lambda states: write.dora(
        DIFFUSERS, write.underscored("lycoris_"), states["diffusers"], True
    ),
    "DoRA per input": lambda states: write.dora(
        DIFFUSERS, write.underscored("lora_transformer_"), states["diffusers"], False
    ),
    "DoRA of peft": lambda states: write.dora(
        DIFFUSERS,
        write.dotted("transformer."),
        states["diffusers"],
        True,
        write.AB,
        "lora_magnitude_vector",
    ),
    "a part of a model": lambda states: write.kohya(only="attn.qkv"),
}


@pytest.mark.parametrize("name", FILES)
def test_each_dialect_and_algorithm_means_what_its_definition_says(name, base, states, tmp_path):
    written = FILES[name](states)
    check_meant(differences(save(written, tmp_path), base), written.meant)


# What a dialect cannot hold: (a word of the file's name, the dialect). All else it holds exactly.
UNHELD = {
    "peft": ("LoHa", "LoKr", "DoRA per input", "whole differences"),
    "kohya": ("LoHa of SimpleTuner", "LoKr of SimpleTuner", "DoRA per input"),
    "comfy": (),
}


@pytest.mark.parametrize("to", UNHELD)
@pytest.mark.parametrize("name", FILES)
def test_a_file_written_in_another_dialect_means_the_same(name, to, base, states, tmp_path):
    """Read without the base, as `convert_hf.py` does."""
    written = FILES[name](states)
    file, out = save(written, tmp_path), tmp_path / "out.safetensors"
    fused = name == "DoRA per input, fused" and to == "kohya"
    if any(word in name for word in UNHELD[to]) and not fused:
        with pytest.raises(ValueError, match="choose|bake"):
            lora_writing.exchange_lora(read_lora(file), out, to)
        assert not out.exists()
        return
    lora_writing.exchange_lora(read_lora(file), out, to)
    check_meant(differences(out, base), written.meant)
