"""Signals, parents and children of a program.

Imports nothing heavy: `run_program` needs it in a program's first moment.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@contextmanager
def held_signals():
    """Write SIGTERM and SIGINT down, do not act on them; yields {"number": the first one's, or 0}.

    A second SIGINT kills. A second SIGTERM does not: a scheduler and torchrun may both pass one on.
    """
    caught = {"number": 0}

    def write_down(number, _frame):
        caught["number"] = caught["number"] or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield caught
        return
    before = {number: signal.signal(number, write_down) for number in STOP_SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred_signals():
    """Let no SIGTERM and no SIGINT interrupt the block; one that came is acted on after it."""
    with held_signals() as caught:
        yield
    if caught["number"]:
        signal.raise_signal(caught["number"])


def die_with_parent(parent):
    """Have the kernel kill this process when its parent, of the pid `parent`, ends in whatever way.

    Linux alone can do that. Elsewhere this does nothing.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def serve_parent(parent):
    """Make this a process that its parent alone ends: what stops a program stops its children
    so.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)


def end_children():
    """Kill the children that `multiprocessing` started and that are left."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def end_children_at_exit():
    """Have `end_children` called at exit, before multiprocessing sends SIGTERM and waits.

    A child that is stuck and ignores SIGTERM would be waited for without end.
    """
    atexit.unregister(end_children)
    atexit.register(end_children)


def leave_process(code):
    """End this process with every exit function called, but without taking the interpreter apart.

    A thread of torch's gloo may still hold the tensors of a collective that is over. Where it lets
    go of them while the interpreter goes, the process aborts (pytorch/pytorch#179291).
    """
    threading._shutdown()  # what Python itself calls, in its order
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
