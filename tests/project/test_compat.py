"""torchvision is imported as it is where that works, and mended only where its import has failed in the known way.

What is declared in one process stays declared in it: every case is a process of its own, forked from one that has
imported PyTorch and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from forked import Forked

MEND = "from protopush._compat import ensure_torchvision, _LIBRARIES; ensure_torchvision()\n"
BOXES = "torch.zeros(1, 4), torch.zeros(1), 0.5"

# As torchvision 0.29: importing the package loads a library, which defines the operators; defining one that is there
# already ends the process.
NEWEST = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor")
"""

# As torchvision beside another torch: the operators were never defined, and the import describes them all the same.
MISMATCHED = {
    "__init__.py": "from . import extension\nfrom . import _meta_registrations\nfrom . import transforms",
    "extension.py": "LOADED = False",
    "transforms.py": "from .extension import LOADED",
    "_meta_registrations.py": """
import torch
@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets.new_empty((0,))
@torch.library.register_fake("torchvision::qnms")
def meta_qnms(dets, scores, iou_threshold):
    return dets.new_empty((0,))
""",
}


def run(code: str, folder: Path | None = None) -> Forked:
    """A fresh interpreter but for PyTorch; packages in ``folder`` come before the installed ones."""
    first = "" if folder is None else f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    done = Forked(program=first + code, imported=("torch",))
    done.wait()
    return done


def printed(code: str, folder: Path | None = None) -> str:
    done = run(code, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def package(folder: Path, files: dict[str, str]) -> Path:
    """A made torchvision in ``folder``, with the metadata that pip writes."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision-9.9.dist-info").mkdir()
    (folder / "torchvision-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\n")
    with (folder / "torchvision-9.9.dist-info" / "METADATA").open("a") as file:
        file.write("Version: 9.9\n")
    for name, text in files.items():
        (folder / "torchvision" / name).write_text(text)
    return folder


@cache
def installed_fails() -> bool:
    return run("import torchvision").returncode != 0


@pytest.mark.parametrize("before", [True, False], ids=["torchvision first", "protopush first"])
def test_one_that_registers_its_operators_is_only_imported(tmp_path, before):
    package(tmp_path, {"__init__.py": NEWEST})
    code = "import torchvision\n" + MEND if before else MEND + "import torchvision\n"
    code += "import torch; print(len(_LIBRARIES), torchvision.library.ns, hasattr(torch.ops.torchvision, 'nms'))"
    assert printed(code, tmp_path) == "0 torchvision True"


def test_declaring_beforehand_is_what_breaks_it(tmp_path):
    """The made package would have caught it: operators that are there already are an error of its import."""
    package(tmp_path, {"__init__.py": NEWEST})
    code = "from protopush._compat import _declare; _declare('nms'); import torchvision"
    assert "nms" in run(code, tmp_path).stderr
    assert run(code, tmp_path).returncode != 0


def test_one_that_was_built_for_another_torch_is_mended(tmp_path):
    package(tmp_path, MISMATCHED)
    assert "operator torchvision::nms does not exist" in run("import torchvision", tmp_path).stderr
    code = MEND + "ensure_torchvision(); import torchvision; print(torchvision.transforms.LOADED, len(_LIBRARIES))"
    assert printed(code, tmp_path) == "False 2"


def test_a_failed_import_before_is_mended_too(tmp_path):
    package(tmp_path, MISMATCHED)
    code = "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n" + MEND + "print(len(_LIBRARIES))"
    assert printed(code, tmp_path) == "2"


@pytest.mark.parametrize("failure", [
    "operator torchvision::nms does not exist",  # whatever is declared
    "operator somebody::nms does not exist",
    "PyTorch and torchvision were compiled with different CUDA major versions",
])  # fmt: skip
def test_any_other_failure_is_one_line(tmp_path, failure):
    package(tmp_path, {"__init__.py": f"raise RuntimeError({failure!r})"})
    last = run(MEND, tmp_path).stderr.strip().splitlines()[-1]
    assert last.startswith("protopush.errors.InputError: torchvision 9.9 cannot be imported beside torch ")
    assert failure in last
    assert last.endswith("install both as https://pytorch.org/get-started says")


def test_an_absent_torchvision_is_left_to_those_who_need_it(tmp_path):
    assert printed("import sys; sys.modules['torchvision'] = None\n" + MEND + "print(len(_LIBRARIES))") == "0"


def test_all_that_stands_on_it_can_be_imported():
    code = MEND + "import torch, torchvision, timm, torchmetrics, lightning_fabric\n"
    code += "from torchvision.transforms import v2\n"
    code += "print(tuple(v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape), len(_LIBRARIES) > 0)"
    assert printed(code) == f"(3, 4, 4) {installed_fails()}"  # an install that works is left as it is


def test_operators_say_that_they_are_not_there(tmp_path):
    if not installed_fails():
        pytest.skip("this torchvision was built for this torch: its operators are there")
    code = MEND + f"import torch, torchvision; torchvision.ops.nms({BOXES})"
    assert "Couldn't load custom C++ ops" in run(code).stderr


def test_importing_protopush_imports_none_of_them():
    names = "('torchvision', 'timm', 'torchmetrics', 'lightning_fabric', 'matplotlib', 'gradio')"
    code = f"import sys, protopush.backbones.create; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
