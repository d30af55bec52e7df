"""LoRA adapters resolved against a base: merged into its weights, or kept beside its linears.

    loras = open_loras([Lora("style.safetensors", 0.8)], source)
    merged = merged_source(source, loras)     # a Source like any other: to draw with, or to bake

Differences are computed in float32 against the base as it is, added up, and the sum is rounded
once. Nothing of the base is changed: without the LoRAs the source is what it was.
"""

import json
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import chain

import torch

from fluxlite.cli.messages import warn_for_all
from fluxlite.nets.lora import AdapterTerm, DenseForm, LowRank, adapt_linears, float_form
from fluxlite.weights import conversion, sources
from fluxlite.weights.dtypes import wider_dtype
from fluxlite.weights.layouts import ARTICLED, SAME
from fluxlite.weights.lora_adapters import form_part, moves_columns, part_indices, rule_shape
from fluxlite.weights.lora_files import Lora, LoraFile, read_lora
from fluxlite.weights.lora_keys import CLIP_PREFIX

log = logging.getLogger("fluxlite")

WIDENED = "img_in.weight"  # the one linear whose inputs a LoRA may widen: BFL's control LoRAs
BLOCK_VALUES = 3 << 18  # of float32: 3 MB


@dataclass
class OpenLora:
    """A `LoraFile` whose adapters fit the model, and the strength it is taken with."""

    file: LoraFile
    lora: Lora

    @property
    def scale(self):
        return self.lora.scale

    def adapters(self, part):
        """Those of a part; none where the strength is 0, which leaves the base as it is."""
        return self.file.adapters.get(part, []) if self.scale else []


def open_loras(loras, source, setting="lora="):
    """`OpenLora`s of `Lora`s for a transformer's `Source`, checked; raises `ValueError`."""
    found = []
    for lora in loras:
        lora.validate()
        file = read_lora(lora.file, source.config, setting=setting, split_qkv=lora.split_qkv)
        try:
            check_adapters(file.adapters.get("transformer", []), source.config)
        except ValueError as error:
            raise ValueError(f"{setting}{file.where}: {error}") from None
        found.append(OpenLora(file, lora))
    warn_replaced(found)
    return found


def warn_replaced(loras):
    """Say where several LoRAs replace one tensor, of which the last counts."""
    adapters = chain.from_iterable(lora.adapters("transformer") for lora in loras)
    counts = Counter(name for a in adapters if a.replaces for name in a.rule.ours)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        named = ", ".join(lora.file.where for lora in loras)
        told = len(twice), twice[0], named
        warn_for_all("%d tensors, %s first, are replaced by several of %s: the last counts", *told)


# --- checked against the base ---------------------------------------------------------------------


def check_adapters(adapters, config):
    """Raise `ValueError` for the first adapter whose shape does not fit a transformer."""
    ours = conversion.our_tensors(config)
    for adapter in adapters:
        lacks = [name for name in adapter.rule.ours if name not in ours]
        if lacks:
            raise ValueError(f"{adapter.name} changes {lacks[0]}, which this model has not")
        if WIDENED in adapter.rule.ours and len(adapter.form.shape) == 2:
            shape, expected = adapter.form.shape[:1], (config.hidden_size,)
        else:
            shape, expected = adapter.form.shape, rule_shape(adapter.rule, ours, config)
        if tuple(shape) != tuple(expected):
            raise ValueError(
                f"{adapter.name} is of shape {list(adapter.form.shape)}, and the model's weight of "
                f"{list(expected)}: it is a LoRA of another model"
            )


def widened_config(config, loras):
    """The shape of a transformer with its LoRAs: BFL's control LoRAs widen its input."""
    adapters = chain.from_iterable(lora.adapters("transformer") for lora in loras)
    widths = [a.form.shape[1] for a in adapters if WIDENED in a.rule.ours]
    widened = replace(config, in_channels=max([config.in_channels, *widths]))
    widened.scheduler = config.scheduler
    return widened


def pad_columns(tensor, width):
    """A matrix with columns of zeros up to `width`; itself where it has as many."""
    more = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (0, more)) if more else tensor


def pad_form(form, width):
    """A form for inputs of `width`: those that it does not know count for nothing."""
    if form.shape[1] == width:
        return form
    if type(form) is LowRank:
        return LowRank(pad_columns(form.down, width), form.up)
    return DenseForm(pad_columns(form_values(form), width))


# --- differences ----------------------------------------------------------------------------------


def adds_product(adapter):
    """Whether an adapter adds a product of low rank and does no more."""
    return type(adapter.form) is LowRank and adapter.magnitude is None and not adapter.replaces


def form_values(form):
    """A form written out, in float32."""
    return float_form(form).dense()


class LoraResolver:
    """The LoRAs of one model, resolved against its weights: `base(name)` gives one of ours.

    `part` is transformer, clip or t5; `dtype` what it will compute in.
    """

    def __init__(self, loras, part, base, config=None, dtype=None):
        self.base, self.config, self.dtype, self.ratios = base, config, dtype, {}
        self.block = torch.empty(BLOCK_VALUES)  # one for all: many would leave holes in the heap
        self.adapters = defaultdict(list)  # {our name: [(OpenLora, Adapter, number in its rule)]}
        for lora in loras:
            for adapter in lora.adapters(part):
                for number, name in enumerate(adapter.rule.ours):
                    self.adapters[name].append((lora, adapter, number))

    def form(self, name, adapter, number):
        """An adapter's difference of our tensor `name`, before its scale."""
        form = form_part(adapter.form, adapter.rule, number, self.config)
        return pad_form(form, self.config.in_channels) if name == WIDENED else form

    def weight(self, name, base=None):
        """The base's values in float32, a copy, widened where the LoRAs widen it; `base` where they
        are read already.
        """
        base = self.base(name) if base is None else base
        weight = base.to(torch.float32, copy=True)
        return pad_columns(weight, self.config.in_channels) if name == WIDENED else weight

    def ratio(self, adapter, number):
        """By what DoRA rescales the rows (out, 1) or columns (1, in) of a rule's tensor of ours.

        Norms are those of the whole tensor of the file's layout, which may be several of ours.
        """
        if id(adapter) not in self.ratios:
            self.ratios[id(adapter)] = self.whole_ratio(adapter)
        ratio, rule = self.ratios[id(adapter)], adapter.rule
        axis = 1 if moves_columns(rule) else 0
        if ratio.shape[axis] == 1 or rule.transform is SAME:
            return ratio
        index = part_indices(rule, adapter.form.shape, self.config)[number]
        return ratio.index_select(axis, index)

    def whole_ratio(self, adapter):
        """magnitude / ‖W + scale·ΔW‖ of a DoRA; 1 where there is nothing to rescale."""
        parts = [self.weight(name) for name in adapter.rule.ours]
        [whole] = adapter.rule.transform.backward(parts, self.config)
        columns = adapter.form.shape[1]  # fewer than a wider input has
        whole = whole[:, :columns] + adapter.scale * form_values(adapter.form)
        per_output = adapter.magnitude.shape[0] == whole.shape[0]
        norm = whole.norm(dim=1 if per_output else 0, keepdim=True)
        return torch.where(norm > 0, adapter.magnitude.float() / norm, 1.0)

    def difference(self, name, adapter, number):
        """What an adapter at strength 1 adds to our tensor `name`, in float32."""
        if adapter.magnitude is None:
            return adapter.scale * form_values(self.form(name, adapter, number))
        form, weight = form_part(adapter.form, adapter.rule, number, self.config), self.weight(name)
        known = weight[:, : form.shape[1]]
        changed = self.ratio(adapter, number) * (known + adapter.scale * form_values(form))
        return pad_columns(changed - known, weight.shape[1])

    def merged(self, name):
        """Our tensor `name` with all LoRAs, rounded once: to the base's type, or a wider one that
        is computed in.
        """
        base = self.base(name)
        dtype = wider_dtype(base.dtype, self.dtype or base.dtype)
        if name != WIDENED and all(adds_product(adapter) for _, adapter, _ in self.adapters[name]):
            return self.merged_by_rows(name, base, dtype)
        total = self.weight(name, base)
        for _, adapter, number in self.adapters[name]:
            if adapter.replaces:
                total = form_values(self.form(name, adapter, number)).clone()
        for lora, adapter, number in self.adapters[name]:
            if not adapter.replaces:
                total.add_(self.difference(name, adapter, number), alpha=lora.scale)
        return total.to(dtype)

    def merged_by_rows(self, name, base, dtype):
        """`merged` where each adapter adds a product of low rank: rows so few that they stay in a
        processor's cache.
        """
        merged, rows = torch.empty(base.shape, dtype=dtype), BLOCK_VALUES // base.shape[1]
        found = [
            (*float_form(self.form(name, adapter, number)), adapter.scale * lora.scale)
            for lora, adapter, number in self.adapters[name]
        ]
        for first in range(0, len(base), rows):
            block = slice(first, first + rows)
            total = self.block[: base[block].numel()].view_as(base[block]).copy_(base[block])
            for down, up, scale in found:
                total.addmm_(up[block], down, alpha=scale)
            merged[block] = total
        return merged

    def terms(self, name):
        """The same as `AdapterTerm`s to keep beside a linear, in the base's type."""
        found = []
        for lora, adapter, number in self.adapters[name]:
            form, scale, ratio = self.form(name, adapter, number), adapter.scale, None
            if adapter.magnitude is not None and form.shape[1] > adapter.form.shape[1]:
                form, scale = DenseForm(self.difference(name, adapter, number)), 1.0
            elif adapter.magnitude is not None:
                ratio = self.ratio(adapter, number)
            found.append(AdapterTerm(float_form(form), scale, lora.scale, ratio))
        return found


# --- a merged source ------------------------------------------------------------------------------


def merged_source(source, loras, dtype=None, only=lambda name: True):
    """A `Source` whose tensors are those of `source` with the LoRAs in them, in its own layout.

    A tensor is merged when it is read, and is then of a type as wide as the source's and `dtype`;
    `only` tells which of ours are merged.
    """
    if not any(lora.adapters("transformer") for lora in loras):
        return source
    config = widened_config(source.config, loras)
    base = our_reader(source)
    rules = conversion.rules_by_name(source.layout, source.config, "theirs")
    resolver = LoraResolver(loras, "transformer", base, config, dtype)
    changed = {name for name in resolver.adapters if only(name)}
    if config.in_channels != source.config.in_channels:
        changed.add(WIDENED)

    def read(name, start=0, stop=None, exact=False):
        rule = rules[name]
        if not changed & set(rule.ours):
            return source.read(name, start, stop, exact)
        ours = [resolver.merged(n) if n in changed else base(n) for n in rule.ours]
        made = conversion.apply_transform(rule.transform, "backward", ours, config)
        return made[rule.theirs.index(name)][start:stop]

    shapes, described = conversion.layout_shapes(source.layout, config), {}
    for name, (of, _) in source.described.items():
        merged = changed & set(rules[name].ours)
        described[name] = wider_dtype(of, dtype or of) if merged else of, shapes[name]
    return replace(source, config=config, described=described, read=read, base=source)


def our_reader(source):
    """A function from our name of a tensor to its values in a source, a view where it can be."""
    makers = conversion.rules_by_name(source.layout, source.config)

    def read(name):
        rule = makers[name]
        needed = rule.theirs[: len(rule.theirs) - len(rule.optional)]
        tensors = [source.read(theirs) for theirs in needed]
        made = conversion.apply_transform(rule.transform, "forward", tensors, source.config)
        return made[rule.ours.index(name)]

    return read


def bake_source(source, loras, dtype=None):
    """The `merged_source` to write, of `Lora`s, whose text parts are left out: the log says so."""
    if source.what != "transformer":
        what = ARTICLED[source.what]
        raise ValueError(f"--lora changes a transformer, and {source.where} is {what}")
    opened = open_loras(loras, source, "--lora ")
    for lora in opened:
        others = [part for part in lora.file.adapters if part != "transformer"]
        if others:
            parts = " and ".join(others)
            log.warning(
                "%s also changes %s, which is not written with a transformer: draw with lora= to "
                "have it",
                *(lora.file.where, parts),
            )
        if not lora.file.adapters.get("transformer"):
            raise ValueError(f"--lora {lora.file.where} changes no transformer")
    merged = merged_source(source, opened, dtype)
    baked = json.dumps([lora.lora.describe() for lora in opened])
    return replace(merged, metadata=merged.metadata | {"loras": baked})


def load_merged(source, loras, *, merge=True, **options):
    """The transformer of a `Source` with its LoRAs merged, or kept beside its linears.

    Kept apart, nothing of a mapped linear is copied; biases and scales of norms, which are small,
    are merged.
    """
    dtype = sources.named_dtype(options.get("dtype"))
    if merge:
        return sources.load_transformer(merged_source(source, loras, dtype), **options)
    check_apart(loras, source.config)
    linears = linear_names(source.config)
    small = merged_source(source, loras, dtype, only=lambda name: name not in linears)
    model = sources.load_transformer(small, **options)
    return keep_apart(model, loras, linears)


def linear_names(config):
    """Our names of the weights of linears."""
    return {name for name, t in conversion.our_tensors(config).items() if t.ndim == 2}


def check_apart(loras, config):
    """Raise `ValueError` for the first adapter that cannot be kept beside a linear."""
    linears = linear_names(config)
    for adapter in chain.from_iterable(lora.adapters("transformer") for lora in loras):
        if adapter.replaces and not linears.isdisjoint(adapter.rule.ours):
            raise ValueError(f"lora.merge=false: {adapter.name} is replaced, not added to")


def keep_apart(model, loras, linears):
    """Put the LoRAs' terms beside the linears of a loaded transformer."""

    def base(name):  # where the adapters are
        place, _, leaf = name.rpartition(".")
        return getattr(model.get_submodule(place), leaf).detach().cpu()

    resolver = LoraResolver(loras, "transformer", base, model.config)
    terms = {}
    for name in resolver.adapters:
        if name in linears:
            terms[name.removesuffix(".weight")] = resolver.terms(name)
    return adapt_linears(model, terms)


# --- text encoders --------------------------------------------------------------------------------


@torch.no_grad()
def merge_encoders(encoders, loras):
    """Merge the LoRAs' text parts into loaded `TextEncoders`; raises `ValueError`."""
    for part in ("clip", "t5"):
        if any(lora.adapters(part) for lora in loras):
            merge_encoder(getattr(encoders, part), loras, part)
    return encoders


def merge_encoder(model, loras, part):
    """Merge those of a part into one transformers model."""
    named = {name.removeprefix(CLIP_PREFIX): p for name, p in model.named_parameters()}
    check_text_adapters(loras, part, {name: p.shape for name, p in named.items()})
    resolver = LoraResolver(loras, part, lambda name: named[name].detach().cpu())
    for name in resolver.adapters:
        named[name].copy_(resolver.merged(name))


def check_text_adapters(loras, part, shapes):
    """Raise `ValueError` where one of LoRAs' adapters of a text encoder matches none of its weights
    {name: shape}.
    """
    pairs = ((lora, adapter) for lora in loras for adapter in lora.adapters(part))
    for lora, adapter in pairs:
        shape, own = shapes.get(adapter.name), list(adapter.form.shape)
        if shape is None or list(shape) != own:
            there = "no such weight" if shape is None else f"a weight of {list(shape)}"
            raise ValueError(
                f"lora={lora.file.where}: {adapter.name} of shape {own} is for another text "
                f"encoder: model.{part} has {there}"
            )


def check_text_files(loras, part, tensors):
    """`check_text_adapters` of the `Tensors` of a text encoder that is not loaded."""
    shapes = {name.removeprefix(CLIP_PREFIX): tensors.shape(name) for name in tensors.keys()}
    embedding = shapes.get("encoder.embed_tokens.weight")  # of T5, which may have it as `shared`
    check_text_adapters(loras, part, {"shared.weight": embedding} | shapes)
