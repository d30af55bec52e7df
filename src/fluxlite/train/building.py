"""The models of a run: made on meta, wrapped, and filled with weights one tensor at a time.

So no rank ever holds a whole model, not while it is loaded either.
"""

from dataclasses import asdict, replace

import torch

from fluxlite import parallel, rng
from fluxlite.cli.messages import warn_for_all
from fluxlite.nets.flux import Flux, initial_weight
from fluxlite.nets.latents import KIND_NAMES, drawing_kind
from fluxlite.nets.quantized import quantize_model
from fluxlite.train import optim
from fluxlite.weights import sources, writing
from fluxlite.weights.lora_merging import WIDENED, pad_columns
from fluxlite.weights.tensor_files import check_values


def meta_flux(config):
    """The transformer on meta, as it is."""
    with torch.device("meta"):
        return Flux(config.model.shape(), config.model.attention)


def wrap_flux(config, mesh, *, frozen=False):
    """The transformer on meta, wrapped as the configuration says."""
    model = meta_flux(config)
    if frozen:
        model.requires_grad_(False)
    else:
        optim.freeze_parameters(model.train(), config.optim)
    return wrap_model(model, config, mesh)


def wrap_model(model, config, mesh):
    """A model on meta, parallelized unless `mesh` is None; what is trained of it lies as
    optim.weights says, what is frozen in the compute dtype, a model that is all frozen as
    model.quantize says.
    """
    dtype, trained = getattr(torch, config.dtype), getattr(torch, config.optim.weights)
    for p in model.parameters():
        p.data = p.data.to(trained if p.requires_grad else dtype)
    if not any(p.requires_grad for p in model.parameters()) and config.model.quantize != "none":
        quantize_model(model, config.model.quantize)
    model.spreads_modulation = config.parallel.shard_modulation
    if mesh is None:
        return model
    return parallel.parallelize(model, mesh, config.parallel, dtype, compile=config.compile)


def open_base(config, save_converted=None):
    """The `Source` of model.checkpoint, or of what it is kept as; raises `ValueError` where it is
    no transformer.
    """
    given = dict(ema=config.model.ema, given=asdict(config.model.shape()))
    return writing.open_converted(config.model.checkpoint, save_converted, **given)


def check_base(config):
    """Raise `ValueError`, before anything is loaded, where model.checkpoint cannot be trained."""
    if config.model.checkpoint:
        where = f"model.checkpoint={config.model.checkpoint}"
        check_kind_of(open_base(config).config, config.model, where)


def check_kind_of(found, model, where):
    """Raise `ValueError`, naming `where`, where a transformer that sees more than noise is of
    another kind than a `ModelConfig` says.
    """
    kind = drawing_kind(found, model.downsampling, where)
    if kind not in ("plain", model.kind):
        raise ValueError(
            f"{where} takes {found.in_channels} channels and gives {found.out_channels}, as "
            f"{KIND_NAMES[kind]}: set model.kind={kind} to train it"
        )


def flux_weights(config, device, values_of=initial_weight):
    """The transformer's (name, values), one by one: the checkpoint's, or random by `values_of`.

    What a checkpoint of FLUX.1 does not see of a kind's inputs counts for nothing at first.
    """
    if not config.model.checkpoint:
        return random_weights(meta_flux(config), config.seed, device, values_of)
    source = open_base(config, config.model.save_converted)
    shape = config.model.shape()
    plain = source.config.in_channels == shape.out_channels
    begun = replace(shape, in_channels=shape.out_channels) if plain else shape
    check_shape(source, begun, "model.checkpoint", config.model.checkpoint)
    weights = checked_weights(source, "model.checkpoint", config.model.quantize)
    return widened_weights(weights, shape.in_channels)


def widened_weights(weights, channels):
    """(name, values) with columns of zeros for the channels that the first linear does not know."""
    for name, values in weights:
        yield name, pad_columns(values, channels) if name == WIDENED else values


def random_base_value(name, *options):
    """`initial_weight` with a random output layer: behind a zero one nothing can learn."""
    return initial_weight("img_in.weight" if name == "out.weight" else name, *options)


def frozen_weights(config, device):
    """`flux_weights` of the transformer that a task freezes."""
    if not config.model.checkpoint:
        warn_for_all(
            "model.checkpoint is null: the frozen transformer is random, its output layer too; "
            "only what is trained beside it learns"
        )
    return flux_weights(config, device, random_base_value)


def checked_weights(source, setting, quantize="none"):
    """`weights_of` a source; raises `ValueError`, naming the setting and the tensor, where one is
    not finite.
    """
    for name, values in sources.weights_of(source, quantize):
        check_values(f"{setting}={source.where}: {name}", values)
        yield name, values


def check_shape(source, shape, key, value):
    """Raise `ValueError`, with the differences, where a checkpoint has another shape than the
    configuration.
    """
    if source.config != shape:
        old, new = asdict(source.config), asdict(shape)
        changes = list_changes(old, new, changed_keys(old, new))
        raise ValueError(f"{key}={value} has another shape: {changes}")


def changed_keys(old, new):
    """The keys whose values differ between two dictionaries."""
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def list_changes(old, new, keys):
    """`key: value there, value here` for each of the keys."""
    keys = sorted(keys)
    return ", ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys)


def random_weights(model, seed, device, values_of=initial_weight):
    """Initial values of each parameter of a model, keyed by the seed: the same on any mesh."""
    generator = device_generator(seed, "weights", device)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return ((name, values_of(name, shape, device, generator)) for name, shape in shapes.items())


def device_generator(seed, stream, device):
    """A generator on a device, keyed by the seed and a stream."""
    return torch.Generator(device).manual_seed(rng.generator(seed, 0, stream).initial_seed())
