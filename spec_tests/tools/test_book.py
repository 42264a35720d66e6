"""The book's chapters: each has all that a chapter is to have, and what its text counts is counted by its code."""

import ast
import re
import subprocess
import sys

import pytest

from .tree import BASE, ROOT, in_repository

pytestmark = in_repository

BOOK = BASE / "docs" / "book"
CHAPTERS = sorted(BOOK.glob("[0-9][0-9]-*.md"))
FENCED = re.compile(r"^```\{([\w-]+)\}[^\n]*\n(.*?)^```$", re.S | re.M)


def functions(folder, number):
    """The functions that a file of a chapter defines."""
    tree = ast.parse((BOOK / folder / f"chapter{number}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda f: f.stem)
def test_a_chapter_is_whole(chapter):
    """Catches a chapter without the report's words, a formula, source that is included, a figure that is described, differences."""
    text = chapter.read_text(encoding="utf-8")
    prose = FENCED.sub("", text)
    assert re.search(r'"[^"]{30,}"|^> ', prose, re.M) and re.search(r"section\s\d", prose), (
        "no sentence of the report with its place"
    )
    assert "$" in prose and "\n## Where implementations differ\n" in prose
    cells = FENCED.findall(text)
    included = [re.search(r":pyobject: (\S+)", body) for kind, body in cells if kind == "literalinclude"]
    assert included and all(included)
    drawn = [
        body for kind, body in cells if kind == "code-cell" and re.search(r"^\w.*plt\.(subplots|figure)\(", body, re.M)
    ]
    assert " alt: " in text and all(" alt: " in body for body in drawn), "a figure without words"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda f: f.stem)
def test_three_exercises_are_there_to_be_solved(chapter):
    """Catches an exercise that has no place to be written, no solution, or no hidden test, and a command of another chapter."""
    number = int(chapter.stem[:2])
    said = chapter.read_text(encoding="utf-8").partition("\n## Exercises\n")[2]
    assert re.search(rf"`pytest docs/book -k chapter{number}`", said)
    assert len(re.findall(r"^\d\. ", said, re.M)) == 3
    tests = (BOOK / "hidden" / f"test_chapter{number}.py").read_text(encoding="utf-8")
    asked = functions("exercises", number)
    assert len(asked) >= 3 and asked <= functions("solutions", number)
    assert all(f"mine.{name}" in tests for name in asked)


def test_the_book_has_its_chapters():
    """Catches a chapter that is gone, and one whose number was given twice."""
    assert [int(f.stem[:2]) for f in CHAPTERS] == list(range(1, len(CHAPTERS) + 1)) and len(CHAPTERS) >= 15


def test_the_first_chapters_tests_are_asked_for_alone():
    """Catches `-k chapter1` that runs chapters 10 to 16 as well, which a reader of chapter 1 has not solved."""
    asked = [sys.executable, "-m", "pytest", "docs/book", "-k", "chapter1", "--collect-only", "-q"]
    ran = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert set(re.findall(r"(test_\w+)\.py::", ran.stdout)) == {"test_chapter1"}, ran.stdout + ran.stderr
