"""router.choice: the numbers (N, E) that experts are chosen by, before groups are dropped, told by value among all a gate computes.

The last topk over all experts gives their ids. Its input M holds one value, mostly -inf, where a group was dropped, and the
choice everywhere else. So the choice is a tensor x of the gate with x = M but where M is that value. What groups are scored by
shows nothing: a wrong gate scores them by other numbers than it chooses by, or puts the experts into groups in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

from .hf_probes import Seen
from .torch_arrays import libraries, to_numpy


class Choosing:
    """Is told of every call within one gate, and then says what the experts were chosen by."""

    def __init__(self, rows: int, experts: int) -> None:
        self._shape = (rows, experts)
        self._held: list[Array] = []
        self._masked: Array | None = None  # the input of the last topk over experts

    def see(self, name: str, seen: Seen) -> None:
        """A call: values are copied, since a later one may write over them."""
        if name == "topk" and seen.args and self._fits(seen.args[0]) and seen.args[0].shape[-1] == self._shape[1]:
            self._masked = self._values(seen.args[0])
        elif self._fits(seen.out):
            self._held.append(self._values(seen.out))

    def _fits(self, x: Any) -> bool:
        torch, _ = libraries()
        tensor = isinstance(x, torch.Tensor)  # and not its dtype, say
        return tensor and x.is_floating_point() and x.numel() == self._shape[0] * self._shape[1]

    def _values(self, x: Any) -> Array:
        return to_numpy(x).reshape(self._shape)

    def found(self, dropping: bool) -> Array | None:
        """The choice (N, E), of the gate's own dtype; None if it cannot be told. `dropping`: there are groups to be dropped."""
        if self._masked is None:
            return None
        ranks = [(_rank(x, self._masked), i, x) for i, x in enumerate([self._masked, *self._held])]
        rank, _, best = max((r for r in ranks if r[0] is not None), key=lambda r: r[:2])
        return None if dropping and rank == _MASKED else best


_MASKED = (0, False)
"""The rank of what holds the mask: nothing was taken from it, and one value fills it."""


def _rank(x: Array, masked: Array) -> tuple[int, bool] | None:
    """How well x fits the choice before a mask: how much the mask took from it, and whether no mask is in it. None if the mask was
    not put over x: it leaves something of every row, and puts one value over the rest.
    """
    a, m = x.astype(np.float64), masked.astype(np.float64)
    same = (a == m) | (np.isnan(a) & np.isnan(m))
    rest = m[~same]
    if not same.any(-1).all() or (rest.size and (rest != rest[0]).any()):
        return None
    return rest.size, not _filled(a)


def _filled(x: Array) -> bool:
    """Whether one value is in every row at least twice, as where all experts of a group are dropped."""
    values, counts = np.unique(x[0], return_counts=True)
    return any(((x == v).sum(-1) >= 2).all() for v in values[counts >= 2])
