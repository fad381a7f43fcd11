"""The review app without a browser: what it lets in, what it lets out, and decisions of several people."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import socket
import struct
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import anchors, contents, refused
from protopush import InputError
from protopush.cli import main
from protopush.explain import explain_image
from protopush.explain.neighbours import find_neighbours
from protopush.runs.decisions import Decision, load_decisions
from protopush.runs.run import open_run

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install protopush[app]")

from fastapi.testclient import TestClient  # noqa: E402

from protopush.app.explain_tab import Shown, contributions  # noqa: E402
from protopush.app.page import render  # noqa: E402
from protopush.app.review_tabs import COLUMNS, as_csv, as_json  # noqa: E402
from protopush.app.run_store import RunStore, UsageWorker, Use  # noqa: E402
from protopush.app.serve import build_app, is_local, listening  # noqa: E402
from protopush.app.upload import Limits, Upload, read_upload  # noqa: E402

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def home(masked_home) -> Path:
    return masked_home


# What people drop on a page.


def png_of(width: int, height: int) -> bytes:
    """A 1-bit PNG of any size, made without its pixels in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bytes_of(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def photo(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


BOMB = png_of(30_000, 30_000)
REFUSED = {
    "empty.jpg": (b"", "empty.jpg is empty (0 bytes)"),
    "words.jpg": (b"not a picture at all", "words.jpg is not an image. Choose a JPEG, PNG"),
    "page.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "page.png is not an image"),
    "drawing.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "drawing.jpg is not an image"),
    "bomb.png": (BOMB, "bomb.png has 900 megapixels; at most 100 are allowed"),
    "large.png": (png_of(12_000, 9_000), "large.png has 108 megapixels; at most 100 are allowed"),
    "cut.jpg": (bytes_of(photo(), "JPEG")[:700], "cut.jpg is damaged or cut off"),
    "cut.png": (bytes_of(photo(), "PNG")[:-100], "cut.png is damaged or cut off"),
    "heavy.png": (bytes(2_500_000), "heavy.png has 2.5 MB; at most 2 MB are allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_fit_image_is_refused_in_plain_words(tmp_path, monkeypatch, name):
    data, expected = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    if "megapixels" in expected:  # nothing is decoded
        monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(InputError) as told:
        read_upload(tmp_path / name, Limits(megabytes=2))
    assert expected in str(told.value)
    assert str(tmp_path) not in str(told.value)
    assert "\n" not in str(told.value)
    assert len(BOMB) < 2_000_000


def test_the_first_picture_of_an_animation_is_taken_and_that_is_said(tmp_path):
    frames = [Image.new("RGB", (40, 32), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    found = read_upload(tmp_path / "moves.gif")
    assert found.image.getpixel((5, 5)) == (255, 0, 0)
    assert "only the first is shown" in found.note


def test_unusual_pictures_are_read_right(tmp_path):
    grey = np.linspace(0, 65535, 40 * 32).astype(np.uint16).reshape(32, 40)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    deep = read_upload(tmp_path / "deep.png")
    assert np.asarray(deep.image)[..., 0].tolist() == np.rint(grey / 257).astype(int).tolist()
    assert "scaled to 8" in deep.note
    photo("CMYK").save(tmp_path / "print.jpg", quality=95)
    found = read_upload(tmp_path / "print.jpg")
    assert (found.image.mode, "CMYK" in found.note) == ("RGB", True)
    photo().save(tmp_path / "plain.png")
    shutil.copyfile(tmp_path / "plain.png", tmp_path / "no_image.txt")  # what it is counts, not what it is called
    plain = read_upload(tmp_path / "no_image.txt")
    assert (plain.image.tobytes(), plain.note) == (photo().tobytes(), "")


# What it says.


def test_names_of_people_classes_and_files_are_never_markup(home):
    opened = open_run(home / "run")
    opened = replace(opened, class_names=[MARKUP, "b", "c"])
    shown = Shown.of(opened, Upload(MARKUP, photo()))
    explanation = shown.explain(RunStore(home / "run"), opened)
    made = Decision(1, MARKUP, MARKUP, "keep", MARKUP, class_name=MARKUP, prototype=0, file=MARKUP)
    pages = [render("prediction", explanation, MARKUP), render("log", [made])]
    pages += [contributions(evidence) for evidence in explanation.classes]
    assert all(page.count("&lt;img") >= 1 for page in pages[:2])
    assert not any("<img" in page for page in pages)


def test_the_page_explains_as_the_library_does(home):
    opened, file = open_run(home / "run"), home / "data" / "images" / "cat" / "009.png"
    found = Shown.of(opened, read_upload(file)).explain(RunStore(home / "run"), opened)
    expected = explain_image(opened.model, file, opened.transform, opened.class_names)
    assert replace(found, file="") == replace(expected, file="")
    assert contributions(found.classes[0]).count('class="bar"') == 2


# Decisions.


def test_decisions_of_two_reviewers_at_the_same_moment_are_both_kept(run):
    desks, failed, gate = (RunStore(run), RunStore(run)), list[BaseException](), threading.Barrier(3)

    def decide(what, *words: str) -> None:
        try:
            gate.wait()
            what(*words)
        except BaseException as error:
            failed.append(error)

    old = anchors(run)
    jobs = [(desks[0].forbid, "cat:0", "a ruler", "Ada"), (desks[1].forbid, "dog:1", "a hair", "Ben"),
            (desks[1].keep, "bird:0", "a wing", "Eve")]  # fmt: skip
    threads = [threading.Thread(target=decide, args=job) for job in jobs]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failed == []
    assert [made.id for made in load_decisions(run)] == [1, 2, 3]
    assert {(made.who, made.kind) for made in load_decisions(run)} == {
        ("Ada", "prototype"), ("Ben", "prototype"), ("Eve", "keep")
    }  # fmt: skip
    new = anchors(run)
    assert {key for key in new if new[key] != old[key]} == {("cat", 0), ("dog", 1)}
    assert desks[0].idle.is_set()
    for desk in desks:  # both see what the other has done
        assert desk.run().head.proto_manager.anchors == open_run(run).head.proto_manager.anchors
    assert main(["verify", str(run)]) == 0

    number = next(made.id for made in load_decisions(run) if made.who == "Ada")
    desks[1].undo(number, "no ruler", "Ben")
    assert anchors(run)["cat", 0] == old["cat", 0]
    rows = list(csv.DictReader(io.StringIO(as_csv(load_decisions(run)).removeprefix("\ufeff"))))
    assert len(rows) == 4
    assert tuple(rows[0]) == COLUMNS
    assert [row["in_force"] for row in rows if row["who"] == "Ada"] == ["no"]
    assert [Decision.from_dict(one) for one in json.loads(as_json(load_decisions(run)))] == load_decisions(run)
    assert "undone by no. 4" in render("log", load_decisions(run))


@pytest.mark.parametrize(("reason", "who", "message"), [(" ", "Ada", "write a reason"), ("r", " ", "write your name")])
def test_a_reason_and_a_name_are_needed(run, reason, who, message):
    before = contents(run)
    for decide in (lambda d: d.keep("cat:0", reason, who), lambda d: d.forbid("cat:0", reason, who)):
        with pytest.raises(InputError, match=message):
            decide(RunStore(run))
    assert contents(run) == before


def test_no_cell_of_the_table_is_a_formula():
    made = Decision(1, "t", "=HYPERLINK(1)", "keep", " @SUM(1)", class_name="-x", prototype=0, file="+y")
    (row,) = csv.DictReader(io.StringIO(as_csv([made]).removeprefix("\ufeff")))
    assert [row[name] for name in ("who", "reason", "class", "file")] == ["'=HYPERLINK(1)", "' @SUM(1)", "'-x", "'+y"]


def test_without_the_training_images_it_explains_but_says_what_forbidding_needs(run, home, tmp_path):
    moved = Path(shutil.copytree(home / "data", tmp_path / "moved"))
    (moved / "images" / "cat" / "003.png").unlink()
    missing = [({"path": str(tmp_path / "gone.csv")}, "gone.csv"), ({"path": str(moved / "manifest.csv")}, "1 of 24")]
    for data, why in missing:
        desk, before = RunStore(run, {**data, "source": "manifest"}), contents(run)
        opened = desk.run()
        assert Shown.of(opened, Upload("a.png", photo())).explain(desk, opened).classes
        for decide in (lambda d: d.forbid("cat:0", "r", "w"), lambda d: d.undo(1, "r", "w")):
            with pytest.raises(InputError) as told_so:
                decide(desk)
            assert "--data.path FOLDER" in str(told_so.value)
            assert why in str(told_so.value)
        assert contents(run) == before
        assert desk.keep("cat:0", "good", "Ada").kind == "keep"
    shutil.copyfile(home / "data" / "images" / "cat" / "003.png", moved / "images" / "cat" / "003.png")
    RunStore(run, {"path": str(moved / "manifest.csv"), "source": "manifest"}).forbid("cat:0", "r", "w")
    assert main(["verify", str(run), "--root", str(moved)]) == 0


def test_neighbours_and_use_are_those_of_a_slow_look(run):
    (run / "candidates.safetensors").unlink()  # those of training were ranked by float16 features
    desk = RunStore(run)
    worker, opened = UsageWorker(desk), desk.run()
    deadline = time.time() + 60
    while worker.of(opened, 0)[2].startswith("Still") and time.time() < deadline:
        time.sleep(0.05)
    train, val = desk.images(opened, "train"), desk.images(opened, "val")
    expected = find_neighbours(opened.model, train)
    assert [worker.of(opened, row)[0] for row in range(6)] == [one for some in expected for one in some]
    said, strongest = [], []
    for sample in val.samples:
        first_class = explain_image(opened.model, sample.image, opened.transform, opened.class_names).classes[0]
        said.append(first_class.class_index)
        strongest.append(2 * first_class.class_index + first_class.matches[0].prototype)
    for row in range(6):
        assert worker.of(opened, row)[1] == Use(strongest.count(row), said.count(row // 2), 6)
    desk.forbid("cat:0", "r", "w")
    assert worker.of(desk.run(), 2)[0] is None  # it stands for something else now
    assert worker.of(desk.run(), 0)[0] == expected[0][0]


def test_what_works_in_the_background_stops_with_the_app(run):
    desk = RunStore(run)
    worker, opened = UsageWorker(desk), desk.run()
    desk.idle.clear()  # as if somebody was deciding
    assert worker.of(opened, 0)[2].startswith("Still")
    (thread,) = desk.background
    assert thread.is_alive()
    assert not desk.close()  # the decision is not at its end
    assert not thread.is_alive()
    assert desk.close()
    assert worker.of(opened, 0) == (None, None, "The app is ending.")


# The server.


@pytest.fixture(scope="module")
def client(home, tmp_path_factory):
    """A server for a run, without a network; its uploads go to ``client.uploads``."""
    run = Path(shutil.copytree(home / "run", tmp_path_factory.mktemp("served") / "run"))
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_RUN_HISTORY",
                     "GRADIO_ALLOWED_PATHS"):  # fmt: skip
            patch.setenv(name, os.environ.get(name, ""))  # put back afterwards
        app = build_app(RunStore(run), Limits(megabytes=0.1), "127.0.0.1", uploads)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            client.run, client.uploads = run, uploads
            yield client


def test_the_page_is_whole_and_asks_nothing_of_others(client):
    page = client.get("/")
    assert page.status_code == 200
    for tag in ('src="http', "src='http", 'href="http', "@import", "cdn", "googleapis.com/css"):
        assert tag not in page.text.replace('href="https://fonts.gstatic.com"', "")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert "http" not in client.get("/theme.css").text.replace("http://www.w3.org", "")


FILE = "/gradio_api/file="
ELSEWHERE = [
    f"{FILE}/etc/passwd", f"{FILE}../../../../etc/passwd", f"{FILE}..%2f..%2fetc/passwd", f"{FILE}/proc/self/environ",
    f"{FILE}/{{uploads}}/../../../../../etc/passwd", f"{FILE}/{{run}}/config.json", f"{FILE}/{{run}}/model.safetensors",
    f"{FILE}{{run}}/decisions.jsonl", f"{FILE}http://127.0.0.1/", f"{FILE}https://example.org/a.png",
    f"{FILE}file:///etc/passwd", "/gradio_api/proxy=https://example.org/", "/gradio_api/file/etc/passwd",
    "/static/../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/dev/reload", "/docs",
    "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd", "/openapi.json", "/gradio_api/info", "/gradio_api/openapi.json",
    "/monitoring", "/gradio_api/runs", "/gradio_api/mcp/sse",
]  # fmt: skip


@pytest.mark.parametrize("path", ELSEWHERE)
def test_nothing_else_is_served(client, path):
    (client.run / "decisions.jsonl").touch()
    answer = client.get(path.format(run=client.run, uploads=client.uploads))
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text
    assert "weights_sha256" not in answer.text


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_pages_of_other_sites_reach_nothing(client, headers):
    assert client.get("/decisions.json", headers=headers).status_code == 403
    assert client.post("/gradio_api/upload", headers=headers, files={"files": ("a.png", b"x")}).status_code == 403
    assert client.get("/decisions.json", headers={"Origin": "http://127.0.0.1"}).status_code == 200


@pytest.mark.parametrize(
    "name", ["../../../evil.png", "/tmp/evil.png", "..\\..\\evil.png", MARKUP + ".png", ".png", "\u202e.png"]
)
def test_an_upload_lies_in_its_own_folder_whatever_it_is_called(client, tmp_path, name):
    before = set(client.uploads.parent.rglob("*"))
    answer = client.post("/gradio_api/upload", files={"files": (name, bytes_of(photo(), "PNG"))})
    assert answer.status_code == 200
    (path,) = answer.json()
    assert Path(path).resolve().is_relative_to(client.uploads.resolve())
    assert Path(path).is_file()
    new = set(client.uploads.parent.rglob("*")) - before
    assert all(file.is_relative_to(client.uploads) for file in new)
    assert not list(Path("/tmp").glob("evil*"))
    assert read_upload(path).image.size == (40, 32)


def test_a_file_that_is_too_large_is_refused_while_it_comes(client):
    before = set(client.uploads.rglob("*"))
    answer = client.post("/gradio_api/upload", files={"files": ("a.png", bytes(200_000))})
    assert answer.status_code == 413
    assert [file for file in set(client.uploads.rglob("*")) - before if file.is_file()] == []


def test_decisions_can_be_taken_away(client):
    (client.run / "decisions.jsonl").unlink(missing_ok=True)
    RunStore(client.run).keep("cat:0", "gut, äöü", "Ada")
    table, details = client.get("/decisions.csv"), client.get("/decisions.json")
    assert table.text.removeprefix("\ufeff").splitlines()[1].startswith("1,")
    assert details.json()[0]["reason"] == "gut, äöü"
    assert 'attachment; filename="decisions.csv"' in table.headers["Content-Disposition"]


@pytest.mark.parametrize(("words", "message"), [
    (["{tmp}/none"], "no such run folder"),
    (["{tmp}"], "no such file"),
    (["{run}", "--port", "70000"], "--port 70000; expected 0 to 65535"),
    (["{run}", "--host", "203.0.113.7", "--port", "0"], "cannot listen on 203.0.113.7 port 0"),
    (["{run}", "--max_megabytes", "0"], "expected a number above 0"),
    (["{run}", "--data.max_megapixels", "0"], "data.max_megapixels is 0.0; expected more than 0"),
    (["{run}", "--prot", "1"], "did you mean 'port'?"),
])  # fmt: skip
def test_what_cannot_be_shown_ends_before_the_server_starts(home, tmp_path, capsys, words, message):
    given = [word.format(tmp=tmp_path, run=home / "run") for word in words]
    assert message in refused(capsys, "app", *given)


def test_a_taken_port_and_a_missing_extra_get_one_line(home, capsys, monkeypatch):
    with listening("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        line = refused(capsys, "app", home / "run", "--port", port)
        assert f"cannot listen on 127.0.0.1 port {port}" in line
        assert "choose another --port" in line
    socket.create_server(("127.0.0.1", port)).close()  # it is free again
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install protopush[app]" in refused(capsys, "app", home / "run", "--port", "0")


def test_which_addresses_are_this_computer_alone():
    assert [is_local(host) for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "192.168.1.4", "example.org")] == [False] * 4


def test_the_device_of_a_desk_is_its_own(home):
    assert next(RunStore(home / "run", device=torch.device("cpu")).run().model.parameters()).device.type == "cpu"
