"""The command line. It parses first; torch is imported when there is something to do.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from protopush import __version__
from protopush.cli.checking import data, forbid, verify
from protopush.cli.looking import compare, evaluate, explain, report
from protopush.cli.options import ABOUT
from protopush.cli.predicting import predict
from protopush.cli.reviewing import app
from protopush.cli.sharing import export
from protopush.cli.training import demo, push, train
from protopush.errors import FailedElsewhere, InputError


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
    except KeyboardInterrupt:
        print("protopush: interrupted; what was saved is still there; train goes on with --resume", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
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


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {about}" for name, about in ABOUT.items())
    return (
        "usage: protopush COMMAND [options]\n\n"
        "Prototype image classifiers whose prototypes are real patches of real training images.\n\n"
        f"{commands}\n\n"
        "  protopush COMMAND --help tells a command's options; protopush --version tells the version."
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
