"""Text encoders: parity with diffusers, where files are looked for, and what is said when they are
not there.
"""

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxlite.weights.encoder_files import CLIP, T5, locate_encoder
from fluxlite.weights.text_encoders import load_text_encoders

TINY = Path(__file__).parent.parent / "assets" / "flux-tiny"
PROMPTS = [
    "red circle with blue background",
    "blue circle with red background",
    "Crème brûlée, 日本 \n two  spaces!",
    "",
]


def load(t5=TINY, clip=TINY, dtype=torch.float32):
    return load_text_encoders(str(t5), str(clip), device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def encoders():
    return load()


@pytest.fixture
def copy(tmp_path):
    """A copy of the text half of the tiny pipeline, to be broken."""
    for name in (T5.encoder, T5.tokenizer, CLIP.encoder, CLIP.tokenizer):
        shutil.copytree(TINY / name, tmp_path / name)
    return tmp_path


def reference(prompts, length, dtype):
    """FluxPipeline.encode_prompt of diffusers, from the same folders."""
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=CLIPTextModel.from_pretrained(TINY / "text_encoder", dtype=dtype),
        text_encoder_2=T5EncoderModel.from_pretrained(TINY / "text_encoder_2", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(TINY / "tokenizer_2"),
    )
    with torch.inference_mode():
        return pipeline.encode_prompt(
            prompts, device=torch.device("cpu"), max_sequence_length=length
        )[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [16, 64])
def test_encode_equals_flux_pipeline(dtype, length):
    prompts = PROMPTS + ["a very long prompt about a red circle " * 20]
    txt, pooled = load(dtype=dtype).encode(prompts, length)
    expected = reference(prompts, length, dtype)
    assert txt.shape == (len(prompts), length, 128) and txt.dtype == pooled.dtype == dtype
    assert torch.equal(txt, expected[0]) and torch.equal(pooled, expected[1])


def test_pooled_vector_is_that_of_the_first_end_of_text(encoders):
    ids = encoders.clip_tokenizer(
        PROMPTS, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    hidden = encoders.clip(ids).last_hidden_state
    first = [row.tolist().index(encoders.clip_tokenizer.eos_token_id) for row in ids]
    assert first[0] == 6 and first[3] == 1
    assert torch.equal(encoders.encode(PROMPTS, 16)[1], hidden[torch.arange(4), first])
    assert (hidden[0, 6] - hidden[0, 7]).norm() > 0.01 * hidden[0, 6].norm()


def test_word_order_changes_both_outputs(encoders):
    txt, pooled = encoders.encode(PROMPTS[:2], 16)
    for a, b in (txt, pooled):
        assert (a - b).norm() > 0.3 * a.norm()


def test_longest_caption_fits_in_16_tokens_a_word_each(encoders):
    text = "light golden rod yellow circle with light golden rod yellow background"
    assert len(encoders.t5_tokenizer(text).input_ids) == 11 + 1
    assert len(encoders.clip_tokenizer(text).input_ids) == 11 + 2


def test_outputs_can_take_part_in_training(encoders):
    txt, _ = encoders.encode(PROMPTS[:1], 16)
    weight = torch.ones(128, 1, requires_grad=True)
    (txt @ weight).sum().backward()
    assert weight.grad.abs().sum() > 0
    assert not any(
        p.requires_grad for model in (encoders.t5, encoders.clip) for p in model.parameters()
    )
    assert not encoders.t5.training and not encoders.clip.training


def test_widths_are_those_of_the_outputs(encoders):
    txt, pooled = encoders.encode(PROMPTS[:1], 16)
    assert (encoders.text_width, encoders.pooled_width) == (txt.shape[-1], pooled.shape[-1])


def test_truncation_is_reported_once_and_says_what_t5_reads(caplog):
    encoders = load()
    with caplog.at_level(logging.INFO, "fluxlite"):
        encoders.encode(["short"], 64)
        assert not caplog.messages
        for _ in range(2):
            encoders.encode(["red", "red " * 90], 128)
        assert len(caplog.messages) == 1
        assert (
            "CLIP reads 77 of the 92 tokens" in caplog.messages[0]
            and "T5 still reads up to 128" in caplog.messages[0]
        )
        encoders.encode(["red " * 90], 16)
        assert len(caplog.messages) == 2 and "T5 reads 16 of the 91 tokens" in caplog.messages[1]


def test_loading_is_silent(capfd):
    load().encode(["red " * 90], 16)
    out, err = capfd.readouterr()
    assert out == "" and "Loading" not in err and "Token indices" not in err


def test_importing_does_not_import_transformers():
    code = "import sys, fluxlite.weights.text_encoders; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_prompts_must_be_a_list(encoders):
    for prompts in ([], "red"):
        with pytest.raises(ValueError, match="list"):
            encoders.encode(prompts, 16)


# --- folders --------------------------------------------------------------------------------------


def test_tokenizer_is_found_in_the_pipeline_beside_the_encoder_and_inside_it(copy):
    for kind in (T5, CLIP):
        expected = (copy / kind.encoder, copy / kind.tokenizer)
        assert locate_encoder(copy, kind) == locate_encoder(copy / kind.encoder, kind) == expected
        for file in (copy / kind.tokenizer).iterdir():
            shutil.copy(file, copy / kind.encoder)
        shutil.rmtree(copy / kind.tokenizer)
        assert (
            locate_encoder(copy, kind)
            == locate_encoder(copy / kind.encoder, kind)
            == (copy / kind.encoder, copy / kind.encoder)
        )
    txt, pooled = load(copy / T5.encoder, copy).encode(PROMPTS, 16)
    expected = load().encode(PROMPTS, 16)
    assert torch.equal(txt, expected[0]) and torch.equal(pooled, expected[1])


@pytest.mark.parametrize("kind", [T5, CLIP])
def test_missing_parts_are_errors_that_name_the_setting(copy, kind):
    other = CLIP if kind is T5 else T5
    with pytest.raises(ValueError, match=f"{kind.key}=.*{other.encoder} holds a model of type"):
        locate_encoder(copy / other.encoder, kind)
    shutil.rmtree(copy / kind.tokenizer)
    with pytest.raises(
        ValueError, match=f"{kind.key}=.*no tokenizer: put tokenizer.json.*{kind.tokenizer}"
    ):
        locate_encoder(copy, kind)
    (copy / kind.encoder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{kind.key}=.*no weights"):
        locate_encoder(copy, kind)
    shutil.rmtree(copy / kind.encoder)
    with pytest.raises(ValueError, match=f"{kind.key}=.*config.json"):
        locate_encoder(copy, kind)
    for where in (copy / "absent", "", None, "one_word", "too/many/parts/here"):
        with pytest.raises(ValueError, match=f"{kind.key}="):
            locate_encoder(where, kind)


def test_unreachable_hub_fails_at_once_in_one_line():
    start = time.time()
    with pytest.raises(
        ValueError, match="model.t5=nobody-at-all/no-such-model is no folder"
    ) as caught:
        locate_encoder("nobody-at-all/no-such-model", T5)
    assert time.time() - start < 10 and "\n" not in str(caught.value)


def fake_hub(monkeypatch, result):
    def snapshot_download(repository, *, allow_patterns, **_):
        calls.append((repository, allow_patterns))
        if isinstance(result, Exception):
            raise result
        return str(result)

    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_repository_is_fetched_in_part(copy, monkeypatch):
    from fnmatch import fnmatch

    calls = fake_hub(monkeypatch, copy)
    assert (
        locate_encoder("owner/name", T5)
        == locate_encoder("owner/name/text_encoder_2", T5)
        == (copy / T5.encoder, copy / T5.tokenizer)
    )
    unwanted = [
        "flux1-dev.safetensors",
        "ae.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]
    wanted = [
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/config.json",
        "tokenizer_2/spiece.model",
    ]
    for repository, patterns in calls:
        assert repository == "owner/name"
        assert all(any(fnmatch(name, p) for p in patterns) for name in wanted)
        assert not any(fnmatch(name, p) for name in unwanted for p in patterns)


def test_gated_repository_says_how_to_get_in(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    fake_hub(
        monkeypatch, GatedRepoError.__new__(GatedRepoError)
    )  # its arguments depend on the HTTP library
    with pytest.raises(
        ValueError,
        match="model.clip=a/b is gated: accept its licence at https://huggingface.co/a/b, then run",
    ):
        locate_encoder("a/b", CLIP)


# --- weights --------------------------------------------------------------------------------------


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [T5, CLIP])
def test_weights_load_strictly(copy, kind):
    path = copy / kind.encoder / "model.safetensors"
    name = next(k for k in sorted(load_file(path)) if "layer" in k and "weight" in k)
    original = path.read_bytes()
    for change, message in [
        (lambda t: t.pop(name), "missing"),
        (lambda t: t.update(surplus=torch.ones(2)), "surplus|unexpected"),
        (lambda t: t.update({name: torch.ones(3)}), "of another shape|do not load whole"),
    ]:
        path.write_bytes(original)
        rewrite(path, change)
        with pytest.raises(ValueError, match=f"{kind.key}: .* weights ({message})"):
            load(copy, copy)
    path.write_bytes(original[:-1000])
    with pytest.raises(ValueError, match=f"{kind.key}: the weights .* no whole safetensors"):
        load(copy, copy)


def test_full_models_shards_and_tied_copies_load(copy, encoders):
    rewrite(
        copy / T5.encoder / "model.safetensors",
        lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()}),
    )
    rewrite(
        copy / T5.encoder / "model.safetensors",
        lambda t: t.update({"decoder.x": torch.ones(1), "lm_head.weight": torch.ones(1)}),
    )
    vision = {
        "vision_model.a": torch.ones(1),
        "logit_scale": torch.ones(1),
        "text_projection.weight": torch.ones(1),
    }
    rewrite(copy / CLIP.encoder / "model.safetensors", lambda t: t.update(vision))
    rewrite(
        copy / CLIP.encoder / "model.safetensors",
        lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    )
    tensors = load_file(copy / T5.encoder / "model.safetensors")
    (copy / T5.encoder / "model.safetensors").unlink()
    half = len(tensors) // 2
    shards = {
        f"model-0000{i + 1}-of-00002.safetensors": list(tensors)[i * half : (i + 1) * half + i]
        for i in range(2)
    }
    for file, names in shards.items():
        save_file(
            {k: tensors[k] for k in names}, copy / T5.encoder / file, metadata={"format": "pt"}
        )
    index = {
        "metadata": {},
        "weight_map": {k: file for file, names in shards.items() for k in names},
    }
    (copy / T5.encoder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(copy, copy)
    for a, b in zip(loaded.encode(PROMPTS, 16), encoders.encode(PROMPTS, 16)):
        assert torch.equal(a, b)
    (copy / T5.encoder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model.t5: the weights"):
        load(copy, copy)


def test_digest_names_the_content_and_not_the_place(copy, encoders):
    assert len(encoders.digest) == 16 and encoders.digest == load(copy, copy).digest
    changed = copy / CLIP.encoder / "model.safetensors"
    rewrite(changed, lambda t: t[sorted(t)[0]].view(-1)[0].add_(1))
    weights = load(copy, copy).digest
    (copy / T5.tokenizer / "tokenizer.json").write_text(
        (TINY / T5.tokenizer / "tokenizer.json").read_text() + "\n"
    )
    assert len({encoders.digest, weights, load(copy, copy).digest}) == 3


def test_a_clip_model_whose_weights_lack_the_prefix_is_the_same(tmp_path):
    """As transformers 5 names what it makes itself."""
    shutil.copytree(TINY, tmp_path / "pipe")
    file = tmp_path / "pipe" / "text_encoder" / "model.safetensors"
    save_file(
        {k.removeprefix("text_model."): v for k, v in load_file(file).items()},
        file,
        {"format": "pt"},
    )
    options = dict(device="cpu", dtype=torch.float32)
    found, known = (
        load_text_encoders(str(p), str(p), **options) for p in (tmp_path / "pipe", TINY)
    )
    assert torch.equal(found.encode(["red"], 16)[1], known.encode(["red"], 16)[1])
