"""`generate` draws pictures with a `Pipeline`, whose parts are loaded when they are needed.

    import fluxlite
    pictures = fluxlite.generate("red circle with blue background", seed=1)  # the shipped one
    pipeline = fluxlite.load_pipeline("FLUX.1-dev")  # to draw with again and again
    pictures = fluxlite.generate(["a fox", "an owl"], checkpoint=pipeline, height=512, width=512)

`plan` settles what is drawn, `kinds` what pictures add to it, `sampling` draws.

B pictures, L tokens, C channels, h and w in latent cells.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from fluxlite import parallel
from fluxlite.cli.options import check_kind, typed_options
from fluxlite.data.transfers import send_tensor
from fluxlite.draw import kinds
from fluxlite.draw.control import Control, prepare_controls
from fluxlite.draw.offload import bytes_beside
from fluxlite.draw.pipeline import (
    DRAW_FIELDS,
    LOAD_OPTIONS,
    DrawConfig,
    Pipeline,
    check_names,
    open_pipeline,
    pipeline_config,
)
from fluxlite.draw.plan import plan_drawing, reference_cells, solver_name
from fluxlite.draw.redux import Redux, add_pictures
from fluxlite.draw.sampling import decode_pictures, prepare_conditions, sample_latents
from fluxlite.nets.flux import rope_table
from fluxlite.nets.latents import num_image_tokens, position_ids, unpack_latents
from fluxlite.weights.hub import TINY


def generate(
    prompt: str | Sequence[str],
    *,
    checkpoint: str | Path | Pipeline = TINY,
    image=None,
    mask=None,
    control_image=None,
    reference=None,
    seeds: Sequence[int] | None = None,
    redux: Redux | Sequence[Redux] = (),
    controls: Control | Sequence[Control] = (),
    times: Sequence[float] | torch.Tensor | None = None,
    start_time: float | None = None,
    latents: torch.Tensor | Sequence[torch.Tensor] | None = None,
    posteriors: dict | None = None,
    decode: bool = True,
    solver: str | Callable = "euler",
    on_step: Callable | None = None,
    on_picture: Callable | None = None,
    stage: Callable[[str], AbstractContextManager] = nullcontext,
    config: DrawConfig | None = None,
    **options,
) -> list[Image.Image] | list[torch.Tensor]:
    """Draw pictures: a list of PIL images, those of the first prompt first.

    `prompt` is a text or a list of them; the picture i of prompt j depends on (seed, j, i) alone,
    whatever the batch; `seeds` has one for each prompt, which is then drawn as if it were alone.
    `checkpoint` is a pipeline folder, a run, a transformer or a `Pipeline`; `controls` are
    `Control`s, which add up. `options` are the fields of `DrawConfig` (height, width, steps,
    guidance, true_cfg, shift, seed, …), or `config` has them, and without a `Pipeline` the
    arguments of `load_pipeline`. Each part is then loaded when its turn comes, and
    freed as `offload` says: text, the default, frees the text encoders before the transformer is
    loaded and the modulation's weights once all steps are modulated.

    Pictures are paths or PIL images, one or one a prompt: `image` to begin from (`strength`),
    `mask`, whose white part of it is drawn anew, `control_image` that a FLUX.1-Canny or -Depth
    follows. All prompts have the same `reference`, one or several. Without height and width the
    pictures have the proportions of the first of these. `redux` are `Redux`es, which add up.

    `times` fall from 1, noise, to 0, a picture, in place of steps and shift. Drawing begins at
    `start_time`, of which `latents` (pictures, C, h, w) are the state; they may also stand for the
    noise at 1, and do with `image`. `posteriors` are normal draws, by name, for encoding pictures
    (`posteriors.Posteriors`). Without `decode` the latents (C, h, w) at the last time come in place
    of pictures. `solver` is a name of `solvers.SOLVERS`, or a function as those.

    `on_step(numbers, step, times, latents)` is called with the latents (B, C, h, w) of a batch's
    pictures at times[step], from step 0 on; `on_picture(number, picture)` with each picture as soon
    as its batch is drawn. Numbers count from 0. `stage(name)` is a context around each part of the
    work. Each picture's `info["sampling"]` are the settings it was drawn with. Raises `ValueError`.
    """
    check_kind(start_time, (Real, type(None)), "start_time", "a number")
    pipeline, config = settle_options(checkpoint, config, options)
    given = dict(image=image, mask=mask, control_image=control_image, reference=reference)
    given |= {"redux": redux, "seeds": seeds}
    times = dict(times=times, start_time=start_time)
    plan = plan_drawing(
        pipeline, config, prompt, controls, given, latents, posteriors, solver, **times
    )
    with stage("text encoders"):
        length = plan.sample.max_sequence_length
        texts = [pipeline.encode_text(text, length) for text in plan.texts()]
        if plan.redux:
            add = add_pictures(plan.redux, pipeline.device, pipeline.dtype)
            texts = [*map(add, texts[: len(plan.prompts)]), *texts[len(plan.prompts) :]]
        pipeline.release("encoders")
    batches, leads = pipeline.sharing.deal(plan.batches), pipeline.sharing.leads
    if not batches:
        return []
    with stage("transformer and modulation"):
        draw = prepare_drawing(plan, texts)
    about, drawn = describe_drawing(plan), []
    for numbers, kept in batches:
        with stage("denoising"):
            tokens = draw(numbers, watch_steps(on_step if leads else None, numbers, kept, plan))
        if numbers[-1] == batches[-1][0][-1]:
            del draw
            pipeline.release("transformer")
        with stage("autoencoder"):
            for place in kept if leads else ():
                own = about | {"batch": len(numbers), "place": place}
                picture = finish_picture(plan, numbers[place], tokens[place][None], own, decode)
                if on_picture:
                    on_picture(numbers[place], picture)
                drawn.append(picture)
    return drawn


def settle_options(checkpoint, config, options):
    """The `Pipeline` and the `DrawConfig` that `generate` is given, or makes of its options."""
    check_kind(checkpoint, (str, Path, Pipeline), "checkpoint", "a path, a hub id or a Pipeline")
    check_kind(config, (DrawConfig, type(None)), "config", "a DrawConfig")
    known = *inspect.signature(generate).parameters, *DRAW_FIELDS, *LOAD_OPTIONS
    check_names(options, [name for name in known if name != "options"], "generate")
    own = {name: options.pop(name) for name in DRAW_FIELDS if name in options}
    if config and own:
        raise ValueError(f"{'=, '.join(own)}= beside config=: set them in config, or leave it out")
    values = {name: getattr(config, name) for name in DRAW_FIELDS} if config else own
    config = typed_options(DrawConfig, values)
    if not isinstance(checkpoint, Pipeline):
        return open_pipeline(pipeline_config(checkpoint, **options)), config
    if options:
        raise ValueError(
            f"{', '.join(options)}: these are settled once a pipeline is loaded; pass them to "
            "load_pipeline"
        )
    return checkpoint, config


def prepare_drawing(plan, texts) -> Callable:
    """A function (pictures' numbers, callback) → packed latents (B, L, C); see `sample_latents`.

    Pictures are encoded, transformer and nets of the `open_control`s loaded, all steps' modulation
    computed, and then they are moved to the device; of encoded prompts `texts` the negative one is
    the last.
    """
    pipeline, sample, times = plan.pipeline, plan.sample, plan.times
    guided = plan.scene, plan.pictures, times, plan.noise, plan.posteriors
    guides = kinds.prepare_guides(pipeline, *guided)
    pipeline.release("transformer")  # a drawing that was stopped leaves one without modulation
    model, given = pipeline.transformer, (texts, times, sample.guidance)
    conditions = prepare_conditions(model, *given, keep=pipeline.keeps_parts)
    attach = prepare_controls(pipeline, plan.opened, *given, plan.posteriors)
    references = reference_cells(pipeline, plan.scene)
    length = texts[0][0].shape[1]
    further = length - sample.max_sequence_length  # of redux
    pipeline.place_net(model, bytes_planned(plan, references, further))
    positions = position_ids(*plan.shape[1:], length, references)
    rope = rope_table(send_tensor(positions, pipeline.device), model.config)

    @torch.inference_mode()
    def draw(numbers, callback):
        prompts, seeds = map(list, zip(*[plan.pictures[n] for n in numbers]))
        guide = guides(numbers)
        options = dict(residuals=attach(prompts, seeds), see=guide.see, solver=plan.solver)
        if sample.true_cfg > 1:
            negative = conditions([len(texts) - 1] * len(prompts))
            options |= {"negative": negative, "true_cfg": sample.true_cfg}
            options["compute"] = pipeline.sharing.compute
        options["callback"] = lambda step, x: callback(step, guide.blend(step, x))
        return sample_latents(model, conditions(prompts), guide.start, rope, times, **options)

    return draw


def bytes_planned(plan, references, further=0):
    """`bytes_beside` of a `Plan`, with references of (height, width) in latent cells, and so many
    further tokens of text; and the autoencoder, which previews and all batches but the last need.
    """
    pipeline, most = plan.pipeline, min(plan.config.batch, len(plan.pictures))
    batch = plan.config.batch if plan.config.place >= 0 else most
    parts = pipeline.model_config, pipeline.sources["autoencoder"].config
    nets = [control.checkpoint.config for control in plan.opened]
    residuals = sum(net.num_double_blocks + net.num_single_blocks for net in nets)
    tokens = further + sum(num_image_tokens(*cells) for cells in references)
    beside = residuals, tokens, plan.config.tile
    beside = bytes_beside(*parts, plan.sample, batch, pipeline.dtype.itemsize, *beside)
    there = "autoencoder" in vars(pipeline)  # else it comes while the transformer stays
    return beside + (0 if there else pipeline.sources["autoencoder"].num_bytes())


def watch_steps(on_step, numbers, kept, plan) -> Callable:
    """A solver's callback that tells `on_step`, if any, of the pictures of some numbers, those at
    the places that are kept.
    """

    def callback(step, x):
        if on_step:
            rows = x if len(kept) == len(x) else x[kept]
            latents = unpack_latents(rows, *plan.shape[1:])
            on_step([numbers[i] for i in kept], step, plan.times, latents)
        return x

    return callback


def describe_drawing(plan):
    """What a picture's `info["sampling"]` says of it."""
    times, pipeline = plan.times, plan.pipeline
    about = asdict(replace(plan.sample, steps=len(times) - 1)) | {"times": times.tolist()}
    about |= {"tile": plan.config.tile} if plan.config.tile else {}
    about |= {"strength": plan.strength} if plan.strength else {}
    own = {"controls": plan.controls, "loras": [lora.lora for lora in pipeline.loras]}
    own |= {"redux": [one.redux for one in plan.redux]}
    for key, of in own.items():
        about |= {key: [one.describe() for one in of]} if of else {}
    kept = pipeline.config
    lossy = parallel.lossy_settings({"float8": kept.float8, "model.quantize": kept.model.quantize})
    return about | {"solver": solver_name(plan.solver)} | plan.inputs.named | lossy


def finish_picture(plan, number, tokens, about, decode):
    """A PIL picture of packed latents (1, L, C), pasted where it is to be, or, without `decode`,
    latents (C, h, w) on the CPU.
    """
    if not decode:
        return unpack_latents(tokens, *plan.shape[1:])[0].cpu().clone()
    vae, config = plan.pipeline.autoencoder, plan.config
    [picture] = decode_pictures(vae, tokens, *plan.size, config.tile)
    if config.paste or config.crop >= 0:
        picture = plan.scene.paste(plan.pictures[number][0], picture)
    picture.info["sampling"] = about
    return picture


def show_steps(**options) -> Callable:
    """An `on_step` that shows a bar for each batch; `options` are tqdm's."""
    bars = []

    def on_step(numbers, step, times, latents):
        if step == 0:
            bars.append(tqdm(total=len(times) - 1, **options))
            return
        bars[-1].update()
        if step == len(times) - 1:
            bars.pop().close()

    return on_step
