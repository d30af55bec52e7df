"""Mutated headers, configurations, indices, settings, tokenizers: refused in one line, or whole."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from fuzzing import BOTH, try_cases
from reference import diffusers_flux
from safetensors.torch import save_file
from test_convert import in_layout
from test_files import write_gguf

from fluxlite.nets.schedule import SampleConfig, times_for
from fluxlite.weights import sources, tensor_files, writing
from fluxlite.weights.hub import ASSETS
from fluxlite.weights.text_encoders import load_text_encoders

TINY = ASSETS / "flux-tiny"
JUNK = (
    *(
        None,
        True,
        0,
        -1,
        1,
        10**9,
        10**30,
        2**63,
        1.5,
        -0.0,
        1e308,
        "",
        "a",
        "../x",
        "/etc/passwd",
        "\0",
    ),
    *([], [1], {}, {"a": 1}, "é" * 300, [[[[]]]], "NaN", "1"),
)
RAW = (
    b"NaN",
    b"-Infinity",
    b"[" * 5000,
    b"{" * 5000,
    b"\xff",
    b"1e999",
    b"9" * 5000,
    b'"a":1,"a":2,',
)


def mutate_json(values, rng):
    """A copy with one to three of its parts replaced by junk, taken away, renamed or copied."""
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        at = values
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            kind = rng.randrange(4)
            if kind == 0 and isinstance(at, dict):
                at[rng.choice([f"{key}x", "", "x" * 200])] = at.pop(key)
            elif kind == 1:
                del at[key]
            elif kind == 2:
                at[key] = copy.deepcopy(at[rng.choice(keys)])
            else:
                at[key] = rng.choice(JUNK)
            break
    return values


def mutate_bytes(data, rng):
    """A copy with bytes flipped, cut, doubled or replaced by what is no JSON."""
    data, start = bytearray(data), rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([1, 2, 8, 100]))
    kind = rng.randrange(5)
    if kind == 0:
        data[start] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:stop]
    elif kind == 2:
        data[start:start] = data[start:stop]
    elif kind == 3:
        data[start:stop] = rng.choice(RAW)
    else:
        del data[start:]
    return bytes(data)


def mutated(file, rng):
    """Write a JSON file again, its values or its bytes mutated."""
    data = file.read_bytes()
    if rng.random() < 0.7:
        file.write_text(json.dumps(mutate_json(json.loads(data), rng)))
    else:
        file.write_bytes(mutate_bytes(data, rng))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A small transformer in three layouts and what lies beside it; its shape; its weights."""
    root = tmp_path_factory.mktemp("originals")
    axes = dict(attention_head_dim=32, num_attention_heads=1, axes_dims_rope=(4, 14, 14))
    theirs = diffusers_flux(**axes, doubles=1, singles=1).to(torch.bfloat16)
    theirs.save_pretrained(root / "pipe" / "transformer", max_shard_size="100KB")
    shutil.copytree(TINY / "scheduler", root / "pipe" / "scheduler")
    (root / "pipe" / "fluxlite.json").write_text(
        '{"steps": 4, "guidance": 2.5, "shift": "resolution"}'
    )
    state = {name: t.clone().contiguous() for name, t in in_layout(theirs, "bfl").items()}
    save_file(state, root / "bfl.safetensors")
    writing.write_converted(sources.open_source(root / "pipe"), root / "ours.safetensors")
    source = sources.open_source(root / "pipe")
    return root, source.config, sources.load_state(source)


def check_source(where, config, state):
    """Open what may be damaged: what is accepted has the original's shape and weights."""
    source = sources.open_source(where)
    assert source.config == config, "accepted with another shape"
    loaded = sources.load_state(source)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
    settings = SampleConfig(**(source.settings | {"steps": source.settings.get("steps", 4)}))
    times = times_for(settings, source.config, 1024)
    assert times.isfinite().all() and (times.diff() <= 0).all() and times[-1] == 0
    return source.layout


def change_header(file, rng):
    """Mutate the header alone: in the values no checksum would show a fault."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        header = json.dumps(mutate_json(json.loads(header), rng)).encode()
    elif kind < 0.8:
        header = mutate_bytes(header, rng)
    else:  # the header is whole and the file is not
        file.write_bytes(mutate_bytes(data[: 8 + length], rng) + rest[: rng.randrange(len(rest))])
        return
    length = (
        len(header)
        if rng.random() < 0.9
        else rng.choice([0, 1, len(header) - 1, 1 << 40, 2**64 - 1])
    )
    file.write_bytes(length.to_bytes(8, "little") + header + rest)


def change_index(folder, rng):
    file = next(folder.glob("*.index.json"))
    if rng.random() < 0.5:
        mutated(file, rng)
        return
    index = json.loads(file.read_text())
    key = rng.choice(list(index["weight_map"]))
    outside = ["../bfl.safetensors", "/etc/passwd", "a/../../x"]
    index["weight_map"][key] = rng.choice([*outside, "config.json", ".", "", key])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("count", BOTH)
def test_mutated_models_are_refused_or_whole(originals, count, tmp_path):
    root, config, state = originals

    def case(rng):
        place = tmp_path / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root, place)
        kind = rng.randrange(6)
        if kind < 2:
            name = rng.choice(["bfl.safetensors", "ours.safetensors"])
            change_header(place / name, rng)
            return check_source(place / name, config, state)
        if kind == 2:
            change_index(place / "pipe" / "transformer", rng)
        elif kind == 3:
            mutated(place / "pipe" / "transformer" / "config.json", rng)
        elif kind == 4:
            mutated(
                place / "pipe" / rng.choice(["scheduler/scheduler_config.json", "fluxlite.json"]),
                rng,
            )
        else:
            shard = rng.choice(sorted((place / "pipe" / "transformer").glob("*.safetensors")))
            rng.choice([change_header, cut_short, swap_for_link])(shard, rng)
        return check_source(place / "pipe", config, state)

    verdicts = [verdict for verdict, _ in try_cases(count, case)]
    assert verdicts.count("refused") > count / 3 and verdicts.count("accepted") > count / 20


@pytest.mark.parametrize("count", BOTH)
def test_mutated_gguf_files_are_refused_or_whole(count, tmp_path):
    """Their values are free, so what is accepted has the file's shapes, in numbers that are
    there.
    """
    pytest.importorskip("gguf")
    blocks = np.arange(4 * 34, dtype=np.uint8).reshape(2, 68)
    tensors = {"a": (blocks, "Q8_0"), "b": (np.ones((3, 4), np.float32), "F32")}
    whole = write_gguf(tmp_path / "whole.gguf", tensors).read_bytes()

    def case(rng):
        (tmp_path / "x.gguf").write_bytes(mutate_bytes(whole, rng))
        found = tensor_files.Tensors(tmp_path / "x.gguf")
        for name, (dtype, shape) in found.described().items():
            read = found.read(name)
            assert (read.dtype, tuple(read.shape)) == (dtype, shape)
        return len(found.keys())

    verdicts = [verdict for verdict, _ in try_cases(count, case)]
    assert verdicts.count("refused") > count / 3 and verdicts.count("accepted") > count / 20


def cut_short(file, rng):
    """The first bytes alone, mutated."""
    file.write_bytes(mutate_bytes(file.read_bytes()[:500], rng))


def swap_for_link(file, rng):
    """A shard becomes a link out of its folder, to the whole file."""
    outside = file.parents[2] / file.name
    file.rename(outside)
    file.symlink_to(outside)


@pytest.mark.parametrize("count", BOTH)
def test_mutated_text_encoders_are_refused_or_whole(count, tmp_path):
    parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    options = dict(device="cpu", dtype=torch.bfloat16)
    whole = load_text_encoders(str(TINY), str(TINY), **options)
    autoencoder = sources.load_state(sources.open_source(TINY, part="vae"))

    def case(rng):
        place = tmp_path / "case"
        shutil.rmtree(place, ignore_errors=True)
        for part in parts:
            shutil.copytree(TINY / part, place / part)
        part = rng.choice(parts)
        files = sorted(f for f in (place / part).iterdir() if f.suffix in (".json", ".safetensors"))
        file = rng.choice(files)
        (change_header if file.suffix == ".safetensors" else mutated)(file, rng)
        if part == "vae":
            loaded = sources.load_state(sources.open_source(place, part="vae"))
            assert all(torch.equal(loaded[k], t) for k, t in autoencoder.items())
            return part
        encoders = load_text_encoders(str(place), str(place), **options)
        for ours, theirs in ((encoders.t5, whole.t5), (encoders.clip, whole.clip)):
            assert all(
                torch.equal(a, b)
                for a, b in zip(ours.state_dict().values(), theirs.state_dict().values())
            )
        txt, pooled = encoders.encode(["a red circle"], 16)
        assert txt.shape == (1, 16, 128) and pooled.shape == (1, 128)
        return part

    verdicts = [verdict for verdict, _ in try_cases(count // 4, case)]
    assert verdicts.count("refused") > len(verdicts) / 5 and verdicts.count("accepted")
