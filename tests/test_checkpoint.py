import hashlib
import json
import os
import resource
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from reference import diffusers_flux
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_convert import in_layout

from fluxlite import checkpoint, convert, offload, verify
from fluxlite.pipeline import ASSETS

ROOT = Path(__file__).parents[1]
TINY = ASSETS / "flux-tiny"
CHANGES = dict(attention_head_dim=32, axes_dims_rope=(4, 14, 14))  # the axes that follow from the head width


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
    checkpoint.write_converted(source, tmp_path / "fluxlite.safetensors")
    paths = {layout: tmp_path / f"{layout}.safetensors" for layout in ("fluxlite", "bfl", "nemo")}
    return paths | {"diffusers": tmp_path / "diffusers"}


def digests(path):
    return verify.digests_of(checkpoint.open_source(path))


@pytest.mark.parametrize("first", convert.LAYOUTS)
@pytest.mark.parametrize("second", convert.LAYOUTS)
def test_files_go_round_to_identical_bytes(sources, tmp_path, first, second):
    there = tmp_path / ("there" if second == "diffusers" else "there.safetensors")
    back = tmp_path / ("back" if first == "diffusers" else "back.safetensors")
    checkpoint.write_converted(checkpoint.open_source(sources[first]), there, to=second)
    _, source_digest = checkpoint.write_converted(checkpoint.open_source(there), back, to=first)
    assert digests(back) == digests(sources[first])
    assert digests(there) == digests(sources[second]) and source_digest == digests(there)[1]


def test_what_is_written_says_what_it_is(sources, tmp_path):
    with safe_open(sources["fluxlite"], "pt") as file:
        about = file.metadata()
    assert about["layout"] == "fluxlite" and about["source_layout"] == "diffusers" and about["fluxlite_version"]
    assert about["source_digest"] == digests(sources["diffusers"])[1]
    assert json.loads(about["config"])["num_double_blocks"] == 2


def test_digests_are_those_of_the_bytes(sources):
    each, _ = digests(sources["bfl"])
    tensor = load_file(sources["bfl"])["img_in.bias"]
    inner = hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).digest()
    assert each["img_in.bias"] == hashlib.sha256(b"BF16[96]" + inner).hexdigest()


def test_diffusers_loads_an_export_in_shards(sources, theirs, tmp_path):
    source = checkpoint.open_source(sources["bfl"])
    files, _ = checkpoint.write_converted(source, tmp_path / "out", to="diffusers", max_shard_bytes=100_000)
    assert len(files) > 3 and all(f.stat().st_size < 120_000 for f in files)
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(again[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("layout", convert.LAYOUTS)
def test_every_layout_loads_directly_and_equally(sources, layout):
    reference = checkpoint.load_transformer(sources["diffusers"]).state_dict()
    got = checkpoint.load_transformer(sources[layout]).state_dict()
    assert all(torch.equal(got[k], v) and got[k].dtype == torch.bfloat16 for k, v in reference.items())


def test_our_own_file_is_mapped_and_of_others_only_changed_tensors_are_copied(sources, tmp_path):
    def copied(layout):
        """Our tensors that do not lie in the mapped file."""
        source = checkpoint.open_source(sources[layout])
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in map(source.get, source.described)]
        state = checkpoint.load_state(source)
        return {k for k, v in state.items() if not any(a <= v.data_ptr() < b for a, b in spans)}

    assert not copied("fluxlite")
    for layout in ("bfl", "diffusers", "nemo"):
        names = copied(layout)
        assert names and all("qkv" in k or k.startswith("modulation") for k in names), names


def test_dtype_and_prefix_and_autoencoder(sources, tmp_path):
    files, _ = checkpoint.write_converted(
        checkpoint.open_source(sources["nemo"]), tmp_path / "f.safetensors", to="bfl", dtype=torch.float32
    )
    state = load_file(files[0])
    assert all(v.dtype == torch.float32 for v in state.values())
    save_file({f"model.diffusion_model.{k}": v for k, v in state.items()}, tmp_path / "comfy.safetensors")
    assert digests(tmp_path / "comfy.safetensors")[1] == digests(files[0])[1]
    checkpoint.write_converted(
        checkpoint.open_source(TINY, part="vae"), tmp_path / "ae.safetensors", to="bfl"
    )  # its group count is not FLUX's, and travels in the metadata
    a, b = (checkpoint.load_autoencoder(p) for p in (TINY, tmp_path / "ae.safetensors"))
    assert a.config == b.config
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_save_converted_is_written_once_used_again_and_checked(sources, tmp_path):
    kept = tmp_path / "kept.safetensors"
    first = checkpoint.converted(sources["diffusers"], kept)
    written = kept.stat().st_mtime_ns
    again = checkpoint.converted(sources["diffusers"], kept)
    assert kept.stat().st_mtime_ns == written and first.layout == again.layout == "fluxlite"
    with pytest.raises(ValueError, match="was not made from"):
        checkpoint.converted(sources["bfl"], kept)


def test_verify_proves_a_conversion_and_finds_a_flipped_bit(sources, tmp_path):
    for layout in convert.LAYOUTS:
        source = checkpoint.open_source(sources[layout])
        to = "diffusers" if layout == "fluxlite" else "fluxlite"
        dst = tmp_path / f"v-{layout}" if to == "diffusers" else tmp_path / f"v-{layout}.safetensors"
        checkpoint.write_converted(source, dst, to=to)
        lines = verify.verify(source, dst)
        assert "bit for bit" in lines[0] and "equals diffusers" in lines[1]
    file = tmp_path / "v-bfl.safetensors"
    with open(file, "r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-100, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="1 of .* pieces differ"):
        verify.verify(checkpoint.open_source(sources["bfl"]), file)


def test_streamed_blocks_compute_the_same(sources):
    model = checkpoint.load_transformer(sources["fluxlite"], dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    from fluxlite.latents import position_ids
    from fluxlite.model import rope_table

    inputs = torch.randn(1, 8, 12, generator=g), torch.randn(1, 3, 20, generator=g), rope_table(position_ids(4, 8, 3), model.config)
    more = dict(t=torch.tensor([0.5]), pooled=torch.randn(1, 14, generator=g), guidance=torch.tensor([2.0]))
    expected = model(*inputs, **more)
    homes = {name: p.data_ptr() for name, p in model.named_parameters()}
    seen = []
    streamed = offload.stream_blocks(model, "cpu")
    for block in streamed.single_blocks:
        block.register_forward_pre_hook(lambda m, _: seen.append(m.proj.weight.data_ptr()))
    for _ in range(2):
        assert torch.equal(streamed(*inputs, **more), expected)
    assert len(seen) == 6 and not set(seen) & set(homes.values())  # blocks ran on copies
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == homes  # and gave them back


# --- the script, and what it refuses --------------------------------------------------------------------------------------------


def convert_hf(*arguments, limit=None):
    """The script as a user runs it."""
    command = [sys.executable, "convert_hf.py", *map(str, arguments)]
    sizes = (limit, limit)
    prepare = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, sizes)) if limit else None
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=prepare)


run = runpy.run_path(str(ROOT / "convert_hf.py"))["run"]


def test_the_script_converts_a_tiny_pipeline_and_verifies(tmp_path, capfd):
    result = convert_hf("--src", TINY, "--dst", tmp_path / "tiny.safetensors", "--verify")
    assert result.returncode == 0, result.stderr
    assert "bit for bit" in result.stdout and "equals diffusers" in result.stdout
    assert run(["--src", f"{tmp_path}/tiny.safetensors", "--dst", f"{tmp_path}/back", "--to", "diffusers"]) == 0
    capfd.readouterr()
    printed = [(run(["--src", str(p), "--digests"]), capfd.readouterr().out)[1] for p in (TINY, tmp_path / "back")]
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
    "wrong folder": (lambda s, t: TINY / "text_encoder", None, "neither a FLUX transformer"),
    "missing shard": (lambda s, t: s["diffusers"], lambda p: sorted(p.glob("*-00002-*"))[0].unlink(), "lacks 1 of"),
    "truncated": (single, lambda p: os.truncate(p, p.stat().st_size - 1000), "no whole safetensors file"),
    "corrupt header": (single, corrupt_header, "no whole safetensors file"),
    "wrong width": (single, lambda p: resave(p, lambda s: s.update({"img_in.bias": torch.zeros(5)})), "img_in.bias [5], not"),
    "extra key": (single, lambda p: resave(p, lambda s: s.update(extra=torch.zeros(5))), "unknown: extra"),
    "missing key": (single, lambda p: resave(p, lambda s: s.pop("img_in.bias")), "missing: img_in.bias"),
    "two layouts": (
        single,
        lambda p: resave(p, lambda s: s.update({"time_in.linear_in.weight": torch.zeros(5)})),
        "mix layouts: fluxlite and bfl",
    ),
    "hub offline": (lambda s, t: "nobody/nothing-of-this-name", None, "--src=nobody/nothing"),
    "nowhere": (lambda s, t: "/nowhere/at/all", None, "does not exist"),
    "damaged index": (
        lambda s, t: s["diffusers"],
        lambda p: next(p.glob("*.index.json")).write_text("{"),
        "damaged",
    ),
    "damaged config": (lambda s, t: s["diffusers"], lambda p: (p / "config.json").write_text("{"), "damaged"),
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
    """One line that names the fault, exit code 2, and nothing in out/ but what was there `before`."""
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
        ([existing], "exists: pass --overwrite"),
        ([source, "--to", "diffusers", "--overwrite"], "is the source itself"),
        ([out / "d.safetensors", "--to", "diffusers"], "is a folder"),
    ):
        code = run(["--src", source, "--dst", *map(str, arguments)])
        refused(code, capfd.readouterr().err, named, tmp_path, [existing])
    full = convert_hf("--src", source, "--dst", existing, "--overwrite", limit=200_000)
    refused(full.returncode, full.stderr, "File too large", tmp_path, [existing])
    assert existing.read_text() == "precious"
    assert run(["--src", source, "--dst", str(existing), "--overwrite"]) == 0
    assert digests(existing)[1] == digests(sources["fluxlite"])[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, for whom permissions hold")
def test_permissions_are_reported(sources, tmp_path, capfd):
    """As a user that is not root: in a child, whose interpreter has read all that it needs."""
    for path in (p for p in [tmp_path, *tmp_path.parents] if p.owner() == "root" and len(p.parts) > 2):
        path.chmod(0o755)
    (tmp_path / "out").mkdir(mode=0o555)
    sources["bfl"].chmod(0o644)
    sources["nemo"].chmod(0o000)
    for layout, named in (("bfl", "Permission denied"), ("nemo", "no permission")):
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os._exit(run(["--src", str(sources[layout]), "--dst", f"{tmp_path}/out/new.safetensors"]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        refused(code, capfd.readouterr().err, named, tmp_path)
