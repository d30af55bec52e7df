"""One way to run a program: what a user or a disk can cause ends in one line, a bug in a traceback.

Imports nothing heavy, so that an interruption is caught from a program's first moment on.
"""

import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fluxlite.cli.messages import is_first_rank, on_rank, one_line
from fluxlite.cli.processes import STOP_SIGNALS, die_with_parent, leave_process

BUG = "FLUXLITE_TRACEBACK"  # set to 1: every error with its traceback


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: what is half written is removed on the way out, as after Ctrl-C."""


def run_program(body, *, usage=None, ranks=True):
    """Call `body(arguments)` with the command line's; never returns.

    Without `ranks` the program is one process: torchrun with several is refused.

    Exit codes: 2 and one line for what a user or a disk can cause, 130 after Ctrl-C, 143 after
    SIGTERM, 141 where the reader of our output is gone. `usage()` gives the text of --help.
    """
    arguments = sys.argv[1:]
    asks_help = usage and {"-h", "--help"} & set(arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun; a killed one cannot stop its ranks
        die_with_parent(os.getppid())
    for number in STOP_SIGNALS:
        signal.signal(number, _stopper())
    try:
        if asks_help:
            with stopping_at_once():
                from fluxlite.cli.shipped_help import find_help

                print(find_help(Path(sys.argv[0]).stem, arguments, usage), end="", flush=True)
        elif on_rank() and not ranks:
            raise ValueError("this program is one process: start it without torchrun")
        else:
            body(arguments)
        sys.stdout.flush()
        _let_go()
        leave_process(0)
    except Terminated:
        _end(143, _said_once("stopped by SIGTERM"))
    except KeyboardInterrupt:
        _end(130, _said_once("stopped"))
    except BrokenPipeError:
        _end(141, None)
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get(BUG):
            sys.excepthook(*sys.exc_info())
            leave_process(1)
        if not is_first_rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # rank 0 has spoken
            time.sleep(FIRST_SPEAKS)
        _end(2, f"error{on_rank()}: {line}")


def stop_at_once():
    """Until `run_program`, let Ctrl-C and SIGTERM end the program in their line and nothing else.

    For programs whose files import heavy libraries as they begin: an import that is interrupted
    raises whatever it likes.
    """
    signal.signal(signal.SIGINT, partial(_leave_with, 130, "stopped"))
    signal.signal(signal.SIGTERM, partial(_leave_with, 143, "stopped by SIGTERM"))


@contextmanager
def stopping_at_once():
    """`stop_at_once` for a block of imports, which leave nothing half done.

    torch's takes an exception for a lack of numpy.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop_at_once()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_with(code, line, *_):
    if is_first_rank():
        os.write(2, f"{line}\n".encode())
    os._exit(code)


FIRST_SPEAKS = 5  # seconds: the first rank to end has the others killed; it should be rank 0


SAME_SIGNAL = 2  # seconds in which a second SIGTERM is the first one, passed on by somebody else


def _stopper():
    """A handler that raises, again for a later signal: a library may have swallowed the first."""
    last = [float("-inf")]

    def stop(number, _frame):
        before, last[0] = last[0], time.monotonic()
        if number == signal.SIGTERM and last[0] - before < SAME_SIGNAL:
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    return stop


def _let_go():
    """Let a second Ctrl-C end the program at once. SIGTERM may be passed on twice: ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(code, line):
    _let_go()
    traceback.clear_frames(sys.exc_info()[2])  # closes what generators hold: bars, temporary files
    if line:
        print(line, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # its reader is gone, or its disk full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing to flush at exit
    leave_process(code)


def _said_once(line):
    """A line that rank 0 says for all."""
    return line if is_first_rank() else None
