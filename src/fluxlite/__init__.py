"""fluxlite: FLUX.1 training and inference in plain PyTorch."""

from importlib import import_module

__version__ = "0.2.0"

PUBLIC = {
    "generate": "fluxlite.draw.pipeline",
    "load_pipeline": "fluxlite.draw.pipeline",
    "load_transformer": "fluxlite.weights.sources",
    "Control": "fluxlite.draw.control",
}


def __getattr__(name):
    """`fluxlite.generate` and the other names of `PUBLIC`, imported when first asked for."""
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module 'fluxlite' has no attribute {name!r}")
