"""fluxlite: FLUX.1 training and inference in plain PyTorch."""

import sys
from importlib import import_module

__version__ = "0.2.0"

PUBLIC = {
    "generate": "fluxlite.draw.generation",
    "load_pipeline": "fluxlite.draw.pipeline",
    "load_transformer": "fluxlite.weights.sources",
    "Control": "fluxlite.draw.control",
    "Redux": "fluxlite.draw.redux",
    "Lora": "fluxlite.weights.lora_files",
}

# Python's argv while it looks for the module of `-m`: `python -m fluxlite.data.fill50k` imports
# the packages above that first, and with them torch.
if sys.argv[:1] == ["-m"] and any(a.removeprefix("-m")[:9] == "fluxlite." for a in sys.orig_argv):
    import_module("fluxlite.cli.programs").stop_at_once()


def __getattr__(name):
    """`fluxlite.generate` and the other names of `PUBLIC`, imported when first asked for."""
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'fluxlite' has no attribute {name!r}")
