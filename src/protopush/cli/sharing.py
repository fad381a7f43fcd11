"""``protopush export``."""

from __future__ import annotations

import sys

from protopush.cli.options import log, new_parser, print_json
from protopush.parsing import parse


def export(words: list[str]) -> int:
    """``protopush export``."""
    parser = new_parser("export")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--format", type=str, default="onnx", help="onnx")
    parser.add_argument("--out", type=str | None, default=None, help="the file; by default RUN/model.onnx")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference to PyTorch; above it nothing is written"
    )
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    options = parse(parser, words)
    log()
    from protopush.commands.sharing import export_run
    from protopush.export import ParityError

    try:
        done = export_run(options)
    except ParityError as error:
        print(f"protopush: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if options.json:
        print_json(done.to_dict())
    else:
        told = f"{done.megabytes:.1f} MB, opset {done.opset}, largest difference to PyTorch {done.difference:.1g}"
        print(f"Exported: {done.file} ({told})")
    return 0
