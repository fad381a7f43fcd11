"""The command line. It parses first; torch is imported when there is something to do.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted (143: terminated).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from protopush import __version__
from protopush.cli.commands import (
    app,
    compare,
    data,
    demo,
    evaluate,
    explain,
    export,
    forbid,
    predict,
    push,
    report,
    train,
    verify,
)
from protopush.cli.parser import ABOUT
from protopush.errors import FailedElsewhere, InputError

INTERRUPTED = 130  # 128 + SIGINT, 128 + SIGTERM, as shells report them
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): what Ctrl-C ends, this ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except FailedElsewhere:  # the process where it failed says why
        return 2
    except InputError as error:
        print(f"protopush: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        advice = str(stop) or "what was saved is still there; train goes on with --resume"
        print(f"protopush: interrupted; {advice}", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _dispatch(words: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"protopush {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {words[0]!r}; {hint}")
    return COMMANDS[words[0]](words[1:])


def _complete() -> None:
    """Answer a shell that completes a line (argcomplete); a command's own parser does it for its options."""
    import argparse

    import argcomplete

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    whole = line.split()[1:] if line.endswith(" ") else line.split()[1:-1]  # the words before the one that is typed
    parser = argparse.ArgumentParser(add_help=False)
    for depth in range(1, 3):
        if " ".join(whole[:depth]) in ABOUT:
            os.environ["_ARGCOMPLETE"] = str(1 + depth)  # the words that argcomplete skips
            COMMANDS[whole[0]](whole[1:depth])
        names = [name.split() for name in ABOUT]
        choices = [name[depth - 1] for name in names if name[: depth - 1] == whole[: depth - 1] and len(name) >= depth]
        parser.add_argument(f"word{depth}", choices=choices)
    argcomplete.autocomplete(parser)


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {about}" for name, about in ABOUT.items())
    return (
        "usage: protopush COMMAND [options]\n\n"
        "Prototype image classifiers whose prototypes are real patches of real training images.\n\n"
        f"{commands}\n\n"
        "  protopush COMMAND --help lists a command's options; protopush --version prints the version."
    )


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "train": train,
    "push": push,
    "evaluate": evaluate,
    "predict": predict,
    "explain": explain,
    "report": report,
    "compare": compare,
    "verify": verify,
    "forbid": forbid,
    "app": app,
    "data": data,
    "export": export,
}
