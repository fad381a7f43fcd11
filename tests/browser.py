"""A page in a real browser: what it loads and says, how it fits, and the contrasts of its text."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from PIL import Image

# The contrast of two colours (WCAG 2.2), each text with the first opaque background behind it.
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const found = {};
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    if (!node.data.trim() || node.parentElement.closest('svg, title')) continue;
    let behind = node.parentElement;
    while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
    const paper = getComputedStyle(behind ?? document.body).backgroundColor;
    const ink = getComputedStyle(node.parentElement).color;
    const [a, b] = [light(rgba(ink)), light(rgba(paper))];
    found[ink + ' on ' + paper] = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  }
  return found;
}"""


class Visit:
    """A page that is open, and all that it said, asked for and did."""

    def __init__(self, browser, file: Path, width: int = 1400, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.resolve().as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def all_loaded(self) -> None:
        """Every image, also those far below, has come by the time that the page says it is there."""
        assert self.page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0

    def is_whole(self, width: int) -> None:
        """Nothing is missing, nothing was said or asked for but the file itself, and nothing is wider than the page."""
        self.all_loaded()
        assert self.said == []
        assert {url.split(":")[0] for url in self.asked} <= {"file", "data"}
        assert len([url for url in self.asked if url.startswith("file:")]) == 1
        assert self.page.evaluate("document.images.length") > 20
        assert self.page.evaluate("document.scripts.length") == 0
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width


def keep(visit: Visit, name: str, folder: Path) -> None:
    """A screenshot, kept where PROTOPUSH_SCREENSHOTS says."""
    picture = folder / f"{name}.png"
    visit.page.screenshot(path=picture, full_page=True)
    with Image.open(picture) as shown:
        assert shown.height > 2000
        assert len(shown.convert("RGB").resize((64, 64)).getcolors(64 * 64)) > 20
    if kept := os.environ.get("PROTOPUSH_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, Path(kept, picture.name))
