"""From the tensors of a LoRA file's module to `Adapter`s: forms, scales, magnitudes.

An `Adapter` keeps the grouping of its file: a rule of `layouts` from one tensor of the file's
layout to ours. Its rows (of B, or up) and columns (of A, or down) go to ours by the transform of
that rule, so that a file may be partial.
"""

import math
import re
from dataclasses import dataclass

import torch

from fluxlite.cli.descriptions import parse_json, read_json
from fluxlite.cli.options import shortened
from fluxlite.nets.lora import DenseForm, Hadamard, Kronecker, LowRank
from fluxlite.weights.layouts import COLUMNS, SAME, Rule

PEFT_NAME = "adapter_model.safetensors"  # beside adapter_config.json
METADATA_KEY = "lora_adapter_metadata"  # diffusers' JSON of peft's LoraConfigs
# how peft began adapters that it first took out of the base's weights
CHANGED_BASES = "pissa", "corda", "olora", "loftq", "lora_ga"
LARGEST = 1e30  # of ranks and alphas
FACTORS = {  # forms by the roles of their tensors; a `Kronecker` has some of its six
    LowRank: ("down", "up"),
    Hadamard: tuple(f"hada_{name}" for name in Hadamard._fields),
    Kronecker: tuple(f"lokr_{name}" for name in Kronecker._fields[:6]),
}
WHOLE_ROLES = {  # tensors that are no factors: whether they stand in place of the base's
    "diff": False,
    "bias diff": False,
    "up_bias": False,
    "set": True,
    "whole": True,
}


@dataclass
class Adapter:
    """What a file does to one tensor of its layout: scale · form is added to it.

    Of a DoRA (a `magnitude`) the sum is rescaled so that its rows, (out, 1), or its columns,
    (1, in), have these norms. One that `replaces` stands in place of the base's values.
    `rule` leads to our tensors: rule.theirs is the one that is meant.
    """

    rule: Rule
    layout: str
    form: LowRank | Hadamard | Kronecker | DenseForm
    scale: float = 1.0
    magnitude: torch.Tensor | None = None
    replaces: bool = False
    split: int = 1  # of kohya's split_qkv: how many parts were trained apart

    @property
    def name(self):
        return self.rule.theirs[0]


# --- rows and columns -----------------------------------------------------------------------------


def moves_columns(rule):
    """Whether a rule moves columns, which are A's, and not rows, which are B's."""
    return rule.transform is COLUMNS


def part_indices(rule, shape, config):
    """For each of our tensors the rows, or columns, of their tensor (of `shape`) that it has."""
    if moves_columns(rule):
        numbers = torch.arange(shape[1])[None]
        return [part[0] for part in rule.transform.forward([numbers], config)]
    return rule.transform.forward([torch.arange(shape[0])], config)


def form_part(form, rule, number, config):
    """The part of a form that is a difference of our tensor `number` of the rule."""
    if rule.transform is SAME:
        return form
    index = part_indices(rule, form.shape, config)[number]
    return form.columns(index) if moves_columns(rule) else form.rows(index)


def rule_shape(rule, ours, config):
    """The shape of a rule's tensor in their layout; `ours` are our tensors, on meta."""
    return tuple(rule.transform.backward([ours[name] for name in rule.ours], config)[0].shape)


# --- from tensors to adapters ---------------------------------------------------------------------


def make_adapters(part, name, values, module, peft):
    """The `Adapter`s of one module, of its weight, its bias or both.

    `values` are {(role, leaf): tensor}, `peft` what `peft_settings` found.
    """
    factors = {role: tensor for (role, leaf), tensor in values.items() if leaf == "weight"}
    made, form, scale = [], make_form(name, factors), 1.0
    if form is not None:
        scale = module_scale(name, form, factors, peft.get(part))
        magnitude = shaped_magnitude(name, factors.get("magnitude"), form)
        split = split_parts(form, module.rules["weight"])
        rule = module.rules["weight"]
        made.append(Adapter(rule, module.layout, form, scale, magnitude, split=split))
    for (role, leaf), tensor in values.items():
        if form is None and role in ("magnitude", "alpha", "up_bias", "shape"):
            raise ValueError(f"{name} has {role} alone: the file is damaged")
        if role == "shape" and tuple(tensor.flatten().tolist()) != tuple(form.shape):
            raise ValueError(
                f"{name}.reshape_weight is {tensor.tolist()}, and its factors make "
                f"{list(form.shape)}: the file is damaged"
            )
        if role in WHOLE_ROLES:
            own = dict(scale=scale if role == "up_bias" else 1.0, replaces=WHOLE_ROLES[role])
            made.append(Adapter(module.rules[leaf], module.layout, DenseForm(tensor), **own))
    return made


def make_form(name, of):
    """The form of a module's factors, None without any; raises `ValueError` where some lack."""
    kinds = [kind for kind, roles in FACTORS.items() if not of.keys().isdisjoint(roles)]
    if len(kinds) > 1:
        raise ValueError(f"{name} has factors of several kinds: the file is damaged")
    if not kinds:
        return None
    [kind] = kinds
    tensors = [of.get(role) for role in FACTORS[kind]]
    lacks = missing_factors(kind, tensors)
    if lacks:
        raise ValueError(f"{name} lacks {lacks[0]}: the file is damaged")
    for tensor in filter(lambda t: t is not None, tensors):
        if tensor.ndim != 2:
            raise ValueError(f"{name} has a factor of shape {list(tensor.shape)}, not a matrix")
    form = kind(*tensors)
    check_ranks(name, form)
    return form


def missing_factors(kind, tensors):
    """The roles of factors that a form must have and that are None."""
    if kind is not Kronecker:
        return [role for role, tensor in zip(FACTORS[kind], tensors) if tensor is None]
    there = [tensor is not None for tensor in tensors]
    patterns = ([True, False, False], [False, True, True])  # whole, or two that are multiplied
    return [f"lokr_w{n}" for n in (1, 2) if there[3 * n - 3 : 3 * n] not in patterns]


def check_ranks(name, form):
    """Raise `ValueError` where factors that are multiplied do not fit each other."""
    pairs = {
        LowRank: lambda: [(form.up, form.down)],
        Hadamard: lambda: [(form.w1_a, form.w1_b), (form.w2_a, form.w2_b)],
        Kronecker: lambda: [(form.w1_a, form.w1_b), (form.w2_a, form.w2_b)],
    }[type(form)]()
    for up, down in pairs:
        if up is not None and up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{name} has factors {list(up.shape)} and {list(down.shape)}, which have no common "
                "rank: the file is damaged"
            )
    if type(form) is Hadamard and form.w1_a.shape[0] != form.w2_a.shape[0]:
        raise ValueError(f"{name} has factors of different shapes: the file is damaged")


def form_rank(form):
    """The rank by which a form's alpha is divided; None where it has none."""
    if type(form) is LowRank:
        return form.down.shape[0]
    if type(form) is Hadamard:
        return form.w1_b.shape[0]
    decomposed = [half for half in (form.w2_b, form.w1_b) if half is not None]
    return decomposed[0].shape[0] if decomposed else None


def module_scale(name, form, of, settings):
    """alpha / rank of a module, or what PEFT's settings say; 1 without either.

    A Kronecker product of two whole factors has no rank: its alpha (ai-toolkit's is 10¹⁰, and
    overflows in float16) means nothing, but PEFT divides its own by the r of the settings.
    """
    rank = form_rank(form)
    if "alpha" not in of:
        return peft_scale(settings, name, rank)
    if rank is None:
        return 1.0
    if of["alpha"].numel() != 1:
        raise ValueError(f"{name}.alpha has {of['alpha'].numel()} values, not one")
    alpha = float(of["alpha"])
    if not math.isfinite(alpha):
        raise ValueError(f"{name}.alpha is {alpha}: the file is damaged")
    return alpha / rank if alpha else 1.0


def shaped_magnitude(name, magnitude, form):
    """DoRA's magnitudes as (out, 1) or (1, in), told apart by shape; raises `ValueError`."""
    if magnitude is None:
        return None
    rows, columns = form.shape
    if magnitude.ndim == 1:  # peft's, per output
        magnitude = magnitude[:, None]
    if magnitude.ndim == 4:
        magnitude = magnitude.flatten(1)
    if tuple(magnitude.shape) not in ((rows, 1), (1, columns)):
        raise ValueError(
            f"{name} has DoRA magnitudes of shape {list(magnitude.shape)}, neither {[rows, 1]} nor "
            f"{[1, columns]}"
        )
    return magnitude


# --- PEFT's settings ------------------------------------------------------------------------------


def values_below(values, prefix):
    """{name: value} of those that begin with a prefix, without it."""
    return {name[len(prefix) :]: v for name, v in values.items() if name.startswith(prefix)}


def peft_settings(metadata, path):
    """{part: settings} of peft's LoraConfigs, in the header or in adapter_config.json beside it."""
    prefixes = {"transformer": "transformer.", "clip": "text_encoder.", "t5": "text_encoder_2."}
    if METADATA_KEY in metadata:
        values = parse_json(metadata[METADATA_KEY], f"its {METADATA_KEY}")
    elif path.name == PEFT_NAME and (path.parent / "adapter_config.json").is_file():
        values = read_json(path.parent / "adapter_config.json")
    else:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"its {METADATA_KEY} is no object with named values")
    found = {part: values_below(values, prefix) for part, prefix in prefixes.items()}
    found = found if any(found.values()) else {"transformer": values}
    for settings in found.values():
        began = str(settings.get("init_lora_weights")).lower()
        if began.startswith(CHANGED_BASES):
            raise ValueError(
                f"init_lora_weights={began}: it adds to weights that peft had changed before, and "
                "not to the model's; have peft's save_pretrained convert it"
            )
    return found


def peft_scale(settings, name, rank):
    """alpha / r by peft's settings, or alpha / √r; 1 without any. `rank` is that of the factors, or
    None. Raises `ValueError`.
    """
    if not settings:
        return 1.0
    r = _of_pattern(settings, "rank_pattern", name, settings.get("r", rank))
    if r is None:
        return 1.0
    alpha = settings.get("lora_alpha", settings.get("alpha", r))  # the second of a LoHa or LoKr
    alpha = _of_pattern(settings, "alpha_pattern", name, alpha)
    if not all(type(x) in (int, float) and abs(x) < LARGEST for x in (r, alpha)):
        said = f"r={shortened(r)}, lora_alpha={shortened(alpha)}"
        raise ValueError(f"its {METADATA_KEY} says {said} of {name}")
    if r != (r if rank is None else rank) or r <= 0:
        raise ValueError(f"its {METADATA_KEY} says rank {r} of {name}, which has rank {rank}")
    return alpha / math.sqrt(r) if settings.get("use_rslora") else alpha / r


def _of_pattern(settings, key, name, otherwise):
    """The value of the first pattern that names a module, as peft matches them."""
    patterns = settings.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"its {METADATA_KEY} has no names in {key}")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error:
            raise ValueError(f"its {METADATA_KEY} has no pattern in {pattern!r}") from None
    return otherwise


# --- split_qkv ------------------------------------------------------------------------------------


def split_parts(form, rule):
    """How many parts of a fused module were trained apart (kohya's split_qkv), 1 for none: as many
    as blocks on the diagonal of `up`, where all else is exactly 0.
    """
    count = len(rule.ours)
    fused = type(form) is LowRank and rule.transform is not COLUMNS
    rank = form.down.shape[0] if fused else 1
    if count == 1 or rank % count or not form.up.any():
        return 1
    from_parts = form.up.ne(0).any(0).view(count, -1)
    return count if _is_block_diagonal(form.up, count) and bool(from_parts.any(1).all()) else 1


def _is_block_diagonal(up, count):
    """Whether each column belongs to rows of one part: those of a later part lie below."""
    width, last = up.shape[1] // count, -1
    for number in range(count):
        rows = up[:, number * width : (number + 1) * width].ne(0).any(1).nonzero().flatten()
        if len(rows) and int(rows[0]) <= last:
            return False
        last = int(rows[-1]) if len(rows) else last
    return True
