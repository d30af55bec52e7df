"""fluxlite: FLUX.1 training and inference in plain PyTorch."""

__version__ = "0.2.0"


def __getattr__(name):
    """`fluxlite.generate`, `fluxlite.load_pipeline` and `fluxlite.Control`, imported when first asked for."""
    if name in ("generate", "load_pipeline", "Control"):
        from fluxlite import control, pipeline

        return getattr(control if name == "Control" else pipeline, name)
    raise AttributeError(f"module 'fluxlite' has no attribute {name!r}")
