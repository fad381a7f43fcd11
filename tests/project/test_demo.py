"""The demo does what it says, and its boxes lie on the defects of ten solar cells that were marked by hand.

``solar_defects.json`` holds the marks: for each cell of the test split areas and lines (cracks) in its 300x300 pixels.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from browser import Visit, keep
from protopush.cli import main
from protopush.data.images import read_image
from protopush.data.sources import load_catalog
from protopush.runs.run import open_run

DEFECTS = json.loads(Path(__file__).with_name("solar_defects.json").read_text(encoding="utf-8"))


def test_the_marks_of_defects_lie_in_their_cells():
    pytest.importorskip("elpv_dataset")
    cells = {sample.image.stem: sample for sample in load_catalog(source="elpv").samples}
    for name, marks in DEFECTS.items():
        assert (cells[name].label, cells[name].split) == (1, "test")
        assert 0.01 < marked(marks, (300, 300)).mean() < 0.5


def marked(marks: list[dict[str, list[list[int]]]], size: tuple[int, int]) -> np.ndarray:
    """Where a cell of 300x300 pixels is defective, (H, W): areas, and cracks as lines of 12 pixels."""
    mask = Image.new("L", (300, 300))
    draw = ImageDraw.Draw(mask)
    for mark in marks:
        if "area" in mark:
            draw.polygon([tuple(point) for point in mark["area"]], fill=255)
        else:
            draw.line([tuple(point) for point in mark["line"]], fill=255, width=12, joint="curve")
    return np.asarray(mask.resize(size[::-1])) > 127


def on_defects(folder: Path) -> tuple[list[float], list[float]]:
    """For each marked cell, how much of the strongest box for "defective" is marked, and of all boxes in the mean."""
    run, strongest, chance = open_run(folder), [], []
    defective = run.class_names.index("defective")
    cells = {sample.image.stem: sample.image for sample in load_catalog(source="elpv").samples}
    for name, marks in DEFECTS.items():
        with torch.no_grad():
            features = run.model.backbone(run.transform(read_image(cells[name])).unsqueeze(0))
            output = run.head(features)
        mask = marked(marks, features.regions.size)
        boxes = [tuple(map(int, box)) for box in features.regions.boxes]
        shares = [float(mask[y0:y1, x0:x1].mean()) for x0, y0, x1, y1 in boxes]
        best = output.contributions[0, defective].argmax()
        strongest.append(shares[int(output.maps[0, defective, best].argmax())])
        chance.append(float(np.mean(shares)))
    return strongest, chance


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys, request):
    pytest.importorskip("elpv_dataset")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "runs/demo"]) == 0
    told = capsys.readouterr().out
    for line in re.findall(r"^  (runs/\S+\.png)", told, flags=re.M):
        assert Path(line).is_file()
    assert len(list(Path("runs/demo/explanations").glob("*.png"))) == 3
    assert main(["verify", "runs/demo", "--local"]) == 0
    assert main(["verify", "runs/demo", "--crops"]) == 0
    strongest, chance = on_defects(Path("runs/demo"))
    assert min(strongest) > 0  # each touches a defect
    assert np.mean(strongest) > 1.3 * np.mean(chance)
    browser = request.getfixturevalue("browser")  # skips from here on where there is none
    for width, scheme in ((1400, "light"), (400, "dark")):
        with Visit(browser, Path("runs/demo/report.html"), width, scheme) as visit:
            visit.is_whole(width)
            keep(visit, f"demo-{width}-{scheme}", tmp_path)
