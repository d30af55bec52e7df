"""The first batches as a run would train on them, for a person to look at."""

import json
import logging
from functools import partial
from pathlib import Path

from fluxlite import parallel
from fluxlite.cli.atomic import atomic_folder
from fluxlite.data.images import pixels_of
from fluxlite.data.opening import open_dataset, prepare_data
from fluxlite.draw.contact_sheet import contact_sheet
from fluxlite.draw.sampling import pictures_of
from fluxlite.train.draws import DrawnSamples, draw_step
from fluxlite.train.tasks import choose_task
from fluxlite.weights.text_encoders import load_tokenizers

BATCHES = 4
MOST = 64  # samples of them all
SHOWN = ("images", "controls", "masks")

log = logging.getLogger("fluxlite")


def write_preview(config):
    """Write the first batches into output/preview: a sheet of pictures for each, and a line for
    each sample in samples.jsonl. Returns the run's folder.

    The caption is what is left after dropping it and in its template; where an encoder cuts it,
    what that reads is told. Nothing but tokenizers is loaded.
    """
    folder, size = Path(config.output), config.data.global_batch
    prepare_data(config.data, "train")
    dataset = open_dataset(config.data, "train", config.seed)
    if parallel.rank() > 0:
        return folder
    model = config.model
    read_by = load_tokenizers(
        model.t5, model.clip, model.max_sequence_length, tokenizers=model.tokenizers
    )
    draws = draw_step, choose_task(config).draw_inputs
    samples = DrawnSamples(dataset, *(partial(draw, config) for draw in draws))
    drawn = [samples[index] for index in range(min(BATCHES * size, MOST))]
    with atomic_folder(folder / "preview", replace=True) as aside:
        for start in range(0, len(drawn), size):
            write_sheet(drawn[start : start + size], aside / f"batch-{start // size}.png")
        with open(aside / "samples.jsonl", "w", encoding="utf-8") as file:
            for sample in drawn:
                line = json.dumps(describe_sample(sample, read_by), ensure_ascii=False)
                file.write(f"{line}\n")
    log.info("the first %d samples are in %s; nothing was trained", len(drawn), folder / "preview")
    return folder


def write_sheet(samples, path):
    """A sheet of samples: each picture with its control, its mask and its caption."""
    pictures, captions = [], []
    for sample in samples:
        names = [name for name in SHOWN if name in sample]
        for name in names:
            levels = sample[name][None].expand(-1, 3, -1, -1)
            pictures += pictures_of(pixels_of(levels))
        about = f"{sample['keys']}\n{sample['captions'] or '(no caption)'}"
        captions += [about, *(name.removesuffix("s") for name in names[1:])]
    columns = 2 * len(names) if len(names) > 1 else None
    contact_sheet(pictures, columns=columns, captions=captions).save(path)


def describe_sample(sample, read_by):
    """What samples.jsonl says of a sample."""
    height, width = sample["images"].shape[-2:]
    about = {name: sample[name] for name in ("indices", "keys", "captions", "bad")}
    about |= {"height": height, "width": width, "t": float(sample["t"])}
    about["loss_weight"] = float(sample.get("weights", 1))
    if "masks" in sample:
        about["mask"] = float(sample["masks"].float().mean() / 255)
    for name, read in read_by.items():
        tokens, limit, text = read(sample["captions"])
        about[f"{name}_tokens"] = tokens
        if tokens > limit:
            about[f"{name}_reads"] = text
            log.warning("%s: %s reads %d of %d tokens", sample["keys"], name, limit, tokens)
    return about
