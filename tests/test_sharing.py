"""Drawing by several processes: what they draw is what one draws, each picture once.

The reference is one process. Ranks are forked (`on_ranks`); torchrun's own are in the slow part.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_lora_drawing as write
import torch
from on_ranks import on_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from test_processes import alive, descendants, wait_until

import fluxlite
from fluxlite import parallel
from fluxlite.draw import generation, sharing
from fluxlite.draw.pipeline import open_pipeline
from fluxlite.draw.plan import plan_drawing
from fluxlite.nets import flux
from fluxlite.nets.configs import FluxConfig
from fluxlite.settings import load_settings

ROOT = Path(__file__).parents[1]
infer = runpy.run_path(str(ROOT / "infer.py"))
FAST = ["device=cpu", "dtype=float32", "steps=2", "height=32", "width=32", "compile=false"]
PROMPTS = ["prompt=red circle with blue background", "prompt=gold circle", "prompt=a"]
JOBS = [{"prompt": "a", "seed": n, "guidance": 1.0 + n // 2, "batch": 4} for n in range(6)]


def drawn(folder):
    """{(seed, prompt's number, picture's number): pixels} and the contact sheet's, under None."""
    found = {}
    for path in Path(folder).glob("*.png"):
        picture = Image.open(path)
        about = json.loads(picture.text["fluxlite"]) if "fluxlite" in picture.text else None
        key = about and (about["seed"], about["prompt_number"], about["picture_number"])
        assert key not in found
        found[key] = np.asarray(picture, np.int64)
    return found


def draw_ways(folder, ways):
    """Draw on this rank, in a folder for each of some ways, {name: arguments}; returns how often
    attention saw so many tokens of so many heads: {name: {(L, N): count}}.
    """
    seen, real = {name: Counter() for name in ways}, flux.attend
    for name, arguments in ways.items():

        def attend(q, *others, name=name, **options):
            seen[name][tuple(q.shape[1:3])] += 1
            return real(q, *others, **options)

        given = {argument.partition("=")[0] for argument in arguments}
        fast = [argument for argument in FAST if argument.partition("=")[0] not in given]
        config = load_settings("infer", [*fast, *arguments, f"output={folder}/{name}"])
        joined = sharing.join_sharing(config.parallel, config.device)
        draw = infer["draw_jobs" if config.jobs else "draw_prompts"]
        with mock.patch.object(flux, "attend", attend):
            draw(config, joined, lambda stage: nullcontext())
    return seen


def draw_on(ranks, folder, **ways):
    """({name: what is drawn}, {name: what each rank's attention saw}) of some ways."""
    seen = on_ranks(ranks, partial(draw_ways, folder, ways), folder, seconds=300)
    saw = {name: [of_rank[name] for of_rank in seen] for name in ways}
    return {name: drawn(folder / name) for name in ways}, saw


def farthest(ours, theirs):
    """The largest difference of two drawings, in levels."""
    assert ours.keys() == theirs.keys()
    return max(np.abs(ours[key] - theirs[key]).max() for key in ours)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """({way: what is drawn}, {way: what each rank's attention saw}): three batches and a file of
    jobs by one process, the same by two ranks in each way. Two jobs are drawn already.
    """
    fluxlite.load_pipeline(device="cpu")  # imports what ranks would each import
    folder = tmp_path_factory.mktemp("ranks")
    Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).save(folder / "photo.png")
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, JOBS)))
    guided = ["true_cfg=2", "negative_prompt=a fox", f"control_image={folder}/photo.png"]
    common = [*PROMPTS, *guided, "images_per_prompt=2", "batch=2"]
    jobs = [f"jobs={folder}/jobs.jsonl"]
    one, saw_one = draw_on(1, folder, one=common, jobs=jobs)
    ready = sorted((folder / "jobs").glob("*.png"))[:2]
    (folder / "left").mkdir()
    for path in ready:
        shutil.copy2(path, folder / "left")
    ways = {way: [*common, f"parallel.{way}=2"] for way in ("tp", "cp", "cfg")}
    two, saw_two = draw_on(2, folder, spread=common, left=jobs, **ways)
    for path in ready:
        assert (folder / "left" / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns
    return one | two, saw_one | saw_two


STEPS, PASS, NET = 3 * 2, 6, 1  # of three batches; blocks of the transformer, of the ControlNet


def test_batches_are_spread_bit_for_bit(found):
    pictures, saw = found
    assert len(pictures["one"]) == 7 and None in pictures["one"]
    assert farthest(pictures["spread"], pictures["one"]) == 0
    each = 2 * (2 * PASS + NET)
    assert saw["one"] == [{(20, 4): 3 * each}]
    assert saw["spread"] == [{(20, 4): 2 * each}, {(20, 4): each}]


def test_the_passes_of_true_cfg_are_shared_bit_for_bit(found):
    pictures, saw = found
    assert farthest(pictures["cfg"], pictures["one"]) == 0
    assert saw["cfg"] == [{(20, 4): STEPS * (PASS + NET)}] * 2


@pytest.mark.parametrize("way", ["tp", "cp"])
def test_heads_and_tokens_of_a_picture_are_shared(found, way):
    pictures, saw = found
    assert farthest(pictures[way], pictures["one"]) <= 1
    shared, whole = 2 * PASS, NET  # tp splits the ControlNet too
    counts = {"tp": {(20, 2): shared + whole}, "cp": {(20, 2): shared, (20, 4): whole}}[way]
    assert saw[way] == [{seen: STEPS * n for seen, n in counts.items()}] * 2


def test_jobs_that_are_left_are_dealt_to_the_ranks(found):
    pictures, saw = found
    assert len(pictures["jobs"]) == 6 and farthest(pictures["left"], pictures["jobs"]) == 0
    assert saw["jobs"] == [{(20, 4): 6 * 2 * PASS}] and saw["left"] == [{(20, 4): 2 * 2 * PASS}] * 2


# --- what cannot be shared ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, arguments, said",
    [
        (
            1,
            ["parallel.tp=2"],
            "parallel.tp=2 needs 2 processes or a multiple, and there are 1:",
        ),
        (4, ["parallel.tp=3"], "parallel.tp=3 needs 3 processes or a multiple, and there are 4"),
        (2, ["parallel.cp=2", "parallel.cfg=2"], "parallel.cp=2 x parallel.cfg=2 needs 4"),
        (2, ["parallel.cfg=3"], "parallel.cfg=3 must be at least 1 and at most 2"),
        (2, ["parallel.dp_shard=2"], "parallel.dp_shard"),
        (
            3,
            ["parallel.tp=3"],
            "parallel.tp=3 x parallel.cp=1 does not divide the 4 heads",
        ),
        (
            8,
            ["parallel.tp=4", "parallel.cp=2"],
            "parallel.tp=4 x parallel.cp=2 does not divide the",
        ),
        (2, ["parallel.tp=2", "offload=all"], "parallel.tp=2 splits blocks, which offload=all"),
        (2, ["parallel.tp=2", "lora=x.safetensors", "lora.merge=false"], "lora.merge=false keeps"),
        (2, ["parallel.cfg=2"], "two passes of true_cfg, which is 1.0: set it above 1"),
        (
            2,
            ["parallel.cp=2", "max_sequence_length=15"],
            "15 max_sequence_length do not",
        ),
        (2, ["parallel.cp=2", "height=48", "width=48"], "9 image tokens, of height= x width= and"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(
    ranks, arguments, said, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError) as error:
        config = load_settings("infer", ["prompt=a", *FAST[:2], "compile=false", *arguments])
        mesh = mesh_of(tp=config.parallel.tp, cp=config.parallel.cp, cfg=config.parallel.cfg)
        pipeline = open_pipeline(config, sharing.Sharing(mesh))
        plan_drawing(pipeline, config, config.prompt)
    assert said in str(error.value) and "\n" not in str(error.value)


def mesh_of(**sizes):
    return {way: mock.Mock(**{"size.return_value": size}) for way, size in sizes.items()}


def test_ranks_that_would_wait_are_told_what_to_set(caplog):
    mesh = mesh_of(groups=4)
    for count, batch in ((8, 8), (8, 2), (1, 8)):
        sharing.warn_idle(sharing.Sharing(mesh), count, batch)
    [record] = caplog.records
    assert record.getMessage().endswith("without work: set batch=2")


# --- what goes together ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        ["model.quantize=int8"],
        ["model.quantize=nf4", "dtype=bfloat16"],
        ["lora={folder}/lora.safetensors"],
        ["reference={folder}/photo.png"],
        ["image={folder}/photo.png", "strength=0.7", "solver=heun"],
        ["offload=none", "dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_four_ranks_share_whatever_is_drawn(case, tmp_path):
    fluxlite.load_pipeline(device="cpu")
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).save(tmp_path / "photo.png")
    write.save_lora(tmp_path / "lora.safetensors")
    common = [*PROMPTS, "true_cfg=2", *(one.format(folder=tmp_path) for one in case)]
    pairs = ("tp", "cp"), ("tp", "cfg"), ("cp", "cfg")
    ways = {" ".join(pair): [*common, *(f"parallel.{way}=2" for way in pair)] for pair in pairs}
    one, _ = draw_on(1, tmp_path, one=common)
    four, saw = draw_on(4, tmp_path, tp4=[*common, "parallel.tp=4"], spread=common, **ways)
    most = 8 if "dtype=bfloat16" in case else 1
    for way, pictures in four.items():
        assert farthest(pictures, one["one"]) <= most, way
    assert {heads for seen in saw["tp4"] for _, heads in seen} == {1}


@pytest.mark.slow
def test_two_ranks_share_what_compiled_blocks_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.compilation, "BACKEND", "aot_eager")
    fluxlite.load_pipeline(device="cpu")
    ways = {way: [PROMPTS[0], "compile=true", f"parallel.{way}=2"] for way in ("tp", "cp")}
    one, _ = draw_on(1, tmp_path, one=PROMPTS[:1])
    two, saw = draw_on(2, tmp_path, **ways)
    assert all(farthest(pictures, one["one"]) <= 1 for pictures in two.values())
    seen = Counter(seen for of in [*saw["tp"], *saw["cp"]] for seen in of)
    assert {heads for _, heads in seen} == {2} and max(seen.values()) < 2 * 6  # traced, not called


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A transformer of FLUX.1's width, one double and one single block, beside the shipped parts:
    arguments of `infer.py`, and its bytes.
    """
    script = runpy.run_path(str(ROOT / "scripts" / "make_random.py"))
    tiny, folder = dict(text_width=128, pooled_width=128), tmp_path_factory.mktemp("wide")
    config = FluxConfig(num_double_blocks=1, num_single_blocks=1, **tiny)
    assert (config.hidden_size, config.num_heads) == (3072, 24)
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    part = folder / "transformer", *script["diffusers_part"](config)
    script["write_part"](*part, pool, torch.Generator().manual_seed(1), mock.Mock())
    parts = [f"model.{part}=flux-tiny" for part in ("t5", "clip", "autoencoder")]
    [file] = part[0].glob("*.safetensors")
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    size = file.stat().st_size
    return [f"model.checkpoint={folder}", *parts, "max_sequence_length=16"], size


def private_memory():
    """Bytes that this process alone has; clean pages of a file are the machine's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines[1:])
    return 1024 * int(fields["Private_Dirty"].split()[0])


def growth_of(draw):
    """By how much a process's private memory grows at most while it draws."""
    before, most = private_memory(), []

    def watch(step, x):
        most.append(private_memory() - before)
        return x

    with mock.patch.object(generation, "watch_steps", lambda *given: watch):
        draw()
    return max(most, default=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["tp=4"], ["tp=2", "cp=2"], ["cp=2", "cfg=2"]], ids=" ".join)
def test_four_ranks_of_a_wide_model_map_its_weights_once(way, wide, tmp_path):
    """In float32, as the file: no rank's private memory grows by a tenth of it."""
    arguments, size = wide
    assert size > 2e9
    fluxlite.load_pipeline(device="cpu")
    options = [*PROMPTS, *PROMPTS[:1], *arguments, "true_cfg=2", "batch=1"]
    options += [f"parallel.{one}" for one in way]
    one, _ = draw_on(1, tmp_path, one=[*options[: -len(way) or None]])

    def body():
        return growth_of(partial(draw_ways, tmp_path, {"four": options}))

    grown = on_ranks(4, body, tmp_path, seconds=300)
    print(f"{way}: {[f'{each / 1e6:.0f} MB' for each in grown]} of {size / 1e6:.0f} MB")
    assert len(one["one"]) == 5 and all(0 < each < size / 10 for each in grown)
    assert farthest(drawn(tmp_path / "four"), one["one"]) <= (0 if not way else 1)


def refusal_of(folder, arguments):
    with pytest.raises(ValueError) as error:
        draw_ways(folder, {"out": arguments})
    return str(error.value)


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_named_by_each_rank(tmp_path):
    """Of a row that the second alone has."""
    shutil.copytree(write.TINY, tmp_path / "tiny")
    [file] = (tmp_path / "tiny" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn.to_q.weight"][200, 3] = torch.nan
    save_file(tensors, file)
    options = [PROMPTS[0], f"model.checkpoint={tmp_path}/tiny", "parallel.tp=2"]
    for said in on_ranks(2, partial(refusal_of, tmp_path, options), tmp_path):
        assert "after step 1 of 2, and double_blocks.1.img.qkv.q.weight holds some" in said, said


def wait_for_first():
    joined = sharing.join_sharing(parallel.SharingConfig(timeout_s=1), "cpu")
    return joined.first_does(lambda: time.sleep(2) or "encoded")


@pytest.mark.slow
def test_ranks_wait_for_the_first_as_long_as_it_takes(tmp_path):
    assert on_ranks(2, wait_for_first, tmp_path) == ["encoded"] * 2


# --- torchrun -------------------------------------------------------------------------------------


def torchrun(*arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "infer.py"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, *FAST, *arguments], cwd=ROOT, env=environment, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["parallel.tp=3"], "parallel.tp=3 needs 3 processes or a multiple, and there are 2"),
        (["parallel.tp=2", "offload=all"], "offload=all streams whole"),
        (["parallel.cfg=2"], "two passes of true_cfg"),
        (["model.t5={folder}"], "{folder}"),  # which rank 0 alone opens
    ],
    ids=" ".join,
)
def test_a_misuse_is_one_line_of_one_rank(arguments, said, tmp_path):
    arguments = [one.format(folder=tmp_path) for one in arguments]
    process = torchrun("prompt=a", f"output={tmp_path}/out", *arguments)
    _, errors = process.communicate(timeout=120)
    ours = [line for line in errors.splitlines() if line.startswith(("error", "Traceback"))]
    assert ours[0].startswith("error on rank 0: ") and said.format(folder=tmp_path) in ours[0]
    assert sum(line.startswith("error") for line in ours) == 1
    assert process.returncode == 1 and "(exitcode: 2)" in errors.split("Traceback")[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_that_are_killed_leave_their_pictures_and_no_process(tmp_path):
    """A rank, torchrun itself, and by SIGTERM; run again: every picture is drawn once."""
    jobs = [{"prompt": "a", "seed": n, "guidance": 1.0 + n} for n in range(24)]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    there = {}
    ends = (9, "rank 1", 1), (9, "torchrun", 0), (15, "torchrun", 1), (0, "", 0)
    for number, target, told in ends:  # a rank that outlives another is sent SIGTERM by torchrun
        process = torchrun(f"jobs={tmp_path}/jobs.jsonl", f"output={tmp_path}/out")
        least = len(there) + 4
        while len(drawn(tmp_path / "out")) < least and process.poll() is None:
            time.sleep(0.05)
        tree = sorted(descendants(process.pid))
        if number:
            os.kill(tree[-1] if target == "rank 1" else process.pid, number)
        _, errors = process.communicate(timeout=120)
        wait_until(lambda tree=tree: not any(map(alive, tree)), "all ranks end")
        assert errors.count("\nstopped by SIGTERM") == told, errors
        now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
        assert there.items() <= now.items() and (len(now) < 24 if number else len(now) == 24)
        there = now
    assert process.returncode == 0
    assert sorted(seed for seed, *_ in drawn(tmp_path / "out")) == [*range(24)]
