"""The batch-invariant mode: every product has the same shape whoever else is in the batch, so a token's bits do too.

A BLAS chooses its kernel, and with it the order of a sum, by the shape of the product. Here all stages that treat tokens alike
run on tiles of a fixed number of rows, the last one filled up with zeros; attention runs query by query (`forward`'s `singly`).
What is left to assume is that a row's sum does not depend on its place in a tile of fixed shape. It is tried before it is believed:
OpenBLAS 0.3.31's kernel for Haswell keeps it with tiles of 8 rows, not with 16 and an odd number of columns; with one row there is
nothing to assume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.expert_ops import expert_spans
from refimpl.autograd.nn_ops import product
from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Stage

ROWWISE = frozenset(
    [
        *("attn_norm", "ffn_norm", "final_norm"),
        *("mla.q_a", "mla.q_a_norm", "mla.kv_a", "mla.c_kv", "mla.q", "mla.q_absorbed", "mla.ctx_absorbed", "attn_out"),
        *("mlp.gate", "mlp.up", "mlp.down", "shared.gate", "shared.up", "moe.shared"),
        *("router.logits", "router.scores", "logits"),
    ]
)
"""Stages whose first argument is (1, N, ...) and whose output's row n depends on its row n alone, but which sum."""
GROUPED = frozenset(["moe.gate", "moe.up", "moe.down"])
"""The same for rows (M, D) sorted by expert."""


def steady(rows: int, width: int, out: int, dtype: Any) -> bool:
    """Whether a row times a matrix (out, width) has the same bits in every place of a tile, whatever stands beside it."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((out, width)).astype(dtype), rng.standard_normal(width).astype(dtype)
    found = set()
    for place in range(rows):
        tile = rng.standard_normal((rows, width)).astype(dtype)
        tile[place] = x
        found.add(product(tile, w)[place].tobytes())
    return len(found) == 1


@cache
def steady_rows() -> int:
    """The most rows, 8 or fewer, with which this machine's products do not look at a row's place; 1 if with no others."""
    shapes = [(width, out) for width in (24, 129) for out in (1, 72, 257)]
    for rows in (8, 4, 2):
        if all(steady(rows, *shape, dtype) for shape in shapes for dtype in (np.float32, np.float64)):
            return rows
    return 1


@dataclass(frozen=True)
class Tiled:
    """An observer: these stages on tiles of `rows` rows, by default as many as are safe here. It stands outside the precision plan,
    which rounds in each tile.
    """

    rows: int = field(default_factory=steady_rows)

    def __post_init__(self) -> None:
        require(isinstance(self.rows, int) and self.rows >= 1, f"rows is {self.rows!r}; expected a whole number from 1")

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """run(*args, **static), in tiles where it sums."""
        if stage.name in ROWWISE:
            x, *rest = args
            return np.concatenate(self._tiles(x[0], lambda t: run(t[None], *rest, **static)[0]))[None]
        if stage.name in GROUPED:
            return self._grouped(run, *args)
        return run(*args, **static)

    def _tiles(self, x: Array, run: Callable[[Array], Array]) -> list[Array]:
        """run on every `rows` rows of x, at least once.  x (N, ...) -> parts of (N, ...)."""
        found = []
        for i in range(0, max(len(x), 1), self.rows):
            tile = np.zeros((self.rows, *x.shape[1:]), x.dtype)
            part = x[i : i + self.rows]
            tile[: len(part)] = part
            found.append(run(tile)[: len(part)])
        return found

    def _grouped(self, run: Callable[..., Any], rows: Array, ids: Array, *ws: Any) -> Array:
        found = []
        spans = dict(enumerate(expert_spans(ids, len(ws))))
        for e, span in {e: s for e, s in spans.items() if s.stop > s.start or not (len(rows) or e)}.items():
            own = np.full((1, self.rows, 1), e)
            found += self._tiles(rows[span], lambda t, own=own: run(t, own, *ws))  # type: ignore[misc]
        return np.concatenate(found)
