"""What programs say: warnings that all ranks share, and errors as one line.

Imports nothing heavy.
"""

import logging
import os
from contextlib import contextmanager

LONGEST = 1500  # characters of an error
REMARKING = "torchao", "torch.utils._pytree"


def is_first_rank():
    """Whether this process speaks where all ranks would say the same."""
    return int(os.environ.get("RANK", 0)) == 0


def warn_for_all(text, *values):
    """Log a warning that all ranks come to: rank 0 says it for all."""
    logger = logging.getLogger("fluxlite")
    logger.log(logging.WARNING if is_first_rank() else logging.DEBUG, text, *values)


@contextmanager
def quiet_torchao():
    """Without what is remarked where torchao is imported, by transformers too, on kernels and enums
    of its own.
    """
    levels = {log: log.level for log in map(logging.getLogger, REMARKING)}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


def on_rank():
    """What an error adds to say which rank it comes from; nothing where there is one."""
    return (
        f" on rank {os.environ.get('RANK', 0)}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    )


def one_line(error):
    """What to tell of an error that a user, a disk or the memory can cause; None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"out of memory ({text[:160] or 'of this machine'}): {REMEDIES}"
    if isinstance(error, OSError) and error.strerror:
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = f"{' → '.join(places) or 'a file'}: {error.strerror}"
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    return text if isinstance(error, (ValueError, OSError)) else None


REMEDIES = (
    "try smaller pictures, data.micro_batch or batch, dtype=bfloat16, offload=all when drawing, "
    "parallel.activation_checkpointing=full or more GPUs when training"
)
