"""What the docs say is what happens: code runs, commands parse and run, tables match the code, no link is dead."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import ModuleType
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import protopush
from browser import CONTRASTS, Visit
from docs_blocks import ROOT, blocks, commands
from helpers import SMALL, make_isic, write_tar
from protopush.backbones.create import BUILDERS
from protopush.cli import main
from protopush.cli.commands import COMMANDS
from protopush.cli.tables import anchors_table, locality_table
from protopush.data.sources import SOURCES
from protopush.evaluation.locality import Locality
from protopush.metrics.glossary import PER_CLASS, TERMS
from protopush.push.certificate import PROBLEMS, AnchorCheck
from protopush.push.selection import RULES
from protopush.push.update import INTERPOLATIONS
from protopush.report.sections import SECTIONS

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).with_suffix("").as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
# Where commands that take their time are run; elsewhere they are read, and what they make is there already.
SLOW = {
    "train": {"dermoscopy", "training", "faq"}, "report": {"dermoscopy"}, "compare": {"dermoscopy"},
    "demo": {"nowhere"},
    "app": {"nowhere"}, "serve": {"nowhere"},
}  # fmt: skip

every_page = pytest.mark.parametrize("name", PAGES)
pytestmark = pytest.mark.usefixtures("one_thread")


def text_of(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def tool(name: str) -> ModuleType:
    """A part of the site's own machinery."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parser_of = tool("options").parser_of


@pytest.fixture
def workshop(home, tmp_path, monkeypatch) -> Path:
    """A folder with images and two small runs, as the pages describe them, in which one stands."""
    here = tmp_path / "here"
    shutil.copytree(home / "images", here / "images")
    for name in ("mine", "pushed"):
        config = Path(shutil.copytree(home / "run", here / "runs" / name)) / "config.yaml"
        config.write_text(config.read_text().replace(str(home / "images"), "images"))
    rows = [f"images/{c}/{i:03d}.png,{c},train" for c in ("bird", "cat") for i in range(3)]
    (here / "manifest.csv").write_text("\n".join(["image,label,split", *rows]))
    (here / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    return here


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone after it."""
    with ExitStack() as stack:
        for registry in (BUILDERS, SOURCES, RULES, INTERPOLATIONS, TERMS["prototypes"], SECTIONS, COMMANDS):
            stack.enter_context(patch.dict(registry))
        yield


@pytest.mark.parametrize("name", [name for name in PAGES if blocks("python", text_of(name))])
def test_python_runs(name, workshop, registries, capsys, caplog):
    caplog.set_level("INFO", logger="protopush")
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks("python", text_of(name)), start=1):
        caplog.clear()
        exec(compile(block, f"{name}.md, Python block {number}", "exec"), names)
        if "logging.basicConfig" in block:  # the text after it is what it logs
            (told,) = re.findall(re.escape(block) + r"```\n[^`]*```text\n(.*?)```", text_of(name), flags=re.S)
            assert same_log(told.splitlines(), caplog.messages)
    capsys.readouterr()


def same_log(told: list[str], logged: list[str]) -> bool:
    """Equal but for the last digits of distances."""
    distance = re.compile(r"(?<=min_dist: )[\d.]+")
    pairs = [distance.findall("\n".join(lines)) for lines in (told, logged)]
    near = all(abs(float(a) - float(b)) < 0.01 for a, b in zip(*pairs, strict=True))
    return near and [distance.sub("", line) for line in told] == [distance.sub("", line) for line in logged]


@pytest.mark.parametrize("name", [name for name in PAGES if commands(text_of(name))])
def test_commands_run(name, workshop, capsys):
    if name == "dermoscopy":
        make_isic(workshop / "ISIC2018")
        first = workshop / "ISIC2018/ISIC2018_Task3_Training_Input/ISIC_0000000.jpg"
        shutil.copyfile(first, workshop / "ISIC_0024306.jpg")
    if name == "scale":
        first = (workshop / "images" / "bird" / "000.png").read_bytes()
        write_tar(workshop / "shards" / "test-0000.tar", {"abc.png": first})
    for command in commands(text_of(name)):
        words = command[command.index("protopush") + 1 :]
        parser_of(words, read=True)
        if name not in SLOW.get(words[0], {name}) or "torchrun" in command or "--trainer.devices" in words:
            continue  # they run in test_readme.py, test_app_browser.py, test_training_ddp.py
        if words[0] == "train":
            words += [*SMALL, "--train.head_epochs", "1" if "--train.head_epochs" in words else "0"]
        elif words[0] == "push":
            words += ["--overwrite"]
        elif words[0] in ("report", "compare"):
            words += ["--faithfulness", "2", "--resamples", "20"]
        words = ["ISIC_0024306.jpg" if word.endswith("ISIC_0024306.jpg") else word for word in words]
        assert main(words) == 0, command
    capsys.readouterr()


@every_page
def test_recipes_parse(name, tmp_path):
    for number, block in enumerate(blocks("yaml", text_of(name))):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(block, encoding="utf-8")
        parser_of(["train", "--config", str(recipe), "--out", "run"], read=True)


def test_the_recipe_told_is_the_recipe():
    (told,) = blocks("yaml", text_of("dermoscopy"))
    recipe = (ROOT / "recipes/ham10000-windows.yaml").read_text(encoding="utf-8")
    assert recipe.endswith(told)


@every_page
def test_blocks_say_their_language(name):
    fences = re.findall(r"^```(.*)$", text_of(name), flags=re.M)
    assert len(fences) % 2 == 0
    if name != "data":  # its layouts are of no language
        assert set(fences[::2]) <= {"python", "bash", "yaml", "json", "text"}


# Tables


def table_after(mark: str, text: str) -> list[list[str]]:
    """The rows of the table after a comment, without its two head lines."""
    _, found, rest = text.partition(f"<!-- {mark} -->\n\n")
    assert found, mark
    rows = [line for line in rest.split("\n\n")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize(("name", "column"), [("push", 1), ("zh/push", 2)])
def test_arguments_are_those_of_the_code(name, column):
    required = {"push": "required", "zh/push": "必需"}[name]
    for method in ("push_prototypes", "push_prototypes_local"):
        rows = table_after(f"arguments: {method}", text_of(name))
        told = {row[0].strip("`"): row[column] for row in rows}
        signature = inspect.signature(getattr(protopush.PushMixin, method)).parameters
        every = inspect.signature(protopush.push_prototypes).parameters
        true = {key: one for key, one in signature.items() if key not in ("self", "options")}
        if method == "push_prototypes":
            true |= {key: one for key, one in every.items() if key != "model" and key not in true}
        shown = {
            key: required if one.default is inspect.Parameter.empty else f"`{one.default!r}`".replace("'", '"')
            for key, one in true.items()
        }
        assert told == shown


def test_every_option_is_told(site):
    page = site / "commands.html"
    shown = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
    for command in COMMANDS:
        assert f'id="{command.replace(" ", "-")}"' in page.read_text(encoding="utf-8"), command
        for action in parser_of(command.split())._actions:
            for option in [word for word in action.option_strings[:1] if word not in ("-h", "--print_config")]:
                assert option in shown or option.endswith(".help"), (command, option)
    assert "--model.windows.stride" in shown  # behind an option that may be null


GPU = re.compile(r"cuda|nccl|bf16|16-mixed|torch\.compile|\bGPUs\b|\b(on|with) a GPU", re.IGNORECASE)


def test_what_is_said_of_gpus_leads_to_what_was_run():
    papers = [*PAGES.values(), *ROOT.glob("*.md"), *(ROOT / "recipes").glob("*.yaml")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in papers}
    about = {name for name, text in texts.items() if GPU.search(text)}
    assert about >= {"README.md", "docs/gpus.md", "docs/training.md", "docs/zh/push.md", "recipes/folder.yaml"}
    marks = {name: "gpus.md" if name.startswith("recipes/") else "(gpus.md#what-was-run)" for name in about}
    marks |= {"docs/gpus.md": "(#what-was-run)", "docs/zh/push.md": "(../gpus.md#what-was-run)"}
    marks |= {name: "(docs/gpus.md" for name in about if "/" not in name}
    assert {name for name in about if marks[name] not in texts[name]} == set()
    table = texts["docs/gpus.md"].partition("## What was run")[2]
    named = re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", table)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_report_is_told():
    text = text_of("report")
    for title, _ in SECTIONS.values():
        assert f"| {title} |" in text
    for terms in TERMS.values():
        for term in terms.values():
            assert f"| {term.name} | {term.better or '-'} | {term.meaning} |" in text
    for column, meaning in PER_CLASS.values():
        assert f"| {column} | {meaning} |" in text


def test_local_against_global_is_as_measured():
    rows = json.loads((ROOT / "benchmarks/results/evidence.json").read_text())["rows"]

    def measured(arm: str, metric: str) -> float:
        return fmean(
            told["values"][0]
            for row in rows
            if row["arm"] == arm
            for told in row["compared"]
            if told["metric"] == metric
        )

    for metric in ("AUROC", "balanced accuracy", "calibration error", "diversity within a class", "pointing game"):
        row = " | ".join(f"{measured(arm, metric):.3f}" for arm in ("whole-image", "last-map", "windows"))
        assert f"| {row} |" in text_of("zh/push"), metric
    english = text_of("report")
    for metric, digits in (("AUROC", 3), ("calibration error", 3), ("diversity within a class", 2)):
        local, pooled = (f"{measured(arm, metric):.{digits}f}" for arm in ("last-map", "whole-image"))
        assert re.search(rf"{local} against\s+{pooled}", english), metric


def test_faults_are_told():
    text = text_of("verify")
    assert all(f"`{fault}`" in text for fault in PROBLEMS if fault)
    for fault in ("file_missing", "file_changed", "weights_changed", "similarity_off"):
        assert f"| {PROBLEMS[fault]} | `{fault}` |" in text
    holds = AnchorCheck("a", 0, "a.png", 1.0, 1.0, "")
    assert blocks("text", text)[0].strip() == anchors_table([holds] * 70)
    (record,) = blocks("json", text)
    assert set(json.loads(record)["anchor"]) == set(protopush.Anchor(0, 0, (1, 1), 1.0, 1.0).to_dict())


def test_proofs_are_shown_as_they_are_printed():
    windows, whole = (block.strip().splitlines() for block in blocks("text", text_of("local"))[:2])
    nothing = Locality("a", 0.98, dict.fromkeys(("noise", "black", "another image"), 0.0))
    holds = AnchorCheck("a", 0, "a.png", 1.0, 1.0, "")
    shown = [line.rstrip() for line in locality_table([nothing] * 28, "box").splitlines()]
    assert windows == [anchors_table([holds] * 12), *shown]
    *head, verdict = locality_table([nothing] * 28, "all").splitlines()
    assert (whole[1], whole[-1]) == (head[0].rstrip(), verdict)


def test_the_message_about_nan_is_the_message(toy):
    images = torch.randn(205, 4, 6)
    images[[17, 204]] = float("nan")
    with pytest.raises(protopush.InputError) as error:
        toy(2, 1).push_prototypes(DataLoader(TensorDataset(images, torch.arange(205) % 2), batch_size=205), "cpu")
    assert str(error.value) == blocks("text", text_of("faq"))[0].strip()


def test_chinese_is_not_broken_by_line_ends():
    lines = text_of("zh/push").splitlines()
    chinese = re.compile(r"[\u3000-\u9fff\uff00-\uffef]")
    broken = [
        (first, second)
        for first, second in pairwise(lines)
        if first and chinese.match(first[-1]) and chinese.match(second[:1]) and not first.startswith(("|", "#"))
    ]
    assert broken == []  # a browser would put a space there


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site: without a warning, or it isn't built."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


class Links(HTMLParser):
    """What a page links to, what it loads, and what can be linked to in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.idents: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value for key, value in attrs if value}
        self.idents |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif found.get("rel") not in ("canonical", "prev", "next"):
            self.loads += [found[key] for key in ("href", "src") if key in found]


@pytest.fixture(scope="module")
def links(site) -> dict[Path, Links]:
    return {file: Links(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}


def test_no_link_is_dead(site, links):
    dead, outside = [], set()
    for file, page in links.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                outside.add(link)
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            known = links[target].idents if target in links else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known):
                dead.append((file.name, link))
    assert dead == []
    assert len(links) == len(PAGES)
    assert outside
    for link in outside:
        assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", link), link


def test_pages_ask_nothing_of_the_network(site, links):
    for file, page in links.items():
        assert page.loads
        for load in page.loads:
            assert not urlsplit(load).scheme, (file.name, load)
            assert not urlsplit(load).netloc, (file.name, load)
            assert (file.parent / urlsplit(load).path).is_file(), (file.name, load)
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_all_public_names_are_in_the_reference(site, links):
    known = links[site / "reference.html"].idents
    assert {f"protopush.{name}" for name in protopush.__all__} <= known


def test_docstrings_are_read_well(site):
    for name in ("reference", "rooms"):
        text = re.sub(r"<[^>]+>", "", (site / f"{name}.html").read_text(encoding="utf-8"))
        assert not re.search(r":(class|func|meth|data|mod):", text)  # a role that was not made a link
        assert "&gt;&gt;&gt;" in text
    assert "tools" not in {path.name for path in site.iterdir()}


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_pages_in_a_browser(browser, site, width, scheme):
    for name in ("index", "local", "zh/push", "commands", "reference"):
        with Visit(browser, site / f"{name}.html", width, scheme) as visit:
            assert {url.split(":")[0] for url in visit.asked} <= {"file", "data", "blob"}
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
            assert visit.said == []
            found = visit.page.evaluate("document.documentElement.lang")
            assert found == ("zh-Hans" if name.startswith("zh") else "en")
            visit.page.evaluate("document.querySelectorAll('.headerlink').forEach(mark => mark.remove())")
            contrasts = visit.page.evaluate(
                CONTRASTS.replace("document.body, Node", "document.querySelector('article'), Node")
            )
        assert len(contrasts) > 2
        assert {pair: round(value, 2) for pair, value in contrasts.items() if value < 4} == {}
