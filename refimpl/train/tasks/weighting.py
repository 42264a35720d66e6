"""How the losses of tasks become one: by fixed weights, by learned uncertainties, by how fast each falls.

GradNorm (Chen et al. 2018, arXiv 1711.02257) is not here: it needs the gradient of every task's loss by itself, so a backward pass
for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.autograd import ops
from refimpl.autograd.errors import require

FACTOR = {"cross-entropy": 1.0, "regression": 0.5}
"""Of e^-s: a Gaussian's log density has (y - f)^2 / (2 sigma^2), a softmax of temperature sigma^2 about L / sigma^2 (eqs 5, 10)."""


def uncertain(loss: str, log_variance: Any) -> Any:
    """The weight of a task's loss under uncertainty s = log sigma^2: e^-s for cross-entropy, e^-s / 2 for regression.  () -> ().

    Kendall, Gal, Cipolla 2018 (arXiv 1705.07115), eq 10 with the s that its section 3.2 regresses.
    """
    return ops.exp(-log_variance) * FACTOR[loss]


def price(log_variances: Sequence[Any]) -> Any:
    """What uncertainty costs, so that not all of it is uncertain: sum of log sigma = s / 2.  s () each -> ()."""
    total = log_variances[0] * 0.5
    for s in log_variances[1:]:
        total = total + s * 0.5
    return total


@dataclass(frozen=True)
class History:
    """Mean losses of the last two whole windows, the older one first, by task; sums over the `steps` of the one that runs."""

    windows: tuple[tuple[float, ...], ...] = ()
    sums: tuple[float, ...] = ()
    steps: int = 0

    def added(self, losses: Sequence[float], window: int) -> History:
        """With one more step's losses; `window` steps make a window."""
        sums = tuple([a + b for a, b in zip(self.sums or (0.0,) * len(losses), losses, strict=True)])
        if self.steps + 1 < window:
            return History(self.windows, sums, self.steps + 1)
        return History((*self.windows, tuple([x / window for x in sums]))[-2:])

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` of it gives an equal history."""
        return {"windows": [list(w) for w in self.windows], "sums": list(self.sums), "steps": self.steps}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> History:
        """What `to_dict` gave."""
        return cls(tuple([tuple(w) for w in d["windows"]]), tuple(d["sums"]), d["steps"])


def by_ratio(history: History, tasks: int, *, temperature: float) -> list[float]:
    """n softmax_t(r_t / temperature), r_t = the task's mean loss of the last window / of the one before; 1 in the first two.

    Dynamic weight average: Liu, Johns, Davison 2019 (arXiv 1803.10704), eq 7; a task whose loss was 0 has r = 1.
    """
    if len(history.windows) < 2:
        return [1.0] * tasks
    before, last = history.windows
    require(len(last) == tasks, f"a history of {len(last)} tasks; there are {tasks}")
    ratios = [b / a / temperature if a > 0 else 1 / temperature for a, b in zip(before, last, strict=True)]
    e = [math.exp(r - max(ratios)) for r in ratios]
    return [tasks * x / sum(e) for x in e]
