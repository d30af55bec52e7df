from functools import partial

import pytest
import torch
from reference import (
    diffusers_controlnet,
    diffusers_flux,
    our_controlnet_from,
    ours_from,
    randomise,
    relative_error,
)

from fluxlite.nets.configs import ControlNetConfig, FluxConfig
from fluxlite.nets.controlnet import (
    ControlNet,
    count_used,
    initial_control_weight,
    nearest_depth,
    place_blocks,
    spread_samples,
    sum_residuals,
    unused_parameters,
    weights_from_base,
)
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.parallel import fill_weights
from fluxlite.train.building import random_weights
from fluxlite.weights import conversion

HEIGHT, WIDTH, NUM_TEXT = 4, 6, 5  # latent cells
DEPTHS = [(4, 10), (4, 0), (2, 0), (6, 0), (5, 15)]
KINDS = {"latent": {}, "pixel": {"pixel": True}, "union": {"modes": 7}}


@pytest.fixture(scope="module")
def bases():
    """FLUX's depth at small width: diffusers' and ours."""
    theirs = diffusers_flux(doubles=19, singles=38)
    return theirs, ours_from(theirs)


def inputs(config, kind="latent", batch=2):
    """Arguments of our ControlNet's forward."""
    g = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=g)
    num_tokens = HEIGHT * WIDTH // 4
    return dict(
        img=draw(batch, num_tokens, config.in_channels),
        txt=draw(batch, NUM_TEXT, config.text_width),
        rope=rope_table(position_ids(HEIGHT, WIDTH, NUM_TEXT), config),
        t=torch.rand(batch, generator=g),
        pooled=draw(batch, config.pooled_width),
        guidance=1 + 6 * torch.rand(batch, generator=g) if config.guidance_embed else None,
        hint=draw(batch, 3, 8 * HEIGHT, 8 * WIDTH)
        if kind == "pixel"
        else draw(batch, num_tokens, config.in_channels),
        mode=torch.tensor([2, 6])[:batch] if kind == "union" else None,
    )


def start_from_base(config, base):
    """A net filled with what training starts it from."""
    net, generator = ControlNet(config), torch.Generator().manual_seed(0)
    weights = base.state_dict().items()
    return fill_weights(net, weights_from_base(net, base.config, weights, generator=generator))


def without_hint(values):
    return {k: v for k, v in values.items() if k not in ("hint", "mode")}


def as_theirs(values):
    """The same arguments as diffusers' models name them."""
    ids = position_ids(HEIGHT, WIDTH, NUM_TEXT).float()
    return dict(
        hidden_states=values["img"],
        encoder_hidden_states=values["txt"],
        pooled_projections=values["pooled"],
        timestep=values["t"],
        guidance=values["guidance"],
        txt_ids=ids[:NUM_TEXT],
        img_ids=ids[NUM_TEXT:],
        return_dict=False,
    )


def their_samples(net, values, scale):
    mode = values["mode"]
    more = {"controlnet_mode": None if mode is None else mode[:, None], "conditioning_scale": scale}
    return net(controlnet_cond=values["hint"], **more, **as_theirs(values))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("doubles,singles", DEPTHS)
def test_samples_and_the_velocity_of_the_base_match_diffusers(bases, doubles, singles, kind):
    their_base, base = bases
    theirs = diffusers_controlnet(doubles=doubles, singles=singles, **KINDS[kind])
    net = our_controlnet_from(theirs)
    values = inputs(net.config, kind)
    expected, got = their_samples(theirs, values, 0.7), net(**values, scale=0.7)
    for ours, of_kind in zip(got, expected):
        assert len(ours) == len(of_kind or ())
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, of_kind or ()))
    samples = dict(
        controlnet_block_samples=expected[0], controlnet_single_block_samples=expected[1]
    )
    reference = their_base(
        **as_theirs(values), **samples, controlnet_blocks_repeat=kind == "pixel"
    )[0]
    plain = base(**without_hint(values))
    velocity = base(**without_hint(values), residuals=spread_samples(got, net.config, base.config))
    assert relative_error(velocity, reference) < 1e-5 and relative_error(plain, reference) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("guidance", [True, False])
def test_a_net_without_guidance_and_halves_computed_apart(guidance):
    theirs = diffusers_controlnet(guidance=guidance, modes=3)
    net = our_controlnet_from(theirs)
    values = inputs(net.config, "union") | {"mode": torch.tensor([0, 2])}
    expected, got = their_samples(theirs, values, 1.0), net(**values)
    assert all(
        relative_error(a, b) < 1e-5 for ours, of in zip(got, expected) for a, b in zip(ours, of)
    )
    modulation = net.modulate(values["t"], values["pooled"], values["guidance"])
    txt, hint = (
        net.with_mode(net.txt_in(values["txt"]), values["mode"]),
        net.embed_hint(values["hint"]),
    )
    net.drop_conditioning()
    again = net.samples(values["img"], txt, values["rope"], modulation, hint)
    assert all(torch.equal(a, b) for x, y in zip(again, got) for a, b in zip(x, y))
    with pytest.raises(ValueError, match="load the model again"):
        net(**values)


@torch.no_grad()
def test_several_nets_sum_each_by_its_own_depth(bases):
    _, base = bases
    nets = [
        our_controlnet_from(diffusers_controlnet(doubles=d, singles=s, seed=d))
        for d, s in ((4, 10), (3, 0))
    ]
    values = inputs(base.config)
    parts = [spread_samples(net(**values), net.config, base.config) for net in nets]
    double, single = sum_residuals(parts)
    assert len(double) == 19 and len(single) == 38
    assert all(torch.equal(got, a + b) for got, a, b in zip(double, parts[0][0], parts[1][0]))
    assert all(torch.equal(got, a) for got, a in zip(single, parts[0][1]))
    assert len({id(t) for t in double}) == 6  # of 4 and of 3 samples, in turn: sums are shared
    assert sum_residuals(parts[1:])[1] == []


def test_placement_stretches_or_repeats_and_wastes_what_diffusers_wastes():
    assert (
        place_blocks(5, 2) == [0, 0, 0, 1, 1]
        and place_blocks(5, 2, cyclic=True) == [0, 1, 0, 1, 0]
        and place_blocks(5, 0) == []
    )
    counts = {n: count_used(19, n) for n in range(20)}
    assert [n for n in counts if counts[n] != n] == [6, 8, 9, *range(11, 19)]
    assert (
        counts[6] == 5
        and counts[8] == counts[9] == 7
        and {counts[n] for n in range(11, 19)} == {10}
        and count_used(38, 15) == 13
    )
    assert count_used(19, 12, cyclic=True) == 12 and count_used(3, 12, cyclic=True) == 3
    assert [nearest_depth(19, n) for n in (0, 4, 6, 9, 11, 18)] == [
        0,
        4,
        5,
        10,
        10,
        19,
    ] and nearest_depth(38, 15) == 13


def without_gradient(net, base, values):
    """Of a backward through the base: (names of parameters, names of chunks) that get no gradient.

    A chunk is a parameter's H rows: of the modulation there are several.
    """
    out = base(
        **without_hint(values), residuals=spread_samples(net(**values), net.config, base.config)
    )
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    whole, chunks = [], []
    for name, p in net.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        parts = gradient.split(net.config.hidden_size)
        zero = [i for i, part in enumerate(parts) if not part.any()]
        if len(zero) == len(parts):
            whole.append(name)
        else:
            chunks += [f"{name} {i}" for i in zero]
            assert all(part.norm() > 0 for i, part in enumerate(parts) if i not in zero), name
    return whole, chunks


@pytest.mark.parametrize("kind", ["latent", "pixel"])
@pytest.mark.parametrize("doubles,singles", DEPTHS)
def test_unused_parameters_are_those_that_autograd_leaves_without_gradient(
    bases, doubles, singles, kind
):
    _, base = bases
    config = ControlNetConfig.beside(
        base.config, num_double_blocks=doubles, num_single_blocks=singles, hint=kind
    )
    net = randomise(ControlNet(config))
    values = inputs(config, kind)
    whole, chunks = without_gradient(net, base, values)
    assert unused_parameters(net, base.config) == whole
    assert bool(whole) == ((doubles, singles) != (4, 10))
    # what alone is left: of the last text stream's modulation all but the shift and scale before
    # attention
    last = count_used(19, doubles, cyclic=kind == "pixel") - 1
    tail = [f"modulation.txt.{last}.{leaf} {i}" for leaf in ("weight", "bias") for i in range(2, 6)]
    assert chunks == ([] if singles else tail)


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_from_its_base_leaves_the_first_step_bit_for_bit(bases, kind):
    _, base = bases
    config = ControlNetConfig.beside(
        base.config, hint="pixel" if kind == "pixel" else "latent", num_modes=7 * (kind == "union")
    )
    net = start_from_base(config, base)
    values = inputs(config, kind)
    samples = net(**values)
    assert [len(s) for s in samples] == [4, 10] and all(
        (s == 0).all() for of_kind in samples for s in of_kind
    )
    plain = base(**without_hint(values))
    assert torch.equal(
        base(**without_hint(values), residuals=spread_samples(samples, config, base.config)), plain
    )
    assert all(
        torch.equal(p, dict(base.named_parameters())[n])
        for n, p in net.guidance_in.named_parameters("guidance_in")
    )
    for mine, of_base in (
        (getattr(m.modulation, kind) for m in (net, base)) for kind in ("img", "txt", "single")
    ):
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(mine, of_base))
    assert len(net.modulation.linears()) == 4 + 4 + 10
    assert (net.hint_in.weight.abs().max() > 0) == (kind == "pixel")
    # the outputs learn at the first step, whatever the hint
    base(
        **without_hint(values), residuals=spread_samples(samples, config, base.config)
    ).square().sum().backward()
    assert all(out.weight.grad.norm() > 0 for out in [*net.double_out, *net.single_out])


def test_a_net_starts_from_its_base_tensor_by_tensor_too(bases):
    """On meta, from the stream that a checkpoint is read in: the same weights."""
    _, base = bases
    config = ControlNetConfig.beside(
        base.config, num_double_blocks=5, num_single_blocks=7, num_modes=3
    )
    net = start_from_base(config, base)
    stream = conversion.convert_weights(
        base.state_dict().__getitem__, "fluxlite", "fluxlite", base.config
    )
    generator = torch.Generator().manual_seed(0)
    state = dict(
        weights_from_base(
            conversion.build_on_meta(config), base.config, stream, generator=generator
        )
    )
    assert state.keys() == net.state_dict().keys() and all(
        torch.equal(state[k], v) for k, v in net.state_dict().items()
    )


def test_blocks_of_the_net_are_those_of_the_base(bases):
    """With the outputs the identity, samples are the image tokens that the base's own blocks
    give.
    """
    _, base = bases
    config = ControlNetConfig.beside(base.config, num_double_blocks=3, num_single_blocks=0)
    net, seen = start_from_base(config, base), []
    values = inputs(config)
    with torch.no_grad():
        for out in net.double_out:
            out.weight.copy_(torch.eye(config.hidden_size))
        hooks = [
            b.register_forward_hook(lambda *a: seen.append(a[-1][0]))
            for b in base.double_blocks[:3]
        ]
        base(**without_hint(values))
        samples, _ = net(**values)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(samples, seen, strict=True))


@pytest.mark.parametrize("hint", ["latent", "pixel"])
def test_random_initialisation_starts_without_effect(hint):
    config = ControlNetConfig.beside(
        FluxConfig(2, 2, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6)), hint=hint
    )
    net = ControlNet(config)
    fill_weights(net, random_weights(net, 0, "cpu", partial(initial_control_weight, config)))
    assert all((s == 0).all() for of_kind in net(**inputs(config, hint)) for s in of_kind)
    assert net.double_blocks[0].img.qkv.q.weight.std() > 0 and net.img_in.weight.std() > 0


def test_what_does_not_fit_is_refused():
    base = Flux(FluxConfig(2, 2, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6)))
    for changes, named in (
        (
            {"num_double_blocks": 3, "num_single_blocks": 0},
            "controlnet.num_double_blocks=3: the transformer to start from has 2",
        ),
        (
            {"num_double_blocks": 1, "num_single_blocks": 1, "hidden_size": 96, "num_heads": 6},
            "hidden_size=96, but .* 48",
        ),
        ({"hint": "edges"}, "controlnet.hint=edges"),
        ({"num_double_blocks": 0, "num_single_blocks": 0}, "controlnet.num_double_blocks=0"),
        ({"num_modes": -1}, "controlnet.num_modes=-1"),
    ):
        with pytest.raises(ValueError, match=named):
            start_from_base(ControlNetConfig.beside(base.config, **changes), base)
    net = ControlNet(ControlNetConfig.beside(base.config, num_double_blocks=1, num_single_blocks=0))
    with pytest.raises(ValueError, match="mode"):
        net(**(inputs(net.config) | {"mode": torch.tensor([0, 0])}))
