"""Setting a run up: its models, optimizers, frozen encoders and data."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fluxlite import parallel
from fluxlite.cli.messages import warn_for_all
from fluxlite.cli.options import option_value
from fluxlite.data.cache import MADE_BY, CachedSamples, build_cache
from fluxlite.data.images import pixels_of
from fluxlite.data.loading import make_loader
from fluxlite.data.mock import MockSamples
from fluxlite.data.opening import open_dataset, prepare_data
from fluxlite.data.transfers import send_tensor
from fluxlite.draw.pipeline import check_latents
from fluxlite.nets.flux import rope_table
from fluxlite.nets.latents import position_ids
from fluxlite.parallel import ParallelConfig
from fluxlite.train import optim
from fluxlite.train.building import check_base
from fluxlite.train.draws import DrawnSamples, draw_posterior, draw_step, shape_of
from fluxlite.train.tasks import choose_task
from fluxlite.train.tasks.conditions import check_sees
from fluxlite.train.tasks.task import Task
from fluxlite.weights import sources
from fluxlite.weights.run_folder import DataRecord
from fluxlite.weights.text_encoders import load_text_encoders


@dataclass
class FrozenParts:
    """What surrounds the transformer in training; None where the data needs no encoder."""

    autoencoder: object = None
    encoders: object = None


@dataclass
class Run:
    """All that a training step touches."""

    config: object
    device: torch.device
    mesh: parallel.Mesh
    task: Task
    models: list  # what is trained first, the transformer last
    optimizers: list
    ema: optim.EMA | None
    parts: FrozenParts
    rope: tuple  # of the configuration's shape
    data: DataRecord = field(default_factory=DataRecord)  # what it is trained on

    def __post_init__(self):
        self.velocity = self.task.velocity_of(self.models)
        self.model, self.flux = self.models[0], self.models[-1]  # which may be the same
        self.dtype = getattr(torch, self.config.dtype)  # what is computed in
        self.latent_shape = self.config.latent_shape()  # (C, h, w) of one picture
        self.ropes = {self.latent_shape[1:]: self.rope}
        self.gradient_groups = optim.group_by_share(self.model)

    @property
    def micro_batches(self):
        """How many of this rank's micro-batches make a step."""
        data = self.config.data
        return data.global_batch // (data.micro_batch * self.mesh.dp_size)

    def drawn_samples(self, dataset, *draws):
        """A data set with what its samples are encoded with, and with more `draws`."""
        encoding = draw_posterior, self.task.draw_inputs
        return DrawnSamples(dataset, *(partial(draw, self.config) for draw in (*encoding, *draws)))

    def rope_of(self, batch):
        """The rope table of a batch's shape, made once for each."""
        cells = tuple(shape_of(self.config, batch)[1:])
        if cells not in self.ropes:
            self.ropes[cells] = make_rope(self.config, cells, self.device)
        return self.ropes[cells]

    def loader(self, dataset, *, draws=(draw_step,), **options):
        """This rank's batches of a data set, with their draws: those of its place in data
        parallelism, the same for tp and cp ranks.
        """
        ranks = dict(dp_rank=self.mesh.dp_rank, dp_size=self.mesh.dp_size)
        samples = self.drawn_samples(dataset, *draws)
        sizes = dict(micro_batch=self.config.data.micro_batch, pinned=self.device.type == "cuda")
        return make_loader(samples, **sizes, **ranks, **options)


def set_up(config, device, mesh):
    """Models, optimizers and encoders of a run on this rank's device of a `parallel.Mesh`."""
    warn_of_warmup(config)
    warn_of_idle(config.parallel)
    parallel.warn_of_rounding(config.model.quantize)
    check_base(config)
    task = choose_task(config)
    check_sees(task, config)
    parts = load_parts(config, device, mesh)
    return assemble_run(config, device, mesh, task, task.build_models(config, device, mesh), parts)


def state_per_rank(config, ranks):
    """Bytes of what lives from step to step on each of `ranks` that share one copy of the weights;
    the modulation may be spread over all there are.
    """
    total = 0
    for wrap, _ in choose_task(config).models:
        model = wrap(config, None)
        for name, size in optim.state_bytes(model, config.optim).items():
            spread = name.startswith("modulation.") and model.spreads_modulation
            share = parallel.world_size() if spread else ranks
            total += size / (1 if model.is_whole else share)
    return total


def warn_of_warmup(config):
    """Say so where a run ends before its learning rate has risen to `optim.lr`."""
    if config.optim.warmup >= config.steps:
        lengths = config.optim.warmup, config.steps
        warn_for_all("optim.warmup=%d is not over when the run ends at steps=%d", *lengths)


def warn_of_idle(settings):
    """Say so where settings of a `ParallelConfig` change nothing, since there is one process."""
    names = "prefetch", "reduce_dtype", "shard_encoders"
    idle = [name for name in names if getattr(settings, name) != getattr(ParallelConfig, name)]
    if idle and parallel.world_size() == 1:
        named = ", ".join(f"parallel.{name}" for name in idle)
        warn_for_all("%s: of no effect on one process", named)


def assemble_run(config, device, mesh, task, models, parts):
    """The `Run` of a task's wrapped models."""
    optimizers = optim.make_optimizers(models[0], config.optim, mesh)
    ema = optim.EMA(models[0], config.optim.ema_decay) if config.optim.ema_decay else None
    rope = make_rope(config, config.latent_shape()[1:], device)
    flux = models[-1].config
    flux.scheduler = sources.scheduler_beside(config.model.checkpoint, flux)  # for pictures
    return Run(config, device, mesh, task, models, optimizers, ema, parts, rope)


def make_rope(config, cells, device):
    """The rope table of latents of (height, width) `cells`."""
    references = [cells] if config.model.kind == "kontext" else []
    positions = position_ids(*cells, config.model.max_sequence_length, references)
    return rope_table(send_tensor(positions, device), config.model.shape())


def load_parts(config, device, mesh):
    """The frozen autoencoder and text encoders that the configuration names; T5 is sharded where
    that is asked for.
    """
    if not config.model.t5:
        return FrozenParts()
    source = open_autoencoder(config)
    sharded = config.parallel.shard_encoders
    where = dict(dtype=getattr(torch, config.dtype), device=device)
    names, tokenizers = (config.model.t5, config.model.clip), config.model.tokenizers
    places = dict(t5_device="cpu" if sharded else device, tokenizers=tokenizers)
    encoders = load_text_encoders(*names, **places, **where, fitting=config.model.shape())
    if sharded:
        parallel.shard_frozen(encoders.t5, encoders.t5.encoder.block, mesh.node)
    return FrozenParts(sources.load_autoencoder(source, **where), encoders)


def open_autoencoder(config):
    """The `Source` of model.autoencoder; raises `ValueError` where its latents are not those that
    the configuration counts on.
    """
    where = config.model.autoencoder
    source = sources.open_part(where, "autoencoder")
    check_latents(config.model.shape(), source)
    cell = source.config.downsampling
    if cell != config.model.downsampling:
        raise ValueError(
            f"model.autoencoder={where} makes a latent cell of {cell} pixels a "
            f"side, and model.downsampling={config.model.downsampling}: set "
            f"model.downsampling={cell}"
        )
    return source


def find_data(config):
    """{"train", "val": the data set}, not encoded yet: what is wrong with files is raised before a
    model is loaded.
    """
    places = {}
    return {split: find_split(config, split, places) for split in ("train", "val")}


def open_data(config, run, found=None):
    """The training and validation sets that `find_data` found; with `data.cache` encoded first, by
    all ranks together.
    """
    training, validation = (
        encoded_split(config, run, split, dataset)
        for split, dataset in (found or find_data(config)).items()
    )
    if len(training) < config.data.global_batch:
        warn_for_all(
            "an epoch has %d samples, and data.global_batch=%d: a step takes some of them twice",
            *(len(training), config.data.global_batch),
        )
    return training, validation


def find_split(config, split, places):
    """One of the sets, "train" or "val", not encoded yet; `places` are for both."""
    data, model = config.data, config.model
    if not model.t5:
        return MockSamples(
            data,
            split=split,
            seed=config.seed,
            latent_shape=config.latent_shape(),
            text_shape=(model.max_sequence_length, model.text_width),
            pooled_width=model.pooled_width,
        )
    prepare_data(data, split)
    return open_dataset(data, split, config.seed, places)


def encoded_split(config, run, split, dataset):
    """A set from its cache, where there is one to be."""
    cache = config.data.cache
    return cache_samples(run, dataset, Path(cache) / split) if cache else dataset


def cache_samples(run, dataset, folder):
    """The samples encoded, in a folder that holds them afterwards."""
    parts, length = run.parts, run.config.model.max_sequence_length
    directory = build_cache(
        dataset,
        folder,
        encode_images=partial(encode_pixels, parts.autoencoder, run.device),
        encode_texts=lambda texts: parts.encoders.encode(texts, length),
        digest=encoders_digest(parts, length, run.config.dtype),
        settings={key: option_value(run.config, key) for key in MADE_BY["encoders"]},
        rank=parallel.rank(),
        world_size=parallel.world_size(),
    )
    parallel.wait_for_all()
    return CachedSamples(dataset, directory)


def encode_pixels(autoencoder, device, levels):
    """The posterior of pictures (B, 3, H, W) uint8."""
    return autoencoder.posterior(pixels_of(send_tensor(levels, device)))


def encoders_digest(parts, max_sequence_length, dtype):
    """A digest of all that encoded latents and texts depend on."""
    digest = hashlib.blake2b(
        f"{parts.encoders.digest}/{max_sequence_length}/{dtype}".encode(), digest_size=8
    )
    for name, tensor in sorted(parts.autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
