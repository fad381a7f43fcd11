"""Pages under zh/ say that they are Chinese, to browsers that choose glyphs by it and to screen readers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def on_post_page(output: str, page: SimpleNamespace, **_: Any) -> str:
    """Called by mkdocs with the HTML of a page."""
    if page.file.src_uri.startswith("zh/"):
        return output.replace('<html lang="en"', '<html lang="zh-Hans"', 1)
    return output
