"""The sections of `gpu.py`: each is a function (scale, clock) that yields rows as it measures them.

A row is {"what": what was measured, "note": what is to be said of it} and, where they are known,
"ms", "ratio" (diffusers' time over ours), "tflops", "mfu", "gb" (the GPU's peak), "failed".
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from convert import forget_files
from safetensors.torch import save_file
from side_by_side import (
    TEXT_TOKENS,
    alternate_steps,
    configure_step,
    diffusers_step,
    make_inputs,
    make_models,
    our_step,
    our_steps,
    random_state,
    seconds_of,
    their_step,
)

from fluxlite import parallel
from fluxlite.cli.devices import float8_conflicts
from fluxlite.nets.autoencoder import Autoencoder
from fluxlite.nets.configs import AutoencoderConfig, FluxConfig
from fluxlite.nets.flux import Flux
from fluxlite.nets.latents import num_image_tokens
from fluxlite.parallel import compilation
from fluxlite.train.metrics import peak_tflops
from fluxlite.weights import sources, writing
from fluxlite.weights.diffusers_configs import config_to_diffusers
from fluxlite.weights.verify import build_diffusers

SCRIPT = Path(__file__).with_name("gpu.py")
ROOT = SCRIPT.parents[1]
TRAINING_BYTES = 19  # a parameter: float32, gradient, two of AdamW, and a share of activations
FITTING = 0.85  # of a GPU's memory that is counted on


@dataclass(frozen=True)
class Scale:
    """What is measured, and on what."""

    device: str = "cuda"
    ranks: int = 1  # GPUs
    memory: int = 0  # bytes of each
    shape: FluxConfig = field(default_factory=FluxConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    sides: tuple = (1024, 512)
    text: int = TEXT_TOKENS
    repeats: int = 5
    count: int = 5  # steps in a row
    file_bytes: int = 4 * 10**9  # of the checkpoint that is loaded

    @property
    def whole(self):
        return f"{self.shape.num_double_blocks} + {self.shape.num_single_blocks}"

    def fitted(self, bytes_each, memory):
        """The scale at the greatest depth whose parameters fit, with so many bytes each."""
        with torch.device("meta"):
            size = Flux(self.shape).num_parameters()
        part = min(1, FITTING * memory / (size * bytes_each))
        depths = ("num_double_blocks", "num_single_blocks")
        fewer = {name: max(1, int(part * getattr(self.shape, name))) for name in depths}
        return replace(self, shape=replace(self.shape, **fewer))

    def depth_note(self, whole):
        """What a row says of a model that is not `whole`."""
        return "" if self.whole == whole else f"{self.whole} of {whole} blocks"


TINY = Scale(
    device="cpu",
    memory=10**12,
    shape=FluxConfig(1, 2, 64, 4, 4, 16, 16, 20, 14, True, (4, 6, 6)),
    autoencoder=AutoencoderConfig((8, 16), 1, 4, norm_num_groups=4),
    sides=(64, 32),
    text=16,
    repeats=1,
    count=1,
    file_bytes=10**6,
)


class Clock:
    """How much of a section's time is left."""

    def __init__(self, seconds):
        self.end, self.slowest = time.perf_counter() + seconds, 0.0

    def left(self):
        return self.end - time.perf_counter()


def skipped_row(what, why):
    return {"what": what, "note": f"skipped: {why}"}


def attempt_each(variants, measure, clock):
    """Rows of `measure(*variant)` for each {name: variant}, as they come.

    One that is out of memory or of time is named.
    """
    for number, (name, variant) in enumerate(variants.items()):
        began = time.perf_counter()
        if clock.left() < clock.slowest:
            for late in list(variants)[number:]:
                yield skipped_row(late, f"{max(0, clock.left()):.0f} s were left")
            return
        try:
            yield {"what": name} | measure(*variant)
        except torch.OutOfMemoryError:
            yield skipped_row(name, "out of memory")
        free_memory()
        clock.slowest = max(clock.slowest, time.perf_counter() - began)


def free_memory():
    """Forget compiled code and give freed memory back."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- measuring ------------------------------------------------------------------------------------


def reset_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gb():
    """The most that tensors on the GPU took since `reset_peak`; None without one."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def speed_of(scale, seconds, tflop):
    """What a row says of a step that took so long: ms, TFLOP/s and MFU."""
    peak, rate = peak_tflops(scale.device), tflop / seconds
    return {"ms": 1e3 * seconds, "tflops": rate, "mfu": rate / peak if peak else None}


def forward_tflop(scale, side):
    with torch.device("meta"):
        model = Flux(scale.shape)
    return model.forward_flops(scale.text, num_image_tokens(side // 8, side // 8)) / 1e12


def measure_steps(scale, steps, side):
    """{name: row} of steps, one after the other; the first call's seconds are its note."""
    first = {name: seconds_of(step)[0] for name, step in steps.items()}
    reset_peak()
    times = alternate_steps(steps, scale.repeats, scale.count)
    tflop, gb = forward_tflop(scale, side), peak_gb()
    rows = {}
    for name, seconds in times.items():
        note = f"first call {first[name]:.0f} s" if first[name] > 1 else ""
        rows[name] = speed_of(scale, seconds, tflop) | {"gb": gb, "note": note}
    return rows


def relative_error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def join_notes(*notes):
    return ", ".join(note for note in notes if note)


# --- processes ------------------------------------------------------------------------------------


def run_limited(command, seconds, **options):
    """A process that has ended; None where it was killed since its time was up, in a session of its
    own with all that it had started.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    process = subprocess.Popen(command, **pipes, **options)
    try:
        out = process.communicate(timeout=max(1, seconds))
        return subprocess.CompletedProcess(command, process.returncode, *out)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            kill = partial(os.killpg, process.pid) if options else process.send_signal
            kill(signal.SIGKILL)
            process.wait()


def last_words(text):
    """The last line of what a process said."""
    return "".join(text.strip().splitlines()[-1:]) or "no word"


def child_arguments(scale, section, seconds, result):
    """The command line of the process of a section."""
    where = ["--tiny"] if scale.device == "cpu" else []
    return ["--section", section, "--seconds", f"{seconds:.0f}", "--result", result, *where]


# --- sections: each yields rows -------------------------------------------------------------------


def test_rows(scale, clock):
    """`pytest -m gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rf"]
    found = run_limited([*command, "-n", "4", "tests/test_gpu.py"], clock.left())
    if found is None:
        yield skipped_row("pytest -m gpu", "it took too long; run it by itself")
        return
    lines = found.stdout.strip().splitlines() or [found.stderr.strip()[-500:]]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    note = lines[-1].strip("= ")
    yield {"what": "pytest -m gpu", "note": note, "failed": found.returncode not in (0, 5)}
    for line in failed:
        yield {"what": line, "note": "", "failed": True}


@torch.inference_mode()
def forward_rows(scale, clock):
    """A step of our sampler beside diffusers', eager and compiled."""
    whole, scale = scale.whole, scale.fitted(2.4, scale.memory)  # bf16, what is laid out anew
    theirs, ours = make_models(scale.shape, torch.bfloat16, scale.device)

    def measure(side, compiled):
        inputs, ids = make_inputs(scale.shape, side, torch.bfloat16, scale.device, scale.text)
        steps = {"diffusers": diffusers_step(theirs, inputs, ids)}
        steps["ours"] = our_steps(ours, inputs, ids)[0]
        error = relative_error(steps["ours"](), steps["diffusers"]())
        rows = measure_steps(scale, steps, side)
        rows["ours"]["note"] = join_notes(rows["ours"]["note"], f"differs by {error:.1e}")
        suffix = ", compiled" if compiled else ""
        return {f"{side}², {name}{suffix}": row for name, row in rows.items()}

    yield from both_rows(scale, whole, clock, partial(measure, compiled=False), "eager")
    compile_theirs(theirs)
    parallel.compile_blocks(ours)
    yield from both_rows(scale, whole, clock, partial(measure, compiled=True), "compiled")


def both_rows(scale, whole, clock, measure, kind):
    """Rows of diffusers and ours at each side of a picture that there is time for."""
    for side in scale.sides:
        began = time.perf_counter()
        if clock.left() < clock.slowest:
            yield skipped_row(f"{side}², {kind}", f"{max(0, clock.left()):.0f} s were left")
            continue
        base = None
        for name, row in measure(side).items():
            base = base or row["ms"]
            note = join_notes(scale.depth_note(whole), row["note"])
            yield {"what": name} | row | {"note": note, "ratio": base / row["ms"]}
        clock.slowest = max(clock.slowest, time.perf_counter() - began)


def training_config(scale, checkpointing, compiled, options=()):
    """The `TrainConfig` of a step at this scale."""
    shape = asdict(scale.shape)
    shape["rope_axes"] = str(list(shape["rope_axes"])).replace(" ", "")
    return configure_step(
        shape,
        side=scale.sides[0],
        dtype="bfloat16",
        device=scale.device,
        text=scale.text,
        options=[
            f"parallel.activation_checkpointing={checkpointing}",
            f"compile={str(compiled).lower()}",
            *options,
        ],
    )


def measure_training(scale, who, checkpointing, compiled, options=(), note="", forwards=3):
    """A row of a training step of "ours" or "diffusers", which costs as many `forwards`; its peak
    memory with weights, gradients and optimizer.
    """
    config = training_config(scale, checkpointing, compiled, options)
    reset_peak()
    if who == "ours":
        step, _ = our_step(config)
    else:
        step = their_step(
            config, checkpointing, prepare=compile_theirs if compiled else leave_alone
        )
    first, loss = seconds_of(step)
    seconds = alternate_steps({who: step}, scale.repeats, scale.count)[who]
    row = speed_of(scale, seconds, forwards * forward_tflop(scale, scale.sides[0]))
    note = join_notes(note, f"first step {first:.0f} s" if first > 1 else "")
    return row | {"gb": peak_gb(), "note": note, "loss": loss.item()}


def compile_theirs(model):
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend=compilation.BACKEND)


def leave_alone(model):
    pass


def train_rows(scale, clock):
    """A training step with each checkpointing, ours beside diffusers'."""
    whole, scale = scale.whole, scale.fitted(TRAINING_BYTES, scale.memory)
    note = scale.depth_note(whole)
    variants = {}
    for who, kind, compiled, attention in (
        ("diffusers", "full", False, "flash"),
        ("ours", "selective", True, "auto"),
        ("ours", "full", True, "auto"),
        ("ours", "none", True, "auto"),
        ("diffusers", "none", False, "flash"),
        ("ours", "none", False, "flash"),
        ("ours", "none", False, "auto"),
        ("diffusers", "none", True, "flash"),
    ):
        words = f"{scale.sides[0]}², {who}", f"checkpointing {kind}"
        name = ", ".join([*words, *["compiled"] * compiled, *["flash"] * (attention == "flash")])
        variants[name] = scale, who, kind, compiled, [f"model.attention={attention}"], note
    yield from attempt_each(variants, measure_training, clock)
    parallel.stop_ranks()


def lora_rows(scale, clock):
    """A training step of a LoRA, its base in bfloat16 and in less."""
    whole, scale, variants = scale.whole, scale.fitted(3, scale.memory), {}
    for kind in ("none", "int8", "nf4"):
        base = "bfloat16" if kind == "none" else f"{kind}, lossy"
        options = ["lora=default", f"model.quantize={kind}"], scale.depth_note(whole), 2
        name = f"{scale.sides[0]}², LoRA beside {base}, checkpointing full"
        variants[name] = scale, "ours", "full", False, *options
    yield from attempt_each(variants, measure_training, clock)
    parallel.stop_ranks()


def float8_rows(scale, clock):
    """A step of our sampler and of our training in float8 beside bfloat16, compiled. Lossy."""
    hidden = scale.shape.hidden_size
    conflicts = float8_conflicts("float8", scale.device, "bfloat16", hidden)
    reason = next((text for holds, text in conflicts if holds), None)
    if reason:
        yield skipped_row("float8", reason)
        return
    side, whole, drawn = scale.sides[0], scale.whole, scale.fitted(2.4, scale.memory)
    for name, row in draw_in_float8(drawn, side).items():
        note = join_notes(drawn.depth_note(whole), row["note"])
        yield {"what": f"{side}², drawing, {name}"} | row | {"note": note}
    free_memory()
    trained, variants = scale.fitted(TRAINING_BYTES, scale.memory), {}
    for kind in ("none", "rowwise", "tensorwise"):
        name = f"{side}², training, {'bfloat16' if kind == 'none' else f'float8 {kind}, lossy'}"
        options = trained, "ours", "selective", True, [f"parallel.float8={kind}"]
        variants[name] = *options, trained.depth_note(whole)
    yield from attempt_each(variants, measure_training, clock)
    parallel.stop_ranks()


@torch.inference_mode()
def draw_in_float8(scale, side):
    """{name: row} of our compiled step in bfloat16, and with linears rounded to float8."""
    with torch.device("meta"):
        ours = Flux(scale.shape)
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    ours.load_state_dict(random_state(shapes, torch.bfloat16, scale.device), assign=True)
    ours.eval().requires_grad_(False)
    inputs, ids = make_inputs(scale.shape, side, torch.bfloat16, scale.device, scale.text)
    rows, results = {}, []
    quantize = partial(parallel.quantize_linears, device=scale.device)
    for name, prepare in (("bfloat16", leave_alone), ("float8, lossy", quantize)):
        prepare(ours)
        torch._dynamo.reset()
        step = our_steps(parallel.compile_blocks(ours), inputs, ids)[0]
        results.append(step())
        rows |= measure_steps(scale, {name: step}, side)
    error = relative_error(results[1], results[0])
    rows[name]["note"] = join_notes(rows[name]["note"], f"differs by {error:.1e}")
    return rows


def loading_rows(scale, clock):
    """A mapped checkpoint to the device, out of a cold and a warm page cache."""
    scale = scale.fitted(2, scale.file_bytes)
    config = scale.shape
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder, "transformer"), Path(folder, "ours.safetensors")
        theirs.mkdir()
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in build_diffusers(config).named_parameters()}
        state = random_state(shapes, torch.bfloat16, scale.device)
        file = theirs / "diffusion_pytorch_model.safetensors"
        save_file({name: value.cpu() for name, value in state.items()}, file)
        (theirs / "config.json").write_text(json.dumps(config_to_diffusers(config)))
        writing.write_converted(sources.open_source(str(theirs)), ours)
        del state
        for path, name in ((theirs, "diffusers' folder"), (ours, "our layout")):
            for cache in ("cold", "warm"):
                files = sources.open_source(str(path)).files
                if cache == "cold":
                    forget_files(files)
                yield {"what": f"{name}, {cache} page cache"} | load_once(scale, path)
                free_memory()


def load_once(scale, path):
    """A row of one loading of a transformer."""
    load = partial(sources.load_transformer, str(path), device=scale.device)
    seconds, model = seconds_of(load)
    size = sum(p.nbytes for p in model.parameters())
    return {"ms": 1e3 * seconds, "note": f"{size / 1e9:.1f} GB, {size / 1e9 / seconds:.2f} GB/s"}


@torch.inference_mode()
def autoencoder_rows(scale, clock):
    """A decoding of one picture, ours beside diffusers'."""
    config, side = scale.autoencoder, scale.sides[0]
    with torch.device("meta"):
        ours, theirs = Autoencoder(config), build_diffusers(config)
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    state = random_state(shapes, torch.bfloat16, scale.device)
    for model in (ours, theirs):
        model.load_state_dict(state, assign=True)
        model.eval().requires_grad_(False)
    cells = side // config.downsampling
    options = dict(dtype=torch.bfloat16, device=scale.device)
    latents = torch.randn(1, config.latent_channels, cells, cells, **options)
    unscaled = latents / config.scaling_factor + config.shift_factor
    steps = {
        "diffusers": lambda: theirs.decode(unscaled).sample,
        "ours": lambda: ours.decode(latents),
    }
    error = relative_error(steps["ours"](), steps["diffusers"]())
    base = None
    for name, step in steps.items():
        reset_peak()
        seconds = alternate_steps({name: step}, scale.repeats)[name]
        base = base or seconds
        note = f"differs by {error:.1e}" if name == "ours" else ""
        row = {"ms": 1e3 * seconds, "gb": peak_gb(), "note": note, "ratio": base / seconds}
        yield {"what": f"{side}², {name}, decoding"} | row


MESHES = {  # of several GPUs
    "FSDP2": [],
    "tp 2": ["parallel.tp=2"],
    "tp 2, sequence parallel": ["parallel.tp=2", "parallel.sequence_parallel=true"],
}


def mesh_rows(scale, clock):
    """A training step on all GPUs there are, by FSDP2 and with tensor parallelism."""
    if scale.ranks == 1:
        yield skipped_row("FSDP2 and tensor parallelism", "there is one GPU")
        return
    kept = {name: (name,) for name in MESHES if "tp" not in name or scale.ranks % 2 == 0}
    yield from attempt_each(kept, partial(run_ranks, scale, clock), clock)


def run_ranks(scale, clock, name):
    """The row of `rank_rows` on all ranks, under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(scale.ranks)]
    options = ["--mesh", name, "--ranks", str(scale.ranks)]
    with tempfile.NamedTemporaryFile("r") as file:
        own = child_arguments(scale, "ranks", clock.left(), file.name)
        found = run_limited([*launch, str(SCRIPT), *own, *options], clock.left())
        rows = [json.loads(line) for line in file.read().splitlines()]
        if rows:
            return rows[0]
        if found is None:
            return {"note": "skipped: it took too long"}
        return {"note": f"failed: {last_words(found.stderr)}", "failed": True}


def rank_rows(scale, clock, mesh="FSDP2"):
    """A training step on this rank and the others."""
    whole, ranks = scale.whole, parallel.world_size()
    scale = scale.fitted(TRAINING_BYTES, scale.memory * ranks)
    options = MESHES[mesh], scale.depth_note(whole)
    row = measure_training(scale, "ours", "selective", True, *options)
    sharing = 2 if "tp" in mesh else 1  # ranks that work at one sample
    shares = {name: row[name] and row[name] / sharing for name in ("tflops", "mfu")}
    samples = 1e3 * ranks / sharing / row["ms"]
    note = join_notes(f"{ranks} ranks, selective, {samples:.3g} samples/s", row["note"])
    yield {"what": mesh} | row | shares | {"note": note}
    parallel.stop_ranks()


# name: (what yields its rows, seconds that it may take on one GPU)
SECTIONS = {
    "tests": (test_rows, 110),
    "forward": (forward_rows, 105),
    "train": (train_rows, 105),
    "lora": (lora_rows, 45),
    "float8": (float8_rows, 45),
    "loading": (loading_rows, 30),
    "autoencoder": (autoencoder_rows, 20),
    "meshes": (mesh_rows, 20),
}
MESH_SECONDS = 240  # of several GPUs
