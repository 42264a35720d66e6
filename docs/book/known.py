"""Tables that chapters share: known mistakes and contested points, read from the code itself."""

from __future__ import annotations

import ast
import html
import inspect
from collections.abc import Iterable, Sequence

from IPython.display import HTML

from refimpl.diff.corpus import MUTANTS
from refimpl.layers import config


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> HTML:
    """A table of texts and numbers (an int gets its thousands apart), that scrolls by itself on a narrow screen."""
    top = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(_cell(x) for x in row) + "</tr>" for row in rows)
    says = f"<caption>{html.escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return HTML(f'<div class="table-wrapper"><table class="docutils">{says}</table></div>')


def _cell(x: object) -> str:
    if isinstance(x, int | float):
        says = f"{x:,}".replace(",", " ") if isinstance(x, int) else f"{x:.4g}"
        return f'<td style="text-align:right;white-space:nowrap">{says}</td>'
    return f"<td>{html.escape(str(x))}</td>"


def bugs(*ids: str) -> HTML:
    """Mistakes of the diff's corpus by id: what is wrong, the stage it changes, where it was reported."""
    rows = [(m.id, m.title, m.stage, "; ".join(m.threads[:3]) or "constructed") for m in map(MUTANTS.__getitem__, ids)]
    return table(("id", "the mistake", "stage", "reported in"), rows, "Known mistakes (refimpl/diff/corpus)")


def points(*names: str) -> HTML:
    """Fields of `Dialect`: the point, our choice, and the evidence that stands beside it in layers/config.py."""
    tree = next(n for n in ast.walk(ast.parse(inspect.getsource(config))) if getattr(n, "name", "") == "Dialect")
    assert isinstance(tree, ast.ClassDef)
    says: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            says[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    rows = [(n, repr(getattr(config.Dialect(), n)), says[n]) for n in names]
    return table(("point", "ours", "who does what"), rows, "Contested points (layers/config.py, Dialect)")
