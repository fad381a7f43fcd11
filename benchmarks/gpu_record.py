"""The one JSON of ``benchmarks/gpu.sh``: what the machine is, and what each part has left in ``$WORK``, to ``$OUT``.

``--begin`` looks whether all is there that the parts need; ``--show`` prints a line for each of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NEEDED = ("torch", "torchvision", "timm", "lightning_fabric", "torchmetrics", "rich", "gradio", "pytest")
OUTCOMES = {"": "not started", "0": "done", "124": "out of time", "137": "out of time"}
TAIL = 200  # lines of the log of a part that is not done


def begin(work: Path, device: str) -> str:
    """Note what the numbers depend on; what is missing, else nothing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} missing; run: {sys.executable} -m pip install -e '.[app]' pytest"
    import torch
    from showing import surroundings

    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device; install a torch for your CUDA, or set DEVICE=cpu"
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    machine: dict[str, Any] = {"gpus": gpus, "cuda": torch.version.cuda, "system": platform.platform()}
    machine["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if gpus else None
    machine["driver"] = _lines("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    machine["commit"] = _lines("git", "rev-parse", "HEAD")
    found = surroundings(device) | {"quick": bool(os.environ["QUICK"]), "machine": machine}
    (work / "begin").write_text(json.dumps(found), encoding="utf-8")
    print(json.dumps(machine, indent=1))
    return ""


def _lines(*words: str) -> list[str]:
    """What a command prints; nothing where it isn't there."""
    if shutil.which(words[0]) is None:
        return []
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip().splitlines()


def part(work: Path, name: str) -> dict[str, Any]:
    """What a part was, took and found."""
    started, ended, *code = (work / f"{name}.times").read_text().split()
    log, figures = work / f"{name}.log", work / f"{name}.json"
    text = log.read_text(encoding="utf-8", errors="replace").replace(str(work), "WORK") if log.is_file() else ""
    lines, outcome = text.strip().splitlines(), OUTCOMES.get("".join(code), "failed")
    return {
        "command": (work / f"{name}.command").read_text().strip().replace(str(work), "WORK"),
        "outcome": outcome,
        "exit_code": int(code[0]) if code else None,
        "seconds": round(float(ended) - float(started), 1),
        "last_line": lines[-1] if lines else "",
        "log": [] if outcome == "done" else lines[-TAIL:],
        "figures": json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else None,
    }


def main() -> int:
    """Begin, or merge and write: with ``--show``, 1 where a part isn't done."""
    work, out = Path(os.environ["WORK"]), Path(os.environ["OUT"])
    if "--begin" in sys.argv:
        if problem := begin(work, os.environ["PROTOPUSH_TEST_DEVICE"]):
            print(f"gpu.sh: {problem}", file=sys.stderr)
        return 2 if problem else 0
    parts = {name: part(work, name) for name in (work / "order").read_text().split()}
    found = json.loads((work / "begin").read_text(encoding="utf-8")) | {"parts": parts}
    draft = out.with_name(f".{out.name}.draft")
    draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draft.replace(out)
    if "--show" not in sys.argv:
        return 0
    for name, each in parts.items():
        print(f"{name:18}{each['seconds']:7.1f} s  {each['outcome']:12} {'' if each['figures'] else each['last_line']}")
    print(f"Written to {out}")
    return int(any(each["outcome"] != "done" for each in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
