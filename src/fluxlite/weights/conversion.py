"""From one layout to another: tensors are carried over a rule at a time, and checked before.

No more than a few linears are in memory. Completeness is checked on names and shapes before any
tensor is read.
"""

import itertools
from dataclasses import astuple
from functools import lru_cache, reduce

import torch

from fluxlite.nets.autoencoder import Autoencoder
from fluxlite.nets.controlnet import ControlNet
from fluxlite.nets.flux import Flux
from fluxlite.weights.dtypes import wider_dtype
from fluxlite.weights.layouts import SAME, spell_rules

NETWORKS = {"transformer": Flux, "controlnet": ControlNet, "autoencoder": Autoencoder}


def build_on_meta(config, *options):
    """The model that `config` describes, without memory for its weights."""
    with torch.device("meta"):
        return NETWORKS[config.part](config, *options)


def our_tensors(config):
    """{name: meta tensor} of a model in our layout."""
    return dict(_tensors_of(type(config), astuple(config)))


@lru_cache(maxsize=8)
def _tensors_of(cls, values):
    """`our_tensors` of the configuration cls(*values): building FLUX.1 on meta takes seconds."""
    return build_on_meta(cls(*values)).state_dict()


def model_rules(layout, config):
    """The rules between `layout` and ours for a whole model."""
    return spell_rules(layout, config, our_tensors(config))


def layout_shapes(layout, config):
    """{name: shape} of a whole checkpoint in `layout`, in the order that `convert_weights` has."""
    ours, found = our_tensors(config), {}
    for rule in spell_rules(layout, config, ours):
        parts = rule.transform.backward([ours[name] for name in rule.ours], config)
        found |= {name: tuple(part.shape) for name, part in zip(rule.theirs, parts)}
    return found


def optional_names(layout, config):
    """Names in `layout` that a checkpoint may lack: NeMo's second bias."""
    found = set()
    for rule in model_rules(layout, config):
        found.update(rule.optional)
    return found


def check_layout(layout, config, found):
    """Raise `ValueError`, with a list, unless {name: shape} is exactly such a checkpoint."""
    expected = layout_shapes(layout, config)
    there = [name for name in expected if name in found]
    faults = {
        "missing": sorted(expected.keys() - found.keys() - optional_names(layout, config)),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name])}, not {list(expected[name])}"
            for name in there
            if tuple(found[name]) != expected[name]
        ],
    }
    faults = {fault: names for fault, names in faults.items() if names}
    if not faults:
        return
    counts = ", ".join(f"{len(names)} {fault}" for fault, names in faults.items())
    listed = "; ".join(
        f"{fault}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for fault, names in faults.items()
    )
    raise ValueError(f"{counts} among the keys of this {layout} checkpoint; {listed}")


def convert_weights(read, source, target, config):
    """Yield (name in `target`'s layout, tensor) of a whole model; `read(name)` reads one of
    `source`'s.

    Every tensor of the source is read once and no more than a few linears are held; tensors whose
    bytes do not change are views of the source's.
    """
    made, makers = {}, rules_by_name(source, config)

    def ours(name):
        if name not in made:
            rule = makers[name]
            required = rule.theirs[: len(rule.theirs) - len(rule.optional)]
            tensors = [read(n) for n in required]
            made.update(zip(rule.ours, apply_transform(rule.transform, "forward", tensors, config)))
        return made.pop(name)

    for rule in model_rules(target, config):
        tensors = [ours(name) for name in rule.ours]
        yield from zip(rule.theirs, apply_transform(rule.transform, "backward", tensors, config))


def apply_transform(transform, direction, tensors, config):
    """A `Transform` of tensors, those that it joins in the widest of their types."""
    if transform is not SAME and len(tensors) > 1:
        common = reduce(wider_dtype, [t.dtype for t in tensors])
        tensors = [t.to(common) for t in tensors]
    return getattr(transform, direction)(tensors, config)


def rules_by_name(layout, config, side="ours"):
    """{name: the rule that has it} of all tensors of ours, or of "theirs", those in `layout`."""
    found = {}
    for rule in model_rules(layout, config):
        found |= dict.fromkeys(getattr(rule, side), rule)
    return found


def layout_dtypes(source, target, config, theirs):
    """{name: type} in `target` for a checkpoint in `source` whose types are {name: dtype}.

    Each tensor's is that of its sources; where they differ, the wider one.
    """
    makers, found = rules_by_name(source, config), {}
    for rule in model_rules(target, config):
        names = itertools.chain.from_iterable(makers[name].theirs for name in rule.ours)
        types = [theirs[name] for name in names if name in theirs]
        found |= dict.fromkeys(rule.theirs, reduce(wider_dtype, types))
    return found


def convert_state(state, config, source, target):
    """A state dict in the layout `target` from one in `source`, checked first.

    Only what changes is copied.
    """
    check_layout(source, config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return dict(convert_weights(state.__getitem__, source, target, config))


def to_fluxlite(state, config, layout):
    """A state dict of ours from one in `layout`."""
    return convert_state(state, config, layout, "fluxlite")


def from_fluxlite(state, config, layout):
    """A state dict in `layout` from one of ours."""
    return convert_state(state, config, "fluxlite", layout)
