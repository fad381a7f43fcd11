"""The program ``protopush``: a command with the signals, pipes and warnings of a shell around it.

:func:`main` is for calls within a process; it changes none of these. What takes time to import is imported in the
functions, so that an interrupt finds its handler from the start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, 128 + SIGTERM, 128 + SIGPIPE, as shells report them
TERMINATED = 143
PIPE_CLOSED = 141
ADVICE = {"predict": "the same command, without --overwrite, goes on where it stopped"}
ONE_KEYPRESS = 1.0  # seconds: a signal so soon after the first asks for nothing more


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): what Ctrl-C ends, this ends."""


class Stop:
    """What signals asked of the program: the first one is raised, and all that goes wrong after it is its doing."""

    def __init__(self) -> None:
        self.number, self.raised_at, self.process = 0, -ONE_KEYPRESS, os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a process that reads images, just forked: raising would break its start
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number = self.number or number
        if hasattr(signal, "SIGCHLD"):  # torch's handler raises where a process that reads images has ended as well
            signal.signal(signal.SIGCHLD, lambda *_: None)
        if _importing(frame):
            _send_again(number)
        elif time.monotonic() - self.raised_at >= ONE_KEYPRESS:
            self.raised_at = time.monotonic()
            raise self.error()

    def error(self) -> KeyboardInterrupt:
        """What ends the command."""
        return Terminated() if self.number == signal.SIGTERM else KeyboardInterrupt()


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is under way: some libraries swallow what is raised in theirs, others raise ImportError."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _send_again(number: int) -> None:
    import _thread
    import threading

    threading.Timer(0.05, _thread.interrupt_main, [number]).start()


STOP = Stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _code_of(words)
    except KeyboardInterrupt as stop:
        advice = ADVICE.get(words[0] if words else "", "what was saved is still there; train goes on with --resume")
        print(f"protopush: interrupted; {advice}", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _code_of(words: list[str]) -> int:
    try:
        from protopush.cli.parser import dispatch

        return dispatch(words)
    except Exception as error:
        if "DataLoader worker" in f"{error} {error.__cause__}":
            time.sleep(0.2)  # the signal that ended it may be on its way to this process
        if STOP.number:
            raise STOP.error() from error
        from protopush.errors import FailedElsewhere, InputError, first_line

        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            advice = ADVICE.get(words[0] if words else "", "train goes on with --resume")
            error = InputError(
                f"a process that reads images died ({first_line(error)}); expected memory for all of them; start the "
                f"same again with fewer --data.num_workers; {advice}"
            )
        if not isinstance(error, InputError):
            raise
        if not isinstance(error, FailedElsewhere):  # the process where it failed says why
            print(f"protopush: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command as a program; returns the exit code.

    SIGTERM ends it as Ctrl-C does. A reader that has gone (``| head``) ends it without a word, at the first print that
    fails: the log is no such print, so that a training goes on without its readers. Warnings of libraries are for those
    who call these libraries; ``python -W`` or PYTHONWARNINGS shows them.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: closed by the caller
    for stream in streams:
        if isinstance(stream, TextIOWrapper):  # names that the terminal can't show, or that are no text
            with suppress(OSError):  # a descriptor that was a file before
                stream.reconfigure(errors="backslashreplace")
    try:
        STOP.process = os.getpid()
        if "RANK" not in os.environ:  # torchrun ends its processes itself, also out of a collective that waits
            signal.signal(signal.SIGTERM, STOP)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
                signal.signal(signal.SIGINT, STOP)
        sys.unraisablehook = _keep_interrupts
        if not sys.warnoptions:
            import warnings

            warnings.simplefilter("ignore")
        try:
            code = main(argv)
        except SystemExit as done:  # a command's --help
            code = int(done.code or 0)
        for stream in streams:
            stream.flush()
        return code
    except BrokenPipeError:
        abandoned = [_drop_if_abandoned(stream) for stream in streams]
        if not any(abandoned):
            raise  # some other pipe
        return PIPE_CLOSED
    except KeyboardInterrupt as stop:  # before or after a command
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _keep_interrupts(lost: UnraisableHookArgs) -> None:
    """Send a signal again that came while an object was destroyed, where Python ignores what is raised.

    Without this a Ctrl-C between two epochs, when a loader's processes are taken down, is printed and forgotten.
    """
    if isinstance(lost.exc_value, KeyboardInterrupt):
        STOP.raised_at = -ONE_KEYPRESS
        _send_again(STOP.number or signal.SIGINT)
    elif "DataLoaderIter" not in getattr(lost.object, "__qualname__", ""):  # one that was interrupted half-made
        sys.__unraisablehook__(lost)


def _drop_if_abandoned(stream: TextIO) -> bool:
    """Whether the reader of a stream has gone; then what is left for it goes nowhere, and the exit is quiet."""
    import select

    if hasattr(select, "poll"):  # not on Windows, where only its readers break a pipe of ours
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLERR)
        if not poll.poll(0):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return True
