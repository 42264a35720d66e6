"""Interactive pages: every book/interactive/NAME.py whose name has no underscore in front writes one HTML file, by its `page()`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sphinx.application import Sphinx


def write(app: Sphinx) -> None:
    """book/interactive/NAME.py -> OUT/book/interactive/NAME.html, self-contained."""
    if app.builder.format != "html":
        return
    out = Path(app.outdir) / "book" / "interactive"
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted((Path(app.srcdir) / "book" / "interactive").glob("[!_]*.py")):
        spec = importlib.util.spec_from_file_location(f"interactive_{source.stem}", source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (out / f"{source.stem}.html").write_text(module.page(), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages when a build begins."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
