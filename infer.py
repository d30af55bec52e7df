"""Draw pictures: `python infer.py prompt="red circle with blue background"`; `--help` lists the
rest.
"""

import json
import logging
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

from fluxlite.cli.processes import deferred_signals
from fluxlite.cli.programs import run_program

USAGE = """
Draw pictures with a FLUX pipeline.

  python infer.py prompt="red circle with blue background"  the tiny pipeline that is shipped
  python infer.py prompt="a fox" prompt="an owl" images_per_prompt=4
  python infer.py prompt_file=prompts.txt model.checkpoint=runs/laptop output=pictures
  python infer.py prompt="a fox" model.checkpoint=FLUX.1-dev height=512 width=512
  python infer.py prompt="a fox" model.checkpoint=FLUX.1-dev control_image=edges.png \\
      controlnet.checkpoint=FLUX.1-dev-Controlnet-Canny controlnet.scale=0.7 controlnet.end=0.8

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


def free_path(folder, name, suffix=".png"):
    """A path in `folder` that does not exist yet; letters that could escape the folder are
    replaced.
    """
    stem = (
        re.sub(r"[^\w]+", "-", name).strip("-")[:60].encode()[:120].decode(errors="ignore")
        or "picture"
    )
    number, path = 1, folder / f"{stem}{suffix}"
    while path.exists():
        number, path = number + 1, folder / f"{stem}-{number + 1}{suffix}"
    return path


def save(picture, path, settings=None):
    """Write a PNG, whole or not at all, with its settings as JSON in the text chunk `fluxlite`."""
    from PIL.PngImagePlugin import PngInfo

    from fluxlite.weights.tensor_files import aside

    info = PngInfo()
    if settings:
        info.add_itxt("fluxlite", json.dumps(settings, ensure_ascii=False))
    with aside(path) as part:
        picture.save(part, "PNG", pnginfo=info)
    print(path, flush=True)


def usage():
    from fluxlite.cli.command_line import help_text
    from fluxlite.settings import InferConfig

    return help_text(InferConfig, "infer", USAGE)


def body(arguments):
    with deferred_signals():  # torch's import takes an interruption for a lack of numpy
        import torch
        from tqdm import tqdm

        from fluxlite.cli.command_line import load_config
        from fluxlite.cli.stage_times import StageTimes
        from fluxlite.draw.contact_sheet import contact_sheet
        from fluxlite.draw.pipeline import DrawConfig, generate
        from fluxlite.settings import InferConfig

    config = load_config(InferConfig, "infer", arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prompts, folder = prompts_of(config), Path(config.output)
    texts = [text for text in prompts for _ in range(config.images_per_prompt)]
    settings = asdict(config) | {"prompt": None}

    def keep(number, picture):
        own = {
            "prompt": texts[number],
            "prompt_number": config.prompt_number + number // config.images_per_prompt,
            "picture_number": config.picture_number + number % config.images_per_prompt,
        }
        save(picture, free_path(folder, texts[number]), settings | picture.info["sampling"] | own)

    options = {
        k: getattr(config, k)
        for k in ("height", "width", "steps", "guidance", "max_sequence_length")
        if getattr(config, k) is not None
    }
    options |= {
        k: getattr(config.model, k)
        for k in ("save_converted", "t5", "clip", "autoencoder", "ema", "attention")
    }
    options |= {f.name: getattr(config, f.name) for f in fields(DrawConfig)}
    options |= {"expected": config.expected(), "compile": config.compile}
    if config.model.max_sequence_length:
        options.setdefault("max_sequence_length", config.model.max_sequence_length)
    stages = StageTimes(config.device)
    pictures = generate(
        prompts,
        checkpoint=config.model.checkpoint,
        negative_prompt=config.negative_prompt,
        controls=config.controlnet.controls(config.control_image),
        stage=stages,
        done=keep,
        true_cfg=config.true_cfg,
        shift=config.shift,
        device=config.device,
        dtype=getattr(torch, config.dtype),
        progress=lambda steps: tqdm(steps, desc="drawing", unit="step"),
        **options,
    )
    if len(pictures) > 1:
        save(contact_sheet(pictures, captions=texts), free_path(folder, "contact-sheet"))
    print(stages.table(), file=sys.stderr)


if __name__ == "__main__":
    run_program(body, usage=usage, ranks=False)
