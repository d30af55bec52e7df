"""The settings of `train.py` and `infer.py`, composed of the dataclasses beside the code that uses them."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from fluxlite import parallel, sampling
from fluxlite.checkpoint import TINY, CheckpointConfig
from fluxlite.control import Control
from fluxlite.controlnet import MODES, ControlNetConfig, check_starts
from fluxlite.data import DataConfig
from fluxlite.data.shards import mode_number
from fluxlite.flow import FlowConfig
from fluxlite.latents import num_image_tokens
from fluxlite.metrics import MetricsConfig
from fluxlite.model import ATTENTION, FluxConfig, check_channels
from fluxlite.offload import OFFLOAD
from fluxlite.optim import OptimConfig
from fluxlite.parallel import ParallelConfig

DTYPES = ("float32", "bfloat16")


def verbatim(default, help):
    """A field whose value is taken from the command line as it stands."""
    return field(default=default, metadata={"help": help, "verbatim": True})


@dataclass
class PartsConfig:
    """Where the parts of a pipeline come from."""

    checkpoint: str | None = verbatim(
        None, "transformer: a pipeline folder, a transformer's, a run or a file; flux-tiny is shipped"
    )
    save_converted: str | None = verbatim(
        None, "where to keep model.checkpoint in our own layout, which loads without a copy; used again if it is there"
    )
    t5: str | None = verbatim(None, "T5 encoder: a folder, a pipeline folder or a hub id; flux-tiny is shipped")
    clip: str | None = verbatim(None, "CLIP text encoder: a folder, a pipeline folder or a hub id; flux-tiny is shipped")
    autoencoder: str | None = verbatim(
        None, "autoencoder: ae.safetensors, a vae/ folder or a pipeline folder; flux-tiny is shipped"
    )
    ema: bool = field(default=True, metadata={"help": "use the moving average of a run, where it has one"})
    attention: str = field(default="auto", metadata={"help": f"attention kernel: {', '.join(ATTENTION)}"})


PARTS_FIELDS = {f.name for f in dataclasses.fields(PartsConfig)}


@dataclass
class ModelConfig(PartsConfig, FluxConfig):
    """A transformer's shape and the parts around it."""

    max_sequence_length: int = field(default=512, metadata={"help": "T5 tokens that prompts are padded and cut to"})

    def shape(self):
        """The `FluxConfig` alone."""
        return FluxConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(FluxConfig)})


def _unset(f):
    """A field like `f` that may be left open: (name, type, field)."""
    return f.name, f.type | None, field(default=None, metadata={"help": f"expected of the checkpoint: {f.metadata['help']}"})


# What `infer.py` takes under model.: parts, and with model=flux_schnell and its like a shape that the checkpoint must have.
ExpectedConfig = dataclasses.make_dataclass(
    "ExpectedConfig", [_unset(f) for f in dataclasses.fields(ModelConfig) if f.name not in PARTS_FIELDS], bases=(PartsConfig,)
)


@dataclass
class ControlNetTrainConfig:
    """The ControlNet that is trained beside a frozen transformer; none without `controlnet=default` or a recipe that has one."""

    train: bool = field(default=False, metadata={"help": "train a ControlNet; set by controlnet=default"})
    checkpoint: str | None = verbatim(None, "a ControlNet to start from, of any layout; its depth must be the one below")
    init_from_base: bool = field(
        default=True, metadata={"help": "else start from the transformer's embedders and first blocks; false: random weights"}
    )
    num_double_blocks: int = field(default=4, metadata={"help": "double blocks of the ControlNet"})
    num_single_blocks: int = field(default=10, metadata={"help": "single blocks of the ControlNet"})
    hint: str = field(default="latent", metadata={"help": "what it sees of the control picture: latent, or pixel (XLabs)"})
    num_modes: int = field(default=0, metadata={"help": "kinds of control that it tells apart (union); 0 for one kind"})
    dropout: float = field(default=0.0, metadata={"help": "share of samples trained with an empty control"})
    meter_every: int = field(default=50, metadata={"help": "steps between measurements of whether it learns; 0 for none"})
    patience: int = field(default=300, metadata={"help": "steps after which a control without effect is said loudly"})

    def shape(self, base):
        """The `ControlNetConfig` beside a transformer of configuration `base`."""
        return ControlNetConfig.beside(
            base, **{name: getattr(self, name) for name in ("num_double_blocks", "num_single_blocks", "hint", "num_modes")}
        )

    def check(self, config):
        """Raise `ValueError` where a `TrainConfig` cannot train this ControlNet."""
        shape = self.shape(config.model.shape())
        shape.validate()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"controlnet.dropout={self.dropout} must be in [0, 1)")
        for name in ("meter_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"controlnet.{name}={getattr(self, name)} must not be negative")
        if not config.data.control:
            raise ValueError("a ControlNet needs control pictures: set data.control=png (beside the target in the tar) or canny")
        replicate, shard, _, _ = config.parallel.sizes()
        least = max(8, 2 * replicate * shard)
        if self.meter_every and config.data.val_count < least:
            raise ValueError(
                "the meter compares a control with another's, which takes eight held-out samples, and two on each data-parallel "
                f"rank: set data.val_count={least} or more, not {config.data.val_count}, or controlnet.meter_every=0"
            )
        mode = config.data.control_mode
        if (mode is None) == (self.num_modes > 0):
            raise ValueError(f"controlnet.num_modes={self.num_modes} and data.control_mode={mode}: only a union net has both")
        if mode == "json" and config.data.kind != "webdataset":
            raise ValueError(f"data.control_mode=json: data={config.data.kind} has no modes, name a kind")
        if mode not in (None, "json") and not mode_number(mode) < self.num_modes:
            raise ValueError(f"data.control_mode={mode} is kind {mode_number(mode)}: set controlnet.num_modes above that")
        if self.init_from_base and not self.checkpoint:
            check_starts(shape, config.model.shape())
        shared = config.parallel.cp > 1 or config.parallel.sequence_parallel
        if shared and (self.hint == "pixel" or self.num_modes):
            raise ValueError(
                "parallel.cp and parallel.sequence_parallel share tokens, which a ControlNet with controlnet.hint=pixel or "
                "controlnet.num_modes makes itself: leave them out"
            )
        if self.hint == "pixel" and config.data.cache:
            raise ValueError("controlnet.hint=pixel needs pictures, and data.cache holds latents: set data.cache=null")
        if self.hint == "pixel" and config.data.kind == "mock":
            raise ValueError("controlnet.hint=pixel needs pictures, and data=mock makes up latents: choose other data")


@dataclass
class SampleGridConfig:
    """Pictures drawn while training."""

    every: int = field(default=1000, metadata={"help": "steps between grids of pictures; 0 for the last step only"})
    count: int = field(default=16, metadata={"help": "pictures in a grid; the prompts are the validation set's first"})
    steps: int = field(default=20, metadata={"help": "Euler steps of a picture"})
    guidance: float = field(default=3.5, metadata={"help": "guidance embedding of a picture, for models that have one"})


@dataclass
class TrainConfig:
    """Everything that `train.py` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    controlnet: ControlNetTrainConfig = field(default_factory=ControlNetTrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sample: SampleGridConfig = field(default_factory=SampleGridConfig)
    steps: int = field(default=30_000, metadata={"help": "optimizer steps"})
    validate_every: int = field(default=500, metadata={"help": "steps between validations; 0 for the last step only"})
    validation: str = field(default="all", metadata={"help": "all: each sample at 8 values of t; round_robin: at one, as MLPerf"})
    seed: int = field(default=0, metadata={"help": "seed of every random draw"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; null: what the machine has"})
    dtype: str | None = field(
        default=None, metadata={"help": "compute in bfloat16 or float32; null: bfloat16 where it is in hardware"}
    )
    compile: bool = field(
        default=False, metadata={"help": "compile each block (torch.compile): minutes at the start, faster steps"}
    )
    output: str = verbatim("runs/train", "folder of the run: config, metrics, pictures, checkpoints")
    resume: str | None = field(default=None, metadata={"help": "auto: go on from the last checkpoint in output, if there is one"})

    def validate(self):
        check_machine(self)
        self.model.shape().validate()
        check_channels(self.model, f"model.in_channels={self.model.in_channels}: the transformer")
        for group in (self.data, self.flow, self.optim, self.parallel, self.checkpoint):
            group.validate()
        sampling.check_size(self.data.height, self.data.width)
        replicate, shard, _, _ = self.parallel.sizes()
        dp, micro, batch = replicate * shard, self.data.micro_batch, self.data.global_batch
        if batch % (dp * micro):
            above = -(-batch // (dp * micro)) * dp * micro
            smaller = f", or data.micro_batch={math.gcd(batch // dp, micro)}" if batch % dp == 0 else ""
            raise ValueError(
                f"data.global_batch={batch} must be a multiple of data-parallel ranks x data.micro_batch = "
                f"{dp} x {micro} = {dp * micro}: set data.global_batch={above}{smaller}"
            )
        tokens = num_image_tokens(self.data.height // 8, self.data.width // 8)
        self.parallel.check_model(self.model.shape(), self.model.max_sequence_length, tokens)
        if self.compile and self.parallel.tp > 1:
            raise ValueError("compile=true does not work with parallel.tp above 1 yet: leave one of them out")
        if self.parallel.shard_encoders and not self.model.t5:
            raise ValueError("parallel.shard_encoders=true shards T5, and model.t5 is null: leave it out")
        if self.parallel.shard_encoders and self.data.cache:
            raise ValueError("parallel.shard_encoders=true gathers T5 on all ranks together, and data.cache encodes on each alone")
        if self.parallel.cpu_offload and not self.device.startswith("cuda"):
            raise ValueError("parallel.cpu_offload=true is for a GPU's memory, and device is the CPU: leave it out")
        if self.parallel.cpu_offload and self.optim.kind == "muon":
            raise ValueError("parallel.cpu_offload=true does not work with optim.kind=muon, which gathers matrices on the GPU")
        if self.controlnet.train:
            self.controlnet.check(self)
        elif self.controlnet != ControlNetTrainConfig() or self.data.control:
            raise ValueError(
                "controlnet.* and data.control= are for training a ControlNet: set controlnet=default too, or leave them out"
            )
        missing = [f"model.{part}=" for part in ("t5", "clip", "autoencoder") if not getattr(self.model, part)]
        if missing and (self.data.kind != "mock" or len(missing) < 3):
            raise ValueError(f"data={self.data.kind} needs {', '.join(missing)}: name a folder or a hub id for each")
        if self.model.save_converted and not self.model.checkpoint:
            raise ValueError("model.save_converted= keeps model.checkpoint= in our layout: name that too, or neither")
        if self.resume not in (None, "auto"):
            raise ValueError(f"resume={self.resume}: the only value is auto; the run's folder is output={self.output}")
        if self.validation not in ("all", "round_robin"):
            raise ValueError(f"validation={self.validation}: choose all or round_robin")
        if self.validation == "round_robin" and self.data.val_count < 8:
            raise ValueError(f"validation=round_robin needs data.val_count={self.data.val_count} to be at least 8")
        for name, value in (("steps", self.steps), ("sample.count", self.sample.count), ("sample.steps", self.sample.steps)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def each(help):
    """A field whose key may be given several times, of values taken from the command line as they stand."""
    return field(default_factory=list, metadata={"help": help, "verbatim": True})


@dataclass
class ControlConfig:
    """The ControlNets that `infer.py` draws with: `checkpoint` once for each, the other keys once for all or once for each."""

    checkpoint: list[str] = each("a ControlNet, a file or folder of any layout or a hub id; once for each net")
    scale: list[float] = each("strength; 1 if not given; this and the next once for all nets or once for each")
    start: list[float] = each("part of the steps before which the net is off; 0 if not given")
    end: list[float] = each("part of the steps after which the net is off; 1 if not given")
    mode: list[str] = each(f"of a union net: {', '.join(MODES)}, or a number; none for other nets")
    save_converted: list[str] = each("where to keep controlnet.checkpoint in our own layout, as model.save_converted")

    def controls(self, pictures):
        """A `Control` for each net and its picture, checked; raises `ValueError` where there are not as many."""
        count, columns = len(self.checkpoint), {}
        if len(pictures) != count:
            raise ValueError(
                f"controlnet.checkpoint= is given {count} times and control_image= {len(pictures)} times: give one picture a net"
            )
        for name in ("scale", "start", "end", "mode", "save_converted"):
            values = getattr(self, name)
            if values and (not count or len(values) not in (1, count)):
                raise ValueError(f"controlnet.{name}= is given {len(values)} times, and controlnet.checkpoint= {count} times")
            if values:
                columns[name] = values * count if len(values) == 1 else values
        found = [
            Control(*net, **{name: column[i] for name, column in columns.items()})
            for i, net in enumerate(zip(self.checkpoint, pictures))
        ]
        for control in found:
            control.validate()
        return found


@dataclass
class InferConfig:
    """Everything that `infer.py` takes."""

    model: ExpectedConfig = field(default_factory=ExpectedConfig)
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "what to draw; give it several times for several", "verbatim": True}
    )
    prompt_file: str | None = verbatim(None, "a text file with a prompt a line")
    negative_prompt: str = verbatim("", "what to steer away from, with true_cfg above 1; or empty")
    images_per_prompt: int = field(default=1, metadata={"help": "pictures of each prompt"})
    controlnet: ControlConfig = field(default_factory=ControlConfig)
    control_image: list[str] = each("the picture that a ControlNet follows, resized and cropped; once for each net")
    height: int | None = field(default=None, metadata={"help": "height in pixels; null: the checkpoint's own, else 1024"})
    width: int | None = field(default=None, metadata={"help": "width in pixels; null: the checkpoint's own, else 1024"})
    steps: int | None = field(default=None, metadata={"help": "Euler steps; null: the checkpoint's own, else 28 (schnell 4)"})
    guidance: float | None = field(default=None, metadata={"help": "guidance embedding; null: the checkpoint's own, else 3.5"})
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "T5 tokens that prompts are padded and cut to; null: the checkpoint's own, else 512 (schnell 256)"},
    )
    true_cfg: float = field(default=1.0, metadata={"help": "classifier-free guidance away from negative_prompt; 1 for none"})
    shift: str = field(
        default="auto",
        metadata={
            "help": "shift of t: auto (the checkpoint's scheduler_config.json, else resolution, or "
            "none without guidance), resolution, none, or a factor, t' = s*t / (1 + (s - 1)*t)"
        },
    )
    seed: int = field(default=0, metadata={"help": "picture i of prompt j depends on (seed, j, i) alone"})
    batch: int = field(default=8, metadata={"help": "pictures drawn at once"})
    offload: str = field(
        default="text",
        metadata={
            "help": "text: encoders and modulation are freed after use; all: blocks are streamed to a GPU too; none: all stays"
        },
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; null: what the machine has"})
    dtype: str | None = field(
        default=None, metadata={"help": "compute in bfloat16 or float32; null: bfloat16 where it is in hardware"}
    )
    compile: bool = field(
        default=False, metadata={"help": "compile each block (torch.compile): minutes at the start, faster steps"}
    )
    output: str = verbatim("outputs", "folder for the pictures; existing ones are never overwritten")

    def expected(self):
        """{field of FluxConfig: value} for what the command line says of the checkpoint's shape."""
        named = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(FluxConfig)}
        return {name: value for name, value in named.items() if value is not None}

    def validate(self):
        check_machine(self)
        if not self.prompt and not self.prompt_file:
            raise ValueError('prompt= is missing: name what to draw, as in prompt="red circle with blue background"')
        if self.prompt_file and not Path(self.prompt_file).is_file():
            raise ValueError(f"prompt_file={self.prompt_file} is not a file")
        if self.negative_prompt and not self.true_cfg > 1:
            raise ValueError(f"negative_prompt= needs true_cfg above 1, not {self.true_cfg}")
        if self.offload not in OFFLOAD:
            raise ValueError(f"offload={self.offload}: choose one of {', '.join(OFFLOAD)}")
        if self.control_image and not self.controlnet.checkpoint and self.model.checkpoint == TINY:
            self.controlnet.checkpoint = [TINY]
        self.controlnet.controls(self.control_image)
        for name in ("images_per_prompt", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.model.checkpoint:
            raise ValueError("model.checkpoint= is missing: name the folder of a pipeline, a transformer or a run")


def check_machine(config):
    """Fill `device` and `dtype` with what the machine has; refuse what it has not, and an output that cannot be a folder."""
    place = Path(config.output).expanduser()
    file = next((p for p in (place, *place.parents) if p.exists()), Path("/"))
    if not file.is_dir():
        raise ValueError(f"output={config.output}: {file} is a file; name a folder")
    config.device = config.device or parallel.default_device()
    kind = config.device.split(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and parallel.default_device() != "cuda"):
        raise ValueError(f"device={config.device}: this machine has {parallel.default_device()}")
    config.dtype = config.dtype or ("bfloat16" if parallel.has_bf16(config.device) else "float32")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype={config.dtype}: choose one of {', '.join(DTYPES)}")
    if config.compile:
        parallel.check_compiler(config.device)
    attention = config.model.attention
    if attention not in ATTENTION:
        raise ValueError(f"model.attention={attention}: choose one of {', '.join(ATTENTION)}")
    if kind == "cpu" and attention in ("cudnn", "efficient"):
        raise ValueError(f"model.attention={attention} needs a CUDA device: choose auto, flash or math on the CPU")
