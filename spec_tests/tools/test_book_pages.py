"""The book's interactive pages: self-contained, right without scripts, and in a real browser what the specification says."""

import importlib.util
import re

import numpy as np
import pytest

from refimpl.layers.numerics.formats import E4M3, E5M2, decode, encode
from refimpl.layers.numerics.tensor_cores import tensor_core_matmul

from .tree import ROOT, in_repository

pytestmark = in_repository

PAGES = ("router", "fp8_line", "accumulate", "dualpipe")


def module(name):
    """A page's module, by the loader that the site's build uses."""
    source = ROOT / "docs" / "_ext" / "interactive.py"
    spec = importlib.util.spec_from_file_location("interactive_hook", source)
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook.load(ROOT / "docs" / "book" / "interactive" / f"{name}.py")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing(name):
    """Catches an address in a page, a picture without words for those who do not see it, a page that grows without bound."""
    text = module(name).page()
    assert not re.search(r"https?://|@import|url[(](?!#)|javascript:|\b(src|href)=", text.replace("url(#cut)", ""))
    assert "default-src 'none'" in text and '<html lang="en">' in text and len(text) < 200_000
    body = text.partition("<body>")[2].partition("<script>")[0]
    assert "<svg" in body and all(
        'role="img"' in tag and "aria-label" in tag for tag in re.findall(r"<svg[^>]*>", body)
    )


def grey(colour):
    """The luma of #rrggbb, 0 to 255 (ITU-R BT.601)."""
    return sum(w * int(colour[i : i + 2], 16) for w, i in ((0.299, 1), (0.587, 3), (0.114, 5)))


def test_dark_and_warm_are_two_greys():
    """Catches two groups of experts that are one in a grey print, by day or by night: a quarter of the scale lies between."""
    css = (ROOT / "docs" / "book" / "interactive" / "_shell.css").read_text(encoding="utf-8")
    modes = re.findall(r"--dark: (#\w{6}); --warm: (#\w{6})", css)
    assert len(modes) == 2 and all(abs(grey(a) - grey(b)) > 64 for a, b in modes)


# ---- In a browser

SHOWN = "[...document.querySelectorAll('[data-row]')].filter((g) => g.getAttribute('opacity') === '1').length"


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page, notes requests and complaints; afterwards there must have been none."""
    pages = []

    def opened(name, *, scripts=True):
        file = tmp_path / f"{name}.html"
        file.write_text(module(name).page(), encoding="utf-8")
        page = browser.new_context(java_script_enabled=scripts, viewport={"width": 390, "height": 900}).new_page()
        page.requests, page.complaints = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield opened
    for page in pages:
        assert {url.partition(":")[0] for url in page.requests} == {"file"} and page.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_without_scripts_there_is_a_picture(visit, name):
    """Catches a page that is empty until a script has run, and controls that do nothing."""
    page = visit(name, scripts=False)
    assert page.locator("svg:visible").count() >= 1 and page.locator("#still").is_visible()
    assert page.locator("button:visible").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_sees_it_whole(visit, name):
    """Catches a page wider than 390 pixels."""
    page = visit(name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("#still").is_visible()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gamma", "grouped", "steps"), [(10, True, 40), (37, False, 25), (0, True, 14), (1, False, 14)]
)
def test_the_router_routes_as_the_stages_do(visit, gamma, grouped, steps):
    """Catches a bias that moves the wrong way or before its batch, ties to the higher index, groups by their best expert only."""
    page, wanted = visit("router"), module("router").history(steps, gamma, grouped=grouped)
    page.locator("#gamma").fill(str(gamma))
    if not grouped:
        page.locator("#grouped").uncheck()
    for i, (load, bias) in enumerate(wanted):
        assert page.evaluate("document.body.dataset.load") == " ".join(map(str, load))
        assert page.evaluate("document.body.dataset.bias") == " ".join(map(str, bias))
        assert f"Batch {i + 1}: expert {load.index(max(load))} is busiest" in page.locator("#says").inner_text()
        page.locator("#step").press("Enter")


@pytest.mark.slow
@pytest.mark.parametrize(("value", "f"), [("e4m3", E4M3), ("e5m2", E5M2)])
def test_the_number_line_rounds_as_the_format_does(visit, value, f):
    """Catches ties away from even, subnormals, the largest number and signs, held against the codec."""
    page = visit("fp8_line")
    page.locator("#format").select_option(value)
    numbers = decode(np.arange(0, 123, dtype=np.uint8), f).astype(np.float64)
    ties = (numbers[1:12] + numbers[:11]) / 2  # exactly between two neighbours
    for x in [0.0, 0.3, -0.3, 1.0625, 1.1875, 447, 464, 1e5, -1e9, 1e-6, 17, *ties.tolist(), *(-ties).tolist()]:
        page.locator("#x").fill(repr(x))
        code = int(encode(np.float32([x]), f, overflow="saturate")[0])
        assert page.evaluate("document.body.dataset.code") == str(code), x
    page.locator("#x").fill("1")
    for bit in (0, 7, 3):
        page.locator(f"[data-bit='{bit}']").click()
    code = int(encode(np.float32([1]), f, overflow="saturate")[0]) ^ 0b10001001
    assert float(page.evaluate("document.body.dataset.value")) == float(decode(np.uint8([code]), f)[0])


@pytest.mark.slow
def test_the_stepper_adds_as_the_tensor_core_does(visit):
    """Catches a running sum that is not that of the quanta, rows out of order, a result that is not the hardware's."""
    page, accumulate = visit("accumulate"), module("accumulate")
    for name, (arch, a, b, c) in accumulate.EXAMPLES.items():
        page.locator("#example").select_option(label=name)
        step = accumulate.explained(name)
        running = 0
        for k, addend in enumerate((x for x in step.addends if x.x), 1):
            page.locator("#next").click()
            running += addend.t
            assert page.evaluate("document.body.dataset.running") == str(running)
            assert page.evaluate(SHOWN) == k
        page.locator("#all").click()
        codes = [encode(np.float32([x]), E4M3, overflow="refuse") for x in (a, b)]
        written = float(tensor_core_matmul(*codes, np.float32([[c]]), arch=arch, fmt="e4m3")[0, 0])
        exact = c + (decode(codes[0], E4M3).astype(float) @ decode(codes[1], E4M3).astype(float).T).item()
        says = page.locator("#result").inner_text()
        assert [float(x) for x in re.findall(r"(?:sum|written|by) (-?[0-9.e-]+?)[,.:]?(?= |$)", says)] == [
            exact,
            written,
            written - exact,
        ]
        assert page.locator("#next").is_disabled()
        page.locator("#back").press("Enter")
        assert page.locator("#next").is_enabled()
