"""The HTML report: one file that asks for nothing and runs nothing; a real browser clicks it."""

import dataclasses
import functools
import html.parser
import re

import numpy as np
import pytest

from refimpl.cli import main
from refimpl.diff.html import NEAREST, PICTURED, to_html
from refimpl.diff.judge import judge
from refimpl.diff.picture import COLUMNS, ROWS, picture
from refimpl.layers.stage import STAGES

from .test_diff_partial import SETS, TINY, case, only, recording

BLAMED = ["fwd/L1/router.weights", "fwd/L2/router.weights"]


@functools.cache
def bug():
    return judge(case(), recording("hf-bug"), pictures=True)


class Page(html.parser.HTMLParser):
    """Cells by tap, with their style and text; sections by tap, with their text; ids; every address; alternative texts."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.sections, self.open, self.cell, self.section = {}, {}, [], None, None
        self.addresses, self.ids, self.alternatives = [], [], []
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in ("meta", "link", "br", "img", "rect", "path"):
            self.open.append(tag)
        if tag in ("img", "svg"):
            self.alternatives.append((self.section, tag, given.get("alt", given.get("aria-label"))))
        if "data-tap" in given:
            self.cell = given["data-tap"]
            self.cells[self.cell] = [given["style"], ""]
        if tag == "section":
            self.section = given["id"]
            self.sections[self.section] = ""

    def handle_endtag(self, tag):
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag
        self.cell = None if tag == "td" else self.cell
        self.section = None if tag == "section" else self.section

    def handle_data(self, data):
        if self.cell:
            self.cells[self.cell][1] += data
        if self.section:
            self.sections[self.section] += data


def test_every_tap_has_its_cell_and_nothing_is_fetched():
    """Catches a tap left out of the grid, a blamed one that looks like the others, a link to nowhere, a request."""
    text = to_html(bug())
    page = Page(text)
    taps = {f.tap for f in bug().findings}
    assert set(page.cells) == set(page.sections) == taps and len(page.ids) == len(set(page.ids))
    assert all(a.startswith("data:image/png;base64,") or a[1:] in page.ids for a in page.addresses)
    assert not re.search(r"https?://|@import|url[(]|<script|javascript:|\bon\w+=", text)
    assert """content="default-src 'none'; style-src 'unsafe-inline'; img-src data:\"""" in text
    wrong = {tap for tap, (style, said) in page.cells.items() if "#fff" in style and said}
    assert wrong == {f.tap for f in bug().culprits} == set(BLAMED)
    assert "the selection bias leaks" in text and "DIVERGES" in text


def test_a_section_tells_all_there_is_to_know():
    """Catches a picture, a number, an entry or a hypothesis that is missing, and pictures without words."""
    page = Page(to_html(bug()))
    pictured = {tap for tap, kind, _ in page.alternatives if kind == "svg"}
    near = pictured - set(BLAMED)
    assert len(near) == NEAREST and all(f.ok for f in bug().findings if f.tap in near)
    assert set(BLAMED) < pictured
    for tap in BLAMED:
        (f,) = [f for f in bug().findings if f.tap == tap]
        said = page.sections[tap]
        for number in (f"{f.error:.2e}", f"{f.allowed:.2e}", f"{f.lean:.2e}", f.note, "BEYOND"):
            assert number in said
        for entry in f.picture.worst:
            assert str(list(entry.at)) in said and f"{entry.candidate:.9g}" in said and f"{entry.expected:.9g}" in said
            assert f"{entry.candidate - entry.expected:+.3g}" in said
        assert "the selection bias leaks" in said and "R01, vLLM #11971" in said
    alternatives = [text for _, _, text in page.alternatives]
    assert None not in alternatives  # "" is said on purpose, of what the text tells: the strip beside a map
    assert sum(1 for text in alternatives if text == "") == len(pictured)


def test_a_tap_that_nothing_explains_says_so():
    """Catches silence where there is no hypothesis, as if nobody had looked; a tap of another shape that is pictured."""
    clean = recording("hf-float32")
    x = np.array(clean.taps["fwd/L1/moe.shared"])
    x[1, 3, 5] += 3
    taps = dict(clean.taps) | {"fwd/L1/moe.shared": x, "fwd/L0/resid": clean.taps["fwd/L0/resid"][..., :-1]}
    judgement = judge(case(), dataclasses.replace(clean, taps=taps), pictures=True)
    page = Page(to_html(judgement))
    assert "no known mistake reproduces it" in page.sections["fwd/L1/moe.shared"]
    assert "[1, 3, 5]" in page.sections["fwd/L1/moe.shared"]
    assert "expected" in page.sections["fwd/L0/resid"] and "Worst entries" not in page.sections["fwd/L0/resid"]
    Page(to_html(judge(case(), dataclasses.replace(clean, taps=taps))))  # without pictures it is a page too


def test_the_page_is_small_and_its_growth_is_bounded():
    """Catches a file that grows with the arrays: 2 MB at most for the tiny case with all blamed, about a kilobyte a further tap."""
    rng = np.random.default_rng(0)
    e = rng.normal(size=(2, 3 * ROWS, 5 * COLUMNS))
    noise = picture(STAGES["resid"], e + 10.0 ** rng.uniform(-6, 0, e.shape), e, None, {})  # what compresses worst
    worst = [dataclasses.replace(f, ok=False, error=1.0, allowed=1e-6, picture=noise) for f in bug().findings]
    judgement = dataclasses.replace(bug(), findings=worst)
    assert len(to_html(bug())) < 150_000
    assert len(to_html(judgement)) < 2_000_000
    many = [dataclasses.replace(f, tap=f.tap.replace("fwd/", f"fwd{k}/")) for k in range(20) for f in worst]
    text = to_html(dataclasses.replace(judgement, findings=many))
    assert len(many) == 1860 and text.count('class="heat"') == PICTURED
    assert len(text) < PICTURED * 13_000 + len(many) * 1_200
    pictured = {tap.rpartition("/")[2] for tap, kind, _ in Page(text).alternatives if kind == "svg"}
    assert pictured == {f.tap.rpartition("/")[2] for f in many if f.tap.rpartition("/")[2] != ""}  # each stage has one


def test_names_are_escaped():
    """Catches a tap's or a producer's name that ends the script or the table it stands in."""
    judgement = judge(case(), only(recording("hf-float32"), SETS["logits"]))
    judgement.unknown["</script><script>alert(1)</script>"] = "fwd/<b>"
    text = to_html(judgement, "</title><script>")
    assert "<script>alert" not in text and "</title><script>" not in text
    Page(text)


def test_the_command_writes_it(tmp_path, capsys):
    """Catches a file that is printed as well, or not at all."""
    out = tmp_path / "r.html"
    assert main(["diff", str(TINY), str(TINY / "hf-bug.safetensors"), "--html", str(out), "--quiet"]) == 1
    assert capsys.readouterr().out.count("\n") == 1 and out.read_text().startswith("<!doctype html>")


# ---- In a browser


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page of this text, in a browser that runs no script unless asked to; requests and complaints are noted."""

    def opened(text, *, scripts=False):
        file = tmp_path / "r.html"
        file.write_text(text, encoding="utf-8")
        page = browser.new_context(java_script_enabled=scripts, viewport={"width": 1100, "height": 900}).new_page()
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.goto(file.as_uri())
        return page

    return opened


@pytest.mark.slow
def test_a_click_shows_the_taps_picture(visit, tmp_path):
    """Catches a page that only looks right in its source: the blamed cell is clicked, and its section is all that is shown."""
    page = visit(to_html(bug()))
    assert page.locator("section:visible").count() == 0
    page.click(f'td[data-tap="{BLAMED[1]}"] a')
    section = page.locator("section:visible")
    assert section.count() == 1 and section.get_attribute("id") == BLAMED[1]
    (f,) = [f for f in bug().findings if f.tap == BLAMED[1]]
    heat = section.locator("img.heat")
    size = heat.evaluate("i => [i.complete, i.naturalWidth, i.naturalHeight, i.width / 4, i.height / 48]")
    assert size[:3] == [True, f.picture.size[1], f.picture.size[0]] == [True, 4, 48]
    assert size[3] == int(size[3]) and size[4] == int(size[4])  # whole pixels a cell
    said = section.inner_text()
    assert f"{f.error:.2e}" in said and "R01, vLLM #11971" in said and str(list(f.picture.worst[0].at)) in said
    assert section.locator("svg rect").count() == sum(1 for n in f.picture.counts if n)
    page.screenshot(path=tmp_path / "r.png", full_page=True)
    assert (tmp_path / "r.png").stat().st_size > 20_000
    page.click("section:visible >> text=Back to the grid")
    assert page.locator("section:visible").count() == 0
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"} and page.complaints == []


@pytest.mark.slow
def test_what_is_drawn_is_the_error(visit):
    """Catches a map that a browser decodes into something else: each pixel is the darker, the larger its element's error."""
    page = visit(to_html(bug()))
    page.click(f'td[data-tap="{BLAMED[0]}"] a')
    drawn = page.locator("section:visible img.heat").evaluate(
        """i => { const c = document.createElement("canvas"); [c.width, c.height] = [i.naturalWidth, i.naturalHeight];
        const d = c.getContext("2d"); d.drawImage(i, 0, 0);
        return Array.from(d.getImageData(0, 0, c.width, c.height).data); }"""
    )
    (f,) = [f for f in bug().findings if f.tap == BLAMED[0]]
    grey = np.array(drawn).reshape(*f.picture.heat.shape, 4)[..., :3] @ [0.2126, 0.7152, 0.0722]
    order = np.argsort(f.picture.heat, axis=None)
    assert (np.diff(grey.ravel()[order]) <= 0).all() and np.ptp(grey) > 30


@pytest.mark.slow
def test_the_keyboard_is_enough(visit):
    """Catches cells that only a mouse reaches: Tab leads to the blamed taps first, Enter shows, the focus can be seen."""
    page = visit(to_html(bug()))
    page.keyboard.press("Tab")
    focused = page.locator("a:focus")
    assert focused.get_attribute("href") == f"#{BLAMED[0]}"
    assert focused.evaluate("a => getComputedStyle(a).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.locator("section:visible").get_attribute("id") == BLAMED[0]
    links = page.locator(".grid a")
    assert links.count() == len(bug().findings) and all(links.nth(i).get_attribute("aria-label") for i in range(5))


@pytest.mark.slow
def test_the_page_is_forbidden_to_fetch(visit):
    """Catches a policy that a browser does not understand: a picture from elsewhere or a script in the page is refused."""
    text = to_html(bug()).replace(
        "<h1>", '<img src="http://127.0.0.1:9/x.png"><script>document.title = "ran"</script><h1>'
    )
    page = visit(text, scripts=True)
    assert any("Content Security Policy" in c for c in page.complaints) and page.title() == "refimpl diff"


@pytest.mark.slow
def test_blamed_taps_are_printed(visit):
    """Catches a print of the page that holds none of the sections, since paper has no links."""
    page = visit(to_html(bug()))
    page.emulate_media(media="print")
    assert [s.get_attribute("id") for s in page.locator("section:visible").all()] == BLAMED
