"""What hands a run to others: ``protopush export``."""

from __future__ import annotations

from argparse import Namespace
from difflib import get_close_matches
from pathlib import Path

from protopush.errors import InputError
from protopush.export import Exported, export_onnx
from protopush.export.exporting import require_extra
from protopush.training.run import open_run

FORMATS = ("onnx",)


def export_run(options: Namespace) -> Exported:
    """A run as a file of another format."""
    if options.format not in FORMATS:
        near = get_close_matches(options.format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(FORMATS)}"
        raise InputError(f"unknown format {options.format!r}; {hint}")
    if not options.tolerance > 0:
        raise InputError(f"--tolerance {options.tolerance}; expected a number above 0")
    require_extra()
    run = open_run(options.run)
    return export_onnx(run, Path(options.out) if options.out else run.folder / "model.onnx", options.tolerance)
