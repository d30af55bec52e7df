"""What fluxlite 0.1 wrote is refused in one line, and the line's script converts it.

`golden/first_edition_*.safetensors` are files of that version, made from diffusers' folders; their
metadata have the digest of those.
"""

import json
import runpy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from fluxlite.settings import TrainConfig
from fluxlite.train.resume import find_resume
from fluxlite.weights import hub, sources, verify, writing

ROOT = Path(__file__).parents[1]
FILES = {
    part: ROOT / "tests" / "golden" / f"first_edition_{part}.safetensors"
    for part in ("flux", "net")
}
script = runpy.run_path(str(ROOT / "scripts" / "convert_first_edition.py"))


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("part", FILES)
def test_a_file_of_the_first_edition_is_refused_with_the_command_that_converts_it(tmp_path, part):
    with pytest.raises(
        ValueError, match="fluxlite 0.1.*scripts/convert_first_edition.py --src"
    ) as caught:
        sources.open_source(FILES[part])
    assert "\n" not in str(caught.value)
    expected, new = metadata(FILES[part])["source_digest"], tmp_path / "new.safetensors"
    script["main"](["--src", str(FILES[part]), "--dst", str(new)])
    writing.write_converted(sources.open_source(new), tmp_path / "back", to="diffusers")
    script["main"](
        ["--src", str(FILES[part]), "--dst", str(tmp_path / "direct"), "--to", "diffusers"]
    )
    for folder in ("back", "direct"):
        assert verify.digests_of(sources.open_source(tmp_path / folder))[1] == expected


def test_what_is_no_file_of_the_first_edition_is_left_to_the_converter():
    with pytest.raises(ValueError, match="no file of fluxlite 0.1: convert_hf.py"):
        script["open_first_edition"](hub.ASSETS / "flux-tiny" / "transformer")


def test_a_run_of_this_edition_is_left_to_the_converter(old_run):
    meta = old_run / "checkpoints" / "step-000003" / "meta.json"
    meta.write_text(meta.read_text().replace('"0.1.0"', '"0.2.0"'))
    with pytest.raises(ValueError, match="no run of fluxlite 0.1: convert_hf.py"):
        script["open_first_edition"](old_run)


@pytest.fixture
def old_run(tmp_path):
    """A run folder as that version wrote it: weights, and an average that is their negative."""
    state = {name: tensor.float() for name, tensor in load_file(FILES["flux"]).items()}
    folder = tmp_path / "run" / "checkpoints" / "step-000003"
    average = {name: -tensor for name, tensor in state.items()}
    dcp.save({"model": state, "ema": average}, checkpoint_id=folder, no_dist=True)
    meta = {
        "layout": "fluxlite",
        "version": "0.1.0",
        "what": "transformer",
        "step": 3,
        "ema": sorted(average),
        "model": json.loads(metadata(FILES["flux"])["config"]),
        "flow": {},
        "config": asdict(TrainConfig()),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder.parent / "last").symlink_to(folder.name)
    return tmp_path / "run"


def test_a_run_of_the_first_edition_is_refused_and_its_weights_convert(old_run, tmp_path):
    with pytest.raises(ValueError, match="fluxlite 0.1.*convert_first_edition.py"):
        sources.open_source(old_run)
    with pytest.raises(ValueError, match="fluxlite 0.1.*convert_first_edition.py"):
        find_resume(TrainConfig(output=str(old_run), resume="auto"))
    expected = sources.load_state(script["open_first_edition"](FILES["flux"]))
    for flags, sign in (["--no-ema"], 1), ([], -1):
        new = tmp_path / f"new{sign}.safetensors"
        script["main"](["--src", str(old_run), "--dst", str(new), *flags])
        got = sources.open_source(new)
        assert all(
            (got.read(name) == sign * values.float()).all() for name, values in expected.items()
        )
        assert json.loads(got.metadata["training"]) == {"step": 3, "ema": sign < 0}
