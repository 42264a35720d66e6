"""What a trace of a training step says of it: the losses' weights, the labels, the speed of the balancing bias, the optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.layers.config import Config
from refimpl.layers.loss import IGNORE
from refimpl.layers.router import bias_update, counts
from refimpl.layers.stage import Call

from .optimizer import Optimizer, read_optimizer, stepped_by
from .trace import Header

PHASES = ("bwd", "grad", "upd")
"""Gradients by taps, gradients by weights, what the step changed."""


@dataclass(frozen=True)
class Training:
    """lambda (`mtp_weight`), alpha (`aux_weight`) and gamma of R 4.2, labels (B, S) or None: the tokens, padding ignored; the
    optimiser if its step is judged.
    """

    mtp_weight: float = 0.0
    aux_weight: float = 0.0
    gamma: float = 0.0
    labels: list[list[int]] | None = None
    optimizer: Optimizer | None = None

    @property
    def losses(self) -> dict[str, float]:
        """The losses' weights."""
        return {"mtp_weight": self.mtp_weight, "aux_weight": self.aux_weight}

    def targets(self, tokens: list[list[int]], valid: list[list[int]] | None) -> Any:
        """Labels (B, S)."""
        if self.labels is not None or valid is None:
            return tokens if self.labels is None else self.labels
        return np.where(np.asarray(valid) != 0, np.asarray(tokens), IGNORE)


def training_of(header: Header, taps: Iterable[str]) -> Training | None:
    """What the header's `training` says; None for a trace that has nothing of a training step. SpecError for an unknown key."""
    seen = any(t.partition("/")[0] in PHASES or t.rpartition("/")[2].startswith("loss") for t in taps)
    if not (seen or header.training or set(header.phases) & set(PHASES)):
        return None
    with where("in the trace header's training"):
        return read_training(header.training)


def optimizer_storage(header: Header) -> dict[str, str]:
    """Pattern of taps -> how the optimiser keeps them; none where it is not declared."""
    given = header.training.get("optimizer")
    with where("in the trace header's training"):
        return {} if given is None else read_optimizer(given).storage()


def read_training(given: Mapping[str, Any]) -> Training:
    """Checked settings of a step."""
    known = [f.name for f in fields(Training)]
    for key, value in given.items():
        require(key in known, f"unknown key {key!r}; known: {', '.join(known)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
        require(key in ("labels", "optimizer") or number, f"{key} is {value!r}; expected a number from 0 on")
        require(
            key != "labels" or value is None or isinstance(value, list), "labels are lists of ids, a list a sequence"
        )
    adam = given.get("optimizer")
    return Training(**{**given, "optimizer": None if adam is None else read_optimizer(adam)})


def update_of(program: list[Call], c: Config, t: Training) -> list[Call]:
    """Calls for the loads of the experts and the bias after the step (R 2.1.2), for every router with a bias but MTP's, and for the
    optimiser's step.
    """
    found, zero_sum = [], c.dialect.bias_update == "zero_sum"
    for call in program:
        unit = call.tap.split("/")[1]
        if call.stage == "router.ids" and unit.startswith("L") and c.topk_method == "noaux_tc" and t.gamma:
            load, bias = f"upd/{unit}/{counts.tap}", f"w/model.layers.{unit[1:]}.mlp.gate.e_score_correction_bias"
            found.append(Call(counts.name, load, (call.tap,), {"n_experts": c.n_routed_experts}))
            moved = {"gamma": t.gamma, "zero_sum": zero_sum}
            found.append(Call(bias_update.name, f"upd/{unit}/{bias_update.tap}", (bias, load), moved))
    return found + (stepped_by(program, t.optimizer) if t.optimizer else [])
