"""The review app in a real browser: an image explained, a prototype replaced and brought back, the record exported."""

from __future__ import annotations

import csv
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image

from forked import Forked
from helpers import anchors, make_masked_images, train_small
from protopush.cli import main
from protopush.runs.decisions import load_decisions
from test_app import BOMB, bytes_of, photo

pytest.importorskip("gradio", reason="gradio is not installed: pip install protopush[app]")

CAT = "<img src=x onerror=alert(1)>cat"  # a class that would like to be markup
KNOWN = "Method not implemented."  # a warning of the framework about closing its own stream


class Server:
    """``protopush app`` in a process of its own."""

    def __init__(self, run: Path, temporary: Path) -> None:
        self.run, self.temporary = run, temporary
        self.process = Forked("app", run, "--port", "0", "--device", "cpu", TMPDIR=str(temporary))
        while "\n" not in self.process.stdout:
            assert self.process.poll() is None, self.process.stderr
            time.sleep(0.05)
        found = re.fullmatch(r"Review app: (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", self.process.stdout)
        assert found
        self.url = found[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("reviewed")
    data = make_masked_images(root / "data")
    data.write_text(data.read_text().replace(",cat,", f',"{CAT}",'))
    train_small(root, data, epochs=1)
    with tempfile.TemporaryDirectory() as temporary:
        found = Server(root / "run", Path(temporary))
        yield found
        if found.process.poll() is None:
            os.kill(found.process.pid, signal.SIGKILL)


class Visit:
    """The page, open, and all that it said and asked for."""

    def __init__(self, browser, server: Server, width: int) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.text != KNOWN and m.type != "log" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(server.url)
        self.page.wait_for_selector("#pp-upload input[type=file]", state="attached")

    def upload(self, name: str, data: bytes) -> None:
        if self.page.get_by_label("Clear").count():
            self.page.get_by_label("Clear").first.click()
        self.page.wait_for_selector("#pp-upload input[type=file]", state="attached")
        file = {"name": name, "mimeType": "image/png", "buffer": data}
        self.page.set_input_files("#pp-upload input[type=file]", file)  # type: ignore[arg-type]

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def choose(self, dropdown: str, option: str) -> None:
        self.page.click(f"{dropdown} input")
        self.page.get_by_role("option", name=option).first.click()

    def fill(self, field: str, text: str) -> None:
        self.page.fill(f"{field} textarea, {field} input", text)

    def text(self, place: str) -> str:
        self.page.wait_for_selector(place)
        return self.page.inner_text(place)

    def no_wider_than(self, width: int) -> None:
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width

    def end(self, server: Server) -> None:
        """Nothing was wrong, and nobody else was asked for anything."""
        assert self.wrong == []
        assert {url for url in self.asked if not url.startswith((server.url, "data:", "blob:"))} == set()
        self.context.close()


def test_from_an_image_to_a_decision_and_back(browser, server, tmp_path):
    old, visit = anchors(server.run), Visit(browser, server, 1400)
    page = visit.page
    visit.upload("../../a <b>cat</b>.png", bytes_of(photo(), "PNG"))
    assert re.search(r"The model says: .+ \(\d+\.\d%\)", visit.text(".pp-said"))
    page.wait_for_selector("#pp-panel img")
    assert page.evaluate("document.querySelector('#pp-panel img').naturalWidth") == 1480
    assert page.locator("#pp-said .bar").count() == 3
    assert page.locator("#pp-sums .bar").count() == 2
    page.click("#pp-other input")
    page.get_by_role("option").first.click()
    page.wait_for_selector("#pp-why img")

    visit.tab("Prototypes")
    visit.choose("#pp-class", "cat")
    page.get_by_role("button", name=re.compile("cat #1")).or_(page.locator("#pp-gallery button").nth(1)).first.click()
    page.wait_for_selector("#pp-details .facts")
    file = old[CAT, 1]["file"]
    assert file in visit.text("#pp-details")
    page.click("#pp-ask")
    page.wait_for_selector("#pp-result .pp-instead img")
    would = visit.text("#pp-result")
    assert "Nothing is changed yet" in would
    assert anchors(server.run) == old
    page.screenshot(path=tmp_path / "what-if.png", full_page=True)
    page.click("#pp-forbid")
    assert "write your name" in visit.text("#pp-result .pp-bad")
    visit.fill("#pp-who", "Ada")
    page.click("#pp-forbid")
    page.wait_for_selector("text=write a reason")
    assert anchors(server.run) == old
    visit.fill("#pp-reason", "a ruler <script>alert(1)</script>")
    page.click("#pp-forbid")
    done = visit.text("#pp-result .pp-good")
    new = anchors(server.run)[CAT, 1]
    assert new != old[CAT, 1]
    assert f"now stands for a part of {new['file']}" in done
    assert f"would stand for a part of {new['file']}" in would
    assert "Balanced accuracy on 6 validation images" in done
    page.wait_for_selector(f"#pp-details >> text={new['file']}")
    page.wait_for_selector("#pp-details .nears img")  # found in the background
    assert "validation images" in visit.text("#pp-details .facts")

    visit.tab("Decisions")
    assert "a ruler <script>alert(1)</script>" in visit.text("#pp-log li")
    visit.choose("#pp-number", "No. 1")
    visit.fill("#pp-undo-who", "Ben")
    visit.fill("#pp-undo-reason", "no ruler")
    page.click("#pp-undo")
    page.wait_for_selector("#pp-undo-result .pp-good")
    assert anchors(server.run) == old
    assert "undone by no. 2" in visit.text("#pp-log")
    with page.expect_download() as download:
        page.click("text=Save as table")
    download.value.save_as(tmp_path / "decisions.csv")
    with (tmp_path / "decisions.csv").open(encoding="utf-8-sig", newline="") as opened:
        assert [(row["who"], row["kind"]) for row in csv.DictReader(opened)] == [("Ada", "prototype"), ("Ben", "undo")]
    visit.end(server)
    assert [made.who for made in load_decisions(server.run)] == ["Ada", "Ben"]
    assert main(["verify", str(server.run)]) == 0


def test_on_a_phone_and_with_files_that_are_none(browser, server):
    visit = Visit(browser, server, 400)
    for name, data, message in (
        ("empty.png", b"", "is empty (0 bytes)"),
        ("words.jpg", b"no picture", "is not an image"),
        ("bomb.png", BOMB, "has 900 megapixels"),
    ):
        visit.upload(name, data)
        visit.page.wait_for_selector(f"#pp-said .pp-bad >> text={message}")
        assert visit.page.locator("#pp-panel img").count() == 0
    frames = [Image.new("RGB", (40, 32), colour) for colour in ("red", "lime")]
    visit.upload("moves.gif", bytes_of(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert "only the first is shown" in visit.text("#pp-said .pp-note")
    visit.page.wait_for_selector("#pp-panel img")
    assert visit.page.evaluate("document.querySelector('#pp-panel img').naturalWidth") == 800
    visit.no_wider_than(400)
    visit.tab("Prototypes")
    visit.page.locator("#pp-gallery .thumbnail-item").first.click()
    visit.page.wait_for_selector("#pp-details .card")
    seen = "document.querySelector('#pp-details .card h4').getBoundingClientRect()"
    visit.page.wait_for_function(
        f"0 <= {seen}.top && {seen}.bottom <= window.innerHeight"
    )  # what was chosen is in sight
    for name in ("Prototypes", "Decisions"):
        visit.tab(name)
        visit.page.wait_for_timeout(500)
        visit.no_wider_than(400)
    small = "[...document.querySelectorAll('button, a.pp-button')].filter(b => b.offsetParent && b.offsetHeight < 40)"
    assert visit.page.evaluate(f"{small}.map(b => b.outerHTML.slice(0, 120))") == []
    visit.end(server)


def test_ctrl_c_ends_it_with_one_line_and_takes_the_uploads_away(server):
    with urlopen(server.url, timeout=60) as answer:  # it is up, not just listening
        assert answer.status == 200
    (uploads,) = server.temporary.glob("protopush-app-*")
    known = {file.name for file in server.temporary.rglob("*") if file.is_file()}
    os.kill(server.process.pid, signal.SIGINT)
    assert server.process.wait(60) == 0
    assert server.process.stdout.splitlines()[1:] == ["Review app ended; every decision is in the run."]
    assert "Traceback" not in server.process.stderr
    assert not uploads.exists()
    left = {file.name for file in server.temporary.rglob("*") if file.is_file()}
    assert {name for name in left if name.endswith((".png", ".jpg", ".jpeg", ".gif", ".webp"))} == set(), known
