"""The rows of docs/ports.md are what the frameworks that are installed give today."""

import pytest

from .test_ports import ours, rows
from .tree import in_repository

__all__ = ["ours"]  # a fixture
pytestmark = in_repository


@pytest.mark.slow
def test_a_row_is_what_its_commands_give_today(ours, tmp_path, monkeypatch):
    """Catches rows of an older recorder or judge. Of every implementation that is installed in the version of its rows."""
    from importlib.metadata import PackageNotFoundError

    def said(r):
        return (
            r["verdict"],
            sorted(r.get("blamed", {})),
            [c["title"] for c in r.get("causes", [])],
            r.get("places"),
            r.get("why"),
        )

    monkeypatch.chdir(tmp_path)
    held, seen = {(r["port"], r["case"]): r for r in rows()}, 0
    for name, port in ours("ports").PORTS.items():
        then = held[name, "plain"]
        try:
            same = port.versions() == then["versions"]
        except PackageNotFoundError:
            continue
        if same:
            assert said(ours("row").row(port, "plain")) == said(then), name
            seen += 1
    if not seen:
        pytest.skip("no framework of the page is installed in the version of the page")
