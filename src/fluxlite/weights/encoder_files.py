"""Text encoders on a disk or the hub: found, checked whole, and loaded by transformers.

Either encoder is named by a folder (a whole pipeline, or an encoder with its tokenizer inside it or
beside it) or by a repository of the Hugging Face hub, `owner/name[/folder]`.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from fluxlite.cli.descriptions import check_regular, read_json
from fluxlite.cli.options import expand_home, option, shortened, typed_description
from fluxlite.weights import hub, layouts, tensor_files
from fluxlite.weights.hub import first_line, resolve_tiny


@dataclass
class T5Description:
    """What is read of a T5 encoder's config.json; the defaults are transformers'."""

    vocab_size: int = option(32128, "tokens that it knows", at_least=1)
    d_model: int = option(512, "width", at_least=1)
    d_kv: int = option(64, "channels of a head", at_least=1)
    d_ff: int = option(2048, "width of the MLPs", at_least=1)
    num_layers: int = option(6, "blocks", at_least=1)
    num_heads: int = option(8, "heads", at_least=1)
    relative_attention_num_buckets: int = option(32, "distances told apart", at_least=2)


@dataclass
class ClipDescription:
    """What is read of a CLIP text model's config.json; the defaults are transformers'."""

    vocab_size: int = option(49408, "tokens that it knows", at_least=1)
    hidden_size: int = option(512, "width", at_least=1)
    intermediate_size: int = option(2048, "width of the MLPs", at_least=1)
    num_hidden_layers: int = option(12, "blocks", at_least=1)
    num_attention_heads: int = option(8, "heads", at_least=1)
    max_position_embeddings: int = option(77, "tokens that it reads", at_least=2)


@dataclass
class SiglipDescription:
    """What is read of a SigLIP image encoder's config.json; the defaults are transformers'."""

    hidden_size: int = option(768, "width", at_least=1)
    intermediate_size: int = option(3072, "width of the MLPs", at_least=1)
    num_hidden_layers: int = option(12, "blocks", at_least=1)
    num_attention_heads: int = option(12, "heads", at_least=1)
    image_size: int = option(224, "pixels along a side", at_least=1, at_most=10_000)
    patch_size: int = option(16, "pixels along a token's side", at_least=1)


@dataclass(frozen=True)
class EncoderKind:
    """What tells encoders apart on disk."""

    key: str  # the setting that names it
    encoder: str  # its folder in a pipeline
    tokenizer: str
    tokenizer_files: tuple  # any of these makes a tokenizer
    model_types: tuple  # in config.json
    other_weights: tuple  # prefixes of weights that full models have and this part does not
    description: type  # of config.json
    prefix: str  # of the weights below, which some versions of transformers leave out
    blocks: tuple  # the number of blocks in config.json, and their names
    shapes: tuple  # (tensors, of which one is there, {dimension: what config.json calls it})


T5 = EncoderKind(
    key="model.t5",
    encoder="text_encoder_2",
    tokenizer="tokenizer_2",
    tokenizer_files=("tokenizer.json", "spiece.model"),
    model_types=("t5",),
    other_weights=("decoder.", "lm_head."),
    description=T5Description,
    prefix="",
    blocks=("num_layers", "encoder.block.{i}"),
    shapes=(
        (("shared.weight", "encoder.embed_tokens.weight"), {0: "vocab_size", 1: "d_model"}),
        (
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
            {0: "relative_attention_num_buckets", 1: "num_heads"},
        ),
        (("encoder.block.0.layer.1.DenseReluDense.wo.weight",), {0: "d_model", 1: "d_ff"}),
    ),
)
CLIP = EncoderKind(
    key="model.clip",
    encoder="text_encoder",
    tokenizer="tokenizer",
    tokenizer_files=("tokenizer.json", "vocab.json"),
    model_types=("clip_text_model", "clip"),
    other_weights=(
        "vision_model.",
        "visual_projection.",
        "text_projection.",
        "logit_scale",
        "text_model.embeddings.position_ids",
    ),
    description=ClipDescription,
    prefix="text_model.",
    blocks=("num_hidden_layers", "encoder.layers.{i}"),
    shapes=(
        (
            ("embeddings.position_embedding.weight",),
            {0: "max_position_embeddings", 1: "hidden_size"},
        ),
        (("embeddings.token_embedding.weight",), {0: "vocab_size"}),
        (("encoder.layers.0.mlp.fc1.weight",), {0: "intermediate_size"}),
    ),
)
SIGLIP = EncoderKind(
    key="redux.checkpoint",
    encoder="image_encoder",
    tokenizer="",
    tokenizer_files=(),
    model_types=("siglip_vision_model",),
    other_weights=(),
    description=SiglipDescription,
    prefix="vision_model.",
    blocks=("num_hidden_layers", "encoder.layers.{i}"),
    shapes=(
        (("embeddings.position_embedding.weight",), {1: "hidden_size"}),
        (("encoder.layers.0.mlp.fc1.weight",), {0: "intermediate_size"}),
    ),
)


# --- where the files are --------------------------------------------------------------------------


def locate_encoder(where, kind):
    """The folder of the encoder and of its tokenizer: inside it, beside it or in the pipeline.

    Raises `ValueError`, naming the setting, where one of them is not there.
    """
    if not where:
        raise ValueError(
            f"{kind.key}={where} names no text encoder: set it to a pipeline's folder or hub "
            "repository"
        )
    folder = Path(expand_home(resolve_tiny(str(where)), kind.key))
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{kind.key}={where} is a file, and an encoder in one file is not supported yet: name "
            f"a folder with config.json, the weights and a tokenizer, as {kind.encoder} of a "
            "pipeline"
        )
    folder = folder if folder.is_dir() else download_encoder(str(where), kind)
    root = folder if (folder / kind.encoder).is_dir() else folder.parent
    encoder = folder / kind.encoder if root == folder else folder
    check_encoder(encoder, where, kind)
    for tokenizer in (encoder, root / kind.tokenizer):
        if any((tokenizer / name).is_file() for name in kind.tokenizer_files):
            return encoder, tokenizer
    files = " or ".join(kind.tokenizer_files)
    raise ValueError(
        f"{kind.key}={where} has no tokenizer: put {files} into {encoder} or into "
        f"{root / kind.tokenizer}"
    )


def check_encoder(encoder, where, kind):
    """Raise `ValueError`, naming the setting, where a folder holds no such encoder."""
    if not (encoder / "config.json").is_file():
        raise ValueError(
            f"{kind.key}={where} has no {kind.encoder}/config.json nor config.json: name a "
            "pipeline's folder or an encoder's"
        )
    try:
        model_type = read_json(encoder / "config.json").get("model_type")
    except ValueError as error:
        raise ValueError(f"{kind.key}={where}: {error}") from None
    if model_type not in kind.model_types:
        raise ValueError(
            f"{kind.key}={where} holds a model of type {model_type}, not {kind.model_types[0]}: "
            "name another folder"
        )
    if not any(encoder.glob("*.safetensors")):
        raise ValueError(f"{kind.key}={where} has no weights: {encoder} needs .safetensors files")


READ_SUFFIXES = (".json", ".model", ".safetensors", ".txt")
# Of a repository of one encoder; never *.safetensors, which in a pipeline's root are other models.
ROOT_FILES = """config.json tokenizer.json tokenizer_config.json special_tokens_map.json
    spiece.model vocab.json merges.txt model.safetensors model.safetensors.index.json
    model-0*-of-*.safetensors"""


def download_encoder(where, kind):
    """Fetch an encoder and its tokenizer from the hub or its cache, `owner/name[/folder]`."""
    owner, name, *inside = [*where.split("/"), "", ""][: max(2, where.count("/") + 1)]
    if not hub.is_repository(where) or len(inside) > 1:
        raise ValueError(
            f"{kind.key}={where} is no folder: name one, such as assets/flux-tiny, or a hub "
            "repository owner/name"
        )
    folder = inside[0] if inside else kind.encoder
    patterns = [f"{folder}/*{suffix}" for suffix in READ_SUFFIXES] + [f"{kind.tokenizer}/*"]
    patterns += ROOT_FILES.split() if not inside else []
    return hub.fetch_repository(f"{owner}/{name}", patterns, key=kind.key).joinpath(*inside)


# --- loading --------------------------------------------------------------------------------------


@contextlib.contextmanager
def library_errors(kind, what, folder):
    """Turn whatever transformers and tokenizers raise for damaged files into one `ValueError`.

    They raise nearly anything: OSError, KeyError, TypeError, and panics of Rust, which are no
    `Exception`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(
            f"{kind.key}: the {what} in {folder} is incomplete or damaged "
            f"({type(error).__name__}: {first_line(error)}); fetch it again"
        ) from error


def check_plain_files(folder):
    """Raise `ValueError` for a pipe or a device in a folder: a library would wait for it."""
    for file in folder.iterdir():
        if not file.is_dir():
            check_regular(file)


def load_tokenizer(cls, folder, kind):
    """The tokenizer `cls` in `folder`; raises `ValueError`."""
    with library_errors(kind, "tokenizer", folder):
        check_plain_files(folder)
        for file in (folder / name for name in TOKENIZER_JSON):
            if file.exists():
                read_json(file)  # the library reads NaN, and of two values of one name the second
        return cls.from_pretrained(folder, local_files_only=True)


TOKENIZER_JSON = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json"),
)


def check_tokens(tokenizer, config, folder, kind):
    """Raise `ValueError` where a tokenizer is not that of a model of configuration `config`."""
    with library_errors(kind, "tokenizer", folder):
        options = dict(padding="max_length", truncation=True, return_tensors="pt")
        ids = tokenizer(["a red circle"], max_length=PROBE_LENGTH, **options).input_ids
        whole = ids.shape == (1, PROBE_LENGTH) and len(tokenizer) <= config.vocab_size
        length = tokenizer.model_max_length
        if not whole or not isinstance(length, (int, float)) or length < 2:
            raise ValueError(
                f"{len(tokenizer)} tokens, texts of at most {length}, and the model knows "
                f"{config.vocab_size} tokens"
            )
        if kind is CLIP and config.eos_token_id not in (ARGMAX_EOS, tokenizer.eos_token_id):
            ends = f"{tokenizer.eos_token_id}, the model's with {config.eos_token_id}"
            raise ValueError(f"its texts end with {ends}")


PROBE_LENGTH = 8  # tokens
ARGMAX_EOS = 2  # what CLIP's first configurations say: transformers then pools at the largest token


def weight_files(folder):
    """The safetensors files that transformers reads in `folder`; raises `ValueError`."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.exists():
        return [file]
    if index.exists():
        return tensor_files.indexed_files(index)
    raise ValueError(f"{folder} has no model.safetensors and no index of its shards")


def check_description(folder, kind):
    """What config.json says; raises `ValueError` where it promises other than the weights have.

    transformers would make room for it first, however much it is.
    """
    check_plain_files(folder)
    file, values = folder / "config.json", read_json(folder / "config.json")
    if values.get("quantization_config"):
        raise ValueError(f"{file} says that it is quantised, which is not supported yet")
    values = values.get("text_config") or values if values.get("model_type") == "clip" else values
    described = typed_description(file, kind.description, values, foreign=True)
    tensors = tensor_files.Tensors(folder, weight_files(folder))
    prefix = kind.prefix if any(key.startswith(kind.prefix) for key in tensors.keys()) else ""
    shown = {kind.blocks[0]: layouts.count_blocks(tensors.keys(), prefix + kind.blocks[1])}
    for names, dimensions in kind.shapes:
        shape = next(filter(None, (tensors.shape(prefix + name) for name in names)), None)
        if shape is None or len(shape) != 2:
            raise ValueError(f"{folder} lacks {prefix}{names[0]}: fetch it again")
        shown |= {name: shape[axis] for axis, name in dimensions.items()}
    for name, value in shown.items():
        if getattr(described, name) != value:
            said = shortened(getattr(described, name))
            raise ValueError(
                f"{file} says {name}={said}, and the weights have {value}: fetch both again"
            )
    return described


def load_model(cls, folder, kind, dtype):
    """The transformers model `cls` in `folder`, every weight accounted for, and frozen."""
    try:
        check_description(folder, kind)
    except ValueError as error:
        raise ValueError(f"{kind.key}: the weights do not load whole: {error}") from None
    with library_errors(kind, "encoder", folder):
        whole = dict(use_safetensors=True, local_files_only=True, ignore_mismatched_sizes=True)
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **whole)
    unexpected = [k for k in info["unexpected_keys"] if not k.startswith(kind.other_weights)]
    faults = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(str(key) for key, *_ in info["mismatched_keys"]),
    }
    for fault, names in faults.items():
        if names:
            raise ValueError(
                f"{kind.key}: {folder} has {len(names)} weights {fault} for its config.json, "
                f"{names[0]} among them"
            )
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet_transformers():
    """Without transformers' progress bars and warnings, which concern its own authors; what is
    wrong is raised here.
    """
    from transformers.utils import logging as their_log

    verbosity, bars = their_log.get_verbosity(), their_log.is_progress_bar_enabled()
    their_log.set_verbosity_error()
    their_log.disable_progress_bar()
    try:
        yield
    finally:
        their_log.set_verbosity(verbosity)
        if bars:
            their_log.enable_progress_bar()
