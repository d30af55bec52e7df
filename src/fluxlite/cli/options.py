"""Settings and descriptions as dataclasses, each field with its help, range and choices declared
once.

@dataclass
class OptimConfig:
    lr: float = option(1e-4, "peak learning rate", at_least=0)

typed_options(OptimConfig, {"lr": 1e-3}, "optim.")    # checked, or a ValueError that names optim.lr

The same checks serve a command line and a description read from a disk.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import numbers
import operator
import os
import types
import typing
from dataclasses import field

RANGES = {  # name of the bound: what holds, and how an error says it
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


NUMBERS = {int: numbers.Integral, float: numbers.Real}


def option(default, help, **about):
    """A dataclass field with its `help` and, of the value or of a list's values, `choices` or
    bounds.

    The bounds are `at_least`, `above`, `at_most` and `below`. `verbatim`: the command line's text
    is taken as it stands. `path`: so is this, `~` is the home folder, and empty is refused.
    `only_given`: a word, as `pipe:`, with which a value does something and is therefore taken from
    the command line alone. `resume`: a run that goes on may change it, or with "elsewhere" name
    another place of the same. `group`: the Hydra group that sets it. `only_with`: {another key: its
    values with which this one is read}; given on a command line with others, it is refused. `key`:
    what errors call it where it is a flag. `short`: what a command line may call it. `rare`: only
    `--help all` names it. A default that is a list or a class is made anew for each instance;
    `MISSING` is none.
    """
    metadata = {"help": help, **about}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_fields(cls, prefix=""):
    """{dotted key: dataclass field} of a configuration and all below it."""
    hints, found = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= option_fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f
    return found


def option_value(config, key):
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


@contextlib.contextmanager
def naming_place(where):
    """Have a `ValueError` of the block begin with where its cause lies."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def set_options(config):
    """{dotted key: value} of what a configuration has that is not the default."""
    found = {}
    for key, f in option_fields(type(config)).items():
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        value = option_value(config, key)
        if value != default:
            found[key] = value
    return found


def change_options(config, values):
    """A configuration like `config` with other values, by dotted or `short` key or nested; where
    several belong one may stand alone.

    Raises `ValueError` that names the key.
    """
    fields, changed, seen = option_fields(type(config)), dataclasses.asdict(config), set()
    full = {f.metadata["short"]: key for key, f in fields.items() if "short" in f.metadata}
    for key, value in flat_values(values):
        key = full.get(key, key)
        if key not in fields:
            raise ValueError(f"{key} is not a key{nearest_key(key, fields)}")
        if key in seen:
            raise ValueError(f"{key} is there twice: name it once")
        seen.add(key)
        several = typing.get_origin(fields[key].type) is list and not isinstance(value, list)
        *path, last = key.split(".")
        at = functools.reduce(dict.__getitem__, path, changed)
        at[last] = [value] if several else value
    return typed_options(type(config), changed)


def flat_values(values, prefix=""):
    """(dotted key, value) of nested dictionaries; one that is empty is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat_values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def resumable_keys(cls, prefix="", everything=False):
    """The dotted keys that a resumed run may change: fields marked `resume`, and all below such a
    one.
    """
    hints, found = typing.get_type_hints(cls), set()
    for f in dataclasses.fields(cls):
        marked = everything or f.metadata.get("resume") is True
        if dataclasses.is_dataclass(hints[f.name]):
            found |= resumable_keys(hints[f.name], f"{prefix}{f.name}.", marked)
        elif marked:
            found.add(prefix + f.name)
    return found


def place_keys(cls):
    """The dotted keys of places that a resumed run may name anew: fields marked "elsewhere"."""
    fields = option_fields(cls).items()
    return {key for key, f in fields if f.metadata.get("resume") == "elsewhere"}


def same_option(cls, name, **changes):
    """A field declared as the field `name` of `cls` is, with another `default`, `help` or
    metadata.
    """
    f = next(f for f in dataclasses.fields(cls) if f.name == name)
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return option(**{"default": default, **f.metadata, **changes})


# A name in diffusers, NeMo or sd-scripts: ours, of which the first that is known counts.
OTHER_NAMES = {
    "blocks_to_swap": "parallel.swap_blocks",
    "callback_on_step_end": "on_step",
    "checkpointing_steps": "checkpoint.every",
    "ckpt_path": "model.checkpoint",
    "clip_version": "model.clip",
    "conditioning_scale": "controlnet.scale",
    "context_parallel_size": "parallel.cp",
    "control_guidance_end": "controlnet.end controls",
    "control_guidance_start": "controlnet.start controls",
    "control_mode": "controlnet.mode controls",
    "controlnet_conditioning_scale": "controlnet.scale controls",
    "discrete_flow_shift": "flow.shift",
    "factory": "recipe",
    "flux_ckpt": "model.checkpoint",
    "fp8_base": "model.quantize",
    "generator": "seed",
    "gradient_checkpointing": "parallel.activation_checkpointing",
    "guidance_scale": "flow.guidance guidance",
    "image_dir": "data.path",
    "inference_steps": "sample.steps steps",
    "instance_data_dir": "data.path",
    "instance_prompt": "data.template",
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup",
    "mask_image": "mask",
    "max_grad_norm": "optim.clip",
    "max_steps": "steps",
    "max_train_steps": "steps",
    "mixed_precision": "dtype",
    "network_alpha": "lora.alpha",
    "network_dim": "lora.rank",
    "network_weights": "lora.checkpoint",
    "num_images_per_prompt": "images_per_prompt",
    "num_inference_steps": "sample.steps steps",
    "num_joint_layers": "model.num_double_blocks",
    "num_repeats": "data.repeats",
    "optimizer_type": "optim.kind",
    "output_type": "decode",
    "padding_mask_crop": "crop",
    "pretrained_model_name_or_path": "model.checkpoint",
    "quantization_config": "quantize",
    "resume_from_checkpoint": "resume",
    "sample_every_n_steps": "sample.every",
    "save_every_n_steps": "checkpoint.every",
    "sigmas": "times",
    "t5_version": "model.t5",
    "tensor_model_parallel_size": "parallel.tp",
    "text_encoder": "clip",
    "text_encoder_2": "t5",
    "torch_dtype": "dtype",
    "train_batch_size": "data.micro_batch",
    "train_data_dir": "data.path",
    "true_cfg_scale": "true_cfg",
    "vae": "autoencoder",
    "vae_ckpt": "model.autoencoder",
}


def nearest_key(key, known, otherwise=""):
    """`: did you mean …?` for a key that is unknown: what is ours of another program's, else the
    nearest; `otherwise` where none is like it.
    """
    tail, tails = key.split(".")[-1], [k.split(".")[-1] for k in known]
    ours = OTHER_NAMES.get(tail.lstrip("-"), "").split()
    close = [k for k in ours if k in known] or difflib.get_close_matches(key, known, 1, 0.6)
    like = [tail] if tail in tails else difflib.get_close_matches(tail, tails, n=1, cutoff=0.8)
    if like and (not close or ("." not in key and tail in tails)):
        close = [k for k, of in zip(known, tails) if of == like[0]]
    return f": did you mean {close[0]}?" if close else otherwise


def typed_options(cls, values, prefix=""):
    """An instance of the dataclass `cls` from nested dictionaries, its types and bounds checked.

    Raises `ValueError` that names the key: unknown, missing, of a wrong type, out of bounds.
    """
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise ValueError(
            f"{prefix.rstrip('.') or cls.__name__} must be an object with named values"
        )
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(
                f"{prefix}{key} is not a "
                f"key{nearest_key(f'{prefix}{key}', [prefix + k for k in fields])}"
            )
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = typed_options(
                hints[key], {} if value is None else value, f"{prefix}{key}."
            )
        else:
            arguments[key] = checked_value(value, hints[key], fields[key].metadata, prefix + key)
    for name, f in fields.items():
        if f.metadata.get("path") and name not in arguments and isinstance(f.default, str):
            arguments[name] = expand_path(f.default, prefix + name)
    missing = [name for name, f in fields.items() if name not in arguments and _is_required(f)]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    return cls(**arguments)


def typed_description(where, cls, values, *, foreign=False):
    """The dataclass `cls` from the JSON object `values` that the file `where` holds.

    Of a `foreign` file, another program's, unknown keys are left out, and null is a default.
    Raises `ValueError` that names the file and the key.
    """
    if isinstance(values, dict):
        check_sources(cls, values, where)
        if foreign:
            known = {f.name for f in dataclasses.fields(cls)}
            values = {k: v for k, v in values.items() if k in known and v is not None}
    try:
        return typed_options(cls, values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def checked_value(value, hint, metadata, key):
    """`typed_value`, its home folder expanded where it is a path, within its bounds."""
    if type(value) is bool and hint is str and "choices" in metadata:
        value = str(value).lower()  # YAML's true, where a word is to be chosen
    value = typed_value(value, hint, key)
    if metadata.get("path"):
        several = isinstance(value, list)
        value = [expand_path(v, key) for v in value] if several else expand_path(value, key)
    check_bounds(value, metadata, key)
    return value


def expand_path(text, key):
    """A path with `~` for the home folder, as a shell gives it; raises `ValueError` where it is
    empty.
    """
    parts = os.fsencode(text or "").split(b"/")
    if text is not None and (not text.strip() or "\0" in text or len(max(parts, key=len)) > 255):
        shown = shortened(text)
        raise ValueError(f"{key}={shown} names no file or folder: name one, or leave {key} out")
    return expand_home(text, key) if text else text


def expand_home(path, key):
    """A path with `~` expanded; raises `ValueError` where it names no user's home."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"{key}={path}: there is no such user; a folder of that name is ./{path}")
    return expanded


def check_kind(value, kinds, key, meaning):
    """Raise `ValueError`, naming `key`, where a value is of no type of `kinds`: `meaning` in an
    error.
    """
    if not isinstance(value, kinds):
        name = type(value).__name__
        raise ValueError(f"{key}={shortened(value)} must be {meaning}, not {name}")


def check_sources(cls, values, where, prefix=""):
    """Raise `ValueError` where nested dictionaries read from `where` hold what must be given by
    hand.
    """
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        value, word = values.get(f.name), f.metadata.get("only_given")
        if dataclasses.is_dataclass(hints[f.name]) and isinstance(value, dict):
            check_sources(hints[f.name], value, where, f"{prefix}{f.name}.")
        elif word and isinstance(value, str) and word in value.lower():
            raise ValueError(
                f"{prefix}{f.name}={shortened(value)} in {where}: {word} runs a command, and is "
                "taken "
                "from the command line alone: give it there"
            )


def _is_required(f):
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def typed_value(value, hint, key):
    """`value` as the annotated type: int serves as float, null only where None is allowed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in options:
        base = typing.get_origin(kind) or kind
        if base is typing.Any or type(value) is base and base not in (list, tuple):
            return value
        if base is float and type(value) is int and abs(value) < 1e300:
            return float(value)
        if base in NUMBERS and isinstance(value, NUMBERS[base]) and type(value) not in (bool, int):
            return base(value)  # of NumPy
        if base in (list, tuple) and isinstance(value, (list, tuple)):
            inner = (typing.get_args(kind) or (typing.Any,))[0]
            return base(typed_value(v, inner, key) for v in value)
        if base is str and str in options and type(value) in (int, float):
            return str(value)
    names = " or ".join(_name_of(kind) for kind in options)
    raise ValueError(f"{key}={shortened(value)} must be {names}, not {type(value).__name__}")


def _name_of(kind):
    if typing.get_origin(kind) is list:
        return "a list, as [a,b]"
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))


def shortened(value):
    """A value as an error shows it: on one line, cut where it is long."""
    huge = isinstance(value, int) and value.bit_length() > 256  # Python refuses to print it
    text = f"a number of {value.bit_length()} bits" if huge else repr(value)
    text = " ".join(text.split("\n"))  # a tensor's has several lines
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_bounds(value, metadata, key):
    """Raise `ValueError`, naming `key`, where a value or one of a list's is out of its bounds."""
    bounded = any(name in metadata for name in RANGES)
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{key}={one} must be a finite number")
        if one is None:
            continue
        if bounded and (isinstance(one, bool) or not isinstance(one, numbers.Real)):
            raise ValueError(f"{key}={shortened(one)} must be a number")
        choices = metadata.get("choices")
        if choices and one not in choices:
            shown = one if isinstance(one, str) else shortened(one)
            raise ValueError(f"{key}={shown}: choose one of {list_choices(metadata)}")
        wrong = [
            n for n, (holds, _) in RANGES.items() if n in metadata and not holds(one, metadata[n])
        ]
        if wrong:
            raise ValueError(f"{key}={shortened(one)} must be {bounds_of(metadata)}")


def list_choices(metadata):
    """`auto, true, false`, from a field's metadata."""
    choices = metadata.get("choices", ())
    return ", ".join(f"{c}".lower() if isinstance(c, bool) else f"{c}" for c in choices)


def refuse_first(conflicts):
    """Raise `ValueError` with the text of the first pair (whether it is so, text) that is so."""
    for holds, text in conflicts:
        if holds:
            raise ValueError(text)


def bounds_of(metadata):
    """`at least 0 and below 1`, from a field's metadata."""
    return " and ".join(
        f"{words} {metadata[n]}" for n, (_, words) in RANGES.items() if n in metadata
    )


def check_options(config, prefix="", only=None):
    """`check_bounds` of every field of a dataclass instance, or `only` some, and of those below
    it.
    """
    for f in dataclasses.fields(config):
        if only and f.name not in only:
            continue
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            check_options(value, f"{prefix}{f.name}.")
        else:
            check_bounds(value, f.metadata, prefix + f.name)
