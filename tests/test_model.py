import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from reference import diffusers_flux, ours_from, randomise, relative_error

from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import (
    ATTENTION,
    MLP,
    Flux,
    Rotate,
    can_fuse_gelu,
    fan_out,
    gelu,
    initial_weight,
    pair_tables,
    rope_table,
    sinusoid,
)
from fluxlite.nets.latents import position_ids
from fluxlite.parallel import fill_weights
from fluxlite.train.building import random_weights
from fluxlite.weights import conversion


def inputs(config, *, batch=3, height=6, width=10, num_text_tokens=5, dtype=torch.float32):
    """(img, txt, pooled, t, guidance, ids): odd sizes, float32 times."""
    g = torch.Generator().manual_seed(1)
    img = torch.randn(batch, height * width // 4, config.in_channels, generator=g).to(dtype)
    txt = torch.randn(batch, num_text_tokens, config.text_width, generator=g).to(dtype)
    pooled = torch.randn(batch, config.pooled_width, generator=g).to(dtype)
    t = torch.rand(batch, generator=g)
    guidance = 1 + 6 * torch.rand(batch, generator=g) if config.guidance_embed else None
    return img, txt, pooled, t, guidance, position_ids(height, width, num_text_tokens)


def run_ours(model, img, txt, pooled, t, guidance, ids):
    return model(img, txt, rope_table(ids, model.config), t=t, pooled=pooled, guidance=guidance)


def run_theirs(model, img, txt, pooled, t, guidance, ids):
    num_text = txt.shape[1]
    return model(
        hidden_states=img,
        encoder_hidden_states=txt,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        txt_ids=ids[:num_text].float(),
        img_ids=ids[num_text:].float(),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("doubles,singles", [(2, 3), (1, 0), (0, 2)])
def test_forward_and_gradients_match_diffusers(guidance, doubles, singles):
    theirs = diffusers_flux(guidance=guidance, doubles=doubles, singles=singles)
    ours = ours_from(theirs)
    values = inputs(ours.config)
    expected, got = run_theirs(theirs, *values), run_ours(ours, *values)
    assert relative_error(got, expected) < 1e-5
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    reference = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    if (
        singles
    ):  # behind the last double block alone, the text stream's tail gets no gradient in either
        assert len(reference) == len(list(theirs.parameters()))
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    if not singles:
        gradients |= {
            name: torch.zeros_like(p) for name, p in ours.named_parameters() if p.grad is None
        }
    converted = conversion.from_fluxlite(gradients, ours.config, "diffusers")
    for name, gradient in reference.items():
        if name.endswith(("to_k.bias", "add_k_proj.bias")) or gradient.norm() > 0:
            assert gradient.norm() > 0 or not singles, name
            assert relative_error(converted[name], gradient) < 2e-5, name


@pytest.mark.parametrize("guidance,count", [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_dev_and_schnell_have_the_keys_shapes_and_size_of_diffusers(guidance, count):
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(guidance_embeds=guidance)
        ours = Flux(FluxConfig(guidance_embed=guidance))
        assert ours.num_parameters() == count == sum(p.numel() for p in theirs.parameters())
        state = ours.state_dict()
        converted = conversion.from_fluxlite(state, ours.config, "diffusers")
    assert {k: v.shape for k, v in converted.items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_attention_backends_agree(backend):
    model = ours_from(diffusers_flux())
    values = inputs(model.config)
    reference = run_ours(model, *values)
    model.attention = backend
    assert relative_error(run_ours(model, *values), reference) < 1e-5
    assert backend in ATTENTION


def test_times_keep_float32_beside_bfloat16_weights():
    """t = 0.7502 rounds to 0.75 in bf16; diffusers' bf16 pipeline even makes 752 of 750."""
    a, b = sinusoid(torch.tensor([0.7502, 0.75]))
    assert (a - b).abs().max() > 0.1
    model = ours_from(diffusers_flux()).to(torch.bfloat16)
    img, txt, pooled, _, guidance, ids = inputs(model.config, dtype=torch.bfloat16)
    outputs = [
        run_ours(model, img, txt, pooled, torch.full((3,), t), guidance, ids)
        for t in (0.7502, 0.75)
    ]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_rotation_is_complex_multiplication_of_neighbours_and_its_gradient(dtype, bound):
    g = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(2, 7, 3, 16, generator=g).to(dtype) for _ in range(2))
    angles = 6 * torch.rand(7, 1, 8, generator=g)
    expected = x.float().requires_grad_()
    pairs = torch.view_as_complex(expected.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)).flatten(-2)
    turned.backward(weights.float())
    x.requires_grad_()
    k = x.detach().clone().requires_grad_()
    got, other = Rotate.apply(x, k, *pair_tables(angles))
    got.backward(weights)
    assert torch.equal(got, other) and k.grad.abs().max() == 0
    assert got.dtype == x.grad.dtype == dtype
    assert relative_error(got.float(), turned) < bound
    assert relative_error(x.grad.float(), expected.grad) < bound


def adapted(linear):
    """A linear with something beside it, as adapters add it."""

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    linear.__class__ = Adapted


BESIDE = {
    "subclass": adapted,
    "hook": lambda linear: linear.register_forward_hook(lambda _module, _args, out: out + 1),
    "forward": lambda linear: setattr(
        linear, "forward", lambda x: F.linear(x, linear.weight, linear.bias) + 1
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", BESIDE)
def test_the_fused_gelu_passes_by_no_adapter_and_no_hook(kind):
    """In bfloat16 without gradients, where a plain linear and its GELU are one operator."""
    mlp = randomise(MLP(16, 64, 16, gelu)).to(torch.bfloat16)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert can_fuse_gelu(mlp.linear_in, x)
    plain = mlp.linear_out(gelu(mlp.linear_in(x)))
    assert relative_error(mlp(x).float(), plain.float()) < 1e-2
    BESIDE[kind](mlp.linear_in)
    expected = mlp.linear_out(gelu(mlp.linear_in(x)))
    assert torch.equal(mlp(x), expected) and relative_error(expected.float(), plain.float()) > 0.1


def test_initial_queries_are_those_of_a_fused_linear():
    """Of BFL's code, as MLPerf trains it: xavier over H inputs and 3H outputs."""
    generator = torch.Generator().manual_seed(0)
    values = initial_weight("double_blocks.0.img.qkv.k.weight", (256, 256), "cpu", generator)
    bound = (6 / (256 + 3 * 256)) ** 0.5
    assert 0.99 * bound < values.abs().max() <= bound


def test_precomputed_modulation_is_identical():
    model = ours_from(diffusers_flux())
    img, txt, pooled, t, guidance, ids = inputs(model.config)
    rope = rope_table(ids, model.config)
    direct = model(img, txt, rope, t=t, pooled=pooled, guidance=guidance)
    modulation = model.modulate(t, pooled, guidance)
    assert torch.equal(model.velocity(img, model.txt_in(txt), rope, modulation), direct)


def test_residuals_are_added_after_each_block():
    model = ours_from(diffusers_flux(doubles=1, singles=1))
    values = inputs(model.config)
    img, txt, pooled, t, guidance, ids = values
    rope, hidden = rope_table(ids, model.config), model.config.hidden_size
    plain = run_ours(model, *values)
    for place, offset in itertools.product((0, 1), (0.0, 1.0)):
        residuals = [[], []]
        residuals[place] = [torch.full((3, img.shape[1], hidden), offset)]
        got = model(img, txt, rope, t=t, pooled=pooled, guidance=guidance, residuals=residuals)
        assert torch.equal(got, plain) == (offset == 0.0)


def test_initialisation_predicts_zero_and_learns_the_rest():
    model = Flux(FluxConfig(1, 1, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6)))
    fill_weights(model, random_weights(model, 0, "cpu"))
    values = inputs(model.config)
    assert run_ours(model, *values).abs().max() == 0
    assert all(
        p.std() > 0
        for n, p in model.named_parameters()
        if p.ndim > 1 and not n.startswith(("modulation", "out"))
    )


def test_flops_match_a_count_of_the_operators():
    from torch.utils.flop_counter import FlopCounterMode

    model = randomise(Flux(FluxConfig(2, 3, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6))))
    values = inputs(model.config, batch=1)
    model.attend = partial(model.attend, backend="math")
    with FlopCounterMode(display=False) as counter:
        run_ours(model, *values)
    assert abs(counter.get_total_flops() / model.forward_flops(5, 15) - 1) < 0.01


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="rope_axes"):
        Flux(FluxConfig(1, 1, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 8)))
    with pytest.raises(ValueError, match="guidance"):
        ours = ours_from(diffusers_flux())
        img, txt, pooled, t, _, ids = inputs(ours.config)
        run_ours(ours, img, txt, pooled, t, None, ids)


@pytest.mark.parametrize("shape", [(2, 3, 6), (4, 6)], ids=["tokens", "vectors"])
def test_linears_that_read_the_same_have_autograds_gradients_whatever_is_frozen(shape):
    torch.manual_seed(0)
    linears = [torch.nn.Linear(6, width, dtype=torch.float64) for width in (4, 5, 6)]
    linears[1].weight.requires_grad_(False)
    linears[2].bias.requires_grad_(False)
    for wanted in (True, False):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=wanted)
        grads = {}
        for apply in (fan_out, lambda x, some: tuple(linear(x) for linear in some)):
            outs = apply(x, linears)
            assert (type(outs[0].grad_fn).__name__ == "FanOutBackward") == (apply is fan_out)
            loss = sum((i + 1) * out.square().sum() for i, out in enumerate(outs))
            leaves = [p for linear in linears for p in linear.parameters() if p.requires_grad]
            grads[apply is fan_out] = torch.autograd.grad(loss, leaves + [x] * wanted)
        for ours, theirs in zip(grads[True], grads[False], strict=True):
            assert theirs.abs().sum() > 0
            torch.testing.assert_close(ours, theirs)


def test_a_linear_with_a_hook_or_an_adapter_is_not_bypassed():
    linears = [torch.nn.Linear(4, 4) for _ in range(2)]
    x, seen = torch.randn(3, 4, requires_grad=True), []
    linears[1].register_forward_hook(lambda *_: seen.append(1))
    fan_out(x, linears)
    assert seen == [1]
