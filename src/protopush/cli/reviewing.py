"""``protopush app``."""

from __future__ import annotations

from pathlib import Path

from protopush.cli.options import log, new_parser
from protopush.parsing import parse


def app(words: list[str]) -> int:
    """``protopush app``."""
    parser = new_parser("app")
    parser.add_argument("run", type=str, help="a run folder; decisions change it in place")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="the address to listen on; there are no passwords"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--max_megabytes", type=float, default=20.0, help="of an uploaded file")
    parser.add_argument("--max_megapixels", type=float, default=50.0, help="of an uploaded image")
    parser.add_argument("--data.path", type=str | None, default=None, help="where the training images are now")
    parser.add_argument("--data.source", type=str | None, default=None, help="auto, or a source of docs/data.md")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or mps")
    options = parse(parser, words)
    log()
    from protopush.app.desk import Desk
    from protopush.app.serve import serve
    from protopush.app.upload import Limits
    from protopush.commands.opening import data_of, open_with

    run, device = open_with(options)
    desk = Desk(Path(options.run), data_of(run, options), device)
    serve(desk, Limits(options.max_megabytes, options.max_megapixels), options.host, options.port)
    return 0
