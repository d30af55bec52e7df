"""fluxlite: FLUX.1 training and inference in plain PyTorch."""

from importlib import import_module

__version__ = "0.2.0"

PUBLIC = {
    "generate": "fluxlite.pipeline",
    "load_pipeline": "fluxlite.pipeline",
    "load_transformer": "fluxlite.checkpoint",
    "Control": "fluxlite.control",
}


def __getattr__(name):
    """`fluxlite.generate` and the other names of `PUBLIC`, imported when first asked for."""
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'fluxlite' has no attribute {name!r}")
