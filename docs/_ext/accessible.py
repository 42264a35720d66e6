"""What the theme leaves undone for people who use a keyboard or a screen reader; put into the pages when all are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

EDITS = [
    (r'<p class="caption" role="heading">', '<p class="caption" role="heading" aria-level="2">'),
    (r'<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="All pages">'),
    (r'<aside class="toc-drawer( no-toc)?">', r'<aside class="toc-drawer\1" aria-label="This page">'),
    # What can be scrolled sideways can be reached by keyboard.
    (r'<(pre|div class="(?:math|table)-wrapper[^"]*")>', r'<\1 tabindex="0">'),
    (r'<th class="head"><p></p></th>', '<td class="head"></td>'),
]
_OF_NOTEBOOKS = re.compile(r"<link [^>]*mystnb\.[0-9a-f]+\.css[^>]*>\n?")


def _edit(app: Any, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    for file in Path(app.outdir).rglob("*.html"):
        text = old = file.read_text(encoding="utf-8")
        for pattern, instead in EDITS:
            text = re.sub(pattern, instead, text)
        if 'class="cell' not in text:
            text = _OF_NOTEBOOKS.sub("", text)
        if file.name == "search.html" and "<h1" not in text.replace("<noscript>", ""):
            text = text.replace(
                '<article role="main" id="furo-main-content">',
                '<article role="main" id="furo-main-content"><h1>Search</h1>',
            )
        if text != old:
            file.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """After the build."""
    app.connect("build-finished", _edit)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
