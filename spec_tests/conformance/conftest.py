"""The implementation under test, and cases for it: one a regime, made once."""

import pytest

from refimpl.conformance.bench import Bench

from .plugin import NAME, under_test


@pytest.fixture(scope="session")
def impl(request):
    """The implementation, as a `Subject`."""
    found = under_test(request.config)
    request.config.stash[NAME] = found.name
    yield found
    getattr(found.impl, "close", lambda: None)()


@pytest.fixture(scope="session")
def bench(impl, request, tmp_path_factory):
    """Cases, and what the implementation gives on them."""
    return Bench(impl, request.config.getoption("--cases-dir") or tmp_path_factory.mktemp("cases"))
