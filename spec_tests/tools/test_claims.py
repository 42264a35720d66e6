"""docs/claims.md: every reference of the claims ledger exists, every config value and printed number is the real one."""

import dataclasses
import re
import runpy
from collections import Counter

import pytest

from refimpl.cli import main
from refimpl.layers import PRESETS, STAGES

from .tree import ROOT, in_repository

pytestmark = in_repository
KEYS = {"id", "in", "says", "verdict", "report", "config", "why", "run", "gives", "shown", "here"}
SECTIONS = """1 2 2.1 2.1.1 2.1.2 2.2 3 3.1 3.2 3.2.1 3.2.2 3.2.3 3.3 3.3.1 3.3.2 3.3.3 3.4 3.4.1 3.4.2 3.5 3.5.1 3.5.2
4 4.1 4.2 4.3 4.4 4.4.1 4.4.2 4.5 4.5.1 4.5.2 4.5.3
5 5.1 5.2 5.2.1 5.2.2 5.3 5.3.1 5.3.2 5.3.3 5.3.4 5.4 5.4.1 5.4.2 5.4.3 6 A B B.1 B.2 C"""
REFERENCES = {*SECTIONS.split(), *(f"eq {n}" for n in range(1, 29)), *(f"table {n}" for n in range(1, 10))}
"""What the technical report has: its sections, equations and tables."""


def script() -> dict:
    return runpy.run_path(str(ROOT / ".ci" / "claims.py"))


ARTICLES = script()["articles"]() if ROOT is not None else []
CLAIMS = [claim for article in ARTICLES for claim in article["claim"]]


def test_the_page_is_what_the_rows_say():
    """Catches a row that was edited without `python .ci/claims.py`, and a page edited by hand."""
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == script()["rendered"]()


def test_the_summary_counts_the_items_of_the_page():
    """Catches counts that are not those of the verdicts printed below them."""
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    printed = Counter(re.findall(r"^- \*\*a\d-\d\d\*\* \*([a-zA-Z3 ]+)\*", page, flags=re.MULTILINE))
    verdicts = script()["VERDICTS"]
    (line,) = re.findall(r"^\| all \| (.*) \|$", page, flags=re.MULTILINE)
    assert line.split(" | ") == [str(n) for n in (printed.total(), *(printed[v] for v in verdicts))]
    assert printed.total() == len(CLAIMS) >= 120 and set(printed) == set(verdicts)


def test_ids_are_unique_and_say_their_article():
    """Catches an id that is given twice, which would make references to it lie."""
    assert max(Counter(c["id"] for c in CLAIMS).values()) == 1
    for number, article in enumerate(ARTICLES, 1):
        assert all(re.fullmatch(rf"a{number}-\d\d", c["id"]) for c in article["claim"])
        assert set(article) == {"title", "english", "origin", "claim"}


def test_rows_are_complete():
    """Catches a misspelt key, an open verdict, a row without evidence, a reference to a section that the report has not."""
    for c in CLAIMS:
        why = c.get("why", "")
        assert set(c) <= KEYS and {"id", "in", "says", "verdict"} <= set(c), c
        assert c["verdict"] in ("true of V3", "false", "not verifiable"), c
        assert {"report", "config", "why", "run", "shown"} & set(c), c
        assert ("run" in c) == ("gives" in c), c
        assert {*c.get("report", []), *re.findall(r"\bR ([A-C\d][.\d]*\d)", why)} <= REFERENCES, c
        assert set(re.findall(r"\ba\d-\d\d\b", why)) <= {other["id"] for other in CLAIMS}, c


def test_config_values_are_those_of_the_preset():
    """Catches a value that the specification's V3 does not have, and a key that config.json does not have."""
    released = dataclasses.asdict(PRESETS["deepseek-v3"])
    found = {(key, value) for c in CLAIMS for key, value in c.get("config", {}).items()}
    assert found
    for key, value in found:
        at = released
        for part in key.split("."):
            at = at[part]
        assert at == value, key


def test_places_exist():
    """Catches a stage, file, function or test that was renamed and is still named here."""
    for place in {h for c in CLAIMS for h in c.get("here", [])} - set(STAGES):
        file, _, name = place.partition(":")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(def|class) {name}\b", text, flags=re.MULTILINE), place
    for test in {t for c in CLAIMS for t in c.get("shown", [])}:
        file, name = test.split("::") if "::" in test else (script()["TESTS"], test)
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), test


@pytest.mark.parametrize("command", sorted({c["run"] for c in CLAIMS if "run" in c}))
def test_commands_print_what_the_rows_say(command, capsys):
    """Catches a number that the command does not print, and a command that does not run."""
    program, *words = command.split()
    assert program == "refimpl" and main(words) == 0
    printed = capsys.readouterr().out
    for claim in CLAIMS:
        if claim.get("run") == command:
            assert all(text in printed for text in claim["gives"]), claim["id"]


def test_tests_of_described_code_are_all_named_by_a_row():
    """Catches a test of an article's code that no row leads to."""
    text = (ROOT / script()["TESTS"]).read_text(encoding="utf-8")
    named = {name for c in CLAIMS for name in c.get("shown", [])}
    assert set(re.findall(r"^def (test_\w+)\(", text, flags=re.MULTILINE)) <= named
