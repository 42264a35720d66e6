"""How far the logits of our float64 run go when a tensor is the candidate's: for each finding, and for all together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.checkpoint.held import Array, Held
from refimpl.diff import Case
from refimpl.diff.impact import Moved, moved
from refimpl.model import Impl

from .findings import Finding
from .summary import unit

TOGETHER = "all together"


@dataclass(frozen=True)
class Weighed:
    """Tensors that were replaced together (the experts of a layer, or one), and what it does; None where it cannot be run (another
    shape, not finite, or without its scale).
    """

    what: str
    names: tuple[str, ...]
    moved: Moved | None


def weighed(
    case: Case, held: Held, findings: list[Finding], *, track: Callable[[list[Any]], Iterable[Any]] = iter
) -> list[Weighed]:
    """All together first, then each, what moves most first. Holds the case's weights in float64."""
    weights = {n: np.asarray(w, np.float64) for n, w in case.weights().items()}
    ours = _logits(case, weights)
    keep: Array = np.ones(ours.shape[:2], bool) if case.valid is None else np.asarray(case.valid) != 0

    def run(what: str, names: tuple[str, ...]) -> Weighed:
        there = {n: np.asarray(held[n], np.float64) for n in names if n in held and n in weights and n not in blind}
        sound = there and all(x.shape == weights[n].shape and np.isfinite(x).all() for n, x in there.items())
        return Weighed(what, names, moved(ours, _logits(case, weights | there), keep) if sound else None)

    blind = {f.name for f in findings if f.status == "no scale"}
    other = [f for f in findings if f.status not in ("equal", "left out", "missing", "extra")]
    usable = tuple(f.name for f in other if f.status not in ("not finite", "misshapen", "no scale"))
    groups: dict[str, list[str]] = {}
    for f in other:
        layer = f.name.partition("model.layers.")[2].partition(".")[0]
        what = f"L{layer}/{unit(f.name)}" if layer else f.name
        groups.setdefault(what + ", no scale" * (f.name in blind), []).append(f.name)
    each = [run(what, tuple(names)) for what, names in track(list(groups.items()))]
    each.sort(key=lambda w: -w.moved.kl if w.moved else -np.inf)
    return [run(TOGETHER, usable), *each] if usable else each


def _logits(case: Case, weights: Mapping[str, Array]) -> Array:
    impl = Impl(precision="float64").load(case.config, weights)
    out: Array = impl.forward(case.tokens, case.positions, valid=case.valid)["logits"]
    return out
