"""Profiles of examples: what `quick`, `ci` and `deep` mean, and that a failure says how it is made again."""

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.spec_tests import conftest

from .tree import HERE, ROOT, in_repository

COUNTED = """\
from hypothesis import given, settings, strategies as st
seen = []

@settings(max_examples=7)
@given(st.integers())
def test_some(n):
    seen.append(n)

def test_how_many():
    print("SEEN", len(seen), hash(tuple(seen)))
"""
FAILS = (
    "from hypothesis import given, strategies as st\n\n@given(st.integers())\ndef test_it(n):\n    assert n < 1000\n"
)


def said(folder, text, profile):
    """What pytest prints of a file beside the suite's conftest."""
    (folder / "test_it.py").write_text(text)
    root = f"import runpy; runpy.run_path({str(ROOT / 'conftest.py')!r})\n" if ROOT else ""
    (folder / "conftest.py").write_text(
        f"{root}from refimpl.spec_tests.conftest import *\nfrom refimpl.spec_tests.conftest import ITEMS, MORE, draw_more\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={folder}",
        "-c",
        "/dev/null",
    ]
    return subprocess.run(
        [*command, f"--hypothesis-profile={profile}", folder / "test_it.py"], cwd=HERE, capture_output=True, text=True
    ).stdout


def seen(folder, profile):
    """How many examples were drawn, and which."""
    found = re.search(r"SEEN (\d+) (-?\d+)", said(folder, COUNTED, profile))
    assert found
    return int(found[1]), found[2]


@pytest.mark.slow
def test_deep_draws_ten_times_as_many_and_quick_the_same_ones(tmp_path):
    """Catches a profile that changes nothing where a test asks for a number of examples, and a default that is not repeatable."""
    quick = seen(tmp_path, "quick")
    assert quick == seen(tmp_path, "quick") and quick[0] <= 7
    assert 60 <= seen(tmp_path, "deep")[0] <= 70


@pytest.mark.slow
def test_a_failure_prints_what_makes_it_again(tmp_path):
    """Catches a report from which the example cannot be had."""
    assert re.search(r"@reproduce_failure\('[\d.]+', b'[\w+/=-]+'\)", said(tmp_path, FAILS, "ci"))


def test_more_examples_are_drawn_where_a_test_asks_for_a_number():
    """Catches a profile that changes only the tests that ask for none."""

    @settings(max_examples=7)
    @given(st.integers())
    def test(n):
        drawn.append(n)

    drawn = []
    conftest.draw_more(test, 3)
    conftest.draw_more(conftest.draw_more, 3)  # which draws nothing
    test()
    assert 18 <= len(drawn) <= 21


@in_repository
def test_the_profiles_are_those_of_the_page():
    """Catches a profile that was renamed and is still recommended."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"--hypothesis-profile (\w+)", text)) == set(conftest.MORE) - {"quick"}
    assert settings.get_profile("ci").derandomize and not settings.get_profile("deep").derandomize
    assert settings.get_profile("quick").derandomize and all(settings.get_profile(p).print_blob for p in conftest.MORE)
