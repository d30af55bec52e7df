"""fluxlite: FLUX.1 training and inference in plain PyTorch."""

__version__ = "0.1.0"


def __getattr__(name):
    """`fluxlite.generate` and `fluxlite.load_pipeline`, imported when first asked for."""
    if name in ("generate", "load_pipeline"):
        from fluxlite import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'fluxlite' has no attribute {name!r}")
