"""Weights as a lane needs them, and no longer: those of one stage at a time, large matrices a block of rows at a time.

A layer of the released model holds 11 billion numbers in its experts; a replay reads those of the experts that were chosen, one
after the other, in each of its lanes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Checkpoint
from refimpl.layers.precision import BF16, Plan
from refimpl.model import Streamed, effective

LARGE = 1 << 24
"""Numbers from which on a matrix is read a block at a time."""
BUDGET = 1 << 27
"""Bytes of decoded weights that are kept for the stages to come; more are let go when the stage is done."""
_READ_BY_ROWS = re.compile(r"\.experts\.\d+\.|\.mlp\.\w+_proj\.weight$|^lm_head\.|embed_tokens\.")
"""Matrices that a stage only multiplies by, or looks rows up in."""


class StageWeights:
    """Checkpoint name and plan -> the weight as that plan holds it. What the stages before have read is let go if it is much."""

    def __init__(self, checkpoint: Checkpoint, rounded: bool, *, experts: int = 1) -> None:
        self.checkpoint, self.rounded, self.experts = checkpoint, rounded, experts
        self.held: dict[tuple[str, str], Array] = {}
        self.stage, self.size, self.touched = "", 0, 0

    def __call__(self, name: str, plan: Plan) -> Any:
        """The weight, or a `Streamed` one."""
        stage = re.sub(r"\.experts\.\d+", "", name).rpartition(".")[0]
        if stage != self.stage:
            self.stage = stage
            if self.size > BUDGET:
                self.held, self.size = {}, 0
        shape = self.checkpoint.shape(name)
        size = int(np.prod(shape)) * (self.experts if ".experts." in name else 1)
        if size >= LARGE and len(shape) == 2 and not plan.gemms and _READ_BY_ROWS.search(name):
            return Streamed(self, name, plan, (shape[0], shape[1]))
        key = (name, plan.name)
        if key not in self.held:
            self.held[key] = self.read(name, plan, 0, shape[0] if shape else 1)
            self.size += self.held[key].nbytes
        return self.held[key]

    def read(self, name: str, plan: Plan, start: int, stop: int) -> Array:
        """Rows of a weight as the plan holds them."""
        w: Mapping[str, Array] = {name: self.checkpoint.rows(name, start, stop)}
        found = effective(effective(w, BF16) if self.rounded else w, plan)[name]
        self.touched += found.nbytes
        if self.touched > BUDGET:  # mapped pages count as memory until they are given back
            self.checkpoint.let_go()
            self.touched = 0
        return found
