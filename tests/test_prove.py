import dataclasses
import io
import json
import re
import runpy
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

import fluxlite
from fluxlite.cli.command_line import flag_of
from fluxlite.data import circles, rings
from fluxlite.data.fill50k import (
    COLOURS,
    disc_coverage,
    distance_from,
    draw_sample,
    is_held_out,
    rgb,
)
from fluxlite.draw import proof
from fluxlite.weights.hub import ASSETS

PROVE = Path(__file__).parents[1] / "prove.py"
NUM = 60


@pytest.fixture(scope="module")
def script():
    return vars(proof)


def draw_disc(size, *, centre, radius):
    return disc_coverage(distance_from(centre, size), radius)[..., 0]


def paint(coverage, circle, background):
    """A picture of `circle` where `coverage` (H, W) is 1 and of `background` where it is 0."""
    coverage = np.asarray(coverage, np.float64)[..., None]
    return Image.fromarray(
        np.rint(coverage * rgb(circle) + (1 - coverage) * rgb(background)).astype(np.uint8)
    )


def names(prompt):
    return prompt.removesuffix(" background").split(" circle with ")


def figure(picture, circle, background):
    return circles.figure_mask(np.asarray(picture), circle, background)


def as_jpeg(picture):
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=95)
    return Image.open(stream)


def perfect(prompts, controls=None):
    """What a perfect model draws: the generator's pictures, the same place for the same
    position.
    """
    return [
        Image.fromarray(draw_sample(i, size=64, seed=7, choices=[tuple(names(p))])[0])
        for i, p in enumerate(prompts)
    ]


def square(side, *, corner=(15, 20)):
    mask = np.zeros((64, 64), bool)
    mask[corner[1] : corner[1] + side, corner[0] : corner[0] + side] = True
    return mask


@pytest.mark.parametrize("through", [lambda picture: picture, as_jpeg], ids=["exact", "jpeg"])
def test_generated_pictures_are_right(script, through):
    chosen = script["choose_pairs"](200, 3)
    prompts = [script["circle_caption"](*pair) for pair in chosen]
    results = [
        circles.measure_circle(through(picture), *pair)
        for picture, pair in zip(perfect(prompts), chosen)
    ]
    assert np.mean([result["right"] for result in results]) > 0.98
    assert min(result["iou"] for result in results) > 0.9


def test_circle_is_found_where_it_was_drawn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        radius = rng.uniform(0.12, 0.28) * 64
        centre = rng.uniform(radius, 64 - radius, 2)
        mask = draw_disc(64, centre=centre, radius=radius) > 0.5
        mask[::63, ::63] = True  # specks in the corners
        found, found_radius, iou = circles.fit_circle(mask)
        assert np.hypot(*(found - centre)) < 0.5 and abs(found_radius - radius) < 0.5 and iou > 0.9


@pytest.mark.parametrize(
    ("circle", "background"), [("light yellow", "magenta"), ("snow", "cyan"), ("blue", "black")]
)
def test_a_soft_rim_leaves_the_figure_its_size(circle, background):
    """By ΔE these pairs' blends are nearer to one of the two: the figure would seem a pixel smaller
    or larger.
    """
    sharp = draw_disc(64, centre=(30, 33), radius=11)
    blurred = figure(paint(gaussian_filter(sharp, 2.0), circle, background), circle, background)
    assert (blurred & (sharp > 0.5)).sum() / (blurred | (sharp > 0.5)).sum() > 0.95


def test_no_figure_has_no_circle():
    assert circles.fit_circle(np.zeros((64, 64), bool)) is None
    result = circles.measure_circle(Image.new("RGB", (64, 64), "red"), "blue", "red")
    assert not result["colours"] and not result["shape"] and result["centre"] is None


@pytest.mark.parametrize("side", [20, 24, 30])
def test_square_is_no_circle(side):
    result = circles.measure_circle(paint(square(side), "red", "blue"), "red", "blue")
    assert result["colours"] and not result["shape"] and result["iou"] < circles.MIN_IOU


def test_two_discs_are_no_circle():
    discs = draw_disc(64, centre=(17, 17), radius=12) + draw_disc(64, centre=(48, 48), radius=10)
    result = circles.measure_circle(paint(discs, "red", "blue"), "red", "blue")
    assert result["colours"] and not result["shape"]


def test_disc_cut_by_the_border_is_no_circle():
    result = circles.measure_circle(
        paint(draw_disc(64, centre=(2, 32), radius=16), "red", "blue"), "red", "blue"
    )
    assert result["colours"] and not result["shape"]


@pytest.mark.parametrize("radius", [4, 26])
def test_disc_of_a_wrong_size_is_refused(radius):
    result = circles.measure_circle(
        paint(draw_disc(64, centre=(32, 32), radius=radius), "red", "blue"), "red", "blue"
    )
    assert result["iou"] > 0.9 and not result["shape"]


@pytest.mark.parametrize(
    ("circle", "background"),
    [("green", "blue"), ("red", "white"), ("blue", "red"), ("salmon", "blue")],
)
def test_wrong_colours_are_refused(circle, background):
    picture = paint(draw_disc(64, centre=(30, 30), radius=12), "red", "blue")
    assert circles.measure_circle(picture, "red", "blue")["right"]
    assert not circles.measure_circle(picture, circle, background)["colours"]


def test_perfect_pictures_prove_it_and_shuffled_prompts_do_not(script):
    report, pictures, results = script["prove"](perfect, num=NUM, num_swaps=20, seed=0)
    assert report["right"] > 0.98 and report["swap"] > 0.98
    assert report["shuffled_colours"] < 0.05 and report["shuffled_right"] < 0.05
    assert len(pictures) == len(results) == NUM


def test_model_that_confuses_circle_and_background_fails_the_swap(script):
    def unbound(prompts, _controls):  # knows the two colours, not which is which
        return perfect([script["circle_caption"](*sorted(names(prompt))) for prompt in prompts])

    report, _, _ = script["prove"](unbound, num=NUM, num_swaps=20, seed=0)
    assert report["swap"] == 0 and 0.2 < report["colours"] < 0.8


def test_position_is_right_where_the_control_has_the_circle_and_nowhere_else(script):
    def follows(prompts, controls):
        pictures = []
        for prompt, control in zip(prompts, controls):
            lit = np.asarray(control)[..., 0] > 100
            rows, columns = (np.flatnonzero(lit.any(axis=i)) for i in (1, 0))
            radius = (columns[-1] - columns[0] + 1) / 2
            centre = ((columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2)
            pictures.append(paint(draw_disc(64, centre=centre, radius=radius), *names(prompt)))
        return pictures

    report, _, _ = script["prove"](follows, num=40, num_swaps=0, seed=0, control_size=64)
    assert report["position"] > 0.95 and report["shuffled_position"] < 0.15
    report, _, _ = script["prove"](perfect, num=40, num_swaps=0, seed=0, control_size=64)
    assert report["shape"] > 0.95 and report["position"] < 0.15
    report, _, _ = script["prove"](perfect, num=4, num_swaps=0, seed=0, control_size=48)
    assert report["position"] < 0.5, "controls of another size than the pictures"


def test_pairs_depend_on_the_seed_alone_and_are_held_out(script):
    chosen = script["choose_pairs"](NUM, 5)
    assert chosen == script["choose_pairs"](NUM, 5) != script["choose_pairs"](NUM, 6)
    assert len(set(chosen)) == NUM and all(
        pair in script["colour_pairs"](held_out=True) for pair in chosen
    )
    assert all(circles.colour_difference(rgb(a), rgb(b)) > 25 for a, b in chosen)
    assert len(script["choose_pairs"](100_000, 5)) == script["NUM_PAIRS"], "the help says them"


@pytest.mark.parametrize(
    "flags,named",
    [
        (["--num", "797"], "--num=797 must be at least 2 and at most 796"),
        (["--num", "6", "--swaps", "9"], "--swaps=9 must be at most --num=6"),
        (["--checkpoint", "bare"], "bare has no --t5=, --clip=, --autoencoder= beside it"),
        (["--checkpoint", "nowhere"], "--checkpoint=nowhere does not exist"),
        (["--controlnet", "nowhere"], "--controlnet=nowhere does not exist"),
        (["--t5", "bare", "--checkpoint", "bare"], "bare has no --clip=, --autoencoder= beside"),
    ],
)
def test_what_cannot_be_proven_is_said_by_the_flags_of_the_program(
    flags, named, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ASSETS / "flux-tiny" / "transformer", "bare")
    with pytest.raises(ValueError, match=named) as error:
        runpy.run_path(str(PROVE))["body"](flags)
    known = {flag_of(f) for f in dataclasses.fields(proof.ProofConfig)}
    assert set(re.findall(r"--[\w-]+", str(error.value))) <= known
    assert not Path("outputs").exists()


def test_without_a_number_fifty_are_swapped_or_all_of_fewer(script):
    report, _, _ = script["prove"](perfect, num=10, seed=0)
    assert report["num_swaps"] == 10


def test_script_writes_its_report_and_ends_in_a_json_line(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setitem(
        vars(fluxlite),
        "generate",
        lambda prompts, on_step, **how: asked.append(how) or perfect(prompts),
    )
    drawn = ["--steps", "3", "--true-cfg", "2"]
    arguments = ["--num", "6", "--swaps", "2", *drawn, "--output", str(tmp_path / "proof")]
    runpy.run_path(str(PROVE))["body"](arguments)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = json.loads((tmp_path / "proof" / "proof.json").read_text())
    assert (
        line["right"] == saved["right"] == 1
        and line["num_swaps"] == 2
        and len(saved["pictures"]) == 6
    )
    assert Image.open(tmp_path / "proof" / "grid.png").width == 8 + 6 * (128 + 8)
    assert asked == [{"controls": [], "seed": 0, "steps": 3, "true_cfg": 2.0, "batch": 50}] * 2
    with pytest.raises(ValueError, match="proof.json exists: pass --overwrite, or another --out"):
        runpy.run_path(str(PROVE))["body"](arguments)
    assert len(asked) == 2, "nothing is drawn for a proof that cannot be kept"
    runpy.run_path(str(PROVE))["body"]([*arguments, "--overwrite", "--seed", "1"])
    assert json.loads((tmp_path / "proof" / "proof.json").read_text())["seed"] == 1


# --- rings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [0, 1.5])
def test_every_ring_of_the_generator_is_a_ring_and_no_circle_is(smooth):
    for number, pair in enumerate(proof.choose_pairs(20, 1)):
        found = []
        for draw in (rings.draw_ring, rings.draw_circle):
            array, _ = draw(number, pair, size=64, seed=3)
            blurred = gaussian_filter(array.astype(float), (smooth, smooth, 0))
            found.append(circles.measure_ring(Image.fromarray(np.uint8(blurred)), *pair))
        assert [result["ring"] for result in found] == [True, False], pair
        assert found[0]["depth"] > 0.9 and found[1]["depth"] < 0.02, pair


@pytest.mark.parametrize(
    "outer,hole,off,right",
    [
        (27, 13.5, 0, True),
        (27, 10, 0, True),
        (27, 13.5, 3, True),
        (27, 8, 0, False),
        (27, 19, 0, False),
        (27, 13.5, 6, False),
        (20, 10, 0, False),
        (27, 0, 0, False),
    ],
)
def test_a_ring_has_a_hole_of_half_its_radius_in_its_middle(outer, hole, off, right):
    inside = draw_disc(64, centre=(32, 32), radius=outer)
    coverage = inside - (hole and draw_disc(64, centre=(32 + off, 32), radius=hole))
    found = circles.measure_ring(paint(coverage, "blue", "yellow"), "blue", "yellow")
    assert found["shape"] == found["ring"] == found["right"] == right


def test_a_rings_hole_and_what_is_around_it_are_of_the_background_and_it_of_its_colour():
    outer, hole = (draw_disc(64, centre=(32, 32), radius=r) > 0.5 for r in (27, 13.5))

    def measure(around, ring, inside):
        picture = np.array(paint(outer, ring, around))
        picture[hole] = rgb(inside)
        return circles.measure_ring(Image.fromarray(picture), "blue", "yellow")

    assert measure("yellow", "blue", "yellow")["right"]
    violet = measure("yellow", "dark violet", "yellow")
    assert violet["ring"] and not violet["right"]
    half = paint(np.full((64, 64), 0.5), "blue", "yellow").getpixel((0, 0))
    picture = np.array(paint(outer, "blue", "yellow"))
    picture[hole] = half
    halved = circles.measure_ring(Image.fromarray(picture), "blue", "yellow")
    assert halved["depth"] == pytest.approx(0.5, abs=0.01) and not halved["ring"]
    empty = paint(np.zeros((64, 64)), "blue", "yellow")
    assert circles.measure_ring(empty, "blue", "yellow")["depth"] == 0
    for colours in (("yellow", "blue", "orange"), ("orange", "blue", "yellow")):
        assert measure(*colours)["shape"] and not measure(*colours)["ring"]
    assert not measure("blue", "yellow", "blue")["ring"]


def perfect_ring(number, prompt):
    pair = prompt.removesuffix(" background").split(" circle ring with ")
    return Image.fromarray(rings.draw_ring(number, pair, size=64, seed=0)[0])


@pytest.mark.parametrize("kept", [True, False])
def test_a_lora_is_proven_by_rings_with_it_and_circles_as_before(
    kept, tmp_path, monkeypatch, capsys
):
    def generate(prompts, on_step, lora=None, **how):
        strength = lora.scale if lora else 0
        drawn = [
            perfect_ring(i, prompt) if "ring" in prompt and strength > i / len(prompts) else None
            for i, prompt in enumerate(prompts)
        ]
        circles = perfect([prompt.replace("circle ring", "circle") for prompt in prompts])
        if strength == 1 and not kept:
            circles = circles[1:] + circles[:1]
        return [ring or circle for ring, circle in zip(drawn, circles)]

    monkeypatch.setitem(vars(fluxlite), "generate", generate)
    arguments = ["--lora", "runs/x", "--num", "8", "--circles", "12", "--output", str(tmp_path)]
    runpy.run_path(str(PROVE))["body"](arguments)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["ring"], line["ring_half"], line["ring_without"]) == (1.0, 0.5, 0.0)
    assert line["depth"] > 0.95 and line["depth_without"] < 0.02
    assert line["depth_half"] == pytest.approx(line["depth"] / 2, abs=0.02)
    assert line["circle_without"] == 1 and (line["circle"] == 1) == kept and line["same_at_0"]
    with pytest.raises(ValueError, match="--lora is measured by rings: leave out --swaps"):
        runpy.run_path(str(PROVE))["body"]([*arguments, "--swaps", "3", "--overwrite"])


def test_a_folders_colours_stand_out_and_none_comes_often_while_another_has_not_come():
    for seed in (0, 1):
        dealt = rings.deal_pairs(200, seed)
        assert len(set(dealt)) == 200
        assert all(np.abs(rgb(a) - rgb(b)).max() >= 64 for a, b in dealt)
        assert not any(is_held_out(*pair) for pair in dealt)
        first, every = (Counter(chain.from_iterable(d)) for d in (dealt[:64], dealt))
        assert max(first.values()) == 1 and max(every.values()) <= 4
        assert every.keys() == COLOURS.keys()
    assert rings.deal_pairs(64, 0) != rings.deal_pairs(64, 1)


def test_rings_are_proven_with_pairs_that_no_training_sees(tmp_path):
    def draw(prompts):
        return [perfect_ring(i, prompt) for i, prompt in enumerate(prompts)]

    report, pictures, results = proof.prove_rings(draw, num=12, seed=0)
    shares = {key: report[key] for key in ("ring", "shape", "right")}
    assert shares == {"ring": 1.0, "shape": 1.0, "right": 1.0} and report["depth"] > 0.95
    assert len(pictures) == report["num"] == 12
    rings.write_figures(rings.RingsConfig(str(tmp_path / "rings"), count=30))
    captions = {path.read_text() for path in (tmp_path / "rings").glob("*.txt")}
    assert len(captions) > 25 and not captions & {result["prompt"] for result in results}
    with pytest.raises(ValueError, match="--dst .*rings exists"):
        rings.write_figures(rings.RingsConfig(str(tmp_path / "rings")))
    mine = tmp_path / "thesis.txt"
    mine.write_text("mine")
    with pytest.raises(ValueError, match="thesis.txt is a file: remove it or name a folder"):
        rings.write_figures(rings.RingsConfig(str(mine), count=1))
    assert mine.read_text() == "mine" and not list(tmp_path.glob(".*.old"))
    rings.write_figures(rings.RingsConfig(str(tmp_path / "new" / "deep"), count=1))
    assert len(list((tmp_path / "new" / "deep").iterdir())) == 2


# --- kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["control", "fill", "kontext"])
@pytest.mark.parametrize("there", ["plain", "control", "fill"])
def test_a_kind_is_measured_of_its_own_models_and_filling_of_plain_ones_too(kind, there, caplog):
    pipeline = SimpleNamespace(kind=there, where="--checkpoint=runs/a")
    check = runpy.run_path(str(PROVE))["check_proof_kind"]
    fits = {"control": ["control"], "fill": ["fill", "plain"], "kontext": ["plain"]}[kind]
    if there not in fits:
        with pytest.raises(ValueError, match=f"--kind={kind}: --checkpoint=runs/a is of kind"):
            check(pipeline, kind)
        return
    check(pipeline, kind)
    assert ("is no Fill" in caplog.text) == ((kind, there) == ("fill", "plain"))
