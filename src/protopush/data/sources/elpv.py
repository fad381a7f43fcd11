"""Solar cells in electroluminescence (elpv-dataset)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from protopush.data.manifest import Catalog, Sample
from protopush.errors import InputError

BLOCK = 60
# Every fifth block that holds sure monocrystalline cells, counted from the second: validation; from the third: test.
# With this choice both hold about as many defective as functional cells.
FOLDS = {1: "val", 2: "test"}


def elpv(path: str = "", classes: Sequence[str] | None = None) -> Catalog:
    """Solar cells in electroluminescence (Buerhop-Lutz et al. 2018): functional against defective, monocrystalline.

    Only the sure labels are taken (defect probability 0 or 1). The files are ordered by solar module, so cells are
    held out in contiguous blocks of 60: never at random, which would put one module in two splits.

    Raises:
        InputError: neither a path nor the package ``elpv-dataset`` is there.
    """
    root = Path(path) if path else _home()
    table = root / "labels.csv"
    if not table.is_file():
        raise InputError(f"no such file: {table}; expected the elpv data folder (pip install 'protopush[demo]')")
    names = tuple(classes) if classes is not None else ("functional", "defective")
    rows = [line.split() for line in table.read_text().splitlines()]
    sure = [
        (index // BLOCK, name, float(probability))
        for index, (name, probability, kind) in enumerate(rows)
        if kind == "mono" and float(probability) in (0.0, 1.0)
    ]
    fold = {block: place % 5 for place, block in enumerate(sorted({block for block, _, _ in sure}))}
    samples = tuple(
        Sample(root / name, name, int(defect), FOLDS.get(fold[block], "train"), f"block {block}")
        for block, name, defect in sure
    )
    return Catalog(samples, names, root)


def _home() -> Path:
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise InputError(
            "the package elpv-dataset is not installed; pip install 'protopush[demo]', or give --data.path"
        )
    return Path(spec.origin).parent / "data"
