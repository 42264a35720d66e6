"""Weights as a lane needs them, and no longer: those of one stage at a time, large matrices a block of rows at a time.

A layer of the released model holds 11 billion numbers in its experts; a replay reads those of the experts that were chosen, one
after the other, in each of its lanes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Checkpoint
from refimpl.layers.precision import BF16, Plan
from refimpl.model import Streamed, effective

from .pages import Pages

LARGE = 1 << 20
"""Numbers from which on a matrix is read a block at a time."""
EXPERT = 1 << 16
"""Numbers from which on an expert's matrix is read when it is multiplied by, and not kept: the next one takes its place in the
cache.
"""
NEAR = 32
"""Rows between two that are looked up which are read with them."""
BUDGET = 1 << 26
"""Bytes of decoded weights that are kept for the stages to come; more are let go when the stage is done."""
_READ_BY_ROWS = re.compile(r"\.experts\.\d+\.|\.mlp\.\w+_proj\.weight$|^lm_head\.|embed_tokens\.")
"""Matrices that a stage only multiplies by, or looks rows up in."""


def narrowed(name: str, w: Array, storage: str) -> Array:
    """A weight as a model that is kept in `storage`, bfloat16 or float16, holds it, in float32."""
    if storage == "float16":
        return w.astype(np.float16).astype(np.float32)
    return effective({name: w}, BF16)[name]


class StageWeights:
    """Checkpoint name and plan -> the weight as that plan holds it, `rounded` (name -> dtype) before, as the candidate has it.

    What the stages before have read is let go if it is much.
    """

    def __init__(self, checkpoint: Checkpoint, rounded: Mapping[str, str]) -> None:
        self.checkpoint, self.rounded = checkpoint, rounded
        self.held: dict[tuple[str, str], Array] = {}
        self.sound: set[tuple[str, int, int]] = set()
        self.stage, self.size, self.pages = "", 0, Pages(checkpoint)

    def __call__(self, name: str, plan: Plan) -> Any:
        """The weight, or a `Streamed` one."""
        key = (name, plan.name)
        if key in self.held:
            return self.held[key]
        stage = re.sub(r"\.experts\.\d+", "", name).rpartition(".")[0]
        if stage != self.stage:
            self.stage = stage
            if self.size > BUDGET:
                self.held, self.size = {}, 0
        shape = self.checkpoint.shape(name)
        size, least = math.prod(shape), EXPERT if ".experts." in name else LARGE
        if size >= least and len(shape) == 2 and not plan.gemms and _READ_BY_ROWS.search(name):
            return Streamed(self, name, plan, (shape[0], shape[1]), NEAR)
        self.held[key] = self.read(name, plan, 0, shape[0] if shape else 1)
        self.size += self.held[key].nbytes
        return self.held[key]

    def read(self, name: str, plan: Plan, start: int, stop: int) -> Array:
        """Rows of a weight as the plan holds them."""
        w = self.checkpoint.rows(name, start, stop)
        if kept := self.rounded.get(name):
            w = narrowed(name, w, kept)
        if (name, start, stop) in self.sound and w.dtype == np.float32:
            found = plan.weight(name, w)
        else:  # which looks through all of it for what is no number
            found = effective({name: w}, plan)[name]
            self.sound.add((name, start, stop))
        self.pages.read(found.nbytes)
        return found
