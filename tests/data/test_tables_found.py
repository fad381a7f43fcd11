"""Tables and names as people have them: separators, encodings, headers, ids, Unicode forms, cells and odd letters."""

from __future__ import annotations

import csv
import html
import json
import logging
import os
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

from helpers import CLASSES, SMALL, made_once, make_images, python, refused, save_noise
from protopush import InputError
from protopush.cli import main
from protopush.cli.parser import read_options
from protopush.data.images import check_images, read_image, sha256_of
from protopush.data.manifest import Catalog, DataConfig, Sample, read_manifest
from protopush.data.sources import load_catalog
from protopush.data.table import cell_text, spreadsheet_cell
from protopush.models.model_card import escaped
from protopush.predict.inputs import list_inputs
from protopush.push.push_report import PushReport
from protopush.runs.split_record import open_catalog, read_split, write_split

ROWS = [("images/a/000.png", "Nävus, Größe"), ("images/b/001.png", "créé"), ("images/a/001.png", "Nävus, Größe")]


def found(path: Path) -> list[tuple[str, str]]:
    """Name and class of each sample of a manifest; predict reads the same."""
    catalog = read_manifest(path)
    inputs = list_inputs([str(path)])
    assert inputs.labels is not None
    labels = [inputs.labels[i] for i in range(len(inputs.labels))]
    assert labels == [catalog.classes[sample.label] for sample in catalog.samples]
    assert [Path(inputs.names[i]) for i in range(len(labels))] == [sample.image for sample in catalog.samples]
    return [(sample.name, label) for sample, label in zip(catalog.samples, labels, strict=True)]


def text_of(separator: str, header: str = "image,label", end: str = "\n") -> str:
    lines = [header.replace(",", separator)]
    for name, label in ROWS:
        lines.append(f"{name}{separator}" + (f'"{label}"' if separator in label else label))
    return end.join(lines) + end


@pytest.fixture
def pictures(tmp_path) -> Path:
    make_images(tmp_path / "images", ["a", "b"], 2)
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_encodings(pictures, caplog, separator, encoding):
    (pictures / "m.csv").write_bytes(text_of(separator, end="\r\n").encode(encoding))
    with caplog.at_level(logging.WARNING):
        assert found(pictures / "m.csv") == ROWS
    assert ("read as Windows-1252, such as 'images/a/000.png" in caplog.text) == (encoding == "cp1252")


@pytest.mark.parametrize(("text", "logged"), [
    ("sep=;\n" + text_of(";"), ""),
    ('"sep=|"\r\n' + text_of("|", end="\r\n"), ""),
    (text_of(",", header="Image,LABEL"), ""),
    (text_of(";", header=" image ;\tLabel "), ""),
    (text_of(",").replace("\n", " ,,\n", 1).replace("png,", "png , "), ""),
    ("Table 1; all lesions\n;what it is\n" + text_of(";"), "left out above the header: Table 1 all lesions"),
    (text_of(",") + "\n,\n,,,\n", ""),
    (text_of(",").replace("images/b", "image,label\nimages/b"), ""),
    (text_of(",").replace("/", "\\"), ""),
])  # fmt: skip
def test_headers_as_they_come(pictures, caplog, text, logged):
    (pictures / "m.csv").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert found(pictures / "m.csv") == ROWS
    assert logged in caplog.text
    assert bool(logged) == bool(caplog.text)


@pytest.mark.parametrize(("data", "message"), [
    (b"image,label\na.png,cat, white\n", r"line 2 has 3 values for 2 columns; expected one each; put quotes around"),
    (b"image,label,Label\na.png,cat,dog\n", r"several columns 'label' \(label, Label\); rename all but one"),
    (b'image,label\n"5 cm.png,cat\n"6 cm.png,dog\n', r"not a CSV file: .*expected after"),
    (b'image,label\n"a.png,cat\n', r"not a CSV file: .*unexpected end of data"),
    ("image,label\na.png,痣\n".encode("gbk"), r"is not UTF-8, and it is not known what else \(line 2: b.\\xf0\\xeb"),
    ("image,label\na.png,невус\n".encode("cp1251"), r"is not UTF-8, and .*'CSV UTF-8'"),
    ("image,label\na.png,złośliwy\n".encode("cp1250"), r"is not UTF-8, and .*'CSV UTF-8'"),
    ("image,label\na.png,母斑\n".encode("shift-jis"), r"is not UTF-8, and .*'CSV UTF-8'"),
    (b"PK\x03\x04\x14\0", r"is an Excel file; expected .*; save it as 'CSV UTF-8'"),
    (b"image,label\na.png,cat\n\n\nb.png,\n", r"no label in lines 5"),
    (b"a.png,cat\nb.png,dog\n", r"no column 'image'; it has: a.png, cat"),
    (b"image,MEL,NV,UNK\nISIC_1,1.0,0,0\nISIC_2,0,0,0\nISIC_3,1,1,0\n", r"one class in the rows of ISIC_2, ISIC_3;"),
    (b"image,MEL,NV\nISIC_1,1.0,0.0\nISIC_2,0.5,0.5\n", r"has the value '0.5'; expected 0.0 or 1.0 for each class"),
    (b"image,MEL,NV\nISIC_1,0.7,0.3\n", r"no column 'label'; it has: image, MEL, NV"),
    (b"image,age\nISIC_1,1\n", r"no column 'label'; it has: image, age"),
])  # fmt: skip
def test_what_is_odd_is_said_in_one_line(tmp_path, data, message):
    (tmp_path / "m.csv").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_catalog(str(tmp_path / "m.csv"))
    for name in ("tests", "x" * 300):  # the name itself may be what is odd
        with pytest.raises(InputError, match="no such file"):
            load_catalog(str(tmp_path / name))


def test_one_hot_tables_are_labels(pictures, caplog):
    rows = ["image,split,MEL,NV,SCC,UNK", "images/a/000.png,train,0.0,1.0,0.0,0.0", "images/b/001,test,1,0,0,0",
            "images/a/001.png,val,0,0,1.0,0"]  # fmt: skip
    (pictures / "m.csv").write_text("\n".join(rows))
    with caplog.at_level(logging.WARNING):
        assert found(pictures / "m.csv") == list(zip([name for name, _ in ROWS], ["NV", "MEL", "SCC"], strict=True))
    assert "no image has a 1 in UNK, which is no class then" in caplog.text


@pytest.mark.parametrize(
    ("column", "other"), [("group", "patient_id"), ("Patient ID", "lesion_id"), ("lesion-id", "x")]
)
def test_groups_under_their_usual_names(pictures, column, other):
    (pictures / "m.csv").write_text(
        f"image,label,{other},{column}\nimages/a/000.png,a,1,p\nimages/b/000.png,b,2,p\nimages/b/001.png,b,3,\n"
    )
    assert [sample.group for sample in read_manifest(pictures / "m.csv").samples] == ["p", "p", None]


def test_ids_are_the_one_file_of_that_stem(tmp_path):
    places = ("ISIC_0000001.jpg", "in/part 1/ISIC_0000002.png", "in/part 2/ISIC_0000003.v2.jpeg")
    for number, place in enumerate(places):
        save_noise(tmp_path / Path(place).with_suffix(".png"), 0, number)
        (tmp_path / Path(place).with_suffix(".png")).rename(tmp_path / place)
    (tmp_path / "in" / "ISIC_0000002.txt").write_text("not an image")
    table = tmp_path / "m.csv"
    ids = ["ISIC_0000001", "ISIC_0000002", "in\\part 2/ISIC_0000003.v2", "ISIC_0000003.v2.jpeg"]
    table.write_text("image,label\n" + "".join(f"{name},{number % 2}\n" for number, name in enumerate(ids)))
    names = [name for name, _ in found(table)]
    assert names == ["ISIC_0000001.jpg", "in/part 1/ISIC_0000002.png", *["in/part 2/ISIC_0000003.v2.jpeg"] * 2]
    shutil.copy(tmp_path / names[1], tmp_path / "in" / "ISIC_0000002.bmp")
    for read in (read_manifest, lambda path: list_inputs([str(path)])):
        with pytest.raises(
            InputError, match=r"'ISIC_0000002' may be any of: in/ISIC_0000002.bmp, in/part 1/ISIC_00000"
        ):
            read(table)
    table.write_text("image,label\nISIC_9,a\n")
    assert read_manifest(table).samples[0].image == tmp_path / "ISIC_9"  # missing: named when files are checked


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_unicode_forms_are_the_same_name(tmp_path, on_disk):
    def form(text: str) -> str:
        return unicodedata.normalize(on_disk, text)

    other = "NFD" if on_disk == "NFC" else "NFC"
    save_noise(tmp_path / form("Bilder für é") / form("Läsion 1.png"), 0, 0)
    save_noise(tmp_path / form("Bilder für é") / " lead é.png", 0, 1)
    rows = ["image,label,group", "Bilder für é/Läsion 1.png,Nävus,é", "Bilder für é/ lead é.png,Nävus,é"]
    rows = [rows[0], unicodedata.normalize(other, rows[1]), unicodedata.normalize(on_disk, rows[2])]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    catalog = read_manifest(tmp_path / "m.csv")
    assert catalog.classes == ("Nävus",)
    assert [sample.group for sample in catalog.samples] == ["é", "é"]
    assert all(sample.image.is_file() for sample in catalog.samples)


def test_folders_of_one_class_in_two_unicode_forms(tmp_path):
    for split, name in (("train", "Na\u0308vus"), ("val", "N\u00e4vus"), ("test", "N\u00e4vus ")):
        make_images(tmp_path / split, [name], 2)
    assert load_catalog(str(tmp_path)).classes == ("N\u00e4vus",)


def test_a_runs_splits_are_known_in_the_other_unicode_form_with_blanks_and_as_no_formula(tmp_path):
    names = ["a/ lead.png", "a/trail .png ", "a/é.png", "=1+1/-x.png", "'=1/@.png", 'b/two\nlines, "quoted".png']
    samples, hashes = [], {}
    for number, name in enumerate(names):
        save_noise(tmp_path / "data" / "x.png", 0, number)
        place = tmp_path / "data" / unicodedata.normalize("NFC", name)
        place.parent.mkdir(exist_ok=True)
        (tmp_path / "data" / "x.png").rename(place)
        samples.append(Sample(place, name, 0, ["train", "val", "test"][number % 3], "+g"))
        hashes[name] = f"{number:064d}"
    write_split(tmp_path, Catalog(tuple(samples), ("=a",), tmp_path), hashes)
    recorded = read_split(tmp_path)
    assert recorded == {
        s.name: {"name": s.name, "sha256": hashes[s.name], "split": s.split, "group": "+g", "label": "=a"}
        for s in samples
    }
    with (tmp_path / "split.csv").open(newline="", encoding="utf-8") as file:
        assert not [cell for row in csv.reader(file) for cell in row if cell[:1] in set("=+-@")]
    (tmp_path / "split.csv").write_text("name,sha256,split,group\na.png\n")
    with pytest.raises(InputError, match="damaged file"):
        read_split(tmp_path)


def test_a_runs_splits_are_known_when_a_copy_has_changed_the_unicode_form(tmp_path):
    for number in range(10):
        save_noise(tmp_path / "data" / "a" / f"é{number}.png", 0, number)
        save_noise(tmp_path / "data" / "b" / f"é{number}.png", 1, number)
    before = load_catalog(str(tmp_path / "data"))
    assert main(["data", "audit", str(tmp_path / "data")]) == 0
    write_split(tmp_path, before, {sample.name: sha256_of(sample.image) for sample in before.samples})
    for sample in before.samples:
        sample.image.rename(sample.image.with_name(unicodedata.normalize("NFD", sample.image.name)))
    after = open_catalog(DataConfig(str(tmp_path / "data"), split_seed=5), before.classes, tmp_path)
    splits = {unicodedata.normalize("NFC", sample.name): sample.split for sample in after.samples}
    assert splits == {sample.name: sample.split for sample in before.samples}


def test_cells_are_no_formulas_and_come_back():
    random.seed(0)
    texts = ["".join(random.choices("'=+-@ \ta1", k=random.randint(0, 6))) for _ in range(5000)]
    cells = [spreadsheet_cell(text) for text in texts]
    assert [cell_text(cell) for cell in cells] == texts
    assert not [cell for cell in cells if cell.lstrip(" ")[:1] in set("=+-@") and cell.strip()]
    assert spreadsheet_cell("nevus") == "nevus"
    assert spreadsheet_cell("it's") == "it's"


def bytes_named(folder: Path, name: bytes) -> Path:
    return Path(os.fsdecode(os.fsencode(folder) + b"/" + name))


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"\x1b[31mred", "a\u2028b".encode()])
@pytest.mark.parametrize("what", ["file", "class", "folder"])
def test_names_that_nothing_can_print_are_refused_before_the_work(tmp_path, capsys, name, what):
    data = make_images(tmp_path / "data", CLASSES, 10)
    if what == "file":
        (data / "cat" / "001.png").rename(bytes_named(data / "cat", name + b".png"))
    elif what == "class":
        (data / "cat").rename(bytes_named(data, name))
    else:
        data = data.rename(bytes_named(tmp_path, name))
    for words in (["data", "audit", data], ["train", "--data.path", data, "--out", tmp_path / "run", *SMALL]):
        text = refused(capsys, *words)
        assert "are no UTF-8 or hold control characters: '" in text
        assert text.isprintable()
        assert ascii(os.fsdecode(name))[1:-1] in text
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_are_no_images(tmp_path, caplog):
    make_images(tmp_path, ["a", "b"], 1)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    with caplog.at_level(logging.WARNING):
        assert len(load_catalog(str(tmp_path)).samples) == 2
    assert "left out: 1 pipe or device" in caplog.text
    for check in (read_image, lambda path: check_images([path])):
        with pytest.raises(InputError, match=r"pipe.png \(a pipe or device, no file\)"):
            check(tmp_path / "a" / "pipe.png")
    with pytest.raises(InputError, match="File name too long"):
        check_images([tmp_path / ("x" * 300)])


@pytest.mark.parametrize("columns", ["", ",lesion_id"])
def test_isic_names_without_groups_are_named_once(tmp_path, capsys, columns):
    rows = []
    for number in range(30):
        name = f"ISIC_{number:07d}.png"
        save_noise(tmp_path / name, number % 3, number)
        rows.append(f"{name},{CLASSES[number % 3]}" + (f",L{number}" if columns else ""))
    (tmp_path / "m.csv").write_text(f"image,label{columns}\n" + "\n".join(rows))
    words = ["--data.path", tmp_path / "m.csv"]
    for command in (
        ["data", "audit", *words],
        ["train", *words, "--out", tmp_path / "run", *SMALL, "--train.epochs", 1],
    ):
        assert main([str(word) for word in command]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "named as in the ISIC archive" in line]
        assert len(said) == (0 if columns else 1)
        assert all("30 images" in line and "lesion_id" in line and "two splits" in line for line in said)


# Names that something else takes for words of its own: HTML, Markdown, formulas, globs, format strings, YAML, markup.
UGLY = "a $x^2$ {b} %s <i>&amp; *[c] =1+1|d"
NAMES = [UGLY, "=1+1", "#null"]


def make_ugly(root: Path) -> None:
    for label, name in enumerate(NAMES):
        for number in range(10):
            save_noise(root / "data" / name / f"={UGLY}{number}.png", label, number)
    words = ["train", "--data.path", root / "data", "--out", root / "run", *SMALL, "--train.epochs", 1]
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def ugly(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "ugly names", make_ugly)


def test_ugly_names_stay_as_they_are_in_all_that_is_written(ugly, tmp_path, capsys, monkeypatch):
    run = str(ugly / "run")

    def told(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    table = told("evaluate", run, "--data.split", "train")
    assert all(f"\n {name} " in table for name in NAMES)
    monkeypatch.chdir(ugly / "data" / UGLY)
    summary = json.loads(told("predict", run, f"={UGLY}1.png", ugly / "data", "--out", tmp_path / "p.csv", "--json"))
    assert sum(summary["predicted"].values()) == 31
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert cell_text(rows[0]["file"]) == f"={UGLY}1.png"
    assert {cell_text(row["predicted"]) for row in rows} <= set(NAMES)
    assert {cell_text(row["top1_prototype"]).rpartition(":")[0] for row in rows} <= set(NAMES)
    assert [f"probability_{name}" for name in sorted(NAMES)] == [
        key for key in rows[0] if key.startswith("probability_")
    ]
    texts = ("file", "predicted", "top1_prototype", "top1_file", "top2_prototype", "top2_file")
    assert not [row[key] for row in rows for key in texts if row[key][:1] in set("=+-@")]
    told("report", run, "--out", tmp_path / "r.html", "--faithfulness", 0, "--resamples", 0)
    page = (tmp_path / "r.html").read_text()
    assert html.escape(UGLY) in page
    assert UGLY not in page
    assert "<i>" not in page
    assert "verify" in told(
        "forbid", shutil.copytree(run, tmp_path / "forbidden"), "--prototype", f"{UGLY}:0", "--reason", "~"
    )
    pushed = told("push", run, "--out", tmp_path / "pushed run")
    assert all(f"\n{name} " in pushed for name in NAMES)
    assert "All 6 anchors hold" in told("verify", tmp_path / "pushed run")
    assert escaped(UGLY) == r"a \$x\^2\$ \{b\} %s \<i\>\&amp; \*\[c\] \=1\+1\|d"
    for name in NAMES:
        explained = json.loads(
            told("explain", run, f"={UGLY}1.png", "--out", tmp_path / "e", "--why_not", name, "--json")
        )
        if explained[0]["predicted_name"] != name:
            assert Path(explained[0]["why_not"]["panel"]).is_file()


def test_long_names_and_those_that_are_no_text_are_explained(ugly, tmp_path):
    names = (
        b"caf\xe9.png",
        b"x" * 250 + b".png",
        "\u00e9".encode() * 120 + b"1.png",
        "\u00e9".encode() * 120 + b"2.png",
    )
    files = [bytes_named(tmp_path, name) for name in names]
    for file in (*files, tmp_path / "NUL.png"):
        shutil.copy(ugly / "data" / UGLY / f"={UGLY}1.png", file)
    program = "import sys; from protopush.cli.program import run; sys.exit(run())"
    words = ["explain", ugly / "run", *files, tmp_path / "NUL.png", "--rows", 1, "--out", tmp_path / "out"]
    done = python("-c", program, *words, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "\\udce9.png: " in done.stdout
    found = [json.loads(file.read_text(encoding="utf-8")) for file in (tmp_path / "out").glob("*.json")]
    assert {one["file"] for one in found} == {str(file) for file in (*files, tmp_path / "NUL.png")}
    assert len({one["panel"] for one in found}) == 5


@pytest.mark.parametrize(
    "word", ["null", "~", "#1", "&x", "1e3", "yes", "{a: b}", "[x]", "%s", "None", "a: b", "2020-01-01"]
)
def test_words_of_yaml_are_names(word):
    assert read_options("explain", ["r", "i.png", "--out", word, f"--why_not={word}"])["why_not"] == word
    assert read_options("forbid", ["r", "--reason", word, f"--image={word}"])["image"] == word
    assert read_options("evaluate", [word, f"--data.path={word}"])["data"].path == word
    assert read_options("train", ["--out", word, f"--data.path={word}"])["config"].data.path == word


def test_class_names_of_a_push_are_not_cut_off():
    names = ["carcinoma of the skin, basal", "carcinoma of the skin, squamous"]
    report = PushReport(True, 0.9, None, [], [1, 1], [1, 1], [0, 1], True, [], 0.0, names)
    assert all(f"\n{name} " in str(report) for name in names)
