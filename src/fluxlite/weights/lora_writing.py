"""LoRA files written in the dialects of diffusers and peft, of kohya's sd-scripts and of ComfyUI.

    exchange_lora(read_lora("style.safetensors"), "style-kohya.safetensors", "kohya")

What a dialect holds in other modules is regrouped exactly: separate q, k, v become one module whose
rank is the sum of theirs, unless they share their A; a fused one becomes three that share it, less
what is zero of each. What cannot be written so is refused by name. `extract_lora` makes a LoRA of
two checkpoints.
"""

import json
import logging
from collections import Counter, namedtuple
from dataclasses import replace
from functools import reduce
from itertools import chain

import torch

from fluxlite import __version__
from fluxlite.nets.lora import DenseForm, Hadamard, Kronecker, LowRank
from fluxlite.weights import conversion, lora_keys, lora_merging, tensor_files
from fluxlite.weights.dtypes import wider_dtype
from fluxlite.weights.layouts import COLUMNS, SAME
from fluxlite.weights.lora_adapters import (
    METADATA_KEY,
    Adapter,
    form_part,
    form_rank,
    moves_columns,
    part_indices,
    rule_shape,
)

log = logging.getLogger("fluxlite")

# layout: of modules; prefixes of each part; dotted: or with underscores; alphas: a tensor each
Dialect = namedtuple("Dialect", "layout prefixes dotted down up alphas magnitude")
DIALECTS = {
    "peft": Dialect(
        "diffusers",
        {"transformer": "transformer.", "clip": "text_encoder.", "t5": "text_encoder_2."},
        True,
        "lora_A.weight",
        "lora_B.weight",
        False,
        "lora_magnitude_vector",
    ),
    "kohya": Dialect(
        "bfl",
        {"transformer": "lora_unet_", "clip": "lora_te1_", "t5": "lora_te3_"},
        False,
        "lora_down.weight",
        "lora_up.weight",
        True,
        "dora_scale",
    ),
    "comfy": Dialect(
        "bfl",
        {
            "transformer": "diffusion_model.",
            "clip": "text_encoders.clip_l.transformer.",
            "t5": "text_encoders.t5xxl.transformer.",
        },
        True,
        "lora_down.weight",
        "lora_up.weight",
        True,
        "dora_scale",
    ),
}


# --- regrouped ------------------------------------------------------------------------------------


def regroup_adapters(adapters, layout, config):
    """Adapters of the modules of `layout` that together change a transformer as `adapters` do.

    Raises `ValueError` for the first that no module of that layout can hold.
    """
    ours, by_ours = conversion.our_tensors(config), {}
    for adapter in adapters:
        for number, name in enumerate(adapter.rule.ours):
            by_ours.setdefault(name, []).append((adapter, number))
    found = []
    for rule in lora_keys.adapter_rules(layout, config):
        parts = [by_ours.get(name, []) for name in rule.ours]
        if any(parts):
            indices = part_indices(rule, rule_shape(rule, ours, config), config)
            found += regroup_rule(JointTensor(rule, layout, indices, config), parts)
    return found


# a tensor of a layout that adapters are joined in; indices: its rows or columns, for each of ours
JointTensor = namedtuple("JointTensor", "rule layout indices config")


def adapters_of(parts):
    """The adapters of [(adapter, number in its rule)] of each of some tensors."""
    return [adapter for adapter, _ in chain.from_iterable(parts)]


def of_form(part, kind):
    """Those of one tensor whose form is of a kind."""
    return [(adapter, number) for adapter, number in part if type(adapter.form) is kind]


def regroup_rule(joint, parts):
    """The adapters of one tensor of a layout, from [(adapter, number in its rule)] of each of our
    tensors that it holds.
    """
    found, joins = [], {LowRank: join_low_rank, DenseForm: join_dense}
    adapters = list({id(adapter): adapter for adapter in adapters_of(parts)}.values())
    for kind in dict.fromkeys(type(adapter.form) for adapter in adapters):
        of_kind = [adapter for adapter in adapters if type(adapter.form) is kind]
        whole = [adapter for adapter in of_kind if lies_in(adapter.rule, joint.rule)]
        if whole == of_kind and (len(whole) == 1 or kind not in joins):
            found += [moved_adapter(adapter, joint) for adapter in whole]
        elif kind in joins:
            found.append(joins[kind](joint, [of_form(part, kind) for part in parts]))
        else:
            raise ValueError(
                f"{of_kind[0].name} is a {kind.__name__} product, and no module of the "
                f"{joint.layout} layout is one: choose --to comfy, or bake it with --src BASE "
                "--lora"
            )
    return found


def lies_in(rule, other):
    """Whether a rule's tensor is that of another row for row, or with its halves swapped."""
    same = rule.transform is other.transform or len(rule.ours) == 1
    return same and rule.ours == other.ours


def moved_adapter(adapter, joint):
    """An adapter of a tensor that lies in the joint one row for row or with its halves swapped."""
    rule, layout, _, config = joint
    if adapter.rule.transform is rule.transform:
        return replace(adapter, rule=rule, layout=layout)
    # one tensor of ours on either side: theirs → ours → theirs
    [index] = part_indices(adapter.rule, adapter.form.shape, config)
    [back] = rule.transform.backward([index], config)
    magnitude = adapter.magnitude
    if magnitude is not None and magnitude.shape[0] > 1:
        magnitude = magnitude[back]
    form = adapter.form.rows(back)
    return replace(adapter, rule=rule, layout=layout, form=form, magnitude=magnitude)


def join_low_rank(joint, parts):
    """One low-rank adapter of those of each of our tensors in a rule.

    Factors that several share (A of parts of rows, B of parts of columns) are kept once; else
    ranks add up. Scales that differ go into the factor that is not shared.
    """
    rule, layout, indices, config = joint
    columns = moves_columns(rule)
    pieces = []  # (number in rule, shared factor (r, …), own factor (…, r), scale)
    for number, part in enumerate(parts):
        for adapter, of in part:
            form = trim_rank(form_part(adapter.form, adapter.rule, of, config))
            shared, own = (form.up.T, form.down.T) if columns else (form.down, form.up)
            pieces.append((number, shared, own, adapter.scale))
    scales = {scale for *_, scale in pieces}
    common = scales.pop() if len(scales) == 1 else None
    places = place_factors([shared for _, shared, *_ in pieces])
    types = [wider_dtype(shared.dtype, own.dtype) for _, shared, own, _ in pieces]
    dtype = torch.float32 if common is None else reduce(wider_dtype, types)
    total = torch.zeros(sum(map(len, indices)), max(p.stop for p in places), dtype=dtype)
    factor = torch.empty(total.shape[1], pieces[0][1].shape[1], dtype=dtype)
    for (number, shared, own, scale), place in zip(pieces, places):
        values = own.float() * scale if common is None else own
        total[indices[number], place] += values.to(dtype)
        factor[place] = shared.to(dtype)
    form = LowRank(total.T, factor.T) if columns else LowRank(factor, total)
    scale = 1.0 if common is None else common
    return Adapter(rule, layout, form, scale, join_magnitudes(joint, parts))


def place_factors(factors):
    """For each of some factors (r, …) a slice of the rank of all of them, the same for equal
    ones.
    """
    found, rank = [], 0
    for number, factor in enumerate(factors):
        twin = next((i for i in range(number) if same_tensor(factor, factors[i])), None)
        if twin is None:
            found.append(slice(rank, rank + len(factor)))
            rank += len(factor)
        else:
            found.append(found[twin])
    return found


def same_tensor(a, b):
    """Whether two tensors are alike in every bit."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def trim_rank(form):
    """A low-rank form without the ranks that add nothing: those of kohya's split_qkv, of which a
    part has its own alone.
    """
    used = form.up.ne(0).any(0) & form.down.ne(0).any(1)
    if used.all() or not used.any():
        return form
    return LowRank(form.down[used], form.up[:, used])


def join_magnitudes(joint, parts):
    """DoRA's magnitudes per output of a joined tensor, None without; raises `ValueError` where
    they cannot be joined: norms are those of whole rows or columns.
    """
    rule, _, indices, config = joint
    adapters = adapters_of(parts)
    if all(a.magnitude is None for a in adapters):
        return None
    name = next(a.name for a in adapters if a.magnitude is not None)
    one_each = all(len(part) == 1 for part in parts)
    rows = all(a.magnitude is not None and a.magnitude.shape[1] == 1 for a in adapters)
    if not one_each or not rows or rule.transform is COLUMNS:
        raise ValueError(
            f"{name} is a DoRA whose norms run over other rows and columns than those of the "
            "dialect to write: choose another --to, or bake it with --src BASE --lora"
        )
    total = torch.zeros(sum(map(len, indices)), 1, dtype=adapters[0].magnitude.dtype)
    for index, [(adapter, number)] in zip(indices, parts):
        own = adapter.magnitude
        if adapter.rule.transform is not SAME:
            own = own[part_indices(adapter.rule, adapter.form.shape, config)[number]]
        total[index] = own
    return total


def join_dense(joint, parts):
    """One whole difference, or replaced tensor, of those of each of our tensors in a rule."""
    rule, layout, indices, config = joint
    adapters = adapters_of(parts)
    replaced = {a.replaces for a in adapters}
    if len(replaced) > 1 or (True in replaced and not all(parts)):
        raise ValueError(f"{adapters[0].name} is replaced in part: bake it with --src BASE --lora")
    dim, first = 1 if moves_columns(rule) else 0, adapters[0].form.diff
    shape = list(first.shape)
    shape[dim] = sum(map(len, indices))
    exact = all(a.scale == 1.0 for a in adapters) and len(adapters) <= len(parts)
    types = [a.form.diff.dtype for a in adapters]
    total = torch.zeros(shape, dtype=reduce(wider_dtype, types) if exact else torch.float32)
    for index, part in zip(indices, parts):
        for adapter, number in part:
            values = form_part(adapter.form, adapter.rule, number, config).diff.to(total.dtype)
            total.index_add_(dim, index, values, alpha=adapter.scale)
    return Adapter(rule, layout, DenseForm(total), replaces=replaced.pop())


# --- keys and tensors -----------------------------------------------------------------------------


def write_adapters(adapters, to, config):
    """({key: tensor}, metadata) of {part: adapters} in a dialect; raises `ValueError`."""
    dialect, tensors = DIALECTS[to], {}
    for part, of_part in adapters.items():
        if part == "transformer":
            of_part = regroup_for(of_part, to, config)
        biases = {a.name: a for a in of_part if a.name.endswith(".bias")}
        if to == "peft":
            check_biases(of_part)
            check_doras(of_part)
        for adapter in of_part:
            made = write_adapter(adapter, part, to, biases)
            twice = made.keys() & tensors.keys()
            if twice:
                raise ValueError(f"{adapter.name} is changed twice: bake it with --src BASE --lora")
            tensors |= made
    if not tensors:
        raise ValueError("there is nothing to write")
    about = {"format": "pt", "fluxlite_version": __version__}
    if to == "peft":
        about[METADATA_KEY] = json.dumps(peft_metadata(tensors, dialect))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def check_biases(adapters):
    """Raise `ValueError` for a bias that PEFT's keys do not hold: they have one beside factors."""
    names = [a.name for a in adapters]
    for bias in (a for a in adapters if a.name.endswith(".bias")):
        factors = any(
            a.name == bias.name.replace(".bias", ".weight") and type(a.form) is LowRank
            for a in adapters
        )
        if not factors or bias.replaces or names.count(bias.name) > 1:
            raise ValueError(
                f"{bias.name} changes without a low-rank change of its weight, which PEFT's keys "
                "do not hold: choose --to comfy"
            )


def check_doras(adapters):
    """Raise `ValueError` where some linears are DoRAs and others are not: of PEFT all of a part are
    one or the other, and it makes up the magnitudes that a file lacks.
    """
    plain = [a for a in adapters if type(a.form) is LowRank and a.magnitude is None]
    if plain and any(a.magnitude is not None for a in adapters):
        raise ValueError(
            f"{plain[0].name} is no DoRA and others are, which PEFT's keys do not hold: choose "
            "--to comfy"
        )


def regroup_for(adapters, to, config):
    """Adapters in the modules of a dialect. ComfyUI reads diffusers' modules too, where a Kronecker
    or Hadamard product or a DoRA cannot be regrouped.
    """
    layout = DIALECTS[to].layout
    if to != "comfy":
        return regroup_adapters(adapters, layout, config)
    rules = list(lora_keys.adapter_rules(layout, config))
    whole = {(*rule.ours, rule.transform) for rule in rules}

    def stays(adapter):
        special = type(adapter.form) in (Kronecker, Hadamard) or adapter.magnitude is not None
        return special and (*adapter.rule.ours, adapter.rule.transform) not in whole

    found = [a for a in adapters if stays(a)]
    return found + regroup_adapters([a for a in adapters if not stays(a)], layout, config)


def write_adapter(adapter, part, to, biases):
    """{key: tensor} of one adapter; raises `ValueError` where the dialect has no key for it."""
    dialect = DIALECTS[to]
    module, leaf = lora_keys.split_leaf(adapter.name)
    key = module_key(module, adapter.layout, part, dialect)
    if type(adapter.form) is DenseForm:
        return write_dense(adapter, key, leaf, to)
    if to == "peft":
        return write_peft(adapter, key, biases.get(f"{module}.bias"))
    found, rank = factor_tensors(adapter, dialect), form_rank(adapter.form)
    if rank is not None:
        found["alpha"] = torch.tensor(adapter.scale * rank, dtype=torch.float32)
    if adapter.magnitude is not None:
        found[dialect.magnitude] = adapter.magnitude
    return {f"{key}.{suffix}": tensor for suffix, tensor in found.items()}


def factor_tensors(adapter, dialect):
    """{suffix: tensor} of a form's factors; raises `ValueError` for a part of a product."""
    form = adapter.form
    if type(form) is LowRank:
        return {dialect.down: form.down, dialect.up: form.up}
    if type(form) is Hadamard:
        return {f"hada_{name}": tensor for name, tensor in form._asdict().items()}
    if form.row_index is not None or form.column_index is not None:
        raise ValueError(f"{adapter.name} is a part of a Kronecker product: choose --to comfy")
    if form_rank(form) is None and adapter.scale != 1.0:  # which readers take no alpha of
        form = form._replace(w1=form.w1.float() * adapter.scale)
    return {f"lokr_{name}": t for name, t in form._asdict().items() if t is not None}


def module_key(module, layout, part, dialect):
    """What comes before the suffix of a module's keys."""
    prefix = dialect.prefixes[part]
    name = lora_keys.CLIP_PREFIX + module if part == "clip" else module
    if part == "transformer" and layout != dialect.layout and dialect.dotted:
        return f"lycoris_{name.replace('.', '_')}"  # as ComfyUI reads modules of diffusers
    return prefix + (name if dialect.dotted else name.replace(".", "_"))


def write_dense(adapter, key, leaf, to):
    """{key: tensor} of a whole difference or of replaced values."""
    values = adapter.form.diff
    if adapter.scale != 1.0:
        values = values.float() * adapter.scale
    if to == "peft":
        norm = adapter.replaces and "norm_" in adapter.name and leaf == "weight"
        if norm:
            return {f"{key}.weight": values}
        if leaf == "bias":
            return {}  # written with the weight's factors: `check_biases`, `write_peft`
        raise ValueError(
            f"{adapter.name} is a whole tensor, which PEFT's keys do not hold: choose --to comfy"
        )
    if adapter.replaces and to == "kohya":
        raise ValueError(f"{adapter.name} is replaced: kohya has no key for it; choose --to comfy")
    if adapter.replaces:
        scale_key = key if adapter.name.endswith(".weight") else f"{key}.{leaf_name(adapter)}"
        return {f"{scale_key}.set_weight": values}
    if leaf == "bias":
        return {f"{key}.diff_b": values}
    return {f"{key}.diff": values}


def leaf_name(adapter):
    """The last word of a tensor's name: BFL's norms have a `scale`."""
    return adapter.name.rpartition(".")[2]


def write_peft(adapter, key, bias):
    """A low-rank adapter with peft's keys: its scale goes into B, so that all readers agree, in
    float32 where its own type would round it.
    """
    if type(adapter.form) is not LowRank:
        name = type(adapter.form).__name__
        raise ValueError(
            f"{adapter.name} is a {name} product, which PEFT's keys do not hold: choose --to comfy"
        )
    form = trim_rank(adapter.form) if adapter.split > 1 else adapter.form
    up = form.up.float() * adapter.scale
    if torch.equal(up.to(form.up.dtype).float(), up):
        up = up.to(form.up.dtype)
    found = {f"{key}.lora_A.weight": form.down, f"{key}.lora_B.weight": up}
    if bias is not None:
        found[f"{key}.lora_B.bias"] = bias.form.diff.float() * bias.scale
    if adapter.magnitude is not None:
        if adapter.magnitude.shape[1] != 1 or adapter.magnitude.shape[0] != form.shape[0]:
            raise ValueError(
                f"{adapter.name} is a DoRA per input, which PEFT's keys do not hold: choose --to "
                "comfy"
            )
        found[f"{key}.lora_magnitude_vector"] = adapter.magnitude[:, 0]
    return found


def peft_metadata(tensors, dialect):
    """peft's LoraConfig of each part, as diffusers reads it: ranks, and alphas equal to them."""
    found = {}
    for prefix in dialect.prefixes.values():
        ends = f".{dialect.down}"
        names = [k for k in tensors if k.startswith(prefix) and k.endswith(ends)]
        ranks = {k[len(prefix) : -len(ends)]: len(tensors[k]) for k in names}
        if not ranks:
            continue
        common = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
        keys = [k for k in tensors if k.startswith(prefix)]
        config = {
            "r": common,
            "lora_alpha": common,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(ranks),
            "use_dora": any(dialect.magnitude in k for k in keys),
            "lora_bias": any(k.endswith(".lora_B.bias") for k in keys),
        }
        found |= {prefix + key: value for key, value in config.items()}
    return found


def save_lora(dst, tensors, metadata, **options):
    """Write a LoRA file whole or not at all; `options` are those of `atomic_weights`."""
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    tensor_files.check_room(dst, tensor_files.num_bytes(described))
    with tensor_files.atomic_weights(dst, **options) as path:
        tensor_files.write_tensors(path, described, tensors.items(), metadata)


def write_lora(adapters, dst, to, config, **options):
    """Write {part: adapters} to a file of a dialect."""
    tensors, metadata = write_adapters(adapters, to, config)
    save_lora(dst, tensors, metadata, **options)


def exchange_lora(found, dst, to, **options):
    """Write a `LoraFile` in another dialect; raises `ValueError` for what that cannot hold, and for
    shapes that are of no one model.
    """
    lora_merging.check_adapters(found.adapters.get("transformer", []), found.config)
    write_lora(found.adapters, dst, to, found.config, **options)
