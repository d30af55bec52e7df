"""Drawn pictures on the disk: PNGs with all that draws them again.

The text chunk `fluxlite` holds JSON: the settings, and under `again` those of them that make a line
of a file of jobs. The chunk `parameters` holds what other programs show.
"""

import hashlib
import json
import logging
import re
from collections import Counter

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fluxlite import __version__
from fluxlite.cli.atomic import locked
from fluxlite.cli.descriptions import parse_json, read_text
from fluxlite.weights.tensor_files import atomic_weights

log = logging.getLogger("fluxlite")

REDRAWN_REMEDY = "name a PNG that infer.py of this version has written"


def save_picture(picture, folder, name, settings=None, path=None):
    """Write a PNG under a name that is free, or to a `path`, whole or not at all, with its
    settings.

    Programs that save to one folder at once take turns, so that none takes another's name. What
    another has written to the `path` meanwhile stays, and that is said.
    """
    info = PngInfo()
    if settings:
        info.add_itxt("fluxlite", json.dumps(settings, ensure_ascii=False))
        info.add_text("parameters", parameters_text(settings))
    stem = file_stem(name)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{stem}.lock"):
        if path and path.exists():
            return log.warning("%s has been drawn by another program meanwhile: it stays", path)
        path = path or free_path(folder, stem)
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


def parameters_text(settings):
    """Settings as AUTOMATIC1111's web interface writes them, which most programs show."""
    lines = [settings["prompt"]]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    named = {
        "Steps": settings["steps"],
        "Sampler": settings["solver"],
        "CFG scale": settings["true_cfg"],
        "Distilled CFG Scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"]["checkpoint"],
        "Version": f"fluxlite {__version__}",
    }
    if settings.get("strength"):
        named["Denoising strength"] = settings["strength"]
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in named.items())])


def read_again(path):
    """What draws a saved picture again: {key: value}; raises `ValueError`."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = getattr(image, "text", {}).get("fluxlite")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if getattr(error, "strerror", None):  # of the disk
            raise
        raise ValueError(f"from={path} is no whole PNG: {REDRAWN_REMEDY}") from None
    again = parse_json(text, f"from={path}").get("again") if text else None
    if not isinstance(again, dict):
        raise ValueError(f"from={path} does not say how it is drawn again: {REDRAWN_REMEDY}")
    return again


# --- files of jobs --------------------------------------------------------------------------------


def read_jobs(path):
    """(line number, {key: value}) of the jobs in a JSONL file; raises `ValueError`."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    found = [(n, parse_json(text, job_place(path, n))) for n, text in lines if text.strip()]
    if not found:
        raise ValueError(f'jobs={path} holds no job: a line is an object, as in {{"prompt": "a"}}')
    return found


def job_place(path, number):
    """What an error calls a job."""
    return f"jobs={path}, line {number}"


def name_jobs(jobs):
    """A file name for each {key: value} of `settings.picture_settings`: of its prompt and a digest
    of all, so that lines may be moved and added. Equal ones are numbered.
    """
    seen, names = Counter(), []
    for settings in jobs:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        name = f"{file_stem(settings['prompt'][0])}-{digest}"
        seen[name] += 1
        names.append(f"{name}.png" if seen[name] == 1 else f"{name}.{seen[name]}.png")
    return names
