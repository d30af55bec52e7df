"""Compiled blocks: how many graphs there are, that they run, and that they compute and keep what
eager blocks do.

The graphs are torch's own, run eagerly (aot_eager): what the blocks and their wrapping decide is
the same. `-m slow` has inductor's code.
"""

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from reference import randomise
from test_trainer import MOCK, losses, train
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

import fluxlite
from fluxlite import parallel
from fluxlite.cli import devices
from fluxlite.draw import offload, sampling
from fluxlite.nets import flow
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import DoubleBlock, Flux, SingleBlock, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.nets.schedule import SampleConfig
from fluxlite.parallel import compilation

CONFIG = FluxConfig(2, 3, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6))
TEXT, BATCH = 6, 2
SIZES = (64, 96, 128)  # pixels along a side
ALONE = SimpleNamespace(size=lambda: 1)
MESH = SimpleNamespace(tp=ALONE, cp=ALONE, fsdp=ALONE, world=ALONE)
KINDS = "none", "full", "2", "selective"


class CountedGraphs:
    """A backend that counts: graphs made, and each time that one runs, by (block, use)."""

    def __init__(self):
        self.made, self.runs = Counter(), Counter()

    def lower(self, kind, graph, inputs):
        key = kind.__name__, "gradient" if torch.is_grad_enabled() else "none"
        self.made[key] += 1
        lowered = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def run(*inputs):
            self.runs[key] += 1
            return lowered(*inputs)

        return run


def forget_graphs():
    torch.compiler.reset()
    compilation.compile_kind.cache_clear()
    compilation.warn_of_limit.cache_clear()
    compilation.warn_of_break.cache_clear()
    counters.clear()


@pytest.fixture
def graphs(monkeypatch):
    """The `CountedGraphs` of all that is compiled in a test."""
    counted = CountedGraphs()
    monkeypatch.setattr(compilation, "lower_graph", counted.lower)
    forget_graphs()
    yield counted
    assert not counters["graph_break"]
    forget_graphs()


def wrap_small(checkpointing, *, compile, dtype=torch.float32, config=CONFIG):
    """A small model, as one rank wraps it."""
    settings = parallel.ParallelConfig(activation_checkpointing=checkpointing)
    model = randomise(Flux(config))
    return parallel.parallelize(model, MESH, settings, dtype, compile=compile)


def make_batch(side, dtype=torch.float32, config=CONFIG):
    """Inputs of a forward, and a target, for pictures of `side` x `side` pixels."""
    generator, tokens = torch.Generator().manual_seed(side), (side // 16) ** 2
    shapes = {
        "img": (BATCH, tokens, config.in_channels),
        "txt": (BATCH, TEXT, config.text_width),
        "pooled": (BATCH, config.pooled_width),
    }
    drawn = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    rope = rope_table(position_ids(side // 8, side // 8, TEXT), config)
    given = {name: x.to(dtype) for name, x in drawn.items()} | {"rope": rope}
    return given | {"t": torch.tensor([0.3, 0.8]), "guidance": torch.tensor([1.0, 4.0])}


def backward(model, batch):
    """The gradient of each parameter."""
    model.zero_grad()
    velocity = model(**batch)
    flow.velocity_loss(velocity, batch["img"], torch.ones_like(batch["img"])).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def draw(model, side, dtype=torch.float32):
    """Latents, as a run draws them of its own model."""
    batch, settings = make_batch(side, dtype), SampleConfig(height=side, width=side, steps=1)
    given = batch["txt"], batch["pooled"], batch["img"].float(), batch["rope"]
    return sampling.sample_sharded(model, model.config, *given, settings, dtype)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def train_validate_draw(compiled, eager, side, dtype=torch.float32):
    """One of each; the worst relative error beside eager blocks."""
    batch, errors = make_batch(side, dtype), []
    ours, theirs = backward(compiled, batch), backward(eager, batch)
    errors += [relative(ours[name], theirs[name]) for name in theirs]
    with torch.no_grad():
        errors.append(relative(compiled(**batch), eager(**batch)))
    errors.append(relative(draw(compiled, side, dtype), draw(eager, side, dtype)))
    return max(errors)


@pytest.mark.parametrize(
    "kinds", [("none", "selective"), pytest.param(KINDS, marks=pytest.mark.slow)]
)
def test_one_process_that_trains_validates_and_draws_at_three_sizes_has_few_graphs(graphs, kinds):
    """One graph a kind of block and use, and as many again for all other sizes at once; none,
    full and every-2nd share theirs, and selective has its own in training.
    """
    eager = wrap_small("none", compile=False)
    models = {kind: wrap_small(kind, compile=True) for kind in kinds}
    made, first = [], Counter()
    for side in SIZES:
        for kind, model in models.items():
            assert train_validate_draw(model, eager, side) < 1e-6, (kind, side)
            first = first or Counter(graphs.made)
        made.append(Counter(graphs.made))
    names, uses = ("DoubleBlock", "SingleBlock"), {"gradient": 1, "none": 2}  # no_grad, inference
    assert first == {(name, use): count for name in names for use, count in uses.items()}
    for name in names:
        assert made[0][name, "gradient"] == 2 and made[0][name, "none"] == 2
        assert made[1][name, "gradient"] <= 2 + 2 * 2 and made[1][name, "none"] <= 2 + 2 * 2
    assert made[2] == made[1]


def test_every_block_runs_a_graph_and_a_checkpointed_one_runs_it_again(graphs):
    """Two double and three single blocks; of each 2nd, two and one."""
    batch = make_batch(SIZES[0], torch.bfloat16)
    for kind, runs in {"none": 5, "full": 10, "2": 8, "selective": 5}.items():
        graphs.runs.clear()
        backward(wrap_small(kind, compile=True, dtype=torch.bfloat16), batch)
        assert sum(graphs.runs.values()) == runs, kind
    assert graphs.made == {("DoubleBlock", "gradient"): 2, ("SingleBlock", "gradient"): 2}


def count_saved(model, batch):
    """Bytes that a forward keeps for the backward in the blocks, but for parameters."""
    kept, own = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = model(**batch)
    found = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own)
    assert out.requires_grad
    return found


def test_a_compiled_block_keeps_what_its_checkpointing_says(graphs):
    """Four single blocks less two, in units of the tokens (B, L, H): with full checkpointing the
    inputs alone, with selective the products and attention too.
    """
    units = {}
    for kind in ("none", "full", "selective"):
        saved = []
        for count in (2, 4):
            config = FluxConfig(0, count, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6))
            model, batch = wrap_small(kind, compile=True, config=config), make_batch(64)
            backward(model, batch)
            saved.append(count_saved(model, batch))
        tokens = 4 * BATCH * (TEXT + batch["img"].shape[1]) * 48
        units[kind] = (saved[1] - saved[0]) / 2 / tokens
    modulation = 3 / (TEXT + batch["img"].shape[1])
    assert units["full"] == pytest.approx(1 + modulation)
    # x, q, k, v, attention and its log-sums, the MLP's 4H; what the two last linears give is not
    # needed, and h is computed again
    assert 8 < units["selective"] < 11.2 < units["none"]


def test_at_the_limit_new_sizes_run_eagerly_with_one_warning(graphs, monkeypatch, caplog):
    monkeypatch.setattr(compilation, "MOST_GRAPHS", 1)
    model, eager = wrap_small("selective", compile=True), wrap_small("selective", compile=False)
    for side in (64, 96, 128, 64):
        ours, theirs = (backward(m, make_batch(side)) for m in (model, eager))
        assert max(relative(ours[name], theirs[name]) for name in theirs) < 1e-6
    # at the size that was first
    assert graphs.runs == {("DoubleBlock", "gradient"): 4, ("SingleBlock", "gradient"): 6}
    warned = [r.message for r in caplog.records if "run eagerly" in r.message]
    assert [text.split()[0] for text in warned] == ["DoubleBlock", "SingleBlock"]


def test_a_block_that_makes_no_graph_runs_eagerly_with_one_warning(graphs, caplog):
    model, eager = (wrap_small("selective", compile=c) for c in (True, False))
    model.double_blocks[0].img.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    batch = make_batch(64)
    for _ in range(2):
        ours, theirs = (backward(m, batch) for m in (model, eager))
        assert max(relative(ours[name], theirs[name]) for name in theirs) < 1e-6
    assert graphs.runs == {("DoubleBlock", "gradient"): 2, ("SingleBlock", "gradient"): 6}
    assert sum("cannot be compiled" in r.message for r in caplog.records) == 1
    counters.clear()


@pytest.mark.parametrize("attention", ["auto", "flash", "math"])
def test_each_attention_kernel_is_in_the_graph(graphs, attention):
    model = parallel.compile_blocks(randomise(Flux(CONFIG, attention)))
    with torch.no_grad():
        ours, theirs = (m(**make_batch(64)) for m in (model, randomise(Flux(CONFIG, attention))))
    assert relative(ours, theirs) < 1e-6 and sum(graphs.runs.values()) == 5


def test_streamed_blocks_are_compiled_once_for_all(graphs):
    model, eager = randomise(Flux(CONFIG)), randomise(Flux(CONFIG))
    streamed = offload.stream_blocks(parallel.compile_blocks(model), "cpu")
    with torch.inference_mode():
        assert relative(streamed(**make_batch(64)), eager(**make_batch(64))) < 1e-6
    assert graphs.made == {("DoubleBlock", "none"): 1, ("SingleBlock", "none"): 1}
    assert sum(graphs.runs.values()) == 5


def test_a_pipeline_draws_at_three_sizes_with_few_graphs_and_loaded_again_with_none(graphs):
    options = dict(steps=2, max_sequence_length=16, device="cpu", dtype=torch.float32, decode=False)
    made = []
    for size in (32, 64, 96, 32):
        given = dict(height=size, width=size, **options)
        ours, theirs = (
            fluxlite.generate("red circle with blue background", compile=c, **given)[0]
            for c in (True, False)
        )
        assert relative(ours, theirs) < 1e-5
        made.append(Counter(graphs.made))
    assert made[0] == {("DoubleBlock", "none"): 1, ("SingleBlock", "none"): 1}
    assert all(count <= 3 for count in made[1].values())
    assert made[1] == made[2] == made[3] and sum(graphs.runs.values()) > 4 * 2


def test_a_run_says_what_it_compiles_and_trains_the_same(graphs, tmp_path, caplog, capsys):
    options = [*MOCK, "dtype=float32", "steps=2", "parallel.activation_checkpointing=selective"]
    with caplog.at_level(logging.INFO):
        ours, theirs = (
            losses(train(*options, f"compile={c}", f"output={tmp_path}/{c}"))
            for c in ("true", "false")
        )
    assert all(ours[key] == pytest.approx(value, rel=1e-5) for key, value in theirs.items())
    said = "inductor compiles 1 double and 1 single blocks, activation checkpointing: selective"
    assert said in caplog.messages
    assert "step 0/2, compiling: the first step takes longer" in capsys.readouterr().err
    assert sum(graphs.runs.values()) > 4


def test_a_graph_that_is_compiled_is_named(monkeypatch, caplog):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    forget_graphs()
    with caplog.at_level(logging.INFO):
        backward(wrap_small("full", compile=True), make_batch(64))
    lines = [text for text in caplog.messages if "takes longer" in text]
    assert lines == [
        f"compiling {block.__name__} for training: this step takes longer"
        for block in (DoubleBlock, SingleBlock)
    ]
    forget_graphs()


@pytest.mark.parametrize(
    "asked, device, installed, compiles",
    [
        ("auto", "cpu", True, False),
        (True, "cpu", True, True),
        (False, "cuda", True, False),
        ("auto", "cuda", True, True),
        ("auto", "cuda", False, False),
    ],
)
def test_compile_auto_is_on_for_a_gpu_that_can(
    monkeypatch, caplog, asked, device, installed, compiles
):
    devices.warn_of_eager.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert devices.choose_compile(asked, device) is compiles
    assert ("needs Triton" in caplog.text) is (not installed)


def test_compile_true_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="compile=true needs Triton on a GPU: pip install triton"):
        devices.choose_compile(True, "cuda:1")
