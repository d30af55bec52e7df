"""The settings of `train.py` and `infer.py`, composed of the dataclasses beside the code that uses
them.
"""

import dataclasses
import importlib.util
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fluxlite.cli.command_line import load_config
from fluxlite.cli.devices import settle_machine
from fluxlite.cli.options import (
    change_options,
    check_options,
    flat_values,
    naming_place,
    option,
    option_fields,
    refuse_first,
    same_option,
    set_options,
)
from fluxlite.cli.profiling import parse_steps
from fluxlite.data.config import DataConfig
from fluxlite.draw.control import Control
from fluxlite.draw.pipeline import (
    BESIDE_FOLDERS,
    DrawConfig,
    LoraConfig,
    PartsConfig,
    PipelineConfig,
    check_negative,
    find_parts,
)
from fluxlite.draw.preview import PREVIEWS
from fluxlite.draw.redux import Redux
from fluxlite.draw.solvers import SOLVERS
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flow import FlowConfig
from fluxlite.nets.latents import PATCH, check_size, kind_channels, num_image_tokens
from fluxlite.nets.quantized import quantize_conflicts
from fluxlite.nets.schedule import SampleConfig, check_times
from fluxlite.parallel import ParallelConfig, SharingConfig, world_size
from fluxlite.train.building import check_kind_of
from fluxlite.train.metrics import MetricsConfig
from fluxlite.train.optim import OptimConfig
from fluxlite.train.small_adamw import columns_of_block
from fluxlite.train.tasks import choose_task
from fluxlite.train.tasks.conditions import CONDITIONS
from fluxlite.train.tasks.controlnet import ControlNetTrainConfig
from fluxlite.train.tasks.lora import LoraTrainConfig
from fluxlite.weights import hub
from fluxlite.weights.run_folder import CheckpointConfig

MAX_STEPS = 10**9  # of training


@dataclass
class ModelConfig(PartsConfig, FluxConfig):
    """A transformer's shape and the parts around it."""

    max_sequence_length: int = option(
        512, "T5 tokens that prompts are padded and cut to", at_least=1, at_most=10_000
    )
    downsampling: int = option(
        8, "pixels along a side of a latent cell, as model.autoencoder has", at_least=1, at_most=256
    )
    kind: str = option(
        "plain",
        "what it sees beside noise and text: control, the picture of data.control= as more "
        "channels; fill, the target with a hole, and the hole; kontext, the picture of "
        "data.control= as more tokens",
        choices=("plain", *CONDITIONS),
    )

    def shape(self):
        """The `FluxConfig` alone, with the channels that its kind sees."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(FluxConfig)}
        if self.kind in ("control", "fill"):
            channels = kind_channels(self.out_channels, self.downsampling)
            values["in_channels"] = channels[self.kind]
        return FluxConfig(**values)


@dataclass
class MachineConfig:
    """What a program runs on; `settled`, it is what the machine has."""

    device: str | None = same_option(PipelineConfig, "device")
    dtype: str | None = same_option(PipelineConfig, "dtype")
    compile: bool | str = same_option(PipelineConfig, "compile")

    settled = settle_machine


@dataclass
class SampleGridConfig:
    """Pictures drawn while training."""

    every: int = option(
        1000,
        "steps between grids of pictures; 0 for the last step only",
        at_least=0,
        at_most=MAX_STEPS,
    )
    count: int = option(
        16,
        "pictures in a grid; the prompts are the validation set's first",
        at_least=1,
        at_most=10_000,
    )
    steps: int = same_option(SampleConfig, "steps", default=20)
    guidance: float = same_option(SampleConfig, "guidance")
    true_cfg: float = same_option(
        SampleConfig,
        "true_cfg",
        help="classifier-free guidance away from the empty caption; 1 for none",
    )


@dataclass
class TrainConfig(MachineConfig):
    """Everything that `train.py` takes."""

    model: ModelConfig = option(ModelConfig, "the transformer")
    data: DataConfig = option(DataConfig, "the samples")
    flow: FlowConfig = option(FlowConfig, "the flow")
    optim: OptimConfig = option(OptimConfig, "the optimizer")
    parallel: ParallelConfig = option(ParallelConfig, "the mesh", resume=True)
    controlnet: ControlNetTrainConfig = option(ControlNetTrainConfig, "the ControlNet")
    lora: LoraTrainConfig = option(LoraTrainConfig, "the LoRA")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "what is saved", resume=True)
    metrics: MetricsConfig = option(MetricsConfig, "what is logged", resume=True)
    sample: SampleGridConfig = option(SampleGridConfig, "what is drawn", resume=True)
    steps: int = option(30_000, "optimizer steps", at_least=1, at_most=MAX_STEPS, resume=True)
    validate_every: int = option(
        500,
        "steps between validations; 0 for the last step only",
        at_least=0,
        at_most=MAX_STEPS,
        resume=True,
    )
    validation: str = option(
        "all",
        "all: each sample at 8 values of t; round_robin: at one, as MLPerf",
        choices=("all", "round_robin"),
        resume=True,
    )
    seed: int = same_option(DrawConfig, "seed", help="seed of every random draw")
    preview: bool = option(
        False,
        "write the first batches as they would be trained on into output/preview, and stop",
        resume=True,
    )
    profile: str | None = option(
        None,
        "steps to record with torch's profiler into output, as 10-12: a Chrome trace, on a GPU a "
        "snapshot of its memory too",
        verbatim=True,
        resume=True,
    )
    output: str = option(
        "runs/train",
        "folder of the run: config, metrics, pictures, checkpoints",
        path=True,
        resume=True,
    )
    resume: str | None = option(
        None,
        "auto: go on from the last checkpoint in output, if there is one",
        choices=("auto",),
        resume=True,
    )

    def latent_shape(self, height=None, width=None):
        """(C, h, w) of the latents of a picture, of data.height x data.width if left out."""
        channels, cell = self.model.out_channels // PATCH**2, self.model.downsampling
        height, width = height or self.data.height, width or self.data.width
        return channels, height // cell, width // cell

    def image_tokens(self, *size):
        """Tokens of a picture of such a (height, width), with those of Kontext's reference."""
        tokens = num_image_tokens(*self.latent_shape(*size)[1:])
        return 2 * tokens if self.model.kind == "kontext" else tokens

    def settled(self):
        """A copy with what the machine has, and where the pipeline's parts are."""
        return dataclasses.replace(settle_machine(self), model=placed_parts(self))

    def validate(self):
        check_options(self)
        machine = settle_machine(self)
        check_machine(machine)
        parse_steps(self.profile, self.steps)
        self.model.shape().validate()
        where = f"model.in_channels={self.model.in_channels}: the transformer"
        check_kind_of(self.model, self.model, where)
        for group in (self.data, self.flow, self.parallel):
            group.validate()
        for name in ("cache", "download", *["path"] * (self.data.kind == "fill50k")):
            if folder := getattr(self.data, name):
                nearest_folder(folder, f"data.{name}=")
        check_outside(self)
        check_size(self.data.height, self.data.width, self.model.downsampling, "data.")
        check_batch(self.data, self.parallel)
        conflicts = *machine_conflicts(machine), *optim_conflicts(machine), *parts_conflicts(self)
        refuse_first([*conflicts, *shape_conflicts(self)])
        text = self.model.max_sequence_length
        for shape in [(self.data.height, self.data.width), *sum(self.data.shapes(), [])]:
            tokens = self.image_tokens(*shape)
            self.parallel.check_model(self.model.shape(), text, tokens)
            self.parallel.check_float8(machine, (text, tokens))
        choose_task(self).check_settings(self)


def check_outside(config):
    """Raise `ValueError` where what is written would lie among the pictures that are read."""
    data = config.data
    for key, folder in (("output", config.output), ("data.cache", data.cache)):
        for place in data.places() if data.kind == "folder" and folder else ():
            if Path(folder).resolve().is_relative_to(Path(place).expanduser().resolve()):
                raise ValueError(
                    f"{key}={folder} lies in data.path={place}, whose pictures are trained on: "
                    "name a folder outside of it"
                )


def check_batch(data, mesh):
    """Raise `ValueError` unless micro-batches of all data-parallel ranks make up whole batches."""
    replicate, shard, _, _ = mesh.sizes()
    dp, micro, batch = replicate * shard, data.micro_batch, data.global_batch
    together = dp * micro
    if batch % together:
        above = -(-batch // together) * together
        fitting = math.gcd(batch // dp, micro)
        smaller = f", or data.micro_batch={fitting}" if batch % dp == 0 else ""
        raise ValueError(
            f"data.global_batch={batch} must be a multiple of data-parallel ranks x "
            f"data.micro_batch = {dp} x {micro} = {together}: set data.global_batch={above}"
            f"{smaller}"
        )


def machine_conflicts(config):
    """(whether it is so, text) of each way in which settings of the machine do not go together."""
    mesh = config.parallel
    yield (
        ":" in config.device,
        f"device={config.device}: write cuda; CUDA_VISIBLE_DEVICES says which",
    )
    yield (
        mesh.shard_encoders and not config.model.t5,
        "parallel.shard_encoders=true shards T5, and model.t5 is null: leave it out",
    )
    yield (
        mesh.shard_encoders and config.data.cache,
        "parallel.shard_encoders=true gathers T5 on all ranks together, and data.cache encodes on "
        "each alone",
    )
    yield (
        mesh.swap_blocks and not freezes_base(config),
        f"parallel.swap_blocks={mesh.swap_blocks} is for a transformer that stays as it is, beside "
        "a LoRA or a ControlNet: weights that are trained stay on the GPU (optim.weights=bfloat16 "
        "optim.kind=adamw8bit take a quarter)",
    )
    yield (
        mesh.cpu_offload and not config.device.startswith("cuda"),
        "parallel.cpu_offload=true is for a GPU's memory, and device is the CPU: leave it out",
    )
    yield (
        mesh.cpu_offload and config.optim.kind == "muon",
        "parallel.cpu_offload=true does not work with optim.kind=muon, which gathers matrices on "
        "the GPU",
    )


def freezes_base(config):
    """Whether the transformer itself stays as it is."""
    return config.lora.train or config.controlnet.train


def optim_conflicts(config):
    """The same of the optimizer."""
    optim, key = config.optim, f"optim.weights={config.optim.weights}"
    small, width = optim.weights != "float32", config.model.hidden_size
    yield (
        small and config.dtype != "bfloat16",
        f"{key} needs dtype=bfloat16, not {config.dtype}: products would be of rounded weights",
    )
    yield (
        small and config.lora.train,
        f"{key} is for training a whole model: a LoRA's adapters, which are small, stay float32",
    )
    yield (
        small and optim.kind == "muon",
        f"{key} does not work with optim.kind=muon, which rounds to the nearest: choose adamw or "
        "adamw8bit",
    )
    yield (
        small and optim.ema_decay,
        f"{key} does not work with optim.ema_decay, whose float32 average takes more than is "
        "saved: leave one of them out",
    )
    yield from prodigy_conflicts(config)
    block = columns_of_block((width, width))
    yield (
        optim.kind == "adamw8bit" and block and width // config.parallel.tp % block,
        f"optim.kind=adamw8bit has blocks of {block} columns, which parallel.tp="
        f"{config.parallel.tp} splits at model.hidden_size={width}: choose a smaller parallel.tp",
    )


def shape_conflicts(config):
    """The same of the shapes that pictures are trained in."""
    data, cells = config.data, config.model.downsampling * PATCH
    wrong = [side for side in data.resolutions if side % cells and not data.buckets]
    yield (wrong, f"data.resolutions={data.resolutions} must be multiples of {cells}, not {wrong}")
    yield (
        data.buckets and data.bucket_step % cells,
        f"data.bucket_step={data.bucket_step} must be a multiple of {cells}",
    )


def prodigy_conflicts(config):
    """The same of optim.kind=prodigy."""
    optim, mesh = config.optim, config.parallel
    chosen = optim.kind == "prodigy"
    yield (
        chosen and importlib.util.find_spec("prodigyopt") is None,
        "optim.kind=prodigy needs prodigyopt: pip install prodigyopt, or choose adamw",
    )
    yield (
        chosen and optim.lr < 0.1,
        f"optim.lr={optim.lr} is a share of the rate that optim.kind=prodigy finds: set optim.lr=1",
    )
    sharded = world_size() > 1 and not config.lora.train
    yield (
        chosen and (sharded or mesh.tp > 1 or optim.weights != "float32"),
        "optim.kind=prodigy needs whole weights in float32 on each rank, as a LoRA's adapters are "
        "without parallel.tp: choose adamw or adamw8bit",
    )


def placed_parts(config):
    """The `ModelConfig` whose parts that are not named are those beside model.checkpoint.

    Made-up latents (data=mock) need none.
    """
    model = config.model
    if not model.checkpoint or config.data.kind == "mock":
        return model
    if Path(model.checkpoint).exists():
        found = find_parts(model.checkpoint)
    elif model.checkpoint == hub.TINY or hub.is_pipeline(model.checkpoint):
        found = dict.fromkeys(BESIDE_FOLDERS, "/".join(model.checkpoint.split("/")[:2]))
    else:
        found = {}
    named = {part: getattr(model, part) or where for part, where in found.items()}
    return dataclasses.replace(model, **named)


def parts_conflicts(config):
    """The same of the model's parts and the data."""
    model, data = placed_parts(config), config.data
    parts = [part for part in BESIDE_FOLDERS if not getattr(model, part)]
    missing = ", ".join(f"model.{part}=" for part in parts)
    named = model.checkpoint
    yield (
        missing and named and not (Path(named).exists() or hub.is_repository(named)),
        f"model.checkpoint={named} does not exist",
    )
    yield (
        missing and (data.kind != "mock" or len(parts) < 3),
        f"data={data.kind} needs {missing}: name a folder or a hub id for each, or a whole "
        "pipeline's as model.checkpoint=",
    )
    yield (
        config.preview and missing,
        f"preview=true shows pictures and captions: it needs {missing} and other data than "
        "made-up latents",
    )
    yield (
        config.controlnet != ControlNetTrainConfig() and not config.controlnet.train,
        "controlnet.* are for training a ControlNet: set controlnet=default too, or leave them out",
    )
    yield (
        data.control and model.kind == "plain" and not config.controlnet.train,
        "data.control= is for training a ControlNet, or a transformer that sees it: set "
        "controlnet=default or model.kind=control too, or leave it out",
    )
    yield (
        data.cache_pictures and model.kind != "fill",
        "data.cache_pictures=true is for model.kind=fill: leave it out",
    )
    yield (
        model.quantize != "none" and not freezes_base(config),
        f"model.quantize={model.quantize} is for a transformer that stays as it is, beside a LoRA "
        "or a ControlNet: set lora=default or controlnet=default too, or leave it out",
    )
    yield from quantize_conflicts(model.quantize, model.hidden_size, config.parallel.tp)
    yield (
        config.lora != LoraTrainConfig() and not config.lora.train,
        "lora.* are for training a LoRA: set lora=default too, or leave them out",
    )
    yield (
        model.save_converted and not model.checkpoint,
        "model.save_converted= keeps model.checkpoint= in our layout: name that too, or neither",
    )
    yield (
        config.validation == "round_robin" and data.val_count < 8,
        f"validation=round_robin needs data.val_count to be at least 8, not {data.val_count}",
    )


def repeated_fields():
    """Fields like those of `Control` whose keys may be given several times."""
    found = []
    for f in dataclasses.fields(Control):
        if f.name != "image":
            often = "once for each net" + ", or once for all" * (f.name != "checkpoint")
            help = f"{f.metadata['help']}; {often}"
            many = same_option(Control, f.name, default=[], help=help, verbatim=True)
            found.append((f.name, list[float if f.type is float else str], many))
    return found


@dataclass
class ControlConfig(dataclasses.make_dataclass("RepeatedControl", repeated_fields())):
    """The ControlNets that `infer.py` draws with."""

    def controls(self, pictures):
        """A `Control` for each net and its picture, checked; raises `ValueError` where there are
        not as many.
        """
        count = len(self.checkpoint)
        if len(pictures) != count:
            raise ValueError(
                f"controlnet.checkpoint= is given {count} times and control_image= {len(pictures)} "
                "times: give one picture a net"
            )
        found = [Control(*net) for net in zip(self.checkpoint, pictures)]
        for name, values in vars(self).items():
            if values and (not count or len(values) not in (1, count)):
                raise ValueError(
                    f"controlnet.{name}= is given {len(values)} times, and controlnet.checkpoint= "
                    f"{count} times"
                )
            for i, control in enumerate(found if values else []):
                setattr(control, name, values[i % len(values)])
        for control in found:
            control.validate()
        return found


@dataclass
class ReduxConfig:
    """The pictures whose likeness `infer.py` draws."""

    image: list[str] = option(
        [],
        "a picture whose likeness is drawn (FLUX.1-Redux); several add up: give it once for each",
        path=True,
        short="redux",
    )
    checkpoint: str | None = same_option(Redux, "checkpoint", default=None)
    scale: list[float] = same_option(
        Redux,
        "scale",
        default=[],
        help="strength of its tokens, and of the prompt's, by default 1; once for each, or for all",
        verbatim=True,
    )
    pooled_scale: list[float] = same_option(
        Redux,
        "pooled_scale",
        default=[],
        help="strength of the prompt's pooled vector, the same way",
        verbatim=True,
    )

    def pictures(self):
        """A `Redux` for each picture; raises `ValueError` where there are not as many scales."""
        count, scales = len(self.image), {}
        if self != ReduxConfig() and not (self.image and self.checkpoint):
            raise ValueError("redux= and redux.checkpoint= belong together: name both")
        for name in ("scale", "pooled_scale"):
            given = getattr(self, name)
            if len(given) not in (0, 1, count):
                raise ValueError(f"redux.{name}= is given {len(given)} times, and redux= {count}")
            scales[name] = [*given, *given[:1] * count] or [1.0] * count
        pairs = zip(self.image, scales["scale"], scales["pooled_scale"])
        return [Redux(self.checkpoint, *pair) for pair in pairs]


@dataclass
class PromptConfig:
    """What `infer.py` draws, and from what."""

    prompt: list[str] = option([], "what to draw; give it several times for several", verbatim=True)
    prompt_file: str | None = option(None, "a text file with a prompt a line", path=True)
    jobs: str | None = option(
        None,
        'a JSONL file, a line a picture with any of these keys: {"prompt": "a fox", "seed": 1}; '
        "those that are in output already are not drawn again",
        path=True,
    )
    again: str | None = option(
        None,
        "a picture that infer.py has drawn: it is drawn again, bit for bit, or with other keys",
        path=True,
        short="from",
    )
    image: str | None = option(
        None, "a picture to begin from (strength), or to fill (mask)", path=True
    )
    mask: str | None = option(
        None, "a picture of the proportions of image=, whose white is drawn anew", path=True
    )
    reference: list[str] = option(
        [], "of a FLUX.1-Kontext: the picture that the prompt changes; or several", path=True
    )


@dataclass
class InferConfig(PipelineConfig, DrawConfig, PromptConfig):
    """Everything that `infer.py` takes."""

    control_image: list[str] = option(
        [],
        "the picture that a ControlNet follows, resized and cropped; once for each net, and of a "
        "FLUX.1-Canny or FLUX.1-Depth first its own",
        path=True,
    )
    controlnet: ControlConfig = option(ControlConfig, "the ControlNets")
    redux: ReduxConfig = option(ReduxConfig, "pictures whose likeness is drawn")
    parallel: SharingConfig = option(SharingConfig, "what processes share")
    solver: str = option(
        "euler", "how steps are taken; heun asks the model twice in each", choices=tuple(SOLVERS)
    )
    times: list[float] = option(
        [],
        "own times, falling from 1, noise, to 0, a picture, in place of steps and shift: "
        "times=[1,0.7,0.3,0]",
        at_least=0,
        at_most=1,
    )
    preview_every: int = option(
        0,
        "steps between pictures of what is being drawn, output/preview.live.png; 0 for none",
        at_least=0,
        at_most=10_000,
    )
    preview: str = option(
        "colours", "how they are made: colours, blurred but fast, or the decoder", choices=PREVIEWS
    )
    profile: str | None = option(
        None,
        "steps of the first batch to record with torch's profiler into output, as 2-3",
        verbatim=True,
    )
    output: str = option(
        "outputs", "folder for the pictures; existing ones are never overwritten", path=True
    )

    settled = settle_machine

    def controls(self):
        """The `Control`s to draw with; the shipped pipeline has a net of its own."""
        nets = self.controlnet
        if self.control_image and self._takes_shipped():
            nets = dataclasses.replace(nets, checkpoint=[hub.TINY])
        return nets.controls(self.control_image[self._owns_control() :])

    def _takes_shipped(self):
        """Whether a picture to follow is for the shipped ControlNet; beside a LoRA, which may make
        the transformer one that follows it, that net is named.
        """
        named = self.controlnet.checkpoint or self.lora.file
        return not named and self.model.checkpoint == hub.TINY

    def _owns_control(self):
        """Whether the first picture to follow is the transformer's own: there is a net for each of
        the others.
        """
        count = len(self.controlnet.checkpoint) + 1
        return not self._takes_shipped() and len(self.control_image) == count

    def pictures(self):
        """What is drawn beside the prompts, by argument of `generate`."""
        own = self.control_image[: self._owns_control()]
        given = {"image": self.image, "mask": self.mask, "reference": self.reference}
        return given | {"control_image": own, "redux": self.redux.pictures()}

    def _ways(self):
        """{key: what it is given} of what says what is drawn."""
        ways = {"prompt": self.prompt, "prompt_file": self.prompt_file, "jobs": self.jobs}
        return ways | {"from": self.again}

    def sampling(self):
        """How steps are taken, by argument of `generate`."""
        return {"solver": self.solver, "times": self.times or None}

    def validate(self):
        check_options(self)
        self.parallel.validate()
        check_machine(settle_machine(self))
        parse_steps(self.profile, MAX_STEPS)
        ways = [f"{key}=" for key, way in self._ways().items() if way]
        if len(ways) > 1 and ("jobs=" in ways or {"from=", "prompt_file="} <= {*ways}):
            raise ValueError(f"{' and '.join(ways)}: name one of them")
        for key, path in (("prompt_file", self.prompt_file), ("jobs", self.jobs)):
            if path and not Path(path).is_file():
                raise ValueError(f"{key}={path} is not a file")
        if not ways:
            raise ValueError(
                'prompt= is missing: name what to draw, as in prompt="red circle with blue '
                'background"'
            )
        if not all(text.strip() for text in self.prompt):
            raise ValueError("prompt= is empty: name what to draw, or leave it out")
        if self.preview != "colours" and not self.preview_every:
            raise ValueError(f"preview={self.preview} needs preview_every=: steps between previews")
        if not self.model.checkpoint:
            raise ValueError(
                "model.checkpoint= is missing: name the folder of a pipeline, a transformer or a "
                "run"
            )
        if not (self.jobs or self.again):  # checked with what those add
            self._check_drawing()

    def _check_drawing(self):
        """Raise `ValueError` for keys of a drawing that do not go together."""
        check_negative(self.negative_prompt, self.true_cfg or 1.0)
        if self.times:
            check_times(self.times)
        self.controls()
        self.redux.pictures()
        self.lora.loras()
        if self.lora != LoraConfig() and not self.lora.file:
            raise ValueError("lora.* are for drawing with LoRAs: name lora= too, or leave them out")


# Of `infer.py`: what is no part of a picture, so that no job has it and no picture's name.
SESSION_KEYS = (
    "prompt_file",
    "jobs",
    "again",
    "from",
    "output",
    "profile",
    "preview_every",
    "preview",
)
SESSION_KEYS += ("device", "offload", "resident_blocks")
SESSION_KEYS += ("model.save_converted", "controlnet.save_converted")
SESSION_KEYS += tuple(f"parallel.{f.name}" for f in dataclasses.fields(SharingConfig))


def picture_settings(config):
    """{key: value} of what makes the pictures of an `InferConfig`, paths whole: a job's line."""
    fields, found = option_fields(InferConfig), {}
    for key, value in set_options(config).items():
        if key in SESSION_KEYS:
            continue
        if fields[key].metadata.get("path"):
            paths = value if isinstance(value, list) else [value]
            whole = [os.path.abspath(path) if os.path.exists(path) else path for path in paths]
            value = whole if isinstance(value, list) else whole[0]
        found[key] = value
    return found


def job_settings(base, job, where):
    """The checked `InferConfig` of a job's values, else of `base`; raises `ValueError`, naming
    `where`.
    """
    with naming_place(where):
        given = {key for key, _ in flat_values(job)}
        for key in SESSION_KEYS:
            if key in given:
                raise ValueError(f"{key} belongs to the command line: leave it out")
        config = change_options(dataclasses.replace(base, jobs=None, again=None), job)
        config.validate()
        if len(config.prompt) != 1 or config.images_per_prompt != 1:
            raise ValueError("one picture is drawn here: name one prompt, and images_per_prompt=1")
        if config.place < 0:  # a batch of its own, so that it is the same picture in any company
            config = dataclasses.replace(config, batch=1)
        return config.settled()


PROGRAMS = {"train": TrainConfig, "infer": InferConfig}


def load_settings(name, arguments):
    """The checked settings of a program of `PROGRAMS`; raises `ValueError`."""
    others = [(cls, other) for other, cls in PROGRAMS.items() if other != name]
    return load_config(PROGRAMS[name], name, arguments, others)


def check_output(folder, key="output="):
    """Raise `ValueError` where a path cannot be a folder that this user writes to."""
    there = nearest_folder(folder, key)
    try:
        tempfile.TemporaryDirectory(dir=there, prefix=".fluxlite-").cleanup()
    except OSError as error:
        raise ValueError(
            f"{key}{folder}: {there} cannot be written to ({error.strerror}); name a folder of "
            "your own"
        ) from None


def nearest_folder(folder, key):
    """What is there of a folder's path; raises `ValueError`, naming `key`, where it is a file."""
    place = Path(folder)
    there = next((p for p in (place, *place.absolute().parents) if os.path.lexists(p)), Path("/"))
    if not there.is_dir():
        raise ValueError(f"{key}{folder}: {there} is a file; name a folder")
    return there


def check_machine(config):
    """Raise `ValueError` for what the machine of a `settle_machine`d configuration cannot do, and
    for an output that cannot be a folder.
    """
    check_output(config.output)
    attention = config.model.attention
    if config.device == "cpu" and attention in ("cudnn", "efficient"):
        raise ValueError(
            f"model.attention={attention} needs a CUDA device: choose auto, flash or math on the "
            "CPU"
        )
