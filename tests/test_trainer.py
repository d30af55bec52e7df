import fnmatch
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from reference import last_of_each, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fluxlite import parallel
from fluxlite.cli.command_line import load_config
from fluxlite.draw import sampling
from fluxlite.draw.generation import generate
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import Flux
from fluxlite.parallel import ParallelConfig, plan
from fluxlite.settings import TrainConfig
from fluxlite.train import building, loop, optim, setup
from fluxlite.train.metrics import read_metrics
from fluxlite.train.tasks import FULL
from fluxlite.weights import run_folder, sources, writing

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.num_double_blocks=1",
    "model.num_single_blocks=1",
    "data.height=32",
    "data.width=32",
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.rope_axes=[8,12,12]",
    "metrics.log_every=1",
    "metrics.tensorboard=false",
    "data.workers=0",
    "data.micro_batch=2",
    "data.global_batch=4",
    "data.val_count=3",
    "optim.warmup=3",
    "optim.lr=1e-3",
    "optim.ema_decay=0.9",
    "sample.count=2",
    "sample.steps=2",
]
MOCK = [
    *SMALL,
    "data=mock",
    "model.t5=null",
    "model.clip=null",
    "model.autoencoder=null",
    "data.count=20",
]


def configure(*arguments):
    return load_config(TrainConfig, "train", last_of_each(arguments))


def train(*arguments):
    """Train in this process."""
    try:
        return loop.train(configure(*arguments))
    finally:
        parallel.stop_ranks()


def command(*arguments, ranks=None):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
    return [sys.executable, *launcher, "train.py", *last_of_each(arguments)]


def run(*arguments, ranks=None):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments, ranks=ranks), cwd=ROOT, capture_output=True, text=True, env=environment
    )


def wait_for_steps(folder, process, count=3):
    """Until a run in another process has taken so many steps."""
    file = folder / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < count:
        assert process.poll() is None
        time.sleep(0.05)


def losses(folder):
    """{(step, name): value} of everything that a run's mathematics determines."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], k): v
        for row in rows
        for k, v in row.items()
        if k.startswith(("loss", "val/", "grad_norm", "lr"))
    }


def weights(folder, **options):
    return sources.load_transformer(folder, **options).state_dict()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Arguments for a small fill50k in a folder of its own."""
    folder = tmp_path_factory.mktemp("data")
    return [
        "data=fill50k",
        f"data.path={folder}/fill50k",
        "data.count=40",
        "data.generate_size=32",
        *SMALL,
    ]


def test_a_short_run_lowers_the_loss_and_leaves_everything(pictures, tmp_path):
    folder = train(
        *pictures,
        f"output={tmp_path}/run",
        "steps=40",
        "validate_every=20",
        "sample.every=20",
        "checkpoint.every=20",
        f"data.cache={tmp_path}/cache",
        "optim.lr=3e-3",
        "data.global_batch=8",
    )
    values = losses(folder)
    assert (
        values[40, "val/loss"] < 0.85 * values[1, "loss"]
        and values[40, "val/loss"] < values[20, "val/loss"]
    )
    assert sum(k.startswith("val/loss_t") for _, k in values) == 16
    for name in (
        "losses.png",
        "config.json",
        "images/grid-000020.png",
        "images/grid-000040.png",
        "checkpoints/last/meta.json",
    ):
        assert (folder / name).is_file(), name


def save_autoencoder(folder, levels):
    """diffusers' autoencoder of 4 channels and so many levels, random, as a `vae` folder."""
    theirs = AutoencoderKL(
        block_out_channels=[8] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
    )
    randomise(theirs).save_pretrained(folder)
    return f"model.autoencoder={folder}"


@pytest.mark.parametrize("factor", [4, 16])
def test_another_autoencoder_trains_and_draws_by_its_own_factor(factor, pictures, tmp_path):
    parts = [save_autoencoder(tmp_path / "vae", levels=1 + int(math.log2(factor)))]
    parts += ["model.in_channels=16", "model.out_channels=16", "device=cpu", "dtype=float32"]
    short = ["steps=2", f"output={tmp_path}/run", *parts]
    with pytest.raises(ValueError, match=f"set model.downsampling={factor}"):
        train(*pictures, *short)
    with pytest.raises(ValueError, match="height=32 must be a multiple of 64"):
        configure(*pictures, *short, "model.downsampling=32")
    folder, seen = train(*pictures, *short, f"model.downsampling={factor}"), []
    assert all(math.isfinite(value) for value in losses(folder).values())
    with Image.open(folder / "images" / "grid-000002.png") as grid:
        assert grid.size[0] >= 2 * 32

    def watch(numbers, step, times, latents):
        seen.append(latents.shape)

    options = dict(checkpoint=folder, device="cpu", height=32, width=64, steps=1, on_step=watch)
    [picture] = generate("red circle with blue background", **options)
    assert picture.size == (64, 32) and seen[-1] == (1, 4, 32 // factor, 64 // factor)


def test_a_run_draws_with_its_grids_guidance_away_from_the_empty_caption(
    pictures, tmp_path, monkeypatch
):
    seen, sample_sharded = [], sampling.sample_sharded

    def watch(*given):
        seen.append((given[-3].true_cfg, given[-1]))
        return sample_sharded(*given)

    monkeypatch.setattr(sampling, "sample_sharded", watch)
    folder = train(*pictures, f"output={tmp_path}/run", "steps=1", "sample.true_cfg=3")
    [(strength, (txt, pooled))] = seen
    assert strength == 3 and torch.equal(txt[0], txt[1]) and torch.equal(pooled[0], pooled[1])
    [picture] = generate("red circle with blue background", checkpoint=folder, device="cpu")
    assert picture.info["sampling"]["true_cfg"] == 3


def test_a_net_that_sees_pixels_is_refused_beside_another_factor(pictures):
    control = ["controlnet=default", "controlnet.hint=pixel", "controlnet.num_single_blocks=0"]
    control += ["controlnet.num_double_blocks=1", "data.control=canny", "data.val_count=8"]
    configure(*pictures, *control)
    with pytest.raises(ValueError, match="controlnet.hint=pixel: .*of 8 pixels .* of 4:"):
        configure(*pictures, *control, "model.downsampling=4")


def test_cache_equals_no_cache(pictures, tmp_path):
    common = [*pictures, "steps=3", "dtype=float32", "data.caption_dropout=0.5"]
    plain = losses(train(*common, f"output={tmp_path}/a"))
    cached = losses(train(*common, f"output={tmp_path}/b", f"data.cache={tmp_path}/cache"))
    assert plain.keys() == cached.keys()
    # the encoders see other batches, so equality is to rounding
    assert all(cached[k] == pytest.approx(v, rel=1e-4) for k, v in plain.items())


def test_a_run_depends_on_its_seed_alone(tmp_path):
    a, b, c = (
        losses(train(*MOCK, f"output={tmp_path}/{i}", "steps=3", f"seed={s}"))
        for i, s in enumerate((0, 0, 1))
    )
    assert a == b != c


def test_validation_and_pictures_leave_training_untouched(pictures, tmp_path):
    often, never = (
        train(
            *pictures,
            f"output={tmp_path}/{n}",
            "steps=4",
            f"validate_every={n}",
            f"sample.every={n}",
        )
        for n in (1, 0)
    )
    a, b = losses(often), losses(never)
    assert all(a[k] == v for k, v in b.items()) and len(a) > len(b)


def test_round_robin_validation_measures_each_sample_at_one_t(tmp_path):
    """Of 8 samples, loss k is sample k's at t = k/8: the mean over samples of those losses that
    `all` measures too.
    """
    common = [*MOCK, "steps=1", "data.val_count=8", "dtype=float32"]
    every, some = (
        losses(train(*common, f"validation={v}", f"output={tmp_path}/{v}"))
        for v in ("all", "round_robin")
    )
    assert every.keys() == some.keys() and every[1, "loss"] == some[1, "loss"]
    assert all(
        0.5 < some[k] / v < 2 and some[k] != v
        for k, v in every.items()
        if k[1].startswith("val/loss_t")
    )


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    common = [*MOCK, "optim.kind=muon", "steps=40", "checkpoint.every=5", "validate_every=10"]
    whole = train(*common, f"output={tmp_path}/whole")
    process = subprocess.Popen(
        command(*common, f"output={tmp_path}/killed"), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed/checkpoints/step-000010").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    refused = run(*common, f"output={tmp_path}/killed")
    assert refused.returncode == 2 and "resume=auto" in refused.stderr
    train(*common, f"output={tmp_path}/killed", "resume=auto")
    assert losses(tmp_path / "killed") == losses(whole)
    a, b = weights(whole), weights(tmp_path / "killed")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("fails", ["validation_losses", "draw_grid"])
@pytest.mark.parametrize("last", [2, 4])
def test_a_step_that_was_due_for_saving_survives_what_fails_while_it_is_looked_at(
    fails, last, pictures, tmp_path, monkeypatch
):
    often = [f"{key}=2" for key in ("checkpoint.every", "validate_every", "sample.every")]
    common = [*pictures, *often, "steps=4"]
    whole, folder = train(*common, f"output={tmp_path}/whole"), tmp_path / "run"
    real = getattr(loop, fails)

    def failing(run, *args):
        if (folder / f"checkpoints/step-{last:06d}").exists():
            raise RuntimeError("out of memory")
        return real(run, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, fails, failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(*common, f"output={folder}")
    assert run_folder.read_meta(folder / "checkpoints/last").step == last
    assert not (folder / f"images/grid-{last:06d}.png").exists()
    drawn, draw = [], loop.draw_grid
    monkeypatch.setattr(loop, "draw_grid", lambda *args: drawn.append(1) or draw(*args))
    train(*common, f"output={folder}", "resume=auto")
    assert losses(folder) == losses(whole)
    for step in (2, 4):
        name = f"images/grid-{step:06d}.png"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    train(*common, f"output={folder}", "resume=auto")
    assert len(drawn) == {2: 2, 4: 1}[last]  # none twice
    rows = [row["step"] for row in read_metrics(folder) if "val/loss" in row]
    assert rows == [2, 4]


def test_two_processes_equal_one_and_resume_each_other(tmp_path):
    common = [
        *MOCK,
        "dtype=float32",
        "checkpoint.every=3",
        "optim.kind=muon",
    ]  # with AdamW for what is no matrix
    whole = losses(train(*common, "steps=6", f"output={tmp_path}/one"))
    result = run(*common, "steps=3", f"output={tmp_path}/two", ranks=2)
    assert result.returncode == 0, result.stderr
    train(*common, "steps=6", f"output={tmp_path}/two", "resume=auto")
    two = losses(tmp_path / "two")
    assert all(two[k] == pytest.approx(v, rel=1e-5) for k, v in whole.items())


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    process = subprocess.Popen(
        command(*MOCK, "data.workers=2", "steps=100000", f"output={tmp_path}/run"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_steps(tmp_path / "run", process)
    os.killpg(process.pid, signal.SIGTERM)  # the loader processes too
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as from a scheduler and from torchrun
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 0
        and "stopped by SIGTERM after step" in errors
        and "worker" not in errors
    )
    assert not subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout
    assert run_folder.read_meta(tmp_path / "run/checkpoints/last").step >= 3


def test_resume_refuses_what_changes_the_run_and_says_what_it_accepts(tmp_path, caplog):
    train(*MOCK, "steps=2", f"output={tmp_path}/run")
    with pytest.raises(ValueError, match="optim.lr: 0.001 there, 0.5 here"):
        train(*MOCK, "steps=2", f"output={tmp_path}/run", "resume=auto", "optim.lr=0.5")
    with caplog.at_level("INFO", "fluxlite"):
        train(*MOCK, "steps=4", f"output={tmp_path}/run", "resume=auto", "checkpoint.every=7")
    assert "checkpoint.every, steps" in caplog.text


def test_saving_is_atomic_and_keeps_the_last_k(tmp_path, monkeypatch):
    folder = train(
        *MOCK, "steps=4", "checkpoint.every=1", "checkpoint.keep=2", f"output={tmp_path}/run"
    )
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["last", "step-000003", "step-000004"]
    before = weights(folder)

    def die(*_args, **_kwargs):
        raise KeyboardInterrupt

    for victim in ("sync_folder", "os.rename", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fluxlite.train.run_state.{victim}", die)
            with pytest.raises(BaseException):  # noqa: B017, torch wraps the interrupt when it comes inside its own rename
                train(
                    *MOCK,
                    "steps=5",
                    f"output={tmp_path}/run",
                    "resume=auto",
                    "metrics.progress=false",
                )
        assert all(torch.equal(v, before[k]) for k, v in weights(folder).items()), victim
    train(*MOCK, "steps=5", f"output={tmp_path}/run", "resume=auto")
    assert run_folder.read_meta(folder / "checkpoints/last").step == 5


def test_settings_of_no_effect_on_one_process_are_said(caplog):
    setup.warn_of_idle(ParallelConfig(prefetch=2, cp=1))
    assert "parallel.prefetch: of no effect on one process" in caplog.text


def test_a_step_of_more_samples_than_there_are_is_said(tmp_path, caplog):
    run = [*MOCK, "steps=1", f"output={tmp_path}/a", "sample.every=0"]
    train(*run)
    assert "an epoch has" not in caplog.text
    train(*run, "data.count=3", f"output={tmp_path}/b")
    assert "an epoch has 3 samples, and data.global_batch=4: a step takes some" in caplog.text


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "learning_rate", lambda *_: 1e38)
    with pytest.raises(ValueError, match=r"loss of step \d+ is .*mock/.*optim.lr"):
        train(*MOCK, "steps=30", "optim.clip=0", "optim.warmup=0", f"output={tmp_path}/run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_weights_that_are_not_finite_start_no_run(tmp_path):
    first = train(*MOCK, "steps=1", f"output={tmp_path}/a")
    file = tmp_path / "a.safetensors"
    writing.write_converted(sources.open_source(str(first)), file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    state["out.weight"][3, 4] = math.nan
    save_file(state, file, metadata)
    with pytest.raises(ValueError, match="model.checkpoint=.*out.weight holds NaN"):
        train(*MOCK, f"model.checkpoint={file}", "steps=1", f"output={tmp_path}/b")


def test_a_checkpoint_starts_another_run_and_shapes_are_checked(tmp_path):
    first = train(*MOCK, "steps=3", f"output={tmp_path}/a")
    config = configure(*MOCK, f"model.checkpoint={first}", "steps=1")
    device, mesh = parallel.start_ranks(config.parallel, "cpu")
    try:
        [model] = FULL.build_models(config, device, mesh)
        expected = weights(first, ema=True)
        assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
        assert any(not torch.equal(v, expected[k]) for k, v in weights(first, ema=False).items())
        with pytest.raises(ValueError, match="num_single_blocks"):
            FULL.build_models(
                configure(*MOCK, f"model.checkpoint={first}", "model.num_single_blocks=2"),
                device,
                mesh,
            )
    finally:
        parallel.stop_ranks()


def test_accumulation_equals_a_larger_batch(tmp_path):
    one, two = (
        losses(
            train(
                *MOCK, "dtype=float32", "steps=3", f"data.micro_batch={m}", f"output={tmp_path}/{m}"
            )
        )
        for m in (4, 1)
    )
    assert all(two[k] == pytest.approx(v, rel=2e-5) for k, v in one.items())


@pytest.mark.slow
def test_compiled_training_equals_eager(tmp_path):
    eager, compiled = (
        losses(train(*MOCK, "dtype=float32", "steps=3", f"compile={c}", f"output={tmp_path}/{c}"))
        for c in ("false", "true")
    )
    assert all(compiled[k] == pytest.approx(v, rel=1e-4) for k, v in eager.items())


@pytest.mark.slow
def test_training_starts_from_any_layout_at_full_width(tmp_path):
    """A random folder at full width, one block of each kind, as BFL's file."""
    for command in (
        [
            "scripts/make_random.py",
            "--dst",
            f"{tmp_path}/random",
            "--doubles",
            "1",
            "--singles",
            "1",
        ],
        [
            "convert_hf.py",
            "--src",
            f"{tmp_path}/random",
            "--dst",
            f"{tmp_path}/flux1.safetensors",
            "--to",
            "bfl",
            "--verify",
        ],
    ):
        assert subprocess.run([sys.executable, *command], cwd=ROOT).returncode == 0
    common = [
        "model=flux_debug",
        "data=mock",
        "steps=1",
        "data.val_count=1",
        "data.global_batch=1",
        "model.max_sequence_length=16",
    ]
    common += ["data.height=64", "data.width=64", "metrics.tensorboard=false"]
    a = train(*common, f"model.checkpoint={tmp_path}/random", f"output={tmp_path}/a")
    b = train(
        *common,
        f"model.checkpoint={tmp_path}/flux1.safetensors",
        f"model.save_converted={tmp_path}/kept.safetensors",
        f"output={tmp_path}/b",
    )
    assert losses(a) == losses(b) and (tmp_path / "kept.safetensors").is_file()


def test_frozen_parameters_stay_and_patterns_must_match():
    model = Flux(FluxConfig(1, 1, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6)))
    optim.freeze_parameters(
        model, optim.OptimConfig(trainable=["double_blocks.*", "out.*"], freeze=["*.bias"])
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        "double_blocks.0.img.proj.weight" in trained
        and "out.bias" not in trained
        and "img_in.weight" not in trained
    )
    with pytest.raises(ValueError, match="no parameter matches bloks"):
        optim.freeze_parameters(model, optim.OptimConfig(trainable=["bloks.*"]))


def test_frozen_weights_in_the_compute_dtype_train_and_resume_as_float32_ones(
    tmp_path, monkeypatch
):
    """Bit for bit, and from a checkpoint in which they are float32."""
    frozen = ["double_blocks.*", "single_blocks.*", "txt_in.*"]
    common = [*MOCK, "dtype=bfloat16", f"optim.freeze={frozen}", "checkpoint.every=2"]
    half = train(*common, "steps=4", f"output={tmp_path}/half")
    with monkeypatch.context() as patch:

        def wrap_as_float32(model, config, mesh):
            return parallel.parallelize(model, mesh, config.parallel, torch.bfloat16)

        def all_owners(part, elsewhere):
            found = [
                (m, *named) for m in part.modules() for named in m.named_parameters(recurse=False)
            ]
            return [(module, name) for module, name, p in found if p not in elsewhere]

        patch.setattr(building, "wrap_model", wrap_as_float32)
        patch.setattr(plan, "_owners", all_owners)
        whole = train(*common, "steps=2", f"output={tmp_path}/run")
    old = weights(whole, ema=False)
    assert {values.dtype for values in old.values()} == {torch.float32}
    run = train(*common, "steps=4", f"output={tmp_path}/run", "resume=auto")
    assert losses(run).items() >= losses(half).items() and (4, "val/loss") in losses(half)
    new = weights(run, ema=False)
    for name, values in new.items():
        stays = any(fnmatch.fnmatch(name, pattern) for pattern in frozen)
        assert values.dtype == (torch.bfloat16 if stays else torch.float32), name
        assert torch.equal(values, old[name].to(values.dtype)) == stays, name


def test_muon_orthogonalises_and_matches_torch():
    g = torch.Generator().manual_seed(0)
    for shape in ((48, 16), (16, 48), (32, 32)):
        matrix = torch.randn(shape, generator=g) @ torch.diag(torch.logspace(0, -2, shape[1]))
        values = torch.linalg.svdvals(optim.orthogonalise_matrices(matrix[None]))
        assert values.max() < 1.4 and values.median() > 0.5
    ours = torch.randn(48, 16, generator=g).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    a = optim.Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(48, 16, generator=g)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, atol=2e-3) and not torch.allclose(
        ours, torch.zeros_like(ours), atol=0.5
    )


def test_muon_steps_small_matrices_of_a_shape_at_once_as_one_by_one(monkeypatch):
    g = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (8, 8), (24, 8), (8, 8), (8, 24), (8, 8)]
    start = [torch.randn(shape, generator=g) for shape in shapes]
    grads = [torch.randn(shape, generator=g) for shape in shapes]
    sizes = []

    def counted(matrices, **how):
        sizes.append(len(matrices))
        return exact(matrices, dtype=torch.float64)

    exact, stepped = optim.orthogonalise_matrices, []
    monkeypatch.setattr(optim, "orthogonalise_matrices", counted)
    for at_once in (1, 128, 1 << 24):
        monkeypatch.setattr(optim, "AT_ONCE", at_once)
        weights = [value.clone().requires_grad_() for value in start]
        for weight, gradient in zip(weights, grads):
            weight.grad = gradient.clone()
        optim.Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.1).step()
        stepped.append(weights)
    assert sizes == [*[1] * 6, *(1, 1, 1, 2, 1), *(1, 2, 3)]
    for others in stepped[1:]:
        for one, other in zip(stepped[0], others):
            assert torch.allclose(one, other, atol=1e-6)


def test_meshes_differ_with_muon_by_the_iterations_bfloat16_alone():
    """Meshes add a gradient up in other orders, and float32 rounds. That flips roundings to
    bfloat16.

    The iteration amplifies them.
    """
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(64, 192, generator=g)
    summed_otherwise = gradient * (1 + 1e-7 * torch.randn(64, 192, generator=g))

    def difference(dtype):
        one, other = (
            optim.orthogonalise_matrices(m.double()[None], dtype=dtype)
            for m in (gradient, summed_otherwise)
        )
        return ((one - other).norm() / one.norm()).item()

    assert 1e-4 < difference(torch.bfloat16) < 2e-2 and difference(torch.float64) < 1e-6


def test_learning_rate_schedules():
    def lr(schedule, step):
        return optim.learning_rate(
            optim.OptimConfig(lr=2.0, warmup=10, schedule=schedule, min_lr_ratio=0.1), step, 110
        )

    assert [lr("constant", s) for s in (0, 4, 9, 10, 109)] == pytest.approx(
        [0.2, 1.0, 2.0, 2.0, 2.0]
    )
    assert [lr("linear", s) for s in (10, 60, 110)] == pytest.approx([2.0, 1.1, 0.2])
    assert [lr("cosine", s) for s in (10, 60, 110)] == pytest.approx([2.0, 1.1, 0.2])
    assert lr("cosine", 35) > lr("linear", 35)
