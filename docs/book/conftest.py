"""`pytest docs/book -k chapter3`: the hidden tests of a chapter's exercises run on what you wrote in exercises/chapter3.py.

BOOK_SOLUTIONS=1 runs them on solutions/ instead, as continuous integration does.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from refimpl.spec_tests.cases.browser import browser

__all__ = ["browser"]  # a fixture, for the interactive pages
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mine(request):
    """The module with the reader's answers (or the solutions) for the test file that asks."""
    folder = "solutions" if os.environ.get("BOOK_SOLUTIONS") else "exercises"
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", HERE / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(config, items):
    """`-k chapter1` is chapter 1: not chapters 10 to 16 too, whose names begin alike."""
    if re.fullmatch(r"chapter\d+", asked := config.option.keyword):
        other = [item for item in items if item.path.stem != f"test_{asked}"]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item.path.stem == f"test_{asked}"]
