"""What checks a run or its data: ``protopush verify`` and ``data audit``."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

import torch

from protopush.commands.opening import open_with
from protopush.data.audit import Audit, audit, check_threshold
from protopush.data.files import read_json
from protopush.data.manifest import Catalog
from protopush.data.similar import THRESHOLD
from protopush.data.sources import load_catalog
from protopush.errors import InputError
from protopush.push.certificate import AnchorCheck, verify_anchors
from protopush.training.progress import bar
from protopush.training.run import Run, same_weights
from protopush.training.versions import recorded_versions, version_change

logger = logging.getLogger("protopush.training")


def verify_run(options: Namespace) -> list[AnchorCheck]:
    """Whether each anchor of a run still holds."""
    run, device = open_with(options, check_weights=False)
    root = Path(options.root) if options.root else run.root
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; expected the training images; say where they are with --root")
    checks = checks_of(run, root, device)
    change = version_change(recorded_versions(read_json(run.folder / "config.json")))
    if change and any(check.fault == "similarity_off" for check in checks):
        logger.warning("Other versions may read images and weights otherwise: the run was %s", change)
    return checks


def checks_of(run: Run, root: Path, device: torch.device | str) -> list[AnchorCheck]:
    """Whether each anchor of an open run still holds, with the images below ``root``."""
    return verify_anchors(
        run.model,  # type: ignore[arg-type]
        run.head.proto_manager,
        run.transform,
        root,
        run.class_names,
        device,
        same_weights=same_weights(run.folder),
    )


def audit_data(options: Namespace) -> Audit:
    """What is wrong with a data set; groups in several splits are told, not refused."""
    check_threshold(options.threshold)
    catalog = load_catalog(options.path, options.source, seed=options.split_seed, refuse_leaks=False)
    return audited(catalog, options.threshold)


def audited(catalog: Catalog, threshold: float = THRESHOLD) -> Audit:
    """What is wrong with a data set that is open already."""
    with bar("Auditing images", 2 * len(catalog.samples)) as advance:
        return audit(catalog, threshold, advance)
