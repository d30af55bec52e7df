import dataclasses
import hashlib
import json
import math
import os
import re
import resource
import runpy
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from reference import diffusers_controlnet, diffusers_flux, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import in_layout
from test_trainer import MOCK

from fluxlite.cli.messages import one_line
from fluxlite.draw import offload
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.weights import conversion, run_tensors, tensor_files, verify, writing
from fluxlite.weights import layouts as convert
from fluxlite.weights import run_folder as run_folders
from fluxlite.weights import sources as checkpoint
from fluxlite.weights.hub import ASSETS

ROOT = Path(__file__).parents[1]
TINY = ASSETS / "flux-tiny"
CHANGES = dict(
    attention_head_dim=32, axes_dims_rope=(4, 14, 14)
)  # the axes that follow from the head width


@pytest.fixture(scope="module")
def theirs():
    return diffusers_flux(**CHANGES).to(torch.bfloat16)


@pytest.fixture
def sources(theirs, tmp_path):
    """{layout: path} of the same weights."""
    theirs.save_pretrained(tmp_path / "diffusers", max_shard_size="100KB")
    for layout in ("bfl", "nemo"):
        state = {k: v.contiguous() for k, v in in_layout(theirs, layout).items()}
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / f"{layout}.safetensors")
    source = checkpoint.open_source(tmp_path / "diffusers")
    writing.write_converted(source, tmp_path / "fluxlite.safetensors")
    paths = {layout: tmp_path / f"{layout}.safetensors" for layout in ("fluxlite", "bfl", "nemo")}
    return paths | {"diffusers": tmp_path / "diffusers"}


def digests(path):
    return verify.digests_of(checkpoint.open_source(path))


@pytest.mark.parametrize("first", convert.LAYOUTS)
@pytest.mark.parametrize("second", convert.LAYOUTS)
def test_files_go_round_to_identical_bytes(sources, tmp_path, first, second):
    there = tmp_path / ("there" if second == "diffusers" else "there.safetensors")
    back = tmp_path / ("back" if first == "diffusers" else "back.safetensors")
    writing.write_converted(checkpoint.open_source(sources[first]), there, to=second)
    _, source_digest = writing.write_converted(checkpoint.open_source(there), back, to=first)
    assert digests(back) == digests(sources[first])
    assert digests(there) == digests(sources[second]) and source_digest == digests(there)[1]


def test_what_is_written_says_what_it_is(sources, tmp_path):
    with safe_open(sources["fluxlite"], "pt") as file:
        about = file.metadata()
    assert (
        about["layout"] == "fluxlite"
        and about["source_layout"] == "diffusers"
        and about["fluxlite_version"]
    )
    assert about["source_digest"] == digests(sources["diffusers"])[1]
    assert json.loads(about["config"])["num_double_blocks"] == 2


def test_metadata_of_other_programs_are_not_taken_for_ours(sources, tmp_path):
    state, config = load_file(sources["bfl"]), checkpoint.open_source(sources["bfl"]).config
    save_file(
        state,
        tmp_path / "other.safetensors",
        {"config": "not JSON", "sampling": "[", "layout": "mine"},
    )
    assert checkpoint.open_source(tmp_path / "other.safetensors").config == config


def test_digests_are_those_of_the_bytes(sources):
    each, _ = digests(sources["bfl"])
    tensor = load_file(sources["bfl"])["img_in.bias"]
    inner = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).digest()
    assert each["img_in.bias"] == hashlib.sha256(b"BF16[96]" + inner).hexdigest()


def test_diffusers_loads_an_export_in_shards(sources, theirs, tmp_path):
    source = checkpoint.open_source(sources["bfl"])
    files, _ = writing.write_converted(
        source, tmp_path / "out", to="diffusers", max_shard_bytes=100_000
    )
    assert len(files) > 3 and all(f.stat().st_size < 120_000 for f in files)
    again = FluxTransformer2DModel.from_pretrained(
        tmp_path / "out", torch_dtype=torch.bfloat16
    ).state_dict()
    assert all(torch.equal(again[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("layout", convert.LAYOUTS)
def test_every_layout_loads_directly_and_equally(sources, layout):
    reference = checkpoint.load_transformer(sources["diffusers"]).state_dict()
    got = checkpoint.load_transformer(sources[layout]).state_dict()
    assert all(
        torch.equal(got[k], v) and got[k].dtype == torch.bfloat16 for k, v in reference.items()
    )


def mapped_files():
    """(begin, end, path) of the files that this process has mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(edge, 16) for edge in line[0].split("-")] for line in lines]
    return [(*span, line[5]) for span, line in zip(spans, lines) if len(line) > 5]


COPIED = {  # names of parameters that a layout holds otherwise, and that loading therefore copies
    "fluxlite": lambda name: False,
    "diffusers": lambda name: False,
    "bfl": lambda name: name.startswith("modulation.out."),
    "nemo": lambda name: ".qkv." in name and "norm" not in name,
}


@pytest.mark.parametrize("layout", convert.LAYOUTS)
def test_weights_stay_in_the_mapped_files_and_only_what_changes_is_copied(sources, layout):
    """Of a diffusers folder, as of our own file, nothing: each parameter's memory is the file's."""
    model = checkpoint.load_transformer(sources[layout], dtype=torch.bfloat16)
    place = sources[layout]
    files = {str(file) for file in (place.glob("*.safetensors") if place.is_dir() else [place])}
    mapped = [(begin, end) for begin, end, path in mapped_files() if path in files]
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    copied = {n for n, at in places.items() if not any(begin <= at < end for begin, end in mapped)}
    assert copied == {name for name in places if COPIED[layout](name)}
    assert mapped and len(copied) < len(places) / 2


def test_dtype_and_prefix_and_autoencoder(sources, tmp_path):
    files, _ = writing.write_converted(
        checkpoint.open_source(sources["nemo"]),
        tmp_path / "f.safetensors",
        to="bfl",
        dtype=torch.float32,
    )
    state = load_file(files[0])
    assert all(v.dtype == torch.float32 for v in state.values())
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "comfy.safetensors"
    )
    assert digests(tmp_path / "comfy.safetensors")[1] == digests(files[0])[1]
    writing.write_converted(
        checkpoint.open_source(TINY, part="vae"), tmp_path / "ae.safetensors", to="bfl"
    )  # its group count is not FLUX's, and travels in the metadata
    a, b = (checkpoint.load_autoencoder(p) for p in (TINY, tmp_path / "ae.safetensors"))
    assert a.config == b.config
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_save_converted_is_written_once_used_again_and_checked(sources, tmp_path):
    kept = tmp_path / "kept.safetensors"
    first = writing.open_converted(sources["diffusers"], kept)
    written = kept.stat().st_mtime_ns
    again = writing.open_converted(sources["diffusers"], kept)
    assert kept.stat().st_mtime_ns == written and first.layout == again.layout == "fluxlite"
    with pytest.raises(ValueError, match="was not made from"):
        writing.open_converted(sources["bfl"], kept)
    with pytest.raises(ValueError, match="^model.save_converted=.* lies in the source's folder"):
        writing.open_converted(sources["diffusers"], sources["diffusers"] / "new.safetensors")


def test_verify_proves_a_conversion_and_finds_a_flipped_bit(sources, tmp_path):
    for layout in convert.LAYOUTS:
        source = checkpoint.open_source(sources[layout])
        to = "diffusers" if layout == "fluxlite" else "fluxlite"
        dst = (
            tmp_path / f"v-{layout}" if to == "diffusers" else tmp_path / f"v-{layout}.safetensors"
        )
        writing.write_converted(source, dst, to=to)
        lines = verify.verify_conversion(source, dst)
        assert "bit for bit" in lines[0] and "equals diffusers" in lines[1]
    file = tmp_path / "v-bfl.safetensors"
    with open(file, "r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-100, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="1 of .* tensors differ"):
        verify.verify_conversion(checkpoint.open_source(sources["bfl"]), file)


def test_verify_judges_the_forward_and_rounding(sources, tmp_path, monkeypatch):
    source = checkpoint.open_source(sources["bfl"])
    wide, half = tmp_path / "wide.safetensors", tmp_path / "half.safetensors"
    writing.write_converted(source, wide, dtype=torch.float32)
    resave(
        wide, lambda s: s.update({k: v * (1 + 1e-4) for k, v in s.items()})
    )  # no bfloat16 values any more
    fine = checkpoint.open_source(wide)
    writing.write_converted(fine, half, to="bfl", dtype=torch.bfloat16)
    lines = verify.verify_conversion(fine, half)
    assert "as its values in bfloat16" in lines[0] and "equals diffusers" in lines[1]
    monkeypatch.setattr(verify, "forward_error", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="differs from diffusers"):
        verify.verify_conversion(fine, half)


def test_a_wrong_mapping_gives_a_large_forward_error(sources):
    """Bytes that come back by the inverse of a wrong table are caught by the forward alone."""
    source = checkpoint.open_source(sources["diffusers"])
    good = checkpoint.open_source(sources["fluxlite"])
    assert verify.forward_error(source, good) < 1e-5
    bad = dataclasses.replace(
        good,
        read=lambda n, a=0, b=None, exact=False: (
            good.read(n, a, b).flip(0) if "qkv.q." in n else good.read(n, a, b)
        ),
    )
    assert verify.forward_error(source, bad) > 0.01


def test_values_too_large_for_the_type_are_refused(sources, tmp_path):
    wide = tmp_path / "wide.safetensors"
    writing.write_converted(checkpoint.open_source(sources["bfl"]), wide, dtype=torch.float32)
    resave(wide, lambda s: s["img_in.weight"].view(-1)[3:4].fill_(1e6))
    with pytest.raises(ValueError, match="img_in.weight has values up to 1e\\+06"):
        writing.write_converted(
            checkpoint.open_source(wide), tmp_path / "half.safetensors", dtype=torch.float16
        )
    assert not (tmp_path / "half.safetensors").exists()


def test_each_tensor_keeps_its_type(sources, tmp_path):
    mixed = tmp_path / "mixed.safetensors"
    mixed.write_bytes(sources["bfl"].read_bytes())
    resave(mixed, lambda s: s.update({k: v.float() for k, v in s.items() if v.ndim > 1}))
    writing.write_converted(checkpoint.open_source(mixed), tmp_path / "out.safetensors")
    state = load_file(tmp_path / "out.safetensors")
    assert all(v.dtype == (torch.float32 if v.ndim > 1 else torch.bfloat16) for v in state.values())
    assert (
        "bit for bit"
        in verify.verify_conversion(checkpoint.open_source(mixed), tmp_path / "out.safetensors")[0]
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two processes: its tensors lie in two shards each."""
    folder = tmp_path_factory.mktemp("run") / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "train.py",
        *MOCK,
        f"output={folder}",
        "steps=2",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("ema", [True, False])
def test_a_run_of_two_shards_is_a_source_and_its_average_is_chosen(run_folder, tmp_path, ema):
    source = checkpoint.open_source(run_folder, ema=ema)
    tensors = run_tensors.RunTensors(run_folders.last_checkpoint(run_folder)).tensors
    assert len(tensors["model.modulation.single.0.weight"].chunks) == 2
    group = "ema" if ema else "model"
    expected = {name: torch.empty(shape) for name, (_, shape) in source.described.items()}
    dcp.load({group: expected}, checkpoint_id=run_folders.last_checkpoint(run_folder), no_dist=True)
    assert all(
        torch.equal(source.read(k), v) and torch.equal(source.read(k, 3, 9), v[3:9])
        for k, v in expected.items()
    )
    writing.write_converted(source, tmp_path / "out", to="diffusers")
    assert "bit for bit" in verify.verify_conversion(source, tmp_path / "out")[0]
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert (
        training["step"] == 2 and training["ema"] == ema and training["density"] == "logit_normal"
    )
    kept = tmp_path / "kept.safetensors"
    writing.open_converted(run_folder, kept, ema=ema)
    with pytest.raises(ValueError, match="was not made from"):
        writing.open_converted(run_folder, kept, ema=not ema)


def test_a_run_is_read_once_and_a_linear_at_a_time(run_folder):
    source, sizes = checkpoint.open_source(run_folder), []
    read = source.read

    def watched(name, start=0, stop=None):
        tensor = read(name, start, stop)
        sizes.append(tensor.nbytes)
        return tensor

    for _ in conversion.convert_weights(watched, "fluxlite", "diffusers", source.config):
        pass
    largest = max(tensor_files.num_bytes({name: entry}) for name, entry in source.described.items())
    assert max(sizes) == largest < source.num_bytes() / 8 and sum(sizes) == source.num_bytes()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    final, found = tmp_path / "x.safetensors", []

    def write_second():
        with tensor_files.atomic_weights(final, overwrite=True) as b:
            found.append(final.read_bytes())
            b.write_bytes(b"b" * 10)

    second = threading.Thread(target=write_second)
    with tensor_files.atomic_weights(final) as a:
        a.write_bytes(b"a" * 100)
        second.start()
        second.join(0.3)
        assert second.is_alive() and not found  # it waits
    second.join(30)
    assert found == [b"a" * 100] and final.read_bytes() == b"b" * 10
    assert len(list(tmp_path.iterdir())) == 1


def test_streamed_blocks_compute_the_same(sources):
    model = checkpoint.load_transformer(sources["fluxlite"], dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(1, 8, 12, generator=g),
        torch.randn(1, 3, 20, generator=g),
        rope_table(position_ids(4, 8, 3), model.config),
    )
    more = dict(
        t=torch.tensor([0.5]), pooled=torch.randn(1, 14, generator=g), guidance=torch.tensor([2.0])
    )
    expected = model(*inputs, **more)
    seen, streamed = [], offload.stream_blocks(model, "cpu")
    homes = {name: p.data_ptr() for name, p in model.named_parameters()}
    for block in streamed.single_blocks:
        block.register_forward_pre_hook(lambda m, _: seen.append(m.proj.weight.data_ptr()))
    for _ in range(2):
        assert torch.equal(streamed(*inputs, **more), expected)
    assert (
        len(seen) == 6 and len(set(seen)) == 2 and not set(seen) & set(homes.values())
    )  # blocks ran in two buffers
    assert {
        name: p.data_ptr() for name, p in model.named_parameters()
    } == homes  # and gave them back


class CountedFeed(offload.Feed):
    """A feed that notes the blocks whose weights it copies."""

    copies = []

    def _fetch(self, number):
        if number not in self.holds:
            self.copies.append(number)
        super()._fetch(number)


@pytest.mark.parametrize("resident, streamed", [(0, 5), (2, 3), (3, 2), (5, 0), (99, 0)])
def test_streaming_sends_for_the_next_steps_first_block_and_leaves_residents_alone(
    monkeypatch, resident, streamed
):
    monkeypatch.setattr(offload, "Feed", CountedFeed)
    monkeypatch.setattr(CountedFeed, "copies", copies := [])
    config = FluxConfig(2, 3, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6))
    model = randomise(Flux(config))
    modulation = torch.randn(sum(config.modulation_chunks), 1, 1, 48)
    rope = rope_table(position_ids(4, 8, 3), config)
    inputs = torch.randn(1, 8, 12), torch.randn(1, 3, 48), rope, modulation
    with torch.no_grad():
        expected = model.velocity(*inputs)
        offload.stream_blocks(model, "cpu", resident)
        for step in range(3):
            assert torch.equal(model.velocity(*inputs), expected)
            if streamed > 2:  # one more than it has run
                assert copies == [i % streamed for i in range(streamed * (step + 1) + 1)]
            else:  # both have a buffer
                assert copies == [*range(streamed)]


def test_streamed_weights_begin_where_kernels_load_whole_vectors():
    """Of compiled blocks the generated code counts on it."""
    model = randomise(Flux(FluxConfig(1, 2, 36, 3, 4, 12, 12, 20, 14, True, (2, 4, 6))))
    expected = {name: p.clone() for name, p in model.named_parameters()}
    offload.stream_blocks(model, "cpu")
    for block in offload_blocks(model):
        starts = [p.storage_offset() * p.itemsize for p in block.parameters()]
        assert all(start % offload.ALIGNED == 0 for start in starts)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_as_many_blocks_stay_as_fit_beside_the_ends_and_two_buffers():
    model = Flux(FluxConfig(2, 3, 48, 3, 4, 12, 12, 20, 14, True, (4, 6, 6)))
    size = sum(p.nbytes for p in model.double_blocks[0].parameters())  # a single block's is half
    ends = sum(p.nbytes for part in (model.img_in, model.out) for p in part.parameters())
    blocks = sum(p.nbytes for part in offload_blocks(model) for p in part.parameters())
    fits = {0: 0, ends + size: 0, ends + 3 * size: 1, ends + blocks - 1: 1, ends + blocks: 5}
    assert {free: offload.fitting_blocks(model, free) for free in fits} == fits
    assert offload.resident_blocks(57, 19) == set(range(0, 57, 3))
    assert offload.resident_blocks(5, 0) == set() and offload.resident_blocks(3, 9) == {0, 1, 2}


def offload_blocks(model):
    return [*model.double_blocks, *model.single_blocks]


# --- the script, and what it refuses --------------------------------------------------------------


def convert_hf(*arguments, limit=None):
    """The script as a user runs it."""
    command = [sys.executable, "convert_hf.py", *map(str, arguments)]
    sizes = (limit, limit)
    prepare = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, sizes)) if limit else None
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=prepare)


script = runpy.run_path(str(ROOT / "convert_hf.py"))


def run(arguments):
    """The script in this process; its exit code."""
    try:
        script["body"](arguments)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def test_the_script_converts_a_tiny_pipeline_and_verifies(tmp_path, capfd):
    result = convert_hf("--src", TINY, "--dst", tmp_path / "tiny.safetensors", "--verify")
    assert result.returncode == 0, result.stderr
    assert "bit for bit" in result.stdout and "equals diffusers" in result.stdout
    assert re.search(r"tiny.safetensors  \S+ MB", result.stdout), "not 0.0 GB"
    assert "writing fluxlite to" in result.stderr
    assert (
        run(
            [
                "--src",
                f"{tmp_path}/tiny.safetensors",
                "--dst",
                f"{tmp_path}/back",
                "--to",
                "diffusers",
            ]
        )
        == 0
    )
    capfd.readouterr()
    printed = [
        (run(["--src", str(p), "--digests"]), capfd.readouterr().out)[1]
        for p in (TINY, tmp_path / "back")
    ]
    assert printed[0] == printed[1] and printed[0].count("\n") > 100


def resave(file, change):
    """Write a safetensors file again with its state changed by `change`."""
    state = load_file(file)
    change(state)
    save_file(state, file)


def corrupt_header(file):
    with open(file, "r+b") as opened:
        opened.write(struct.pack("<Q", 1 << 40))


def single(sources, tmp_path):
    return sources["bfl"]


FAULTS = {
    "wrong folder": (lambda s, t: TINY / "text_encoder", None, "CLIP text encoder"),
    "missing shard": (
        lambda s, t: s["diffusers"],
        lambda p: sorted(p.glob("*-00002-*"))[0].unlink(),
        "lacks 1 of",
    ),
    "truncated": (
        single,
        lambda p: os.truncate(p, p.stat().st_size - 1000),
        "no whole safetensors file",
    ),
    "corrupt header": (single, corrupt_header, "no whole safetensors file"),
    "wrong width": (
        single,
        lambda p: resave(p, lambda s: s.update({"img_in.bias": torch.zeros(5)})),
        "img_in.bias [5], not",
    ),
    "extra key": (
        single,
        lambda p: resave(p, lambda s: s.update(extra=torch.zeros(5))),
        "unknown: extra",
    ),
    "missing key": (
        single,
        lambda p: resave(p, lambda s: s.pop("img_in.bias")),
        "missing: img_in.bias",
    ),
    "two layouts": (
        single,
        lambda p: resave(p, lambda s: s.update({"time_in.linear_in.weight": torch.zeros(5)})),
        "mix layouts: fluxlite and bfl",
    ),
    "hub offline": (lambda s, t: "nobody/nothing-of-this-name", None, "the hub does not answer"),
    "two models": (
        lambda s, t: s["bfl"],
        lambda p: resave(p, lambda s: s.update({"decoder.conv_in.weight": torch.zeros(5)})),
        "name the file of one",
    ),
    "damaged run": (
        lambda s, t: s["diffusers"],
        lambda p: (p / "meta.json").write_text("{}"),
        "meta.json: step is missing",
    ),
    "nowhere": (lambda s, t: "/nowhere/at/all", None, "does not exist"),
    "damaged index": (
        lambda s, t: s["diffusers"],
        lambda p: next(p.glob("*.index.json")).write_text("{"),
        "damaged",
    ),
    "damaged config": (
        lambda s, t: s["diffusers"],
        lambda p: (p / "config.json").write_text("{"),
        "damaged",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_sources_are_refused_in_one_line(sources, tmp_path, fault, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    choose, damage, named = FAULTS[fault]
    source = choose(sources, tmp_path)
    if damage:
        damage(source)
    code = run(["--src", str(source), "--dst", f"{tmp_path}/out/new.safetensors"])
    refused(code, capfd.readouterr().err, named, tmp_path)


def refused(code, errors, named, tmp_path, before=()):
    """One line that names the fault, exit code 2, and nothing in out/ but what was there
    `before`.
    """
    assert code == 2, errors
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert len(lines) == 1 and named in lines[0] and "Traceback" not in errors, errors
    left = list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else []
    assert sorted(left) == sorted(before)


def test_bad_destinations_are_refused_and_lose_nothing(sources, tmp_path, capfd):
    out, source = tmp_path / "out", str(sources["diffusers"])
    out.mkdir()
    existing = out / "existing.safetensors"
    existing.write_text("precious")
    for arguments, named in (
        ([existing], "pass --overwrite"),
        ([source, "--to", "diffusers", "--overwrite"], "is the source or holds it"),
        ([out / "d.safetensors", "--to", "diffusers"], "is a folder"),
    ):
        code = run(["--src", source, "--dst", *map(str, arguments)])
        said = capfd.readouterr()
        refused(code, said.err, named, tmp_path, [existing])
        assert "writing" not in said.out + said.err, "before it is known whether it can be"
    plain = tmp_path / "plain"
    plain.write_text("precious")
    code = run(["--src", source, "--dst", str(plain), "--to", "diffusers", "--overwrite"])
    named = "plain is a file, and a folder is written: name another"
    refused(code, capfd.readouterr().err, named, tmp_path, [existing])
    assert plain.read_text() == "precious"
    full = convert_hf("--src", source, "--dst", existing, "--overwrite", limit=200_000)
    refused(full.returncode, full.stderr, "file too large", tmp_path, [existing])
    assert existing.read_text() == "precious"
    mine = out / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    pipeline = tmp_path / "pipeline"
    shutil.copytree(TINY, pipeline)
    for src, dst, named in (
        (source, mine, "thesis.txt first: it is not overwritten"),
        (source, existing.with_suffix(""), None),
        (pipeline, pipeline, "is the source or holds it"),
        (pipeline / "transformer", pipeline, "is the source or holds it"),
        (pipeline, pipeline / "transformer" / "new.safetensors", "lies in the source's folder"),
        (source, mine / "x.ckpt", "must end in .safetensors"),
        (source, pipeline / "vae", "something other than a FLUX transformer"),
        (source, pipeline / "text_encoder", "something other than a FLUX transformer"),
        (source, existing / "x.safetensors", "cannot be written: a file lies where a folder must"),
    ):
        code = run(["--src", str(src), "--dst", str(dst), "--to", "bfl", "--overwrite"])
        errors = capfd.readouterr().err
        if named is None:
            assert code == 0
            shutil.rmtree(dst)
        else:
            refused(code, errors, named, tmp_path, [existing, mine])
    assert (mine / "thesis.txt").exists() and (pipeline / "vae").is_dir()
    shutil.rmtree(mine)
    assert run(["--src", source, "--dst", str(existing), "--overwrite"]) == 0
    assert digests(existing)[1] == digests(sources["fluxlite"])[1]


def test_a_converted_file_that_cannot_be_kept_is_named_by_its_setting(sources, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x.safetensors"
    with pytest.raises(ValueError, match=f"^model.save_converted={place}: .*; name another file"):
        writing.open_converted(sources["diffusers"], place)


def test_sizes_have_three_digits_in_a_unit_that_fits():
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1.00 kB", 46_312: "46.3 kB"}
    sizes |= {
        5_300_000: "5.30 MB",
        23_802_947_360: "23.8 GB",
        10**12: "1.00 TB",
        10**16: "10000 TB",
    }
    assert {count: tensor_files.format_bytes(count) for count in sizes} == sizes


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user, for whom permissions hold"
)
def test_permissions_are_reported(sources, tmp_path, capfd):
    """As a user that is not root: in a child, whose interpreter has read all that it needs."""
    for path in (
        p for p in [tmp_path, *tmp_path.parents] if p.owner() == "root" and len(p.parts) > 2
    ):
        path.chmod(0o755)
    (tmp_path / "out").mkdir(mode=0o555)
    sources["bfl"].chmod(0o644)
    sources["nemo"].chmod(0o000)
    for layout, named in (("bfl", "Permission denied"), ("nemo", "no permission")):
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os._exit(
                run(["--src", str(sources[layout]), "--dst", f"{tmp_path}/out/new.safetensors"])
            )
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        refused(code, capfd.readouterr().err, named, tmp_path)


# --- ControlNets ----------------------------------------------------------------------------------

KINDS = {
    "xlabs": dict(singles=0, pixel=True),
    "instantx": dict(singles=3),
    "union": dict(singles=1, modes=7),
}
HOLDS = {
    "xlabs": ("fluxlite", "diffusers", "bfl", "nemo"),
    "instantx": ("fluxlite", "diffusers", "nemo"),
    "union": ("fluxlite", "diffusers"),
}


@pytest.fixture
def controlnets(tmp_path):
    """{kind: path} in the layout that each is published in: x-flux's file, diffusers' folders."""
    found = {}
    for kind, changes in KINDS.items():
        theirs = diffusers_controlnet(**changes, in_channels=16, **CHANGES).to(torch.bfloat16)
        found[kind] = tmp_path / f"{kind}.safetensors" if kind == "xlabs" else tmp_path / kind
        if kind == "xlabs":
            save_file(
                {k: v.clone().contiguous() for k, v in in_layout(theirs, "bfl").items()},
                found[kind],
            )
        else:
            theirs.save_pretrained(found[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_controlnets_go_through_every_layout_to_identical_bytes(controlnets, tmp_path, kind):
    original = checkpoint.open_source(controlnets[kind])
    source = original
    for number, layout in enumerate([*HOLDS[kind], original.layout]):
        dst = tmp_path / str(number)
        files, _ = writing.write_converted(source, dst, to=layout)
        if layout != "diffusers":
            names = {
                "fluxlite": "fluxlite_controlnet",
                "bfl": "flux_controlnet",
                "nemo": "nemo_flux_controlnet_transformer",
            }
            assert [f.name for f in files] == [f"{names[layout]}.safetensors"]
        assert "equals diffusers' model" in verify.verify_conversion(source, dst)[-1]
        source = checkpoint.open_source(dst)
        assert (source.what, source.layout, source.config) == (
            "controlnet",
            layout,
            original.config,
        )
    assert digests(dst) == digests(controlnets[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_an_exported_controlnet(controlnets, tmp_path, kind):
    ours, exported = tmp_path / "ours.safetensors", tmp_path / "exported"
    writing.write_converted(checkpoint.open_source(controlnets[kind]), ours)
    writing.write_converted(checkpoint.open_source(ours), exported, to="diffusers")
    again = FluxControlNetModel.from_pretrained(exported, torch_dtype=torch.bfloat16)
    theirs = diffusers_controlnet(**KINDS[kind], in_channels=16, **CHANGES).to(torch.bfloat16)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in theirs.state_dict().items())
    keys = ("num_mode", "conditioning_embedding_channels", "patch_size", "num_layers")
    assert all(again.config[k] == theirs.config[k] for k in keys)
    net, mapped = checkpoint.load_controlnet(controlnets[kind]), checkpoint.load_controlnet(ours)
    assert net.config == mapped.config and all(
        torch.equal(mapped.state_dict()[k], v) for k, v in net.state_dict().items()
    )


def test_controlnets_and_other_parts_are_not_mixed_up(controlnets, sources, tmp_path):
    with pytest.raises(
        ValueError,
        match="controlnet.checkpoint=.*holds the wrong part, transformer: name a ControlNet",
    ):
        checkpoint.load_controlnet(sources["diffusers"])
    with pytest.raises(
        ValueError, match="model.checkpoint=.*holds the wrong part, controlnet: name a transformer"
    ):
        checkpoint.load_transformer(controlnets["instantx"])
    with pytest.raises(ValueError, match="controlnet.checkpoint=/nowhere does not exist"):
        checkpoint.load_controlnet("/nowhere")
    for kind, to, named in (
        ("union", "nemo", "knows no modes"),
        ("instantx", "bfl", "3 single blocks"),
        ("union", "bfl", "7 modes"),
    ):
        with pytest.raises(ValueError, match=named):
            writing.write_converted(
                checkpoint.open_source(controlnets[kind]), tmp_path / "no.safetensors", to=to
            )
    assert not (tmp_path / "no.safetensors").exists()
    with pytest.raises(ValueError, match="holds something other than a FLUX controlnet"):
        writing.write_converted(
            checkpoint.open_source(controlnets["union"]), sources["bfl"], overwrite=True
        )


def test_a_converted_controlnet_is_kept_and_used_again(controlnets, tmp_path, caplog):
    kept, of = tmp_path / "kept.safetensors", dict(part="controlnet")
    first = writing.open_converted(controlnets["xlabs"], kept, **of)
    written = kept.stat().st_mtime_ns
    again = writing.open_converted(controlnets["xlabs"], kept, **of)
    assert (
        first.layout == again.layout == "fluxlite"
        and kept.stat().st_mtime_ns == written
        and again.config.hint == "pixel"
    )
    with pytest.raises(
        ValueError, match="controlnet.save_converted=.*was not made from controlnet.checkpoint="
    ):
        writing.open_converted(controlnets["union"], kept, **of)


def test_a_flipped_bit_in_a_controlnet_is_found(controlnets, tmp_path):
    source, dst = checkpoint.open_source(controlnets["union"]), tmp_path / "out.safetensors"
    writing.write_converted(source, dst)
    state, about = load_file(dst), safe_open(dst, "pt").metadata()
    state["mode_in.weight"].view(torch.uint8)[0, 0] ^= 1
    save_file(state, dst, about)
    with pytest.raises(ValueError, match="controlnet_mode_embedder"):
        verify.verify_conversion(source, dst)


def test_the_script_converts_a_controlnet(controlnets, tmp_path, capfd):
    assert (
        run(
            [
                "--src",
                str(controlnets["xlabs"]),
                "--dst",
                str(tmp_path / "out"),
                "--to",
                "diffusers",
                "--verify",
            ]
        )
        == 0
    )
    out = capfd.readouterr().out
    assert (
        "controlnet, bfl layout" in out
        and "equals diffusers' model" in out
        and json.loads((tmp_path / "out/config.json").read_text())
    )


def test_what_a_killed_conversion_left_is_gone_after_the_next(tmp_path):
    """Gigabytes of it: the next writer takes a file over, and brings back what was moved away."""
    source = checkpoint.open_source(str(ASSETS / "flux-tiny" / "transformer"))
    (tmp_path / ".x.safetensors.part").write_bytes(bytes(10))
    writing.write_converted(source, tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    (tmp_path / ".d.part").mkdir()
    (tmp_path / ".d.part" / "half.safetensors").write_bytes(bytes(10))
    writing.write_converted(source, tmp_path / "d", to="diffusers")
    (tmp_path / "d").rename(tmp_path / ".d.old")  # killed between the two renames
    with (
        pytest.raises(ValueError, match="exists"),
        tensor_files.atomic_weights(tmp_path / "d", folder=True),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "x.safetensors"]
    checkpoint.open_source(str(tmp_path / "d"))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(dtype):
    for length in (1, 7, 64, 4097):
        values = torch.linspace(-3, 3, length).to(dtype)
        assert tensor_files.all_finite(values) and tensor_files.all_finite(values[:0])
        for bad in (math.nan, math.inf, -math.inf):
            for place in (0, length // 2, length - 1):
                spoiled = values.clone()
                spoiled[place] = bad
                assert not tensor_files.all_finite(spoiled), (length, bad, place)
