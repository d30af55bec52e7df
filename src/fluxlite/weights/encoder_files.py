"""Text encoders on a disk or the hub: found, checked whole, and loaded by transformers.

Either encoder is named by a folder (a whole pipeline, or an encoder with its tokenizer inside it or
beside it), by a repository of the Hugging Face hub, `owner/name[/folder]`, or by one file:
safetensors, all-in-one or GGUF, which has no tokenizer in it.
"""

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fluxlite.cli.descriptions import check_regular, read_json
from fluxlite.cli.messages import quiet_torchao
from fluxlite.cli.options import expand_home, option, shortened, typed_description
from fluxlite.weights import foreign, gguf_files, hub, layouts, part_files, tensor_files
from fluxlite.weights.hub import first_line, resolve_tiny

log = logging.getLogger("fluxlite")


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
    what: str  # as `foreign` calls it
    # of files without a config.json: ({name: value} that shapes show, `Tensors`) → further ones
    infer: Callable = lambda shown, tensors: {}
    renames: tuple = ()  # (in llama.cpp's names, here)
    width: str = ""  # of what it gives, in config.json
    width_key: str = ""  # in a transformer's configuration


def infer_t5(shown, tensors):
    """What shapes do not name of a T5's config.json, of version 1.1."""
    rows, _ = tensors.shape(T5_QUERIES)
    return {"d_kv": rows // shown["num_heads"], "feed_forward_proj": "gated-gelu"}


def infer_clip(shown, tensors):
    """What shapes do not show of a CLIP's config.json, as OpenAI's of width 768 has it."""
    heads = max(1, shown["hidden_size"] // CLIP_HEAD_WIDTH)
    return {"num_attention_heads": heads, "hidden_act": "quick_gelu", "eos_token_id": ARGMAX_EOS}


T5_QUERIES = "encoder.block.0.layer.0.SelfAttention.q.weight"
CLIP_HEAD_WIDTH = 64
ARGMAX_EOS = 2  # what CLIP's first configurations say: transformers then pools at the largest token

T5 = EncoderKind(
    key="model.t5",
    encoder="text_encoder_2",
    tokenizer="tokenizer_2",
    tokenizer_files=("tokenizer.json", "spiece.model"),
    model_types=("t5",),
    other_weights=("decoder.", "lm_head.", "dec.", "output.", "spiece_model", "logit_scale"),
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
        ((T5_QUERIES,), {1: "d_model"}),
    ),
    what=foreign.T5,
    width="d_model",
    width_key="text_width",
    infer=infer_t5,
    renames=(
        (r"^token_embd\.", "shared."),
        (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
        (r"^enc\.blk\.", "encoder.block."),
        (r"\.attn_rel_b\.", ".layer.0.SelfAttention.relative_attention_bias."),
        (r"\.attn_norm\.", ".layer.0.layer_norm."),
        (r"\.attn_([qkvo])\.", r".layer.0.SelfAttention.\1."),
        (r"\.ffn_norm\.", ".layer.1.layer_norm."),
        (r"\.ffn_gate\.", ".layer.1.DenseReluDense.wi_0."),
        (r"\.ffn_up\.", ".layer.1.DenseReluDense.wi_1."),
        (r"\.ffn_down\.", ".layer.1.DenseReluDense.wo."),
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
        "text_projection",
        "logit_scale",
        "text_model.embeddings.position_ids",
        "embeddings.position_ids",
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
    what=foreign.CLIP,
    width="hidden_size",
    width_key="pooled_width",
    infer=infer_clip,
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
    what=foreign.IMAGE_ENCODER,
)


# --- where the files are --------------------------------------------------------------------------


def locate_encoder(where, kind, tokenizers=None):
    """The folder or file of the encoder, and the folder of its tokenizer: inside it, beside it or
    in the pipeline; or in that whose folder or hub repository is `tokenizers`.

    Raises `ValueError`, naming the setting, where one of them is not there.
    """
    if not where:
        raise ValueError(
            f"{kind.key}={where} names no text encoder: set it to a pipeline's folder or hub "
            "repository"
        )
    folder = Path(expand_home(resolve_tiny(str(where)), kind.key))
    folder = folder if folder.exists() else download_encoder(str(where), kind)
    if folder.is_file():
        check_encoder_file(folder, kind)
        places = [root / kind.tokenizer for root in (folder.parent, folder.parent.parent)]
        return folder, find_tokenizer(places, where, kind, tokenizers)
    root = folder if (folder / kind.encoder).is_dir() else folder.parent
    encoder = folder / kind.encoder if root == folder else folder
    check_encoder(encoder, where, kind)
    return encoder, find_tokenizer([encoder, root / kind.tokenizer], where, kind, tokenizers)


def find_tokenizer(places, where, kind, tokenizers=None):
    """The first of some folders that holds a tokenizer, or the pipeline's that `tokenizers` names;
    raises `ValueError`.
    """
    key = TOKENIZERS if tokenizers else kind.key
    if tokenizers:
        patterns = [f"{kind.tokenizer}/*", f"{kind.encoder}/config.json"]
        root = hub.local_path(tokenizers, patterns, setting=TOKENIZERS)
        where, places = tokenizers, [root / kind.tokenizer]
    for place in places:
        if any((place / name).is_file() for name in kind.tokenizer_files):
            return place
    files, folders = (" or ".join(kind.tokenizer_files), " or into ".join(map(str, places)))
    raise ValueError(
        f"{key}={where} has no tokenizer: put {files} into {folders}, or name a pipeline's folder "
        f"as {TOKENIZERS}="
    )


TOKENIZERS = "model.tokenizers"


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


def check_encoder_file(file, kind):
    """Raise `ValueError`, naming the setting, where a file holds no such encoder."""
    try:
        shown_values(encoder_tensors(file, kind), file, kind)
    except ValueError as error:
        raise ValueError(f"{kind.key}={file}: {error}") from None


READ_SUFFIXES = (".json", ".model", ".safetensors", ".txt")
# Of a repository of one encoder; never *.safetensors, which in a pipeline's root are other models.
ROOT_FILES = """config.json tokenizer.json tokenizer_config.json special_tokens_map.json
    spiece.model vocab.json merges.txt model.safetensors model.safetensors.index.json
    model-0*-of-*.safetensors"""


def download_encoder(where, kind):
    """Fetch an encoder and its tokenizer from the hub or its cache, `owner/name[/folder]`; of
    `owner/name/x.safetensors` that file.
    """
    if where.endswith(hub.MODEL_SUFFIXES) and hub.is_repository(where):
        return hub.fetch_repository(where, [], key=kind.key)
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


def weight_files(folder):
    """The safetensors files that transformers reads in `folder`; raises `ValueError`."""
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if file.exists():
        return [file]
    if index.exists():
        return tensor_files.indexed_files(index)
    raise ValueError(f"{folder} has no model.safetensors and no index of its shards")


@dataclass
class OpenEncoder:
    """An encoder on a disk, checked: its tensors, by transformers' names, and what it is."""

    where: Path  # folder or file
    kind: EncoderKind
    tensors: tensor_files.Tensors
    file: Path | None  # config.json
    values: dict  # of the kind's description; without a config.json all that makes the model


def open_encoder(encoder, kind, tokenizer=None):
    """The `OpenEncoder` of a folder or file; raises `ValueError` where config.json promises other
    than the weights have.

    transformers would make room for it first, however much it is.
    """
    try:
        if encoder.is_dir():
            check_plain_files(encoder)
        file = find_description(encoder, kind, tokenizer)
        said = read_description(file, kind) if file else None
        tensors = encoder_tensors(encoder, kind)
        shown = shown_values(tensors, encoder, kind)
        check_said(said or shown, shown, file)
    except ValueError as error:
        raise ValueError(f"{kind.key}: the weights do not load whole: {error}") from None
    return OpenEncoder(encoder, kind, tensors, file, said or shown | kind.infer(shown, tensors))


def check_width(opened, config):
    """Raise `ValueError` where an `OpenEncoder` does not fit a transformer of such a
    configuration.
    """
    width, key = opened.values[opened.kind.width], opened.kind.width_key
    if width != getattr(config, key):
        raise ValueError(
            f"{opened.kind.key} gives {width} channels, but the transformer has "
            f"model.{key}={getattr(config, key)}"
        )


def check_said(said, shown, file):
    """Raise `ValueError` where the config.json `file` says other than the weights show."""
    for name, value in shown.items():
        if said[name] != value:
            raise ValueError(
                f"{file} says {name}={shortened(said[name])}, and the weights have {value}: fetch "
                "both again"
            )


def find_description(encoder, kind, tokenizer=None):
    """The config.json of a folder; of a file that beside it or in its tokenizer's pipeline, None
    where there is none.
    """
    if encoder.is_dir():
        return encoder / "config.json"
    folders = [encoder.parent, *([tokenizer.parent / kind.encoder] if tokenizer else [])]
    files = [folder / "config.json" for folder in folders]
    there = (file for file in files if file.is_file())
    return next((f for f in there if read_json(f).get("model_type") in kind.model_types), None)


def read_description(file, kind):
    """{name: value} of an encoder's config.json; raises `ValueError`."""
    values = read_json(file)
    if values.get("quantization_config"):
        raise ValueError(f"{file} says that it is quantised, which is not supported yet")
    values = values.get("text_config") or values if values.get("model_type") == "clip" else values
    return vars(typed_description(file, kind.description, values, foreign=True))


def encoder_tensors(encoder, kind):
    """The `Tensors` of an encoder's folder or file, by transformers' names; raises `ValueError`."""
    files = weight_files(encoder) if encoder.is_dir() else None
    tensors = tensor_files.Tensors(encoder, files)
    tensors = part_files.own_weights(tensors, kind.encoder, expected=kind.what)
    tensors.set_aside([key for key in tensors.keys() if key.startswith(kind.other_weights)], {})
    tensors.rename({key: transformers_name(key, kind) for key in tensors.keys()})
    return tensors


def transformers_name(key, kind):
    """What transformers calls a tensor, which may have llama.cpp's name."""
    for pattern, name in kind.renames:
        key = re.sub(pattern, name, key)
    return key


def shown_values(tensors, encoder, kind):
    """{name: value} of config.json that an encoder's shapes show; raises `ValueError` where it is
    none.
    """
    tensors.described()  # of types that are weights'
    prefix = kind.prefix if any(key.startswith(kind.prefix) for key in tensors.keys()) else ""
    shown = {kind.blocks[0]: layouts.count_blocks(tensors.keys(), prefix + kind.blocks[1])}
    for names, dimensions in kind.shapes:
        shape = next(filter(None, (tensors.shape(prefix + name) for name in names)), None)
        if shape is None or len(shape) != 2:
            raise ValueError(f"{encoder} lacks {prefix}{names[0]}: {lacking_remedy(tensors, kind)}")
        shown |= {name: shape[axis] for axis, name in dimensions.items()}
    return shown


def lacking_remedy(tensors, kind):
    """What to do about a file that is not a whole encoder."""
    try:
        part, _, _ = layouts.recognise_layout(tensors.keys())
    except ValueError:
        return "fetch it again"
    return f"it is {layouts.ARTICLED[part]}, not {kind.what}"


def load_model(cls, opened, dtype):
    """The transformers model `cls` of an `OpenEncoder`, every weight accounted for, and frozen."""
    kind, where, tensors = opened.kind, opened.where, opened.tensors
    size = tensor_files.num_bytes(tensors.described())
    if not opened.file:
        log.info("%s has no config.json: what its shapes do not show is as in FLUX.1", where)
    with library_errors(kind, "encoder", where):
        config = cls.config_class(**opened.values)
        if opened.file:
            config = cls.config_class.from_pretrained(opened.file.parent, local_files_only=True)
        with gguf_files.timed_reading(where, tensors.metadata.get(gguf_files.TYPES), size):
            state = {name: tensors.read(name).to(dtype) for name in tensors.keys()}
        whole = dict(output_loading_info=True, ignore_mismatched_sizes=True)
        model, info = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, **whole
        )
    faults = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key) for key, *_ in info["mismatched_keys"]),
    }
    for fault, names in faults.items():
        if names:
            raise ValueError(
                f"{kind.key}: {where} has {len(names)} weights {fault} for its config.json, "
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
        with quiet_torchao():
            yield
    finally:
        their_log.set_verbosity(verbosity)
        if bars:
            their_log.enable_progress_bar()
