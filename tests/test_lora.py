"""LoRA files: each dialect and algorithm read at its true strength, merged, kept apart, exchanged.

The files are written by `lora_writers`, which knows nothing of the reader.
"""

import copy
import json
import logging
import re
from dataclasses import replace

import lora_writers as write
import peft
import pytest
import torch
from diffusers import FluxPipeline
from reference import diffusers_flux, relative_error
from safetensors.torch import load_file, save_file
from test_convert import bfl_by_hand

from fluxlite.draw import offload
from fluxlite.nets import lora as nets_lora
from fluxlite.nets.flux import rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.nets.lora import LowRank
from fluxlite.weights import conversion, lora_merging, lora_writing, sources
from fluxlite.weights.layouts import SAME, Rule
from fluxlite.weights.lora_adapters import Adapter
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
    resolver = lora_merging.LoraResolver(opened, "transformer", state.__getitem__, base.config)
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


def test_what_is_merged_is_the_sum(base, tmp_path):
    """Of a float32 base and of a bfloat16 one, which is rounded once."""
    file = save(write.kohya(), tmp_path)
    added = differences(file, base, scale=0.7)
    opened = lora_merging.open_loras([Lora(file, 0.7)], base)
    for dtype in (torch.float32, torch.bfloat16):
        state = {name: value.to(dtype) for name, value in sources.load_state(base).items()}
        resolver = lora_merging.LoraResolver(opened, "transformer", state.__getitem__, base.config)
        merged = {name: resolver.merged(name) for name in resolver.adapters}
        assert {value.dtype for value in merged.values()} == {dtype}
        whole = conversion.from_fluxlite(state | merged, base.config, "diffusers")
        plain = conversion.from_fluxlite(state, base.config, "diffusers")
        bound = 1e-6 if dtype == torch.float32 else 2**-8
        for name, values in whole.items():
            wanted = plain[name].double() + added[name].double()
            assert (values.double() - wanted).abs().max() <= bound * wanted.abs().max(), name


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


def ranks_of(file, ending):
    return {k: len(t) for k, t in load_file(file).items() if k.endswith(ending)}


@pytest.mark.parametrize("name", ["kohya", "kohya, split_qkv"])
def test_a_file_comes_back_with_the_ranks_that_it_had(name, base, states, tmp_path):
    """Of kohya's by way of separate q, k, v; those of split_qkv have a third of the rank there."""
    written = FILES[name](states)
    files = [save(written, tmp_path), tmp_path / "peft.safetensors", tmp_path / "back.safetensors"]
    lora_writing.exchange_lora(read_lora(files[0]), files[1], "peft")
    lora_writing.exchange_lora(read_lora(files[1]), files[2], "kohya")
    before, after = (ranks_of(file, "lora_down.weight") for file in (files[0], files[2]))
    assert after == before
    apart = ranks_of(files[1], "lora_A.weight")
    assert apart["transformer.transformer_blocks.1.attn.to_k.lora_A.weight"] == write.R
    check_meant(differences(files[2], base), written.meant)


def in_ours(names, shared, seed):
    """Adapters of our linears, as training has them, that share their `down` or their `up`."""
    draw, found = write.Draw(seed), []
    one = {"down": draw(4, 48), "up": draw(48, 4)}
    for name, (rows, columns) in names.items():
        factors = {"down": draw(4, columns), "up": draw(rows, 4)} | {shared: one[shared]}
        rule = Rule([f"{name}.weight"], [f"{name}.weight"], SAME)
        found.append(Adapter(rule, "fluxlite", LowRank(**factors), scale=0.5))
    return found


@pytest.mark.parametrize("to", ["peft", "kohya", "comfy"])
def test_an_adapter_of_the_last_linear_leaves_with_its_rank(to, base, tmp_path):
    """Ours are two linears, with one B and an A over both columns; q, k and v may share an A."""
    last = {"single_blocks.0.proj": (48, 48), "single_blocks.0.mlp.linear_out": (48, 192)}
    qkv = {f"double_blocks.1.txt.qkv.{x}": (48, 48) for x in "qkv"}
    adapters = in_ours(last, "up", 1) + in_ours(qkv, "down", 2)
    file = tmp_path / "out.safetensors"
    lora_writing.write_lora({"transformer": adapters}, file, to, base.config)
    meant, parts = {}, [0.5 * a.form.up.double() @ a.form.down.double() for a in adapters]
    meant["single_transformer_blocks.0.proj_out.weight"] = torch.cat(parts[:2], dim=1)
    for x, part in zip("qkv", parts[2:]):
        meant[f"transformer_blocks.1.attn.add_{x}_proj.weight"] = part
    check_meant(differences(file, base), meant)
    ranks = ranks_of(file, "lora_A.weight" if to == "peft" else "lora_down.weight")
    assert set(ranks.values()) == {4} and len(ranks) == (4 if to == "peft" else 2)


def test_two_changes_of_one_module_are_written_as_one(base, tmp_path):
    """Under names of two layouts in one file: q alone, and q, k, v together."""
    fused = write.kohya(only="double_blocks.0.img_attn.qkv")
    alone = write.low_rank_file(
        {"transformer_blocks.0.attn.to_q": (48, 48)}, write.dotted("transformer."), write.AB
    )
    meant = dict(fused.meant)
    for name, change in alone.meant.items():
        meant[name] = meant[name] + change
    file = save(write.Written(fused.tensors | alone.tensors, {}, meant), tmp_path)
    check_meant(differences(file, base), meant)
    for to in ("peft", "kohya", "comfy"):
        lora_writing.exchange_lora(read_lora(file), tmp_path / f"{to}.safetensors", to)
        check_meant(differences(tmp_path / f"{to}.safetensors", base), meant)


# --- strength, replaced scales, widened inputs ----------------------------------------------------


def test_split_qkv_has_its_training_strength_where_that_is_asked_for(base, tmp_path, caplog):
    written = write.kohya_split(training=True)
    caplog.set_level(logging.WARNING)
    check_meant(differences(save(written, tmp_path), base, split_qkv="training"), written.meant)
    assert "5 fused modules were trained in parts" in caplog.text


def test_an_ordinary_file_is_not_taken_for_split_qkv(base, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    written = write.kohya()
    check_meant(differences(save(written, tmp_path), base, split_qkv="training"), written.meant)
    assert "trained in parts" not in caplog.text


def test_the_log_names_dialect_ranks_modules_and_norms(base, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    written = write.peft(ranks=[1, 4, 8])
    read_lora(save(written, tmp_path), base.config)
    [line] = [r.getMessage() for r in caplog.records if "norm of all" in r.getMessage()]
    norm = sum(float(change.square().sum()) for change in written.meant.values()) ** 0.5
    assert "diffusers; 44 LoRA; rank 1 to 8; 44 of the transformer" in line
    assert float(line.split("differences ")[1].split(",")[0]) == pytest.approx(norm, rel=1e-3)


def merged_state(base, *loras):
    """A `Source`'s state dict in diffusers' layout with LoRAs in it."""
    merged = lora_merging.merged_source(base, lora_merging.open_loras(loras, base))
    return dict(
        conversion.convert_weights(merged.read, merged.layout, "diffusers", merged.config)
    ), merged


def test_scales_of_norms_replace_the_bases(base, states, tmp_path, caplog):
    written, scales = write.bfl_control(), write.norm_scales()
    tensors = written.tensors | {key: values for key, (values, _) in scales.items()}
    file = save(written._replace(tensors=tensors), tmp_path)
    state, _ = merged_state(base, Lora(file, scale=0.5))
    for values, name in scales.values():
        assert torch.equal(state[name], values) and not torch.equal(
            states["diffusers"][name], values
        )
    others = {key: 2 * values for key, (values, _) in scales.items()}
    second = save(write.Written(others | write.kohya().tensors, {}, {}), tmp_path, "b.safetensors")
    state, _ = merged_state(base, Lora(file), Lora(second, scale=0.5))
    assert all(torch.equal(state[name], 2 * values) for values, name in scales.values())
    assert "10 tensors, double_blocks.0.img.qkv.k_norm.weight first, are replaced by" in caplog.text
    whole, _ = merged_state(base, Lora(file, scale=0.0))
    assert all(torch.equal(whole[name], tensor) for name, tensor in states["diffusers"].items())


def test_a_control_lora_widens_the_input(base, states, tmp_path):
    written = write.bfl_control(channels=2 * write.CHANNELS)
    file = save(written, tmp_path)
    state, merged = merged_state(base, Lora(file))
    assert merged.config.in_channels == 24 and merged.described["x_embedder.weight"][1] == (48, 24)
    old = torch.nn.functional.pad(states["diffusers"]["x_embedder.weight"], (0, 12)).double()
    expected = old + written.meant["x_embedder.weight"]
    assert relative_error(state["x_embedder.weight"].double(), expected) < 1e-6


def test_a_lora_of_a_narrower_input_leaves_the_further_channels_alone(tmp_path, base):
    wide = replace(base.config, in_channels=24)
    file = save(write.peft(), tmp_path)
    resolver = lora_merging.LoraResolver(
        lora_merging.open_loras([Lora(file)], replace(base, config=wide)),
        "transformer",
        {"img_in.weight": torch.zeros(48, 24)}.__getitem__,
        wide,
    )
    merged = resolver.merged("img_in.weight")
    assert merged[:, :12].any() and not merged[:, 12:].any()


@pytest.mark.parametrize("per_output", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_a_dora_of_a_narrower_input_changes_the_channels_that_it_knows(
    wide, per_output, base, theirs, states, tmp_path
):
    """Of a base that sees more, or beside a control LoRA that widens the base."""
    weight = states["diffusers"]["x_embedder.weight"]
    written = write.dora(
        {"x_embedder": weight.shape}, write.dotted("transformer."), states["diffusers"], per_output
    )
    loras, old, meant = [Lora(save(written, tmp_path), 0.6)], weight, 0
    if wide:
        further = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        old = torch.cat([weight, further], 1)
        tensors = {
            n: old if n == "x_embedder.weight" else t for n, t in theirs.state_dict().items()
        }
        save_file(tensors, tmp_path / "wide.safetensors")
        base = sources.open_source(tmp_path / "wide.safetensors", given={"rope_axes": (4, 6, 6)})
    else:
        control = write.bfl_control(channels=2 * write.CHANNELS)
        loras.append(Lora(save(control, tmp_path, "control.safetensors")))
        old = torch.nn.functional.pad(weight, (0, write.CHANNELS))
        meant = control.meant["x_embedder.weight"]
    changed = torch.nn.functional.pad(written.meant["x_embedder.weight"], (0, write.CHANNELS))
    expected = old.double() + 0.6 * changed + meant
    state, _ = merged_state(base, *loras)
    assert relative_error(state["x_embedder.weight"].double(), expected) < 1e-6
    if wide:
        apart = lora_merging.load_merged(base, lora_merging.open_loras(loras, base), merge=False)
        columns = apart.img_in(torch.eye(2 * write.CHANNELS)) - apart.img_in.bias
        assert relative_error(columns.T.double(), expected) < 1e-6


@pytest.mark.parametrize("name", ["kohya", "DoRA per output, fused", "LoKr of kohya"])
def test_a_merged_weight_is_rounded_once(name, states, base, tmp_path):
    """Two LoRAs in a base in bfloat16: the nearest to the exact sum."""
    written = FILES[name](states)
    files = [save(written, tmp_path), save(write.peft(seed=5), tmp_path, "b.safetensors")]
    half = {n: t.bfloat16() for n, t in states["diffusers"].items()}
    source = replace(base, read=lambda n, start=0, stop=None, exact=False: half[n][start:stop])
    if "DoRA" in name:  # whose difference depends on the base
        fused = {n: t.bfloat16().float() for n, t in states["bfl"].items()}
        written = FILES[name](states | {"bfl": fused})
    state, _ = merged_state(source, Lora(files[0], scale=0.5), Lora(files[1], scale=-2.0))
    other, close = write.peft(seed=5).meant, 0
    for n, tensor in state.items():
        exact = half[n].double() + 0.5 * written.meant.get(n, 0) - 2.0 * other.get(n, 0)
        assert tensor.dtype == torch.bfloat16
        close += int((tensor != exact.bfloat16()).sum())  # a tie in float32's last bit
    assert close <= 5


# --- beside diffusers and peft --------------------------------------------------------------------


def inputs_for(theirs):
    draw = write.Draw(1)
    return dict(
        hidden_states=50 * draw(1, 12, write.CHANNELS),
        encoder_hidden_states=50 * draw(1, 5, write.TEXT),
        pooled_projections=50 * draw(1, write.POOLED),
        timestep=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]),
        txt_ids=position_ids(6, 8, 5)[:5].float(),
        img_ids=position_ids(6, 8, 5)[5:].float(),
        return_dict=False,
    )


@torch.no_grad()
def our_velocity(model, given):
    rope = rope_table(position_ids(6, 8, 5), model.config)
    own = dict(t=given["timestep"], pooled=given["pooled_projections"], guidance=given["guidance"])
    return model(given["hidden_states"], given["encoder_hidden_states"], rope, **own)


READ_BY_DIFFUSERS = {
    "PEFT": lambda: write.peft(),
    "PEFT, alpha and patterns in the header": lambda: write.peft_metadata(False),
    "PEFT, rslora": lambda: write.peft_metadata(True),
    # its linear1 is cut at FLUX.1's own widths there, and the embedders' keys are dropped
    "kohya, double blocks": lambda: write.kohya(only="double_blocks"),
    "XLabs": lambda: write.xlabs(),
}


def load_in_diffusers(theirs, file):
    """A copy of diffusers' model with a LoRA file that diffusers reads itself."""
    model = copy.deepcopy(theirs)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(transformer=model, **parts)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return model


@pytest.mark.parametrize("name", READ_BY_DIFFUSERS)
def test_a_forward_is_that_of_diffusers_and_peft(name, theirs, base, tmp_path):
    file, given = save(READ_BY_DIFFUSERS[name](), tmp_path), inputs_for(theirs)
    with torch.no_grad():
        plain = theirs(**given)[0]
        expected = load_in_diffusers(theirs, file)(**given)[0]
    opened = lora_merging.open_loras([Lora(file)], base)
    ours = our_velocity(lora_merging.load_merged(base, opened), given)
    assert relative_error(plain, expected) > 1e-3  # the LoRA does something
    assert relative_error(ours, expected) < 1e-5


REWRITTEN = ["kohya", "kohya, split_qkv", "OneTrainer, legacy", "XLabs", "BFL's control LoRA"]


@pytest.mark.parametrize("name", REWRITTEN)
def test_diffusers_reads_what_we_write_for_it(name, theirs, base, states, tmp_path):
    """Of files that it misreads: of kohya's it drops the embedders, of OneTrainer's all but
    attention; BFL's has scales of norms and biases besides.
    """
    written = FILES[name](states)
    if "BFL" in name:
        scales = {key: values for key, (values, _) in write.norm_scales().items()}
        written = written._replace(tensors=written.tensors | scales)
    file, out, given = save(written, tmp_path), tmp_path / "o.safetensors", inputs_for(theirs)
    lora_writing.exchange_lora(read_lora(file), out, "peft")
    with torch.no_grad():
        expected = load_in_diffusers(theirs, out)(**given)[0]
    opened = lora_merging.open_loras([Lora(file)], base)
    ours = our_velocity(lora_merging.load_merged(base, opened), given)
    assert relative_error(ours, expected) < 1e-5


def test_dora_is_pefts(theirs, base, tmp_path):
    """In memory, where nothing of it is dropped; and its file, written by peft's own names."""
    model = copy.deepcopy(theirs)
    targets = [name for name in DIFFUSERS if "transformer_blocks" in name]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, target_modules=targets, init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 10 * write.Draw(2)(*parameter.shape)
    state = peft.get_peft_model_state_dict(model)
    tensors = {f"transformer.{name}": tensor for name, tensor in state.items()}
    about = {"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.use_dora": True}
    metadata = {"lora_adapter_metadata": json.dumps(about)}
    file, given = save(write.Written(tensors, metadata, {}), tmp_path), inputs_for(theirs)
    with torch.no_grad():
        plain, expected = theirs(**given)[0], model(**given)[0]
    opened = lora_merging.open_loras([Lora(file)], base)
    assert any("magnitude" in name for name in tensors)
    assert relative_error(plain, expected) > 1e-2
    assert (
        relative_error(our_velocity(lora_merging.load_merged(base, opened), given), expected) < 1e-5
    )


PEFTS_OTHERS = {
    "LoHa": peft.LoHaConfig(r=4, alpha=6, init_weights=False),
    "LoKr, whole factors": peft.LoKrConfig(r=64, alpha=96, init_weights=False),
    "LoKr": peft.LoKrConfig(r=2, alpha=6, init_weights=False, decompose_both=True),
}


@pytest.mark.parametrize("name", PEFTS_OTHERS)
def test_a_loha_or_lokr_of_peft_is_pefts(name, theirs, base, tmp_path):
    """Whose alpha has another name in the settings, and is that of whole factors too."""
    model, target = copy.deepcopy(theirs), "transformer_blocks.0.attn.to_q"
    config = replace(PEFTS_OTHERS[name], target_modules=[target])
    peft.inject_adapter_in_model(config, model)
    meant = model.get_submodule(target).get_delta_weight("default").detach().double()
    state = peft.get_peft_model_state_dict(model)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": config.r, "alpha": config.alpha})
    )
    tensors = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    file = save(write.Written(tensors, {}, {}), tmp_path, "adapter_model.safetensors")
    check_meant(differences(file, base), {f"{target}.weight": meant})
    lora_writing.exchange_lora(read_lora(file), tmp_path / "out.safetensors", "comfy")
    check_meant(differences(tmp_path / "out.safetensors", base), {f"{target}.weight": meant})


def test_what_peft_would_make_up_is_not_written_for_it(states, tmp_path):
    """Magnitudes of linears that are no DoRA beside others that are."""
    key, names = write.dotted("transformer."), [*DOUBLE][:2]
    tensors = write.low_rank_file({names[0]: DOUBLE[names[0]]}, key, write.AB).tensors
    dora = write.dora({names[1]: DOUBLE[names[1]]}, key, states["diffusers"], True, write.AB)
    file = save(dora._replace(tensors=tensors | dora.tensors), tmp_path)
    with pytest.raises(ValueError, match=f"{names[0]}.weight is no DoRA and others are.*comfy"):
        lora_writing.exchange_lora(read_lora(file), tmp_path / "out.safetensors", "peft")


def test_what_was_read_for_another_model_is_refused(base, tmp_path):
    """A `LoraFile` of a deeper one: the file itself would be refused by its keys."""
    deep = replace(base.config, num_double_blocks=3)
    linears = {"transformer_blocks.2.attn.to_out.0": (48, 48)}
    file = save(write.low_rank_file(linears, write.dotted("transformer."), write.AB), tmp_path)
    with pytest.raises(ValueError, match="2.attn.to_out.0.weight changes .*, which this model has"):
        lora_merging.open_loras([Lora(read_lora(file, deep))], base)


@pytest.mark.parametrize("last", [20, 10**9])
def test_a_file_of_few_blocks_is_exchanged_and_one_of_a_billion_refused(last, tmp_path):
    """As ai-toolkit trains layers 7 and 20 alone: four keys."""
    linears = {f"single_transformer_blocks.{i}.proj_out": (48, 240) for i in (7, last)}
    made = write.low_rank_file(linears, write.dotted("transformer."), write.AB)
    file, out = save(made, tmp_path), tmp_path / "out.safetensors"
    if last > 20:
        with pytest.raises(ValueError, match="block 1000000000 among 4 keys: the file is damaged"):
            read_lora(file)
        return
    lora_writing.exchange_lora(read_lora(file), out, "kohya")
    found = load_file(out)
    down, up = (
        found[f"lora_unet_single_blocks_20_linear2.lora_{x}.weight"] for x in ("down", "up")
    )
    meant = made.meant["single_transformer_blocks.20.proj_out.weight"]
    assert relative_error(up.double() @ down.double(), meant) < 1e-6


MISSHAPEN = {  # (key, shape, what is said) in a file of double blocks whose all else is right
    "a factor of another width": (
        "transformer.transformer_blocks.1.attn.to_v.lora_B.weight",
        (49, 4),
        "transformer_blocks.1.attn.to_v.weight is of shape [49, 48], and the model's weight of",
    ),
    "a factor that is no matrix": (
        "transformer.transformer_blocks.0.ff.net.2.lora_A.weight",
        (4,),
        "transformer_blocks.0.ff.net.2 has a factor of shape [4], not a matrix",
    ),
    "a difference that is no matrix": (
        "diffusion_model.img_in.diff",
        (48,),
        "img_in.weight is of shape [48], and the model's weight of [48, 12]",
    ),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_a_shape_that_is_none_of_a_models_is_one_line(name, base, tmp_path):
    """Whether it is drawn with, or written in another dialect without a base."""
    key, shape, said = MISSHAPEN[name]
    made = write.low_rank_file(DIFFUSERS, write.dotted("transformer."), write.AB)
    file = save(made._replace(tensors=made.tensors | {key: torch.ones(shape)}), tmp_path)
    for use in (
        lambda: lora_merging.open_loras([Lora(file)], base),
        lambda: lora_writing.exchange_lora(read_lora(file), tmp_path / "out.safetensors", "comfy"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            use()


def test_a_lora_of_guidance_for_a_model_without_is_told_so(base, tmp_path):
    linears = {name: shape for name, shape in BFL.items() if name.startswith("guidance_in")}
    made = write.low_rank_file(linears, write.underscored("lora_unet_"), write.DOWN_UP)
    with pytest.raises(ValueError, match="lora_unet_guidance_in_.* and no guidance"):
        read_lora(save(made, tmp_path), replace(base.config, guidance_embed=False))


@pytest.mark.parametrize("role", ["lora_A.weight", "alpha"])
def test_a_type_that_torch_has_not_is_one_line(role, base, tmp_path):
    key, file = f"transformer.proj_out.{role}", tmp_path / "lora.safetensors"
    about = {key: {"dtype": "F6_E2M3", "shape": [4, 8], "data_offsets": [0, 24]}}
    header = json.dumps(about).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(ValueError, match=f"{key} is of type F6_E2M3, which no adapter has"):
        read_lora(file, base.config)


# --- kept apart -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_lora_kept_apart_computes_what_a_merged_one_does(name, theirs, base, states, tmp_path):
    file, given = save(FILES[name](states), tmp_path), inputs_for(theirs)
    opened = lora_merging.open_loras([Lora(file, 0.6)], base)
    merged, apart = (lora_merging.load_merged(base, opened, merge=m) for m in (True, False))
    expected, plain = (
        our_velocity(merged, given),
        our_velocity(sources.load_transformer(base), given),
    )
    assert relative_error(plain, expected) > 1e-6
    assert relative_error(our_velocity(apart, given), expected) < 1e-5
    if "differences" not in name and "control" not in name:  # whose biases are merged
        held = dict(apart.named_parameters())
        assert all(torch.equal(held[n], t) for n, t in sources.load_state(base).items())


@pytest.mark.parametrize("per_output", [True, False])
def test_a_dora_kept_apart_in_bfloat16_keeps_weak_changes_of_norms(per_output):
    """Of which a ratio in bfloat16, nearly 1, would have no digit."""
    draw, axis = write.Draw(1), 1 if per_output else 0
    linear = torch.nn.Linear(256, 256, bias=False).to(torch.bfloat16).requires_grad_(False)
    weight = linear.weight.double()
    ratio = 1 + 0.075 * draw(*((256, 1) if per_output else (1, 256)))  # 0.0015 from 1
    form = LowRank(torch.zeros(4, 256), torch.zeros(256, 4))
    model = torch.nn.ModuleDict({"linear": linear})
    term = nets_lora.AdapterTerm(form, ratio=ratio)
    [found] = nets_lora.adapt_linears(model, {"linear": [term]})["linear"].terms
    x = torch.eye(256, dtype=torch.bfloat16)
    added = found(x, torch.nn.functional.linear(x, linear.weight), linear.weight).T.double()
    gains = (added * weight).sum(axis) / weight.square().sum(axis)
    assert relative_error(gains, (ratio.double() - 1).flatten()) < 0.01


def test_kept_apart_nothing_of_the_base_is_copied(base, tmp_path):
    file = save(write.peft(), tmp_path)
    mapped = {name: t.data_ptr() for name, t in sources.load_state(base).items()}
    opened = lora_merging.open_loras([Lora(file)], base)
    apart = lora_merging.load_merged(base, opened, merge=False)
    shared = [n for n, p in apart.named_parameters() if p.data_ptr() == mapped.get(n)]
    assert len(shared) == len(mapped)


def test_a_lora_kept_apart_is_streamed_with_its_block(theirs, base, tmp_path):
    file, given = save(write.peft(), tmp_path), inputs_for(theirs)
    opened = lora_merging.open_loras([Lora(file)], base)
    kept, streamed = (lora_merging.load_merged(base, opened, merge=False) for _ in range(2))
    offload.stream_blocks(streamed, "cpu")
    assert torch.equal(our_velocity(streamed, given), our_velocity(kept, given))


COMPILED = ("PEFT", "DoRA of peft", "DoRA per input, fused", "LoKr of kohya", "LoHa of kohya")


@pytest.mark.parametrize("name", COMPILED)
def test_a_block_with_adapters_is_one_graph(name, theirs, base, states, tmp_path):
    """Traced whole, as `compile=true` asks for; what is made of the graph is the compiler's."""
    file, given = save(FILES[name](states), tmp_path), inputs_for(theirs)
    opened = lora_merging.open_loras([Lora(file)], base)
    model = lora_merging.load_merged(base, opened, merge=False)
    expected = our_velocity(model, given)
    for block in (model.double_blocks[0], model.single_blocks[0]):
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    assert relative_error(our_velocity(model, given), expected) < 1e-6


@pytest.mark.parametrize("grad", [False, True])
def test_no_fast_path_passes_an_adapter_by(grad, theirs, base, tmp_path):
    """In bfloat16 on a CPU, where oneDNN would compute a linear and its GELU at once, and with
    gradients, where linears of one input are computed together.
    """
    file = save(write.peft(), tmp_path)
    opened = lora_merging.open_loras([Lora(file)], base)
    model = lora_merging.load_merged(base, opened, merge=False, dtype="bfloat16")
    ran = []
    adapted = {n: m for n, m in model.named_modules() if type(m) is nets_lora.AdaptedLinear}
    for name, module in adapted.items():
        for term in module.terms:
            term.register_forward_hook(lambda *_, name=name: ran.append(name))
    given = inputs_for(theirs)
    rope = rope_table(position_ids(6, 8, 5), model.config)
    own = dict(t=given["timestep"], pooled=given["pooled_projections"], guidance=given["guidance"])
    with torch.set_grad_enabled(grad):
        model(given["hidden_states"], given["encoder_hidden_states"], rope, **own)
    assert sorted(ran) == sorted(adapted) and len(adapted) == len(DIFFUSERS) + write.SINGLES
