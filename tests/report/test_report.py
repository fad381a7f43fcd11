"""The report: its numbers are those that were measured, its sums add up, and no name in it becomes markup."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jinja2 import ChoiceLoader, FileSystemLoader
from markupsafe import escape
from PIL import Image

from helpers import made_once, make_images, train_small
from protopush import InputError
from protopush.cli import commands, main
from protopush.cli.parser import read_options
from protopush.cli.tables import anchors_table, audit_table, decision_table, metrics_table
from protopush.data.audit import Audit, Pair, audit, audit_findings, audit_verdict
from protopush.data.dataset import ImageDataset
from protopush.data.files import read_rows
from protopush.data.sources import load_catalog
from protopush.data.transforms import View
from protopush.evaluation.compare import ROWS
from protopush.evaluation.measure import measure
from protopush.explain.figure_style import percent
from protopush.explain.neighbours import find_neighbours
from protopush.metrics.glossary import TERMS, metric_text, number_groups
from protopush.models.model_card import card
from protopush.push.certificate import anchors_verdict, verify_anchors
from protopush.report import build
from protopush.report.build import build_report
from protopush.report.cases import select_cases
from protopush.report.number_sections import (
    ReportData,
    chart_of,
    confusion_matrix,
    drawn_groups,
    pushes_of,
    reliability,
)
from protopush.report.prototype_cards import embed, framed, heat, part
from protopush.report.sections import SECTIONS
from protopush.runs.run import open_run
from protopush.training.config import RunConfig

EVIL = "<img src=x onerror=alert(1)>"
WORSE = "\"'><script>alert(2)</script>{{ 7 * 7 }}"
CLASSES = [EVIL, "bird", "{{ 7 * 7 }}&amp;"]
VOID = {"meta", "link", "img", "br"}
TAGS = (
    "html head meta title style link body header nav main section article footer h1 h2 h3 h4 h5 p small strong a ul ol "
    "li dl dt dd div span bdi figure figcaption img table thead tbody tr th td pre code details summary br "
    "svg path rect circle polyline text b i"
)


class Page(HTMLParser):
    """What a browser would make of the page: elements with attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if attrs.get(name) is not None]


def hostile_report(factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run of :func:`make_hostile_run` and the page about it, made once."""
    root = made_once(
        factory, "hostile", lambda root: build_report(**parts_of(make_hostile_run(root)), path=root / "report.html")
    )
    return root / WORSE.replace("/", "-") / "run", root / "report.html"


def make_hostile_run(root: Path) -> Path:
    """A run whose folder, data, classes, files and decisions all have names that would like to be markup."""
    data = make_images(root / 'a"b&<em>' / "images", CLASSES, 10)
    for number, file in enumerate(sorted((data / EVIL).iterdir())):
        file.rename(file.with_name(f"{EVIL}{number or ''}.jpg"))
    run = train_small(root / WORSE.replace("/", "-"), data, 2) / "run"
    words = ["--prototype", "0:0", "--reason", WORSE, "--who", EVIL, "--data.num_workers", "0"]
    assert main(["forbid", str(run), *words]) == 0
    return run


def parts_of(folder: Path) -> dict:
    """All that a report can show, as :func:`build_report` takes it."""
    run = open_run(folder)
    catalog = load_catalog(run.data["path"], run.data["source"], classes=run.class_names)
    dataset = ImageDataset(catalog.split("test"), run.transform)
    measured = measure(run, dataset, "test", {}, resamples=20, faithfulness=2)
    train = ImageDataset(catalog.split("train"), run.transform)
    other = {"name": WORSE, "match": "global", "anchoring": "off", "backbone": EVIL}
    row = {
        "group": "accuracy",
        "metric": EVIL,
        "better": "higher",
        "values": [0.5, None],
        "intervals": [[0.4, 0.6], None],
    }
    return {
        "run": run,
        "measured": measured,
        "neighbours": find_neighbours(run.model, train),
        "checks": verify_anchors(run.model, run.head.proto_manager, run.transform, run.root, run.class_names),
        "audit": audit(catalog),
        "comparison": {"runs": [other, other | {"match": "local"}], "rows": [row]},
    }


@pytest.fixture(scope="module")
def parts(tmp_path_factory, one_thread):
    return parts_of(hostile_report(tmp_path_factory)[0])


@pytest.fixture(scope="module")
def page(one_thread, tmp_path_factory):
    return Page(hostile_report(tmp_path_factory)[1].read_text(encoding="utf-8"))


def section(name, parts, **other):
    """The context of a section."""
    values = {"device": "cpu", "root": parts["run"].root} | parts | other
    return SECTIONS[name][1](ReportData(**values))


# Names


def test_no_name_becomes_markup(page):
    assert {tag for tag, _ in page.elements} <= set(TAGS.split())
    assert page.open == []  # every element that was opened is closed: nothing broke out
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert {source.split(";")[0] for source in page.all("src")} == {"data:image/jpeg"}
    assert {link[0] for link in page.all("href") if link != "data:,"} == {"#"}
    known = {"width", "height", "left", "top", "--share", "margin", "opacity", "display"}
    assert {rule.split(":")[0] for style in page.all("style") for rule in style.split(";")} <= known


def test_names_are_shown_as_they_are(page):
    for name in (*CLASSES, WORSE, 'a"b&<em>'):
        assert name in page.text
    assert any(f"{EVIL}/{EVIL}{number}.jpg" in page.text for number in ("", *range(1, 10)))
    assert any(f"{EVIL}/{EVIL}" in alt for alt in page.all("alt"))
    assert "49" not in page.text.split("{{ 7 * 7 }}")[0][:200]  # a name is no template


def test_a_file_name_that_is_no_text_does_not_stop_the_page(parts, tmp_path):
    run = parts["run"]
    bad = replace(parts["checks"][0], file="caf\udce9.png", fault="file_missing")
    path = build_report(**parts | {"checks": [bad, *parts["checks"][1:]]}, path=tmp_path / "r.html")
    assert "caf?.png" in path.read_text(encoding="utf-8")
    assert "Does not hold: file missing" in path.read_text(encoding="utf-8")
    assert run.head.proto_manager.anchors


# One file, whole


def test_the_page_asks_for_nothing_and_runs_nothing(page):
    policy = next(attrs["content"] for tag, attrs in page.elements if "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    assert "script" not in policy
    assert not {"script", "iframe", "object", "embed", "form", "video"} & {tag for tag, _ in page.elements}
    assert not page.all("srcset")


def test_every_link_has_its_target_and_every_image_its_words(page):
    idents = page.all("id")
    assert max(Counter(idents).values()) == 1
    assert {link[1:] for link in page.all("href") if link != "data:,"} <= set(idents)
    for tag, attrs in page.elements:
        if tag == "img":
            assert attrs["alt"]
            with Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",", 1)[1]))) as picture:
                picture.load()


def test_a_table_without_intervals_has_no_column_for_them(parts, tmp_path):
    groups = section("numbers", parts)["groups"]
    with_intervals = [group for group in groups if any(number["interval"] for number in group["numbers"])]
    page = build_report(**parts, path=tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<th>95 % interval</th>") == len(with_intervals) < len(groups)


def test_a_page_that_cannot_be_written_leaves_the_old_one(parts, tmp_path, monkeypatch):
    path = build_report(**parts, path=tmp_path / "r.html")
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(InputError, match="cannot write"):
        build_report(**parts, path=path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.html"]


def test_what_is_missing_is_told(parts, tmp_path):
    run, measured = parts["run"], parts["measured"]
    path = build_report(run, measured, path=tmp_path / "r.html")
    text = Page(path.read_text(encoding="utf-8")).text
    for told in (
        "Not checked", "protopush verify", "were not audited", "--audit true", "not compared with another", "--against",
        "were not searched for", "Where the evidence lies : not measured",
    ):  # fmt: skip
        assert told in text
    assert "anchors hold" not in text
    assert "No leak" not in text


def test_a_run_that_was_never_pushed(parts, tmp_path):
    run = open_run(parts["run"].folder)
    run.head.proto_manager.anchors[:] = [None] * len(run.head.proto_manager.anchors)
    assert section("certificate", parts, run=run, checks=None)["verdict"] == ("warn", "Never pushed")
    cards = [card for one in section("prototypes", parts, run=run)["classes"] for card in one["cards"]]
    assert all("Never pushed" in card["missing"] and card["part"] is None for card in cards)
    assert "Never pushed" in build_report(**parts | {"run": run}, path=tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_state_of_the_certificate(parts):
    checks = parts["checks"]
    assert section("certificate", parts)["verdict"] == ("good", f"All {len(checks)} anchors hold")
    broken = [replace(checks[0], fault="file_changed"), *checks[1:]]
    certificate = section("certificate", parts, checks=broken)
    assert certificate["verdict"] == ("bad", f"1 of {len(checks)} anchors do not hold")
    assert [fault["problem"] for fault in certificate["faults"]] == ["file changed"]


# Numbers


def test_the_page_has_the_measured_numbers(page, parts):
    found = parts["measured"].numbers["classification"]
    for key in ("accuracy", "balanced_accuracy", "auroc", "macro_f1", "ece"):
        assert f"{found[key]:.3f}" in page.text
    low, high = found["intervals"]["balanced_accuracy"]
    assert f"{low:.3f} to {high:.3f}" in page.text
    confused = section("confusion", parts)
    assert confused["matrix"]["rows"] == found["confusion"]
    assert [row["n"] for row in section("numbers", parts)["classes"]] == [sum(row) for row in found["confusion"]]
    assert sum(count for _, _, count in confused["reliability"]) == found["n"]


def test_a_number_that_nobody_knows_is_shown_under_its_own_name():
    values = {
        "accuracy": float("nan"),
        "deep": {"new": 0.25, "per_class": [1]},
        "intervals": {"deep": {"new": [0.1, 0.3]}},
    }
    groups = number_groups(
        {"classification": values, "future": {"count": 3, "many": [0.5, None]}, "localization": None}
    )
    told = {(g["title"], one["name"]): (one["text"], one["interval"]) for g in groups for one in g["numbers"]}
    assert told == {
        ("Classification", "accuracy"): ("–", None),
        ("Classification", "deep.new"): ("0.250", (0.1, 0.3)),
        ("future", "count"): ("3", None),
        ("future", "many"): ("0.500, –", None),
    }


def test_chance_is_that_of_the_data():
    values = {"per_class": {"a": {}, "b": {}, "c": {}, "d": {}}, "balanced_accuracy": 0.5, "auroc": 0.9}
    region = {"mask_area": 0.3, "pointing_game": 0.5}
    (balanced, auroc), (_, pointing) = (
        g["numbers"] for g in number_groups({"classification": values, "localization": region})
    )
    assert (balanced["chance"], auroc["chance"], pointing["chance"]) == (0.25, 0.5, 0.3)


def test_reliability_against_loops():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        probabilities = (3 * torch.randn(50, 4, generator=generator)).softmax(dim=1).double()
        labels = torch.randint(4, (50,), generator=generator)
        told = []
        for low in range(10):
            sure = [
                (max(row), row.index(max(row)) == label)
                for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
                if low / 10 < max(row) <= (low + 1) / 10
            ]
            if sure:
                told.append((np.mean([p for p, _ in sure]), np.mean([right for _, right in sure]), len(sure)))
        np.testing.assert_allclose(reliability(probabilities, labels), told)


def test_reliability_at_the_edges():
    bins = reliability(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 0, 1]), bins=2)
    assert bins == [(0.5, 0.5, 2), (1.0, 1.0, 1)]


def test_confusions_against_loops():
    random = np.random.default_rng(0)
    for classes in (2, 7, 31):
        counts = random.integers(0, 5, (classes, classes))
        counts[1] = 0  # a class without images
        names = [f"c{i}" for i in range(classes)]
        found = confusion_matrix(counts.tolist(), names)
        assert found["rows"] == ([] if classes > 30 else counts.tolist())
        expected = [
            (names[i], names[j], counts[i, j], counts[i, j] / counts[i].sum())
            for i in range(classes)
            for j in range(classes)
            if i != j and counts[i, j]
        ]
        assert set(found["common"]) <= set(expected)
        assert [n for _, _, n, _ in found["common"]] == sorted((n for _, _, n, _ in expected), reverse=True)[:12]
    assert confusion_matrix(None, ["a", "b"]) is None


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.0, "0"), (1e-9, "<0.1%"), (0.0004, "<0.1%"), (0.5, "50.0%"), (0.9996, ">99.9%"), (1.0, "100")],
)
def test_percent_says_never_and_always_only_where_it_is_so(share, told):
    assert percent(share).startswith(told)
    assert build.environment().from_string("{{ share | percent }}").render(share=share) == escape(percent(share))


# Cases


def test_cases_add_up(parts):
    cases = section("cases", parts)["cases"]
    assert cases
    for case in cases:
        said, rows = case["scores"][0], case["rows"]
        assert case["predicted"] == said["name"]
        assert case["right"] == (case["predicted"] == case["truth"])
        total = sum(row["contribution"] for row in rows) + case["others_sum"]
        assert total == pytest.approx(said["contributions"])
        assert total + said["bias"] == pytest.approx(said["logit"], abs=1e-4)
        assert all(row["similarity"] * row["weight"] == pytest.approx(row["contribution"], abs=1e-5) for row in rows)
        assert any("true class" in score["role"] for score in case["scores"])
        low, high = case["heat_range"]
        assert (low, high) == (min(sum(rows[0]["match"].map, ())), max(sum(rows[0]["match"].map, ())))
        assert high == pytest.approx(rows[0]["similarity"])


def test_selected_cases_against_loops():
    for seed in range(30):
        random = np.random.default_rng(seed)
        n, classes = int(random.integers(1, 12)), int(random.integers(2, 4))
        probabilities = torch.tensor(random.dirichlet(np.ones(classes), n).round(1))  # ties
        labels = torch.tensor(random.integers(0, classes, n))
        found = select_cases(probabilities, labels, each=3)
        top, predicted = probabilities.max(dim=1)
        chosen = [i for some in found.values() for i in some]
        assert len(chosen) == len(set(chosen))
        for kind, wanted in (("right", True), ("wrong", False)):
            pool = [i for i in range(n) if bool(predicted[i] == labels[i]) == wanted]
            assert set(found[kind]) <= set(pool)
            assert len(found[kind]) == min(3, len(pool))
            if pool:
                assert float(top[found[kind][0]]) == max(float(top[i]) for i in pool)
                assert len({int(labels[i]) for i in found[kind]}) == min(3, len({int(labels[i]) for i in pool}))
        left = [i for i in range(n) if i not in found["right"] + found["wrong"]]
        assert len(found["unsure"]) == min(3, len(left))
        if left:
            assert float(top[found["unsure"][0]]) == min(float(top[i]) for i in left)


def test_no_wrong_answer_is_told(parts, tmp_path):
    measured = parts["measured"]
    sure = replace(measured, labels=measured.probabilities.argmax(dim=1))
    shown = section("cases", parts, measured=sure)
    assert shown["all_right"]
    assert {case["title"] for case in shown["cases"]} == {"Right, and sure of it", "Not sure"}


# Prototypes


def test_each_prototype_is_shown_with_its_source(parts):
    classes, run = section("prototypes", parts)["classes"], parts["run"]
    manager = run.head.proto_manager
    for c, one in enumerate(classes):
        assert one["name"] == run.class_names[c]
        slots = manager.mask()[c].nonzero().flatten().tolist()
        assert [some["name"] for some in one["cards"]] == [f"{one['name']} #{k}" for k in slots]
        for k, shown in zip(slots, one["cards"], strict=True):
            assert shown["file"] == manager.anchors[c * manager.max_prototypes + k].file
            assert shown["part"] is not None
            assert shown["source"].frames
            assert [near["class_name"] for near in shown["own"]] == [one["name"]] * len(shown["own"])
            assert one["name"] not in [near["class_name"] for near in shown["others"]]
            assert all(near["picture"] is not None for near in shown["own"] + shown["others"])


def test_images_that_are_gone_leave_a_gap(parts, tmp_path):
    path = build_report(**parts, root=tmp_path / "moved", path=tmp_path / "r.html")
    text = Page(path.read_text(encoding="utf-8")).text
    assert "picture not found" in text  # the neighbours', which lie with the data
    assert "The run keeps no picture" not in text  # the prototypes' own lie in the run


def test_a_frame_is_where_its_box_is():
    picture = Image.new("RGB", (200, 100), "black")
    picture.paste("white", (120, 40, 160, 60))
    shown = framed(embed(picture, 100, 100, ""), [(120, 40, 160, 60)], picture.size)
    assert (shown.width, shown.height) == (100, 50)
    (frame,) = shown.frames
    assert (frame.x, frame.y, frame.width, frame.height) == (60, 40, 20, 20)


@pytest.mark.parametrize(
    "box", [(0, 0, 40, 40), (120, 40, 160, 60), (160, 60, 200, 100), (0, 0, 200, 100), (199, 99, 200, 100)]
)
def test_a_part_holds_its_box(box):
    picture = Image.new("RGB", (200, 100), "black")
    picture.paste("white", box)
    shown = part(picture, box, 100, "")
    with Image.open(io.BytesIO(base64.b64decode(shown.uri.split(",")[1]))) as stored:
        pixels = np.asarray(stored.convert("L"), dtype=float)
    (frame,) = shown.frames
    right, bottom = frame.x + frame.width, frame.y + frame.height
    x0, x1 = (round(edge / 100 * pixels.shape[1]) for edge in (frame.x, right))
    y0, y1 = (round(edge / 100 * pixels.shape[0]) for edge in (frame.y, bottom))
    inside = pixels[y0 + 3 : max(y1 - 3, y0 + 4), x0 + 3 : max(x1 - 3, x0 + 4)]
    if min(box[2] - box[0], box[3] - box[1]) > 1:  # one pixel is no more than a blur
        assert inside.mean() > 200
    assert 0 <= frame.x < right <= 100.01
    assert 0 <= frame.y < bottom <= 100.01


def test_heat_lies_on_what_the_model_sees_and_nowhere_else():
    picture = Image.new("RGB", (300, 100), (120, 120, 120))
    warm = heat(picture, ((0.0, 1.0), (0.5, 0.25)), View.of((300, 100), (200, 200)), 300, "")
    with Image.open(io.BytesIO(base64.b64decode(warm.uri.split(",")[1]))) as stored:
        pixels = np.asarray(stored, dtype=float)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    assert spread[:, :90].max() < 10
    assert spread[:, 210:].max() < 10
    assert spread[:, 105:195].mean() > 30
    assert pixels[20, 180].sum() > pixels[20, 120].sum()  # the highest is the brightest


def test_an_even_map_has_no_colours_to_divide_by():
    assert heat(Image.new("RGB", (10, 10)), ((0.3,),), View.of((10, 10), (10, 10)), 10, "").uri


@pytest.mark.parametrize(
    ("groups", "drawn"), [([], 0), ([None] * 3, 0), (["a", "b", "c"], 0), (["a", "a", "b"], 2), (["a", "a", None], 2)]
)
def test_how_many_groups_the_intervals_draw_from(groups, drawn):
    assert drawn_groups(groups) == drawn


def test_what_looks_alike_by_nature_is_no_leak_yet():
    pair = Pair("a.jpg", "b.jpg", ("train", "test"), ("cat", "cat"), same_group=False, identical=False, similarity=0.95)
    found = Audit({"train": {"cat": 50}}, duplicates=(pair,) * 30)
    assert found.leaks
    assert audit_verdict(found)[0] == "warn"
    assert audit_verdict(replace(found, duplicates=(pair,)))[0] == "bad"
    assert audit_verdict(replace(found, shared_groups={"lesion": {"train": 1, "test": 1}}))[0] == "bad"
    assert audit_verdict(replace(found, duplicates=(*[pair] * 30, replace(pair, identical=True))))[0] == "bad"
    assert audit_verdict(replace(found, duplicates=()))[0] == "good"


# Pushes


def test_pushes_as_the_file_tells_them(tmp_path):
    rows = [
        {"epoch": 1, "val": {}},
        {"push": 5, "use_local": True, "momentum": 0.9, "min_dist": 0.5, "mean_dist": 0.8, "mean_dist_after": 0.7,
         "val_before": {"accuracy": 0.5, "auroc": None}, "val_after": {"accuracy": 0.25},
         "guard": {"guard": "budget", "action": "momentum raised", "cost": 0.02, "budget": 0.01},
         "duplicates_avoided": 2, "notes": ["hm"], "growth": {"added": [1, 2]}, "choice": {"removed": [[0, 3]]}},
        {"final": "live", "val_before": None, "val_after": None, "weights": "epoch 4"},
        {"push": 0, "use_local": False, "momentum": 0.0, "min_dist": float("nan"), "mean_dist": None},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    first, live, last = pushes_of(read_rows(tmp_path / "metrics.jsonl"))
    assert (first["when"], first["how"], first["min_dist"]) == ("epoch 5", "patches, momentum 0.9", 0.5)
    assert ("accuracy", 0.5, 0.25) in first["scores"]
    assert ("AUROC", None, None) in first["scores"]
    assert len(first["notes"]) == 5
    assert "choice: 1 prototypes removed" in first["notes"]
    assert live["when"] == "after training"
    assert live["min_dist"] is None
    assert live["notes"] == ["from the weights of epoch 4, the best on validation images"]
    assert (last["when"], last["how"], last["min_dist"]) == ("by command", "whole images, momentum 0", None)
    assert chart_of([first, live, last]) is None  # one point is no line
    assert read_rows(tmp_path / "none.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(InputError, match="line 2"):
        read_rows(tmp_path / "metrics.jsonl")


def test_the_chart_is_to_scale():
    random = np.random.default_rng(0)
    for count in (2, 3, 40):
        values = random.uniform(0, 2, count)
        pushes = pushes_of([{"push": i + 1, "min_dist": v, "mean_dist": v + 0.1} for i, v in enumerate(values)])
        chart = chart_of(pushes)
        top = float(chart["y_ticks"][-1][1])
        assert top >= max(values) + 0.1
        (line,) = [some for some in chart["series"] if "min_dist" in some["name"]]
        for (x, y, drawn), value in zip(line["points"], values, strict=True):
            assert drawn == value
            assert 0 <= x <= chart["width"]
            assert y == pytest.approx(chart["height"] * (1 - value / top), abs=0.2)
        assert len(chart["x_ticks"]) <= 12
        assert chart["y_ticks"][0] == (chart["height"], "0")


# What several places say is one thing.


def pair_of(first, split, group=False, label="cat", identical=False):
    splits = ("train", split)
    return Pair(first, "b.jpg", splits, ("cat", label), same_group=group, identical=identical, similarity=0.97)


def test_the_audit_counts_alike_on_the_command_line_and_in_the_report(parts, tmp_path):
    duplicates = (
        pair_of("1.jpg", "train"), pair_of("2.jpg", "train"), pair_of("3.jpg", "train", group=True),
        pair_of("4.jpg", "test", label="dog"), pair_of("5.jpg", "train", identical=True),
    )  # fmt: skip
    found = Audit({"train": {"cat": 5}, "test": {"cat": 1}}, {"g": {"train": 1, "test": 1}}, duplicates,
                  unreadable={"x.jpg": "missing"}, small={"y.jpg": (3, 3)})  # fmt: skip
    checks = {check.name: check for check in audit_findings(found)}
    assert {name: check.count for name, check in checks.items()} == {
        "groups (lesions, patients) in several splits": 1,
        "identical files across splits": 0,
        "near duplicates across splits": 1,
        "identical files in one split": 1,
        "near duplicates in one split": 2,
        "near duplicates in one group": 1,
        "duplicates with different labels": 1,
        "unreadable files": 1,
        "images with a side below 32 pixels": 1,
    }
    leaks = ["groups (lesions, patients) in several splits", "near duplicates across splits"]
    assert [name for name, check in checks.items() if check.is_leak] == leaks
    table = audit_table(found)
    page = build_report(**parts | {"audit": found}, path=tmp_path / "r.html").read_text(encoding="utf-8")
    text = Page(page).text
    for check in checks.values():
        (line,) = [line for line in table.splitlines() if line.strip().startswith(check.name + "  ")]
        assert line.split(check.name)[1].split()[0] == str(check.count)
        assert f"{check.name} {check.count} " in text
    assert audit_verdict(found)[1] in table
    assert audit_verdict(found)[1] in text
    assert found.leaks == any(check.is_leak for check in checks.values())


def test_the_anchors_have_one_verdict_on_the_command_line_and_in_the_report(parts):
    good = parts["checks"]
    never = [replace(good[0], fault="no_anchor"), *good[1:]]
    broken = [replace(good[0], fault="no_anchor"), replace(good[1], fault="file_missing"), *good[2:]]
    for checks in (good, never, broken):
        verdict = section("certificate", parts, checks=checks)["verdict"]
        assert verdict == section("summary", parts, checks=checks)["verdict"] == anchors_verdict(checks)
        assert anchors_table(checks).startswith(verdict[1])
    assert anchors_verdict(never) == ("warn", f"{len(good) - 1} of {len(good)} anchors hold, 1 was never pushed")
    assert anchors_verdict(broken) == ("bad", f"1 of {len(good)} anchors do not hold")
    assert anchors_verdict([replace(check, fault="no_anchor") for check in good]) == ("warn", "Never pushed")


def test_metrics_have_one_name_and_one_number_everywhere(parts, page, tmp_path):
    found, terms = parts["measured"].numbers["classification"], TERMS["classification"]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "val": found}))
    model_card, table = card(parts["run"].model, tmp_path / "metrics.jsonl"), metrics_table(found)
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        name, value = terms[key].name, metric_text(found[key])
        assert f"| {name} | {value} |" in model_card
        assert re.search(rf"^\s*{name}\s+{value}$", table, flags=re.M)
        assert f"{name} {value} " in page.text
    for _, words, better, (kind, *keys) in ROWS:
        term = TERMS[kind][".".join(keys)]
        assert term.better == better, words
        if kind == "classification":
            assert term.name == words


def test_a_comparison_has_the_names_of_the_glossary(parts):
    rows = [
        {"group": group, "metric": words, "better": better, "values": [0.5], "intervals": [None]}
        for group, words, better, _ in ROWS
    ]
    shown = section("comparison", parts, comparison={"runs": [], "rows": rows})["rows"]
    assert [row["name"] for row in shown] == [TERMS[kind][".".join(keys)].name for *_, (kind, *keys) in ROWS]


def test_a_decision_has_the_same_words_on_the_command_line_and_in_the_report(parts, tmp_path):
    (made,) = section("certificate", parts)["decisions"]
    assert made.summary.startswith(f"{EVIL} #0 must not stand for its part of ")
    table = decision_table(made, "run", dry_run=False)
    text = Page(build_report(**parts, path=tmp_path / "r.html").read_text(encoding="utf-8")).text
    for words in (made.summary, made.reason, made.who):
        assert " ".join(words.split()) in " ".join(table.split())
        assert words in text
    assert made.effect in text
    kinds = {"image": "no prototype may", "mask": "inside the masks", "keep": "is kept", "undo": "decision no. 7"}
    for kind, words in kinds.items():
        assert words in replace(made, kind=kind, undoes=7).summary


def test_the_demo_and_the_report_show_the_same_cases(monkeypatch, tmp_path, capsys):
    drawn = []
    random = np.random.default_rng(0)
    probabilities, labels = torch.tensor(random.dirichlet(np.ones(3), 30)), torch.tensor(random.integers(0, 3, 30))
    samples = [SimpleNamespace(image=tmp_path / f"{i}.png") for i in range(30)]
    numbers = {"classification": {"n": 30, "accuracy": 0.5, "balanced_accuracy": 0.5, "auroc": None}}
    measured = SimpleNamespace(
        probabilities=probabilities, labels=labels, dataset=SimpleNamespace(samples=samples), numbers=numbers
    )
    run = SimpleNamespace(
        folder=tmp_path,
        report=lambda **_: (tmp_path / "report.html", measured),
        explain=lambda images, out, names: [
            drawn.append(pair) or {"panel": pair[0]} for pair in zip(names, images, strict=True)
        ],
    )
    monkeypatch.setattr("protopush.training.trainer.train", lambda *_, **__: run)
    monkeypatch.setattr(commands, "open_run", lambda *_, **__: run)
    assert commands.demo(config=RunConfig(), out=str(tmp_path)) == 0
    first = {kind: some[0] for kind, some in select_cases(probabilities, labels).items()}
    assert dict(drawn) == {commands.PANELS[kind]: samples[i].image for kind, i in first.items()}
    assert "accuracy 0.500, balanced accuracy 0.500." in capsys.readouterr().out


def test_a_section_is_one_function_one_template_and_one_line(parts, monkeypatch, tmp_path):
    (tmp_path / "weather.html.j2").write_text("<p>{{ words }}</p>", encoding="utf-8")
    monkeypatch.setitem(SECTIONS, "weather", ("Weather", lambda data: {"words": f"<sunny> {data.measured.split}"}))
    monkeypatch.setattr(
        build.environment(), "loader", ChoiceLoader([FileSystemLoader(tmp_path), build.environment().loader])
    )
    page = Page(build_report(**parts, path=tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "<sunny> test" in page.text
    assert "#weather" in page.all("href")


def test_each_image_of_a_report_is_decoded_once(parts, monkeypatch, tmp_path):
    read: Counter = Counter()
    for module in ("cases", "prototype_cards"):
        real = importlib.import_module(f"protopush.report.{module}").read_image
        monkeypatch.setattr(
            f"protopush.report.{module}.read_image", lambda file, real=real: read.update([file]) or real(file)
        )
    build_report(**parts, path=tmp_path / "r.html")
    assert read
    assert max(read.values()) == 1


def test_rows_of_a_contribution_are_those_of_the_explanation(parts):
    (case, *_) = section("cases", parts)["cases"]
    assert [row["number"] for row in case["rows"]] == list(range(1, len(case["rows"]) + 1))
    assert max(row["share"] for row in case["rows"]) == 1.0


@pytest.mark.parametrize("data", [{"path": "images", "split_seed": 3}, {"source": "elpv", "split_seed": 1}])
def test_the_commands_that_it_prints_are_commands(parts, data):
    shown = section("reproduce", parts, run=replace(parts["run"], data=data))["commands"]
    assert {words[0] for _, words in shown} >= {"data", "evaluate", "verify", "report"}
    for _, words in shown:
        name = "data audit" if words[0] == "data" else words[0]
        read_options(name, words[len(name.split()) :])
