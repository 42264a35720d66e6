"""Supervised fine-tuning (R 5.1): the next-token loss on answers only, a cosine from 5e-6 to 1e-6 over two epochs.

The loss is that of pre-training with label -100 on prompts, so a step is `refimpl.train.step` with a batch of `examples`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

from .likelihood import counted, token_logp

PEAK, END = 5e-6, 1e-6
"""R 5.1: learning rate at the start and at the end of the cosine."""


def loss(logits: Any, labels: Array) -> Any:
    """- mean log p over the labels that count, of the whole batch.  logits (B, S, V), labels (B, S) -> ().

    SpecError if no label counts.
    """
    n = int(counted(labels).sum())
    require(n > 0, "no label counts: every one is -100, or stands first in its row")
    return ops.sum(token_logp(logits, labels)) * (-1.0 / n)


def cosine(steps: int, *, end: float = END / PEAK) -> Callable[[int], float]:
    """The factor of the peak rate by step: 1 at the first, `end` at the last of `steps`, half a cosine between. For `Recipe`."""
    require(steps >= 2, f"a cosine over {steps} steps has no shape")

    def factor(step: int) -> float:
        done = min(step / (steps - 1), 1.0)
        return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2

    return factor
