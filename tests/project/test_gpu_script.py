"""``benchmarks/gpu.sh`` without a GPU: what it starts exists, and what fails or takes too long is recorded so."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs_blocks import ROOT
from test_docs import tool

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
# In place of the interpreter: notes what it is to run, runs nothing but the record; one part fails, one takes too long.
STAND_IN = """\
import json, os, pathlib, runpy, sys, time
here, words = pathlib.Path(__file__).parent, sys.argv[1:]
if words[0] == "benchmarks/gpu_record.py":
    if "--begin" in words:
        (pathlib.Path(os.environ["WORK"]) / "begin").write_text("{}")
        sys.exit(0)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
with open(here / "words", "a") as file:
    print(json.dumps(words), file=file)
if "--out" in words and words[0].endswith("live_speed.py"):
    pathlib.Path(words[words.index("--out") + 1]).write_text('{"fast": 1}')
if "explain_speed.py" in words[0]:
    sys.exit("no such explanation")
if "serve_speed.py" in words[0]:
    print("serving", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module", params=["", "1"], ids=["whole", "quick"])
def ran(request, tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict, list[list[str]]]:
    """The script with all parts stood in for, the longest of them cut after a second: its JSON, and what it ran."""
    here = tmp_path_factory.mktemp("gpu")
    (here / "stand_in.py").write_text(STAND_IN)
    interpreter, timeout = here / "python", here / "timeout"
    interpreter.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {here}/stand_in.py "$@"\n')
    timeout.write_text('#!/bin/sh\nshift 3\nexec /usr/bin/env -i PATH="$LONG" WORK="$WORK" timeout -k 1 2 "$@"\n')
    for file in (interpreter, timeout):
        file.chmod(0o755)
    environment = os.environ | {
        "PYTHON": str(interpreter), "DEVICE": "cpu", "QUICK": request.param, "LONG": os.environ["PATH"],
        "PATH": f"{here}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPT), str(here / "new" / "gpu.json")], capture_output=True, text=True, env=environment,
        check=False, timeout=100,
    )  # fmt: skip
    found = json.loads((here / "new" / "gpu.json").read_text())
    return done, found, [json.loads(line) for line in (here / "words").read_text().splitlines()]


def test_what_fails_is_recorded_and_the_others_go_on(ran):
    done, found, commands = ran
    parts = found["parts"]
    assert len(parts) == len(commands) >= 12
    assert done.returncode == 1
    assert done.stderr == ""
    assert {name: part["outcome"] for name, part in parts.items() if part["outcome"] != "done"} == {
        "explain": "failed",
        "serve": "out of time",
    }
    assert (parts["explain"]["exit_code"], parts["explain"]["last_line"]) == (1, "no such explanation")
    assert parts["explain"]["log"] == ["no such explanation"]
    assert parts["serve"]["last_line"] == "serving"
    assert 1.5 < parts["serve"]["seconds"] < 20
    assert parts["live"]["figures"] == {"fast": 1}
    assert parts["push"]["figures"] is None
    for name, part in parts.items():
        assert f"{name} (at most " in done.stdout
        assert part["command"]


def test_every_option_exists(ran, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for words in ran[2]:
        options = {word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word)}
        if words[:2] == ["-m", "protopush"]:
            tool("options").parser_of(words[2:], read=True)
        elif words[:2] == ["-m", "pytest"]:
            folders = [word for word in words if word.startswith("tests/")]
            marked = [file for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text()]
            marked.remove(Path(__file__))
            assert {"/".join(file.relative_to(ROOT).parts[:2]) for file in marked} == set(folders)
        elif words[0] == "-c":
            compile(words[1], "part", "exec")
        else:
            with pytest.raises(SystemExit):
                importlib.import_module(Path(words[0]).stem).main(["--help"])
            assert options
            assert options <= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)), words


def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path):
    for words, said in (
        ([], "0 arguments"), (["a.json", "b.csv", "c"], "3 arguments"), (["a.txt"], "a.txt is no name of a JSON file"),
        (["a.json", "b.csv"], "there is no file"),
    ):  # fmt: skip
        done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert said in done.stderr


def test_without_a_gpu_it_says_so_before_the_work(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = os.environ | {"PYTHON": sys.executable, "DEVICE": "cuda"}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "a.json")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a.json").exists()
