"""Training: set up a run, take steps, validate, draw, save.

The way to the network is `train → train_step → flow_loss → Flux.forward`. A run is a pure function of (config, seed, data): every
random draw is keyed by the sample's global index.

B samples of a micro-batch, L tokens, C channels of a token.
"""

import hashlib
import json
import logging
import signal
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from fluxlite import __version__, draws, flow, optim, parallel, sampling
from fluxlite import checkpoint as ckpt
from fluxlite.autoencoder import sample_posterior
from fluxlite.conditioning import load_text_encoders
from fluxlite.convert import Piece
from fluxlite.data import CachedSamples, MockSamples, build_cache, make_loader, open_dataset, prepare
from fluxlite.latents import num_image_tokens, pack_latents, position_ids
from fluxlite.metrics import Metrics, Throughput, contact_sheet, plot_losses
from fluxlite.model import Flux, initial, rope_table
from fluxlite.pipeline import check_widths, resolve

log = logging.getLogger("fluxlite")

# What a resumed run may change: nothing that its weights or its order of samples depend on.
MAY_CHANGE = (
    *(
        "steps",
        "output",
        "resume",
        "device",
        "compile",
        "validate_every",
        "validation",
        "parallel.",
        "checkpoint.",
        "metrics.",
        "sample.",
    ),
    *("data.workers", "data.micro_batch", "data.max_bad_fraction", "data.download", "model.attention", "model.save_converted"),
)


@dataclass
class Parts:
    """What surrounds the transformer in training; None where the data needs no encoder."""

    autoencoder: object
    encoders: object


@dataclass
class Watch:
    """What a run is watched with."""

    metrics: Metrics
    speed: Throughput
    held_out: list
    prompts: tuple | None


@dataclass
class Run:
    """All that a training step touches."""

    config: object
    device: torch.device
    mesh: parallel.Mesh
    model: Flux
    optimizers: list
    ema: optim.EMA | None
    parts: Parts
    rope: tuple

    @property
    def latent_shape(self):
        """(C, h, w) of one picture's latents."""
        data = self.config.data
        return self.config.model.in_channels // 4, data.height // 8, data.width // 8


# --- setting up -----------------------------------------------------------------------------------------------------------------


def build_model(config, device, mesh):
    """The sharded transformer: random weights keyed by the seed where `model.checkpoint` is null, else the checkpoint's.

    It is wrapped on meta and filled a piece at a time: no rank ever holds the whole.
    """
    shape = config.model.shape()
    with torch.device("meta"):
        model = Flux(shape, config.model.attention)
    optim.freeze(model.train(), config.optim)
    if config.model.checkpoint:
        source = ckpt.converted(resolve(config.model.checkpoint), config.model.save_converted, ema=config.model.ema)
        if source.config != shape:
            differences = _differences(asdict(source.config), asdict(shape))
            raise ValueError(f"model.checkpoint={config.model.checkpoint} has another shape: {differences}")
        pieces = ckpt.pieces(source)
    else:
        pieces = random_pieces(model, config.seed, device)
    dtype = getattr(torch, config.dtype)
    model = parallel.parallelize(model, mesh, config.parallel, dtype, compile=config.compile)
    return parallel.fill(model, "cpu" if config.parallel.cpu_offload else device, pieces)


def random_pieces(model, seed, device):
    """Initial values of each parameter of a model, keyed by the seed: the same on any mesh."""
    generator = torch.Generator(device).manual_seed(draws.generator(seed, 0, "weights").initial_seed())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return ((Piece(name), initial(name, shape, device, generator)) for name, shape in shapes.items())


def load_parts(config, device):
    """The frozen autoencoder and text encoders that the configuration names."""
    if not config.model.t5:
        return Parts(None, None)
    dtype = getattr(torch, config.dtype)
    encoders = load_text_encoders(resolve(config.model.t5), resolve(config.model.clip), device=device, dtype=dtype)
    autoencoder = ckpt.load_autoencoder(resolve(config.model.autoencoder), dtype=dtype, device=device)
    check_widths(config.model.shape(), autoencoder, encoders)
    return Parts(autoencoder, encoders)


def open_data(config, run):
    """The training and validation sets; with `data.cache` encoded first, by all ranks together."""
    data, model = config.data, config.model
    if run.parts.encoders is None:
        widths = dict(
            latent_shape=run.latent_shape, text_shape=(model.max_sequence_length, model.text_width), pooled_width=model.pooled_width
        )
        return [MockSamples(data, split=split, seed=config.seed, **widths) for split in ("train", "val")]
    sets = []
    for split in ("train", "val"):
        prepare(data, split, config.seed)
        dataset = open_dataset(data, split, config.seed)
        if data.cache:
            directory = build_cache(
                dataset,
                Path(data.cache) / split,
                encode_images=lambda images: run.parts.autoencoder.posterior(images.to(run.device)),
                encode_texts=lambda texts: run.parts.encoders.encode(texts, model.max_sequence_length),
                digest=encoders_digest(run.parts, model.max_sequence_length, config.dtype),
                rank=parallel.rank(),
                world_size=parallel.world_size(),
            )
            dist.barrier()
            dataset = CachedSamples(dataset, directory)
        sets.append(dataset)
    return sets


def encoders_digest(parts, max_sequence_length, dtype):
    """A digest of all that encoded latents and texts depend on."""
    digest = hashlib.blake2b(f"{parts.encoders.digest}/{max_sequence_length}/{dtype}".encode(), digest_size=8)
    for name, tensor in sorted(parts.autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def set_up(config):
    """Device, mesh, model, optimizer and encoders of a run."""
    device, mesh = parallel.start(config.parallel, config.device)
    parts = load_parts(config, device)
    model = build_model(config, device, mesh)
    optimizers = optim.make_optimizers(model, config.optim)
    ema = optim.EMA(model, config.optim.ema_decay) if config.optim.ema_decay else None
    cells = config.data.height // 8, config.data.width // 8
    ids = position_ids(*cells, config.model.max_sequence_length).to(device)
    return Run(config, device, mesh, model, optimizers, ema, parts, rope_table(ids, model.config))


# --- a step ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_batch(run, batch):
    """A batch of pictures and captions, or of cached posteriors and texts: clean tokens x0 (B, L, C) float32, txt, pooled."""
    device, seed, indices = run.device, run.config.seed, batch["indices"]
    if "images" in batch:
        mean, logvar = run.parts.autoencoder.posterior(batch["images"].to(device))
        txt, pooled = run.parts.encoders.encode(batch["captions"], run.config.model.max_sequence_length)
    else:
        mean, logvar, txt, pooled = (batch[k].to(device) for k in ("mean", "logvar", "txt", "pooled"))
    noise = draws.normal(mean.shape[1:], seed=seed, indices=indices, stream="posterior").to(device)
    latents = sample_posterior(mean.float(), logvar.float(), noise)
    if run.parts.autoencoder is not None:
        latents = run.parts.autoencoder.scale(latents)
    return pack_latents(latents), txt, pooled


def flow_loss(run, x0, txt, pooled, *, noise, t, guidance):
    """The velocity loss of each sample (B,) at times t (B,), all on the run's device."""
    dtype = getattr(torch, run.config.dtype)
    guidance = guidance if run.model.config.guidance_embed else None
    noisy = flow.add_noise(x0, noise, t)
    velocity = run.model(noisy.to(dtype), txt.to(dtype), run.rope, t=t, pooled=pooled.to(dtype), guidance=guidance)
    return flow.velocity_loss(velocity, x0, noise)


def train_step(run, batches, step):
    """One optimizer step over this rank's micro-batches; their mean loss and the gradient's norm, both tensors."""
    config, device = run.config, run.device
    total = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        run.model.set_requires_gradient_sync(i == len(batches) - 1)  # gradients are reduced over the ranks with the last
        x0, txt, pooled = encode_batch(run, batch)
        keys = dict(seed=config.seed, indices=batch["indices"])
        noise = pack_latents(draws.normal(run.latent_shape, stream="noise", **keys)).to(device)
        t = flow.sample_t(config.flow, x0.shape[1], **keys).to(device)
        guidance = flow.sample_guidance(config.flow, **keys).to(device)
        loss = flow_loss(run, x0, txt, pooled, noise=noise, t=t, guidance=guidance).mean() / len(batches)
        loss.backward()
        total += loss.detach()
    return total, update(run, step)


def update(run, step):
    """Clip the gradient, step the optimizers and the moving average; the gradient's norm, a tensor."""
    config = run.config
    norm = optim.clip_gradients(run.model, config.optim)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(config.optim, step, config.steps)
        optimizer.step()
        optimizer.zero_grad()
    if run.ema:
        run.ema.update(step)
    return norm


# --- looking at the model -------------------------------------------------------------------------------------------------------


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
    """This rank's batches of a data set: those of its place in data parallelism, the same for tp and cp ranks."""
    ranks = dict(dp_rank=run.mesh.dp_rank, dp_size=run.mesh.dp_size)
    return make_loader(dataset, micro_batch=run.config.data.micro_batch, **ranks, **options)


def encode_validation(run, dataset):
    """This rank's share of the validation set, encoded once: a list of (x0, txt, pooled, indices, weights) micro-batches.

    Every rank gets as many batches; the surplus samples of the last ones weigh nothing.
    """
    count, stride = run.config.data.val_count, run.mesh.dp_size * run.config.data.micro_batch
    rounded = -(-count // stride) * stride
    batches = []
    loader = rank_loader(run, dataset, global_batch=stride, start_index=0, stop_index=rounded)
    for batch in loader:
        weights = (batch["indices"] < count).float()
        batches.append((*encode_batch(run, batch), batch["indices"] % count, weights.to(run.device)))
    return batches


@torch.no_grad()
def evaluate(run, batches):
    """The loss at 8 fixed t with fixed noise, over the validation set: {"val/loss_t0.000": …, "val/loss": their mean}.

    With validation=round_robin sample i is measured at the i-th t alone, modulo 8, as MLPerf does: an eighth of the work.
    """
    run.model.eval()
    round_robin = run.config.validation == "round_robin"
    sums = torch.zeros(2, len(flow.VALIDATION_T), device=run.device)  # of losses, and of samples
    low, high = flow.guidance_range(run.config.flow.guidance)
    for x0, txt, pooled, indices, weights in batches:
        noise = pack_latents(draws.normal(run.latent_shape, seed=0, indices=indices, stream="validation")).to(run.device)
        guidance = torch.full((len(x0),), (low + high) / 2, device=run.device)
        numbers = torch.arange(len(flow.VALIDATION_T), device=run.device)
        for k in [indices.to(run.device) % len(numbers)] if round_robin else [n.expand(len(x0)) for n in numbers]:
            t = torch.tensor(flow.VALIDATION_T, device=run.device)[k]
            losses = flow_loss(run, x0, txt, pooled, noise=noise, t=t, guidance=guidance)
            sums.index_add_(1, k, torch.stack([losses * weights, weights]))
    run.model.train()
    dist.all_reduce(sums)
    losses = (sums[0] / sums[1]).tolist()
    return {f"val/loss_t{t:.3f}": loss for t, loss in zip(flow.VALIDATION_T, losses)} | {"val/loss": sum(losses) / len(losses)}


def encode_prompts(run, dataset):
    """The grid's prompts, the validation set's first, encoded; None where there are no encoders to draw with."""
    if run.parts.encoders is None:
        return None
    plain = dataset.dataset if isinstance(dataset, CachedSamples) else dataset  # a cache holds no captions
    prompts = [plain[i]["captions"] for i in range(min(run.config.sample.count, run.config.data.val_count))]
    return prompts, run.parts.encoders.encode(prompts, run.config.model.max_sequence_length)


def draw_grid(run, prompts):
    """The same prompts and noise every time: a contact sheet. Collective, since the model is sharded."""
    texts, (txt, pooled) = prompts
    data, grid = run.config.data, run.config.sample
    settings = sampling.SampleConfig(height=data.height, width=data.width, steps=grid.steps, guidance=grid.guidance)
    dtype, size, pictures = getattr(torch, run.config.dtype), run.config.data.micro_batch, []
    for start in range(0, len(texts), size):
        rows = slice(start, start + size)
        noise = sampling.initial_noise(run.latent_shape, list(range(len(texts)))[rows]).to(run.device)
        tokens = sampling.sample_sharded(run.model, txt[rows].to(dtype), pooled[rows].to(dtype), noise, settings)
        pictures += sampling.decode(run.parts.autoencoder, tokens, data.height, data.width)
    return contact_sheet(pictures, captions=texts)


# --- resuming -------------------------------------------------------------------------------------------------------------------


def _flat(values, prefix=""):
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _differences(old, new):
    return ", ".join(
        f"{k}: {old.get(k)} there, {new.get(k)} here" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    )


def check_resume(saved, config):
    """Say which changed keys a resumed run accepts; raise `ValueError` for the others."""
    old, new = _flat(saved), _flat(json.loads(json.dumps(asdict(config))))
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    accepted = {k for k in changed if k.startswith(MAY_CHANGE)}
    if changed - accepted:
        listed = _differences({k: old.get(k) for k in changed - accepted}, {k: new.get(k) for k in changed - accepted})
        raise ValueError(
            f"resume=auto: {config.output} was started with other settings ({listed}); restore them, or set another output="
        )
    if accepted - {"resume"}:
        log.info("resuming with changed %s", ", ".join(sorted(accepted - {"resume"})))


def find_resume(config):
    """The checkpoint to go on from, or None; raises `ValueError` where a run would be overwritten or another one continued."""
    last = ckpt.last_checkpoint(config.output)
    if last is not None:
        if config.resume != "auto":
            raise ValueError(f"output={config.output} holds a run: resume=auto goes on with it; or set another output=")
        meta = ckpt.read_meta(last)
        check_resume(meta["config"], config)
        if meta["step"] > config.steps:
            raise ValueError(f"output={config.output} is at step {meta['step']} already: set steps above that, not {config.steps}")
    return last


def describe(run):
    """What a checkpoint says of itself: layout, shape, training math, the whole configuration."""
    return {
        "layout": "fluxlite",
        "version": __version__,
        "model": asdict(run.config.model.shape()),
        "flow": asdict(run.config.flow),
        "config": asdict(run.config),
        "ema": sorted(run.ema.average) if run.ema else [],
    }


# --- the run --------------------------------------------------------------------------------------------------------------------


@contextmanager
def stop_signals():
    """A dictionary whose `name` becomes the signal's when SIGTERM or SIGINT asks the run to stop; a second one kills."""
    caught = {"name": None}

    def catch(number, _frame):
        caught["name"] = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    before = {s: signal.signal(s, catch) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def check_finite(loss, step, keys):
    """Raise `ValueError` for a loss that is not finite, with the samples it came from and what to try."""
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of step {step} is {loss.item()}; its samples: {', '.join(keys[:8])}{' …' if len(keys) > 8 else ''}. "
            "Try a lower optim.lr, a longer optim.warmup, dtype=float32, or look at these samples; the last checkpoint is whole"
        )


def train(config):
    """Train as `config`, a `TrainConfig`, says; returns the run's folder."""
    last = find_resume(config)
    run = set_up(config)
    training, validation = open_data(config, run)
    start = ckpt.load_training(last, model=run.model, optimizers=run.optimizers, ema=run.ema) if last else 0
    watch = start_watching(run, validation, start)
    size = config.data.global_batch
    slices = size // (config.data.micro_batch * run.mesh.dp_size)
    batches = rank_loader(run, training, global_batch=size, start_index=start * size, workers=config.data.workers)
    with closing(watch.metrics), stop_signals() as caught:
        for step in range(start, config.steps):
            micro = [next(batches) for _ in range(slices)]
            loss, norm = train_step(run, micro, step)
            check_finite(loss, step + 1, [key for batch in micro for key in batch["keys"]])
            report(run, watch, step + 1, loss, norm)
            stopping = parallel.any_rank(caught["name"], run.device)
            with watch.speed.paused():
                look(run, watch, step + 1)
                if stopping or due(step + 1, config.checkpoint.every, config.steps):
                    save(run, step + 1)
            if stopping:
                log.info("stopped by %s after step %d; resume=auto goes on", caught["name"] or "another rank's signal", step + 1)
                break
    if parallel.rank() == 0:
        plot_losses(config.output)
    return Path(config.output)


def due(step, every, steps):
    """Whether something that happens every so many steps (0: never), and after the last, is due after `step`."""
    return step == steps or (every > 0 and step % every == 0)


def start_watching(run, validation, start):
    """Open the run's folder and metrics and encode what it looks at; with a cache the text encoders are then freed."""
    config, main = run.config, parallel.rank() == 0
    if main:
        Path(config.output).mkdir(parents=True, exist_ok=True)
        (Path(config.output) / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    metrics = Metrics(
        config.metrics, config.output, total_steps=config.steps, start_step=start, run_config=asdict(config), enabled=main
    )
    flops = 3 * run.model.forward_flops(config.model.max_sequence_length, num_image_tokens(*run.latent_shape[1:]))
    ranks, peak = parallel.world_size(), config.metrics.peak_tflops
    held_out, prompts = encode_validation(run, validation), encode_prompts(run, validation)
    if config.data.cache:
        run.parts.encoders = None
    return Watch(metrics, Throughput(device=run.device, flops_per_sample=flops, num_devices=ranks, peak=peak), held_out, prompts)


def report(run, watch, step, loss, norm):
    """Count a step, and every log_every of them write the loss and the speed down."""
    watch.speed.add(run.config.data.global_batch)
    values = {}
    if due(step, run.config.metrics.log_every, run.config.steps):
        lr = run.optimizers[0].param_groups[0]["lr"]
        values = {"loss": parallel.mean_over_ranks(loss).item(), "grad_norm": norm.item(), "lr": lr} | watch.speed.read()
        watch.metrics.log(step, values)
    watch.metrics.progress(step, values)


def look(run, watch, step):
    """Validate and draw, with the averaged weights, where step `step` is due for it."""
    config = run.config
    validate = due(step, config.validate_every, config.steps)
    draw = watch.prompts is not None and due(step, config.sample.every, config.steps)
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
    ckpt.save_training(config.output, step=step, meta=describe(run), keep=config.checkpoint.keep, **state)
