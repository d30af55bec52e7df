"""Training a LoRA beside a transformer, which is frozen in the compute dtype.

B samples of a micro-batch, r ranks. Linears are named as diffusers names them, and so a LoRA file.
"""

import fnmatch
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import torch

from fluxlite import parallel, rng
from fluxlite.cli.options import option, refuse_first
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.lora import Adapters, LowRank, LowRankAdapter
from fluxlite.nets.quantized import computed_weight
from fluxlite.train import optim
from fluxlite.train.building import (
    device_generator,
    flux_weights,
    frozen_weights,
    random_base_value,
    wrap_flux,
)
from fluxlite.train.tasks.task import Task
from fluxlite.weights import conversion, lora_keys, lora_merging, lora_writing
from fluxlite.weights.lora_adapters import Adapter, form_part, rule_shape
from fluxlite.weights.lora_files import LORA_RUN_NAME, kind_of, read_lora

LAYOUT = "diffusers"  # whose linears have an adapter each
TEXT_PARTS = r"text_encoder*", r"lora_te*", r"clip*", r"t5*"  # how targets name text encoders


@dataclass
class LoraTrainConfig:
    """The LoRA that is trained beside a frozen transformer; none without `lora=default` or a recipe
    that has one.
    """

    train: bool = option(False, "train a LoRA; set by lora=default", group="lora")
    checkpoint: str | None = option(
        None,
        "a LoRA to go on from, of any dialect, or a run: its linears, ranks and strength",
        path=True,
        resume="elsewhere",
    )
    rank: int = option(
        16,
        "of linears whose target names none",
        at_least=1,
        at_most=10_000,
        only_with={"lora.checkpoint": (None,)},
    )
    alpha: float | None = option(
        None,
        "strength: alpha / rank; null: the rank, so 1",
        above=0,
        at_most=1e6,
        only_with={"lora.checkpoint": (None,)},
    )
    targets: list[str] = option(
        [
            "transformer_blocks.*.attn.*",
            "transformer_blocks.*.ff*",
            "single_transformer_blocks.*.attn.*",
            "single_transformer_blocks.*.proj_*",
        ],
        "patterns of diffusers' full names of linears, each alone or as PATTERN:RANK, of which the "
        "last counts; proj_out is the last layer alone, *.proj_out those of the single blocks",
        only_with={"lora.checkpoint": (None,)},
    )
    dora: bool = option(
        False, "train the rows' norms too (DoRA)", only_with={"lora.checkpoint": (None,)}
    )
    dropout: float = option(
        0.0,
        "share of each adapter's ranks that a sample is trained without (kohya's rank_dropout)",
        at_least=0,
        below=1,
    )
    write: list[str] = option(
        [],
        "dialects that each checkpoint's LoRA is written in beside diffusers' and peft's",
        choices=("kohya", "comfy"),
        resume=True,
    )


# --- which linears --------------------------------------------------------------------------------

# rule: of diffusers' linear; start: the `Adapter` to go on from, or None
PlannedAdapter = namedtuple("PlannedAdapter", "rule rank scale dora start")


def plan_adapters(config):
    """{diffusers' name of a linear: PlannedAdapter} of a `TrainConfig`; raises `ValueError`."""
    lora, shape = config.lora, config.model.shape()
    if lora.checkpoint:
        found = read_start(lora.checkpoint, tuple(asdict(shape).items()))
        return {
            lora_keys.split_leaf(a.name)[0]: PlannedAdapter(
                a.rule, a.form.down.shape[0], a.scale, a.magnitude is not None, a
            )
            for a in found
        }
    rules = linear_rules(shape)
    ranks = choose_ranks(lora, rules)
    return {
        name: PlannedAdapter(rules[name], rank, (lora.alpha or rank) / rank, lora.dora, None)
        for name, rank in ranks.items()
    }


def linear_rules(shape):
    """{diffusers' name: rule} of all linears of a transformer."""
    return rules_of(tuple(asdict(shape).items()))


@cache
def rules_of(fields):
    """`linear_rules` of a shape's (field, value) pairs: they are asked for with each sample."""
    shape, found = FluxConfig(**dict(fields)), {}
    linears = lora_merging.linear_names(shape)
    for rule in lora_keys.adapter_rules(LAYOUT, shape):
        if linears.issuperset(rule.ours):
            found[lora_keys.split_leaf(rule.theirs[0])[0]] = rule
    return found


def choose_ranks(lora, names):
    """{name: rank} of the linears that the targets of a `LoraTrainConfig` match; raises
    `ValueError`.
    """
    ranks = {}
    for target in lora.targets:
        pattern, colon, rank = target.partition(":")
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(unmatched_text(target, pattern, names))
        if colon and not (rank.isascii() and rank.isdecimal() and 0 < int(rank) <= 10_000):
            raise ValueError(
                f"lora.targets={target}: the rank {rank or 'after the colon'} must be a number "
                "from 1 to 10,000"
            )
        ranks |= dict.fromkeys(matched, int(rank) if colon else lora.rank)
    if not ranks:
        raise ValueError("lora.targets=[] leaves nothing to train: name linears, or leave it out")
    return {name: ranks[name] for name in names if name in ranks}


def unmatched_text(target, pattern, names):
    """What is wrong with a target that matches no linear."""
    if any(fnmatch.fnmatchcase(pattern, part) for part in TEXT_PARTS):
        return (
            f"lora.targets={target}: text encoders are not trained; other programs leave them out "
            "for FLUX by default"
        )
    ends = fnmatch.filter(names, f"*.{pattern}")
    near = f"*.{pattern} does" if ends else f"they look like {[*names][len(names) // 2]}"
    return f"lora.targets={target} matches no linear by its full name: {near}"


@cache
def read_start(where, shape):
    """The `Adapter`s of a LoRA to go on from, by diffusers' linears, for a transformer of a shape,
    (field, value) each; raises `ValueError`.
    """
    config, setting = FluxConfig(**dict(shape)), "lora.checkpoint="
    file = read_lora(where, config, setting=setting)
    try:
        if file.adapters.keys() != {"transformer"}:
            parts = " and ".join(file.adapters.keys() - {"transformer"})
            raise ValueError(f"it also changes {parts}: text encoders are not trained")
        for adapter in file.adapters["transformer"]:
            check_trainable(adapter, config)
        return lora_writing.regroup_adapters(file.adapters["transformer"], LAYOUT, config)
    except ValueError as error:
        raise ValueError(f"{setting}{where}: {error}") from None


def check_trainable(adapter, config):
    """Raise `ValueError` for an adapter of a kind that is read and not trained."""
    lora_merging.check_adapters([adapter], config)
    expected = rule_shape(adapter.rule, conversion.our_tensors(config), config)
    per_input = adapter.magnitude is not None and adapter.magnitude.shape != (expected[0], 1)
    if type(adapter.form) is not LowRank or per_input:
        kind = f"{kind_of(adapter)}{' per input' * per_input}"
        raise ValueError(
            f"{adapter.name} is a {kind}: LoRAs and DoRAs per output of linears' weights can be "
            "gone on from; bake this one into a base, and train on that"
        )
    if tuple(adapter.form.shape) != expected:
        raise ValueError(f"{adapter.name} widens the model's input, which cannot be trained")


def check_lora(config):
    """Raise `ValueError` where a `TrainConfig` cannot train its LoRA."""
    refuse_first(lora_conflicts(config))
    thin = meta_adapters(config, rank=1)
    optim.freeze_parameters(thin, config.optim)
    values = {name: torch.zeros(p.shape) for name, p in thin.named_parameters()}
    adapters = {"transformer": file_adapters(thin, values)}
    for to in ["peft"] * bool(config.lora.checkpoint) + config.lora.write:
        try:
            lora_writing.write_adapters(adapters, to, thin.config)
        except ValueError as error:
            where = f"lora.write={to} cannot hold this LoRA, leave it out"
            if to == "peft":
                where = f"lora.checkpoint={config.lora.checkpoint} cannot be gone on from"
            raise ValueError(f"{where}: {error}") from None


def lora_conflicts(config):
    """(whether it is so, text) of each way in which settings do not go with a LoRA."""
    to = config.lora.write
    yield len(to) > len(set(to)), f"lora.write={to} names a dialect twice: name each once"
    yield (
        config.optim.kind == "muon",
        "optim.kind=muon is for whole matrices, and a LoRA trains factors of them: set "
        "optim.kind=adamw",
    )
    yield (
        config.parallel.float8 != "none",
        f"parallel.float8={config.parallel.float8} is for linears that are trained, and a LoRA's "
        "base is frozen: leave it out",
    )


# --- models ---------------------------------------------------------------------------------------


def meta_adapters(config, rank=None):
    """The `Adapters` on meta, as they are; or all of one `rank`."""
    ours, found = conversion.our_tensors(config.model.shape()), {}
    planned = plan_adapters(config)
    with torch.device("meta"):
        for name, (rule, own_rank, scale, dora, _) in planned.items():
            linears = [lora_keys.split_leaf(weight)[0] for weight in rule.ours]
            widths = [ours[weight].shape[1] for weight in rule.ours]
            sizes = widths, len(ours[rule.ours[0]]), rank or own_rank
            found[name] = LowRankAdapter(linears, *sizes, scale, dora)
    return Adapters(config.model.shape(), found)


def wrap_adapters(config, mesh):
    """The `Adapters` on meta, split as tensor parallelism splits their linears."""
    net = meta_adapters(config)
    optim.freeze_parameters(net.train(), config.optim)
    if mesh and mesh.tp.size() > 1:
        sequence = config.parallel.sequence_parallel
        parallel.shard_adapters(net, mesh.tp, sequence=sequence)
    return net


def wrap_base(config, mesh):
    """The frozen transformer on meta, wrapped; a modulation with adapters is not spread over
    ranks, where it does not compute by its linears.
    """
    rules = [planned.rule for planned in plan_adapters(config).values()]
    adapted = any(rule.ours[0].startswith("modulation.") for rule in rules)
    spread = config.parallel.shard_modulation and not adapted
    settings = replace(config.parallel, shard_modulation=spread)
    return wrap_flux(replace(config, parallel=settings), mesh, frozen=True)


def adapter_weights(config, device):
    """The adapters' (name, values) to start from: a file's, or such that nothing is changed."""
    if config.lora.checkpoint:
        return start_weights(config)
    return unchanging_weights(config, meta_adapters(config), device)


def start_weights(config):
    """Those of lora.checkpoint=."""
    shape = config.model.shape()
    for name, planned in plan_adapters(config).items():
        adapter = planned.start
        for number, leaf in zip(range(len(planned.rule.ours)), LowRankAdapter.DOWNS):
            part = form_part(adapter.form, adapter.rule, number, shape)
            yield f"{name}.{leaf}", part.down
        yield f"{name}.up", adapter.form.up
        if planned.dora:
            yield f"{name}.magnitude", adapter.magnitude[:, 0]


def unchanging_weights(config, net, device):
    """up 0, down as torch initialises a linear (so do peft and kohya), drawn on the host and so the
    same on any device, and as magnitudes the norms of the base's rows.
    """
    norms = base_norms(config, net, device) if config.lora.dora else {}
    generator = device_generator(config.seed, "weights", "cpu")
    for name, adapter in net.each.items():
        bound = sum(down.shape[1] for down in adapter.downs()) ** -0.5
        for leaf, p in adapter.named_parameters():
            values = torch.zeros(p.shape)
            if leaf.startswith("down"):
                values.uniform_(-bound, bound, generator=generator)
            yield f"{name}.{leaf}", norms[name] if leaf == "magnitude" else values


def base_norms(config, net, device):
    """{name of an adapter: norms of the rows of its linears' weights, in the compute dtype}."""
    squares, dtype = {}, getattr(torch, config.dtype)
    places = {f"{n}.weight": name for name, adapter in net.each.items() for n in adapter.names}
    for weight, values in flux_weights(config, device, random_base_value):
        if weight in places:
            found = computed_weight(weight, values, config.model.quantize, dtype)
            found = found.float().square().sum(1)
            squares[places[weight]] = squares.get(places[weight], 0) + found
    return {name: total.sqrt() for name, total in squares.items()}


# --- a step ---------------------------------------------------------------------------------------


def connect_adapters(models):
    """velocity(img, txt, rope, …) of a transformer with its adapters, put beside its linears."""
    parallel.attach_adapters(*models)
    return partial(adapted_velocity, *models)


def adapted_velocity(adapters, flux, img, txt, rope, *, kept_ranks=None, **inputs):
    """The transformer's velocity with its adapters."""
    adapters.keep_ranks(kept_ranks)
    return flux(img, txt, rope, **inputs)


def draw_ranks(config, sample):
    """Which ranks of which adapter a sample is trained with, (adapters, ranks): 0, or what makes
    up for those that are 0.
    """
    share = config.lora.dropout
    if not share:
        return {}
    planned = plan_adapters(config).values()
    generator = rng.generator(config.seed, sample["indices"], "lora dropout")
    shape = len(planned), max(adapter.rank for adapter in planned)
    drawn = torch.rand(shape, generator=generator)
    return {"kept_ranks": (drawn >= share) / (1 - share)}


def drop_ranks(run, inputs, batch):
    """Inputs with the ranks to train with, where there is dropout."""
    return inputs | ({"kept_ranks": batch["kept_ranks"]} if run.config.lora.dropout else {})


# --- files ----------------------------------------------------------------------------------------


def file_adapters(net, values):
    """The `Adapter`s of a net's parameters {name: whole values}."""
    rules, found = linear_rules(net.config), []
    for name, adapter in net.each.items():
        downs = [values[f"{name}.{leaf}"] for leaf in adapter.down_names]
        magnitude = values.get(f"{name}.magnitude")
        magnitude = None if magnitude is None else magnitude[:, None]
        form = LowRank(torch.cat(downs, dim=1), values[f"{name}.up"])
        found.append(Adapter(rules[name], LAYOUT, form, adapter.scale, magnitude))
    return found


def write_files(run, folder):
    """Write a run's LoRA, its moving average where it has one, into a checkpoint's folder: with
    peft's keys, and in the dialects of lora.write. Collective.
    """
    held = dict(run.model.named_parameters()) | (run.ema.average if run.ema else {})
    values = {name: parallel.whole_tensor(tensor) for name, tensor in held.items()}
    adapters = {"transformer": file_adapters(run.model, values)}

    def write():
        for to in ("peft", *run.config.lora.write):
            file = folder / (LORA_RUN_NAME if to == "peft" else f"lora-{to}.safetensors")
            lora_writing.write_lora(adapters, file, to, run.model.config)

    parallel.first_rank_does(write)


LORA = Task(
    name="lora",
    models=((wrap_adapters, adapter_weights), (wrap_base, frozen_weights)),
    velocity_of=connect_adapters,
    check_settings=check_lora,
    draw_inputs=draw_ranks,
    drop_inputs=drop_ranks,
    write_files=write_files,
)
