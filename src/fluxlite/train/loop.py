"""Training: set up a run, take steps, validate, draw, save.

The way to the network is `train → train_step → flow_loss → Flux.forward`. A run is a pure function
of (config, seed, data): every random draw is keyed by the sample's global index.

B samples of a micro-batch, L tokens, C channels of a token.
"""

import hashlib
import json
import logging
import math
import signal
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from fluxlite import __version__, parallel, rng
from fluxlite.cli.options import resumable_keys
from fluxlite.cli.processes import held_signals
from fluxlite.data import (
    CachedSamples,
    MockSamples,
    build_cache,
    make_loader,
    open_dataset,
    prepare,
)
from fluxlite.data.cache import data_digest
from fluxlite.draw import sampling
from fluxlite.draw.pipeline import check_widths, resolve
from fluxlite.nets import flow, schedule
from fluxlite.nets.autoencoder import sample_posterior
from fluxlite.nets.controlnet import (
    ControlNet,
    initial_value,
    nearest_depth,
    spread,
    unused_parameters,
    used,
    weights_from_base,
)
from fluxlite.nets.flux import Flux, check_channels, initial, rope_table
from fluxlite.nets.latents import num_image_tokens, pack_latents, position_ids
from fluxlite.train import optim, run_state
from fluxlite.train.meter import Meter
from fluxlite.train.metrics import Metrics, Throughput, contact_sheet, plot_control, plot_losses
from fluxlite.weights import run_folder, sources
from fluxlite.weights.tensor_files import aside, check_values
from fluxlite.weights.text_encoders import load_text_encoders

log = logging.getLogger("fluxlite")


@dataclass
class Parts:
    """What surrounds the transformer in training; None where the data needs no encoder."""

    autoencoder: object
    encoders: object


@dataclass
class Prompts:
    """What grids are drawn from: captions, their encodings, and for a ControlNet its inputs and the
    pictures to show.
    """

    texts: list
    txt: torch.Tensor
    pooled: torch.Tensor
    steer: dict
    shown: list  # control and target of each, PIL


@dataclass
class Watch:
    """What a run is watched with."""

    metrics: Metrics
    speed: Throughput
    held_out: list
    prompts: Prompts | None
    meter: Meter | None


@dataclass
class Run:
    """All that a training step touches."""

    config: object
    device: torch.device
    mesh: parallel.Mesh
    model: Flux | ControlNet  # what is trained
    base: Flux | None  # the frozen transformer beside a ControlNet
    optimizers: list
    ema: optim.EMA | None
    parts: Parts
    rope: tuple
    data: run_folder.DataRecord = field(
        default_factory=run_folder.DataRecord
    )  # what it is trained on

    @property
    def flux(self):
        """The transformer, trained or frozen."""
        return self.base or self.model

    @property
    def latent_shape(self):
        """(C, h, w) of one picture's latents."""
        data = self.config.data
        return self.config.model.in_channels // 4, data.height // 8, data.width // 8


# --- setting up -----------------------------------------------------------------------------------


def build_flux(config, device, mesh, *, frozen=False):
    """The sharded transformer: random weights keyed by the seed where `model.checkpoint` is null,
    else the checkpoint's.

    Wrapped on meta and filled a tensor at a time, it is never whole on any rank. Frozen it is in
    the compute dtype.
    """
    weights = base_weights(config, device) if frozen else flux_weights(config, device)
    if frozen and not config.model.checkpoint and parallel.rank() == 0:
        log.warning(
            "model.checkpoint is null: the frozen transformer is random, its output layer too; "
            "only the ControlNet learns"
        )
    model = wrap_flux(config, mesh, frozen=frozen)
    return parallel.fill(model, weights, "cpu" if config.parallel.cpu_offload else device)


def wrap_flux(config, mesh, *, frozen=False):
    """The transformer on meta, wrapped as the configuration says."""
    model = meta_flux(config)
    if frozen:
        model.to(getattr(torch, config.dtype)).requires_grad_(False)
    else:
        optim.freeze(model.train(), config.optim)
    return wrap(model, config, mesh)


def meta_flux(config):
    """The transformer on meta, as it is."""
    with torch.device("meta"):
        return Flux(config.model.shape(), config.model.attention)


def wrap(model, config, mesh):
    """A model on meta, parallelized."""
    return parallel.parallelize(
        model, mesh, config.parallel, getattr(torch, config.dtype), compile=config.compile
    )


def check_base(config):
    """Raise `ValueError`, before anything is loaded, where model.checkpoint cannot be trained."""
    if config.model.checkpoint:
        where = resolve(config.model.checkpoint)
        source = sources.open_source(
            where, ema=config.model.ema, given=asdict(config.model.shape())
        )
        sources.check_part(source, "transformer", "model.checkpoint")
        check_channels(source.config, f"model.checkpoint={config.model.checkpoint}")


def flux_weights(config, device):
    """The transformer's (name, values), one by one: the checkpoint's, or random."""
    shape = config.model.shape()
    if not config.model.checkpoint:
        return random_weights(meta_flux(config), config.seed, device)
    where, options = (
        resolve(config.model.checkpoint),
        dict(ema=config.model.ema, given=asdict(shape)),
    )
    source = sources.converted(where, config.model.save_converted, **options)
    sources.check_part(source, "transformer", "model.checkpoint")
    check_shape(source, shape, "model.checkpoint", config.model.checkpoint)
    return checked_weights(source, "model.checkpoint")


def checked_weights(source, setting):
    """`weights_of` a source; raises `ValueError`, naming the setting and the tensor, where one is
    not finite.
    """
    for name, values in sources.weights_of(source):
        check_values(f"{setting}={source.where}: {name}", values)
        yield name, values


def check_shape(source, shape, key, value):
    """Raise `ValueError`, with the differences, where a checkpoint has another shape than the
    configuration.
    """
    if source.config != shape:
        raise ValueError(
            f"{key}={value} has another shape: {_differences(asdict(source.config), asdict(shape))}"
        )


def random_weights(model, seed, device, values_of=initial):
    """Initial values of each parameter of a model, keyed by the seed: the same on any mesh."""
    generator = torch.Generator(device).manual_seed(
        rng.generator(seed, 0, "weights").initial_seed()
    )
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return ((name, values_of(name, shape, device, generator)) for name, shape in shapes.items())


def base_weights(config, device):
    """`flux_weights` of a frozen transformer. A random one gets a random output layer: behind a
    zero one nothing can learn.
    """
    if config.model.checkpoint:
        return flux_weights(config, device)

    def values_of(name, *options):
        return initial("img_in.weight" if name == "out.weight" else name, *options)

    return random_weights(meta_flux(config), config.seed, device, values_of)


def build_controlnet(config, device, mesh):
    """The sharded ControlNet."""
    weights, net = controlnet_weights(config, device), wrap_controlnet(config, mesh)
    return parallel.fill(net, weights, "cpu" if config.parallel.cpu_offload else device)


def meta_controlnet(config):
    """The ControlNet on meta, as it is."""
    with torch.device("meta"):
        return ControlNet(config.controlnet.shape(config.model.shape()), config.model.attention)


def wrap_controlnet(config, mesh):
    """The ControlNet on meta, wrapped; parameters that no gradient can reach are frozen and
    logged.
    """
    base, net = config.model.shape(), meta_controlnet(config)
    optim.freeze(net.train(), config.optim)
    unused = unused_parameters(net, base)
    parameters = dict(net.named_parameters())
    for name in unused:
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            "optim.trainable and optim.freeze leave nothing to train that a gradient can reach: "
            "see controlnet's depth"
        )
    if parallel.rank() == 0:
        report_unused(net.config, base, unused)
    return wrap(net, config, mesh)


def controlnet_weights(config, device):
    """A ControlNet's (name, values) to start from: a checkpoint's, its base's, or random."""
    control, net = config.controlnet, meta_controlnet(config)
    if control.checkpoint:
        source = sources.open_source(
            resolve(control.checkpoint),
            setting="controlnet.checkpoint",
            ema=config.model.ema,
            part="controlnet",
        )
        sources.check_part(source, "controlnet", "controlnet.checkpoint")
        check_shape(source, net.config, "controlnet.checkpoint", control.checkpoint)
        return checked_weights(source, "controlnet.checkpoint")
    if control.init_from_base:
        generator = torch.Generator(device).manual_seed(
            rng.generator(config.seed, 0, "controlnet").initial_seed()
        )
        return weights_from_base(
            net, config.model.shape(), base_weights(config, device), device, generator
        )
    return random_weights(net, config.seed, device, partial(initial_value, net.config))


def report_unused(shape, base, unused):
    """Log what is frozen since no gradient can reach it, and the nearest depth that wastes no
    block.
    """
    for kind in ("double", "single"):
        count, num_base = getattr(shape, f"num_{kind}_blocks"), getattr(base, f"num_{kind}_blocks")
        cyclic = kind == "double" and shape.hint == "pixel"
        if used(num_base, count, cyclic=cyclic) < count:
            log.warning(
                "controlnet.num_%s_blocks=%d: the transformer's %d blocks take the outputs of %d, "
                "the rest is frozen; "
                "%d would waste none",
                *(
                    kind,
                    count,
                    num_base,
                    used(num_base, count, cyclic=cyclic),
                    nearest_depth(num_base, count),
                ),
            )
    if unused:
        log.info("frozen, since no gradient can reach them: %s", ", ".join(unused))


def load_parts(config, device, mesh):
    """The frozen autoencoder and text encoders that the configuration names; T5 is sharded where
    that is asked for.
    """
    if not config.model.t5:
        return Parts(None, None)
    dtype = getattr(torch, config.dtype)
    sharded = config.parallel.shard_encoders
    where = dict(device=device, t5_device="cpu" if sharded else device)
    encoders = load_text_encoders(
        resolve(config.model.t5), resolve(config.model.clip), dtype=dtype, **where
    )
    if sharded:
        parallel.shard_frozen(encoders.t5, encoders.t5.encoder.block, mesh.world)
    autoencoder = sources.load_autoencoder(
        resolve(config.model.autoencoder), dtype=dtype, device=device
    )
    check_widths(config.model.shape(), autoencoder, encoders)
    return Parts(autoencoder, encoders)


def open_data(config, run):
    """The training and validation sets; with `data.cache` encoded first, by all ranks together."""
    data, model = config.data, config.model
    if run.parts.encoders is None:
        widths = dict(
            latent_shape=run.latent_shape,
            text_shape=(model.max_sequence_length, model.text_width),
            pooled_width=model.pooled_width,
        )
        return [
            MockSamples(data, split=split, seed=config.seed, **widths) for split in ("train", "val")
        ]
    sets, found = [], {}
    for split in ("train", "val"):
        prepare(data, split, config.seed)
        dataset = open_dataset(data, split, config.seed, found)
        if data.cache:
            directory = build_cache(
                dataset,
                Path(data.cache) / split,
                encode_images=lambda images: run.parts.autoencoder.posterior(images.to(run.device)),
                encode_texts=lambda texts: run.parts.encoders.encode(
                    texts, model.max_sequence_length
                ),
                digest=encoders_digest(run.parts, model.max_sequence_length, config.dtype),
                rank=parallel.rank(),
                world_size=parallel.world_size(),
            )
            parallel.wait_for_all()
            dataset = CachedSamples(dataset, directory)
        sets.append(dataset)
    return sets


def encoders_digest(parts, max_sequence_length, dtype):
    """A digest of all that encoded latents and texts depend on."""
    digest = hashlib.blake2b(
        f"{parts.encoders.digest}/{max_sequence_length}/{dtype}".encode(), digest_size=8
    )
    for name, tensor in sorted(parts.autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def set_up(config, device, mesh):
    """Model, optimizer and encoders of a run on this rank's device of a `parallel.Mesh`."""
    warn_of_warmup(config)
    check_base(config)
    parts = load_parts(config, device, mesh)
    if not config.controlnet.train:
        return assemble(config, device, mesh, build_flux(config, device, mesh), parts)
    net, base = (
        build_controlnet(config, device, mesh),
        build_flux(config, device, mesh, frozen=True),
    )
    return assemble(config, device, mesh, net, parts, base=base)


def warn_of_warmup(config):
    """Say so where a run ends before its learning rate has risen to `optim.lr`."""
    if config.optim.warmup >= config.steps and parallel.rank() == 0:
        log.warning(
            "optim.warmup=%d is not over when the run ends at steps=%d",
            config.optim.warmup,
            config.steps,
        )


def assemble(config, device, mesh, model, parts, *, base=None):
    """The `Run` of wrapped models."""
    optimizers = optim.make_optimizers(model, config.optim)
    ema = optim.EMA(model, config.optim.ema_decay) if config.optim.ema_decay else None
    cells = config.data.height // 8, config.data.width // 8
    ids = position_ids(*cells, config.model.max_sequence_length).to(device)
    flux = (base or model).config
    flux.scheduler = sources.scheduler_beside(config.model.checkpoint, flux)  # for pictures
    return Run(
        config,
        device,
        mesh,
        model,
        base,
        optimizers,
        ema,
        parts,
        rope_table(ids, config.model.shape()),
    )


# --- a step ---------------------------------------------------------------------------------------


@torch.no_grad()
def encode_batch(run, batch):
    """A batch as clean tokens x0 (B, L, C) float32, txt, pooled, and for a ControlNet {"hint": …,
    "mode": …}.

    It holds pictures and captions, or cached posteriors and texts.
    """
    device, keys = run.device, dict(seed=run.config.seed, indices=batch["indices"])
    if "images" in batch:
        mean, logvar = run.parts.autoencoder.posterior(batch["images"].to(device))
        txt, pooled = run.parts.encoders.encode(
            batch["captions"], run.config.model.max_sequence_length
        )
    else:
        mean, logvar, txt, pooled = (
            batch[k].to(device) for k in ("mean", "logvar", "txt", "pooled")
        )
    x0 = latents_of(run, mean, logvar, stream="posterior", **keys)
    return x0, txt, pooled, encode_control(run, batch, keys) if run.base else {}


def latents_of(run, mean, logvar, **keys):
    """Packed latents (B, L, C) float32, a sample of the posterior."""
    noise = rng.normal(mean.shape[1:], **keys).to(run.device)
    latents = sample_posterior(mean.float(), logvar.float(), noise)
    return pack_latents(
        latents if run.parts.autoencoder is None else run.parts.autoencoder.scale(latents)
    )


def encode_control(run, batch, keys):
    """A ControlNet's hint, latents (B, L, C) or pixels (B, 3, H, W), and of a union net the mode
    (B,).
    """
    control = run.config.controlnet
    if control.hint == "pixel":
        hint = batch["controls"].to(run.device)
    else:
        posterior = (
            [batch[k].to(run.device) for k in ("control_mean", "control_logvar")]
            if "control_mean" in batch
            else None
        )
        posterior = posterior or run.parts.autoencoder.posterior(batch["controls"].to(run.device))
        hint = latents_of(run, *posterior, stream="control", **keys)
    if not control.num_modes:
        return {"hint": hint}
    if int(batch["modes"].max()) >= control.num_modes:
        raise ValueError(
            f"controlnet.num_modes={control.num_modes}, but a sample's json has the mode "
            f"{int(batch['modes'].max())}"
        )
    return {"hint": hint, "mode": batch["modes"].to(run.device)}


def dropped(run, steer, keys):
    """`encode_control`'s result with the control of a share of the samples emptied: black pixels,
    or latents of zero.
    """
    share = run.config.controlnet.dropout
    if not steer or not share:
        return steer
    hint = steer["hint"]
    gone = (
        (rng.uniform(stream="control dropout", **keys) < share)
        .to(run.device)
        .view(-1, *[1] * (hint.ndim - 1))
    )
    return steer | {
        "hint": torch.where(gone, -1.0 if run.config.controlnet.hint == "pixel" else 0.0, hint)
    }


def predict(run, img, txt, rope, *, hint=None, mode=None, **inputs):
    """The velocity, for a run with a ControlNet steered by it; without `hint` that of the frozen
    transformer alone.
    """
    if hint is None:
        return run.flux(img, txt, rope, **inputs)
    samples = run.model(img, txt, rope, hint=hint.to(img.dtype), mode=mode, **inputs)
    return run.base(
        img, txt, rope, residuals=spread(samples, run.model.config, run.base.config), **inputs
    )


def flow_loss(run, x0, txt, pooled, *, noise, t, guidance, **steer):
    """The velocity loss of each sample (B,) at times t (B,), all on the run's device; `steer` is
    `encode_batch`'s.
    """
    dtype = getattr(torch, run.config.dtype)
    guidance = guidance if run.flux.config.guidance_embed else None
    noisy = flow.add_noise(x0, noise, t)
    inputs = dict(t=t, pooled=pooled.to(dtype), guidance=guidance, **steer)
    velocity = predict(run, noisy.to(dtype), txt.to(dtype), run.rope, **inputs)
    return flow.velocity_loss(velocity, x0, noise)


def train_step(run, batches, step):
    """One optimizer step over this rank's micro-batches; their mean loss and the gradient's norm,
    both tensors.
    """
    config, device = run.config, run.device
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        parallel.reduce_gradients(run.model, i == len(batches) - 1)
        x0, txt, pooled, steer = encode_batch(run, batch)
        keys = dict(seed=config.seed, indices=batch["indices"])
        noise = pack_latents(rng.normal(run.latent_shape, stream="noise", **keys)).to(device)
        t = flow.sample_t(config.flow, x0.shape[1], **keys).to(device)
        guidance = flow.sample_guidance(config.flow, **keys).to(device)
        steer = dropped(run, steer, keys)
        loss = flow_loss(
            run, x0, txt, pooled, noise=noise, t=t, guidance=guidance, **steer
        ).mean() / len(batches)
        loss.backward()
        total += loss.detach()
    return total, update(run, step, total)


def update(run, step, loss=0.0):
    """Clip the gradient, step the optimizers and the moving average; the gradient's norm, a tensor.

    Where a rank's loss or the gradient is not finite, the norm is not either, and nothing changes:
    the device sees to that without the host, which learns of it later, in `read_flags`.
    """
    config = run.config
    norm = optim.clip_gradients(run.model, config.optim, loss)
    skipped = (~torch.isfinite(norm)).float()
    for optimizer in run.optimizers:
        optimizer.found_inf = skipped  # as torch.amp.GradScaler has it
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(config.optim, step, config.steps)
        optimizer.step()
        optimizer.zero_grad()
    if run.ema:
        run.ema.update(step, skipped)
    return norm


# --- looking at the model -------------------------------------------------------------------------


@contextmanager
def averaged(run):
    """The moving average in place of the weights, where there is one."""

    def swap():
        if run.ema:
            run.ema.swap()
            parallel.reshard(run.model)

    swap()
    try:
        yield
    finally:
        swap()


def rank_loader(run, dataset, **options):
    """This rank's batches of a data set: those of its place in data parallelism, the same for tp
    and cp ranks.
    """
    ranks = dict(dp_rank=run.mesh.dp_rank, dp_size=run.mesh.dp_size)
    return make_loader(dataset, micro_batch=run.config.data.micro_batch, **ranks, **options)


def encode_validation(run, dataset):
    """This rank's share of the validation set, encoded once: a list of (x0, txt, pooled, steer,
    indices, weights) micro-batches.

    Every rank gets as many batches; the surplus samples of the last ones weigh nothing.
    """
    count, stride = run.config.data.val_count, run.mesh.dp_size * run.config.data.micro_batch
    rounded = -(-count // stride) * stride
    batches = []
    loader = rank_loader(run, dataset, global_batch=stride, start_index=0, stop_index=rounded)
    for batch in loader:
        weights = (batch["indices"] < count).float()
        batches.append(
            (*encode_batch(run, batch), batch["indices"] % count, weights.to(run.device))
        )
    return batches


@torch.no_grad()
def evaluate(run, batches):
    """The loss at 8 fixed t with fixed noise, over the validation set: {"val/loss_t0.000": …,
    "val/loss": their mean}.

    With validation=round_robin sample i is measured at the i-th t alone, modulo 8, as MLPerf does:
    an eighth of the work.
    """
    run.model.eval()
    round_robin = run.config.validation == "round_robin"
    sums = torch.zeros(2, len(flow.VALIDATION_T), device=run.device)  # of losses, and of samples
    low, high = flow.guidance_range(run.config.flow.guidance)
    for x0, txt, pooled, steer, indices, weights in batches:
        noise = pack_latents(
            rng.normal(run.latent_shape, seed=0, indices=indices, stream="validation")
        ).to(run.device)
        guidance = torch.full((len(x0),), (low + high) / 2, device=run.device)
        numbers = torch.arange(len(flow.VALIDATION_T), device=run.device)
        for k in (
            [indices.to(run.device) % len(numbers)]
            if round_robin
            else [n.expand(len(x0)) for n in numbers]
        ):
            t = torch.tensor(flow.VALIDATION_T, device=run.device)[k]
            losses = flow_loss(run, x0, txt, pooled, noise=noise, t=t, guidance=guidance, **steer)
            sums.index_add_(1, k, torch.stack([losses * weights, weights]))
    run.model.train()
    dist.all_reduce(sums)
    losses = (sums[0] / sums[1]).tolist()
    return {f"val/loss_t{t:.3f}": loss for t, loss in zip(flow.VALIDATION_T, losses)} | {
        "val/loss": sum(losses) / len(losses)
    }


def encode_prompts(run, dataset):
    """The grid's prompts, the validation set's first, encoded; None where there are no encoders to
    draw with.
    """
    if run.parts.encoders is None:
        return None
    plain = (
        dataset.dataset if isinstance(dataset, CachedSamples) else dataset
    )  # a cache holds no captions
    samples = [plain[i] for i in range(min(run.config.sample.count, run.config.data.val_count))]
    prompts = [sample["captions"] for sample in samples]
    texts = run.parts.encoders.encode(prompts, run.config.model.max_sequence_length)
    if not run.base:
        return Prompts(prompts, *texts, {}, [])
    controls = torch.stack([sample["controls"] for sample in samples])
    batch = {"controls": controls} | (
        {"modes": torch.tensor([s["modes"] for s in samples])} if "modes" in samples[0] else {}
    )
    size, indices, parts = run.config.data.micro_batch, list(range(len(samples))), []
    for start in range(0, len(samples), size):
        rows = slice(start, start + size)
        with torch.no_grad():
            part = {name: values[rows] for name, values in batch.items()}
            parts.append(
                encode_control(run, part, dict(seed=run.config.seed, indices=indices[rows]))
            )
    steer = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    shown = [
        picture
        for sample in samples
        for picture in sampling.pictures_of(torch.stack([sample["controls"], sample["images"]]))
    ]
    return Prompts(prompts, *texts, steer, shown)


def draw_grid(run, prompts):
    """The same prompts and noise every time: a contact sheet, with ControlNets of (control, target,
    drawn). Collective.
    """
    data, grid = run.config.data, run.config.sample
    settings = schedule.SampleConfig(
        height=data.height, width=data.width, steps=grid.steps, guidance=grid.guidance
    )
    dtype, size, pictures = getattr(torch, run.config.dtype), run.config.data.micro_batch, []
    for start in range(0, len(prompts.texts), size):
        rows = slice(start, start + size)
        noise = sampling.initial_noise(run.latent_shape, list(range(len(prompts.texts)))[rows]).to(
            run.device
        )
        steer = {name: values[rows] for name, values in prompts.steer.items()}
        texts = prompts.txt[rows].to(dtype), prompts.pooled[rows].to(dtype)
        tokens = sampling.sample_sharded(
            partial(predict, run, **steer), run.flux.config, *texts, noise, settings, dtype
        )
        pictures += sampling.decode_pictures(run.parts.autoencoder, tokens, data.height, data.width)
    if not prompts.shown:
        return contact_sheet(pictures, captions=prompts.texts)
    triples = [
        p
        for i, picture in enumerate(pictures)
        for p in (*prompts.shown[2 * i : 2 * i + 2], picture)
    ]
    captions = [line for text in prompts.texts for line in ("control", "target", text)]
    return contact_sheet(triples, columns=6, captions=captions)


# --- resuming -------------------------------------------------------------------------------------


def _flat(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _differences(old, new):
    return ", ".join(
        f"{k}: {old.get(k)} there, {new.get(k)} here"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    )


def check_resume(saved, config):
    """Say which changed keys a resumed run accepts; raise `ValueError` for the others."""
    new = _flat(json.loads(json.dumps(asdict(config))))
    old = _flat(json.loads(json.dumps(asdict(type(config)())))) | _flat(
        saved
    )  # what an older version did not know has its default
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    accepted = changed & resumable_keys(type(config))
    if changed - accepted:
        listed = _differences(
            {k: old.get(k) for k in changed - accepted}, {k: new.get(k) for k in changed - accepted}
        )
        raise ValueError(
            f"resume=auto: {config.output} was started with other settings ({listed}); restore "
            "them, or set another output="
        )
    if accepted - {"resume"}:
        log.info("resuming with changed %s", ", ".join(sorted(accepted - {"resume"})))
    if "steps" in changed and config.optim.schedule != "constant":
        log.info(
            "optim.schedule=%s now ends at step %d: the learning rate jumps",
            config.optim.schedule,
            config.steps,
        )


def find_resume(config):
    """The checkpoint to go on from, or None; collective.

    Raises `ValueError` where a run would be overwritten or another one continued.
    """
    if config.resume != "auto":
        parallel.first_rank_does(lambda: run_state.check_unused(config.output))
        return None
    folder = run_state.choose_checkpoint(config.output)
    if folder is not None:
        meta = run_folder.read_meta(folder)
        check_resume(meta.config, config)
        if meta.step > config.steps:
            raise ValueError(
                f"output={config.output} is at step {meta.step} already: set steps above that, not "
                f"{config.steps}"
            )
    return folder


def describe_data(training, validation):
    """What a checkpoint says of the data: digests, how many samples are trained on, their files'
    names.
    """
    plain, held_out = (
        d.dataset if isinstance(d, CachedSamples) else d for d in (training, validation)
    )
    shards = getattr(plain, "shards", [])
    digests = [data_digest(d) if getattr(d, "shards", []) else "" for d in (plain, held_out)]
    names = [shard.name for shard in shards]
    return run_folder.DataRecord(digests[0], len(plain), names, digests[1])


def report_changed_data(folder, data):
    """Say it loudly where a resumed run's data are not those it was trained on."""
    changes = run_state.changed_data(run_folder.read_meta(folder).data, data)
    if changes and parallel.rank() == 0:
        log.warning(
            "resuming on other data: the samples have changed (%s); this is no longer the same run",
            changes,
        )


def describe(run):
    """What a checkpoint says of itself: layout, shape, training math, data, the whole
    configuration.
    """
    return {
        "layout": "fluxlite",
        "version": __version__,
        "what": "controlnet" if run.base else "transformer",
        "model": asdict(run.model.config),
        "flow": asdict(run.config.flow),
        "config": asdict(run.config),
        "data": asdict(run.data),
        "ema": sorted(run.ema.average) if run.ema else [],
    }


# --- the run --------------------------------------------------------------------------------------


def read_flags(run, caught, norm):
    """The name of a signal that asks any rank to stop, or None, and whether the step was good;
    collective.

    It is the one place of a step where the host waits for the device.
    """
    asked = torch.tensor(float(caught["number"]), device=run.device)
    bad = (~torch.isfinite(norm)).to(run.device, torch.float32)
    number, bad = parallel.max_over_ranks(torch.stack([asked, bad]))
    return signal.Signals(int(number)).name if number else None, not bad


def check_finite(good, loss, norm, step, keys, output):
    """Raise `ValueError` for a step that is not `good`, with its samples, what to try and what the
    run's folder `output` has; collective.
    """
    if good:
        return
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (loss.item(), keys))
    guilty = [entry for entry in found if not math.isfinite(entry[0])]
    samples = list(dict.fromkeys(key for _, keys in guilty or found for key in keys))
    what = (
        f"loss of step {step} is {guilty[0][0]}"
        if guilty
        else f"gradient's norm of step {step} is {norm.item()}"
    )
    raise ValueError(
        f"the {what}; its samples: {', '.join(samples[:8])}{' …' if len(samples) > 8 else ''}. "
        "Try a lower optim.lr, a longer optim.warmup, dtype=float32, or look at these samples. "
        f"The step was not taken and nothing of it is saved: {run_state.saved_words(output)}"
    )


def train(config):
    """Train as `config`, a `TrainConfig`, says; returns the run's folder."""
    device, mesh = parallel.start(config.parallel, config.device)
    with run_state.locked_run(config.output):
        return take_steps(config, device, mesh, find_resume(config))


def take_steps(config, device, mesh, last):
    """Train from the checkpoint `last`, or from the beginning where it is None; returns the run's
    folder.
    """
    run = set_up(config, device, mesh)
    training, validation = open_data(config, run)
    run.data = describe_data(training, validation)
    start = (
        run_state.load_training(last, model=run.model, optimizers=run.optimizers, ema=run.ema)
        if last
        else 0
    )
    watch = start_watching(run, validation, start)
    size = config.data.global_batch
    if last:
        report_changed_data(last, run.data)
        log.info(
            "resuming after step %d with sample %d, the very next one, whatever the mesh and the "
            "workers",
            start,
            start * size,
        )
    slices = size // (config.data.micro_batch * run.mesh.dp_size)
    batches = rank_loader(
        run, training, global_batch=size, start_index=start * size, workers=config.data.workers
    )
    if watch.meter and not last:
        watch.metrics.log(0, watch.meter.look(0))
    with held_signals() as caught, closing(watch.metrics), closing(batches):
        for step in range(start, config.steps):
            micro = [next(batches) for _ in range(slices)]
            loss, norm = train_step(run, micro, step)
            stopped_by, good = read_flags(run, caught, norm)
            keys = [key for batch in micro for key in batch["keys"]]
            check_finite(good, loss, norm, step + 1, keys, config.output)
            report(run, watch, step + 1, loss, norm)
            with watch.speed.paused():
                finish_step(run, watch, step + 1, stopped_by)
            if stopped_by:
                break
        if parallel.rank() == 0:
            plot_losses(config.output)
            if watch.meter:
                plot_control(config.output)
    return Path(config.output)


def finish_step(run, watch, step, stopped_by):
    """Validate, draw and save where step `step` is due for it.

    A run that was told to stop saves first: it may be killed before a picture is drawn.
    """
    if stopped_by:
        save(run, step)
        log.info(
            "stopped by %s after step %d, which is saved; resume=auto goes on", stopped_by, step
        )
    look(run, watch, step)
    if not stopped_by and due(step, run.config.checkpoint.every, run.config.steps):
        save(run, step)


def due(step, every, steps):
    """Whether something that happens every so many steps (0: never), and after the last, is due
    after `step`.
    """
    return step == steps or (every > 0 and step % every == 0)


def start_watching(run, validation, start):
    """Open the run's folder and metrics and encode what it looks at; with a cache the text encoders
    are then freed.
    """
    config, main = run.config, parallel.rank() == 0
    if main:
        with aside(Path(config.output) / "config.json", overwrite=True) as part:
            part.write_text(json.dumps(asdict(config), indent=2, allow_nan=False) + "\n")
    metrics = Metrics(
        config.metrics,
        config.output,
        total_steps=config.steps,
        start_step=start,
        run_config=asdict(config),
        enabled=main,
    )
    flops = step_flops(run)
    ranks, peak = parallel.world_size(), config.metrics.peak_tflops
    held_out, prompts = encode_validation(run, validation), encode_prompts(run, validation)
    if config.data.cache:
        run.parts.encoders = None
    speed = Throughput(device=run.device, flops_per_sample=flops, num_devices=ranks, peak=peak)
    meter = (
        Meter(run, held_out, partial(flow_loss, run))
        if run.base and config.controlnet.meter_every
        else None
    )
    return Watch(metrics, speed, held_out, prompts, meter)


def step_flops(run):
    """Floating-point operations of a sample's training step: three forwards, or of a frozen
    transformer two.
    """
    tokens = run.config.model.max_sequence_length, num_image_tokens(*run.latent_shape[1:])
    return 3 * run.model.forward_flops(*tokens) + (
        2 * run.base.forward_flops(*tokens) if run.base else 0
    )


def report(run, watch, step, loss, norm):
    """Count a step, and every log_every of them write the loss and the speed down."""
    watch.speed.add(run.config.data.global_batch)
    values = {}
    if due(step, run.config.metrics.log_every, run.config.steps):
        lr = run.optimizers[0].param_groups[0]["lr"]
        values = {
            "loss": parallel.mean_over_ranks(loss).item(),
            "grad_norm": norm.item(),
            "lr": lr,
        } | watch.speed.read()
        watch.metrics.log(step, values)
    watch.metrics.progress(step, values)


def look(run, watch, step):
    """Validate and draw, with the averaged weights, where step `step` is due for it."""
    config = run.config
    validate = due(step, config.validate_every, config.steps)
    draw = watch.prompts is not None and due(step, config.sample.every, config.steps)
    if watch.meter and due(step, config.controlnet.meter_every, config.steps):
        watch.metrics.log(step, watch.meter.look(step))
    if not (validate or draw):
        return
    with averaged(run):
        if validate:
            values = evaluate(run, watch.held_out)
            watch.metrics.log(step, values)
            watch.metrics.progress(step, {"val": values["val/loss"]})
        if draw:
            watch.metrics.image(step, "grid", draw_grid(run, watch.prompts))


def save(run, step):
    """Write a checkpoint of step `step`."""
    config, state = run.config, dict(model=run.model, optimizers=run.optimizers, ema=run.ema)
    run_state.save_training(
        config.output, step=step, meta=describe(run), keep=config.checkpoint.keep, **state
    )
