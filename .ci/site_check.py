"""`python .ci/site_check.py SITE [AXE.js]`: what a built site must hold, asked of every page.

Links and anchors lead somewhere; nothing is fetched from elsewhere; a page loads under 300 KB, figures and the index that a search
reads not counted. With playwright, a Chromium and axe-core's script, in the browser too: no accessibility violation, and nothing
wider than a phone.
"""

from __future__ import annotations

import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LIMIT = 300_000
APART = {".svg", ".png", ".jpg", ".html"}  # figures, and interactive pages in a frame
PHONE = {"width": 390, "height": 844}
SOUGHT = ("router.weights", "mla.q", "moe.gate", "loss.mtp", "optim.step")
"""Stages whose names have words in common with others': their own pages come first."""
FIRST = "document.querySelector('#search-results li a')?.getAttribute('href')"


class Page(HTMLParser):
    """The links, the loaded files and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort what an element points at."""
        of = dict(attrs)
        self.anchors |= {of[key] or "" for key in ("id", "name") if key in of}
        if tag == "a" and of.get("href"):
            self.links.append(of["href"] or "")
        loaded = {"img": "src", "script": "src", "iframe": "src", "link": "href", "source": "src"}
        if (
            (key := loaded.get(tag))
            and of.get(key)
            and of.get("rel") not in ("canonical", "next", "prev", "index", "search")
        ):
            self.loads.append(of[key] or "")


def problems(site: Path) -> list[str]:
    """What is wrong with the files."""
    pages = {f: Page(f.read_text(encoding="utf-8")) for f in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        name = file.relative_to(site)
        size = file.stat().st_size
        for load in page.loads:
            where = _target(file, load)
            if where is None:
                found.append(f"{name}: loads {load} from elsewhere")
            elif not where.exists():
                found.append(f"{name}: {load} is not there")
            elif where.suffix not in APART and where.name != "searchindex.js":
                size += where.stat().st_size
        if size > LIMIT:
            found.append(f"{name}: {size:,} bytes without figures, allowed {LIMIT:,}")
        for link in page.links:
            where = _target(file, link)
            anchor = unquote(urlsplit(link).fragment)
            if where is not None and not where.exists():
                found.append(f"{name}: the link {link} leads nowhere")
            elif where in pages and anchor and anchor not in pages[where].anchors:
                found.append(f"{name}: {link}: no such anchor")
    return found


def _target(file: Path, link: str) -> Path | None:
    """The file that a link means; None for what is not of this site."""
    parts = urlsplit(link)
    if parts.scheme in ("data", "mailto"):
        return file
    if parts.scheme or parts.netloc:
        return None
    return (file.parent / unquote(parts.path)).resolve() if parts.path else file


def in_browser(site: Path, axe: str) -> list[str]:
    """What a browser finds on every page."""
    from playwright.sync_api import sync_playwright

    chromium = next(p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p)
    found: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport=PHONE)
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else found.append(f"asks for {r.url}"))
        for file in sorted(site.rglob("*.html")):
            tab.goto(file.as_uri())
            tab.evaluate(axe)
            name, said = file.relative_to(site), tab.evaluate("axe.run({resultTypes: ['violations']})")
            for v in said["violations"]:
                found.append(f"{name}: {v['id']} ({v['impact']}): {v['help']}: {v['nodes'][0]['html'][:120]}")
            wide = tab.evaluate("document.documentElement.scrollWidth")
            if wide > PHONE["width"]:
                found.append(f"{name}: {wide} pixels wide on a phone of {PHONE['width']}")
        found += searched(tab, site)
        browser.close()
    return found


def searched(tab: Any, site: Path) -> list[str]:
    """What a reader does not find who opens the search page as a file."""
    found, said = list[str](), list[str]()
    tab.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    for name in SOUGHT:
        tab.goto(f"{(site / 'search.html').as_uri()}?q={name}")
        tab.wait_for_function(
            "document.querySelector('#search-summary, .search-summary')?.innerText.includes('finished')"
        )
        if (first := tab.evaluate(FIRST)) is None or urlsplit(first).path != f"stages/{name}.html":
            found.append(f"search: for {name} comes first {first}")
    return found + [f"search: {len(said)} complaints, the first: {text}" for text in said[:1]]


def main() -> int:
    """Say what is wrong, one a line."""
    site = Path(sys.argv[1]).resolve()
    found = problems(site)
    if len(sys.argv) > 2:
        found += in_browser(site, Path(sys.argv[2]).read_text(encoding="utf-8"))
    print(*found, sep="\n")
    print(f"{len(list(site.rglob('*.html')))} pages, {len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
