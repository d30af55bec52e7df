"""Prompts to what the transformer is conditioned on: T5's tokens and CLIP's pooled vector, as
diffusers' FluxPipeline encodes them.

    tiny = "assets/flux-tiny"
    encoders = load_text_encoders(tiny, tiny, device="cpu", dtype=torch.float32)
    txt, pooled = encoders.encode(["red circle with blue background"], max_sequence_length=16)

Shapes: B prompts, L tokens, D width of T5, P width of CLIP.
"""

import hashlib
import logging
from functools import cached_property, partial
from operator import itemgetter

import torch

from fluxlite.data.transfers import send_tensor
from fluxlite.weights.encoder_files import (
    CLIP,
    READ_SUFFIXES,
    T5,
    check_tokens,
    check_width,
    load_model,
    load_tokenizer,
    locate_encoder,
    open_encoder,
    quiet_transformers,
)

log = logging.getLogger("fluxlite")


class TextEncoders:
    """A T5 encoder and a CLIP text model with their tokenizers; made by `load_text_encoders`."""

    def __init__(self, t5, t5_tokenizer, clip, clip_tokenizer, places):
        self.t5, self.t5_tokenizer = t5, t5_tokenizer
        self.clip, self.clip_tokenizer = clip, clip_tokenizer
        self.places = places  # files and folders
        self.text_width = t5.config.d_model
        self.pooled_width = clip.config.hidden_size
        self._reported = set()

    @torch.no_grad()  # not inference mode, whose tensors cannot take part in a training step
    def encode(self, prompts, max_sequence_length):
        """T5's tokens (B, L, D), L = `max_sequence_length`, and CLIP's pooled vectors (B, P).

        T5 sees its padding unmasked; CLIP takes the first 77 tokens. Matches
        FluxPipeline.encode_prompt.
        """
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r} must be a list of at least one string")
        for prompt in prompts:
            check_encodable(prompt)
        positions = self.clip.config.max_position_embeddings
        clip_length = min(self.clip_tokenizer.model_max_length, positions)
        seen = f"T5 still reads up to {max_sequence_length} tokens"
        clip_ids = self._tokenize("CLIP", self.clip_tokenizer, prompts, clip_length, seen)
        remedy = "raise the maximum sequence length or shorten the prompt"
        t5_ids = self._tokenize("T5", self.t5_tokenizer, prompts, max_sequence_length, remedy)
        t5_ids, clip_ids = (send_tensor(ids, self.clip.device) for ids in (t5_ids, clip_ids))
        txt = self.t5(t5_ids).last_hidden_state
        pooled = self.clip(clip_ids).pooler_output
        return txt.to(self.t5.dtype), pooled.to(self.clip.dtype)

    def _tokenize(self, name, tokenizer, prompts, length, remark):
        """Token ids (B, length); the first prompt that does not fit is reported once."""
        if name not in self._reported:
            counts = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids]
            count, prompt = max(zip(counts, prompts), key=itemgetter(0))
            if count > length:
                self._reported.add(name)
                text = prompt if len(prompt) <= 60 else prompt[:57] + "..."
                shown = name, length, count, text, remark
                log.warning("%s reads %d of the %d tokens of %r: %s", *shown)
        options = dict(padding="max_length", truncation=True, return_tensors="pt")
        return tokenizer(prompts, max_length=length, **options).input_ids

    @cached_property
    def digest(self):
        """Sixteen hexadecimal digits that name weights, settings and tokenizers of both encoders.

        Reads every file once, some ten seconds for T5-XXL.
        """
        total = hashlib.sha256()
        for place in self.places:
            inside = place.iterdir() if place.is_dir() else ()
            read = [p for p in inside if p.suffix in READ_SUFFIXES]
            for path in sorted(read) if place.is_dir() else [place]:
                total.update(f"{path.name} {path.stat().st_size}\n".encode())
                with open(path, "rb") as file:
                    while block := file.read(1 << 22):
                        total.update(block)
        return total.hexdigest()[:16]


def open_encoders(t5, clip, tokenizers=None, fitting=None):
    """[(`OpenEncoder`, folder of its tokenizer)] of T5 and of CLIP, as `load_text_encoders` takes
    them; nothing is loaded. Raises `ValueError`.
    """
    named = (t5, T5), (clip, CLIP)
    places = [(*locate_encoder(where, kind, tokenizers), kind) for where, kind in named]
    opened = [(open_encoder(place, kind, folder), folder) for place, folder, kind in places]
    for encoder, _ in opened if fitting else ():
        check_width(encoder, fitting)
    return opened


def load_text_encoders(t5, clip, *, device, dtype, t5_device=None, tokenizers=None, fitting=None):
    """The encoders in `t5` and `clip`, each a folder, a file or a hub repository, frozen, in
    `dtype`.

    T5, by far the larger, may go to a `t5_device` of its own. `tokenizers` is a pipeline whose
    tokenizers are taken, for files that have none beside them. `fitting` is the configuration of
    the transformer whose widths they have.
    Raises `ValueError` that names `model.t5` or `model.clip` where one cannot be found, fetched or
    loaded whole.
    """
    (of_t5, t5_folder), (of_clip, clip_folder) = open_encoders(t5, clip, tokenizers, fitting)
    with quiet_transformers():
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        t5_tokenizer = load_tokenizer(T5TokenizerFast, t5_folder, T5)
        clip_tokenizer = load_tokenizer(CLIPTokenizer, clip_folder, CLIP)
        t5 = load_model(T5EncoderModel, of_t5, dtype).to(t5_device or device)
        clip = load_model(CLIPTextModel, of_clip, dtype).to(device)
    check_tokens(t5_tokenizer, t5.config, t5_folder, T5)
    check_tokens(clip_tokenizer, clip.config, clip_folder, CLIP)
    places = (of_t5.where, t5_folder, of_clip.where, clip_folder)
    return TextEncoders(t5, t5_tokenizer, clip, clip_tokenizer, places)


def load_tokenizers(t5, clip, max_sequence_length, tokenizers=None):
    """{"t5", "clip": a function of a text} → its tokens, how many of them the encoder reads, and
    the text that it then reads.

    Raises `ValueError` as `load_text_encoders` does; no weights are loaded.
    """
    (_, t5_folder), (clip, clip_folder) = open_encoders(t5, clip, tokenizers)
    positions = clip.values["max_position_embeddings"]
    with quiet_transformers():
        from transformers import CLIPTokenizer, T5TokenizerFast

        of_t5 = load_tokenizer(T5TokenizerFast, t5_folder, T5)
        of_clip = load_tokenizer(CLIPTokenizer, clip_folder, CLIP)
    clip_length = min(of_clip.model_max_length, positions)
    read_by = {"t5": (of_t5, max_sequence_length), "clip": (of_clip, clip_length)}
    return {name: partial(read_tokens, *how) for name, how in read_by.items()}


def read_tokens(tokenizer, length, text):
    """A text's tokens, how many of them are read, and what these say."""
    count = len(tokenizer(text, verbose=False).input_ids)
    ids = tokenizer(text, max_length=length, truncation=True).input_ids
    return count, length, tokenizer.decode(ids, skip_special_tokens=True)


def check_encodable(prompt):
    """Raise `ValueError` for a prompt that holds half a character, or bytes that are no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"prompt {prompt!a:.80} holds what is no character: write it in UTF-8"
        ) from None
