"""How often the host waits for the device in a training step and in sampling, counted without one.

    python benchmarks/waits.py

Meta tensors stand in for a GPU's: they compute nothing, and every operator on them is seen. A wait
is what hands a number to the host (`.item()`, `if tensor`), a copy between host and device that is
not `non_blocking`, and what must know values to make its result (`nonzero`, a boolean mask). Seen
are the trainer's own loop and steps, with a loader, the frozen encoders, clipping, optimizer,
moving average and metrics, and the sampler. What is read a step late, when it has arrived, is no
wait. Two ranks and more are not seen.
"""

import sys
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from itertools import chain
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fluxlite import parallel
from fluxlite.cli.command_line import load_config
from fluxlite.draw.generation import generate, show_steps
from fluxlite.draw.offload import Feed
from fluxlite.draw.pipeline import load_pipeline
from fluxlite.preflight.prediction import tensors_in
from fluxlite.settings import TrainConfig
from fluxlite.train import loop
from fluxlite.train.metrics import Metrics, Throughput
from fluxlite.train.setup import assemble_run, encoded_split, find_split, load_parts
from fluxlite.train.tasks import choose_task
from fluxlite.train.tasks.task import place_models

aten = torch.ops.aten
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)
TINY = """data=mock model=flux_tiny model.num_double_blocks=1 model.num_single_blocks=1
    data.height=32 data.width=32 data.count=16 data.val_count=8
    data.micro_batch=2 data.global_batch=4 data.workers=0 device=cpu
    metrics.log_every=1 metrics.tensorboard=false metrics.progress=false optim.ema_decay=0.9
    """.split()
LATENTS = ["model.t5=null", "model.clip=null", "model.autoencoder=null"]


class WaitCount(TorchDispatchMode):
    """Notes each wait of the host for a meta tensor, as "operator at file:line"; what it would have
    read is made up.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.operators, self.constants = [], 0, HostConstants(self.note)

    def __enter__(self):
        self.constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.constants.__exit__(*error)

    def note(self, name):
        """Count a wait."""
        self.waits.append(f"{name} at {caller_place()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, tensors_in((args, kwargs))
        if torch.is_inference_mode_enabled():  # which takes no operator apart
            with torch._C.DisableTorchFunction(), self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self.operators += any(t.is_meta for t in tensors)
        if func.namespace == "c10d":
            return args[0], func(*on_host(args), **kwargs)[1]
        if func.overloadpacket is aten._fused_sgd_:
            return None  # torch has none for meta tensors
        waits = waits_for_device(func, args, kwargs, tensors)
        if waits:
            self.note(func.overloadpacket.__name__)
        if waits or copies_to_host(func, args, kwargs):
            return make_up_result(func, args, kwargs)
        return func(*args, **kwargs)


class HostConstants(TorchFunctionMode):
    """Notes what makes a tensor on meta of the host's numbers, and places in a list: copies that
    torch hides.
    """

    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (func in MAKERS and is_sent(args[0], kwargs)) or (
            func is torch.Tensor.__getitem__ and is_meta(args[0]) and has_list(args[1])
        ):
            self.note(func.__name__)
        return func(*args, **kwargs)


MAKERS = torch.tensor, torch.as_tensor, torch.asarray


def is_sent(values, kwargs):
    """Whether `torch.tensor(values, **kwargs)` sends the host's values to a device."""
    to = kwargs.get("device")
    return not is_meta(values) and to is not None and torch.device(to).type == "meta"


def has_list(places):
    """Whether places in a tensor are a list, or one of several is."""
    several = places if isinstance(places, tuple) else (places,)
    return any(isinstance(place, (list, np.ndarray)) for place in several)


def waits_for_device(func, args, kwargs, tensors):
    """Whether an operator makes the host wait for a device."""
    packet, devices = func.overloadpacket, {t.device.type for t in tensors}
    if packet in (aten._to_copy, aten.copy_):
        return crosses(func, args, kwargs) and not is_non_blocking(func, args, kwargs)
    if "meta" not in devices:
        return False
    if packet in INDEXED:
        indices = tensors_in(args[1])
        masks = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        return masks or not all(i.is_meta for i in indices)
    tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
    return any(tag in func.tags for tag in tags)


def crosses(func, args, kwargs):
    """Whether a copy goes from host to device or back."""
    to = args[1].device if func.overloadpacket is aten.copy_ else kwargs.get("device")
    return to is not None and torch.device(to).type != args[0].device.type


def copies_to_host(func, args, kwargs):
    if func.overloadpacket is aten.copy_:
        return args[1].is_meta and not args[0].is_meta
    return func.overloadpacket is aten._to_copy and crosses(func, args, kwargs) and args[0].is_meta


def is_non_blocking(func, args, kwargs):
    given = args[2] if func.overloadpacket is aten.copy_ and len(args) > 2 else False
    return given or kwargs.get("non_blocking", False)


def make_up_result(func, args, kwargs):
    """What an operator makes of `on_host`'s values, on the device unless it copies to the host."""
    out = func(*on_host(args), **on_host(kwargs))
    if copies_to_host(func, args, kwargs):
        return out
    return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, out)


def on_host(tree):
    """Meta tensors in a tree as zeros on the host, or as what is true."""
    return tree_map(
        lambda x: torch.full(x.shape, x.dtype == torch.bool, dtype=x.dtype) if is_meta(x) else x,
        tree,
    )


def is_meta(x):
    return isinstance(x, torch.Tensor) and x.is_meta


def caller_place():
    """The innermost line of code that is neither torch's nor of this mode."""
    frames = traceback.extract_stack()
    own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    return f"{own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno}"


# --- a run on meta --------------------------------------------------------------------------------


@contextmanager
def meta_run(*arguments):
    """(run, monitor, batches) of a tiny training on meta, as `take_steps` takes them; nothing is
    due after a step.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        given = {a.partition("=")[0]: a for a in (*TINY, *arguments, f"output={folder}")}
        config = load_config(TrainConfig, "train", given.values())
        stack.callback(parallel.stop_ranks)
        _, mesh = parallel.start_ranks(config.parallel, "cpu")
        supported = mock.patch.object(
            sys.modules[torch.optim.Optimizer.__module__],
            "_get_fused_kernels_supported_devices",
            lambda: ["meta"],
        )
        stack.enter_context(supported)
        stack.enter_context(mock.patch.object(loop, "finish_step", lambda *_: None))
        # weights are copied to a buffer and stay on meta: torch lets no parameter go there and back
        stack.enter_context(mock.patch.object(Feed, "_point", lambda *_, **__: None))
        run = assemble_meta_run(config, mesh)
        monitor = start_meta_monitor(run, folder)
        stack.callback(monitor.metrics.close)
        samples = encoded_split(config, run, "train", find_split(config, "train", {}))
        yield run, monitor, run.loader(samples, global_batch=4, start_index=0)


def assemble_meta_run(config, mesh):
    """A `Run` whose models, optimizers and encoders are on meta."""
    task, device = choose_task(config), torch.device("meta")
    models = [wrap(config, mesh) for wrap, _ in task.models]
    models = place_models(models, device, config.parallel.swap_blocks)
    parts = load_parts(config, torch.device("cpu"), mesh)
    if parts.encoders is not None:
        for part in (parts.encoders.t5, parts.encoders.clip, parts.autoencoder):
            part.to(device)
    return assemble_run(config, device, mesh, task, models, parts)


def start_meta_monitor(run, folder):
    """What watches a run on meta: metrics and speed."""
    metrics = Metrics(run.config.metrics, folder, total_steps=run.config.steps)
    return loop.RunMonitor(metrics, Throughput(flops_per_sample=1.0), [], [], None)


def count_training_waits(*arguments, steps=3):
    """The waits of so many training steps with the loop around them, a list of places; `arguments`
    are `train.py`'s. Raises `ValueError` where the steps were not taken on meta.
    """
    with meta_run(f"steps={steps}", *arguments) as (run, monitor, batches):
        with WaitCount() as count:
            loop.take_steps(run, monitor, batches, 0, {"number": 0})
        check_taken(count, run, steps)
    return count.waits


def check_taken(count, run, steps):
    """Raise `ValueError` unless a count saw steps that were taken."""
    groups = chain.from_iterable(optimizer.param_groups for optimizer in run.optimizers)
    rates = [group["lr"] for group in groups]
    if count.operators < 300 * steps or not any(rates):
        raise ValueError(f"{count.operators} operators in {steps} steps: no training was counted")


# --- drawing on meta ------------------------------------------------------------------------------


def meta_pipeline():
    """The shipped pipeline, its parts on meta."""
    pipeline = load_pipeline(device="cpu", dtype=torch.bfloat16)
    encoders = pipeline.encoders.t5, pipeline.encoders.clip
    for part in (*encoders, pipeline.transformer, pipeline.autoencoder):
        part.to("meta")
    pipeline.device = torch.device("meta")
    return pipeline


def count_sampling_waits(steps=3, **options):
    """The waits of drawing, from prompts to latents, a list of places; `options` are
    `generate`'s.
    """
    count = WaitCount()

    def stage(name):
        return WaitCount() if name == "autoencoder" else count  # which brings pixels to the host

    shown = dict(on_step=show_steps(disable=True), stage=stage, height=64, width=64)
    generate(["a", "b"], checkpoint=meta_pipeline(), steps=steps, **shown, **options)
    if count.operators < 100 * steps:
        raise ValueError(f"{count.operators} operators in {steps} steps: no drawing was counted")
    return count.waits


def main():
    for name, waits in (("training", count_training_waits()), ("sampling", count_sampling_waits())):
        print(f"host waits of 3 steps, {name}: {len(waits)}", *waits, sep="\n  ")


if __name__ == "__main__":
    main()
