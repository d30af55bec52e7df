"""Draw pictures: `python infer.py prompt="red circle with blue background"`; `--help` lists the
rest.
"""

import json
import logging
import re
import sys
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

from fluxlite.cli.programs import run_program, stopping_at_once

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


def save_picture(picture, folder, name, settings=None):
    """Write a PNG under a name that is free, whole or not at all, with its settings as JSON in the
    text chunk `fluxlite`.

    Programs that save to one folder at once take turns, so that none takes another's name.
    """
    from PIL.PngImagePlugin import PngInfo

    from fluxlite.cli.atomic import locked
    from fluxlite.weights.tensor_files import atomic_weights

    info = PngInfo()
    if settings:
        info.add_itxt("fluxlite", json.dumps(settings, ensure_ascii=False))
    stem = file_stem(name)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{stem}.lock"):
        path = free_path(folder, stem)
        with atomic_weights(path) as part:
            picture.save(part, "PNG", pnginfo=info)
    print(path, flush=True)


def file_stem(name):
    """A name without letters that could escape a folder, short enough for any disk."""
    short = re.sub(r"[^\w]+", "-", name).strip("-")[:60]
    return short.encode()[:120].decode(errors="ignore") or "picture"


def free_path(folder, stem):
    """A path in `folder` that does not exist yet."""
    number, path = 1, folder / f"{stem}.png"
    while path.exists():
        number, path = number + 1, folder / f"{stem}-{number + 1}.png"
    return path


def save_drawn(config, prompts, number, picture):
    """Save a picture of `generate` with all that draws it again."""
    j, i = divmod(number, config.images_per_prompt)
    own = {
        "prompt": prompts[j],
        "prompt_number": config.prompt_number + j,
        "picture_number": config.picture_number + i,
    }
    settings = asdict(config) | picture.info["sampling"] | own
    save_picture(picture, Path(config.output), prompts[j], settings)


def usage():
    from fluxlite.cli.command_line import help_text
    from fluxlite.settings import InferConfig

    return help_text(InferConfig, "infer", USAGE, everything="all" in sys.argv)


def body(arguments):
    with stopping_at_once():
        from fluxlite.cli.profiling import StepProfile, parse_steps
        from fluxlite.cli.stage_times import StageTimes
        from fluxlite.draw.contact_sheet import contact_sheet
        from fluxlite.draw.pipeline import generate, open_pipeline, show_steps
        from fluxlite.settings import MAX_STEPS, load_settings

    config = load_settings("infer", arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prompts, stages = prompts_of(config), StageTimes(config.device)
    recorded = parse_steps(config.profile, MAX_STEPS)
    profile = StepProfile(recorded, config.output, config.device)
    with closing(profile):
        pictures = generate(
            prompts,
            checkpoint=open_pipeline(config),
            config=config,
            controls=config.controls(),
            **config.pictures(),
            **config.sampling(),
            stage=stages,
            on_step=profile.watching(show_steps(desc="drawing", unit="step")),
            on_picture=partial(save_drawn, config, prompts),
        )
    if len(pictures) > 1:
        texts = [prompts[n // config.images_per_prompt] for n in range(len(pictures))]
        sheet = contact_sheet(pictures, captions=texts)
        save_picture(sheet, Path(config.output), "contact-sheet")
    print(stages.table(), file=sys.stderr)


if __name__ == "__main__":
    run_program(body, usage=usage, ranks=False)
