"""torchvision and what stands on it can be imported beside a torch that the torchvision wheel was not built for."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from protopush import _compat

WITH_CURE = """
import sys, protopush.backbones
from protopush._compat import ensure_torchvision, _LIBRARIES
print([name for name in ("torchvision", "timm", "torchmetrics") if name in sys.modules])
ensure_torchvision(); ensure_torchvision()
import torchvision, timm, torchmetrics, lightning_fabric
ensure_torchvision()
import torch
from torchvision.transforms import v2
print(tuple(v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape), len(_LIBRARIES))
try:
    print(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5))
except NotImplementedError as error:
    print(error)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: what is declared in one process stays declared in it."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@cache
def without_cure() -> subprocess.CompletedProcess[str]:
    return run("import torchvision")


@cache
def with_cure() -> list[str]:
    done = run(WITH_CURE)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def mismatched() -> None:
    if without_cure().returncode == 0:
        pytest.skip("this torchvision was built for this torch: there is nothing to cure here")


def test_everything_on_torchvision_can_be_imported() -> None:
    declared = 0 if without_cure().returncode == 0 else 1  # a working install is left as it is
    assert with_cure()[1] == f"(3, 4, 4) {declared}"


def test_importing_the_rooms_does_not_import_what_the_cure_is_for() -> None:
    assert with_cure()[0] == "[]"


@pytest.mark.usefixtures("mismatched")
def test_without_the_cure_the_import_fails() -> None:
    assert "operator torchvision::nms does not exist" in without_cure().stderr


@pytest.mark.usefixtures("mismatched")
def test_an_operator_without_kernel_says_so() -> None:
    assert "Could not run 'torchvision::nms'" in with_cure()[2]


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What a first call would declare, with torchvision not imported so far."""
    libraries: list[object] = []
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(_compat, "_declare_operators", lambda: libraries.append("declared"))
    return libraries


def test_an_install_that_works_is_left_alone(declared: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "_extension_loads", lambda folder: True)
    _compat.ensure_torchvision.__wrapped__()
    assert declared == []


def test_an_extension_that_does_not_load_is_replaced(declared: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "_extension_loads", lambda folder: False)
    _compat.ensure_torchvision.__wrapped__()
    assert declared == ["declared"]


def test_no_torchvision_no_declaration(declared: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "find_spec", lambda name: None)
    _compat.ensure_torchvision.__wrapped__()
    assert declared == []


def test_a_blocked_import_stays_blocked(declared: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    _compat.ensure_torchvision.__wrapped__()
    assert declared == []


def test_a_damaged_extension_does_not_load(tmp_path: Path) -> None:
    assert not _compat._extension_loads(tmp_path)
    (tmp_path / f"_C{_compat.EXTENSION_SUFFIXES[-1]}").write_bytes(b"not a library")
    assert not _compat._extension_loads(tmp_path)


@pytest.mark.parametrize("schema", _compat.SCHEMAS)
def test_schemas_are_well_formed(schema: str) -> None:
    assert str(torch._C.parse_schema(f"torchvision::{schema}")) == f"torchvision::{schema}"
