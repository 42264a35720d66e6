"""Cases for an implementation, one a regime, and what it and we give on them, each computed once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.diff import Case
from refimpl.diff.compare import Finding
from refimpl.diff.precision import declared_precision
from refimpl.diff.tolerance import FACTOR, ROUNDINGS, distance
from refimpl.layers import PRESETS
from refimpl.model import Impl
from refimpl.record import new_case

from .parallel import whole_and_sum
from .process import Lacking
from .stages import ground, stage_findings
from .subject import Subject

LENGTH = 12
"""Tokens a sequence: twice as many cost four times as much to draw."""
MOST = 0.5
"""Share of a row's norm that two runs may differ by at any precision: logits of unrelated rows are 1 and more apart. Where correct
runs may differ by more, as single tokens meet other experts in FP8, the middle row is held to it instead of the worst.
"""
PLAIN = "plain"
"""The case without a regime."""


@dataclass
class Bench:
    """A subject with a folder for cases of preset tiny, MTP module included."""

    of: Subject
    folder: Path
    _cases: dict[str, Case] = field(default_factory=dict)
    _stages: dict[str, dict[str, list[Finding | Lacking]]] = field(default_factory=dict)
    _spread: dict[str, float] = field(default_factory=dict)
    _sums: dict[tuple[str, int], float] = field(default_factory=dict)

    def case(self, regime: str = PLAIN) -> Case:
        """A case in a regime, or in several with commas between."""
        if regime not in self._cases:
            path = self.folder / regime.replace(",", "+")
            if not (path / "tokens.json").is_file():  # of an earlier run
                asked = "" if regime == PLAIN else regime
                new_case(path, PRESETS["tiny"], regimes=asked, length=LENGTH, mtp=True)
            self._cases[regime] = Case.read(path)
        return self._cases[regime]

    def loaded(self, regime: str = PLAIN) -> Case:
        """The case, of which the subject holds the weights."""
        case = self.case(regime)
        self.of.load(case)
        return case

    def stages(self, regime: str) -> dict[str, list[Finding | Lacking]]:
        """Stage -> its calls, judged."""
        self.of.must_have("stage")
        if regime not in self._stages:
            self._stages[regime] = stage_findings(self.of, ground(self.case(regime), self.of.precision))
        return self._stages[regime]

    def near(self, regime: str, x: Array, e: Array) -> str:
        """Why logits x cannot be another correct run's than e, or "".

        Two runs of one implementation that add up in other orders are each about as far from float64 as our own run at the
        declared precision is; the diff's factor stands for the draws that were not made.
        """
        if x.shape != e.shape:
            return f"shape {x.shape}, expected {e.shape}"
        return _apart(x, e, 2 * FACTOR * self.spread(regime))

    def near_sum(self, what: str, world: int, whole: Array, total: Array) -> str:
        """Why the parts' sum cannot be the whole, or "": the limit is how far our own parts at the declared precision are from our
        whole in float64.
        """
        if (what, world) not in self._sums:
            p, case = declared_precision(self.of.precision), self.case()
            _, ours = whole_and_sum(Subject(Impl(precision=p.plan, attend="expanded")), case, what, world)
            exact, _ = whole_and_sum(Subject(Impl(precision="float64")), case, what, 1)
            self._sums[what, world] = max(distance("logits", ours, exact).worst, ROUNDINGS * p.unit("fwd/logits"))
        return _apart(total, whole, 2 * FACTOR * self._sums[what, world])

    def spread(self, regime: str) -> float:
        """How far our logits at the declared precision are from those in float64."""
        if regime not in self._spread:
            case = self.case(regime)
            p = declared_precision(self.of.precision)
            runs = [Impl(precision=name).load(case.raw_config, case.weights()) for name in (p.plan.name, "float64")]
            given: dict[str, Any] = {"positions": case.positions, "valid": case.valid}
            ours, exact = (r.forward(case.tokens, **given)["logits"] for r in runs)
            self._spread[regime] = max(distance("logits", ours, exact).worst, ROUNDINGS * p.unit("fwd/logits"))
        return self._spread[regime]

    def changed(self, case: Case, weights: dict[str, Array]) -> Array:
        """The subject's logits of the case's tokens with other weights."""
        self.of.hold(case.raw_config, weights)
        return self.of.logits(case.tokens)


def _apart(x: Array, e: Array, limit: float) -> str:
    """By how much too much x is away from e, or ""."""
    far, which = distance("logits", x, e).worst, "rows differ"
    if limit > MOST:
        rows = np.linalg.norm(x - e, axis=-1) / np.maximum(np.linalg.norm(e, axis=-1), np.finfo(np.float32).tiny)
        far, which, limit = float(np.median(rows)), "the middle row differs", MOST
    return "" if far <= limit else f"{which} by {far:.1e} of their norm, more than {limit:.1e}"


def permuted(case: Case, order: list[int]) -> dict[str, Array]:
    """The weights of the same model with expert order[i] in place i."""
    c, held = case.config, case.weights()
    found = dict(held)
    for name, w in held.items():
        head, _, tail = name.partition(".mlp.experts.")
        if tail:
            index, _, rest = tail.partition(".")
            found[f"{head}.mlp.experts.{order.index(int(index))}.{rest}"] = w
        elif name.endswith((".mlp.gate.weight", "e_score_correction_bias")) and len(w) == c.n_routed_experts:
            found[name] = np.asarray(w)[order]
    return found


__all__ = ["PLAIN", "Bench", "permuted"]
