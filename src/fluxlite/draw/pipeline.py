"""The parts of a FLUX pipeline, loaded from folders, files or runs; `generate` draws with them.

import fluxlite
pictures = fluxlite.generate("red circle with blue background", seed=1)      # PIL images, from the
shipped tiny pipeline pictures = fluxlite.generate(["a fox", "an owl"], checkpoint="FLUX.1-dev",
height=512, width=512)
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from fluxlite import parallel
from fluxlite.cli.options import check_options, option, typed_options
from fluxlite.draw import control, sampling
from fluxlite.draw.control import Steering, open_control
from fluxlite.draw.offload import OFFLOAD, stream_blocks
from fluxlite.draw.sampling import decode, initial_noise
from fluxlite.nets import schedule
from fluxlite.nets.configs import check_channels
from fluxlite.nets.latents import num_image_tokens
from fluxlite.nets.schedule import SCHNELL_SCHEDULER, SampleConfig, is_schnell
from fluxlite.weights import run_folder, sources, writing
from fluxlite.weights.sources import TINY, resolve_tiny
from fluxlite.weights.text_encoders import load_text_encoders

log = logging.getLogger("fluxlite")

PIPELINE_FOLDERS = "transformer", "vae", "text_encoder*", "tokenizer*", "scheduler"
PIPELINE_FILES = [*(f"{folder}/*" for folder in PIPELINE_FOLDERS), "model_index.json"]
PARTS = {"t5": "text_encoder_2", "clip": "text_encoder", "autoencoder": "vae"}


@dataclass
class DrawConfig:
    """Which pictures are drawn, and how many at once."""

    images_per_prompt: int = option(1, "pictures of each prompt", at_least=1, at_most=1_000_000)
    seed: int = option(
        0, "picture i of prompt j depends on (seed, j, i) alone", at_least=0, at_most=2**64 - 1
    )
    prompt_number: int = option(
        0, "j of the first prompt; a picture's metadata say it", at_least=0, at_most=10**9
    )
    picture_number: int = option(
        0, "i of a prompt's first picture; a picture's metadata say it", at_least=0, at_most=10**9
    )
    batch: int = option(8, "pictures drawn at once", at_least=1, at_most=10_000)
    offload: str = option(
        "text",
        "text: encoders and modulation are freed after use; all: blocks are streamed to a GPU too; "
        "none: all stays",
        choices=OFFLOAD,
    )


@dataclass
class Pipeline:
    """A transformer, an autoencoder and text encoders on one device."""

    model: object
    autoencoder: object
    encoders: object
    device: torch.device
    settings: dict

    def load_controlnet(self, opened, device=None):
        return opened.load(
            attention="auto", dtype=self.model.img_in.weight.dtype, device=device or self.device
        )


# --- finding --------------------------------------------------------------------------------------


def root_of(path):
    """The folder of the pipeline that a transformer's folder or file belongs to."""
    return path if (path / "transformer").is_dir() else path.parent


def beside(checkpoint):
    """Where the other parts of a transformer's pipeline lie: {part: path} for those that are
    found.
    """
    path = Path(resolve_tiny(checkpoint)).expanduser()
    if sources.is_run(path):
        return {part: resolve_tiny(name) for part, name in run_folder.saved_parts(path).items()}
    root = root_of(path)
    found = {part: str(root / name) for part, name in PARTS.items() if (root / name).is_dir()}
    if "autoencoder" not in found and (root / "ae.safetensors").is_file():
        found["autoencoder"] = str(root / "ae.safetensors")
    return found


@dataclass
class Found:
    """A pipeline's parts on disk, checked to fit together as far as that can be seen without
    loading them.
    """

    transformer: sources.Source
    autoencoder: sources.Source
    t5: str
    clip: str
    attention: str
    compile: bool
    device: torch.device
    dtype: torch.dtype

    def load_encoders(self):
        encoders = load_text_encoders(self.t5, self.clip, device=self.device, dtype=self.dtype)
        check_encoders(self.transformer.config, encoders)
        return encoders

    def load_transformer(self, device=None):
        where = device or self.device
        model = sources.load_transformer(
            self.transformer, attention=self.attention, dtype=self.dtype, device=where
        )
        return parallel.compile_blocks(model) if self.compile else model

    def load_controlnet(self, opened, device=None):
        net = opened.load(attention=self.attention, dtype=self.dtype, device=device or self.device)
        return parallel.compile_blocks(net) if self.compile and not opened.given else net

    def load_autoencoder(self):
        return sources.load_autoencoder(self.autoencoder, dtype=self.dtype, device=self.device)


def find_pipeline(
    checkpoint=TINY,
    *,
    t5=None,
    clip=None,
    autoencoder=None,
    save_converted=None,
    ema=True,
    attention="auto",
    compile=False,
    device=None,
    dtype=None,
    expected=(),
):
    """The `Found` parts of a pipeline folder, a transformer or a run; parts not named are looked
    for beside it.

    `expected` is {field of FluxConfig: value} that the transformer must have. Raises `ValueError`
    that names the missing key.
    """
    device = torch.device(device or parallel.default_device())
    dtype = dtype or (torch.bfloat16 if parallel.has_bf16(device) else torch.float32)
    checkpoint = str(sources.local_path(resolve_tiny(checkpoint), PIPELINE_FILES))
    given = dict(expected)
    transformer = sources.open_source(checkpoint, ema=ema, given=given)
    sources.check_part(transformer, "transformer", "model.checkpoint")
    check_channels(transformer.config, f"model.checkpoint={checkpoint}")
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if getattr(transformer.config, name) != value:
            raise ValueError(
                f"model.{name}={value}, but {checkpoint} has {getattr(transformer.config, name)}"
            )
    named = {"t5": t5, "clip": clip, "autoencoder": autoencoder}
    parts = beside(checkpoint) | {k: resolve_tiny(v) for k, v in named.items() if v}
    missing = [f"model.{part}=" for part in PARTS if part not in parts]
    if missing:
        raise ValueError(
            f"{checkpoint} has no {', '.join(missing)} beside it: name a folder or a hub id for "
            "each"
        )
    vae = sources.open_source(parts.pop("autoencoder"), setting="model.autoencoder", part="vae")
    sources.check_part(vae, "autoencoder", "model.autoencoder")
    check_width("autoencoder", 4 * vae.config.latent_channels, "out_channels", transformer.config)
    if save_converted:
        transformer = writing.open_converted(checkpoint, save_converted, ema=ema, given=given)
    return Found(
        transformer, vae, **parts, attention=attention, compile=compile, device=device, dtype=dtype
    )


def check_width(part, theirs, key, config):
    """Raise `ValueError` where a part's width does not fit the transformer's."""
    if theirs != getattr(config, key):
        raise ValueError(
            f"model.{part} gives {theirs} channels, but the transformer has "
            f"model.{key}={getattr(config, key)}"
        )


def check_widths(config, autoencoder, encoders):
    """`check_width` of loaded parts."""
    check_width("autoencoder", 4 * autoencoder.config.latent_channels, "out_channels", config)
    check_encoders(config, encoders)


def check_encoders(config, encoders):
    check_width("t5", encoders.text_width, "text_width", config)
    check_width("clip", encoders.pooled_width, "pooled_width", config)


def load_pipeline(checkpoint=TINY, **options):
    """A whole `Pipeline` in memory, to draw with again and again; the arguments are those of
    `find_pipeline`.
    """
    found = find_pipeline(checkpoint, **options)
    settings = default_settings(found.transformer)
    return Pipeline(
        found.load_transformer(),
        found.load_autoencoder(),
        found.load_encoders(),
        found.device,
        settings,
    )


def default_settings(transformer):
    """Settings that suit a transformer's `Source` where the user names none: {field of
    SampleConfig: value}.
    """
    config, settings = transformer.config, transformer.settings
    if config.guidance_embed or not is_schnell(config.scheduler or SCHNELL_SCHEDULER):
        return settings
    settings = {"steps": 4, "max_sequence_length": 256} | settings
    if not config.scheduler and transformer.settings.get("shift", "auto") == "auto":
        log.info(
            "%s has no guidance input and no scheduler_config.json: it is taken for FLUX.1-schnell,"
            " steps=%d without a time shift; if it is another, set steps= and shift=resolution",
            *(transformer.where, settings["steps"]),
        )
    return settings


# --- drawing --------------------------------------------------------------------------------------


def settle(checkpoint, options, controls, num_prompts):
    """From the options of `generate`: the `Pipeline` or the `Found` parts on disk, a checked
    `SampleConfig` and `OpenControl`s.
    """
    names = {f.name for f in fields(SampleConfig)}
    settings = {k: v for k, v in options.items() if k in names}
    rest = {k: v for k, v in options.items() if k not in names}
    if isinstance(checkpoint, Pipeline):
        if rest:
            raise ValueError(
                f"{', '.join(rest)}: these are settled once a pipeline is loaded; pass them to "
                "load_pipeline"
            )
        parts, model_config, defaults = checkpoint, checkpoint.model.config, checkpoint.settings
    else:
        parts = find_pipeline(checkpoint, **rest)
        model_config = parts.transformer.config
        defaults = default_settings(parts.transformer)
    config = typed_options(SampleConfig, defaults | settings)
    config.validate(parts.autoencoder.config.downsampling)
    if "guidance" in settings and not model_config.guidance_embed:
        raise ValueError(
            "guidance: this model (as schnell) has no guidance input; leave the setting out"
        )
    return (
        parts,
        config,
        [open_control(c, model_config, config.height, config.width, num_prompts) for c in controls],
    )


def generate(
    prompt,
    *,
    checkpoint=TINY,
    negative_prompt="",
    images_per_prompt=1,
    controls=(),
    seed=0,
    prompt_number=0,
    picture_number=0,
    batch=8,
    offload="text",
    progress=lambda steps: steps,
    stage=lambda name: nullcontext(),
    done=lambda number, picture: None,
    **options,
):
    """Draw pictures: a list of PIL images, those of the first prompt first.

    `prompt` is a string or a list of them; the picture i of prompt j depends on (seed, j, i) alone,
    whatever the batch. They count from `prompt_number` and `picture_number`, so that one picture
    can be drawn again without those before it. `done(number, picture)` is called with each picture
    as soon as its batch is drawn; numbers count from 0. `checkpoint` is a pipeline folder, a run, a
    transformer or a loaded `Pipeline`; `controls` are `Control`s, whose nets add up. Options are
    the fields of `SampleConfig` (height, width, steps, guidance, true_cfg, shift,
    max_sequence_length) and the arguments of `find_pipeline`. Unless a `Pipeline` is given, each
    part is loaded when its turn comes: with `offload="text"` the text encoders are freed before the
    transformer is loaded, and the modulation's weights once all steps are modulated; `"all"` also
    streams the blocks through an accelerator (on the CPU they are mapped from the disk in any
    case); `"none"` frees nothing. `stage(name)` is a context around each part of the work. Each
    picture's `info["sampling"]` are the settings it was drawn with. Raises `ValueError`.
    """
    check_options(
        DrawConfig(images_per_prompt, seed, prompt_number, picture_number, batch, offload)
    )
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    parts, config, controls = settle(checkpoint, options, controls, len(prompts))
    jobs = list(jobs_of(len(prompts), images_per_prompt, seed, prompt_number, picture_number))
    with stage("text encoders"):
        encoders = parts.encoders if isinstance(parts, Pipeline) else parts.load_encoders()
        texts = encode(
            encoders,
            [*prompts, negative_prompt] if config.true_cfg > 1 else prompts,
            config.max_sequence_length,
            batch,
        )
        if offload != "none":
            del encoders
    with stage("transformer and modulation"):
        drawing = prepare(parts, texts, config, controls, offload)
    own = {"controls": [opened.control.settings() for opened in controls]} if controls else {}
    pictures, vae = [], drawing.autoencoder
    for start in range(0, len(jobs), batch):
        with stage("denoising"):
            tokens = draw_latents(drawing, jobs[start : start + batch], progress)
        if offload != "none" and start + batch >= len(jobs):
            del drawing
        with stage("autoencoder"):
            vae = vae or load_autoencoder(parts)
            for row in tokens:
                [picture] = decode(vae, row[None], config.height, config.width)
                picture.info["sampling"] = asdict(config) | own
                done(len(pictures), picture)
                pictures.append(picture)
    return pictures


def jobs_of(num_prompts, images_per_prompt, seed, prompt_number, picture_number):
    """(index of its prompt, seed of its noise) of each picture."""
    for j in range(num_prompts):
        for i in range(images_per_prompt):
            yield j, picture_seed(seed, prompt_number + j, picture_number + i)


def picture_seed(seed, prompt_number, picture_number):
    """The seed of one picture's noise."""
    return f"{seed}.{prompt_number}.{picture_number}"


@torch.inference_mode()
def encode(encoders, prompts, length, batch):
    """(txt, pooled) of all prompts, a batch at a time."""
    parts = [encoders.encode(prompts[i : i + batch], length) for i in range(0, len(prompts), batch)]
    return [torch.cat(column) for column in zip(*parts)]


def load_autoencoder(parts):
    return parts.autoencoder if isinstance(parts, Pipeline) else parts.load_autoencoder()


@dataclass
class Ready:
    """A net on its device, and what it needs to know of all prompts, or where that is large a way
    to make it batch by batch.
    """

    net: object
    condition: Callable  # (txt, pooled) of some prompts → their `Conditions`
    conditions: sampling.Conditions | None

    def rows(self, texts, numbers):
        """The `Conditions` of some of the encoded prompts, by number."""
        return (
            self.conditions.rows(numbers)
            if self.conditions
            else self.condition(*(part[numbers] for part in texts))
        )


@dataclass
class Drawing:
    """All that batches of pictures have in common."""

    model: Ready
    controls: list  # of (OpenControl, Ready, hint of seeds)
    autoencoder: object  # where ControlNets needed it, else None
    texts: list
    config: SampleConfig
    latents: object  # the autoencoder's configuration
    times: torch.Tensor


def prepare(parts, texts, config, controls, offload):
    """The `Drawing` of encoded prompts: transformer and nets of `controls` loaded, all steps'
    modulation computed.
    """
    pipeline, latents = isinstance(parts, Pipeline), parts.autoencoder.config
    model = parts.model if pipeline else place(parts.load_transformer, parts.device, offload)
    times = schedule.times_for(config, model.config, num_image_tokens(*cells_of(config, latents)))
    given = dict(times=times, guidance=config.guidance)
    ready = get_ready(
        model,
        partial(sampling.condition, model, **given),
        texts,
        config.steps,
        keep=pipeline or offload == "none",
    )
    autoencoder, steered = load_autoencoder(parts) if controls else None, []
    for number, opened in enumerate(controls):
        net = place(
            partial(parts.load_controlnet, opened),
            parts.device,
            "none" if opened.given else offload,
        )
        check_alike(net, model)
        condition = partial(control.condition, net, opened.mode, **given)
        net = get_ready(net, condition, texts, config.steps, keep=opened.given or offload == "none")
        steered.append((opened, net, control.hint_of(opened, number, autoencoder, parts.device)))
    return Drawing(ready, steered, autoencoder, texts, config, latents, times)


def check_alike(net, model):
    """Raise `ValueError` where a ControlNet that was given loaded computes in another type or place
    than the transformer.
    """
    a, b = net.img_in.weight, model.img_in.weight
    if (a.dtype, a.device) != (b.dtype, b.device):
        raise ValueError(
            f"the ControlNet is in {a.dtype} on {a.device}, the transformer in {b.dtype} on "
            f"{b.device}: load them alike"
        )


def place(load, device, offload):
    """A net on its device, or with offload="all" on the CPU, streamed block by block to an
    accelerator.
    """
    if offload != "all" or device.type == "cpu":
        return load()
    return stream_blocks(load(device="cpu"), device)


def get_ready(net, condition, texts, steps, *, keep):
    """The `Ready` net; unless it is to `keep` them, without the weights that are not needed any
    more.
    """
    conditions = None
    if fits(net, len(texts[0]), steps):
        conditions = condition(*texts)
        if not keep:
            net.drop_conditioning()
    return Ready(net, condition, conditions)


def fits(model, num_prompts, steps):
    """Whether the modulation of all prompts at all steps takes no more memory than the weights that
    it comes from.
    """
    weights = [linear.weight for linear in model.modulation.linears()]
    taken = sampling.Conditions.num_bytes(model.config, num_prompts, steps, weights[0].dtype)
    return taken <= sum(weight.nbytes for weight in weights)


def cells_of(config, latents):
    """Height and width in latent cells."""
    return config.height // latents.downsampling, config.width // latents.downsampling


@torch.inference_mode()
def draw_latents(drawing, jobs, progress):
    """Packed latents (B, L, C) of jobs (prompt number, seed)."""
    numbers, seeds = map(list, zip(*jobs))
    model, texts, config, latents = drawing.model, drawing.texts, drawing.config, drawing.latents
    noise = initial_noise((latents.latent_channels, *cells_of(config, latents)), seeds).to(
        texts[0].device
    )
    against = None
    if config.true_cfg > 1:
        against = model.rows(texts, [len(texts[0]) - 1]).rows(
            [0] * len(jobs)
        )  # the negative prompt is the last
    steerings = [
        Steering(
            opened.control,
            ready.net,
            ready.rows(texts, numbers),
            ready.net.embed_hint(hint(numbers, seeds)),
        )
        for opened, ready, hint in drawing.controls
    ]
    residuals = control.residuals(steerings, config.steps, model.net.config)
    options = dict(against=against, residuals=residuals, progress=progress)
    return sampling.sample(
        model.net, model.rows(texts, numbers), noise, drawing.times, config, **options
    )
