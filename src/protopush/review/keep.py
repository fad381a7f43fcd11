"""Keep a prototype: somebody has looked at it and found it good. Nothing changes but the log."""

from __future__ import annotations

from protopush.errors import InputError
from protopush.review.decisions import Decision, load_decisions
from protopush.review.named import named_prototype
from protopush.review.writing import login, now, state_of, write_decision
from protopush.training.run import Run


def keep(run: Run, prototype: str, reason: str, who: str = "") -> Decision:
    """Record that a prototype was looked at and is to stay; it may still be forbidden later.

    Args:
        run: as opened, with :func:`protopush.review.writing.alone` held since before.
        prototype: ``class:number``.
        reason: why.
        who: by default the user's login name.

    Raises:
        InputError: there is no such prototype, it has no anchor, or there is no reason.
    """
    state, past = state_of(run.folder), load_decisions(run.folder)
    named = named_prototype(run, prototype)
    if not reason.strip():
        raise InputError("no reason given; expected one, for those who read the log later")
    decision = Decision(len(past) + 1, now(), who.strip() or login(), "keep", reason.strip(), **named)
    write_decision(run, decision, state)
    return decision
