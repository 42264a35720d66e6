"""Interactive pages: every book/interactive/NAME.py whose name has no underscore in front writes one HTML file, by its `page()`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def load(source: Path) -> ModuleType:
    """The module of a page; it may import its neighbours, such as `_shell`."""
    if str(source.parent) not in sys.path:
        sys.path.insert(0, str(source.parent))
    spec = importlib.util.spec_from_file_location(f"interactive_{source.stem}", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(app: Sphinx) -> None:
    """book/interactive/NAME.py -> OUT/book/interactive/NAME.html, self-contained."""
    if app.builder.format != "html":
        return
    out = Path(app.outdir) / "book" / "interactive"
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted((Path(app.srcdir) / "book" / "interactive").glob("[!_]*.py")):
        (out / f"{source.stem}.html").write_text(load(source).page(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages when a build begins."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
