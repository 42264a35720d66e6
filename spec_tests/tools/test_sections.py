"""Sections, sentences and ids: every test has its place in the report, and no id is ever given twice."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from refimpl.spec_tests import sections

from .tree import ROOT, in_repository


def test_every_test_of_a_section_has_one_id():
    """Catches a test that was added, renamed or deleted without `.ci/sections.py`; an id that means something else today."""
    told = sections.ids()
    assert sections.renewed(told) == told
    there = [v for v in told.values() if v not in (sections.GONE, sections.NEXT)]
    assert len(there) == len(set(there)) == len(sections.tests())


def test_no_id_is_missing():
    """Catches a line that was deleted: its number could be given again."""
    numbers = {}
    for id, key in sections.ids().items():
        section, _, number = id.rpartition("-")
        numbers.setdefault(section, []).append((int(number), key == sections.NEXT))
    for section, found in numbers.items():
        assert found == [(i, i == len(found)) for i in range(1, len(found) + 1)], section


def test_an_id_survives_its_test(monkeypatch):
    """Catches a deleted test's id that the next new test gets."""
    a, b, c = (sections.Test(k, "2.1", "2.1", "") for k in ("f::a", "f::b", "f::c"))
    monkeypatch.setattr(sections, "tests", lambda: (a, b))
    first = sections.renewed({})
    assert first == {"2.1-001": "f::a", "2.1-002": "f::b", "2.1-003": "next"}
    monkeypatch.setattr(sections, "tests", lambda: (a, c))
    assert sections.renewed(first) == {"2.1-001": "f::a", "2.1-002": "gone", "2.1-003": "f::c", "2.1-004": "next"}


def test_every_sentence_names_tests_that_exist_or_says_why_not():
    """Catches a sentence whose test was renamed, and a gap without a reason."""
    there = {t.key for t in sections.tests()}
    for id, s in sections.sentences().items():
        assert re.fullmatch(r"([1-5]|B)(\.\d)+-\d\d", id), id
        assert set(s["tests"]) <= there, (id, set(s["tests"]) - there)
        assert bool(s["tests"]) != bool(s.get("open") or s.get("gone")), id


def test_every_equation_of_the_report_is_in_the_table():
    """Catches an equation that was forgotten: R has 28."""
    found = set()
    for s in sections.sentences().values():
        for low, high in re.findall(r"(\d+)(?:-(\d+))?", "" if "table" in s.get("eq", "") else s.get("eq", "")):
            found |= set(range(int(low), int(high or low) + 1))
    assert found == set(range(1, 29))


@pytest.mark.parametrize(
    "folder, docs, section",
    [
        ("r2_1_attention", ["Catches x (R 2.1.2)", "R 2.1.1: y"], "2.1.2"),
        ("r2_1_attention", [None, "The gate (R 2.1.1, eq 3)"], "2.1.1"),
        ("r3_3_fp8", ["as R 4.2 has it", None], "3.3"),
        ("r4_training", [None, None], "4"),
        ("tools", ["R 2.1", None], ""),
    ],
)
def test_the_section_is_the_nearest_that_is_named(folder, docs, section):
    """Catches a test that is counted for a section that its docstring only mentions."""
    assert sections.section_of(folder, *docs) == section


def item(doc):
    """What pytest collects, as far as it is read here."""
    return SimpleNamespace(
        path=Path("r2_1_x/test_y.py"), function=SimpleNamespace(__doc__=doc), add_marker=lambda m: None
    )


@pytest.mark.parametrize("wanted, left", [("2.1", 3), ("2.1.1", 1), ("2", 3), ("2.2", 0), ("", 3)])
def test_a_section_is_chosen_with_what_lies_in_it(wanted, left):
    """Catches `--section 2.1.1` that takes 2.1.12 too, or not what is about 2.1.1 alone."""
    assert len(sections.mark([item("R 2.1.1"), item("R 2.1.12"), item("")], pytest, wanted)) == left


@in_repository
def test_the_page_is_what_the_sentences_say():
    """Catches a page that was not generated again."""
    assert (ROOT / "docs" / "sections.md").read_text(encoding="utf-8") == sections.rendered()


def test_collected_tests_are_marked_and_chosen_by_section(request):
    """Catches a marker that nobody sets, and `--section 2.1` that takes 2.10 or 2.2 too."""
    items = [i for i in request.session.items if i.path == request.path]
    assert sections.mark(items, pytest, "2.1") == []
    assert sections.mark(items, pytest, "") == items
    assert not [
        i for i in request.session.items if i.path.parent.name.startswith("r2") and not i.get_closest_marker("section")
    ]
    assert any("an id survives its test" in line for line in sections.claims(items))
