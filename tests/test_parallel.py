"""Every mesh computes the same run: losses, each parameter's gradient, and weights and averages
after four clipped steps, in the slow part after ten too.

The meshes run under torchrun (`meshes.py`); the reference is one process. All parameters are
random, so that no gradient is zero.
"""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from meshes import COMPARED
from reference import last_of_each, randomise
from test_trainer import MOCK, command, losses, run, train, wait_for_steps, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fluxlite import parallel
from fluxlite.cli.command_line import load_config
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import Modulation
from fluxlite.parallel.mesh import check_nodes
from fluxlite.parallel.modulation import spread_modulation
from fluxlite.preflight import prediction
from fluxlite.settings import TrainConfig
from fluxlite.train import optim, setup

ROOT = Path(__file__).parents[1]
# ‖Δ‖/‖reference‖: of the loss, of each gradient, of each parameter after some steps. bfloat16 and
# Muon's iteration round.
BOUNDS = {
    "float32": (1e-6, 1e-5, 2e-5),
    "bfloat16": (2e-3, 5e-2, 1e-2),
    "float8 rowwise": (2e-3, 5e-2, 1e-2),
    "float8 tensorwise": (1e-2, 0.3, 3e-2),
    "muon": (1e-6, 1e-5, 2e-3),
    "muon in float64": (1e-6, 1e-5, 2e-5),  # so what meshes differ by is the iteration's bfloat16
    "half trained": (2e-3, 5e-2, 1e-2),  # in bfloat16
}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run_meshes(1, tmp_path_factory.mktemp("meshes"))


def run_meshes(ranks, folder, *names):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "tests/meshes.py",
    ]
    result = subprocess.run(
        [*launch, f"{folder}/{ranks}.pt", *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / f"{ranks}.pt")


def reference_name(kind):
    """The case of one process that cases of a kind are compared with."""
    if kind == "float32":
        return "one, accumulation 1, shard_modulation true"
    return f"float8: one, {kind}" if kind.startswith("float8") else f"one, {kind}"


def assert_same(figures, reference):
    for name, trained in figures.items():
        kinds = (*reversed(BOUNDS), "controlnet", "double blocks alone", "frozen", "LoRA", "DoRA")
        kinds += ("fill", "kontext")
        kind = next((k for k in kinds if k in name), "float32")
        expected = reference[reference_name(kind)]
        loss, gradient, weight = BOUNDS[kind if kind in BOUNDS else "float32"]
        check_graphs(name, trained)
        assert trained["trained"] == expected["trained"], name
        # Muon orthogonalises each matrix once a step in each copy of the weights
        copies = trained["mesh"][0] if "hsdp" in name else 1
        once = expected["orthogonalised"] / expected["steps"]
        assert trained["orthogonalised"] == copies * trained["steps"] * once, name
        assert (expected["orthogonalised"] > 0) == ("muon" in name)
        assert trained["loss"] == pytest.approx(expected["loss"], rel=loss), name
        assert trained["norm"] == pytest.approx(expected["norm"], rel=max(gradient, 2e-5)), name
        check_tensors(f"{name}: gradients", trained["gradients"], expected["gradients"], gradient)
        compared = [count for count in COMPARED if count in trained]
        assert compared and max(compared) == trained["steps"], name
        for count, key in itertools.product(compared, ("weights", "average")):
            after = trained[count][key], expected[count][key], weight
            check_tensors(f"{name}: {key} after {count} steps", *after)


def check_tensors(what, ours, theirs, bound):
    assert ours.keys() == theirs.keys(), what
    errors = {name: relative(ours[name], theirs[name]) for name in theirs}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= bound, f"{what}: {worst} differs by {errors[worst]:.1e}"


def check_graphs(name, trained):
    """Compiled blocks have a graph a kind, which each block runs each step, a checkpointed one
    twice.
    """
    if "graphs" not in trained:
        assert "compiled" not in name and "inductor" not in name
        return
    double, single = {", none": (1, 1), ", full": (2, 2), ", 2": (2, 1)}.get(
        name[name.rindex(",") :], (1, 1)
    )
    assert trained["breaks"] == 0, name
    steps = trained["steps"]
    if "controlnet" in name:  # a frozen net beside it, at first without a gradient
        assert 2 <= sum(trained["graphs"].values()) <= 6, name
        assert sum(trained["runs"].values()) == steps * 4, name
        return
    assert trained["graphs"] == {"DoubleBlock": 1, "SingleBlock": 1}, name
    assert trained["runs"] == {"DoubleBlock": steps * double, "SingleBlock": steps * single}, name


def test_the_wrapped_model_has_the_gradients_of_plain_autograd(reference):
    plain = reference.pop("plain autograd")
    wrapped = reference["one, accumulation 1, shard_modulation true"]
    assert plain["loss"] == pytest.approx(wrapped["loss"], rel=1e-6)
    assert plain["gradients"].keys() == wrapped["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        assert gradient.norm() > 1e-3, name
        assert relative(wrapped["gradients"][name], gradient) < 1e-5, name
    assert_same(reference, reference)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_mesh_computes_the_same_run(reference, tmp_path, ranks):
    figures = run_meshes(ranks, tmp_path)
    assert_same(figures, reference)
    if ranks == 4:  # each node has a copy without being asked
        assert figures["dp4 on two nodes"]["mesh"] == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_mesh_computes_the_same_run_with_more_combinations(reference, tmp_path, ranks):
    figures = run_meshes(ranks, tmp_path, "more:")
    assert len(figures) >= 2
    assert_same(figures, reference)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_blocks_compiled_with_each_checkpointing_compute_the_same_run(reference, tmp_path, ranks):
    figures = run_meshes(ranks, tmp_path, "compiled:")
    figures.pop("plain autograd", None)
    assert len(figures) >= 4
    assert_same(figures, reference)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_inductors_code_computes_the_same_run(reference, tmp_path):
    figures = run_meshes(2, tmp_path, "inductor:")
    assert len(figures) == 3
    assert_same(figures, reference)


class Collectives(TorchDispatchMode):
    """Counts the collectives of this thread by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] += "c10d" in func.namespace and "wait" not in name and "wrap" not in name
        return func(*args, **(kwargs or {}))


def run_on_threads(ranks, body):
    """`body(rank)` of so many ranks, threads of this process; {rank: what it returns}."""
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    world, store, found, errors = threaded._install_threaded_pg(), dist.HashStore(), {}, []

    def run(rank):
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            found[rank] = body(rank)
        except Exception as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
    assert not errors and world is not None, errors
    return found


@pytest.mark.parametrize("ranks", [3, 64])
def test_modulation_spread_unevenly_is_the_whole_one_by_one_gather_and_one_all_to_all(ranks):
    """On 64 ranks some have no feature at all of a linear of 100."""
    generator = torch.Generator().manual_seed(0)
    whole = randomise(Modulation(FluxConfig(2, 3, 50, 5, 4, 12, 12, 20, 14, True, (2, 4, 4))))
    vecs = torch.randn(ranks, 2, 50, generator=generator)
    gradients = torch.randn(
        ranks, 2, sum(linear.out_features for linear in whole.linears()), generator=generator
    )

    def modulate(rank):
        part, vec = copy.deepcopy(whole), vecs[rank].clone().requires_grad_()
        spread_modulation(part, init_device_mesh("cpu", (ranks,)), torch.float32)
        with Collectives() as counted:
            out = part(vec)
            out.backward(gradients[rank])
        return (
            out.detach(),
            vec.grad,
            {n: p.grad.full_tensor() for n, p in part.named_parameters()},
            counted.calls,
        )

    found = run_on_threads(ranks, modulate)
    vec = vecs.flatten(0, 1).requires_grad_()
    out = whole(vec)
    out.backward(gradients.flatten(0, 1))
    for rank, (got, vec_gradient, _weights, calls) in found.items():
        rows = slice(2 * rank, 2 * rank + 2)
        assert relative(got, out[rows]) < 1e-6 and relative(vec_gradient, vec.grad[rows]) < 1e-5
        assert found[rank][2].keys() == dict(whole.named_parameters()).keys()
        assert +calls == {
            "all_gather_into_tensor": 1,
            "all_to_all_single": 2,
            "reduce_scatter_tensor": 1,
        }
    for name, p in whole.named_parameters():  # averaged over the ranks, as FSDP2 does
        assert relative(found[0][2][name], p.grad / ranks) < 1e-6, name


def test_a_run_goes_on_from_mesh_to_mesh_as_if_uninterrupted(tmp_path):
    """Four ranks by FSDP2, then two by two with tensor parallelism, then one process; every number
    within Muon's bound, 2e-3.
    """
    common = [*MOCK, "dtype=float32", "data.micro_batch=1", "checkpoint.every=3", "optim.kind=muon"]
    whole = losses(train(*common, "steps=9", f"output={tmp_path}/whole"))
    first = run(*common, "steps=3", f"output={tmp_path}/run", ranks=4)
    second = run(
        *common, "steps=6", f"output={tmp_path}/run", "resume=auto", "parallel.tp=2", ranks=4
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert (
        "resuming after step 3 with sample 12" in second.stderr and "parallel.tp" in second.stderr
    )
    parts = losses(train(*common, "steps=9", f"output={tmp_path}/run", "resume=auto"))
    assert all(parts[k] == pytest.approx(v, rel=BOUNDS["muon"][2]) for k, v in whole.items())
    assert (9, "val/loss") in whole and parts.keys() >= whole.keys()


@pytest.mark.slow
def test_resumed_on_the_same_mesh_is_bit_identical(tmp_path):
    common = [
        *MOCK,
        "data.micro_batch=1",
        "parallel.tp=2",
        "parallel.sequence_parallel=true",
        "model.max_sequence_length=16",
    ]
    commands = [("steps=4", "whole"), ("steps=2", "run"), ("steps=4", "run", "resume=auto")]
    for steps, name, *resume in commands:
        result = run(
            *common, steps, *resume, f"output={tmp_path}/{name}", "checkpoint.every=2", ranks=4
        )
        assert result.returncode == 0, result.stderr
    a, b = (losses(tmp_path / name) for name in ("whole", "run"))
    assert all(b[k] == v for k, v in a.items())
    a, b = (weights(tmp_path / name) for name in ("whole", "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_rank_that_dies_ends_the_run_with_the_reason(tmp_path):
    process = subprocess.Popen(
        command(*MOCK, "data.micro_batch=1", "steps=100000", f"output={tmp_path}/run", ranks=2),
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for_steps(tmp_path / "run", process)
    victim = [
        int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()
    ][-1]
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert (
        process.returncode != 0 and "another rank has ended" in errors and "resume=auto" in errors
    )


PARALLEL = [
    "model=flux_dev",
    "data=mock",
    "data.height=64",
    "data.width=64",
    "model.num_double_blocks=1",
    "model.num_single_blocks=1",
    "data.micro_batch=1",
]


def predicted(*given, ranks=8, batch=8, **options):
    return prediction.predict_step(
        [*PARALLEL, f"data.global_batch={batch}", *given], ranks, **options
    )


def test_each_micro_batch_is_reduced_to_the_ranks_parts_and_copies_are_averaged_once():
    """So no rank holds more than its part of the gradient between micro-batches."""
    hsdp = "parallel.dp_replicate=2"
    one, four = predicted(hsdp), predicted(hsdp, batch=32)
    assert one["calls"]["all_reduce", "dp_replicate"] > 1
    for found in one, four:
        whole = sum(found["memory"][name] for name in ("weights", "gradients", "optimizer"))
        assert found["memory"]["peak"] < whole + 3.2e9  # a double block's gradient is 1.3 GB
    for key in ("sent", "calls"):
        once, each = (("all_reduce", "dp_replicate"), ("reduce_scatter", "fsdp"))
        assert four[key][once] == one[key][once] and four[key][each] == 4 * one[key][each]


def test_reduce_dtype_bfloat16_sends_half_of_the_gradient():
    wide, narrow = predicted(), predicted("parallel.reduce_dtype=bfloat16")
    key = "reduce_scatter", "fsdp"  # of 2 bytes of the rows that the modulation sends too
    assert narrow["sent"][key] == pytest.approx(wide["sent"][key] / 2, rel=1e-3)
    assert narrow["memory"]["gradients"] == wide["memory"]["gradients"]


def test_muon_sends_a_ranks_part_of_each_matrix_away_and_back():
    """No rank gathers what the others orthogonalise."""
    adam, muon = predicted(ranks=2), predicted("optim.kind=muon", ranks=2)
    matrices = (2 * 12 + 12) * 3072**2  # of a double and a single block
    more = muon["sent"]["all_to_all", "fsdp"] - adam["sent"]["all_to_all", "fsdp"]
    assert more == pytest.approx(2 * 4 * matrices / 2 / 2, rel=1e-3)
    for key in ("all_gather", "reduce_scatter"):
        assert muon["sent"][key, "fsdp"] == adam["sent"][key, "fsdp"]


def test_muon_dealt_out_over_ranks_steps_as_one_process_bit_for_bit(monkeypatch):
    """On three ranks, of matrices that do not divide among them, with a step that is skipped."""
    shapes = [(7, 5), (12, 4), (4, 12), (9, 9)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    monkeypatch.setenv("WORLD_SIZE", "3")

    def run(mesh, place):
        matrices = [torch.nn.Parameter(place(w.clone())) for w in weights]
        muon = optim.Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.1, mesh=mesh)
        for number, step in enumerate(gradients):
            muon.found_inf = torch.tensor(float(number == 2))
            for p, gradient in zip(matrices, step):
                p.grad = place(gradient)
            muon.step()
        return matrices

    def on_rank(_rank):
        mesh = parallel.make_mesh(parallel.ParallelConfig(), torch.device("cpu"))
        matrices = run(mesh, lambda whole: distribute_tensor(whole, mesh.fsdp, [Shard(0)]))
        return [p.full_tensor().detach() for p in matrices]

    expected = run(None, lambda whole: whole)
    assert not any(torch.equal(p, w) for p, w in zip(expected, weights))
    for found in run_on_threads(3, on_rank).values():
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    "memory, given, copies, said",
    [
        (80e9, {}, 4, "dp_replicate=4 on 4 nodes: a copy on a node's 6 ranks takes 24.0 GB of"),
        (39e9, {}, 1, "dp_replicate=1 on 4 nodes: a copy on a node's 6 ranks takes 24.0 GB of"),
        (80e9, dict(tp=3, cp=2), 4, "dp_replicate=4"),
        (80e9, dict(tp=4), 1, "tp x parallel.cp does not divide a node's 6 ranks"),
        (80e9, dict(dp_replicate=1), 1, ""),
        (80e9, dict(dp_shard=2), 12, ""),
    ],
)
def test_each_node_has_a_copy_of_the_weights_where_its_ranks_can_hold_it(
    caplog, monkeypatch, memory, given, copies, said
):
    monkeypatch.setenv("WORLD_SIZE", "24")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with caplog.at_level("INFO"):
        config = parallel.settle_copies(
            parallel.ParallelConfig(**given), lambda ranks: 144e9 / ranks, memory
        )
    assert config.sizes()[0] == copies
    assert said in caplog.text and bool(caplog.text) == bool(said)


def test_nodes_with_other_numbers_of_ranks_are_refused(monkeypatch):
    monkeypatch.setattr("fluxlite.parallel.mesh.gather_values", lambda mine: [8, 4, mine])
    with pytest.raises(ValueError, match="nodes of this run have 1 and 4 and 8 ranks"):
        check_nodes()
    with pytest.raises(ValueError, match="--ranks 12 is no multiple of --per-node 8"):
        prediction.predict_step([], 12)


def test_the_state_that_decides_it_is_what_preflight_counts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    for given in (
        [],
        ["optim.kind=muon", "optim.ema_decay=0.9", "optim.freeze=['double_blocks.*']"],
        ["parallel.shard_modulation=false"],
        ["lora=default", "optim.ema_decay=0.9"],
        ["lora=default", "lora.targets=['transformer_blocks.*']"],  # its modulation is gathered
    ):
        found = predicted(*given, ranks=16, batch=16, memory=80e9)
        assert found["mesh"]["dp_replicate"] == 2
        counted = sum(size for name, size in found["memory"].items() if name != "peak")
        arguments = [*PARALLEL, "data.global_batch=16", "dtype=bfloat16", *given]
        config = load_config(TrainConfig, "train", arguments)
        assert setup.state_per_rank(config, 8) == pytest.approx(counted, rel=5e-3)


def test_encoders_are_shared_by_the_ranks_of_a_node():
    with prediction.fake_ranks(16, 8):
        mesh = parallel.make_mesh(parallel.ParallelConfig(), torch.device("cpu"))
        assert mesh.node.mesh.tolist() == list(range(8)) and mesh.world.size() == 16
    with prediction.fake_ranks(8, 8):
        mesh = parallel.make_mesh(parallel.ParallelConfig(), torch.device("cpu"))
        assert mesh.node is mesh.world


@pytest.mark.parametrize("shard_modulation", ["true", "false"])
def test_frozen_weights_are_never_float32(shard_modulation):
    """Nor are they anywhere in a step: of the memory at once no more than that of a trained run."""
    spread = f"parallel.shard_modulation={shard_modulation}"
    frozen = "optim.trainable=['*.bias']"
    trained, biases = predicted(spread), predicted(spread, frozen)
    assert biases["memory"]["weights"] < 0.51 * trained["memory"]["weights"]
    held = biases["memory"]["weights"]
    one_block = 2 * 12 * 3072**2 * 2  # a double block in bfloat16
    assert biases["memory"]["peak"] < held + 2.5 * one_block


@pytest.mark.parametrize(
    "given, said",
    [
        (["parallel.tp=3"], "tp=3 does not divide the 8 processes.*1, 2, 4, 8"),
        (
            ["parallel.tp=4", "model.num_heads=2", "model.hidden_size=256"],
            "does not divide model.num_heads=2: .* one of 1, 2",
        ),
        (
            ["parallel.dp_shard=3"],
            "dp_shard=3 is not the number of processes, 8: set parallel.dp_shard=8 or -1",
        ),
        (["parallel.cp=0"], "parallel.cp=0 must be at least 1"),
        (["parallel.dp_replicate=0"], "dp_replicate=0: set 1 or more copies, or -1"),
        (
            ["parallel.cp=2", "model.max_sequence_length=15"],
            "15 model.max_sequence_length do not divide .* multiple of 2",
        ),
        (["parallel.sequence_parallel=true"], "needs parallel.tp above 1"),
        (["parallel.activation_checkpointing=true"], "choose none, full, selective or a number"),
        (["parallel.activation_checkpointing=99"], "there are 57 blocks"),
        (["parallel.shard_encoders=true"], "model.t5 is null"),
        (["parallel.activation_checkpointing=some"], "choose none, full, selective or a number"),
        (["parallel.cpu_offload=true"], "device is the CPU"),
        (
            ["data.micro_batch=2", "data.global_batch=8"],
            "8 x 2 = 16: set data.global_batch=16, or data.micro_batch=1",
        ),
        (["parallel.tensor=2"], "parallel.tensor"),
    ],
)
def test_impossible_meshes_are_refused_with_what_is_possible(monkeypatch, given, said):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=said):
        load_config(
            TrainConfig,
            "train",
            last_of_each(["data=mock", "model=flux_dev", "data.global_batch=8", *given]),
        )


def test_preflight_counts_the_bytes_that_sharded_modulation_saves():
    """By hand: bf16 gathers before forward and backward and a float32 reduce-scatter, each 7/8 of
    the linear's parameters.
    """
    small = [
        "model=flux_dev",
        "data=mock",
        "data.height=64",
        "data.width=64",
        "model.num_double_blocks=1",
        "model.num_single_blocks=1",
    ]
    plain, spread = (
        sum(
            prediction.predict_step(
                [*small, "data.global_batch=8", f"parallel.shard_modulation={flag}"], 8
            )["sent"].values()
        )
        for flag in ("false", "true")
    )
    features = 17 * 3072
    by_hand = (3072 + 1) * features * (2 + 2 + 4) * 7 / 8
    assert plain - spread == pytest.approx(by_hand, rel=1e-2) and spread < 0.75 * plain


@pytest.mark.parametrize("options,sizes", [([], (1, 8, 1, 1)), (["tp=2", "cp=2"], (1, 2, 2, 2))])
def test_preflight_predicts_for_a_mesh_of_ranks_that_are_not_there(options, sizes):
    small = ["model=flux_tiny", "data=mock", "data.height=64", "data.width=64"]
    small += ["data.global_batch=8", "model.max_sequence_length=16"]
    found = prediction.predict_step([*small, *(f"parallel.{option}" for option in options)], 8)
    assert tuple(found["mesh"].values()) == sizes
    assert any(dimension == "tp" for _, dimension in found["sent"]) == bool(options)


@pytest.mark.parametrize("argument", ["compile=xyz", "parallel.float8=fast", "device=gpu"])
def test_preflight_checks_what_makes_no_difference_to_it(argument):
    with pytest.raises(ValueError, match=argument):
        prediction.predict_step(["model=flux_tiny", "data=mock", argument], 1)


def test_preflight_counts_a_controlnet_and_its_frozen_transformer():
    shape = [
        "model=flux_dev",
        "model.num_double_blocks=1",
        "model.num_single_blocks=0",
        "data=mock",
        "data.height=64",
        "data.width=64",
    ]
    net = [
        "controlnet=default",
        "controlnet.num_double_blocks=1",
        "controlnet.num_single_blocks=0",
        "data.global_batch=8",
    ]
    union = [*net, "controlnet.num_modes=3", "data.control_mode=depth"]
    found, plain, of_union = (
        prediction.predict_step([*shape, *more], 8)
        for more in (net, ["data.global_batch=8"], union)
    )
    embedding = 4 * 3 * 3072 / 8  # of the modes, float32 over 8 ranks
    assert of_union["memory"]["weights"] - found["memory"]["weights"] == pytest.approx(
        embedding, abs=3072 * 4
    )
    assert found["memory"]["frozen transformer"] == pytest.approx(
        plain["memory"]["weights"] / 2, rel=1e-3
    )  # bfloat16 for float32
    assert (
        found["memory"]["gradients"] < found["memory"]["weights"]
    )  # what no gradient reaches is frozen
    assert found["calls"]["all_gather", "fsdp"] > plain["calls"]["all_gather", "fsdp"]


@pytest.mark.parametrize("data", ["fill50k", "webdataset"])
def test_preflight_needs_neither_the_data_nor_the_encoders_of_a_recipe(data):
    shape = ["model.num_double_blocks=1", "model.num_single_blocks=1", "data.control=png"]
    shape += ["controlnet.num_double_blocks=1", "controlnet.num_single_blocks=1"]
    shape += [f"data.{side}=64" for side in ("height", "width")]
    found = prediction.predict_step(
        ["recipe=controlnet", f"data={data}", "data.global_batch=8", *shape], 8
    )
    assert found["memory"]["frozen transformer"] > 0 and found["sent"]


def test_no_rank_holds_more_than_its_shard_and_a_block_while_building():
    """FLUX's width, as rank 0 of 8 ranks of which the others are pretended."""
    command = [
        sys.executable,
        "benchmarks/build.py",
        "--ranks",
        "8",
        "--set",
        "model.num_double_blocks=2",
        "--set",
    ]
    result = subprocess.run(
        [*command, "model.num_single_blocks=4"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (
        found["parameters"] > 1e9
        and found["shard"] < found["peak"] <= found["shard"] + found["largest block"]
    )
