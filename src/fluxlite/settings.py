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
from fluxlite.cli.options import check_options, option, same_option
from fluxlite.data import DataConfig
from fluxlite.draw.control import Control
from fluxlite.draw.pipeline import DrawConfig, PartsConfig, PipelineConfig
from fluxlite.nets.control_modes import mode_number
from fluxlite.nets.controlnet import ControlNetConfig, check_starts
from fluxlite.nets.flow import FlowConfig
from fluxlite.nets.flux import FluxConfig, check_channels
from fluxlite.nets.latents import check_size, num_image_tokens
from fluxlite.nets.schedule import SampleConfig
from fluxlite.parallel import ParallelConfig
from fluxlite.train.metrics import MetricsConfig
from fluxlite.train.optim import OptimConfig
from fluxlite.weights.sources import TINY, CheckpointConfig

MAX_STEPS = 10**9  # of training


@dataclass
class ModelConfig(PartsConfig, FluxConfig):
    """A transformer's shape and the parts around it."""

    max_sequence_length: int = option(
        512, "T5 tokens that prompts are padded and cut to", at_least=1, at_most=10_000
    )

    def shape(self):
        """The `FluxConfig` alone."""
        return FluxConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(FluxConfig)})


@dataclass
class MachineConfig:
    """What a program runs on; unset, it is filled with what the machine has."""

    device: str | None = same_option(PipelineConfig, "device")
    dtype: str | None = same_option(PipelineConfig, "dtype")
    compile: bool = same_option(PipelineConfig, "compile")


@dataclass
class ControlNetTrainConfig:
    """The ControlNet that is trained beside a frozen transformer; none without `controlnet=default`
    or a recipe that has one.
    """

    train: bool = option(False, "train a ControlNet; set by controlnet=default", group="controlnet")
    checkpoint: str | None = option(
        None,
        "a ControlNet to start from, of any layout; its depth must be the one below",
        path=True,
    )
    init_from_base: bool = option(
        True,
        "else start from the transformer's embedders and first blocks; false: random weights",
    )
    num_double_blocks: int = same_option(ControlNetConfig, "num_double_blocks")
    num_single_blocks: int = same_option(ControlNetConfig, "num_single_blocks")
    hint: str = same_option(ControlNetConfig, "hint")
    num_modes: int = same_option(ControlNetConfig, "num_modes")
    dropout: float = option(
        0.0, "share of samples trained with an empty control", at_least=0, below=1
    )
    meter_every: int = option(
        50,
        "steps between measurements of whether it learns; 0 for none",
        at_least=0,
        at_most=MAX_STEPS,
        resume=True,
    )
    patience: int = option(
        300,
        "steps after which a control without effect is said loudly",
        at_least=0,
        at_most=MAX_STEPS,
        resume=True,
    )

    def shape(self, base):
        """The `ControlNetConfig` beside a transformer of configuration `base`."""
        return ControlNetConfig.beside(
            base,
            **{
                name: getattr(self, name)
                for name in ("num_double_blocks", "num_single_blocks", "hint", "num_modes")
            },
        )

    def check(self, config):
        """Raise `ValueError` where a `TrainConfig` cannot train this ControlNet."""
        shape = self.shape(config.model.shape())
        shape.validate()
        if not config.data.control:
            raise ValueError(
                "a ControlNet needs control pictures: set data.control=png (beside the target in "
                "the tar) or canny"
            )
        replicate, shard, _, _ = config.parallel.sizes()
        least = max(8, 2 * replicate * shard)
        if self.meter_every and config.data.val_count < least:
            raise ValueError(
                "the meter compares a control with another's, which takes eight held-out samples, "
                "and two on each data-parallel "
                f"rank: set data.val_count={least} or more, not {config.data.val_count}, or "
                "controlnet.meter_every=0"
            )
        mode = config.data.control_mode
        if (mode is None) == (self.num_modes > 0):
            raise ValueError(
                f"controlnet.num_modes={self.num_modes} and data.control_mode={mode}: only a union "
                "net has both"
            )
        if mode == "json" and config.data.kind != "webdataset":
            raise ValueError(
                f"data.control_mode=json: data={config.data.kind} has no modes, name a kind"
            )
        if mode not in (None, "json") and not mode_number(mode) < self.num_modes:
            raise ValueError(
                f"data.control_mode={mode} is kind {mode_number(mode)}: set controlnet.num_modes "
                "above that"
            )
        if self.init_from_base and not self.checkpoint:
            check_starts(shape, config.model.shape())
        shared = config.parallel.cp > 1 or config.parallel.sequence_parallel
        if shared and (self.hint == "pixel" or self.num_modes):
            raise ValueError(
                "parallel.cp and parallel.sequence_parallel share tokens, which a ControlNet with "
                "controlnet.hint=pixel or "
                "controlnet.num_modes makes itself: leave them out"
            )
        if self.hint == "pixel" and config.data.cache:
            raise ValueError(
                "controlnet.hint=pixel needs pictures, and data.cache holds latents: set "
                "data.cache=null"
            )
        if self.hint == "pixel" and config.data.kind == "mock":
            raise ValueError(
                "controlnet.hint=pixel needs pictures, and data=mock makes up latents: choose "
                "other data"
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
        if ":" in self.device:
            raise ValueError(f"device={self.device}: write cuda; CUDA_VISIBLE_DEVICES says which")
        self.model.shape().validate()
        check_channels(self.model, f"model.in_channels={self.model.in_channels}: the transformer")
        for group in (self.data, self.flow, self.parallel):
            group.validate()
        check_size(self.data.height, self.data.width)
        replicate, shard, _, _ = self.parallel.sizes()
        dp, micro, batch = replicate * shard, self.data.micro_batch, self.data.global_batch
        if batch % (dp * micro):
            above = -(-batch // (dp * micro)) * dp * micro
            smaller = (
                f", or data.micro_batch={math.gcd(batch // dp, micro)}" if batch % dp == 0 else ""
            )
            raise ValueError(
                f"data.global_batch={batch} must be a multiple of data-parallel ranks x "
                "data.micro_batch = "
                f"{dp} x {micro} = {dp * micro}: set data.global_batch={above}{smaller}"
            )
        tokens = num_image_tokens(self.data.height // 8, self.data.width // 8)
        self.parallel.check_model(self.model.shape(), self.model.max_sequence_length, tokens)
        if self.compile and self.parallel.tp > 1:
            raise ValueError(
                "compile=true does not work with parallel.tp above 1 yet: leave one of them out"
            )
        if self.parallel.shard_encoders and not self.model.t5:
            raise ValueError(
                "parallel.shard_encoders=true shards T5, and model.t5 is null: leave it out"
            )
        if self.parallel.shard_encoders and self.data.cache:
            raise ValueError(
                "parallel.shard_encoders=true gathers T5 on all ranks together, and data.cache "
                "encodes on each alone"
            )
        if self.parallel.cpu_offload and not self.device.startswith("cuda"):
            raise ValueError(
                "parallel.cpu_offload=true is for a GPU's memory, and device is the CPU: leave it "
                "out"
            )
        if self.parallel.cpu_offload and self.optim.kind == "muon":
            raise ValueError(
                "parallel.cpu_offload=true does not work with optim.kind=muon, which gathers "
                "matrices on the GPU"
            )
        if self.controlnet.train:
            self.controlnet.check(self)
        elif self.controlnet != ControlNetTrainConfig() or self.data.control:
            raise ValueError(
                "controlnet.* and data.control= are for training a ControlNet: set "
                "controlnet=default too, or leave them out"
            )
        missing = [
            f"model.{part}="
            for part in ("t5", "clip", "autoencoder")
            if not getattr(self.model, part)
        ]
        if missing and (self.data.kind != "mock" or len(missing) < 3):
            raise ValueError(
                f"data={self.data.kind} needs {', '.join(missing)}: name a folder or a hub id for "
                "each"
            )
        if self.model.save_converted and not self.model.checkpoint:
            raise ValueError(
                "model.save_converted= keeps model.checkpoint= in our layout: name that too, or "
                "neither"
            )
        if self.validation == "round_robin" and self.data.val_count < 8:
            raise ValueError(
                "validation=round_robin needs data.val_count to be at least 8, not "
                f"{self.data.val_count}"
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
class PromptConfig:
    """What `infer.py` draws."""

    prompt: list[str] = option([], "what to draw; give it several times for several", verbatim=True)
    prompt_file: str | None = option(None, "a text file with a prompt a line", path=True)


@dataclass
class InferConfig(PipelineConfig, DrawConfig, PromptConfig):
    """Everything that `infer.py` takes."""

    control_image: list[str] = option(
        [],
        "the picture that a ControlNet follows, resized and cropped; once for each net",
        path=True,
    )
    controlnet: ControlConfig = option(ControlConfig, "the ControlNets")
    output: str = option(
        "outputs", "folder for the pictures; existing ones are never overwritten", path=True
    )

    def controls(self):
        """The `Control`s to draw with; the shipped pipeline has a net of its own."""
        nets = self.controlnet
        if self.control_image and not nets.checkpoint and self.model.checkpoint == TINY:
            nets = dataclasses.replace(nets, checkpoint=[TINY])
        return nets.controls(self.control_image)

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
        if self.negative_prompt and not (self.true_cfg or 1) > 1:
            raise ValueError(f"negative_prompt= needs true_cfg above 1, not {self.true_cfg or 1.0}")
        self.controls()
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
