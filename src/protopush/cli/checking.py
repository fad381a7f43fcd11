"""``protopush verify``, ``forbid`` and ``data audit``: exit code 1 where a check fails."""

from __future__ import annotations

from protopush.cli.options import log, new_parser, print_json
from protopush.errors import InputError
from protopush.parsing import add_data, add_json, parse


def verify(words: list[str]) -> int:
    """``protopush verify``."""
    parser = new_parser("verify")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--root", type=str | None, default=None, help="where the training images are now")
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.commands.checking import verify_run
    from protopush.tables import anchors_table

    checks = verify_run(options)
    holds = all(check.holds for check in checks)
    if options.json:
        print_json({"holds": holds, "anchors": [check.to_dict() for check in checks]})
    else:
        print(anchors_table(checks))
    return 0 if holds else 1


def forbid(words: list[str]) -> int:
    """``protopush forbid``."""
    parser = new_parser("forbid")
    parser.add_argument("run", type=str, help="a run folder; it is changed in place")
    parser.add_argument(
        "--prototype", type=str | None, default=None, help="CLASS:NUMBER: the patch that it stands for (mel:3, or 4:3)"
    )
    parser.add_argument("--image", type=str | None, default=None, help="a training image: none of its patches")
    parser.add_argument(
        "--mask-column", "--mask_column", action="store_true", help="whatever lies outside the manifest's masks"
    )
    parser.add_argument("--min_share", type=float, default=0.5, help="share of a patch that must lie inside its mask")
    parser.add_argument("--undo", type=int | None, default=None, help="a decision's number: it holds no more")
    parser.add_argument("--reason", type=str, required=True, help="why, for those who read the log later")
    parser.add_argument("--who", type=str | None, default=None, help="who decides; by default your login name")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.commands.changing import forbid_run
    from protopush.tables import decision_table

    decision = forbid_run(options)
    print_json(decision.to_dict()) if options.json else print(decision_table(decision, options.run))
    return 0


def data(words: list[str]) -> int:
    """``protopush data audit``."""
    if words[:1] != ["audit"]:
        raise InputError("expected: protopush data audit PATH; protopush data audit --help tells the options")
    from protopush.data.similar import THRESHOLD

    parser = new_parser("data audit")
    parser.add_argument("path", type=str, nargs="?", default="", help="a folder, a manifest (CSV) or a .npz")
    parser.add_argument("--source", type=str, default="auto", help="the kind of data, where it can't be recognised")
    parser.add_argument("--split_seed", type=int, default=0, help="decides the splits where the data have none")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="similarity of near duplicates, at most 1")
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    options = parse(parser, words[1:])
    log()
    from protopush.commands.checking import audit_data
    from protopush.tables import audit_table

    found = audit_data(options)
    print_json(found.to_dict()) if options.json else print(audit_table(found))
    return 1 if found.leaks else 0
