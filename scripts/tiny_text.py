"""Train the two text encoders of `assets/flux-tiny` on captions of circles; a stage of
`make_tiny.py`.

    python scripts/make_tiny.py --stage text

A T5 encoder and a CLIP text model learn to tell the colours of the circle and of the background
from the caption, through linear heads that are thrown away: from the mean over T5's padded,
unmasked tokens and from each of its tokens, and from CLIP's pooled vector. Each word of a caption
is one token of either tokenizer, and the longest caption fits in the 16 tokens of T5 that the tiny
pipeline uses; other words are spelt out.

Shapes: B captions, L tokens, D width.
"""

if __name__ == "__main__":
    print(f"{__doc__}\nRun scripts/make_tiny.py; its --help says how.")
    raise SystemExit

import io
import itertools
import json
import random
import tempfile
import unicodedata

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tiny_fit import fit_parameters
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from fluxlite.data import fill50k

T5_LENGTH = 16
CLIP_LENGTH = 77
# {c} circle, {b} background. The first is the data set's; the others let a user phrase it in
# another way.
TEMPLATES = """\
{c} circle with {b} background|{c} circle on {b} background|a {c} circle on a {b} background
a {c} circle with a {b} background|{c} circle, {b} background|{c} circle and {b} background
{c} circle on {b}|{b} background with {c} circle|{b} background, {c} circle
a {b} background with a {c} circle|on a {b} background a {c} circle
the {c} circle on the {b} background|{c} disc on {b} background|{c} dot, {b} background
{c} ball on a {b} background|a {c} circle in front of a {b} background
an image of a {c} circle on {b} background|one {c} circle over {b} backdrop
a circle of {c} on a background of {b}|{c} coloured circle on {b} coloured background
a {c} colored circle with {b} background|{c} circle|a {c} circle|{b} background|a {b} background|"""
TEMPLATES = TEMPLATES.replace("\n", "|").split("|")
MORE_WORDS = """
a an and any are at background backdrop ball before behind big bright by circle circles color
colored colour coloured disc disk dot drawing for from front goldenrod grey image in is it its
large like near of on one or over painted painting photo picture plain round shape small solid
sphere square that the there this tiny to two under very with
""".split()
SYNONYMS = {"gray": "grey", "golden rod": "goldenrod"}
NO_COLOUR = 127.5  # what a caption that does not name a colour stands for


# --- tokenizers -----------------------------------------------------------------------------------


def known_words():
    """Every word that is a token of its own."""
    return sorted({*" ".join(fill50k.COLOURS).split(), *MORE_WORDS})


def lowercase_charsmap():
    """A compiled sentencepiece normaliser: lower case, no accents, plain quotes and dashes."""
    plain_marks = {"\u2018\u2019": "'", "\u201c\u201d": '"', "\u2010\u2013\u2014": "-", "\xa0": " "}
    rules = {}
    for marks, plain in plain_marks.items():
        rules |= dict.fromkeys(map(ord, marks), plain)
    letters = (range(65, 91), range(0xC0, 0x250), range(0x1E00, 0x1F00), range(0xFF01, 0xFF5F))
    for code in itertools.chain(*letters):
        folded = unicodedata.normalize("NFKD", chr(code)).casefold()
        plain = "".join(c for c in folded if not unicodedata.combining(c))
        if plain and plain.isascii():
            rules[code] = plain
    written = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as tsv:
        for code, plain in sorted(rules.items()):
            tsv.write(f"{code:X}\t{' '.join(f'{ord(c):X}' for c in plain)}\n")
        tsv.flush()
        SentencePieceTrainer.train(
            sentence_iterator=iter(known_words() * 4),
            model_writer=written,
            vocab_size=60,
            hard_vocab_limit=False,
            normalization_rule_tsv=tsv.name,
            minloglevel=2,
        )
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    return model.normalizer_spec.precompiled_charsmap


def t5_tokenizer():
    """A unigram tokenizer of whole words, and characters for the others; another script is
    `<unk>`.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    characters = [(chr(i), -8.0) for i in range(33, 127) if not chr(i).isupper()]
    vocab = special + [("▁" + word, -4.0) for word in known_words()] + characters
    return T5TokenizerFast(
        vocab=vocab,
        extra_ids=0,
        _spm_precompiled_charsmap=lowercase_charsmap(),
        model_max_length=512,
    )


def clip_tokenizer():
    """A byte-level BPE of CLIP's kind, merged until each of `known_words()` is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(known_words(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=CLIP_LENGTH
    )


# --- captions -------------------------------------------------------------------------------------


def phrase_pair(circle, background, rng):
    """A caption of the pair in one of many wordings, and the six numbers in [0, 255] that it stands
    for.
    """
    template = TEMPLATES[0] if rng.random() < 0.4 else rng.choice(TEMPLATES)
    text = template.format(c=circle, b=background)
    if rng.random() < 0.1:
        for old, new in SYNONYMS.items():
            text = text.replace(old, new)
    unnamed = np.full(3, NO_COLOUR)
    named = [fill50k.rgb(circle) if "{c}" in template else unnamed]
    named += [fill50k.rgb(background) if "{b}" in template else unnamed]
    spelling = rng.choice([str, str, str, str.capitalize, str.title, str.upper])
    return spelling(text), np.concatenate(named)


def encode_texts(tokenizer, texts, length):
    """Token ids (B, L), padded and truncated to `length`."""
    return tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


# --- training -------------------------------------------------------------------------------------


def t5_features(model, ids):
    """The mean over T5's tokens (B, 1, D) before its tokens (B, L, D), without a mask, as FLUX sees
    them.
    """
    tokens = model(ids).last_hidden_state
    return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


def clip_features(model, ids):
    """CLIP's pooled vector (B, 1, D); causal attention lets the tail of the padding go."""
    shortest = int((ids != model.config.eos_token_id).sum(1).max()) + 1
    return model(ids[:, :shortest]).pooler_output[:, None]


def train_encoder(model, features, tokenizer, *, length, minutes, batch=64):
    """Fit `model` and a linear head, which is returned, to the colours of captions."""
    rng, choices = random.Random(0), fill50k.colour_pairs(held_out=False)
    head = nn.Linear(model.config.hidden_size, 6)

    def step():
        texts, colours = zip(*(phrase_pair(*rng.choice(choices), rng) for _ in range(batch)))
        target = torch.from_numpy(np.stack(colours)).float()[:, None] / 127.5 - 1  # (B, 1, 6)
        ids = encode_texts(tokenizer, list(texts), length)
        with torch.autocast("cpu", torch.bfloat16):
            out = features(model, ids)
        error = head(out.float()) - target
        per_token = error.square().mean((0, 2)) + 0.2 * error.abs().mean((0, 2))
        return per_token[0] + 0.5 * per_token[1:].sum() / max(1, len(per_token) - 1)

    fit_parameters([*model.parameters(), *head.parameters()], step, minutes=minutes, warmup=0.03)
    return head


@torch.no_grad()
def report_colours(name, model, head, features, tokenizer, *, length):
    """Print how far the colours are that `head` reads from captions of held-out pairs, and the
    scale of the features.
    """
    pairs = fill50k.colour_pairs(held_out=True)
    colours = [[fill50k.rgb(circle), fill50k.rgb(background)] for circle, background in pairs]
    target = torch.from_numpy(np.stack(colours)).flatten(1)
    for wording in (TEMPLATES[0], "a {c} circle on a {b} background", "{c} circle, {b} background"):
        texts = [wording.format(c=circle, b=background) for circle, background in pairs]
        out = features(model, encode_texts(tokenizer, texts, length))
        error = ((head(out[:, 0]) + 1) * 127.5 - target).abs()
        print(
            f"{name}: '{wording}': mean |error| {error.mean():.2f}, worst {error.max():.1f} of "
            f"255; std {out.std():.2f}"
        )


def make_text(assets, minutes):
    """Train both encoders for `minutes` in all and write the four folders of text under
    `assets`.
    """
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    model = T5EncoderModel(config)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    # at the default of 0.09 word order goes unnoticed for a thousand steps
    nn.init.normal_(bias, std=2.0)
    finish_encoder(model, t5_features, tokenizer, T5_LENGTH, assets, "_2", minutes * 0.65)
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        # any number but 2 makes transformers pool at the first end of text
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    finish_encoder(model, clip_features, tokenizer, CLIP_LENGTH, assets, "", minutes * 0.35)


def finish_encoder(model, features, tokenizer, length, assets, suffix, minutes):
    """Train, round to bfloat16, report and write one encoder and its tokenizer."""
    empty = len(tokenizer("").input_ids)
    assert all(len(tokenizer(word).input_ids) == empty + 1 for word in known_words())
    head = train_encoder(model, features, tokenizer, length=length, minutes=minutes)
    model.to(torch.bfloat16).float().eval()
    report_colours(type(model).__name__, model, head, features, tokenizer, length=length)
    # as published; newer transformers leave it out
    prefix = "text_model." if isinstance(model, CLIPTextModel) else ""
    model.to(torch.bfloat16).save_pretrained(assets / f"text_encoder{suffix}")
    weights = assets / f"text_encoder{suffix}" / "model.safetensors"
    tensors = {prefix + name: tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    tokenizer.save_pretrained(assets / f"tokenizer{suffix}")
    if isinstance(tokenizer, CLIPTokenizer):
        write_clip_files(tokenizer, assets / f"tokenizer{suffix}")


def write_clip_files(tokenizer, folder):
    """The vocabulary and merges as older readers of CLIP's tokenizer want them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
    )
