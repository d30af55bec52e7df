"""The parts of a FLUX pipeline, loaded from folders, files or runs; `generate` draws with them.

import fluxlite
pictures = fluxlite.generate("red circle with blue background", seed=1)      # PIL images, from the shipped tiny pipeline
pictures = fluxlite.generate(["a fox", "an owl"], checkpoint="FLUX.1-dev", height=512, width=512)
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from fluxlite import checkpoint as ckpt
from fluxlite import parallel
from fluxlite.conditioning import load_text_encoders
from fluxlite.sampling import SampleConfig, decode, initial_noise, sample

TINY = "flux-tiny"
ASSETS = Path(__file__).parents[2] / "assets"
PARTS = {"t5": "text_encoder_2", "clip": "text_encoder", "autoencoder": "vae"}


@dataclass
class Pipeline:
    """A transformer, an autoencoder and text encoders on one device."""

    model: object
    autoencoder: object
    encoders: object
    device: torch.device


def resolve(path):
    """`flux-tiny` names the pipeline that comes with the code; anything else stands for itself."""
    if path != TINY:
        return path
    if not (ASSETS / TINY).is_dir():
        raise ValueError(f"{ASSETS / TINY} is missing: work in a clone of the repository, or name a checkpoint of your own")
    return str(ASSETS / TINY)


def beside(checkpoint):
    """Where the other parts of a transformer's pipeline lie: {part: path} for those that are found."""
    path = Path(resolve(checkpoint)).expanduser()
    if ckpt.is_run(path):
        saved = ckpt.read_meta(ckpt.last_checkpoint(path) or path)["config"]["model"]
        return {part: resolve(saved[part]) for part in PARTS if saved.get(part)}
    folder = path if (path / "transformer").is_dir() else path.parent
    return {part: str(folder / name) for part, name in PARTS.items() if (folder / name).is_dir()}


def load_pipeline(checkpoint=TINY, *, t5=None, clip=None, autoencoder=None, ema=True, attention="auto", device=None, dtype=None):
    """A `Pipeline` from a pipeline folder, a transformer or a run; parts not named are looked for beside it.

    Raises `ValueError` that names the missing part's key.
    """
    device = torch.device(device or parallel.default_device())
    dtype = dtype or (torch.bfloat16 if parallel.has_bf16(device) else torch.float32)
    named = {"t5": t5, "clip": clip, "autoencoder": autoencoder}
    parts = beside(checkpoint) | {k: resolve(v) for k, v in named.items() if v}
    missing = [f"model.{part}=" for part in PARTS if part not in parts]
    if missing:
        raise ValueError(f"{checkpoint} has no {', '.join(missing)} beside it: name a folder or a hub id for each")
    model = ckpt.load_transformer(resolve(checkpoint), ema=ema, attention=attention, dtype=dtype, device=device)
    encoders = load_text_encoders(parts["t5"], parts["clip"], device=device, dtype=dtype)
    vae = ckpt.load_autoencoder(parts["autoencoder"], dtype=dtype, device=device)
    check_widths(model.config, vae, encoders)
    return Pipeline(model, vae, encoders, device)


def check_widths(config, autoencoder, encoders):
    """Raise `ValueError` where the parts' widths do not fit the transformer's."""
    for name, theirs, key, ours in (
        ("autoencoder", 4 * autoencoder.config.latent_channels, "out_channels", config.out_channels),
        ("t5", encoders.text_width, "text_width", config.text_width),
        ("clip", encoders.pooled_width, "pooled_width", config.pooled_width),
    ):
        if theirs != ours:
            raise ValueError(f"model.{name} gives {theirs} channels, but the transformer has model.{key}={ours}")


def default_settings(checkpoint):
    """Settings that suit a checkpoint where the user names none: {field of SampleConfig: value}."""
    path = Path(resolve(checkpoint)).expanduser()
    if ckpt.is_run(path):
        saved = ckpt.read_meta(ckpt.last_checkpoint(path) or path)["config"]
        settings = {k: saved["sample"][k] for k in ("steps", "guidance")} | {k: saved["data"][k] for k in ("height", "width")}
        return settings | {"max_sequence_length": saved["model"]["max_sequence_length"]}
    folder = path if (path / "transformer").is_dir() else path.parent
    if (folder / "fluxlite.json").is_file():
        return json.loads((folder / "fluxlite.json").read_text())
    config = folder / "transformer" / "config.json"
    if config.is_file() and not json.loads(config.read_text())["guidance_embeds"]:
        return {"steps": 4, "max_sequence_length": 256}
    return {}


def generate(prompt, *, checkpoint=TINY, negative_prompt="", images_per_prompt=1, seed=0, batch=8, progress=lambda s: s, **options):
    """Draw pictures: a list of PIL images, those of the first prompt first.

    `prompt` is a string or a list of them; the picture i of prompt j depends on (seed, j, i) alone, whatever the batch.
    `checkpoint` is a pipeline folder, a run, a transformer or a loaded `Pipeline`. Options are the fields of `SampleConfig`
    (height, width, steps, guidance, true_cfg, shift, max_sequence_length) and the arguments of `load_pipeline`.
    Raises `ValueError`.
    """
    names = {f.name for f in fields(SampleConfig)}
    settings = {k: options.pop(k) for k in list(options) if k in names}
    loaded = isinstance(checkpoint, Pipeline)
    config = SampleConfig(**(({} if loaded else default_settings(checkpoint)) | settings))
    pipeline = checkpoint if loaded else load_pipeline(checkpoint, **options)
    config.validate(pipeline.autoencoder.config.downsampling)
    if "guidance" in settings and not pipeline.model.config.guidance_embed:
        raise ValueError("guidance: this model (as schnell) has no guidance input; leave the setting out")
    if config.true_cfg > 1 and not negative_prompt:
        raise ValueError(f"true_cfg={config.true_cfg} needs a negative_prompt")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    jobs = [(text, picture_seed(seed, j, i)) for j, text in enumerate(prompts) for i in range(images_per_prompt)]
    pictures = []
    for start in range(0, len(jobs), batch):
        pictures += _draw(pipeline, jobs[start : start + batch], negative_prompt, config, progress)
    return pictures


def picture_seed(seed, prompt_number, picture_number):
    """The seed of one picture's noise; a picture drawn alone with `prompt_number` 0 is the first of a list's first prompt."""
    return f"{seed}.{prompt_number}.{picture_number}"


@torch.inference_mode()
def _draw(pipeline, jobs, negative_prompt, config, progress):
    texts, seeds = zip(*jobs)
    length, device = config.max_sequence_length, pipeline.device
    txt, pooled = pipeline.encoders.encode(list(texts), length)
    negative = pipeline.encoders.encode([negative_prompt] * len(jobs), length) if config.true_cfg > 1 else None
    vae = pipeline.autoencoder
    cells = config.height // vae.config.downsampling, config.width // vae.config.downsampling
    noise = initial_noise((vae.config.latent_channels, *cells), seeds).to(device)
    tokens = sample(pipeline.model, txt, pooled, noise, config, negative=negative, progress=progress)
    return decode(vae, tokens, config.height, config.width)
