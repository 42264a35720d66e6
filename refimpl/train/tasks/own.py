"""What tasks need of their own beside the model: heads of regressions, uncertainties, their moments, the history of losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.train.checkpoints import Saved, Snapshot
from refimpl.train.checkpoints.pieces import Piece
from refimpl.train.optimizer import AdamState
from refimpl.train.recipe import Phase

from .weighting import History

WEIGHTS, FIRST, SECOND = "tasks", "tasks.m", "tasks.v"
"""Kinds of tensors in a checkpoint."""


@dataclass(frozen=True)
class Own:
    """float32 by name: `tasks.NAME.weight` (D,) and `tasks.NAME.bias` (1,) of a regression, `tasks.NAME.log_variance` (1,);
    losses so far in `phase`. Everything starts at 0: a head that says 0, a variance of 1.
    """

    weights: Mapping[str, Array] = field(default_factory=dict)
    adam: AdamState = field(default_factory=AdamState)
    history: History = field(default_factory=History)
    phase: str = ""

    def within(self, phase: Phase, hidden: int) -> Own:
        """With all that a phase needs, for a model of this hidden size; what was learned stays, the history only in its phase."""
        shapes: dict[str, tuple[int, ...]] = {}
        for t in phase.tasks:
            if t.loss == "regression":
                shapes |= {weight(t.name): (hidden,), bias(t.name): (1,)}
            if phase.weighting.by == "uncertainty":
                shapes[log_variance(t.name)] = (1,)
        new = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in self.weights}
        weights = dict(sorted({**self.weights, **new}.items()))  # a norm is a sum in this order, resumed or not
        history = self.history if self.phase == phase.name else History()
        return replace(self, weights=weights, history=history, phase=phase.name)

    def kept(self, s: Snapshot) -> Snapshot:
        """A snapshot with all of it."""
        kinds = {WEIGHTS: self.weights, FIRST: self.adam.m, SECOND: self.adam.v}
        pieces = {f"{kind}/{name}": Piece.whole(x) for kind, held in kinds.items() for name, x in held.items()}
        told = {"t": self.adam.t, "phase": self.phase, "history": self.history.to_dict()}
        counters = {**s.facts["counters"], WEIGHTS: told}
        return replace(s, pieces={**s.pieces, **pieces}, facts={**s.facts, "counters": counters})

    @classmethod
    def found(cls, saved: Saved) -> Own:
        """That of a checkpoint; nothing, where it has none."""
        told: Mapping[str, Any] | None = saved.facts["counters"].get(WEIGHTS)
        if told is None:
            return cls()
        held = [{n: np.array(x) for n, x in saved.tensors(kind).items()} for kind in (WEIGHTS, FIRST, SECOND)]
        return cls(held[0], AdamState(held[1], held[2], told["t"]), History.from_dict(told["history"]), told["phase"])


def weight(task: str) -> str:
    """The name of a regression's weight (D,)."""
    return f"tasks.{task}.weight"


def bias(task: str) -> str:
    """The name of a regression's bias (1,)."""
    return f"tasks.{task}.bias"


def log_variance(task: str) -> str:
    """The name of s = log sigma^2 (1,) of a task."""
    return f"tasks.{task}.log_variance"
