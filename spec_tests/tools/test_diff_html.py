"""The HTML report: one file that asks for nothing, readable without scripts, clickable with them."""

import html.parser
import re
import shutil
import subprocess

import pytest

from refimpl.cli import main
from refimpl.diff.html import to_html
from refimpl.diff.judge import judge

from .test_diff_partial import SETS, TINY, case, only, recording

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Cells by tap, with their style and text; every address that anything points to."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.addresses, self.open, self.last = {}, [], [], None
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if "data-tap" in given:
            self.last = given["data-tap"]
            self.cells[self.last] = [given["style"], ""]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.last = None if tag == "td" else self.last

    def handle_data(self, data):
        if self.last:
            self.cells[self.last][1] += data


def test_every_tap_has_its_cell_and_nothing_is_fetched():
    """Catches a tap left out of the grid, a blamed one that looks like the others, a request to somewhere else."""
    judgement = judge(case(), recording("hf-bug"))
    text = to_html(judgement)
    page = Page(text)
    assert set(page.cells) == {f.tap for f in judgement.findings} and page.addresses == []
    assert not re.search(r"https?://|@import|url[(]", text)
    wrong = {tap for tap, (style, said) in page.cells.items() if "hsl(25" in style and said}
    assert wrong == {f.tap for f in judgement.culprits} == {f"fwd/L{i}/router.weights" for i in (1, 2)}
    assert "the selection bias leaks" in text and "DIVERGES" in text


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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, which no Python package brings")
def test_a_click_shows_the_taps_numbers(tmp_path):
    """Catches a script that a browser does not run: a real one clicks the blamed cell, and the detail is there."""
    judgement = judge(case(), recording("hf-bug"))
    click = "<script>document.querySelector('td[data-tap=\"fwd/L1/router.weights\"] button').click()</script></body>"
    page = tmp_path / "r.html"
    page.write_text(to_html(judgement).replace("</body>", click))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    (detail,) = re.findall(r'<div id="detail"[^>]*>(.*?)</div>', done.stdout, flags=re.DOTALL)
    found = next(f for f in judgement.findings if f.tap == "fwd/L1/router.weights")
    assert "fwd/L1/router.weights" in detail and f"{found.error:.2e}" in detail
    assert "the selection bias leaks" in detail
