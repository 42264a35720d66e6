"""How a stage of an article is marked: its name begins with `variant.`, its description ends with MARK, its source names claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.layers.stage import Compare, Stage, stage

MARK = "described in articles, not in V3"


def variant(
    name: str, *, what: str, claims: str, shape: str, source: str = "", compare: Compare = "value"
) -> Callable[[Callable[..., Any]], Stage]:
    """The stage `variant.NAME`. `claims` are rows of docs/claims.md, which say what the article says; `source` is the paper that
    the mechanism comes from, if one is known.
    """
    eq = "; ".join(filter(None, [source, f"claims {claims}" if " " in claims else f"claim {claims}"]))
    return stage(f"variant.{name}", what=f"{what} ({MARK})", eq=eq, shape=shape, compare=compare)
