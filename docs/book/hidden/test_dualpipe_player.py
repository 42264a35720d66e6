"""The DualPipe player in a real browser: what it says is the schedule, by keyboard too, and nothing leaves the page."""

import importlib.util
import re
from pathlib import Path

import pytest

from refimpl.parallel_emulation.pipeline import Times, build, simulate


def player():
    """The page's module, by the loader that the site's build uses."""
    docs = Path(__file__).parent.parent.parent
    spec = importlib.util.spec_from_file_location("interactive_hook", docs / "_ext" / "interactive.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    return hook.load(docs / "book" / "interactive" / "dualpipe.py")


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """The page in Chromium, with and without scripts, and all addresses that were asked for."""
    path = tmp_path_factory.mktemp("player") / "dualpipe.html"
    path.write_text(player().page(), encoding="utf-8")
    asked = []
    pages = []
    for scripts in (True, False):
        page = browser.new_context(java_script_enabled=scripts, viewport={"width": 390, "height": 800}).new_page()
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: pytest.fail(str(e)))
        page.goto(path.as_uri())
        pages.append(page)
    yield *pages, asked, path.as_uri()


def said(page):
    return page.locator("#said li").all_inner_texts()


def expected(name, t):
    """Rank by rank what runs at time t: kind, direction, chunk."""
    rows = simulate(build(name, 8, 20), Times()).spans
    return [[op for s in row if s.start <= t < s.end for op in s.step] for row in rows]


WORDS = {"forward": "F", "backward": "B", "backward for the input": "I", "backward for the weights": "W"}


def read(line):
    """'rank 3: forward of 2 (from rank 0) together with ...; step 4' -> [(kind, direction, chunk)]."""
    found = re.findall(
        r"(forward|backward for the input|backward for the weights|backward) of (\d+)(?: \(from rank (\d)\))?", line
    )
    return [(WORDS[kind], int(rank == "7"), int(chunk)) for kind, chunk, rank in found]


@pytest.mark.parametrize("name", ["dualpipe", "zb1p", "1f1b"])
def test_every_rank_at_every_third_time_is_that_of_the_schedule(opened, name):
    """Catches a step shown too early or late, directions swapped, a rank's row in another's place."""
    page = opened[0]
    page.select_option("#which", name)
    end = int(page.get_attribute("#time", "max"))
    assert end == simulate(build(name, 8, 20), Times()).makespan
    for t in range(0, end, 3):
        assert [read(line) for line in said(page)] == [[tuple(op) for op in ops] for ops in expected(name, t)], t
        for _ in range(3):
            page.click("#next")
    assert "is over" in page.inner_text("#about")


def test_keys_step_play_and_jump(opened):
    """Catches a player that only a mouse can use, and one that swallows keys of its own controls."""
    page = opened[0]
    page.select_option("#which", "dualpipe")
    page.focus("#scroll")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#time") == "1"
    page.keyboard.press("End")
    assert page.input_value("#time") == "66"
    page.keyboard.press("Home")
    page.keyboard.press(" ")
    assert page.get_attribute("#play", "aria-pressed") == "true"
    page.locator("#about", has_text="Time 2:").wait_for()
    page.keyboard.press(" ")
    assert page.get_attribute("#play", "aria-pressed") == "false"
    page.focus("#follow")
    page.keyboard.press("End")
    assert page.input_value("#follow") == "1.9" and page.input_value("#time") != "66"
    page.select_option("#follow", "")
    page.focus("#time")
    page.keyboard.press("Home")
    assert page.input_value("#time") == "0"


def test_a_followed_micro_batch_passes_every_stage_once(opened):
    """Catches highlights of another direction's micro-batch of the same number."""
    page = opened[0]
    page.select_option("#which", "dualpipe")
    page.select_option("#follow", "1.4")
    marked = page.locator("#pic-dualpipe .box.mine").all_text_contents()
    page.select_option("#follow", "")
    ops = [step for row in build("dualpipe", 8, 20).ranks for step in row]
    assert len(marked) == sum(any((op.direction, op.chunk) == (1, 4) for op in step) for step in ops)
    labels = sorted(label for text in marked for label in re.findall(r"[a-zA-Z]4(?!\d)", text) if label.islower())
    assert (
        labels.count("f4") == 8
        and labels.count("b4") + labels.count("i4") == 8
        and labels.count("i4") == labels.count("w4")
    )


def test_without_scripts_all_three_pictures_are_there_and_nothing_is_fetched(opened):
    """Catches an empty page without scripts, dead buttons left visible, a request."""
    _, plain, asked, address = opened
    assert [plain.locator(f"#pic-{n}").is_visible() for n in ("dualpipe", "zb1p", "1f1b")] == [True] * 3
    assert plain.locator("#pic-dualpipe .box").count() == sum(map(len, build("dualpipe", 8, 20).ranks))
    assert not plain.locator(".controls").is_visible()
    assert set(asked) == {address}


def test_the_eight_steps_are_the_tables():
    """Catches a boundary off by one: step 1 is near forwards only, 5 ends the forwards, 6 has no forward, 8 is weights only."""
    for rank, row in enumerate(player().data("dualpipe")["rows"]):
        near, kinds = (0 if rank < 4 else 1), {}
        for _, _, ops, step in row:
            kinds.setdefault(step, []).append([(k, d == near) for k, d, _ in ops])
        assert all(step == [("F", True)] for step in kinds.get(1, []))
        assert [step[0][1] for step in kinds[2]] == [True, False] * (len(kinds[2]) // 2)
        assert all(ops[0][0] != "F" for step in (6, 7, 8) for ops in kinds.get(step, []))
        assert all(step[0][0] == "W" for step in kinds[8]) and kinds[6][0][0] == ("B", False)
        assert sum(len(ops) == 2 for ops in kinds[4]) >= len(kinds[4]) - 2
