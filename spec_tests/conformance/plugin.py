"""pytest's side of conformance: which implementation, profiles, exceptions by file, what rests on what, the report."""

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from refimpl.checkpoint import Transaction
from refimpl.conformance.process import Lacking
from refimpl.conformance.report import Outcome, Report, listed, unreasoned
from refimpl.conformance.shipped import PROFILES, SHIPPED
from refimpl.conformance.subject import subject
from refimpl.version import __version__

_REPORT = pytest.StashKey[Report]()
NAME = pytest.StashKey[str]()
"""What the implementation calls itself."""


def claim(id, profile, section, *, after=()):
    """Mark a test as the claim of this id, in a profile, of a section of R, resting on other claims."""
    assert profile in PROFILES, profile
    return pytest.mark.claim(id=id, profile=profile, section=section, after=tuple(after))


def add_options(parser):
    group = parser.getgroup("conformance", "conformance of an implementation")
    group.addoption("--impl", default=os.environ.get("SPEC_IMPL", ""), help="pkg.mod:Class (or SPEC_IMPL)")
    group.addoption("--impl-cmd", default=os.environ.get("SPEC_IMPL_CMD", ""), help="a command (or SPEC_IMPL_CMD)")
    group.addoption("--profile", default="", help=f"only these, with commas between: {', '.join(PROFILES)}")
    group.addoption("--certified", action="store_true", help="a skip within the chosen profiles is a failure")
    group.addoption("--skips-file", type=Path, help="lines `ID  # reason`: claims not to be run")
    group.addoption("--xfails-file", type=Path, help="lines `ID  # reason`: claims known to fail; a pass is an error")
    group.addoption("--conformance-json", type=Path, help="write the report here")
    group.addoption("--regimes", default="", help="only these regimes, with commas between")
    group.addoption("--cases-dir", type=Path, help="keep the cases here, for another run")
    group.addoption("--badge", type=Path, help="write a badge (SVG) here")


def foreign(config):
    """Whether somebody else's implementation is tested: then nothing but claims is run."""
    return bool(config.getoption("--impl") or config.getoption("--impl-cmd") or config.getoption("--profile"))


def pytest_configure(config):
    config.addinivalue_line("markers", "claim(id, profile, section, after): a claim about any implementation")
    config.stash[_REPORT] = Report("", __version__, config.getoption("--certified"))


def pytest_collection_modifyitems(config, items):
    """Leave what was asked for; put ids on the items; apply the files of exceptions."""
    asked = [p for p in config.getoption("--profile").split(",") if p]
    if unknown := set(asked) - set(PROFILES):
        raise pytest.UsageError(f"profiles {', '.join(sorted(unknown))}; there are: {', '.join(PROFILES)}")
    regimes = [r for r in config.getoption("--regimes").split(",") if r]
    claims = [i for i in items if _mark(i)]  # those of other profiles, too: an exception of theirs is not stale
    kept = [i for i in items if not foreign(config) or (_mark(i) and _asked(_facts(i), asked, regimes))]
    here = set(kept)
    config.hook.pytest_deselected(items=[i for i in items if i not in here])
    items[:] = kept
    for item in items:
        if _mark(item):
            item.user_properties.append(("claim", {**_facts(item)}))
    report = config.stash[_REPORT]
    files = config.getoption("--skips-file"), config.getoption("--xfails-file") or _known(config)
    for path, mark in zip(files, (pytest.mark.skip, pytest.mark.xfail), strict=True):
        entries = listed(path.read_text()) if path else {}
        if bare := unreasoned(entries.items()):
            raise pytest.UsageError(f"{path}: no reason after # for {', '.join(bare)}")
        for pattern, reason in entries.items():
            hit = [i for i in claims if _fits(i, pattern)]
            for item in hit:
                item.add_marker(
                    mark(reason=f"listed: {reason}", **({"strict": True} if mark is pytest.mark.xfail else {}))
                )
            report.stale += [] if hit else [pattern]


def _asked(facts, profiles, regimes):
    return (not profiles or facts["profile"] in profiles) and (not regimes or facts["regime"] in ("", *regimes))


def _mark(item):
    found = item.get_closest_marker("claim")
    return found.kwargs if found else None


def _facts(item):
    mark, params = _mark(item), getattr(getattr(item, "callspec", None), "params", {})
    id = mark["id"].format(**params)
    sentence = (item.function.__doc__ or "").strip().split("\n")[0]
    return {
        "id": id,
        "regime": params.get("regime", ""),
        "sentence": sentence,
        **{k: mark[k] for k in ("profile", "section")},
    }


def _fits(item, pattern):
    """Whether an exception means this run of a claim: `RN-008`, `FW-001@ties`, or a run without a regime by what pytest calls it,
    `RN-008@-3.0`.
    """
    facts, called = _facts(item), getattr(getattr(item, "callspec", None), "id", "")
    id, _, which = pattern.partition("@")
    return fnmatchcase(facts["id"], id) and (not which or fnmatchcase(facts["regime"] or called, which))


def _known(config):
    """What an implementation that comes with us is known to do otherwise."""
    shipped = SHIPPED.get(config.getoption("--impl"))
    return shipped.known if shipped else None


_FAILED: set[tuple[str, str]] = set()


def pytest_runtest_setup(item):
    """A claim that rests on one that failed in the same regime says nothing: BLOCKED-BY."""
    mark = _mark(item)
    if mark:
        here = _facts(item)["regime"]
        blocked = [a for a in mark["after"] if (a, here) in _FAILED]
        if blocked:
            pytest.skip(f"BLOCKED-BY {', '.join(blocked)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What an implementation lacks is a skip of that type, not an error."""
    try:
        return (yield)
    except Lacking as lacking:
        if not _mark(item):
            raise
        pytest.skip(f"NOT-IMPLEMENTED {lacking}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if _mark(item) and report.failed:
        facts = _facts(item)
        _FAILED.add((facts["id"], facts["regime"]))
    return report


class Collector:
    """Collects what becomes of the claims, wherever they ran."""

    def __init__(self, config):
        self.config, self.report = config, config.stash[_REPORT]

    def pytest_runtest_logreport(self, report):
        facts = dict(report.user_properties).get("claim")
        if facts and (report.when == "call" or not report.passed):
            if report.when == "teardown":
                return
            text = _reason(report)
            self.report.outcomes.append(Outcome(**facts, state=_state(report, text), text=text))

    def pytest_terminal_summary(self, terminalreporter):
        if self.report.outcomes and foreign(self.config):
            self.report.implementation = _named(self.config)
            terminalreporter.section("conformance")
            terminalreporter.write_line(self.report.table())

    def pytest_sessionfinish(self, session):
        self.report.implementation = _named(self.config)
        for option, text in (("--conformance-json", self.report.to_json), ("--badge", self.report.badge)):
            if path := self.config.getoption(option):
                with Transaction() as files, files.new(path) as f:
                    f.write(text().encode())
        if foreign(self.config) and session.exitstatus == 0 and not self.report.conforms:
            session.exitstatus = 1


def _state(report, text):
    if text.startswith("BLOCKED-BY"):
        return "blocked"
    if report.skipped:
        return "known" if hasattr(report, "wasxfail") else "skipped"
    return "failed" if report.failed else "passed"


def _reason(report):
    if hasattr(report, "wasxfail"):
        return report.wasxfail
    if report.skipped and isinstance(report.longrepr, tuple):
        return re.sub("^Skipped: ", "", report.longrepr[2])
    crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
    return crash.split("\n")[0] if report.failed else ""


def _named(config):
    asked, told = config.getoption("--impl-cmd") or config.getoption("--impl") or "refimpl", config.stash.get(NAME, "")
    return f"{asked} ({told})" if told and told != asked else asked


def under_test(config):
    """The implementation that the options name."""
    return subject(config.getoption("--impl"), config.getoption("--impl-cmd"))
