"""Draw pictures: `python infer.py prompt="red circle with blue background"`; `--help` lists the
rest.
"""

import logging
import sys
from contextlib import closing
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

from fluxlite.cli.messages import is_first_rank
from fluxlite.cli.programs import run_program, stopping_at_once

ENCODED_JOBS = 64  # whose prompts are encoded before they are drawn: of FLUX.1 4 MB each

USAGE = """
Draw pictures with a FLUX pipeline.

  python infer.py prompt="red circle with blue background"  the tiny pipeline that is shipped
  python infer.py prompt="a fox" prompt="an owl" images_per_prompt=4
  python infer.py prompt_file=prompts.txt model.checkpoint=runs/laptop output=pictures
  python infer.py prompt="a fox" model.checkpoint=FLUX.1-dev height=512 width=512
  python infer.py prompt="a fox" model.checkpoint=FLUX.1-dev control_image=edges.png \\
      controlnet.checkpoint=FLUX.1-dev-Controlnet-Canny controlnet.scale=0.7 controlnet.end=0.8
  python infer.py prompt="a fox" model.checkpoint=FLUX.1-dev lora=style.safetensors lora.scale=0.8
  python infer.py prompt="a fox" lora=style.safetensors lora=fox.safetensors lora.scale=0.8 \\
      lora.scale=0.5  two, each with its strength

  python infer.py prompt="an owl" image=photo.jpg strength=0.7  from a picture
  python infer.py prompt="an owl" image=photo.jpg mask=hole.png paste=true  into a hole
  python infer.py prompt="in snow" reference=owl.png model.checkpoint=FLUX.1-Kontext-dev
  python infer.py prompt="an owl" control_image=owl.jpg canny=true model.checkpoint=FLUX.1-Canny-dev

  python infer.py prompt="an owl" prompt_number=1 picture_number=3  one of many, again
  python infer.py from=outputs/an-owl.png  the same picture bit for bit
  python infer.py jobs=pictures.jsonl output=pictures  {"prompt": "an owl", "seed": 3} a line
  torchrun --nproc_per_node 4 infer.py prompt_file=prompts.txt batch=2  spread over four
  torchrun --nproc_per_node 4 infer.py prompt="a fox" parallel.tp=4  a picture shared by four

Prompts and paths are taken as the shell gives them: no quoting for Hydra is needed.
"""


def prompts_of(config):
    """The prompts of the command line, then those of the file, a line each."""
    from fluxlite.cli.descriptions import read_text

    try:
        lines = read_text(config.prompt_file).split("\n") if config.prompt_file else []
    except ValueError as error:
        raise ValueError(f"prompt_file={error}") from None
    prompts = [*config.prompt, *(line for line in lines if line.strip())]
    if not prompts:
        raise ValueError(f"prompt_file={config.prompt_file} holds no prompt")
    return prompts


def save_drawn(config, prompts, number, picture, path=None):
    """Save a picture of `generate` with all that draws it again."""
    from fluxlite.draw.saving import save_picture
    from fluxlite.settings import picture_settings

    j, i = divmod(number, config.images_per_prompt)
    own = {
        "prompt": prompts[j],
        "prompt_number": config.prompt_number + j,
        "picture_number": config.picture_number + i,
    }
    sampling = picture.info["sampling"]
    placed = {name: sampling[name] for name in ("batch", "place")}
    alone = replace(config, images_per_prompt=1, **own | placed | {"prompt": [prompts[j]]})
    settings = asdict(config) | sampling | own | {"again": picture_settings(alone)}
    save_picture(picture, Path(config.output), prompts[j], settings, path)


def draw_pictures(config, pipeline, stages, on_picture, prompts, seeds=None):
    """Draw prompts as an `InferConfig` says, each with a seed of its own where those are given."""
    from fluxlite.cli.profiling import StepProfile, parse_steps
    from fluxlite.draw.generation import generate, show_steps
    from fluxlite.draw.preview import previewing
    from fluxlite.settings import MAX_STEPS

    recorded, sharing = parse_steps(config.profile, MAX_STEPS), pipeline.sharing
    profile = StepProfile(recorded, config.output, config.device)
    show = show_steps(desc="drawing", unit="step", disable=sharing.group > 0)
    file = Path(config.output) / f"preview{sharing.group or ''}.live.png"
    shown = config.preview_every, file, config.preview, config.tile
    with closing(profile), previewing(pipeline, *shown) as look:
        return generate(
            prompts,
            checkpoint=pipeline,
            config=config,
            seeds=seeds,
            controls=config.controls(),
            **config.pictures(),
            **config.sampling(),
            stage=stages,
            on_step=profile.watching(lambda *step: (show(*step), look(*step))),
            on_picture=on_picture,
        )


def draw_prompts(config, sharing, stages):
    """Draw an `InferConfig`'s prompts, and show several pictures together."""
    from fluxlite.draw.contact_sheet import contact_sheet
    from fluxlite.draw.pipeline import open_pipeline
    from fluxlite.draw.saving import save_picture
    from fluxlite.draw.sharing import warn_idle

    prompts, drawn = prompts_of(config), {}
    warn_idle(sharing, len(prompts) * config.images_per_prompt, config.batch)

    def save(number, picture):
        save_drawn(config, prompts, number, picture)
        drawn[number] = picture

    draw_pictures(config, open_pipeline(config, sharing), stages, save, prompts)
    pictures = sharing.gather_drawn(drawn)
    if len(pictures) > 1:
        texts = [prompts[n // config.images_per_prompt] for n in pictures]
        sheet = contact_sheet([*pictures.values()], captions=texts)
        save_picture(sheet, Path(config.output), "contact-sheet")


def draw_jobs(base, sharing, stages):
    """Draw the pictures of a file of jobs that are not in the output yet; all are checked before
    the first is drawn.
    """
    from fluxlite.draw.saving import job_place, name_jobs, read_jobs
    from fluxlite.settings import job_settings, picture_settings

    places = [(job_place(base.jobs, n), job) for n, job in read_jobs(base.jobs)]
    jobs = [(where, job_settings(base, job, where)) for where, job in places]
    names = name_jobs([picture_settings(config) for _, config in jobs])
    paths = [Path(config.output) / name for (_, config), name in zip(jobs, names)]
    missing = sharing.first_does(lambda: [not path.exists() for path in paths])
    left = [(*job, path) for job, path, is_left in zip(jobs, paths, missing) if is_left]
    opened = [*open_jobs(left, sharing)]
    logging.info("%d of %d jobs are drawn already", len(jobs) - len(left), len(jobs))
    for pipeline, group in groupby(opened, key=itemgetter(0)):
        draw_group(pipeline, [*group], stages)


def open_jobs(jobs, sharing):
    """(pipeline, what it encodes, place, config, path) of checked jobs (place, config, path).

    Jobs share a pipeline where they name the same.
    """
    from fluxlite.cli.options import naming_place
    from fluxlite.draw.pipeline import PipelineConfig, open_pipeline
    from fluxlite.draw.plan import plan_drawing

    opened = {}
    for where, config, path in jobs:
        key = repr([getattr(config, f.name) for f in fields(PipelineConfig)])
        with naming_place(where):
            if key not in opened:
                opened[key] = open_pipeline(config, sharing)
            drawn = dict(controls=config.controls(), given=config.pictures(), **config.sampling())
            plan = plan_drawing(opened[key], config, prompts_of(config), **drawn)
        texts = [(text, plan.sample.max_sequence_length) for text in plan.texts()]
        yield opened[key], texts, where, config, path


def draw_group(pipeline, jobs, stages):
    """Draw jobs of one pipeline, whose prompts are encoded some at a time before they are drawn.

    Those that follow each other and differ in prompt and seed alone are drawn by one call.
    """
    from fluxlite.cli.options import naming_place

    for first in range(0, len(jobs), ENCODED_JOBS):
        together = jobs[first : first + ENCODED_JOBS]
        with stages("text encoders"):
            pipeline.remember_texts(chain.from_iterable(job[1] for job in together))
        for _, alike in groupby(together, key=settings_alike):
            _, _, wheres, configs, paths = zip(*alike)
            with naming_place(wheres[0]):
                prompts, seeds = [c.prompt[0] for c in configs], [c.seed for c in configs]
                save = partial(save_job, configs, paths)
                draw_pictures(configs[0], pipeline, stages, save, prompts, seeds)
    pipeline.drop_parts()


def settings_alike(job):
    """What jobs share that are drawn by one call."""
    from fluxlite.settings import picture_settings

    settings = picture_settings(job[3])
    return {key: value for key, value in settings.items() if key not in ("prompt", "seed")}


def save_job(configs, paths, number, picture):
    """Save the picture of a job, by its number."""
    save_drawn(configs[number], configs[number].prompt, 0, picture, paths[number])


def again_settings(config, arguments):
    """The settings of the picture that `from=` names, changed by what the command line gives."""
    from fluxlite.cli.command_line import full_keys
    from fluxlite.draw.saving import read_again
    from fluxlite.settings import InferConfig, job_settings

    given = {argument.partition("=")[0] for argument in full_keys(InferConfig, arguments)}
    job = {key: value for key, value in read_again(config.again).items() if key not in given}
    return job_settings(config, job, f"from={config.again}")


def usage():
    from fluxlite.cli.command_line import help_text
    from fluxlite.settings import InferConfig

    return help_text(InferConfig, "infer", USAGE, everything="all" in sys.argv)


def body(arguments):
    with stopping_at_once():
        from fluxlite import parallel
        from fluxlite.cli.stage_times import StageTimes
        from fluxlite.draw.sharing import REMEDY, join_sharing
        from fluxlite.settings import load_settings

    config, first = load_settings("infer", arguments), is_first_rank()
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    if config.again:
        config = again_settings(config, arguments)
    draw = draw_jobs if config.jobs else draw_prompts
    try:
        with parallel.watching_ranks(config.parallel, REMEDY):
            sharing = join_sharing(config.parallel, config.device)
            stages = StageTimes(config.device)
            draw(config, sharing, stages)
    finally:
        parallel.stop_ranks()
    if first:
        print(stages.table(), file=sys.stderr)


if __name__ == "__main__":
    run_program(body, usage=usage)
