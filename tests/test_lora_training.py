"""Training a LoRA: beside peft's on diffusers' transformer, what its checkpoints and files hold,
how it goes on from other programs' files, and what is refused. Meshes are in `test_parallel.py`.
"""

import itertools
import json
import runpy
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import lora_writers as write
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from reference import diffusers_flux, last_of_each, randomise, relative_error
from safetensors.torch import load_file, save_file
from test_lora import FILES, bfl_by_hand, check_meant, differences, save
from test_trainer import MOCK, ROOT, configure, losses, run, train
from torch.distributed.device_mesh import init_device_mesh

import fluxlite
from fluxlite import parallel
from fluxlite.data import rings
from fluxlite.nets.latents import position_ids
from fluxlite.nets.lora import LowRankAdapter
from fluxlite.parallel import compilation, plan
from fluxlite.preflight.prediction import predict_step
from fluxlite.train import loop, setup, training_step
from fluxlite.train.tasks import lora as lora_task
from fluxlite.weights import lora_merging, run_folder, sources
from fluxlite.weights.lora_files import Lora, LoraFile, read_lora

LORA = [*MOCK, "lora=default", "lora.rank=4", "dtype=float32"]
SHAPE = [  # of `diffusers_flux` and `lora_writers`
    *("model.num_double_blocks=2", "model.hidden_size=48", "model.num_heads=3"),
    *("model.rope_axes=[4,6,6]", "model.in_channels=12", "model.out_channels=12"),
    *("model.text_width=20", "model.pooled_width=14", "model.max_sequence_length=5"),
]
FROM_FILE = [argument for argument in [*LORA, *SHAPE] if argument != "lora.rank=4"]


@contextmanager
def ready_run(*arguments):
    """A `Run` of the settings, its adapters' parameters random, and one after the other batches."""
    config = configure(*arguments)
    try:
        made = setup.set_up(config, *parallel.start_ranks(config.parallel, config.device))
        samples = setup.encoded_split(config, made, "train", setup.find_split(config, "train", {}))
        loader = made.loader(samples, global_batch=config.data.global_batch, start_index=0)
        yield made, ([next(loader) for _ in range(made.micro_batches)] for _ in itertools.count())
    finally:
        parallel.stop_ranks()


def save_base(folder, singles=3, **options):
    """A small diffusers transformer, also in a folder."""
    theirs = diffusers_flux(singles=singles, **options)
    theirs.save_pretrained(folder)
    return theirs


def spans_of(folder):
    """(begin, end) of what this process has mapped of a folder's files."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[0].split("-") for line in lines if f" {folder}/" in line]
    return [(int(begin, 16), int(end, 16)) for begin, end in found]


def test_the_frozen_base_stays_in_its_mapped_files(tmp_path):
    save_base(tmp_path / "base")
    base = ["model.num_single_blocks=3", f"model.checkpoint={tmp_path}/base", "dtype=float32"]
    with ready_run(*FROM_FILE, *base) as (made, batches):
        spans = spans_of(tmp_path / "base")
        frozen = {n: p for n, p in made.models[-1].named_parameters() if not p.requires_grad}
        outside = [n for n, p in frozen.items() if not any(a <= p.data_ptr() < b for a, b in spans)]
        assert len(frozen) > 40 and not outside
        before = {name: p.clone() for name, p in frozen.items()}
        training_step.train_step(made, next(batches), 0)
        assert all(torch.equal(p, before[name]) for name, p in frozen.items())


# --- beside peft ----------------------------------------------------------------------------------


def inject_peft(model, **config):
    """Give every linear of a diffusers transformer's blocks but the norms' an adapter of peft's;
    the trainable parameters.
    """
    named = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = [n for n in named if "transformer_blocks" in n and "norm" not in n]
    assert len(targets) == 2 * 12 + 3 * 5
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **config)
    peft.inject_adapter_in_model(config, model)
    return [p for name, p in model.named_parameters() if "lora" in name]


def save_peft(model, file):
    """Save peft's adapters as diffusers does."""
    state = peft.get_peft_model_state_dict(model)
    about = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6})
    tensors = {f"transformer.{n}": t.detach().contiguous() for n, t in state.items()}
    save_file(tensors, file, {"lora_adapter_metadata": about})
    return file


def their_loss(theirs, given):
    """The loss of diffusers' model on what `flow_loss` was given."""
    t, noise, x0 = given["t"], given["noise"], given["x0"]
    height, width = 2, 2  # of packed latents
    ids = position_ids(2 * height, 2 * width, 5).float()
    velocity = theirs(
        hidden_states=(1 - t)[:, None, None] * x0 + t[:, None, None] * noise,
        encoder_hidden_states=given["txt"],
        pooled_projections=given["pooled"],
        timestep=t,
        guidance=given["guidance"],
        txt_ids=ids[:5],
        img_ids=ids[5:],
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - x0)


@pytest.mark.parametrize("dora", [False, True])
def test_ten_steps_are_those_of_peft_on_diffusers_transformer(dora, tmp_path):
    theirs, given = save_base(tmp_path / "base"), []
    trained = inject_peft(theirs, use_dora=dora)
    file = save_peft(theirs, tmp_path / "start.safetensors")
    options = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer, real = torch.optim.AdamW(trained, **options), training_step.flow_loss

    def recorded(made, x0, txt, pooled, **drawn):
        given.append(dict(x0=x0, txt=txt, pooled=pooled, **drawn))
        return real(made, x0, txt, pooled, **drawn)

    arguments = [*FROM_FILE, "model.num_single_blocks=3", f"model.checkpoint={tmp_path}/base"]
    arguments += [f"lora.checkpoint={file}", "optim.lr=3e-3", "optim.warmup=0", "optim.clip=0.1"]
    with (
        ready_run(*arguments, "optim.weight_decay=0", "data.global_batch=2") as (made, batches),
        mock.patch.object(training_step, "flow_loss", recorded),
    ):
        for step, batch in zip(range(10), batches):
            ours, norm = training_step.train_step(made, batch, step)
            expected = their_loss(theirs, given[-1])
            expected.backward()
            their_norm = torch.nn.utils.clip_grad_norm_(trained, 0.1).item()
            assert norm.item() == pytest.approx(their_norm, rel=1e-4)
            optimizer.step()
            optimizer.zero_grad()
            assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        made.ema = None  # what is compared is not averaged
        lora_task.write_files(made, tmp_path)
    files = file, tmp_path / "lora.safetensors", save_peft(theirs, tmp_path / "end.safetensors")
    start, ours, expected = (changes(tmp_path / "base", one) for one in files)
    assert total_norm(expected) > total_norm(start) + 0.1
    assert total_norm(ours) == pytest.approx(total_norm(expected), rel=1e-5)


def changes(base, *files):
    """{our name: what LoRAs change of a base's weight}."""
    source = sources.open_source(base)
    opened = lora_merging.open_loras([Lora(file) for file in files], source)
    merged = sources.load_state(lora_merging.merged_source(source, opened))
    return {name: merged[name] - tensor for name, tensor in sources.load_state(source).items()}


def total_norm(tensors):
    return torch.stack([t.double().norm() for t in tensors.values()]).norm().item()


# --- every adapter takes part ---------------------------------------------------------------------


def count_products(made, batches, grad):
    """[how often each adapter ran] in a step or, without gradient, in a forward."""
    counted, real = Counter(), LowRankAdapter.product

    def product(adapter, x, down, up):
        types = x.dtype, down.dtype, up.dtype
        assert types == (made.dtype, torch.float32, torch.float32)
        counted[adapter] += 1
        return real(adapter, x, down, up)

    with mock.patch.object(LowRankAdapter, "product", product), torch.set_grad_enabled(grad):
        if grad:
            training_step.train_step(made, next(batches), 0)
        else:
            [batch] = next(batches)
            x0, txt, pooled, inputs = training_step.encode_batch(made, batch)
            drawn = {name: batch[name] for name in ("noise", "t", "guidance")}
            training_step.flow_loss(made, x0, txt, pooled, **drawn, **inputs)
    return [counted[adapter] for adapter in made.model.each.values()]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_fast_path_passes_a_trained_adapter_by_and_all_are_float32_inside(dtype, grad, quantize):
    """Fused queries, keys and values, the GELU fused on a CPU, the modulation's joint products."""
    given = [*LORA, f"dtype={dtype}", "lora.targets=['*']", "data.global_batch=2"]
    given.append(f"model.quantize={quantize}")
    with ready_run(*given) as (made, batches):
        ran = count_products(made, batches, grad)
        linears = [len(adapter.names) for adapter in made.model.each.values()]
    assert ran == linears and sum(ran) == 12 + 6 + 3 + 10  # blocks, modulation, the two ends


def test_fsdp_gathers_no_adapter_and_leaves_its_type():
    """On one rank, where the run itself would do without FSDP2."""

    def shard(model, dtype, spread):
        mesh = init_device_mesh("cpu", (1,))
        plan.shard_weights(model, mesh, parallel.ParallelConfig(), dtype, spread)

    given = [*LORA, "dtype=bfloat16", "lora.dora=true", "data.global_batch=2"]
    with mock.patch.object(plan, "compute_in", shard):
        with ready_run(*given) as (made, batches):
            assert isinstance(made.flux, plan.FSDPModule)
            ran = count_products(made, batches, True)
            held = {p.dtype for p in made.model.parameters()}
            assert {p.dtype for p in made.flux.parameters()} == {torch.bfloat16}
    assert min(ran) == 1 and held == {torch.float32}


def test_blocks_of_a_kind_with_adapters_share_a_graph():
    graphs = Counter()

    def lower(kind, graph, inputs):
        graphs[kind.__name__] += 1
        return graph.forward

    torch.compiler.reset()
    given = [*LORA, "model.num_double_blocks=2", "model.num_single_blocks=3", "lora.dropout=0.5"]
    with mock.patch.object(compilation, "lower_graph", lower):
        with ready_run(*given, "compile=true") as (made, batches):
            compiled = training_step.train_step(made, next(batches), 0)
    with ready_run(*given) as (made, batches):
        eager = training_step.train_step(made, next(batches), 0)
    torch.compiler.reset()
    # nothing that is trained comes before the first block, whose input has no gradient
    assert graphs == {"DoubleBlock": 2, "SingleBlock": 1}
    assert torch.allclose(torch.stack(compiled), torch.stack(eager), rtol=1e-5)


def test_dropout_leaves_ranks_of_a_sample_out_and_validation_is_without():
    given = [*LORA, "lora.dropout=0.5", "data.global_batch=2"]
    with ready_run(*given) as (made, batches):
        [batch] = next(batches)
        masks, each = batch["kept_ranks"], made.model.each.values()
        assert masks.shape == (2, len(each), 4) and set(masks.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(masks[0], masks[1]) and 0.3 < (masks > 0).float().mean() < 0.7
        randomise(made.model)
        adapter = next(iter(each))
        x = torch.randn(2, 3, adapter.down.shape[1])
        made.model.keep_ranks(masks)
        dropped = adapter.product(x, adapter.down, adapter.up)
        for sample in range(2):
            kept = masks[sample, 0] > 0
            expected = 2 * x[sample] @ adapter.down[kept].T @ adapter.up[:, kept].T
            assert torch.allclose(dropped[sample], expected, atol=1e-5)
        count_products(made, iter([[batch]]), False)
        assert all(adapter.keep is None for adapter in each)


# --- what is trained, saved and drawn -------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, of adapters of rank 4 and one of rank 6 with alpha 2."""
    folder = tmp_path_factory.mktemp("finished")
    given = [*LORA, "lora.alpha=2", "lora.targets=['*.attn.*','*.proj_out:6','proj_out']"]
    return train(*given, "lora.write=[kohya,comfy]", "steps=3", f"output={folder}/run")


def test_a_run_saves_adapters_alone_and_the_lora_in_each_dialect(finished):
    folder = finished
    meta, tensors = run_folder.open_checkpoint(folder / "checkpoints" / "last")
    model = {name for name in tensors.tensors if name.startswith("model.")}
    assert meta.what == "lora" and len(model) == 2 * 8 + 2 * 3 + 3 + 2
    assert "model.single_transformer_blocks.0.proj_out.down_mlp" in model
    assert {f"ema.{name}" for name in meta.ema} == {f"ema.{name[6:]}" for name in model}
    found = {}
    for name in ("lora", "lora-kohya", "lora-comfy"):
        assert f"{name}.safetensors" in meta.files
        file = folder / "checkpoints" / "last" / f"{name}.safetensors"
        adapters = read_lora(file).adapters["transformer"]
        found[name] = sum(float((a.scale * a.form.dense()).square().sum()) for a in adapters)
    assert found["lora"] > 0
    assert all(norm == pytest.approx(found["lora"], rel=1e-5) for norm in found.values())
    values = load_file(folder / "checkpoints" / "last" / "lora.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    assert shapes["transformer.single_transformer_blocks.0.proj_out.lora_A.weight"] == (6, 5 * 64)
    assert shapes["transformer.proj_out.lora_A.weight"] == (4, 64)
    average = tensors.read("ema.transformer_blocks.0.attn.to_q.up")
    written = values["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"]
    assert torch.equal(written, average * 0.5)  # alpha 2 over rank 4


def test_a_damaged_lora_of_a_run_is_told(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    file = folder / "checkpoints" / "last" / "lora.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="lora.safetensors is damaged"):
        read_lora(folder)


def test_a_new_lora_changes_nothing_and_its_first_steps_change_b_alone():
    for own in (["lora.dora=false"], ["lora.dora=true"], ["lora.dora=true", "model.quantize=int8"]):
        with ready_run(*LORA, *own, "data.global_batch=2") as (made, batches):
            args = training_step.encode_batch(made, next(batches)[0])
            x0, txt, pooled, _ = args
            given = dict(t=torch.tensor([0.3, 0.9]), pooled=pooled, guidance=torch.ones(2))
            with torch.no_grad():
                adapted = made.velocity(x0, txt, made.rope, **given)
                for adapter in made.model.each.values():
                    for linear in adapter.linears:
                        linear.__class__ = type(linear).__bases__[0]
                plain = made.flux(x0, txt, made.rope, **given)
        assert relative_error(adapted, plain) < (1e-6 if "lora.dora=true" in own else 1e-12)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    given = [*LORA, "lora.dora=true", "lora.dropout=0.2", "checkpoint.every=2"]
    whole = train(*given, "steps=4", f"output={tmp_path}/whole")
    train(*given, "steps=2", f"output={tmp_path}/run")
    parts = train(*given, "steps=4", f"output={tmp_path}/run", "resume=auto")
    assert losses(whole).items() <= losses(parts).items()
    names = ("checkpoints/last/lora.safetensors",) * 2
    a, b = (load_file(folder / name) for folder, name in zip((whole, parts), names))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_run_goes_on_from_four_ranks_by_two_to_one(tmp_path):
    common = [*LORA, "lora.dora=true", "data.micro_batch=1", "checkpoint.every=3"]
    whole = losses(train(*common, "steps=9", f"output={tmp_path}/whole"))
    first = run(*common, "steps=3", f"output={tmp_path}/run", ranks=4)
    second = run(
        *common, "steps=6", f"output={tmp_path}/run", "resume=auto", "parallel.tp=2", ranks=2
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    parts = losses(train(*common, "steps=9", f"output={tmp_path}/run", "resume=auto"))
    assert all(parts[k] == pytest.approx(v, rel=2e-4) for k, v in whole.items())


def test_a_run_is_drawn_with_as_a_lora_and_as_a_checkpoint(tmp_path):
    for figure in ("ring", "circle"):
        rings.write_figures(rings.RingsConfig(str(tmp_path / figure), figure, count=16))
    places = f"data.path={tmp_path}/ring::{tmp_path}/circle"
    given = ["recipe=lora_tiny", places, "data.cache=null", "data.val_count=2", "lora.rank=4"]
    given += ["optim.lr=2e-2", "optim.warmup=0", "sample.count=1", "sample.steps=1"]
    given += ["data.micro_batch=4", "data.global_batch=4"]
    folder = train(*given, "steps=2", "dtype=float32", f"output={tmp_path}/run")
    assert (folder / "images").is_dir()
    small = dict(height=64, width=64, steps=2, seed=1, device="cpu", dtype="float32")

    def draw(**options):
        [picture] = fluxlite.generate("red circle with blue background", **small | options)
        return np.asarray(picture).astype(int), picture.info["sampling"]

    plain, _ = draw(true_cfg=1.5)
    drawn, about = draw(lora=folder, true_cfg=1.5)
    as_model, same = draw(checkpoint=folder)  # drawn as its own grids are, and so at 1.5
    assert np.abs(drawn - plain).max() > 8 and np.array_equal(drawn, as_model)
    assert about["loras"] == same["loras"] and str(folder) in about["loras"][0]["file"]
    convert = runpy.run_path(str(ROOT / "convert_hf.py"))["body"]
    convert(["--src", str(folder), "--dst", str(tmp_path / "k.safetensors"), "--to", "kohya"])
    assert read_lora(tmp_path / "k.safetensors").dialects == ("kohya",)
    with pytest.raises(ValueError, match="model.ema=false"):
        draw(checkpoint=folder, ema=False)


def test_preflight_counts_a_frozen_base_and_whole_adapters():
    given = [*LORA, "lora.rank=16", "model.num_single_blocks=2", "data.micro_batch=1"]
    found = predict_step(last_of_each([*given, "optim.ema_decay=0", "lora.dropout=0.1"]), 4)
    double = 2 * (4 * 2 + 2 * 5)  # rank-16 factors of the hidden width
    single = 3 * 2 + 5 + (5 + 1)
    expected = 4 * 16 * 64 * (double + 2 * single)
    assert found["memory"]["weights"] == found["memory"]["gradients"] == expected
    assert found["memory"]["optimizer"] == pytest.approx(2 * expected, rel=1e-2)
    assert found["sent"]["all_reduce", "fsdp"] == pytest.approx(2 * expected * 3 / 4, rel=1e-2)
    assert not any("reduce_scatter" in key for key in found["sent"])


def test_a_step_costs_two_forwards_of_the_frozen_base():
    with ready_run(*LORA, "data.global_batch=2") as (made, _batches):
        tokens = made.config.model.max_sequence_length, 4
        base, adapters = (m.forward_flops(*tokens) for m in (made.flux, made.model))
        assert loop.step_flops(made) == 3 * adapters + 2 * base and 0 < adapters < base


def test_a_pruned_schnell_is_trained_on(tmp_path):
    save_base(tmp_path / "base", singles=1, guidance=False)
    given = [*LORA, *SHAPE, "model.num_single_blocks=1", f"model.checkpoint={tmp_path}/base"]
    given += ["model.guidance_embed=false", "optim.lr=1e-2", "optim.warmup=0"]
    folder = train(*given, "steps=2", f"output={tmp_path}/run")
    found = read_lora(folder)
    assert len(found.all_adapters()) == 2 * 12 + 5
    assert total_norm(changes(tmp_path / "base", folder)) > 0.1


def test_the_recipes_figures_are_the_customary_ones():
    parts = [f"model.{part}=flux-tiny" for part in ("t5", "clip", "autoencoder")]
    config = configure("recipe=lora", "data.path=photos", *parts)
    assert (config.lora.rank, config.lora.alpha, config.optim.lr) == (16, 16.0, 1e-4)
    assert (config.data.caption_dropout, config.data.global_batch) == (0.05, 1)
    assert (config.flow.guidance, config.flow.density) == ("1.0", "logit_normal")
    assert config.flow.shift == "resolution" and config.data.kind == "folder"
    adapted = lora_task.meta_adapters(config).each
    assert len(adapted) == 19 * 12 + 38 * 5 and "proj_out" not in adapted
    assert configure("recipe=lora_tiny").lora.train


# --- going on -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    theirs = save_base(folder, singles=write.SINGLES)
    state = theirs.state_dict()
    states = {"diffusers": state, "bfl": bfl_by_hand(state, write.DOUBLES, write.SINGLES)}
    return sources.open_source(folder), states, configure(*FROM_FILE, "model.num_single_blocks=1")


REFUSED = {  # kinds of file that are read and not gone on from
    "BFL's": "is a difference",
    "whole differences": "is a difference",
    "LoHa": "is a LoHa",
    "LoKr": "is a LoKr",
    "per input": "is a DoRA, LoRA per input",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_dialect_is_gone_on_from_as_it_is(name, base, tmp_path):
    source, states, config = base
    written = FILES[name](states)
    own = replace(config.lora, checkpoint=str(save(written, tmp_path)))
    config = replace(config, lora=own)
    said = next((said for kind, said in REFUSED.items() if kind in name), None)
    if said:
        with pytest.raises(ValueError, match=said):
            lora_task.check_lora(config)
        return
    net = lora_task.wrap_adapters(config, None)
    parallel.fill_weights(net, lora_task.adapter_weights(config, "cpu"), "cpu")
    adapters = lora_task.file_adapters(net, dict(net.named_parameters()))
    found = LoraFile("a run's", source.config, {"transformer": adapters})
    with torch.no_grad():
        check_meant(differences(found, source), written.meant)


# --- misuse ---------------------------------------------------------------------------------------

TINY = ["model=flux_tiny", "model.checkpoint=flux-tiny", "data=mock", "data.height=64"]
TINY += ["data.width=64", "data.global_batch=2", "lora=default"]
MODEL = ROOT / "assets/flux-tiny/transformer/diffusion_pytorch_model.safetensors"


def bad_file(folder, name):
    """A file for flux-tiny, all whose linears are 256 wide, with something wrong."""
    key, wide = write.dotted("transformer."), 300 if name == "wide" else 256
    linears = {"transformer_blocks.0.attn.to_q": (256, wide)}
    tensors = dict(write.low_rank_file(linears, key, write.AB).tensors)
    if name == "nan":
        tensors |= {n: t.fill_(float("nan")) for n, t in tensors.items()}
    if name == "text":
        of_clip = {"text_model.encoder.layers.0.mlp.fc1": (64, 64)}
        tensors |= write.low_rank_file(of_clip, write.dotted("text_encoder."), write.AB).tensors
    if name == "part":
        two = write.low_rank_file({"proj_out": (64, 256)}, key, write.AB).tensors
        tensors |= two | {"transformer.proj_out.dora_scale": torch.ones(64, 1)}
    save_file({} if name == "none" else tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


MISUSES = {
    "rank 0": (["lora.rank=0"], "lora.rank=0 must be at least 1"),
    "alpha 0": (["lora.alpha=0"], "lora.alpha=0.0 must be above 0"),
    "a bare name, as peft takes it": (["lora.targets=['to_q']"], r"no linear .* \*.to_q does"),
    "our names": (["lora.targets=['double_blocks.*']"], "matches no linear"),
    "a norm": (["lora.targets=['*.norm_q']"], "matches no linear"),
    "rank 0 of a target": (["lora.targets=['*.to_q:0']"], "must be a number from 1"),
    "no rank of a target": (["lora.targets=['*.to_q:']"], "must be a number from 1"),
    "no target": (["lora.targets=[]"], "leaves nothing to train"),
    "CLIP": (["lora.targets=['text_encoder.*']"], "text encoders are not trained"),
    "T5, as kohya calls it": (["lora.targets=['lora_te3_*']"], "text encoders are not trained"),
    "a dialect of nobody": (["lora.write=[xlabs]"], "choose one of kohya, comfy"),
    "what a dialect cannot hold": (
        ["lora.write=[kohya]", "lora.dora=true", "lora.targets=['*.to_q']"],
        "lora.write=kohya cannot hold .*is a DoRA whose norms",
    ),
    "a dialect twice": (["lora.write=[kohya,kohya]"], "names a dialect twice"),
    "a parameter of nobody": (["optim.trainable=[nope]"], "optim.trainable.*nope"),
    "a ControlNet too": (["controlnet=default", "data.control=png"], "train one at a time"),
    "Muon": (["optim.kind=muon"], "set optim.kind=adamw"),
    "nothing to train": (["optim.freeze=['*']"], "leave nothing to train"),
    "without lora=default": (["lora=none", "lora.rank=4"], "set lora=default too"),
    "a file as the group": (["lora=style.safetensors"], "no such lora"),
    "its key": (["lora.train=true"], "lora= sets it"),
    "a model as the LoRA": ([f"lora.checkpoint={MODEL}"], "is a transformer, not a LoRA"),
    "a LoRA as the model": (["model.checkpoint=good"], "a LoRA or its like, not a model"),
    "no such file": (["lora.checkpoint=./nowhere"], "lora.checkpoint=./nowhere does not exist"),
    "of another width": (["lora.checkpoint=wide"], "of another model"),
    "NaN": (["lora.checkpoint=nan"], "NaN or infinite"),
    "no tensors": (["lora.checkpoint=none"], "holds no tensors"),
    "with text encoders": (["lora.checkpoint=text"], "also changes clip"),
    "DoRA in part": (["lora.checkpoint=part"], "cannot be gone on from: .*to_q.* is no DoRA and"),
    "a rank beside a file": (["lora.checkpoint=good", "lora.rank=4"], "lora.rank= is not read"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuses_are_one_line(name, tmp_path):
    arguments, said = MISUSES[name]
    for file in ("good", "wide", "nan", "none", "text", "part"):
        if any(a.endswith(f"checkpoint={file}") for a in arguments):
            arguments = [a.replace(f"={file}", f"={bad_file(tmp_path, file)}") for a in arguments]
    with pytest.raises(ValueError, match=said) as refused:
        train(*TINY, *arguments, "steps=1", f"output={tmp_path}/run")
    assert "\n" not in str(refused.value)


def test_a_loras_run_is_no_model_to_train(finished, tmp_path):
    with pytest.raises(ValueError, match="it is the run of a LoRA: name that as lora="):
        train(*MOCK, f"model.checkpoint={finished}", f"output={tmp_path}/other")
