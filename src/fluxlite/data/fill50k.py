"""The fill50k set of the ControlNet paper (arXiv 2302.05543), generated: circles of one named
colour on another.

Each sample is a target `.jpg`, a control `.png` (the circle's white outline on black) and a caption
`.txt`, in WebDataset tars. A sample depends on (seed, index, size) alone. Ordered colour pairs that
`is_held_out` are never written.

    python -m fluxlite.data.fill50k --dst fill50k_tarfiles --count 50000 --size 512
    python -m fluxlite.data.fill50k --dst fill50k_tarfiles --source training/fill50k  # the original
"""

import io
import itertools
import json
import os
import zlib
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from fluxlite.cli.atomic import atomic_folder
from fluxlite.cli.command_line import flags_help, parse_flags
from fluxlite.cli.descriptions import check_regular, inside_folder, parse_json, read_text
from fluxlite.cli.options import option, typed_description
from fluxlite.cli.programs import run_program
from fluxlite.data.images import BadSample, decode_picture
from fluxlite.data.loading import load_batches

NOTE = "fill50k.json"

# The CSS colour names as captions spell them; synonyms (aqua, fuchsia, grey spellings) once only.
COLOURS = dict(
    line.rsplit(" ", 1)
    for line in """
alice blue f0f8ff|antique white faebd7|aquamarine 7fffd4|azure f0ffff|beige f5f5dc|bisque ffe4c4
black 000000|blanched almond ffebcd|blue 0000ff|blue violet 8a2be2|brown a52a2a|burly wood deb887
cadet blue 5f9ea0|chartreuse 7fff00|chocolate d2691e|coral ff7f50|cornflower blue 6495ed
cornsilk fff8dc|crimson dc143c|cyan 00ffff|dark blue 00008b|dark cyan 008b8b
dark golden rod b8860b|dark gray a9a9a9|dark green 006400|dark khaki bdb76b|dark magenta 8b008b
dark olive green 556b2f|dark orange ff8c00|dark orchid 9932cc|dark red 8b0000|dark salmon e9967a
dark sea green 8fbc8f|dark slate blue 483d8b|dark slate gray 2f4f4f|dark turquoise 00ced1
dark violet 9400d3|deep pink ff1493|deep sky blue 00bfff|dim gray 696969|dodger blue 1e90ff
fire brick b22222|floral white fffaf0|forest green 228b22|gainsboro dcdcdc|ghost white f8f8ff
gold ffd700|golden rod daa520|gray 808080|green 008000|green yellow adff2f|honeydew f0fff0
hot pink ff69b4|indian red cd5c5c|indigo 4b0082|ivory fffff0|khaki f0e68c|lavender e6e6fa
lavender blush fff0f5|lawn green 7cfc00|lemon chiffon fffacd|light blue add8e6|light coral f08080
light cyan e0ffff|light golden rod yellow fafad2|light gray d3d3d3|light green 90ee90
light pink ffb6c1|light salmon ffa07a|light sea green 20b2aa|light sky blue 87cefa
light slate gray 778899|light steel blue b0c4de|light yellow ffffe0|lime 00ff00|lime green 32cd32
linen faf0e6|magenta ff00ff|maroon 800000|medium aquamarine 66cdaa|medium blue 0000cd
medium orchid ba55d3|medium purple 9370db|medium sea green 3cb371|medium slate blue 7b68ee
medium spring green 00fa9a|medium turquoise 48d1cc|medium violet red c71585|midnight blue 191970
mint cream f5fffa|misty rose ffe4e1|moccasin ffe4b5|navajo white ffdead|navy 000080
old lace fdf5e6|olive 808000|olive drab 6b8e23|orange ffa500|orange red ff4500|orchid da70d6
pale golden rod eee8aa|pale green 98fb98|pale turquoise afeeee|pale violet red db7093
papaya whip ffefd5|peach puff ffdab9|peru cd853f|pink ffc0cb|plum dda0dd|powder blue b0e0e6
purple 800080|rebecca purple 663399|red ff0000|rosy brown bc8f8f|royal blue 4169e1
saddle brown 8b4513|salmon fa8072|sandy brown f4a460|sea green 2e8b57|sea shell fff5ee
sienna a0522d|silver c0c0c0|sky blue 87ceeb|slate blue 6a5acd|slate gray 708090|snow fffafa
spring green 00ff7f|steel blue 4682b4|tan d2b48c|teal 008080|thistle d8bfd8|tomato ff6347
turquoise 40e0d0|violet ee82ee|wheat f5deb3|white ffffff|white smoke f5f5f5|yellow ffff00
yellow green 9acd32
""".replace("\n", "|").split("|")
    if line
)
SYNONYMS = {"aqua": "cyan", "fuchsia": "magenta"}  # and "grey" for "gray"
RADIUS = (0.12, 0.28)  # of the picture's side
HELD_OUT_FRACTION = 0.05


def rgb(name):
    """The colour `name` as an array of three numbers in [0, 255]."""
    return np.array([int(COLOURS[name][i : i + 2], 16) for i in (0, 2, 4)], np.float64)


def circle_caption(circle, background):
    """The caption of the original set: `pale golden rod circle with old lace background`."""
    return f"{circle} circle with {background} background"


def is_held_out(circle, background):
    """Whether this pair of colours, in either order, is kept out of every training in this project
    (about 5 % are).
    """
    return zlib.crc32("|".join(sorted((circle, background))).encode()) < HELD_OUT_FRACTION * 2**32


def colour_pairs(held_out):
    """All ordered pairs of different colour names that are, or are not, held out."""
    every = itertools.permutations(COLOURS, 2)
    return [pair for pair in every if is_held_out(*pair) == held_out]


def distance_from(centre, size):
    """Distances of the pixels' middles from `centre` (x, y), in pixels: (size, size, 1)."""
    x, y = ((np.arange(size) + 0.5 - c) ** 2 for c in centre)
    return np.sqrt(x[None, :] + y[:, None])[..., None]


def disc_coverage(distance, radius):
    """Coverage in [0, 1] of a disc, antialiased over one pixel."""
    return np.clip(radius + 0.5 - distance, 0, 1)


def draw_sample(index, *, size, seed, held_out=False, choices=None):
    """Sample `index`: target and control as (size, size, 3) uint8 arrays, and its caption."""
    rng = np.random.default_rng((seed, index))
    choices = choices or colour_pairs(held_out)
    circle, background = choices[rng.integers(len(choices))]
    radius = rng.uniform(*RADIUS) * size
    distance = distance_from(rng.uniform(radius, size - radius, 2), size)
    inside = disc_coverage(distance, radius)
    target = rgb(background) + inside * (rgb(circle) - rgb(background))
    half = max(1.0, size / 256) / 2
    outline = np.repeat(
        255 * (disc_coverage(distance, radius + half) - disc_coverage(distance, radius - half)),
        3,
        axis=2,
    )
    return (
        np.rint(target).astype(np.uint8),
        np.rint(outline).astype(np.uint8),
        circle_caption(circle, background),
    )


def encode_picture(array, kind):
    """An array (H, W, 3) of uint8 as the bytes of a jpeg or png."""
    stream = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {}
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


class _Drawn:
    """Generated samples as WebDataset dictionaries, by index."""

    def __init__(self, count, *, size, seed, held_out):
        self.count, self.options = count, dict(size=size, seed=seed, choices=colour_pairs(held_out))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        target, control, text = draw_sample(index, **self.options)
        return {
            "__key__": f"{index:06d}",
            "jpg": encode_picture(target, "jpeg"),
            "png": encode_picture(control, "png"),
            "txt": text.encode(),
        }


def generated_samples(count, *, size, seed, held_out=False, workers=0):
    """`count` samples as WebDataset dictionaries, drawn by `workers` processes beside this one, or
    by this one.
    """
    drawn = _Drawn(count, size=size, seed=seed, held_out=held_out)
    yield from load_batches(drawn, workers=workers, batch_size=None, collate_fn=_unchanged)


def _unchanged(sample):
    return sample


@dataclass
class PromptDescription:
    """A line of the original download's `prompt.json`."""

    source: str
    target: str
    prompt: str


@dataclass
class GeneratedDescription:
    """What `fill50k.json` says of the tars beside it; nothing of those made from the original
    download.
    """

    count: int | None = option(None, "pictures", at_least=1)
    size: int | None = option(None, "their side in pixels", at_least=1)


def imported_samples(source):
    """The original download (`prompt.json`, `source/`, `target/`) as WebDataset dictionaries,
    held-out pairs left out.

    Raises `ValueError`, with the line, for what is missing, damaged or outside of `source`.
    """
    source = Path(os.path.expanduser(source))
    prompts = source / "prompt.json"
    if not prompts.is_file():
        raise ValueError(
            f"{source} has no prompt.json: name the folder that holds prompt.json, source/ and "
            "target/"
        )
    for index, line in enumerate(read_text(prompts).splitlines()):
        where = f"{prompts} line {index + 1}"
        row = typed_description(where, PromptDescription, parse_json(line, where))
        names = row.prompt.removesuffix(" background").split(" circle with ")
        if len(names) == 2 and is_held_out(
            *(SYNONYMS.get(name, name).replace("grey", "gray") for name in names)
        ):
            continue
        target, control = (inside_folder(source, name, where) for name in (row.target, row.source))
        check_regular(control)
        yield {
            "__key__": f"{index:06d}",
            "jpg": encode_picture(np.asarray(_decoded(target)), "jpeg"),
            "png": control.read_bytes(),
            "txt": row.prompt.encode(),
        }


def _decoded(path):
    check_regular(path)
    try:
        return decode_picture(path.read_bytes())
    except BadSample as error:
        raise ValueError(f"{path}: {error}") from None


def write_shards(samples, dst, *, count=None, per_shard=1000, about=None):
    """Write WebDataset dictionaries as `dst/000000.tar` …, and `about` as `dst/fill50k.json`;
    returns `dst`.

    The folder is written aside and renamed, so a killed run leaves nothing that looks whole, and of
    several processes that meet here one writes and the others wait for its result: the bytes are
    the same.
    """
    dst = Path(dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(dst) as folder:
        if folder is not None:
            progress = tqdm(samples, total=count, desc=f"writing {dst}", unit="picture")
            _write_tars(progress, folder, per_shard)
            (folder / NOTE).write_text(json.dumps(about or {}) + "\n")
    return dst


def _write_tars(samples, folder, per_shard):
    """Tars of `per_shard` samples; raises `ValueError` where there is none."""
    writer, written = None, 0
    try:
        for sample in samples:
            if written % per_shard == 0:
                if writer:
                    writer.close()
                writer = TarWriter(
                    str(folder / f"{written // per_shard:06d}.tar"), mtime=0, user="", group=""
                )
            writer.write(sample)
            written += 1
    finally:
        if writer:
            writer.close()
    if not written:
        raise ValueError(f"no samples to write to {folder.parent}")


@dataclass
class GeneratorConfig:
    """What the command line of this module takes."""

    dst: str = option(MISSING, "folder to write; must not exist", path=True)
    count: int = option(50_000, "pictures to draw", at_least=1, at_most=10**9)
    size: int = option(512, "side of the pictures in pixels", at_least=8, at_most=16_384)
    seed: int = option(0, "of every picture", at_least=0, at_most=2**64 - 1)
    held_out: bool = option(False, "draw the pairs of colours that training never sees")
    per_shard: int = option(1000, "pictures per tar", at_least=1, at_most=1_000_000)
    workers: int = option(os.cpu_count() or 1, "processes that draw", at_least=0, at_most=1024)
    source: str | None = option(
        None, "import this folder (prompt.json, source/, target/) and draw nothing", path=True
    )

    def validate(self):
        """Raise `ValueError` for flags that contradict each other, or a folder that exists."""
        drawing = ("count", "size", "seed", "held_out", "workers")
        default = GeneratorConfig(self.dst)
        given = [name for name in drawing if getattr(self, name) != getattr(default, name)]
        if self.source and given:
            flag = given[0].replace("_", "-")
            raise ValueError(f"--source imports pictures and draws none: leave out --{flag}")
        if os.path.lexists(self.dst):
            raise ValueError(f"--dst {self.dst} exists: remove it or name another folder")
        if -(-self.count // self.per_shard) > 1_000_000:
            raise ValueError(
                f"--per-shard {self.per_shard} makes more than a million tars: choose a larger one"
            )


def generate_tars(arguments):
    """The program: write the tars that the command line names."""
    config = parse_flags(GeneratorConfig, arguments)
    config.validate()
    if config.source:
        samples, count = imported_samples(config.source), None
    else:
        names = ("size", "seed", "held_out", "workers")
        samples = generated_samples(config.count, **{n: getattr(config, n) for n in names})
        count = config.count
    about = None if config.source else {"count": config.count, "size": config.size}
    write_shards(samples, config.dst, count=count, per_shard=config.per_shard, about=about)


if __name__ == "__main__":
    run_program(generate_tars, usage=partial(flags_help, GeneratorConfig, __doc__), ranks=False)
