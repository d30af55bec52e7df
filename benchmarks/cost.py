"""Our blocks beside diffusers': kernels, bytes, saved activations, counted; and the host's time.

    python benchmarks/cost.py                               # FLUX.1-dev at 1024², 512 text tokens
    python benchmarks/cost.py --side 256 --text 256 --batch 4

One double and one single block run in bf16 on meta tensors, which compute nothing, with inputs
like those that the whole model gives them. What eager torch would launch on an H100 is counted. An
operator under autograd that is no view is a kernel. It moves the bytes of its inputs and outputs, a
broadcast dimension once. GB are those of all kernels but matrix products (GEMM) and attention
(SDPA): what fusion could save. Where CUDA does what meta tensors do not, it is imitated:

* RMSNorm is one kernel, and both norms first copy an input that is not contiguous;
* SDPA is cuDNN's or flash, whose outputs lie in memory as q does. cuDNN's backward first copies a
  gradient that lies otherwise. Flash's wants (B, L, N, D) in memory; what it copies is not counted.

Saved for the backward is what a block's inputs and operators leave alive after its forward, but for
parameters, RoPE tables, modulation and what it returns.

Graphs of torch.compile are counted in one process for each checkpointing, which trains, validates
and draws with tiny models at three sizes. A compiled block's kernels and bytes are inductor's own
account of the code that it would make for this CPU, without the calls of GEMM and SDPA. A GPU's is
fused otherwise.

Host time is CPU time of this process for one step of 19 + 38 blocks so small that next to nothing
is computed: float32, one thread, a training step without its optimizer, the least of several
rounds. Clipping and moving average are measured by themselves; waits of the host are those of
`waits.py`. Prints a table and a JSON line.
"""

import argparse
import itertools
import json
import logging
import time
import weakref
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fluxlite import parallel
from fluxlite.draw import sampling
from fluxlite.nets import flow, schedule
from fluxlite.nets.configs import FluxConfig
from fluxlite.nets.flux import Flux, rope_table
from fluxlite.nets.latents import num_image_tokens, position_ids
from fluxlite.parallel import compilation
from fluxlite.preflight.prediction import tensors_in
from fluxlite.train import optim
from fluxlite.weights.verify import build_diffusers, diffusers_inputs

DEPTH = {"double": 19, "single": 38}
TINY = FluxConfig(19, 38, 32, 2, 4, 4, 4, 8, 8, True, (4, 6, 6))
CHECKPOINTING = ("none", "selective", "full")

# --- CUDA's choices, on meta tensors ------------------------------------------------------------


@torch.library.custom_op("fluxlite_cost::rms_norm", mutates_args=())
def launch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CUDA's fused RMSNorm: the result, and 1 / RMS in float32."""
    raise NotImplementedError("rms_norm is counted, not computed")


@torch.library.custom_op("fluxlite_cost::rms_norm_backward", mutates_args=())
def launch_rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight."""
    raise NotImplementedError("rms_norm_backward is counted, not computed")


@launch_rms_norm.register_fake
def _(x, weight):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@launch_rms_norm_backward.register_fake
def _(gradient, x, inverse, weight):
    return x.new_empty(x.shape), torch.empty_like(weight)


def save_for_rms_norm(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


def differentiate_rms_norm(ctx, gradient, _):
    return launch_rms_norm_backward(gradient, *ctx.saved_tensors)


launch_rms_norm.register_autograd(differentiate_rms_norm, setup_context=save_for_rms_norm)


def attend_with_cudnn(query, key, value, **_):
    aten = torch.ops.aten
    return aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, torch.is_grad_enabled()
    )[0]


def attend_with_flash(query, key, value, **_):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


SDPA = {"cudnn": attend_with_cudnn, "flash": attend_with_flash}


@contextmanager
def dispatch_as_cuda(sdpa):
    """RMSNorm and attention as CUDA would choose them."""

    def rms_norm(x, _shape, weight, eps=None):
        return launch_rms_norm(x, weight)[0]

    with mock.patch.multiple(F, rms_norm=rms_norm, scaled_dot_product_attention=SDPA[sdpa]):
        yield


# --- counting -----------------------------------------------------------------------------------

GEMM = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
FREE = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FILLS = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "fill_", "zero_"}
CONTIGUOUS = {  # how many of its first inputs an operator wants contiguous
    "rms_norm": 1,
    "native_layer_norm": 1,
    "rms_norm_backward": 2,
    "native_layer_norm_backward": 2,
}


class KernelCount(TorchDispatchMode):
    """Counts kernels, bytes of those that are neither GEMM nor SDPA, and what stays alive."""

    def __init__(self):
        super().__init__()
        self.kernels, self.rest_bytes, self.made = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
        name, given = func.overloadpacket.__name__, {storage_key(t) for t in inputs}
        made = [t for t in outputs if storage_key(t) not in given]
        self.watch(made)
        if name not in FREE and (made or func._schema.is_mutable):
            self.count_operator(name, inputs, outputs)
        return out

    def watch(self, tensors):
        """Count these as made here."""
        for t in tensors:
            self.made[storage_key(t)] = weakref.ref(t.untyped_storage())

    def count_operator(self, name, inputs, outputs):
        """Add a kernel, and one for each copy that it makes first."""
        copied = [t for t in inputs[: CONTIGUOUS.get(name, 0)] if not t.is_contiguous()]
        if name == "_scaled_dot_product_cudnn_attention_backward":
            gradient, output = inputs[0], inputs[4]
            copied = [gradient] if gradient.stride() != output.stride() else []
        self.kernels += 1 + len(copied)
        self.rest_bytes += 2 * count_bytes(copied)
        if name not in GEMM and "scaled_dot_product" not in name:
            self.rest_bytes += count_bytes(outputs if name in FILLS else inputs + outputs)

    def live_bytes(self):
        """Bytes of all that was made here and is still held by someone."""
        storages = (storage() for storage in self.made.values())
        return sum(storage.nbytes() for storage in storages if storage is not None)


def storage_key(tensor):
    return tensor.untyped_storage()._cdata


def count_bytes(tensors):
    """Bytes behind tensors, a broadcast dimension counted once."""
    total = 0
    for t in tensors:
        sizes = [size for size, stride in zip(t.shape, t.stride()) if stride]
        total += t.element_size() * torch.Size(sizes).numel()
    return total


# --- models and their inputs --------------------------------------------------------------------


def make_models(config, dtype, device):
    """{name: (model, double blocks, single blocks, its velocity as a function of a batch)}."""
    with torch.device(device):
        ours, theirs = Flux(config).type(dtype), build_diffusers(config)
    theirs.type(dtype)
    their_blocks = theirs.transformer_blocks, theirs.single_transformer_blocks
    our_blocks = ours.double_blocks, ours.single_blocks
    return {
        "diffusers": (theirs, *their_blocks, partial(call_diffusers, theirs)),
        "ours": (ours, *our_blocks, partial(call_flux, ours)),
    }


def make_batch(config, *, batch, side, text, dtype, device):
    """Inputs of a forward for pictures of `side` x `side` pixels."""
    cells = side // 8
    img = batch, num_image_tokens(cells, cells), config.in_channels
    shapes = dict(
        img=img, txt=(batch, text, config.text_width), pooled=(batch, config.pooled_width)
    )
    drawn = {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    t, guidance = (torch.full((batch,), value, device=device) for value in (0.5, 3.5))
    ids = position_ids(cells, cells, text).to(device)
    return drawn | dict(t=t, guidance=guidance, ids=ids, rope=rope_table(ids, config))


def call_flux(model, batch):
    """Our velocity of a batch."""
    return model(**{name: value for name, value in batch.items() if name != "ids"})


def call_diffusers(model, batch):
    """Diffusers' velocity of a batch."""
    inputs = {name: value for name, value in batch.items() if name not in ("ids", "rope")}
    return model(**diffusers_inputs(inputs, batch["ids"]))[0]


# --- blocks on meta -----------------------------------------------------------------------------


class ProduceLike(torch.autograd.Function):
    """A tensor like `x` that an earlier layer could have made: no one holds it but who needs it."""

    @staticmethod
    def forward(ctx, x, _root):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, _gradient):
        return None, None


def capture_call(block, run):
    """(args, kwargs) that `run()` calls `block` with."""
    calls = []
    hook = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    run()
    hook.remove()
    return calls[0]


def produce_inputs(call):
    """Inputs like those of a captured call, with a gradient where those have one."""
    root = torch.empty(0, device="meta", requires_grad=True)

    def produce(x):
        if not isinstance(x, torch.Tensor):
            return x
        return ProduceLike.apply(x.detach(), root) if x.requires_grad else x

    return tree_map(produce, call)


def is_tokens(x):
    """Whether an input is (B, L, H), rather than modulation or a table."""
    return x.ndim == 3 and x.shape[1] > 1


def measure_block(block, call):
    """Kernels and bytes of a block's forward and backward, and the bytes it saves between them."""
    args, kwargs = produce_inputs(call)
    with KernelCount() as forward:
        forward.watch(t for t in tensors_in((args, kwargs)) if is_tokens(t))
        outputs = tensors_in(block(*args, **kwargs))
    del args, kwargs
    saved = forward.live_bytes() - count_bytes(outputs)
    gradients = [torch.empty_like(t) for t in outputs]
    with KernelCount() as backward:
        torch.autograd.backward(outputs, gradients)
    return {
        "forward_kernels": forward.kernels,
        "forward_bytes": forward.rest_bytes,
        "backward_kernels": backward.kernels,
        "backward_bytes": backward.rest_bytes,
        "saved_bytes": saved,
    }


def measure_blocks(who, sdpa, checkpointing="none", config=None, **sizes):
    """{kind of block: `measure_block`'s figures} of "ours" or "diffusers", in bf16."""
    config = config or FluxConfig(num_double_blocks=1, num_single_blocks=1)
    model, doubles, singles, call = make_models(config, torch.bfloat16, "meta")[who]
    blocks = SimpleNamespace(double_blocks=doubles, single_blocks=singles)
    parallel.checkpoint_activations(blocks, checkpointing)
    batch = make_batch(config, dtype=torch.bfloat16, device="meta", **sizes)
    found = {}
    with dispatch_as_cuda(sdpa):
        for kind, block in (("double", doubles[0]), ("single", singles[0])):
            found[kind] = measure_block(block, capture_call(block, lambda: call(batch)))
    return found


def add_up(of_kinds):
    """The figures of FLUX.1-dev's depth."""
    double, single = of_kinds["double"], of_kinds["single"]
    return {n: DEPTH["double"] * double[n] + DEPTH["single"] * single[n] for n in double}


def count_model(who, sdpa, **sizes):
    """`measure_block`'s figures of all blocks, and what each kind of checkpointing saves."""
    of_kinds = {kind: add_up(measure_blocks(who, sdpa, kind, **sizes)) for kind in CHECKPOINTING}
    saved = {f"saved_bytes_{kind}": of_kinds[kind].pop("saved_bytes") for kind in CHECKPOINTING}
    return {"who": who, "sdpa": sdpa} | of_kinds["none"] | saved


# --- compiled blocks ----------------------------------------------------------------------------


def compile_model(model, checkpointing):
    """A model with compiled blocks, wrapped as `parallel.parallelize` does."""
    parallel.compile_blocks(model, checkpointing)
    if checkpointing != "selective":
        parallel.checkpoint_activations(model, checkpointing)
    return model


def count_graphs(checkpointing, sides=(64, 96, 128)):
    """{"graphs": how many there are after each size, "breaks"} of two blocks of each kind that
    train, validate and draw.
    """
    graphs, counted = [], torch._dynamo.utils.counters
    torch.compiler.reset()
    counted.clear()
    model = compile_model(
        Flux(replace(TINY, num_double_blocks=2, num_single_blocks=2)), checkpointing
    )
    for side in sides:
        sizes = dict(batch=2, side=side, text=4, dtype=torch.float32, device="cpu")
        batch = make_batch(model.config, **sizes)
        with mock.patch.object(compilation, "BACKEND", "aot_eager"):
            train_once(model.parameters(), partial(call_flux, model), batch)
            for without_gradient in (torch.no_grad, torch.inference_mode):
                with without_gradient():
                    call_flux(model, batch)
        graphs.append(counted["stats"]["unique_graphs"])
    return {"graphs": graphs, "breaks": sum(counted["graph_break"].values())}


class NotRun(Exception):
    """Raised in place of running a graph that is only counted."""


@contextmanager
def counting_code():
    """A list of (kernels, bytes) of what inductor plans, forward then backward; nothing is built or
    run.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor import compile_fx, config, metrics
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    planned, outside = [], (ExternKernelSchedulerNode, NopKernelSchedulerNode)

    def plan_graph(*args, **kwargs):
        metrics.reset()
        made = compile_fx.compile_fx_inner(*args, **kwargs)
        rest = [node for node, _ in metrics.nodes_num_elem if not isinstance(node, outside)]
        planned.append((len(rest), sum(node.get_read_write_buffers_sizes() for node in rest)))
        return made

    def lower(_kind, graph, inputs):
        compile_fx.compile_fx(graph, inputs, inner_compile=plan_graph)
        return refuse_to_run

    def refuse_to_run(*_):
        raise NotRun

    log = compile_fx.inductor_metrics_log
    with (
        mock.patch.object(compilation, "lower_graph", lower),
        mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_, **__: refuse_to_run),
        mock.patch.multiple(log, level=logging.INFO, propagate=False),
        autograd_config.patch(force_non_lazy_backward_lowering=True),
        config.patch(force_disable_caches=True),
    ):
        yield planned


def make_real(x):
    """A tensor on the CPU like one on meta, its memory never touched; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    like = dict(dtype=x.dtype, requires_grad=x.requires_grad)
    return torch.empty_strided(x.shape, x.stride(), device="cpu", **like)


def measure_compiled_blocks(checkpointing="none", config=None, **sizes):
    """{kind of block: figures as `measure_block`'s, of inductor's code for this CPU}, in bf16."""
    config, found = config or FluxConfig(num_double_blocks=1, num_single_blocks=1), {}
    batch = make_batch(config, dtype=torch.bfloat16, device="meta", **sizes)
    with torch.device("meta"):
        model = Flux(config).type(torch.bfloat16)
    for kind, [block] in (("double", model.double_blocks), ("single", model.single_blocks)):
        args, kwargs = tree_map(make_real, capture_call(block, lambda: call_flux(model, batch)))
        torch.compiler.reset()
        with counting_code() as planned, suppress(NotRun):
            block.to_empty(device="cpu")
            compilation.run_compiled(
                type(block), checkpointing == "selective", block, *args, **kwargs
            )
        (forward, forward_bytes), (backward, backward_bytes) = planned
        block.to("meta")
        found[kind] = {
            "forward_kernels": forward,
            "forward_bytes": forward_bytes,
            "backward_kernels": backward,
            "backward_bytes": backward_bytes,
        }
    return found


# --- host time ----------------------------------------------------------------------------------


def train_once(parameters, call, batch):
    """Forward, loss and backward; the gradients are dropped."""
    velocity = call(batch)
    flow.velocity_loss(velocity, batch["img"], torch.ones_like(batch["img"])).mean().backward()
    for p in parameters:
        p.grad = None


@torch.inference_mode()
def sample_diffusers(model, batch, steps):
    """The forwards of diffusers' pipeline."""
    for _ in range(steps):
        call_diffusers(model, batch)


def sampler_of_flux(model, batch, side, steps):
    """A function that denoises in so many steps, its conditions computed beforehand."""
    config = schedule.SampleConfig(height=side, width=side, steps=steps)
    times = schedule.times_for(config, model.config, batch["img"].shape[1])
    conditions = sampling.condition_net(model, batch["txt"], batch["pooled"], times, guidance=3.5)
    noise, rope = batch["img"], batch["rope"]
    return lambda: sampling.sample_latents(model, conditions, noise, rope, times)


def make_host_runs(steps, side=32):
    """{(who, figure): (a function to time, how many steps it takes)} of tiny models."""
    models = make_models(TINY, torch.float32, "cpu")
    batch = make_batch(TINY, batch=1, side=side, text=4, dtype=torch.float32, device="cpu")
    theirs, ours = models["diffusers"][0], models["ours"][0]
    runs = {
        ("diffusers", "sampling_ms"): (partial(sample_diffusers, theirs, batch, steps), steps),
        ("ours", "sampling_ms"): (sampler_of_flux(ours, batch, side, steps), steps),
    }
    for who, (model, _, _, call) in models.items():
        runs[who, "training_ms"] = partial(train_once, list(model.parameters()), call, batch), 1
    return runs


def measure_host(rounds, steps=10):
    """{who: {"sampling_ms", "training_ms"}}, the least CPU time of a step of tiny models."""
    runs = make_host_runs(steps)
    found = {who: {} for who, _ in runs}
    for _ in range(rounds):
        for (who, figure), (run, count) in runs.items():
            began = time.process_time()
            run()
            milliseconds = 1e3 * (time.process_time() - began) / count
            found[who][figure] = min(milliseconds, found[who].get(figure, milliseconds))
    return found


def measure_update(rounds):
    """The least CPU time in ms of clipping and moving average, for as many parameters as
    FLUX.1-dev has, all tiny.
    """
    parallel.start_ranks(parallel.ParallelConfig(), "cpu")
    model = Flux(TINY)
    groups, ema, found = optim.group_by_share(model), optim.EMA(model, 0.999), []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(40 * rounds):
        began = time.process_time()
        norm = optim.gradient_norm(groups)
        optim.clip_scale(norm, 1.0)
        ema.update(100, (~norm.isfinite()).float())
        found.append(1e3 * (time.process_time() - began))
    parallel.stop_ranks()
    return min(found)


# --- report -------------------------------------------------------------------------------------

COLUMNS = {
    "kernels, GB": 18,
    "forward": 16,
    "backward": 16,
    "saved, GB: no AC": 18,
    "selective": 11,
    "full": 7,
    "host ms: sampling": 19,
    "training": 10,
}


def print_line(cells):
    first, *rest = (f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values()))
    print(f"{first.strip():<{COLUMNS['kernels, GB']}}" + "".join(rest))


def both_phases(row):
    """Kernels and GB of forward and backward, as cells."""
    phases = "forward", "backward"
    return [f"{row[f'{p}_kernels']:,}, {row[f'{p}_bytes'] / 1e9:.1f}" for p in phases]


def print_compiled(compiled, graphs):
    """The compiled blocks' part of the table, a line for each checkpointing."""
    for kind, figures in compiled.items():
        print_line([f"ours, {kind}", *both_phases(figures)])
    for kind, figures in graphs.items():
        counts = ", ".join(map(str, figures["graphs"]))
        print(
            f"graphs, {kind}: {counts} after one, two and three sizes; {figures['breaks']} breaks"
        )


def print_table(rows, host):
    print_line(COLUMNS)
    for row in rows:
        cells = [f"{row['who']}, {row['sdpa']}", *both_phases(row)]
        cells += [f"{row[f'saved_bytes_{kind}'] / 1e9:.1f}" for kind in CHECKPOINTING]
        figures = (host[row["who"]][name] for name in ("sampling_ms", "training_ms"))
        print_line(cells + [f"{milliseconds:.1f}" for milliseconds in figures])


def main():
    from waits import count_sampling_waits, count_training_waits  # beside this program

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=1024, help="side of a picture in pixels")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--rounds", type=int, default=9, help="of the host's time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {name: getattr(args, name) for name in ("batch", "side", "text")}
    pairs = itertools.product(("diffusers", "ours"), SDPA)
    update = measure_update(args.rounds)  # first: beside other models it takes a third more
    rows = [count_model(*pair, **sizes) for pair in pairs]
    host = measure_host(args.rounds)
    host["ours"]["update_ms"] = update
    graphs = {kind: count_graphs(kind) for kind in ("none", "full", "2", "selective")}
    compiled = {
        kind: add_up(measure_compiled_blocks(kind, **sizes)) for kind in ("none", "selective")
    }
    waits = {"training": len(count_training_waits()), "sampling": len(count_sampling_waits())}
    tokens = f"{args.text} + {num_image_tokens(args.side // 8, args.side // 8)} tokens"
    print(f"FLUX.1-dev's 19 + 38 blocks, {args.side}², {tokens}, batch {args.batch}, bf16\n")
    print_table(rows, host)
    print(f"\nclipping + EMA host ms: {host['ours']['update_ms']:.2f}")
    print(f"host waits of 3 steps: training {waits['training']}, sampling {waits['sampling']}")
    print("\ncompiled by inductor, its code for this CPU; checkpointing")
    print_compiled(compiled, graphs)
    found = {"rows": rows, "host": host, "waits": waits, "compiled": compiled, "graphs": graphs}
    print(json.dumps({**found, **vars(args), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
