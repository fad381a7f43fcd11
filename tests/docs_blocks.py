"""Code blocks and commands of the README and the docs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(language: str, text: str) -> list[str]:
    """The blocks of code in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The commands in bash blocks that call protopush; of what ``&&`` joins, each."""
    lines = [line.split("  #")[0] for block in blocks("bash", text) for line in block.splitlines()]
    parts = [part for line in lines for part in line.split(" && ")]
    return [shlex.split(part) for part in parts if "protopush " in part]
