"""LoRA files of any dialect, read into adapters: which weights each changes, and how.

`read_lora` recognises a file key by key, and applies or refuses each by name. `lora_merging`
resolves adapters against a base, `lora_writing` writes them.

Strength is the file's own: alpha / rank, 1 without an alpha.
"""

import logging
import math
import os
import re
from collections import Counter
from dataclasses import MISSING, dataclass, field, replace
from itertools import chain
from pathlib import Path

from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import check_kind, check_options, expand_home, expand_path, option
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.lora import DenseForm, Hadamard, Kronecker, LowRank, float_form
from fluxlite.weights import foreign, hub, lora_keys, run_folder
from fluxlite.weights.dtypes import DTYPES
from fluxlite.weights.layouts import ARTICLED, PART_KEYS, recognise_layout
from fluxlite.weights.lora_adapters import PEFT_NAME, form_rank, make_adapters, peft_settings
from fluxlite.weights.lora_shapes import infer_lora_config
from fluxlite.weights.tensor_files import Tensors, check_values

log = logging.getLogger("fluxlite")

LORA_RUN_NAME = "lora.safetensors"  # in a checkpoint of a run that trains one
LORA_NAMES = ("pytorch_lora_weights.safetensors", PEFT_NAME)
ADAPTER_KEYS = r"(?i)lora|\.hada_|\.lokr_|\.dora_scale|\.diff(_b)?$|\.set_weight$"
LORA_SPLITS = ("readers", "training")
WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8")  # types of an alpha or a shape, besides floats


@dataclass
class Lora:
    """A LoRA to draw with; several of them add up."""

    file: object = option(MISSING, "a file of any dialect, a folder, or a hub id owner/name/file")
    scale: float = option(
        1.0, "strength over the file's own, alpha / rank", at_least=-100, at_most=100
    )
    split_qkv: str = option(
        "readers",
        "of files that kohya trained with split_qkv: the strength that every reader gives them, or "
        "that of their training, 3 and 4 times as much",
        choices=LORA_SPLITS,
    )

    def validate(self):
        check_options(self, "lora.")
        check_kind(self.file, (str, Path, LoraFile), "lora", "a path or a LoraFile")
        if isinstance(self.file, str):
            expand_path(self.file, "lora")

    def describe(self):
        """What a picture's metadata say of it."""
        where = self.file.where if isinstance(self.file, LoraFile) else str(self.file)
        return {"file": where, "scale": self.scale, "split_qkv": self.split_qkv}


@dataclass
class LoraFile:
    """A file's adapters by part: transformer, clip and t5."""

    where: str
    config: FluxConfig  # of the transformer that it is for
    adapters: dict = field(default_factory=dict)
    dialects: tuple = ()
    metadata: dict = field(default_factory=dict)

    def all_adapters(self):
        return list(chain.from_iterable(self.adapters.values()))


# --- where it is ----------------------------------------------------------------------------------


def locate_lora(where, setting="lora="):
    """The file that a path, a folder or a hub id `owner/name[/folder][/file]` names; raises
    `ValueError`.
    """
    path = Path(expand_home(str(where), setting.rstrip("= ")))
    if not path.exists():
        path = _fetch_lora(str(where), setting)
    path = run_lora(path) or path
    if run_folder.is_run(path):
        raise ValueError(
            f"{setting}{where} is a run, and not of a LoRA: name it as model.checkpoint=, or make "
            "one of it (convert_hf.py --extract)"
        )
    if not os.access(path, os.R_OK):
        raise ValueError(f"{setting}{where} cannot be read: no permission")
    if not path.is_dir():
        return path
    named = [path / name for name in LORA_NAMES if (path / name).is_file()]
    found = named or sorted(path.glob("*.safetensors"))
    if len(found) == 1 or named:
        return found[0]
    those = ", ".join(file.name for file in found[:5])
    raise ValueError(
        f"{setting}{where} holds {len(found)} .safetensors files{': ' * bool(those)}{those}; name "
        "the LoRA's"
    )


def run_lora(path):
    """The LoRA in the last checkpoint of a run that trained one, checked; None for other paths."""
    folder = run_folder.last_checkpoint(path)
    meta = folder and run_folder.read_meta(folder)
    if not meta or meta.what != "lora":
        return None
    name = LORA_RUN_NAME
    run_folder.check_files(folder, replace(meta, files={name: meta.files[name]}))
    return folder / name


def is_lora(where):
    """Whether a path, looked at without the hub, is a file with keys as a LoRA's, a folder, or a
    run that trained one.
    """
    path = Path(str(where)).expanduser()
    path = run_lora(path) or path
    if path.is_dir():
        path = next((path / name for name in LORA_NAMES if (path / name).is_file()), path)
    if not path.is_file():
        return False
    try:
        return any(re.search(ADAPTER_KEYS, key) for key in Tensors(path, [path]).keys())
    except (ValueError, PermissionError):  # which the model's reader tells
        return False


def _fetch_lora(where, setting):
    if not hub.is_repository(where):
        raise ValueError(f"{setting}{where} does not exist")
    folder, slash, name = where.rpartition("/")
    key = setting.rstrip("= ")
    if name.endswith(".safetensors") and hub.is_repository(folder):
        return hub.fetch_repository(folder, [name], key=key) / name
    patterns = [*LORA_NAMES, "adapter_config.json", "*.safetensors"]
    return hub.fetch_repository(where, patterns, key=key)


# --- reading --------------------------------------------------------------------------------------


def read_lora(where, config=None, *, setting="lora=", split_qkv="readers"):
    """The `LoraFile` that a path or hub id holds, for a transformer of shape `config`.

    Without one the shape is inferred from the file. Each key is understood or refused by name: the
    whole of the file is then applied. What is logged: dialects, ranks, modules, norms. Raises
    `ValueError` that begins with `setting` and the path.
    """
    if isinstance(where, LoraFile):
        return where
    path = locate_lora(where, setting)
    try:
        tensors = Tensors(path, [path])
        found = _read_adapters(tensors, path, config)
    except ValueError as error:
        raise ValueError(f"{setting}{where}: {error}") from None
    set_split_strength(found, split_qkv)
    log.info("%s", describe_lora(found))
    return found


def _read_adapters(tensors, path, config):
    if not tensors.keys():
        raise ValueError("it holds no tensors: the file is empty")
    config = config or infer_lora_config(tensors)
    modules, dialects = group_keys(tensors, config)
    peft = peft_settings(tensors.metadata, path)
    found = LoraFile(str(path), config, {}, dialects, tensors.metadata)
    for (part, name), roles in modules.items():
        values = {role: read_values(tensors, *place) for role, place in roles.items()}
        module = next(iter(roles.values()))[1].module
        made = make_adapters(part, name, values, module, peft)
        found.adapters.setdefault(part, []).extend(made)
    if not found.all_adapters():
        raise ValueError("it holds no adapter")
    return found


def read_values(tensors, key, meaning):
    """A tensor of the file; raises `ValueError` where it can be no part of an adapter."""
    spelled, shape = tensors.header(key)
    if not math.prod(shape):
        raise ValueError(f"{key} has no values (shape {list(shape)}): the file is damaged")
    number = meaning.role in ("alpha", "shape")
    if spelled not in DTYPES and not (number and spelled in WHOLE_NUMBERS):
        raise ValueError(f"{key} is of type {spelled}, which no adapter has")
    tensor = tensors.read(key)
    if number:
        return tensor
    check_values(key, tensor)
    return tensor if tensor.dtype.itemsize > 1 else tensor.float()  # of fp8 torch computes little


def group_keys(tensors, config):
    """({(part, module): {(role, leaf): (key, KeyMeaning)}}, dialects) of a file.

    Raises `ValueError` for keys that mean nothing to this model, saying what they are.
    """
    names, found, dialects, unknown = lora_keys.module_names(config), {}, Counter(), []
    for key in tensors.keys():
        meaning = lora_keys.read_key(key, names)
        if meaning is None:
            unknown.append(key)
            continue
        module, role = meaning.module, (meaning.role, meaning.leaf)
        roles = found.setdefault((module.part, module.name), {})
        if role in roles:
            raise ValueError(f"{key} and {roles[role][0]} are the same: the file is damaged")
        roles[role] = key, meaning
        dialects[dialect_of(meaning)] += 1
    if unknown:
        raise ValueError(unknown_text(unknown, tensors.keys(), config))
    if all(role == "whole" for role, _ in chain.from_iterable(found.values())):
        raise ValueError(model_text(tensors.keys()) or "it holds whole weights, and no adapter")
    return found, tuple(name for name, _ in dialects.most_common())


def dialect_of(meaning):
    """What the log calls the dialect of a key."""
    own = {"xlabs": "XLabs", "bfl": "BFL"}.get(meaning.module.layout, "diffusers")
    if own == "XLabs" or meaning.dialect == "bare names":
        return own
    return meaning.dialect


def model_text(keys):
    """What is wrong with a file that holds a model; None for other files."""
    try:
        what = recognise_layout(keys)[0]
        return f"it is {ARTICLED[what]}, not a LoRA: name it as {PART_KEYS[what]}="
    except ValueError:
        return None


def other_text(keys):
    """What a file is that has no key of an adapter, as far as `foreign` knows it; or None."""
    if any(re.search(ADAPTER_KEYS, key) for key in keys):
        return None
    try:
        foreign.check_keys(keys)
    except ValueError as error:
        return f"{error}"


def unknown_text(unknown, keys, config):
    """One line about keys that mean nothing."""
    first = f"{len(unknown)} of its {len(keys)} keys, {unknown[0][:120]} first"
    kinds = [(key, kind) for key in unknown if (kind := lora_keys.refused_kind(key))]
    if kinds:
        return f"it holds {kinds[0][1]} ({kinds[0][0][:120]}), which is not supported"
    model = model_text(keys) or other_text(keys)
    if model:
        return model
    other = lora_keys.other_model(unknown)
    if other:
        return f"it is a LoRA of {other}, not of FLUX.1 ({first})"
    blocks = f"{config.num_double_blocks} double and {config.num_single_blocks} single blocks"
    blocks += "" if config.guidance_embed else " and no guidance input"
    return f"{first}, match no weight of this model, which has {blocks}"


# --- strength of split_qkv ------------------------------------------------------------------------


def set_split_strength(found, split_qkv):
    """Give modules of kohya's split_qkv the strength of their training, if that is asked for, and
    say what was done. What fluxlite wrote has that strength in its alphas.
    """
    ours = "fluxlite_version" in found.metadata
    split = [adapter for adapter in found.all_adapters() if adapter.split > 1 and not ours]
    split = [a for a in split if a.scale != 1.0]
    if not split:
        return
    if split_qkv == "training":
        for adapter in split:
            adapter.scale *= adapter.split
    others = "3 and 4 times" if split_qkv == "training" else "1/3 and 1/4 of"
    warn_for_all(
        "%s: %d fused modules were trained in parts (split_qkv); lora.split_qkv=%s gives q, k, v "
        "and linear1 %s the strength that %s",
        *(found.where, len(split), split_qkv, others),
        "readers give them" if split_qkv == "training" else "they had in training",
    )


# --- the log --------------------------------------------------------------------------------------


def describe_lora(found):
    """One line: dialects, what kinds, ranks, how many modules of each part, norms."""
    adapters = found.all_adapters()
    kinds = Counter(kind_of(adapter) for adapter in adapters)
    ranks = sorted({form_rank(a.form) for a in adapters if type(a.form) is not DenseForm} - {None})
    modules = ", ".join(f"{len(of)} of the {part}" for part, of in found.adapters.items())
    shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}" if ranks else "none"
    sizes = [abs(a.scale) * form_norm(a.form) for a in adapters if not a.replaces]
    norm = math.sqrt(sum(size**2 for size in sizes))
    largest = max(zip(sizes, (a.name for a in adapters if not a.replaces)), default=(0, "none"))
    kinds = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"{found.where}: {' and '.join(found.dialects)}; {kinds}; rank {shown}; {modules}; norm "
        f"of all differences {norm:.4g}, the largest {largest[0]:.4g} of {largest[1]}"
    )


def kind_of(adapter):
    """What the log calls an adapter's kind."""
    if adapter.replaces:
        return "replaced"
    names = {LowRank: "LoRA", Hadamard: "LoHa", Kronecker: "LoKr", DenseForm: "difference"}
    return ("DoRA, " if adapter.magnitude is not None else "") + names[type(adapter.form)]


def form_norm(form):
    """‖ΔW‖ of a form, of a low-rank or Kronecker product from its factors alone."""
    if type(form) is LowRank:
        down, up = (t.double() for t in form)
        return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
    if type(form) is Kronecker:
        return math.prod(float(t.double().norm()) for t in float_form(form).factors())
    return float(float_form(form).dense().norm())
