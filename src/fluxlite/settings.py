"""The settings of `train.py` and `infer.py`, composed of the dataclasses beside the code that uses
them.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxlite import parallel
from fluxlite.cli.options import check_options, option, refuse_first, same_option, unset_option
from fluxlite.data import DataConfig
from fluxlite.draw.control import Control
from fluxlite.draw.pipeline import DrawConfig
from fluxlite.nets.control_modes import MODES
from fluxlite.nets.flow import FlowConfig
from fluxlite.nets.flux import ATTENTION, FluxConfig, check_channels
from fluxlite.nets.latents import check_size, num_image_tokens
from fluxlite.nets.schedule import SampleConfig
from fluxlite.parallel import ParallelConfig
from fluxlite.train.metrics import MetricsConfig
from fluxlite.train.optim import OptimConfig
from fluxlite.train.tasks import choose_task
from fluxlite.train.tasks.controlnet import ControlNetTrainConfig
from fluxlite.weights.sources import TINY, CheckpointConfig

DTYPES = ("float32", "bfloat16")
MAX_STEPS = 10**9  # of training


@dataclass
class PartsConfig:
    """Where the parts of a pipeline come from."""

    checkpoint: str | None = option(
        None,
        "transformer: a pipeline folder, a transformer's, a run or a file; flux-tiny is shipped",
        path=True,
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
        "T5 encoder: a folder, a pipeline folder or a hub id; flux-tiny is shipped",
        path=True,
    )
    clip: str | None = option(
        None,
        "CLIP text encoder: a folder, a pipeline folder or a hub id; flux-tiny is shipped",
        path=True,
    )
    autoencoder: str | None = option(
        None,
        "autoencoder: ae.safetensors, a vae/ folder or a pipeline folder; flux-tiny is shipped",
        path=True,
    )
    ema: bool = option(True, "use the moving average of a run, where it has one")
    attention: str = option("auto", "attention kernel", choices=tuple(ATTENTION), resume=True)


PARTS_FIELDS = {f.name for f in dataclasses.fields(PartsConfig)}


@dataclass
class ModelConfig(PartsConfig, FluxConfig):
    """A transformer's shape and the parts around it."""

    max_sequence_length: int = option(
        512, "T5 tokens that prompts are padded and cut to", at_least=1, at_most=10_000
    )

    def shape(self):
        """The `FluxConfig` alone."""
        return FluxConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(FluxConfig)})


def _unset(f):
    """A field like `f` that may be left open: (name, type, field)."""
    help = f"expected of the checkpoint: {f.metadata['help']}"
    return f.name, f.type | None, unset_option(ModelConfig, f.name, help)


# What `infer.py` takes under model.: parts, and with model=flux_schnell and its like a shape that
# the checkpoint must have.
ExpectedConfig = dataclasses.make_dataclass(
    "ExpectedConfig",
    [_unset(f) for f in dataclasses.fields(ModelConfig) if f.name not in PARTS_FIELDS],
    bases=(PartsConfig,),
)


@dataclass
class MachineConfig:
    """What both programs run on; unset, it is filled with what the machine has."""

    device: str | None = option(None, "cpu or cuda; null: what the machine has", resume=True)
    dtype: str | None = option(
        None,
        "what to compute in; null: bfloat16 where it is in hardware, else float32",
        choices=DTYPES,
    )
    compile: bool = option(
        False,
        "compile each block (torch.compile): minutes at the start, faster steps",
        resume=True,
    )


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


@dataclass
class TrainConfig(MachineConfig):
    """Everything that `train.py` takes."""

    model: ModelConfig = option(ModelConfig, "the transformer")
    data: DataConfig = option(DataConfig, "the samples")
    flow: FlowConfig = option(FlowConfig, "the flow")
    optim: OptimConfig = option(OptimConfig, "the optimizer")
    parallel: ParallelConfig = option(ParallelConfig, "the mesh", resume=True)
    controlnet: ControlNetTrainConfig = option(ControlNetTrainConfig, "the ControlNet")
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

    def validate(self):
        check_options(self)
        check_machine(self)
        self.model.shape().validate()
        check_channels(self.model, f"model.in_channels={self.model.in_channels}: the transformer")
        for group in (self.data, self.flow, self.parallel):
            group.validate()
        check_size(self.data.height, self.data.width)
        check_batch(self.data, self.parallel)
        tokens = num_image_tokens(self.data.height // 8, self.data.width // 8)
        self.parallel.check_model(self.model.shape(), self.model.max_sequence_length, tokens)
        refuse_first([*machine_conflicts(self), *parts_conflicts(self)])
        choose_task(self).check_settings(self)


def check_batch(data, parallel):
    """Raise `ValueError` unless micro-batches of all data-parallel ranks make up whole batches."""
    replicate, shard, _, _ = parallel.sizes()
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
    parallel = config.parallel
    yield (
        ":" in config.device,
        f"device={config.device}: write cuda; CUDA_VISIBLE_DEVICES says which",
    )
    yield (
        config.compile and parallel.tp > 1,
        "compile=true does not work with parallel.tp above 1 yet: leave one of them out",
    )
    yield (
        parallel.shard_encoders and not config.model.t5,
        "parallel.shard_encoders=true shards T5, and model.t5 is null: leave it out",
    )
    yield (
        parallel.shard_encoders and config.data.cache,
        "parallel.shard_encoders=true gathers T5 on all ranks together, and data.cache encodes on "
        "each alone",
    )
    yield (
        parallel.cpu_offload and not config.device.startswith("cuda"),
        "parallel.cpu_offload=true is for a GPU's memory, and device is the CPU: leave it out",
    )
    yield (
        parallel.cpu_offload and config.optim.kind == "muon",
        "parallel.cpu_offload=true does not work with optim.kind=muon, which gathers matrices on "
        "the GPU",
    )


def parts_conflicts(config):
    """The same of the model's parts and the data."""
    model, data = config.model, config.data
    parts = [part for part in ("t5", "clip", "autoencoder") if not getattr(model, part)]
    missing = ", ".join(f"model.{part}=" for part in parts)
    yield (
        missing and (data.kind != "mock" or len(parts) < 3),
        f"data={data.kind} needs {missing}: name a folder or a hub id for each",
    )
    unused = data.control or config.controlnet != ControlNetTrainConfig()
    yield (
        unused and not config.controlnet.train,
        "controlnet.* and data.control= are for training a ControlNet: set controlnet=default too, "
        "or leave them out",
    )
    yield (
        model.save_converted and not model.checkpoint,
        "model.save_converted= keeps model.checkpoint= in our layout: name that too, or neither",
    )
    yield (
        config.validation == "round_robin" and data.val_count < 8,
        f"validation=round_robin needs data.val_count to be at least 8, not {data.val_count}",
    )


def each_option(name, help):
    """A list bounded as the field `name` of `Control`, whose key may be given several times."""
    return same_option(Control, name, help=help, default=[], verbatim=True)


@dataclass
class ControlConfig:
    """The ControlNets that `infer.py` draws with: `checkpoint` once for each, the other keys once
    for all or once for each.
    """

    checkpoint: list[str] = option(
        [], "a ControlNet, a file or folder of any layout or a hub id; once for each net", path=True
    )
    scale: list[float] = each_option(
        "scale", "strength; 1 if not given; this and the next once for all nets or once for each"
    )
    start: list[float] = each_option(
        "start", "part of the steps before which the net is off; 0 if not given"
    )
    end: list[float] = each_option(
        "end", "part of the steps after which the net is off; 1 if not given"
    )
    mode: list[str] = option(
        [], f"of a union net: {', '.join(MODES)}, or a number; none for other nets", verbatim=True
    )
    save_converted: list[str] = option(
        [],
        "where to keep controlnet.checkpoint in our own layout, as model.save_converted",
        path=True,
    )

    def controls(self, pictures):
        """A `Control` for each net and its picture, checked; raises `ValueError` where there are
        not as many.
        """
        count, columns = len(self.checkpoint), {}
        if len(pictures) != count:
            raise ValueError(
                f"controlnet.checkpoint= is given {count} times and control_image= {len(pictures)} "
                "times: give one picture a net"
            )
        for name in ("scale", "start", "end", "mode", "save_converted"):
            values = getattr(self, name)
            if values and (not count or len(values) not in (1, count)):
                raise ValueError(
                    f"controlnet.{name}= is given {len(values)} times, and controlnet.checkpoint= "
                    f"{count} times"
                )
            if values:
                columns[name] = values * count if len(values) == 1 else values
        found = [
            Control(*net, **{name: column[i] for name, column in columns.items()})
            for i, net in enumerate(zip(self.checkpoint, pictures))
        ]
        for control in found:
            control.validate()
        return found


def own_option(name, help):
    """A field of `SampleConfig` that is the checkpoint's own unless it is set."""
    return unset_option(SampleConfig, name, f"{help}; null: the checkpoint's own, else FLUX's")


@dataclass
class InferConfig(DrawConfig, MachineConfig):
    """Everything that `infer.py` takes."""

    model: ExpectedConfig = option(ExpectedConfig, "the pipeline")
    prompt: list[str] = option([], "what to draw; give it several times for several", verbatim=True)
    prompt_file: str | None = option(None, "a text file with a prompt a line", path=True)
    negative_prompt: str = option(
        "", "what to steer away from, with true_cfg above 1; or empty", verbatim=True
    )
    controlnet: ControlConfig = option(ControlConfig, "the ControlNets")
    control_image: list[str] = option(
        [],
        "the picture that a ControlNet follows, resized and cropped; once for each net",
        path=True,
    )
    height: int | None = own_option("height", "height in pixels")
    width: int | None = own_option("width", "width in pixels")
    steps: int | None = own_option("steps", "Euler steps")
    guidance: float | None = own_option("guidance", "guidance embedding")
    max_sequence_length: int | None = own_option(
        "max_sequence_length", "T5 tokens that prompts are padded and cut to"
    )
    true_cfg: float = same_option(SampleConfig, "true_cfg")
    shift: str = same_option(SampleConfig, "shift")
    output: str = option(
        "outputs", "folder for the pictures; existing ones are never overwritten", path=True
    )

    def expected(self):
        """{field of FluxConfig: value} for what the command line says of the checkpoint's shape."""
        named = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(FluxConfig)}
        return {name: value for name, value in named.items() if value is not None}

    def validate(self):
        check_options(self)
        check_machine(self)
        if not self.prompt and not self.prompt_file:
            raise ValueError(
                'prompt= is missing: name what to draw, as in prompt="red circle with blue '
                'background"'
            )
        if self.prompt_file and not Path(self.prompt_file).is_file():
            raise ValueError(f"prompt_file={self.prompt_file} is not a file")
        if self.negative_prompt and not self.true_cfg > 1:
            raise ValueError(f"negative_prompt= needs true_cfg above 1, not {self.true_cfg}")
        if self.control_image and not self.controlnet.checkpoint and self.model.checkpoint == TINY:
            self.controlnet.checkpoint = [TINY]
        self.controlnet.controls(self.control_image)
        if not self.model.checkpoint:
            raise ValueError(
                "model.checkpoint= is missing: name the folder of a pipeline, a transformer or a "
                "run"
            )


def check_output(folder, key="output="):
    """Raise `ValueError` where a path cannot be a folder that this user writes to."""
    place = Path(folder)
    there = next((p for p in (place, *place.absolute().parents) if os.path.lexists(p)), Path("/"))
    if not there.is_dir():
        raise ValueError(f"{key}{folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}{folder}: {there} cannot be written to; name a folder of your own")


def check_machine(config):
    """Fill `device` and `dtype` with what the machine has; refuse what it has not, and an output
    that cannot be a folder.
    """
    check_output(config.output)
    config.device = config.device or parallel.default_device()
    known = re.fullmatch(r"cpu|cuda(:\d{1,4})?", config.device)
    if not known or (config.device != "cpu" and parallel.default_device() != "cuda"):
        raise ValueError(f"device={config.device}: this machine has {parallel.default_device()}")
    if known[1] and int(known[1][1:]) >= torch.cuda.device_count():
        raise ValueError(f"device={config.device}: there are {torch.cuda.device_count()} GPUs")
    config.dtype = config.dtype or ("bfloat16" if parallel.has_bf16(config.device) else "float32")
    if config.compile:
        parallel.check_compiler(config.device)
    attention = config.model.attention
    if config.device == "cpu" and attention in ("cudnn", "efficient"):
        raise ValueError(
            f"model.attention={attention} needs a CUDA device: choose auto, flash or math on the "
            "CPU"
        )
