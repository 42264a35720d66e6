"""Settings that the suite needs wherever it runs, also from an installed wheel, which has no pyproject.toml.

Three profiles of examples, all of which print how a failure is made again: `quick`, the default, draws the same ones every time, so
that a verdict on a change is about the change; `--hypothesis-profile ci` twice as many, the same every time too, for what is to be
released; `deep` ten times as many and others every time, to find what nobody thought of.
"""

import gc

import pytest
from hypothesis import settings

from refimpl.spec_tests import sections
from refimpl.spec_tests.cases.browser import browser  # noqa: F401 (a fixture)
from refimpl.spec_tests.conformance import plugin

MORE = {"quick": 1, "ci": 2, "deep": 10}
"""Profile -> how many times the examples that a test asks for."""
for name in MORE:
    settings.register_profile(name, derandomize=name != "deep", print_blob=True, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser):
    """The options of conformance, and of the report's sections."""
    plugin.add_options(parser)
    group = parser.getgroup("sections", "sections of the report")
    group.addoption("--section", default="", help="only tests about this section, e.g. 2.1.2")
    group.addoption(
        "--claims", action="store_true", help="with --collect-only: the tests as a list of claims, by section"
    )


def pytest_configure(config):
    """Register the marker that pyproject.toml registers in the repository, and what conformance needs."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds; deselected unless -m says otherwise")
    config.addinivalue_line("markers", "section(number): the section of the report that a test is about")
    config.pluginmanager.register(plugin, "conformance")
    config.pluginmanager.register(plugin.Collector(config), "conformance-report")


def pytest_collection_modifyitems(config, items):
    """Mark every test with its section; leave those of the section that was asked for. In a profile that wants more, draw more."""
    by = MORE.get(config.getoption("--hypothesis-profile") or "quick", 1)
    for item in items if by > 1 else ():
        draw_more(getattr(item, "function", None), by)
    kept = sections.mark(items, pytest, config.getoption("--section"))
    here = set(kept)
    config.hook.pytest_deselected(items=[i for i in items if i not in here])
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    """The list of claims, instead of pytest's own."""
    if config.getoption("--claims"):
        terminalreporter.write_line("\n".join(sections.claims(config.stash[ITEMS])))


ITEMS = pytest.StashKey()


def pytest_collection():
    """Modules and thousands of tests live to the end: looking for garbage among them takes an eighth of the whole run."""
    gc.disable()


def pytest_collection_finish(session):
    """Keep what was collected for the list of claims."""
    gc.freeze()
    gc.enable()
    session.config.stash[ITEMS] = list(session.items)


def draw_more(test, by):
    """Let a test of hypothesis's draw `by` times as many examples: a test's own number is otherwise stronger than the profile's."""
    told = getattr(test, "_hypothesis_internal_use_settings", None)
    if told is not None:
        test._hypothesis_internal_use_settings = settings(told, max_examples=by * told.max_examples)
