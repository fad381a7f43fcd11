"""Programs in real processes that need not import PyTorch again: each is forked from a server that has imported it.

A process has its own signals, group, streams and exit code, as ``python -m protopush`` has; only its first seconds are
not those of a fresh interpreter. Where these are what a test is about, it starts the interpreter itself.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

PROTOPUSH = "import sys; from protopush.cli.program import run; sys.exit(run())"
TORCHRUN = "from torch.distributed.run import main; main()"
LIBRARIES = (
    "torchvision", "timm", "torchmetrics.functional", "lightning_fabric", "torch.distributed.run",
    "protopush.cli.commands", "protopush.cli.parser", "protopush.cli.tables", "protopush.predict.prediction",
    "protopush.training.trainer",
)  # fmt: skip


class Forked:
    """``protopush WORDS``, or another program, in a process of its own, which leads a group of its own.

    Its stdout goes to ``out``, its stderr to ``err``: files, or a pipe that somebody reads.
    """

    def __init__(
        self,
        *words: object,
        program: str = PROTOPUSH,
        imported: tuple[str, ...] = LIBRARIES,
        out: Path | None = None,
        err: Path | None = None,
        cwd: Path | None = None,
        **variables: str,
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="forked-"))
        weakref.finalize(self, shutil.rmtree, folder)
        self.out, self.err = out or folder / "out", err or folder / "err"
        self.imported, self.returncode = imported, None
        self.pid = self.ask(
            program=program,
            words=[str(Path(sys.executable).parent / "protopush"), *map(str, words)],
            streams=[str(self.out), str(self.err)],
            cwd=str(cwd or Path.cwd()),
            environment=os.environ | {"OMP_NUM_THREADS": "1", **variables},
        )

    def ask(self, **question: Any) -> Any:
        """What the server answers."""
        streams = server(self.imported)
        assert streams.stdin is not None
        assert streams.stdout is not None
        print(json.dumps(question), file=streams.stdin, flush=True)
        return json.loads(streams.stdout.readline())

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self.ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """The exit code, once it has ended."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < until, f"it still runs: {self.stderr}"
            time.sleep(0.01)
        return code

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        return self.err.read_text()


def protopush(*words: object, **variables: str) -> Forked:
    """``protopush WORDS``, ended."""
    process = Forked(*words, **variables)
    process.wait()
    return process


def torchrun(*words: object, **variables: str) -> Forked:
    """``torchrun WORDS`` in two processes, both fresh interpreters, ended."""
    process = Forked("--standalone", "--nproc-per-node=2", *words, program=TORCHRUN, **variables)
    process.wait()
    return process


@cache
def server(imported: tuple[str, ...]) -> subprocess.Popen[str]:
    """What forks processes with these modules imported; it ends when its stdin does."""
    command = [sys.executable, __file__, *imported]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve(imported: list[str]) -> None:
    """Fork a process for each program that is asked for, and say how those that are asked about have ended.

    Those that a failed test has left are killed at the end.
    """
    running = set()
    sys.path.pop(0)  # the folder of this file, which no program has
    if "torchvision" in imported:
        import_module("protopush._compat").ensure_torchvision()
    for name in imported:
        import_module(name)
    gc.freeze()  # what is imported is not counted again in each process
    for line in sys.stdin:
        question = json.loads(line)
        if "ended" in question:
            ended, status = os.waitpid(question["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
            running.discard(ended)
        else:
            opened = [os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for file in question.pop("streams")]
            if not (answer := os.fork()):
                become(*opened, **question)
                return
            running.add(answer)
            for descriptor in opened:
                os.close(descriptor)
        print(json.dumps(answer), flush=True)
    for pid in running:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def become(out: int, err: int, program: str, words: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Run a program as if this process had been started for it."""
    os.setsid()
    for stream, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    tempfile.tempdir = None  # as TMPDIR says now
    sys.argv = words
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    serve(sys.argv[1:])
