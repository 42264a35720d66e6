"""The tasks of a phase as data: what tells them apart, what each loses, how the losses are weighed. Described in articles, not in
V3, whose fine-tuning (R 5.1) has one task: answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal

LOSSES = ("cross-entropy", "regression")
WEIGHTINGS = ("fixed", "uncertainty", "loss-ratio")


@dataclass(frozen=True)
class Task:
    """`prefix` stands before every prompt (Raffel et al. 2019, arXiv 1910.10683); `loss`: cross-entropy of an answer's tokens, or
    the squared error of a number; `share` of a batch's rows, against the other tasks'; `weight` of its loss, where weights are
    fixed; `masked`: its samples in one row do not see each other.
    """

    name: str
    prefix: str = ""
    loss: Literal["cross-entropy", "regression"] = "cross-entropy"
    share: float = 1.0
    weight: float = 1.0
    masked: bool = True


@dataclass(frozen=True)
class Weighting:
    """By what the tasks' losses are weighed: "fixed"; "uncertainty" (Kendall, Gal, Cipolla 2018); "loss-ratio" (Liu, Johns, Davison
    2019), with its `temperature`, and the steps of a `window` whose mean losses are compared, which the paper calls an epoch.
    """

    by: Literal["fixed", "uncertainty", "loss-ratio"] = "fixed"
    temperature: float = 2.0
    window: int = 1


def divided(batch: int, shares: Sequence[float]) -> list[int]:
    """`batch` rows among tasks by their shares: whole numbers nearest to the exact ones that add up to it (largest remainders; of
    equal ones the first gets the row).
    """
    exact = [batch * share / sum(shares) for share in shares]
    counts = [floor(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: batch - sum(counts)]:
        counts[i] += 1
    return counts
