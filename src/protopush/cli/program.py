"""The program ``protopush``: a command with the signals, pipes and warnings of a shell around it.

:func:`protopush.cli.main` is for calls within a process; it changes none of these.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

from protopush.cli import TERMINATED, Terminated, main

PIPE_CLOSED = 141  # 128 + SIGPIPE, as shells report it


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command as a program; returns the exit code.

    SIGTERM ends it as Ctrl-C does. A reader that has gone (``| head``) ends it without a word, at the first print that
    fails: the log is no such print, so that a training goes on without its readers. Warnings of libraries are for those
    who call these libraries; ``python -W`` or PYTHONWARNINGS shows them.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: closed by the caller
    sys.unraisablehook = _keep_interrupts
    try:
        if "RANK" not in os.environ:  # torchrun ends its processes itself, also out of a collective that waits
            signal.signal(signal.SIGTERM, _terminate)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        code = _code_of(argv)
        for stream in streams:
            stream.flush()
        return code
    except BrokenPipeError:
        abandoned = [_drop_if_abandoned(stream) for stream in streams]
        if not any(abandoned):
            raise  # some other pipe
        return PIPE_CLOSED
    except Terminated:  # before or after a command
        return TERMINATED


def _code_of(argv: Sequence[str] | None) -> int:
    try:
        return main(argv)
    except SystemExit as done:  # a command's --help
        return int(done.code or 0)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _keep_interrupts(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again that came while an object was destroyed, where Python ignores what is raised.

    Without this a Ctrl-C between two epochs, when a loader's processes are taken down, is printed and forgotten.
    """
    if isinstance(lost.exc_value, KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT
        threading.Timer(0.05, _thread.interrupt_main, [number]).start()
    elif "DataLoaderIter" not in getattr(lost.object, "__qualname__", ""):  # one that was interrupted half-made
        sys.__unraisablehook__(lost)


def _drop_if_abandoned(stream: TextIO) -> bool:
    """Whether the reader of a stream has gone; then what is left for it goes nowhere, and the exit is quiet."""
    if hasattr(select, "poll"):  # not on Windows, where only its readers break a pipe of ours
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLERR)
        if not poll.poll(0):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True
