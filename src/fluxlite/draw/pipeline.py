"""A `Pipeline`: transformer, autoencoder and text encoders, found and checked, loaded when they are
needed; and the settings of it and of what is drawn with it.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from fluxlite import parallel
from fluxlite.cli.devices import float8_conflicts, settle_machine
from fluxlite.cli.options import (
    check_kind,
    nearest_key,
    option,
    refuse_first,
    same_option,
    typed_options,
)
from fluxlite.draw import kinds
from fluxlite.draw.offload import OFFLOAD, fitting_blocks, free_memory, place_steps, stream_blocks
from fluxlite.draw.sharing import Sharing, split_conflicts
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import ATTENTION
from fluxlite.nets.latents import PATCH, drawing_kind
from fluxlite.nets.quantized import QUANTIZED_KINDS
from fluxlite.nets.schedule import SCHNELL_SCHEDULER, SampleConfig, is_schnell
from fluxlite.weights import hub, lora_files, lora_merging, part_files, run_folder, sources, writing
from fluxlite.weights.encoder_files import CLIP, T5, locate_encoder
from fluxlite.weights.hub import TINY
from fluxlite.weights.lora_files import Lora, LoraFile
from fluxlite.weights.sources import COMPUTE_DTYPES
from fluxlite.weights.tensor_files import Tensors
from fluxlite.weights.text_encoders import load_text_encoders, open_encoders

log = logging.getLogger("fluxlite")

PIPELINE_FOLDERS = "transformer", "vae", "text_encoder*", "tokenizer*", "scheduler"
PIPELINE_FILES = [*(f"{folder}/*" for folder in PIPELINE_FOLDERS), "model_index.json"]
BESIDE_FOLDERS = {"t5": "text_encoder_2", "clip": "text_encoder", "autoencoder": "vae"}
NAMED_PARTS = *BESIDE_FOLDERS, "tokenizers"


# --- settings -------------------------------------------------------------------------------------


@dataclass
class PartsConfig:
    """Where the parts of a pipeline come from."""

    checkpoint: str | None = option(
        None,
        "transformer: a pipeline folder, a transformer's, a run or a file; flux-tiny is shipped",
        path=True,
        resume="elsewhere",
    )
    save_converted: str | None = option(
        None,
        "where to keep model.checkpoint in our own layout, which loads without a copy; used again "
        "if it is there",
        path=True,
        resume=True,
    )
    t5: str | None = option(
        None,
        "T5 encoder, if not that beside the transformer: a folder, a pipeline folder, a file or a "
        "hub id",
        path=True,
        resume="elsewhere",
    )
    clip: str | None = option(
        None,
        "CLIP text encoder, likewise: a folder, a pipeline folder, a file or a hub id",
        path=True,
        resume="elsewhere",
    )
    tokenizers: str | None = option(
        None,
        "pipeline folder or hub id whose tokenizer and tokenizer_2 are read, for encoders in files "
        "that have none beside them",
        path=True,
        resume="elsewhere",
    )
    autoencoder: str | None = option(
        None,
        "autoencoder, likewise: ae.safetensors, a vae/ folder, a pipeline folder or a hub id",
        path=True,
        resume="elsewhere",
    )
    ema: bool = option(True, "use the moving average of a run, where it has one")
    attention: str = option("auto", "attention kernel", choices=tuple(ATTENTION), resume=True)
    quantize: str = option(
        "none",
        "lossy: how linears that are not trained lie in memory: int8 or float8, a scale a row, or "
        "nf4, 4 bits and a scale for each 64; dequantised where they are used",
        choices=QUANTIZED_KINDS,
    )


def unset_fields(cls, names, help, **about):
    """Fields like those of `cls` that are None until they are set, for `make_dataclass`.

    `help` has a place for theirs.
    """
    found = []
    for f in fields(cls):
        if f.name in names:
            said = help.format(f.metadata["help"])
            unset = same_option(cls, f.name, default=None, help=said, **about)
            found.append((f.name, f.type | None, unset))
    return found


SHAPE_FIELDS = tuple(f.name for f in fields(FluxConfig))
SAMPLE_FIELDS = tuple(f.name for f in fields(SampleConfig))

# The parts and, with model=flux_schnell and its like, a shape that the checkpoint must have.
EXPECTED_HELP = "expected of the checkpoint: {}"
ExpectedConfig = make_dataclass(
    "ExpectedConfig",
    [
        *unset_fields(FluxConfig, SHAPE_FIELDS, EXPECTED_HELP, rare=True),
        *unset_fields(SampleConfig, ["max_sequence_length"], EXPECTED_HELP, rare=True),
    ],
    bases=(PartsConfig,),
)

# A `SampleConfig` that is the checkpoint's own but for what is set.
OwnSampleConfig = make_dataclass(
    "OwnSampleConfig",
    unset_fields(SampleConfig, SAMPLE_FIELDS, "{}; null: the checkpoint's own, or FLUX's"),
)


@dataclass
class DrawConfig(OwnSampleConfig):
    """Which pictures are drawn, how, and how many at once."""

    negative_prompt: str = option(
        "", "what to stay away from, with true_cfg above 1; or empty", verbatim=True
    )
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
    tile: int = option(
        0,
        "pixels along a side of the tiles that large pictures are decoded in, which overlap and "
        "are blended: less memory, not exact; 0: whole",
        at_least=0,
        at_most=100_000,
    )
    strength: float | None = option(
        None,
        "how much of image= is drawn anew: the part of the steps that are taken; null: 0.6, or 1 "
        "of FLUX.1-Fill and with reference=",
        at_least=0.001,
        at_most=1,
    )
    paste: bool = option(
        False, "put what is drawn under mask= back into image=, whose other pixels stay as they are"
    )
    crop: int = option(
        -1,
        "draw, and paste, only the part of image= around the mask and so many pixels; -1: all",
        at_least=-1,
        at_most=100_000,
    )
    canny: bool = option(
        False, "have a FLUX.1-Canny follow the edges of control_image=, which is a photograph then"
    )
    place: int = option(
        -1,
        "draw each picture as number so and so of `batch` copies, whose bits are those that it had "
        "there among others; a picture's metadata say it; -1: together with others",
        at_least=-1,
        at_most=10_000,
    )


@dataclass
class LoraConfig:
    """The LoRAs that pictures are drawn with."""

    file: list[str] = option(
        [],
        "a LoRA of any dialect: a file, a folder, a LoRA's hub id owner/name/file; several add up: "
        "give it once for each",
        path=True,
        short="lora",
    )
    scale: list[float] = same_option(
        Lora,
        "scale",
        default=[],
        help="strength over the file's own (alpha / rank), by default 1; once for each LoRA, or "
        "once for all",
        verbatim=True,
    )
    merge: bool = option(
        True,
        "merge LoRAs into the weights; false: compute them beside the weights, of which nothing is "
        "copied",
    )
    split_qkv: str = same_option(Lora, "split_qkv")

    def loras(self):
        """A `Lora` for each file; raises `ValueError` where there are not as many scales."""
        count = len(self.file)
        if self.scale and (not count or len(self.scale) not in (1, count)):
            raise ValueError(
                f"lora.scale= is given {len(self.scale)} times, and lora= {count} times: give "
                "lora= once for each LoRA, and lora.scale= once for each or once for all"
            )
        scales = [*self.scale, *self.scale[:1] * count] if self.scale else [1.0] * count
        found = [
            one if isinstance(one, Lora) else Lora(one, scale, self.split_qkv)
            for one, scale in zip(self.file, scales)
        ]
        for lora in found:
            lora.validate()
        return found


@dataclass
class PipelineConfig:
    """A pipeline's parts, where they compute and how long they stay in memory."""

    model: ExpectedConfig = option(ExpectedConfig, "the pipeline")
    lora: LoraConfig = option(LoraConfig, "the LoRAs")
    device: str | None = option(None, "cpu or cuda; null: what the machine has", resume=True)
    dtype: str | None = option(
        None,
        "what to compute in; null: bfloat16 where it is in hardware, else float32",
        choices=COMPUTE_DTYPES,
    )
    compile: bool | str = option(
        "auto",
        "compile the blocks (torch.compile): a minute or more at the start, faster steps; auto: on "
        "a GPU",
        choices=("auto", True, False),
        resume=True,
    )
    float8: bool = option(
        False,
        "lossy: the blocks' linears multiply in float8, their weights rounded once: half the "
        "memory, faster with compile; GPUs only, needs torchao",
    )
    offload: str = option(
        "text",
        "text: encoders and modulation are freed after use; all: blocks are streamed to a GPU too; "
        "none: all stays",
        choices=OFFLOAD,
    )
    resident_blocks: int = option(
        -1,
        "with offload=all: blocks that stay on the GPU; -1: as many as its free memory takes",
        at_least=-1,
        at_most=10_000,
        resume=True,
        only_with={"offload": ("all",)},
    )


PARTS_FIELDS = tuple(f.name for f in fields(PartsConfig))
DRAW_FIELDS = tuple(f.name for f in fields(DrawConfig))
LORA_OPTIONS = "lora", "lora_merge"
KEPT_OPTIONS = "device", "dtype", "compile", "float8", "offload", "resident_blocks"
LOAD_OPTIONS = *PARTS_FIELDS, *LORA_OPTIONS, *KEPT_OPTIONS, "expected"


def check_tile(tile, cell):
    """Raise `ValueError` for tiles too small to overlap, or of no whole cells of so many pixels."""
    least = 4 * cell
    if tile and (tile % cell or tile < least):
        raise ValueError(f"tile={tile} must be 0, or a multiple of {cell} from {least} on")


def check_names(given, known, function):
    """Raise `ValueError` with the nearest name for an option that a function has not."""
    for name in given:
        if name not in known:
            near = nearest_key(name, known)
            raise ValueError(f"{name}= is no argument of {function}{near}")


def check_negative(negative_prompt, true_cfg):
    """Raise `ValueError` where a negative prompt would have no effect."""
    if negative_prompt and not true_cfg > 1:
        raise ValueError(f"negative_prompt= needs true_cfg above 1, not {true_cfg}")


def expected_shape(model):
    """{field of FluxConfig: value} for what an `ExpectedConfig` says of the checkpoint's shape."""
    named = {name: getattr(model, name) for name in SHAPE_FIELDS}
    return {name: value for name, value in named.items() if value is not None}


# --- parts ----------------------------------------------------------------------------------------


@dataclass
class Pipeline:
    """The parts of a FLUX pipeline, found and checked; each is loaded when it is first used.

    `sources` has a `Source` of the transformer and the autoencoder, a path of "t5" and "clip";
    `own_settings` are {field of SampleConfig: value} that suit the checkpoint without LoRAs.
    """

    config: PipelineConfig
    sources: dict
    own_settings: dict
    device: torch.device
    dtype: torch.dtype
    loras: list = field(default_factory=list)  # `OpenLora`s: `use_loras`
    known_texts: dict = field(default_factory=dict)  # `remember_texts`
    sharing: Sharing = field(default_factory=Sharing)

    @cached_property
    def encoders(self):
        """The `TextEncoders`, with what LoRAs change of them."""
        paths, tokenizers = (self.sources["t5"], self.sources["clip"]), self.sources["tokenizers"]
        where = dict(device=self.device, dtype=self.dtype, tokenizers=tokenizers)
        encoders = load_text_encoders(*paths, **where, fitting=self.model_config)
        return lora_merging.merge_encoders(encoders, self.loras)

    @cached_property
    def text_files(self):
        """The `OpenEncoder`s of "t5" and "clip"."""
        names = "t5", "clip", "tokenizers"
        places = [self.sources[name] for name in names]
        opened = open_encoders(*places, fitting=self.sources["transformer"].config)
        return {part: encoder for part, (encoder, _) in zip(names, opened)}

    @cached_property
    def transformer(self):
        """The `Flux` with its LoRAs, as this rank holds it."""
        load = sources.load_transformer
        if self.loras:
            own = dict(loras=self.loras, merge=self.config.lora.merge)
            load = partial(lora_merging.load_merged, **own)
        net, ranks = self.load_net(load, self.sources["transformer"]), self.sharing.part("cp")
        if ranks is not None:
            parallel.share_velocity(net, ranks)
        return net

    @cached_property
    def autoencoder(self):
        """The `Autoencoder`."""
        source = self.sources["autoencoder"]
        return sources.load_autoencoder(source, dtype=self.dtype, device=self.device)

    @property
    def model_config(self):
        """That of the transformer with its LoRAs, which may widen its input."""
        return lora_merging.widened_config(self.sources["transformer"].config, self.loras)

    @property
    def keeps_parts(self):
        """Whether parts stay in memory when their turn is over."""
        return self.config.offload == "none"

    @property
    def cell(self):
        """Pixels of a latent cell along a side."""
        return self.sources["autoencoder"].config.downsampling

    @property
    def kind(self):
        """What the transformer sees beside noise: a key in `kinds.KINDS`; raises `ValueError`."""
        return drawing_kind(self.model_config, self.cell, self.where)

    @property
    def settings(self):
        """{field of SampleConfig: value} that suit the checkpoint with its LoRAs."""
        return kinds.KINDS[self.kind].settings | self.own_settings

    @property
    def where(self):
        """How errors name what is drawn with."""
        return f"model.checkpoint={self.config.model.checkpoint}"

    def release(self, part):
        """Drop a part, to be loaded again where it is used again, unless all are kept."""
        if not self.keeps_parts:
            vars(self).pop(part, None)

    def drop_parts(self):
        """Free all parts and texts; they are loaded again where they are used again."""
        self.known_texts = {}
        for part in ("encoders", "transformer", "autoencoder"):
            vars(self).pop(part, None)

    def remember_texts(self, texts):
        """Encode (prompt, T5 tokens) pairs for drawings to come, and forget others."""
        self.known_texts = {text: self.encode_text(*text) for text in texts}
        self.release("encoders")

    @torch.inference_mode()
    def encode_text(self, prompt, length):
        """(txt (1, L, D), pooled (1, W)) of a prompt, alone: the same bits in any company. Of
        several ranks the first encodes.
        """
        known = self.known_texts.get((prompt, length))
        if known is not None:
            return known
        return self.sharing.first_makes(lambda: self.encoders.encode([prompt], length), self.device)

    def use_loras(self, *loras):
        """Draw with these LoRAs from now on, and no others: paths or `Lora`s; with none, with the
        checkpoint as it is. Parts that they change are loaded again from the disk. Raises
        `ValueError`.
        """
        given = [lora if isinstance(lora, Lora) else Lora(lora) for lora in loras]
        opened = lora_merging.open_loras(given, self.sources["transformer"])
        self.check_widened(opened)
        self.check_texts(opened)
        changed = set().union(*(lora.file.adapters for lora in [*opened, *self.loras]))
        self.loras = opened
        if "transformer" in changed:
            vars(self).pop("transformer", None)
        if changed & {"clip", "t5"}:
            vars(self).pop("encoders", None)

    def check_texts(self, opened):
        """Raise `ValueError` where LoRAs change other text encoders than these; none is loaded."""
        for part in ("t5", "clip"):
            if any(one.adapters(part) for one in opened):
                lora_merging.check_text_files(opened, part, self.text_files[part].tensors)

    def check_encoders(self):
        """Raise `ValueError` where text encoders on this disk are not whole; none is loaded."""
        if all(Path(self.sources[part]).exists() for part in ("t5", "clip")):
            _ = self.text_files

    def check_widened(self, opened):
        """Raise `ValueError` where LoRAs make a transformer that cannot be drawn with."""
        base = self.sources["transformer"].config
        shape, names = lora_merging.widened_config(base, opened), (one.file.where for one in opened)
        drawing_kind(shape, self.cell, f"{self.where} with lora={', '.join(map(str, names))}")
        if shape.in_channels != base.in_channels and not self.config.lora.merge:
            raise ValueError(
                "lora.merge=false cannot widen the model's input, as a control LoRA does: leave it "
                "out"
            )
        if not self.config.lora.merge:
            lora_merging.check_apart(opened, base)

    def load_net(self, load, source):
        """A net on its device, or where parts are freed on the CPU, mapped: `place_net` then moves
        it without what it does not need any more.
        """
        kind = self.config.model.quantize
        small = kind != "none" and self.config.offload != "all"  # it is quantised where it lies
        place = self.device if self.keeps_parts or small else "cpu"
        own, ranks = dict(dtype=self.dtype, device=place, quantize=kind), self.sharing.part("tp")
        if ranks is not None:
            own["fill"] = partial(parallel.split_weights, ranks)
        net = load(source, attention=self.config.model.attention, **own)
        if self.config.float8 and self.keeps_parts:
            parallel.quantize_linears(net, self.device)
        return parallel.compile_blocks(net) if self.config.compile else net

    def place_net(self, net, beside=None):
        """Move what the steps use of a net to its device; with offload=all its blocks are streamed
        to an accelerator, all but those that fit there. `beside` are the bytes that a drawing takes
        beside the weights; without them none are taken to fit.
        """
        if self.keeps_parts:
            return
        if self.config.float8:
            parallel.quantize_linears(net, self.device)
        if self.config.offload == "text" or self.device.type == "cpu":
            place_steps(net, self.device)
            return
        resident = self.config.resident_blocks
        if resident < 0:
            free = 0 if beside is None else free_memory(self.device) - beside
            resident = fitting_blocks(net, free)
        stream_blocks(net, self.device, resident)

    def latent_shape(self, height, width):
        """Channels and cells (C, h, w) of the latents of a picture."""
        config = self.sources["autoencoder"].config
        return config.latent_channels, height // config.downsampling, width // config.downsampling


def load_pipeline(checkpoint: str | Path = TINY, **options) -> Pipeline:
    """A `Pipeline` with all its parts in memory, to draw with again and again.

    `options` are the fields of `PartsConfig` (t5, clip, autoencoder, …), device, dtype and compile;
    `lora` a path or `Lora`, or several, merged unless `lora_merge` is false; `expected` is {field
    of FluxConfig: value} that the transformer must have. With `offload` text or all, each part is
    loaded when it is used, and freed. Raises `ValueError` that names the key.
    """
    check_names(options, LOAD_OPTIONS, "load_pipeline")
    pipeline = open_pipeline(pipeline_config(checkpoint, **{"offload": "none"} | options))
    if pipeline.keeps_parts:
        _ = pipeline.transformer, pipeline.autoencoder, pipeline.encoders
    return pipeline


def pipeline_config(checkpoint=TINY, *, expected=(), device=None, dtype=None, **options):
    """The `PipelineConfig` of keyword arguments; raises `ValueError`."""
    given, merge = options.pop("lora", ()), options.pop("lora_merge", True)
    check_kind(merge, bool, "lora_merge", "true or false")
    kinds = (str, Path, Lora, LoraFile)
    given = one_or_several(given, kinds, "lora", "a path, a Lora or a list of them")
    loras = [lora if isinstance(lora, Lora) else Lora(lora) for lora in given]
    options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    parts = {f.name: options.pop(f.name) for f in fields(PartsConfig) if f.name in options}
    model = {"checkpoint": str(checkpoint)} | parts | dict(expected)
    config = typed_options(PipelineConfig, options | {"model": model})
    return replace(config, device=device, dtype=dtype, lora=LoraConfig(loras, merge=merge))


def open_pipeline(config: PipelineConfig, sharing: Sharing | None = None) -> Pipeline:
    """The `Pipeline` of a pipeline folder, a transformer or a run; nothing of it is loaded yet.

    Parts that are not named are looked for beside it. They are checked to fit together, as far as
    that can be seen. Of `sharing`, all its ranks draw with it. Raises `ValueError` that names the
    missing key.
    """
    sharing = sharing or Sharing()
    config, own = settle_base(settle_machine(config))
    device, dtype = torch.device(config.device), sources.named_dtype(config.dtype)
    found = find_sources(config.model)
    check_float8(config, dtype, found["transformer"])
    refuse_first(split_conflicts(sharing, config, found["transformer"].config))
    parallel.warn_of_rounding(config.model.quantize)
    settings = default_settings(found["transformer"]) | own
    if config.model.max_sequence_length:
        settings = settings | {"max_sequence_length": config.model.max_sequence_length}
    pipeline = Pipeline(config, found, settings, device, dtype, sharing=sharing)
    pipeline.use_loras(*config.lora.loras())
    return pipeline


def settle_base(config):
    """A `PipelineConfig` whose checkpoint, where it is the run of a LoRA, is that run's base with
    the LoRA, and the run's {field of SampleConfig: value}; raises `ValueError`.
    """
    model, path = config.model, Path(config.model.checkpoint).expanduser()
    if not lora_files.run_lora(path):
        return config, {}
    folder = run_folder.last_checkpoint(path)
    meta = run_folder.read_meta(folder)
    saved = run_folder.saved_parts(folder, meta)
    averaged = f"model.ema=false: of model.checkpoint={path} the LoRA is there averaged alone"
    random = f"model.checkpoint={path} is the LoRA of a random base"
    refuse_first([(not saved.checkpoint, random), (meta.ema and not model.ema, averaged)])
    parts = {name: getattr(model, name) or where for name, where in vars(saved).items()}
    model = replace(model, **parts | {"checkpoint": saved.checkpoint})
    lora = replace(config.lora, file=[Lora(path), *config.lora.loras()], scale=[])
    return replace(config, model=model, lora=lora), run_folder.run_settings(folder, meta)


def check_float8(config, dtype, transformer):
    """Raise `ValueError` where a `Source` cannot draw in float8 as a settled `PipelineConfig`
    asks.
    """
    if not config.float8:
        return
    streamed = "float8=true does not work with offload=all, which streams weights as they are"
    apart = "float8=true rounds weights that LoRAs are merged into: leave lora.merge=false out"
    twice = "float8=true rounds weights that model.quantize= rounds: leave one of them out"
    name, hidden = str(dtype).removeprefix("torch."), transformer.config.hidden_size
    conflicts = float8_conflicts("float8=true", config.device, name, hidden)
    own = [
        (config.offload == "all", f"{streamed}: leave one of them out"),
        (not config.lora.merge, apart),  # of LoRAs given later too, by `use_loras`
        (config.model.quantize != "none", twice),
    ]
    refuse_first([*own, *conflicts])


def find_sources(model):
    """The `Pipeline.sources` that an `ExpectedConfig` names; raises `ValueError`."""
    checkpoint = str(hub.local_path(model.checkpoint, PIPELINE_FILES))
    expected = expected_shape(model)
    options = dict(ema=model.ema, given=expected)
    transformer = sources.open_part(checkpoint, "transformer", **options)
    check_expected(transformer.config, expected, checkpoint)
    named = {part: getattr(model, part) for part in NAMED_PARTS}
    found = {"tokenizers": None} | find_parts(checkpoint)
    parts = found | {part: where for part, where in named.items() if where}
    missing = [f"model.{part}=" for part in BESIDE_FOLDERS if part not in parts]
    if missing:
        raise ValueError(
            f"{checkpoint} has no {', '.join(missing)} beside it: name a folder or a hub id for "
            "each"
        )
    vae = sources.open_part(parts["autoencoder"], "autoencoder")
    check_latents(transformer.config, vae)
    for where, kind in ((parts["t5"], T5), (parts["clip"], CLIP)):
        if Path(where).is_file():
            locate_encoder(where, kind, parts["tokenizers"])
    drawing_kind(transformer.config, vae.config.downsampling, f"model.checkpoint={checkpoint}")
    if model.save_converted:
        transformer = writing.open_converted(checkpoint, model.save_converted, **options)
    return parts | {"transformer": transformer, "autoencoder": vae}


def find_parts(checkpoint):
    """Where the other parts of a transformer's pipeline lie: {part: path} for those that are
    found.
    """
    path = Path(checkpoint)
    if sources.is_run(path):
        folder = run_folder.last_checkpoint(path)
        saved = run_folder.saved_parts(folder, run_folder.read_meta(folder))
        return {part: where for part in NAMED_PARTS if (where := getattr(saved, part))}
    root = path if (path / "transformer").is_dir() else path.parent
    places = {part: root / name for part, name in BESIDE_FOLDERS.items()}
    found = {part: str(place) for part, place in places.items() if place.is_dir()}
    inside = part_files.list_parts(Tensors(path).keys()) if path.is_file() else ()
    found |= {part: checkpoint for part, name in BESIDE_FOLDERS.items() if name in inside}
    if "autoencoder" not in found and (root / "ae.safetensors").is_file():
        found["autoencoder"] = str(root / "ae.safetensors")
    return found


def check_expected(config, expected, checkpoint):
    """Raise `ValueError` where a transformer has not the shape that the command line names."""
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"model.{name}={value}, but {checkpoint} has {getattr(config, name)}")


def check_latents(config, autoencoder):
    """Raise `ValueError` where an autoencoder, loaded or a `Source`, has other latents than a
    transformer of such a configuration.
    """
    channels = PATCH**2 * autoencoder.config.latent_channels
    if channels != config.out_channels:
        raise ValueError(
            f"model.autoencoder gives {channels} channels, but the transformer has "
            f"model.out_channels={config.out_channels}"
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


def one_or_several(value, kind, key, meaning):
    """A list of what an argument gives one or several of; raises `ValueError`, naming `key`."""
    single = isinstance(value, (kind, str, bytes, dict, set)) or not isinstance(value, Iterable)
    found = [value] if single else [*value]
    for one in found:
        check_kind(one, kind, key, meaning)
    return found
