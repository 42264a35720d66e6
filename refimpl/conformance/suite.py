"""The command that runs the suite, wherever it lies: installed, or in a bare clone."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from refimpl.autograd.errors import require


def folder() -> Path:
    """Where the suite is. SpecError if it is not there."""
    found = importlib.util.find_spec("refimpl.spec_tests")
    require(found is not None and found.origin, "refimpl.spec_tests cannot be found; it is part of the distribution")
    assert found is not None
    return Path(str(found.origin)).parent


def command(options: Mapping[str, object], *, slow: bool = True, more: Sequence[str] = ()) -> list[str]:
    """pytest on the claims alone, with options by name (those without a value are left out)."""
    suite = folder()
    where = [f"--rootdir={suite}", f"--confcutdir={suite}", "-c", os.devnull, "-p", "no:cacheprovider", "-q"]
    given = [f"{k}={v}" for k, v in options.items() if v]
    return [
        sys.executable,
        "-m",
        "pytest",
        *where,
        "-m",
        "" if slow else "not slow",
        *given,
        str(suite / "conformance"),
        *more,
    ]


def environment() -> dict[str, str]:
    """For a child process: the implementation may lie in the current folder, as with `python -m`; we may not be installed."""
    paths = [os.getcwd(), str(folder().parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
