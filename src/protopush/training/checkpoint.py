"""What a run needs to go on where it was cut off: after its last whole epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from protopush.data.files import write_atomic
from protopush.errors import InputError, first_line, listing
from protopush.models.versions import current_versions, version_change
from protopush.push.certificate import refuse_newer
from protopush.training.config import RunConfig

FORMAT = 1
FILE = Path("checkpoints") / "last.pt"

# A run goes on with another of these; with another of any other option it would be another run.
FREE = {"data.num_workers", *(f"trainer.{key}" for key in ("device", "precision", "compile", "cache_dir", "track"))}


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``checkpoints/last.pt``, which ``torch.load(weights_only=True)`` reads.

    Raises:
        InputError: there is no room; the last good one is still there.
    """
    write_atomic(
        folder / FILE, lambda temporary: _write({"format": FORMAT, "versions": current_versions(), **state}, temporary)
    )


def _write(state: dict[str, Any], file: Path) -> None:
    try:
        with file.open("wb") as opened:  # through Python's file, so that a full disk is an OSError
            torch.save(state, opened)
    except RuntimeError as error:
        raise OSError(f"{first_line(error)}") from error


def load_checkpoint(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The state to go on with, or None where the run must begin anew.

    Raises:
        InputError: the checkpoint is damaged, or the run was begun with other options.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    refuse_other_options(folder, config)
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here
        raise InputError(
            f"damaged file: {file} ({first_line(error)}); take it from a copy, or train anew with --overwrite"
        ) from error
    refuse_newer(state, FORMAT, str(file))
    return state


@contextmanager
def restoring(saved: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Restore the state of a checkpoint; where it does not fit, the versions between which it changed are named.

    Raises:
        InputError: it doesn't fit.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        change = version_change(saved.get("versions", {})) or "take it from a copy"
        raise InputError(
            f"{folder / FILE} does not fit the model and optimizer of this run ({' '.join(str(error).split())[:300]}); "
            f"{change}, or train again with --overwrite"
        ) from error


def refuse_other_options(folder: Path, config: RunConfig) -> None:
    """A run goes on with the options that it was begun with.

    Raises:
        InputError: some are different, or ``config.yaml`` can't be read.
    """
    file = folder / "config.yaml"
    try:
        before = _flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"cannot read {file} ({first_line(error)}); train anew with --overwrite") from error
    now = _flat(asdict(config))
    other = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    other = [told for told in other if told.split(" ")[0] not in FREE]
    if other:
        raise InputError(
            f"the run in {folder} was begun with other options ({listing(other, 5)}); give the same, or train anew "
            "with --overwrite"
        )


def _flat(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
