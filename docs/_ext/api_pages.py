"""One page a room with what it offers (`__all__`, or all of its modules), from docstrings: plain text with `code` in it."""

from __future__ import annotations

import pkgutil
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
APART = (
    "refimpl.spec_tests",
    "refimpl.cli",
    "refimpl.diff.corpus",
)  # tests; commands, which have --help; bugs, which stages list


def pages() -> dict[str, str]:
    """File name -> page."""
    setup = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = [name for name in setup["packages"] if not name.startswith(APART)]
    found = {f"{room}.md": "\n".join(_page(room)) for room in rooms}
    listed = [
        "# Reference",
        "",
        "Every room and what it offers.",
        "",
        "```{toctree}",
        ":maxdepth: 1",
        "",
        *rooms,
        "```",
        "",
    ]
    return found | {"index.md": "\n".join(listed)}


def _page(room: str) -> Iterator[str]:
    package = import_module(room)
    yield f"# `{room}`"
    yield from _documented(room, ":imported-members:") if hasattr(package, "__all__") else _documented(room)
    if not hasattr(package, "__all__"):
        for module in sorted(
            m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg and not m.name.startswith("_")
        ):
            yield from (f"## `{module}`", *_documented(f"{room}.{module}"))


def _documented(module: str, *options: str) -> Iterator[str]:
    lines = (f".. automodule:: {module}", *[f"   {option}" for option in (":members:", ":no-index:", *options)])
    yield from ("", "```{eval-rst}", *lines, "```", "")


def _plain(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as reStructuredText: nothing in them is markup but `code`, and indented lines stand as they are."""
    text = "\n".join(lines)
    marked = re.split(r"(`[^`\n]+`)", text)
    marked[::2] = [re.sub(r"([*_|\\`:])", r"\\\1", part) for part in marked[::2]]
    marked[1::2] = [rf"\ `{part}`\ " for part in marked[1::2]]  # "\ " is nothing, and lets a letter follow
    lines[:] = [re.sub(r"^([-+•] |\d+\. )", r"\\\1", line.strip()) for line in "".join(marked).split("\n")]


def setup(app: Any) -> dict[str, bool]:
    """Pages before Sphinx looks for them; docstrings as they come."""
    from stage_pages import written

    app.connect("builder-inited", lambda app: written("api", pages()))
    app.connect("autodoc-process-docstring", _plain)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
