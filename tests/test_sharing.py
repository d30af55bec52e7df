"""Drawing by several processes: what they draw is what one draws, each picture once.

The reference is one process. Ranks are forked (`on_ranks`); torchrun's own are in the slow part.
"""

import json
import runpy
import shutil
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from on_ranks import on_ranks
from PIL import Image

import fluxlite
from fluxlite.draw import sharing
from fluxlite.draw.pipeline import open_pipeline
from fluxlite.draw.plan import plan_drawing
from fluxlite.nets import flux
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

        config = load_settings("infer", [*FAST, *arguments, f"output={folder}/{name}"])
        joined = sharing.join_sharing(config.parallel, config.device)
        draw = infer["draw_jobs" if config.jobs else "draw_prompts"]
        with mock.patch.object(flux, "attend", attend):
            draw(config, joined, lambda stage: nullcontext())
    return seen


def draw_on(ranks, folder, **ways):
    """({name: what is drawn}, {name: what each rank's attention saw}) of some ways."""
    seen = on_ranks(ranks, partial(draw_ways, folder, ways), folder)
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
    assert record.getMessage().endswith("with batch=2 all would draw")
