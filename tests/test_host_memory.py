"""Training with blocks and activations in host memory: the same bits, and they are there."""

from unittest import mock

import pytest
from meshes import CONTROL, MODEL, batches_of, configure, random_weights
from on_ranks import on_ranks
from reference import last_of_each
from test_checkpoint import CountedFeed
from torch._subclasses import FakeTensorMode

from fluxlite import parallel
from fluxlite.draw import offload
from fluxlite.parallel import host_memory
from fluxlite.preflight import table
from fluxlite.train import building, setup, training_step

LORA = ["dtype=float32", "lora=default", "lora.rank=4", "optim.ema_decay=0"]
FULL = "parallel.activation_checkpointing=full"


@pytest.fixture(autouse=True)
def one_rank():
    yield
    parallel.stop_ranks()


def steps_of(*options, quantize="none", device="cpu"):
    """(losses and norms of three steps, the run)."""
    given = ["model.num_single_blocks=3", FULL, f"model.quantize={quantize}", f"device={device}"]
    config = configure([], 1, [*given, *options])
    with mock.patch.object(building, "random_weights", random_weights):
        run = setup.set_up(config, *parallel.start_ranks(config.parallel, device))
    batches = batches_of(config, run)
    steps = [training_step.train_step(run, next(batches), step) for step in range(3)]
    return [(loss.item(), norm.item()) for loss, norm in steps], run


@pytest.mark.parametrize("task, quantize", [(LORA, "none"), (LORA, "nf4"), (CONTROL, "int8")])
def test_swapped_blocks_train_the_same_and_pass_both_ways(task, quantize, monkeypatch):
    expected, _ = steps_of(*task, quantize=quantize)
    monkeypatch.setattr(offload, "Feed", CountedFeed)
    monkeypatch.setattr(CountedFeed, "copies", copies := [])
    found, run = steps_of(*task, "parallel.swap_blocks=3", quantize=quantize)
    assert found == expected
    # of three the last two have a buffer when a backward begins, the first two after it
    assert copies == [0, 1, 2, 0, 2, 0, 2, 0]
    waiting = [p for p in run.flux.parameters() if p.untyped_storage().nbytes() > p.nbytes]
    assert len(waiting) > 20 and not any(p.requires_grad for p in waiting)


@pytest.mark.parametrize("kind", ["full", "2"])
def test_activations_that_wait_on_the_host_give_the_same_gradients(kind, monkeypatch):
    options = [*LORA, f"parallel.activation_checkpointing={kind}"]
    expected, _ = steps_of(*options)
    shapes, real = [], host_memory.host_buffer
    monkeypatch.setattr(
        host_memory, "host_buffer", lambda size, *a, **o: shapes.append(size) or real(size, *a, **o)
    )
    found, _ = steps_of(*options, "parallel.activation_offload=true")
    assert found == expected
    assert len(shapes) == 3 * {"full": 2 + 3, "2": 2 + 1}[kind]  # of a double block img and txt
    assert not [t for t in host_memory.HOST_TENSORS if t.ndim == 3]


@pytest.mark.parametrize(
    "options, told",
    [
        (["parallel.activation_offload=true"], "set it to full or to a number"),
        ([*LORA, "parallel.swap_blocks=1"], "needs parallel.activation_checkpointing=full"),
        (["parallel.swap_blocks=1", FULL], "weights that are trained stay on the GPU"),
        ([*LORA, "parallel.swap_blocks=9", FULL], "there are 2 blocks"),
    ],
)
def test_what_cannot_wait_on_the_host_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        configure([], 1, options)


def test_swapping_what_tensor_parallelism_splits_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="streams whole blocks, and parallel.tp=2 splits them"):
        configure(["tp=2"], 1, [*LORA, "parallel.swap_blocks=1", FULL])


def test_each_of_two_ranks_streams_the_whole_base_and_they_train_as_one(tmp_path):
    options = [*LORA, "parallel.swap_blocks=3", "optim.clip=0"]
    expected, _ = steps_of(*options)
    parallel.stop_ranks()
    both = on_ranks(2, lambda: steps_of(*options)[0], tmp_path)
    for (loss, norm), *ranks in zip(expected, *both):
        losses, norms = zip(*ranks)
        assert sum(losses) / 2 == pytest.approx(loss, rel=1e-5) and losses[0] != losses[1]
        assert norms == pytest.approx([norm, norm], rel=1e-5)


@pytest.mark.slow
def test_preflight_tells_what_fits_a_card_for_each_way_to_save(monkeypatch, capsys):
    """On a small model, whose cards are as small."""
    shaped = [a for a in MODEL if not a.startswith(("data.height=", "data.width="))]
    tiny = [*shaped, "model.num_single_blocks=6", "data.micro_batch=1", "data.global_batch=1", FULL]
    ways = "", " model.quantize=nf4", " parallel.swap_blocks=5", " parallel.activation_offload=true"
    monkeypatch.setattr(table, "COMMON", last_of_each(tiny))
    monkeypatch.setattr(table, "ROWS", "\n".join("lora=default lora.rank=1" + way for way in ways))
    monkeypatch.setattr(table, "SIZES", (512,))
    peaks, real = [], table.peak_of

    def peak_of(*given):
        FakeTensorMode.cache_clear()  # as in a process of its own
        return peaks.append(real(*given)) or peaks[-1]

    monkeypatch.setattr(table, "peak_of", peak_of)
    table.print_table([])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and printed[-1].endswith("| 0.0 | 12 |")
    plain, quantised, swapped, offloaded = peaks
    assert quantised < 0.9 * plain and swapped < 0.95 * plain and offloaded < 0.95 * plain, peaks
    sizes = [table.smallest_card(peak) for peak in (11e9, 11.1e9, 79e9, 79.1e9)]
    assert sizes == ["12", "16", "80", "none"]
