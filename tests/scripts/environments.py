"""Clean environments: a wheel of protopush beside the lowest and the newest versions of what it needs.

    python environments.py dist/protopush-*.whl [--folder FOLDER]

The lowest versions are those that the wheel's metadata names, with the oldest Python found on the PATH; the newest are
what pip takes, with the newest Python. There is no constraints file, and all happens in a temporary folder (or in
``--folder``, which stays). Each extra has an environment of its own, on top of the one without extras; all of them
together have one more. At the end each side verifies the run that the other has saved.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table

SMOKE = Path(__file__).with_name("smoke.py")
SHOWN = ("torch", "torchvision", "numpy", "pillow", "timm")
NOT_FOR_USERS = {"dev"}


@dataclass
class Row:
    """One environment and what became of it."""

    name: str
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    installed: float = 0.0
    ran: float = 0.0
    failure: str = ""


class Wheel:
    """A wheel and what its metadata says that it needs."""

    def __init__(self, file: Path) -> None:
        self.file = file.resolve()
        with ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = HeaderParser().parsestr(archive.read(name).decode())
        self.needs = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
        self.extras = sorted(set(metadata.get_all("Provides-Extra", [])) - NOT_FOR_USERS)
        self.python = Version(str(metadata["Requires-Python"]).removeprefix(">="))

    def words(self, extras: Sequence[str], lowest: bool) -> list[str]:
        """What pip is to install: the wheel, and for the lowest versions a pin for each that it names."""
        pins = [f"{name}=={version}" for name, version in self.lowest(extras).items()] if lowest else []
        return [f"{self.file}[{','.join(extras)}]" if extras else str(self.file), *pins]

    def lowest(self, extras: Sequence[str]) -> dict[str, str]:
        """The lowest version of each requirement that all of its bounds allow."""
        found: dict[str, Version] = {}
        for need in self.needs:
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                bounds = [Version(one.version) for one in need.specifier if one.operator in (">=", "==")]
                if not bounds:
                    sys.exit(f"{need} has no lower bound")
                key = f"{need.name}[{','.join(need.extras)}]" if need.extras else need.name
                found[key] = max(*bounds, found.get(key, Version("0")))
        return {name: str(version) for name, version in found.items()}


class Environments:
    """The environments below a folder, and the rows of the table."""

    def __init__(self, wheel: Wheel, folder: Path) -> None:
        self.wheel, self.folder, self.rows = wheel, folder, list[Row]()
        self.environment = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "PYTHONPATH")}

    def make(self, level: str, name: str, python: str, extras: Sequence[str], base: Path | None = None) -> Path:
        """An environment, in which what it is for is tried; adds a row and returns its interpreter.

        Args:
            level: lowest or newest.
            name: of the row.
            python: the interpreter to make it with.
            extras: of the wheel; none: the commands that need none.
            base: the interpreter of another environment, whose packages are there as well.
        """
        row, place = Row(f"{level}: {name}"), self.folder / f"{level}-{name}"
        own = place / "bin" / "python"
        self.rows.append(row)
        try:
            with timed(row, "installed"):
                self.run(python, "-m", "venv", place)
                if base is not None:
                    (self.site(own) / "base.pth").write_text(f"{self.site(base)}\n")
                self.run(own, "-m", "pip", "install", "--quiet", *self.wheel.words(extras, level == "lowest"))
                self.run(own, "-m", "pip", "check")
            self.describe(row, own)
            with timed(row, "ran"):
                self.run(own, SMOKE, self.folder / f"{level}-work", *extras)
        except subprocess.CalledProcessError as error:
            row.failure = f"{error.stdout}\n{error.stderr}".strip()
        self.report(row)
        return own

    def site(self, python: Path) -> Path:
        """Where an interpreter's packages are."""
        return Path(self.run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())

    def run(self, *words: str | Path) -> str:
        """What a command prints; it runs in the folder."""
        return subprocess.run(
            [str(word) for word in words],
            check=True,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
        ).stdout

    def describe(self, row: Row, python: Path) -> None:
        """The versions that the environment has."""
        code = "import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, sys.argv[1:]))"
        row.python, *versions = self.run(python, "-c", code, *SHOWN).split()
        row.versions = dict(zip(SHOWN, versions, strict=True))

    def cross(self, name: str, python: Path, run: Path) -> None:
        """A run that the other side has saved is verified."""
        row = Row(name)
        self.rows.append(row)
        try:
            self.describe(row, python)
            with timed(row, "ran"):
                self.run(python, "-m", "protopush", "verify", run, "--root", run.parent / "images")
        except subprocess.CalledProcessError as error:
            row.failure = f"{error.stdout}\n{error.stderr}".strip()
        self.report(row)

    def report(self, row: Row) -> None:
        """A line as soon as it is known."""
        print(f"{row.name}: {row.failure or 'passed'} ({row.installed:.0f} s + {row.ran:.0f} s)", flush=True)

    def table(self) -> Table:
        """All rows."""
        table = Table("environment", "Python", *SHOWN, "result", "install", "run", title=self.wheel.file.name)
        for row in self.rows:
            versions = [row.versions.get(name, "") for name in SHOWN]
            result = "FAILED" if row.failure else "passed"
            table.add_row(row.name, row.python, *versions, result, f"{row.installed:.0f} s", f"{row.ran:.0f} s")
        return table


@contextmanager
def timed(row: Row, what: str) -> Iterator[None]:
    """The seconds that the block takes, also where it fails, as the row's attribute."""
    started = time.perf_counter()
    try:
        yield
    finally:
        setattr(row, what, time.perf_counter() - started)


def pythons(lowest: Version) -> Iterator[str]:
    """The Pythons on the PATH that protopush runs on, oldest first, and that really start."""
    for minor in range(lowest.minor, lowest.minor + 20):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            yield found


def main() -> int:
    """Make the environments, run them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--folder", type=Path, help="where the environments stay; by default a temporary one")
    parser.add_argument("--levels", nargs="+", default=["lowest", "newest"], choices=["lowest", "newest"])
    options = parser.parse_args()
    wheel = Wheel(options.wheel)
    found = list(pythons(wheel.python)) or [sys.executable]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        environments = Environments(wheel, folder)
        bases = {}
        for level in options.levels:
            python = found[0 if level == "lowest" else -1]
            base = bases[level] = environments.make(level, "core", python, [])
            for extra in wheel.extras:
                environments.make(level, extra, python, [extra], base)
            environments.make(level, "together", python, wheel.extras, base)
        for level, base in bases.items():
            for other in bases.keys() - {level}:
                environments.cross(f"{level} verifies {other}", base, folder / f"{other}-work" / "run")
        Console(width=140).print(environments.table())
    return any(row.failure for row in environments.rows)


if __name__ == "__main__":
    sys.exit(main())
