"""The report: its numbers are those that were measured, its sums add up, and no name in it becomes markup."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import made_once, make_images, train_small
from protopush import InputError
from protopush.cli import main
from protopush.data.audit import Audit, Pair, audit
from protopush.data.dataset import ImageDataset
from protopush.data.sources import load_catalog
from protopush.evaluation.measure import measure
from protopush.explain.neighbours import find_neighbours
from protopush.push.certificate import verify_anchors
from protopush.report.build import build_report, drawn_groups, gather, percent
from protopush.report.cases import telling
from protopush.report.inline_pictures import embed, framed, heat, part
from protopush.report.metric_tables import confusion_of, number_groups, reliability
from protopush.report.provenance import audit_of
from protopush.report.push_history import chart_of, pushes_of, read_rows
from protopush.runs.run import open_run

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


def content_of(parts, **other):
    values = parts | other
    return gather(
        values["run"], values["measured"], values["neighbours"], values["checks"], values["audit"],
        values["comparison"], values["run"].root, "cpu",
    )  # fmt: skip


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
    for name in (*CLASSES, f"{EVIL}/{EVIL}.jpg", WORSE, 'a"b&<em>'):
        assert name in page.text
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
        "were not looked for", "Where it looks : not measured",
    ):  # fmt: skip
        assert told in text
    assert "anchors hold" not in text
    assert "No leak" not in text


def test_a_run_that_was_never_pushed(parts, tmp_path):
    run = open_run(parts["run"].folder)
    run.head.proto_manager.anchors[:] = [None] * len(run.head.proto_manager.anchors)
    content = content_of(parts, run=run, checks=None)
    assert content.certificate.badge.text == "Never pushed"
    assert all("Never pushed" in card.missing and card.part is None for one in content.prototypes for card in one.cards)
    assert "Never pushed" in build_report(**parts | {"run": run}, path=tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_state_of_the_certificate(parts):
    checks = parts["checks"]
    assert content_of(parts).certificate.badge.text == f"All {len(checks)} anchors hold"
    broken = [replace(checks[0], fault="file_changed"), *checks[1:]]
    certificate = content_of(parts, checks=broken).certificate
    assert certificate.badge == replace(certificate.badge, state="bad", text=f"1 of {len(checks)} anchors do not hold")
    assert [fault.problem for fault in certificate.faults] == ["file changed"]


# Numbers


def test_the_page_has_the_measured_numbers(page, parts):
    found = parts["measured"].numbers["classification"]
    for key in ("accuracy", "balanced_accuracy", "auroc", "macro_f1", "ece"):
        assert f"{found[key]:.3f}" in page.text
    low, high = found["intervals"]["balanced_accuracy"]
    assert f"{low:.3f} to {high:.3f}" in page.text
    content = content_of(parts)
    assert content.confusion.rows == found["confusion"]
    assert [row.n for row in content.class_rows] == [sum(row) for row in found["confusion"]]
    assert sum(some.count for some in content.reliability) == found["n"]


def test_a_number_that_nobody_knows_is_shown_under_its_own_name():
    values = {
        "accuracy": float("nan"),
        "deep": {"new": 0.25, "per_class": [1]},
        "intervals": {"deep": {"new": [0.1, 0.3]}},
    }
    groups = number_groups(
        {"classification": values, "future": {"count": 3, "many": [0.5, None]}, "localization": None}
    )
    told = {(group.title, number.name): (number.text, number.interval) for group in groups for number in group.numbers}
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
        g.numbers for g in number_groups({"classification": values, "localization": region})
    )
    assert (balanced.chance, auroc.chance, pointing.chance) == (0.25, 0.5, 0.3)


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
        found = [(some.confidence, some.accuracy, some.count) for some in reliability(probabilities, labels)]
        np.testing.assert_allclose(found, told)


def test_reliability_at_the_edges():
    bins = reliability(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]), torch.tensor([0, 0, 1]), bins=2)
    assert [(some.confidence, some.accuracy, some.count) for some in bins] == [(0.5, 0.5, 2), (1.0, 1.0, 1)]


def test_confusions_against_loops():
    random = np.random.default_rng(0)
    for classes in (2, 7, 31):
        counts = random.integers(0, 5, (classes, classes))
        counts[1] = 0  # a class without images
        names = [f"c{i}" for i in range(classes)]
        found = confusion_of(counts.tolist(), names)
        assert found.rows == ([] if classes > 30 else counts.tolist())
        expected = [
            (names[i], names[j], counts[i, j], counts[i, j] / counts[i].sum())
            for i in range(classes)
            for j in range(classes)
            if i != j and counts[i, j]
        ]
        assert set(found.common) <= set(expected)
        assert [n for _, _, n, _ in found.common] == sorted((n for _, _, n, _ in expected), reverse=True)[:12]
    assert confusion_of(None, ["a", "b"]) is None


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.0, "0 %"), (1e-9, "< 1 %"), (0.005, "< 1 %"), (0.5, "50 %"), (0.996, "> 99 %"), (1.0, "100 %")],
)
def test_percent_says_never_and_always_only_where_it_is_so(share, told):
    assert percent(share) == told


# Cases


def test_cases_add_up(parts):
    content = content_of(parts)
    assert content.cases
    for case in content.cases:
        said = case.scores[0]
        assert case.predicted == said.name
        assert case.right == (case.predicted == case.truth)
        total = sum(look.contribution for look in case.looks) + case.others_sum
        assert total == pytest.approx(said.contributions)
        assert total + said.bias == pytest.approx(said.logit, abs=1e-4)
        assert all(look.similarity * look.weight == pytest.approx(look.contribution, abs=1e-5) for look in case.looks)
        assert any("true class" in score.role for score in case.scores)


def test_telling_cases_against_loops():
    for seed in range(30):
        random = np.random.default_rng(seed)
        n, classes = int(random.integers(1, 12)), int(random.integers(2, 4))
        probabilities = torch.tensor(random.dirichlet(np.ones(classes), n).round(1))  # ties
        labels = torch.tensor(random.integers(0, classes, n))
        found = telling(probabilities, labels, each=3)
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
    content = content_of(parts, measured=sure)
    assert content.all_right
    assert {case.title for case in content.cases} == {"Right, and sure of it", "Not sure"}


# Prototypes


def test_each_prototype_is_shown_with_its_source(parts):
    content, run = content_of(parts), parts["run"]
    manager = run.head.proto_manager
    for c, one in enumerate(content.prototypes):
        assert one.name == run.class_names[c]
        assert len(one.cards) == int(manager.mask()[c].sum())
        for card in one.cards:
            anchor = manager.anchors[c * manager.max_prototypes + card.number]
            assert card.file == anchor.file
            assert card.part is not None
            assert card.source.frames
            assert [near.class_name for near in card.own] == [one.name] * len(card.own)
            assert one.name not in [near.class_name for near in card.others]
            assert all(near.picture is not None for near in card.own + card.others)


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
    warm, span = heat(picture, (100, 0, 200, 100), ((0.0, 1.0), (0.5, 0.25)), 300, "")
    with Image.open(io.BytesIO(base64.b64decode(warm.uri.split(",")[1]))) as stored:
        pixels = np.asarray(stored, dtype=float)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    assert span == (0.0, 1.0)
    assert spread[:, :90].max() < 10
    assert spread[:, 210:].max() < 10
    assert spread[:, 105:195].mean() > 30
    assert pixels[20, 180].sum() > pixels[20, 120].sum()  # the highest is the brightest


def test_an_even_map_has_no_colours_to_divide_by():
    _, span = heat(Image.new("RGB", (10, 10)), (0, 0, 10, 10), ((0.3,),), 10, "")
    assert span == (0.3, 0.3)


@pytest.mark.parametrize(
    ("groups", "drawn"), [([], 0), ([None] * 3, 0), (["a", "b", "c"], 0), (["a", "a", "b"], 2), (["a", "a", None], 2)]
)
def test_how_many_groups_the_intervals_draw_from(groups, drawn):
    assert drawn_groups(groups) == drawn


def test_what_looks_alike_by_nature_is_no_leak_yet():
    pair = Pair("a.jpg", "b.jpg", ("train", "test"), ("cat", "cat"), same_group=False, identical=False, similarity=0.95)
    found = Audit({"train": {"cat": 50}}, duplicates=(pair,) * 30)
    assert found.leaks
    assert audit_of(found).badge.state == "warn"
    assert audit_of(replace(found, duplicates=(pair,))).badge.state == "bad"
    assert audit_of(replace(found, shared_groups={"lesion": {"train": 1, "test": 1}})).badge.state == "bad"
    assert audit_of(replace(found, duplicates=(*[pair] * 30, replace(pair, identical=True)))).badge.state == "bad"
    assert audit_of(replace(found, duplicates=())).badge.state == "good"


# Pushes


def test_pushes_as_the_file_tells_them(tmp_path):
    rows = [
        {"epoch": 1, "val": {}},
        {"push": 5, "use_local": True, "momentum": 0.9, "min_dist": 0.5, "mean_dist": 0.8, "mean_dist_after": 0.7,
         "val_before": {"accuracy": 0.5, "auroc": None}, "val_after": {"accuracy": 0.25},
         "guard": {"guard": "budget", "action": "momentum raised", "cost": 0.02, "budget": 0.01},
         "duplicates_avoided": 2, "notes": ["hm"], "growth": {"added": [1, 2]}},
        {"final": "live", "val_before": None, "val_after": None, "weights": "epoch 4"},
        {"push": 0, "use_local": False, "momentum": 0.0, "min_dist": float("nan"), "mean_dist": None},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    first, live, last = pushes_of(read_rows(tmp_path / "metrics.jsonl"))
    assert (first.when, first.how, first.min_dist) == ("epoch 5", "patches, momentum 0.9", 0.5)
    assert ("accuracy", 0.5, 0.25) in first.scores
    assert ("AUROC", None, None) in first.scores
    assert len(first.notes) == 4
    assert live.when == "after training"
    assert live.min_dist is None
    assert live.notes == ["from the weights of epoch 4, the best on validation images"]
    assert (last.when, last.how, last.min_dist) == ("by command", "whole images, momentum 0", None)
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
        top = float(chart.y_ticks[-1][1])
        assert top >= max(values) + 0.1
        (line,) = [some for some in chart.series if "min_dist" in some.name]
        for (x, y), value in zip(line.points, values, strict=True):
            assert 0 <= x <= chart.width
            assert y == pytest.approx(chart.height * (1 - value / top), abs=0.2)
        assert len(chart.x_ticks) <= 12
        assert chart.y_ticks[0] == (chart.height, "0")
