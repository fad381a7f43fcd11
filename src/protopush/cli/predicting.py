"""``protopush predict``."""

from __future__ import annotations

from protopush.cli.options import is_first, log, new_parser, print_json
from protopush.parsing import add_data, add_json, parse


def predict(words: list[str]) -> int:
    """``protopush predict``."""
    parser = new_parser("predict")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument(
        "paths", type=str, nargs="+", metavar="PATH", help="folders, manifests (CSV image[,label]) or image files"
    )
    parser.add_argument(
        "--out", type=str, required=True, help="the CSV file; after a kill, the same words go on with it"
    )
    parser.add_argument("--top", type=int, default=3, help="prototypes told for each image; 0: none")
    parser.add_argument(
        "--threshold",
        type=float | None,
        default=None,
        help="similarity below which nothing in training is like an image; by default set on the validation images",
    )
    parser.add_argument("--share", type=float, default=0.05, help="of validation images that may be below it")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever is there")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.commands.predicting import predict_files
    from protopush.predicting.summary import in_words

    try:
        found = predict_files(options)
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command, without --overwrite, goes on where it stopped") from None
    if is_first():
        print_json(found) if options.json else print(in_words(found))
    return 0
