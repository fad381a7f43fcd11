"""The program in a shell: pipes that close early, signals, colours, warnings, completion. All in real processes."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from forked import Forked
from helpers import SMALL, make_images, python
from protopush import InputError
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, Preprocessing

BIN = Path(sys.executable).parent
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script with ``protopush`` on its PATH."""
    variables = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False, env=variables
    )


@pytest.mark.parametrize(("words", "unbuffered"), [
    *((words, unbuffered) for words in ("--help", "train --help", "predict --help") for unbuffered in ("", "1")),
    ("evaluate {run} --json", "1"),
])  # fmt: skip
def test_a_reader_that_has_gone_is_no_error(home, words, unbuffered):
    """The reader ends before a word is written: the write fails whatever the buffering."""
    command = words.format(run=home / "run")
    done = bash(
        f"set -o pipefail; {{ sleep 0.3; protopush {command}; }} | true; echo ${{PIPESTATUS[0]}}",
        PYTHONUNBUFFERED=unbuffered,
    )
    assert done.stderr == ""
    codes = ("141", "0") if words.endswith(" --help") else ("141",)  # argparse drops what it can't write
    assert done.stdout.strip() in codes


def test_a_reader_that_has_gone_before_the_first_word_is_no_error(home, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    process = Forked("verify", home / "run", out=tmp_path / "pipe")
    os.close(reader)
    assert process.wait() == 141
    assert process.stderr == ""


def test_what_a_reader_took_is_a_success():
    done = bash("protopush --help | head -1; echo ${PIPESTATUS[0]}; protopush train --help | grep -c ^..--push.unique")
    first, code, count = done.stdout.splitlines()
    assert first == "usage: protopush COMMAND [options]"
    assert code in ("0", "141")  # head may have gone before the rest was written
    assert count == "1"
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(closed):
    assert bash(f"protopush --help {closed}").returncode == 0
    assert bash(f"protopush trian {closed}").returncode == 2


def test_a_training_goes_on_without_a_reader_of_its_log(home, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    words = ["train", "--data.path", home / "images", "--out", tmp_path / "run", *SMALL]
    process = Forked(*words, out=tmp_path / "pipe", err=tmp_path / "pipe")
    while not select.select([reader], [], [], 1)[0]:
        assert process.poll() is None
    assert os.read(reader, 1)
    os.close(reader)
    assert process.wait() == 141  # its last line could not be printed
    assert main(["verify", str(tmp_path / "run")]) == 0


def nobody_left(group: int) -> bool:
    """Whether all processes of a group have ended, within seconds: no reader of images is left behind.

    A reader that was being started when its process ended notices it within 5 s (torch's MP_STATUS_CHECK_INTERVAL).
    """
    for _ in range(400):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("number", "send"), [
    pytest.param(signal.SIGTERM, os.kill, marks=pytest.mark.slow),  # beside other work it may print a traceback: open
    pytest.param(signal.SIGTERM, os.killpg, marks=pytest.mark.slow),  # timeout and batch systems end readers as well
    (signal.SIGINT, os.killpg),  # so does Ctrl-C
], ids=["SIGTERM", "SIGTERM to all", "SIGINT"])  # fmt: skip
def test_a_training_that_is_ended_goes_on_with_resume(home, tmp_path, number, send):
    options = [*SMALL, "--train.epochs", "200", "--train.patience", "200", "--train.freeze_backbone", "false"]
    words = ["train", "--data.path", str(home / "images"), "--out", str(tmp_path / "run"), *options]
    words += ["--data.num_workers", "2"]
    command = [sys.executable, "-m", "protopush", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
        limit = time.monotonic() + 100
        while process.poll() is None and not checkpoint.is_file() and time.monotonic() < limit:
            time.sleep(0.05)
        send(process.pid, number)
        lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == CODES[number]
    assert lines[-1] == "protopush: interrupted; what was saved is still there; train goes on with --resume"
    assert not [line for line in lines if "Traceback" in line or "Error" in line]
    assert nobody_left(process.pid)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    epochs = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    with subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, text=True) as process:
        while len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) <= epochs + 1:
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert "interrupted" in process.communicate(timeout=60)[1]


def test_predictions_that_are_ended_say_how_to_go_on(home, tmp_path):
    pictures = make_images(tmp_path / "many", ["bird"], 400)
    out = tmp_path / "predictions.csv"
    command = ["predict", str(home / "run"), str(pictures), "--out", str(out), "--data.num_workers", "2"]
    with subprocess.Popen([sys.executable, "-m", "protopush", *command], stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not out.is_file() and not list(tmp_path.glob("*predictions*")):
            time.sleep(0.01)
        process.terminate()
        last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 143
    assert last == "protopush: interrupted; the same command, without --overwrite, goes on where it stopped"
    assert main(command) == 0
    assert len(out.read_text().splitlines()) == 401


def test_ctrl_c_while_it_starts_is_one_line():
    with subprocess.Popen([sys.executable, "-m", "protopush", "train", "--data.path", "x", "--out", "y"],
                          stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
        time.sleep(0.4)  # torch takes a second or more
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    assert process.returncode in (130, 2)  # 2: it was quicker
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


SIGNALLED = """
import os, signal, sys, threading, time
from protopush.cli import commands, program
{command}
def signalled():
    for after in {times}:
        threading.Timer(after, os.kill, [os.getpid(), signal.{number}]).start()
    return command()
commands.COMMANDS["verify"] = signalled
sys.exit(program.run(["verify"]))
"""
SWALLOWS = """
def command():
    import swallows
    for _ in range(300):  # a signal that was put off until after an import ends no sleep, as that of a kill does
        time.sleep(0.1)
"""
CLEANS_UP = """
def command():
    try:
        time.sleep(30)
    finally:
        time.sleep(0.5)
        print("cleaned up")
"""
LOSES_A_READER = """
def command():
    signal.signal(signal.SIGCHLD, lambda *_: (_ for _ in ()).throw(RuntimeError("DataLoader worker is killed")))
    try:
        time.sleep(30)
    finally:
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(0.1)
"""
READER_FIRST = """
def command():
    time.sleep(0.15)
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
"""


@pytest.mark.parametrize(("command", "number", "times", "out"), [
    (SWALLOWS, "SIGINT", [0.5], ""),
    (SWALLOWS, "SIGTERM", [0.5], ""),
    (CLEANS_UP, "SIGINT", [0.2, 0.25], "cleaned up\n"),
    (LOSES_A_READER, "SIGTERM", [0.2], ""),
    (READER_FIRST, "SIGTERM", [0.2], ""),
], ids=["import and SIGINT", "import and SIGTERM", "twice", "reader after", "reader before"])  # fmt: skip
def test_an_interrupt_is_one_line_wherever_it_comes(tmp_path, command, number, times, out):
    (tmp_path / "swallows.py").write_text("import time\ntry:\n    time.sleep(2)\nexcept BaseException:\n    pass\n")
    script = SIGNALLED.format(command=command, times=times, number=number)
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == CODES[getattr(signal, number)]
    assert done.stdout == out
    assert done.stderr == "protopush: interrupted; what was saved is still there; train goes on with --resume\n"


def on_a_terminal(code: str, **environment: str) -> str:
    """What a program writes to a terminal of its own."""
    parent, child = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLORTERM")}
    with subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, stdin=child,
                          env={**variables, "TERM": "xterm-256color", **environment}) as process:  # fmt: skip
        os.close(child)
        written = b""
        while True:
            try:
                block = os.read(parent, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not block:
                break
            written += block
        assert process.wait(60) == 0, written
    os.close(parent)
    return written.decode()


BAR = """
import logging, time
from protopush.runs.progress import bar, log_to_stderr
log_to_stderr(logging.INFO)
with bar("Auditing images", 3) as advance:
    for _ in range(3):
        advance(1); time.sleep(0.15)
    logging.getLogger("protopush").info("Audited 3 images, 0.61")
"""
COLOUR, CURSOR = "\x1b[3", "\x1b[?25l"


def test_a_terminal_gets_bars_and_colours():
    written = on_a_terminal(BAR)
    assert COLOUR in written
    assert CURSOR in written
    assert "Auditing images" in written


def test_a_bar_moves_while_a_step_takes_long():
    written = on_a_terminal(BAR.replace("0.15", "0.75"))
    assert "0:00:00" in written
    assert "0:00:01" in written  # between two steps


STEPS = """
import logging, threading, time
from protopush.runs import progress
progress.EVERY = 0.3
with progress.bar("Of a library", 2): time.sleep(0.4)
assert threading.active_count() == 1
progress.log_to_stderr(logging.INFO)
with progress.bar("Short", 9) as advance: time.sleep(0.2)
with progress.bar("Long", 5) as advance:
    advance(2); advance(1); time.sleep(0.6)
try:
    with progress.bar("Failed", 1): raise KeyboardInterrupt
except KeyboardInterrupt: time.sleep(0.4)
assert threading.active_count() == 1
"""


def test_without_a_terminal_there_are_lines_of_a_clock_over_all_bars():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert set(done.stderr.splitlines()) == {"Long: 3 of 5"}
    assert len(done.stderr.splitlines()) in (1, 2)


def test_no_color():
    written = on_a_terminal(BAR, NO_COLOR="1")
    assert "\x1b[3" not in written
    assert "\x1b[9" not in written
    assert "Auditing images" in written


def test_a_dumb_terminal_gets_plain_lines():
    assert on_a_terminal(BAR, TERM="dumb").splitlines() == ["Audited 3 images, 0.61"]


WARNING = "import sys, warnings; from protopush.cli import commands, program\n"
WARNING += "commands.COMMANDS['verify'] = lambda: warnings.warn('of a library', FutureWarning) or 0\n"
WARNING += "sys.exit(program.run(['verify']))"


def test_warnings_are_for_those_who_ask_for_them():
    command = [sys.executable, "-c", WARNING]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""
    shown = subprocess.run([sys.executable, "-W", "default", *command[1:]], capture_output=True, text=True, check=True)
    assert "FutureWarning: of a library" in shown.stderr
    assert (
        subprocess.run([sys.executable, "-W", "error", *command[1:]], capture_output=True, check=False).returncode == 1
    )


COMPLETE = """
eval "$(register-python-argcomplete protopush)"
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
_python_argcomplete protopush
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(("line", "expected"), [
    ("protopush ", ["demo", "train", "push", "evaluate", "predict", "explain", "report", "compare", "verify", "rebuild",
                    "forbid", "app", "serve", "data", "export"]),
    ("protopush ev", ["evaluate "]),
    ("protopush train --train.e", ["--train.epochs", "--train.ema"]),
    ("protopush train --overwrite ", ["true", "false"]),
    ("protopush data ", ["audit "]),
    ("protopush data audit --thr", ["--threshold "]),
    ("protopush nothing ", [""]),
])  # fmt: skip
def test_completion_in_bash(line, expected):
    done = bash(COMPLETE.format(line=shlex.quote(line)))
    assert (done.stdout.rstrip("\n").split("\n"), done.stderr) == (expected, "")


def test_completion_does_not_wait_for_torch():
    code = "import os, sys\nfrom protopush.cli import main\n"
    code += "os.environ.update(_ARGCOMPLETE='1', COMP_LINE='protopush eval', COMP_POINT='14', IFS='\\n')\n"
    code += "os.dup2(1, 8)\nos._exit = lambda code: sys.exit('torch' in sys.modules)\nmain([])\n"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version():
    assert bash("protopush --version").stdout == bash("python -m protopush --version").stdout


def test_a_reader_that_dies_in_training_is_one_line(tmp_path, capsys):
    """A real process, which ends in the middle of the second epoch; what was saved goes on."""
    data = make_images(tmp_path / "images", ["bird", "cat"], 10)
    code = (
        "import os, sys\n"
        "from torch.utils.data import get_worker_info\n"
        "from protopush.data.dataset import ImageDataset\n"
        "from protopush.cli import main\n"
        "from protopush.training.trainer import Trainer\n"
        "whole, epoch, now = ImageDataset.__getitem__, Trainer.epoch, [0]\n"
        "def counted(self, number):\n"
        "    now[0] = number\n"
        "    return epoch(self, number)\n"
        "def deadly(self, index):\n"
        "    if now[0] == 1 and get_worker_info() is not None and sys.argv[1] == 'die':\n"
        "        os._exit(9)\n"
        "    return whole(self, index)\n"
        "ImageDataset.__getitem__, Trainer.epoch = deadly, counted\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    words = ["train", "--data.path", data, "--data.num_workers", 1, "--model.backbone", "test_resnet",
             "--model.windows", "null", "--model.pretrained", "false", "--model.image_size", 32,
             "--train.freeze_backbone", "false", "--train.epochs", 3, "--out", tmp_path / "run"]  # fmt: skip
    died = python("-c", code, "die", *words)
    assert died.returncode == 2
    assert died.stderr.strip().splitlines()[-1].startswith("protopush: error: a process that reads images died (")
    assert "Traceback" not in died.stderr
    assert python("-c", code, "live", *words, "--resume").returncode == 0


def test_what_a_reader_raises_is_its_message_alone(tmp_path):
    images = make_images(tmp_path / "images", ["bird", "cat"], 4)
    catalog = load_catalog(str(images))
    dataset = ImageDataset(catalog.samples, EvalTransform(Preprocessing(size=(32, 32))))
    (images / "cat" / "002.png").write_bytes(b"")
    with pytest.raises(InputError) as raised:
        list(DataLoader(dataset, batch_size=2, num_workers=1))
    assert str(raised.value).startswith("unreadable image: ")
    assert "Traceback" not in str(raised.value)
    assert "\n" not in str(raised.value)
