"""What the fuzzers share: seeded cases, a time limit for each, and a verdict.

A fuzzer's test runs `SHORT` cases in the suite and `LONG` under `-m slow`; a failure prints the
seed that makes it again.
"""

import random
import signal
from contextlib import contextmanager

import pytest

from fluxlite.cli.messages import one_line

SHORT, LONG = 40, 2000
BOTH = [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]


@contextmanager
def time_limit(seconds):
    """Raise `AssertionError` in the main thread after so many seconds: a hang is a verdict too."""

    def expire(*_):
        raise AssertionError(f"hangs: not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_cases(count, case, *, seconds=20):
    """Run `case(random.Random(seed))` for each seed below `count`; returns the verdicts.

    A case returns what was accepted, or raises. One line for a user is the verdict "refused"; any
    other exception, and a hang, fail with the seed. The case itself asserts that what was accepted
    is right.
    """
    verdicts = []
    for seed in range(count):
        try:
            with time_limit(seconds):
                verdicts.append(("accepted", case(random.Random(seed))))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        except BaseException as error:
            line = one_line(error) if isinstance(error, Exception) else None
            if line is None or not line.strip():
                raise AssertionError(f"seed {seed}: a traceback: {error!r}") from error
            verdicts.append(("refused", line))
    return verdicts
