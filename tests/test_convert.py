import json
import threading

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from reference import (
    diffusers_controlnet,
    diffusers_flux,
    our_controlnet_from,
    ours_from,
    randomise,
    relative_error,
)

import convert_hf
from fluxlite.nets.autoencoder import Autoencoder
from fluxlite.nets.configs import AutoencoderConfig, ControlNetConfig
from fluxlite.nets.controlnet import ControlNet
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.weights import conversion, diffusers_configs, net_configs, tensor_files
from fluxlite.weights import layouts as convert
from fluxlite.weights.lora_writing import DIALECTS


def test_the_program_offers_each_layout_and_dialect_that_is_written():
    assert (convert_hf.LAYOUTS, convert_hf.LORA_DIALECTS) == (convert.LAYOUTS, (*DIALECTS,))


@pytest.fixture(scope="module")
def theirs():
    return diffusers_flux()


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def nemo_by_hand(state, heads, doubles, singles):
    """NeMo's names and layouts from diffusers' weights, written out from the published table
    without the converter.
    """

    def interleaved(names, leaf):
        parts = [state[f"{name}.{leaf}"] for name in names]
        head = parts[0].shape[0] // heads
        rows = [part[h * head : (h + 1) * head] for h in range(heads) for part in parts]
        return torch.cat(rows)

    out = {}

    def put(theirs, nemo):
        for leaf in ("weight", "bias"):
            if f"{theirs}.{leaf}" in state:
                out[f"{nemo}.{leaf}"] = state[f"{theirs}.{leaf}"]

    put("x_embedder", "img_embed")
    put("context_embedder", "txt_embed")
    put("proj_out", "proj_out")
    put("norm_out.linear", "norm_out.adaLN_modulation.1")
    for a, b in (
        ("timestep_embedder", "timestep_embedding.time_embedder"),
        ("guidance_embedder", "guidance_embedding"),
        ("text_embedder", "vector_embedding"),
    ):
        put(f"time_text_embed.{a}.linear_1", f"{b}.in_layer")
        put(f"time_text_embed.{a}.linear_2", f"{b}.out_layer")
    for i in range(doubles):
        d, n = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for leaf in ("weight", "bias"):
            out[f"{n}.self_attention.linear_qkv.{leaf}"] = interleaved(
                [f"{d}.attn.to_{x}" for x in "qkv"], leaf
            )
            out[f"{n}.self_attention.added_linear_qkv.{leaf}"] = interleaved(
                [f"{d}.attn.add_{x}_proj" for x in "qkv"], leaf
            )
        for x in "qk":
            put(f"{d}.attn.norm_{x}", f"{n}.self_attention.{x}_layernorm")
            put(f"{d}.attn.norm_added_{x}", f"{n}.self_attention.added_{x}_layernorm")
        put(f"{d}.attn.to_out.0", f"{n}.self_attention.linear_proj")
        put(f"{d}.attn.to_add_out", f"{n}.self_attention.added_linear_proj")
        put(f"{d}.norm1.linear", f"{n}.adaln.adaLN_modulation.1")
        put(f"{d}.norm1_context.linear", f"{n}.adaln_context.adaLN_modulation.1")
        for a, b in (("ff", "mlp"), ("ff_context", "context_mlp")):
            put(f"{d}.{a}.net.0.proj", f"{n}.{b}.linear_fc1")
            put(f"{d}.{a}.net.2", f"{n}.{b}.linear_fc2")
    for i in range(singles):
        d, n = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for leaf in ("weight", "bias"):
            out[f"{n}.self_attention.linear_qkv.{leaf}"] = interleaved(
                [f"{d}.attn.to_{x}" for x in "qkv"], leaf
            )
        for x in "qk":
            put(f"{d}.attn.norm_{x}", f"{n}.self_attention.{x}_layernorm")
        put(f"{d}.norm.linear", f"{n}.adaln.adaLN_modulation.1")
        put(f"{d}.proj_mlp", f"{n}.mlp.linear_fc1")
        weight, bias = state[f"{d}.proj_out.weight"], state[f"{d}.proj_out.bias"]
        out[f"{n}.self_attention.linear_proj.weight"] = weight[:, : weight.shape[0]]
        out[f"{n}.mlp.linear_fc2.weight"] = weight[:, weight.shape[0] :]
        out[f"{n}.mlp.linear_fc2.bias"] = out[f"{n}.self_attention.linear_proj.bias"] = bias
    return out


def bfl_by_hand(state, doubles, singles):
    """BFL's names and layouts from diffusers' weights, likewise."""
    out = {}
    for leaf in ("weight", "bias"):

        def cat(*names, leaf=leaf):
            return torch.cat([state[f"{name}.{leaf}"] for name in names])

        for a, b in (("x_embedder", "img_in"), ("context_embedder", "txt_in")):
            out[f"{b}.{leaf}"] = cat(a)
        for a, b in (("timestep", "time_in"), ("guidance", "guidance_in"), ("text", "vector_in")):
            for k, x in ((1, "in"), (2, "out")):
                if f"time_text_embed.{a}_embedder.linear_{k}.{leaf}" in state:
                    out[f"{b}.{x}_layer.{leaf}"] = cat(f"time_text_embed.{a}_embedder.linear_{k}")
        if "proj_out.weight" in state:
            scale, shift = cat("norm_out.linear").chunk(2)
            out[f"final_layer.linear.{leaf}"] = cat("proj_out")
            out[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
        for i in range(doubles):
            d, b = f"transformer_blocks.{i}", f"double_blocks.{i}"
            for s, qkv, proj, ff, mod in (
                ("img", "to_{}", "to_out.0", "ff", "norm1"),
                ("txt", "add_{}_proj", "to_add_out", "ff_context", "norm1_context"),
            ):
                out[f"{b}.{s}_attn.qkv.{leaf}"] = cat(*(f"{d}.attn.{qkv.format(x)}" for x in "qkv"))
                out[f"{b}.{s}_attn.proj.{leaf}"] = cat(f"{d}.attn.{proj}")
                out[f"{b}.{s}_mlp.0.{leaf}"], out[f"{b}.{s}_mlp.2.{leaf}"] = (
                    cat(f"{d}.{ff}.net.0.proj"),
                    cat(f"{d}.{ff}.net.2"),
                )
                out[f"{b}.{s}_mod.lin.{leaf}"] = cat(f"{d}.{mod}.linear")
        for i in range(singles):
            d, b = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            out[f"{b}.linear1.{leaf}"] = cat(*(f"{d}.attn.to_{x}" for x in "qkv"), f"{d}.proj_mlp")
            out[f"{b}.linear2.{leaf}"], out[f"{b}.modulation.lin.{leaf}"] = (
                cat(f"{d}.proj_out"),
                cat(f"{d}.norm.linear"),
            )
    for i in range(doubles):
        for s, added in (("img", ""), ("txt", "added_")):
            for x, name in (("q", "query"), ("k", "key")):
                key = f"double_blocks.{i}.{s}_attn.norm.{name}_norm.scale"
                out[key] = state[f"transformer_blocks.{i}.attn.norm_{added}{x}.weight"]
    for i in range(singles):
        for x, name in (("q", "query"), ("k", "key")):
            out[f"single_blocks.{i}.norm.{name}_norm.scale"] = state[
                f"single_transformer_blocks.{i}.attn.norm_{x}.weight"
            ]
    return out


def control_by_hand(state, layout):
    """What a ControlNet has beside its blocks, from diffusers' weights, likewise."""
    convs = ["conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out"]
    renamed = {
        "diffusers": {},
        "nemo": {"controlnet_blocks": "controlnet_double_blocks"},
        "bfl": {},
    }[layout]
    if layout == "bfl":
        renamed = {"controlnet_x_embedder": "pos_embed_input"} | {
            f"block.{name}.": f"block.{2 * k}." for k, name in enumerate(convs)
        }
    out = {}
    for key, tensor in state.items():
        if key.startswith(("controlnet", "input_hint")):
            for theirs, name in renamed.items():
                key = key.replace(theirs, name)
            out[key] = tensor
    return out


def in_layout(theirs, layout):
    """The weights of a diffusers model in a foreign layout, made without the converter."""
    state, heads = theirs.state_dict(), theirs.config.num_attention_heads
    depth = theirs.config.num_layers, theirs.config.num_single_layers
    made = {
        "diffusers": lambda: dict(state),
        "bfl": lambda: bfl_by_hand(state, *depth),
        "nemo": lambda: nemo_by_hand(state, heads, *depth),
    }
    return made[layout]() | control_by_hand(state, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("layout", ["diffusers", "bfl", "nemo"])
def test_each_layout_is_the_hand_made_one_both_ways(layout, guidance, dtype):
    theirs = diffusers_flux(guidance=guidance).to(dtype)
    config, by_hand = net_configs.config_from_diffusers(theirs.config), in_layout(theirs, layout)
    ours = ours_from(theirs).state_dict()
    got, back = (
        conversion.from_fluxlite(ours, config, layout),
        conversion.to_fluxlite(by_hand, config, layout),
    )
    assert got.keys() == by_hand.keys() and all(torch.equal(got[k], by_hand[k]) for k in got)
    assert back.keys() == ours.keys() and all(torch.equal(back[k], ours[k]) for k in ours)
    assert all(v.dtype == dtype for v in back.values())


@pytest.mark.parametrize("source", convert.LAYOUTS)
@pytest.mark.parametrize("target", convert.LAYOUTS)
def test_every_layout_goes_over_into_every_other(theirs, source, target):
    config, mine = net_configs.config_from_diffusers(theirs.config), ours_from(theirs).state_dict()
    state = mine if source == "fluxlite" else in_layout(theirs, source)
    expected = mine if target == "fluxlite" else in_layout(theirs, target)
    got = dict(conversion.convert_weights(state.__getitem__, source, target, config))
    assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("layout", ["diffusers", "bfl", "nemo"])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_forward_through_each_layout_equals_diffusers(layout, dtype, bound):
    theirs = diffusers_flux().to(dtype)
    state = in_layout(theirs, layout)
    config = net_configs.config_from_diffusers(theirs.config)
    ours = Flux(config).to(dtype)
    ours.load_state_dict(conversion.to_fluxlite(state, config, layout), strict=True)
    g = torch.Generator().manual_seed(3)
    img, txt = (
        torch.randn(2, 15, 12, generator=g).to(dtype),
        torch.randn(2, 5, 20, generator=g).to(dtype),
    )
    pooled, t, guidance = (
        torch.randn(2, 14, generator=g).to(dtype),
        torch.tensor([0.25, 0.5]),
        torch.tensor([2.0, 4.0]),
    )
    ids = position_ids(6, 10, 5)
    got = ours(img, txt, rope_table(ids, config), t=t, pooled=pooled, guidance=guidance)
    expected = theirs(
        img, txt, pooled, t, ids[5:].float(), ids[:5].float(), guidance, return_dict=False
    )[0]
    assert relative_error(got.float(), expected.float()) < bound


def test_a_bias_that_nemo_writes_twice_counts_once(theirs):
    config, state = net_configs.config_from_diffusers(theirs.config), in_layout(theirs, "nemo")
    expected = conversion.to_fluxlite(state, config, "nemo")
    key = "single_blocks.0.self_attention.linear_proj.bias"
    state[key] = torch.full_like(state[key], 7.0)  # NeMo's forward ignores it
    other = conversion.to_fluxlite(state, config, "nemo")
    del state[key]  # and a checkpoint may lack it
    third = conversion.to_fluxlite(state, config, "nemo")
    assert all(
        torch.equal(expected[k], other[k]) and torch.equal(expected[k], third[k]) for k in expected
    )


def test_the_final_scale_and_shift_change_places(theirs):
    config, state = net_configs.config_from_diffusers(theirs.config), theirs.state_dict()
    scale, shift = state["norm_out.linear.bias"].chunk(2)
    ours = conversion.to_fluxlite(state, config, "diffusers")["modulation.out.bias"]
    assert torch.equal(ours, torch.cat([scale, shift])) and not torch.equal(scale, shift)
    assert torch.equal(
        in_layout(theirs, "bfl")["final_layer.adaLN_modulation.1.bias"], torch.cat([shift, scale])
    )
    assert torch.equal(
        in_layout(theirs, "nemo")["norm_out.adaLN_modulation.1.bias"], torch.cat([scale, shift])
    )


@pytest.mark.parametrize("layout", convert.LAYOUTS)
@pytest.mark.parametrize("doubles,singles,guidance", [(2, 3, True), (1, 0, False), (0, 2, True)])
def test_layout_and_shape_are_recognised_from_keys(layout, doubles, singles, guidance):
    changes = dict(attention_head_dim=32, axes_dims_rope=(4, 14, 14))
    theirs = diffusers_flux(guidance=guidance, doubles=doubles, singles=singles, **changes)
    state = ours_from(theirs).state_dict() if layout == "fluxlite" else in_layout(theirs, layout)
    assert convert.recognise_layout(state) == ("transformer", layout, "")
    assert net_configs.infer_config(layout, shapes_of(state)) == net_configs.config_from_diffusers(
        theirs.config
    )
    if layout == "bfl":
        assert convert.recognise_layout({f"model.diffusion_model.{k}" for k in state}) == (
            "transformer",
            "bfl",
            "model.diffusion_model.",
        )


def test_faults_are_listed(theirs):
    config, state = net_configs.config_from_diffusers(theirs.config), theirs.state_dict()
    del state["proj_out.bias"]
    state["transformer_blocks.0.surplus"] = torch.zeros(1)
    state["x_embedder.weight"] = torch.zeros(48, 13)
    with pytest.raises(
        ValueError, match=r"proj_out\.bias.*surplus.*x_embedder\.weight \[48, 13\], not \[48, 12\]"
    ):
        conversion.to_fluxlite(state, config, "diffusers")
    with pytest.raises(ValueError, match="mix layouts"):
        convert.recognise_layout({**in_layout(theirs, "bfl"), **theirs.state_dict()})
    with pytest.raises(ValueError, match="neither"):
        convert.recognise_layout(["a", "b"])


@pytest.mark.parametrize(
    "values,count",
    [
        (dict(guidance_embeds=True), 11_901_408_320),
        (dict(guidance_embeds=False), 11_891_178_560),
        (dict(guidance_embeds=True, in_channels=384, out_channels=64), 11_902_391_360),
    ],
    ids=["dev", "schnell", "Fill"],
)
def test_true_configurations_have_the_keys_shapes_and_size_of_diffusers(values, count):
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**values)
    config = net_configs.config_from_diffusers(theirs.config)
    assert conversion.layout_shapes("diffusers", config) == shapes_of(theirs.state_dict())
    with torch.device("meta"):
        assert Flux(config).num_parameters() == count == sum(p.numel() for p in theirs.parameters())
    for layout in convert.LAYOUTS:
        assert net_configs.infer_config(layout, conversion.layout_shapes(layout, config)) == config
    round_trip = diffusers_configs.config_to_diffusers(config)
    assert net_configs.config_from_diffusers(json.loads(json.dumps(round_trip))) == config


def test_the_autoencoder_goes_over_to_bfl_and_back():
    config = AutoencoderConfig((8, 16, 24), 1, 4, 4, 0.5, 0.1)
    state = randomise(Autoencoder(config)).state_dict()
    bfl = dict(conversion.convert_weights(state.__getitem__, "diffusers", "bfl", config))
    assert (
        convert.recognise_layout(bfl) == ("autoencoder", "bfl", "")
        and bfl["encoder.mid.attn_1.q.weight"].ndim == 4
    )
    assert torch.equal(
        bfl["decoder.up.0.block.0.conv1.weight"],
        state["decoder.up_blocks.2.resnets.0.conv1.weight"],
    )
    values = {"norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.1}
    assert net_configs.infer_autoencoder_config("bfl", shapes_of(bfl), values) == config
    back = dict(conversion.convert_weights(bfl.__getitem__, "bfl", "fluxlite", config))
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


CONTROLS = {  # InstantX, XLabs, Union
    "latent": dict(doubles=2, singles=3),
    "pixel": dict(doubles=2, singles=0, pixel=True),
    "union": dict(doubles=1, singles=2, modes=7, guidance=False),
    "singles": dict(doubles=0, singles=2),
}


@pytest.mark.parametrize("kind", CONTROLS)
@pytest.mark.parametrize("layout", ["diffusers", "bfl", "nemo"])
def test_each_layout_of_a_controlnet_is_the_hand_made_one_both_ways(kind, layout):
    changes = dict(in_channels=16, attention_head_dim=32, axes_dims_rope=(4, 14, 14))
    theirs = diffusers_controlnet(**CONTROLS[kind], **changes)
    config, by_hand = (
        net_configs.config_from_diffusers(theirs.config, ControlNetConfig),
        in_layout(theirs, layout),
    )
    ours = our_controlnet_from(theirs).state_dict()
    got, back = (
        conversion.from_fluxlite(ours, config, layout),
        conversion.to_fluxlite(by_hand, config, layout),
    )
    assert got.keys() == by_hand.keys() and all(torch.equal(got[k], by_hand[k]) for k in got)
    assert back.keys() == ours.keys() and all(torch.equal(back[k], ours[k]) for k in ours)
    for name, state in ((layout, by_hand), ("fluxlite", ours)):
        assert convert.recognise_layout(state) == ("controlnet", name, "")
        assert net_configs.infer_config(name, shapes_of(state)) == config


@pytest.mark.parametrize(
    "values",
    [
        dict(num_layers=5, num_single_layers=10, guidance_embeds=True, num_mode=10),
        dict(num_layers=6, num_single_layers=0, guidance_embeds=True),
        dict(
            num_layers=2,
            num_single_layers=0,
            guidance_embeds=True,
            patch_size=2,
            conditioning_embedding_channels=16,
        ),
    ],
    ids=["Union", "Union-Pro-2.0", "XLabs"],
)
def test_controlnets_as_published_have_the_keys_shapes_and_size_of_diffusers(values):
    with torch.device("meta"):
        theirs = FluxControlNetModel(**values)
    config = net_configs.config_from_diffusers(theirs.config, ControlNetConfig)
    assert conversion.layout_shapes("diffusers", config) == shapes_of(theirs.state_dict())
    with torch.device("meta"):
        assert ControlNet(config).num_parameters() == sum(p.numel() for p in theirs.parameters())
    for layout in convert.LAYOUTS:
        assert net_configs.infer_config(layout, conversion.layout_shapes(layout, config)) == config
    written = json.loads(json.dumps(diffusers_configs.config_to_diffusers(config)))
    assert net_configs.config_from_diffusers(written, ControlNetConfig) == config
    assert all(
        written[k] == theirs.config[k]
        for k in written
        if not k.startswith("_") and k != "axes_dims_rope"
    )


class SlowFile:
    """A file that takes part k once part k + 1 is asked for."""

    def __init__(self):
        self.asked, self.written = [threading.Event() for _ in range(9)], []

    def write(self, part):
        assert self.asked[len(self.written) + 1].wait(10)
        self.written.append(part)
        return part.nbytes


@pytest.mark.parametrize("held", [1, 3])
def test_a_tensor_is_written_while_the_next_are_made_and_few_wait(held, monkeypatch):
    monkeypatch.setattr(tensor_files, "WAITING_BYTES", 8 * held)
    file, parts = SlowFile(), [np.full(1, i) for i in range(8)]

    def made():
        for number, part in enumerate(parts):
            file.asked[number].set()
            assert len(file.written) >= number - held
            yield part
        file.asked[8].set()

    assert list(tensor_files.write_behind(file, made())) == [8] * 8
    assert all(map(np.array_equal, file.written, parts))


def test_a_write_that_fails_is_raised_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(tensor_files, "WAITING_BYTES", 0)
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        list(tensor_files.write_behind(file, iter([np.ones(9)])))
