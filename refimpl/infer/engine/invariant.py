"""The batch-invariant mode: every product has the same shape whoever else is in the batch, so a token's bits do too.

A BLAS chooses its kernel, and with it the order of a sum, by the shape of the product. Here all stages that treat tokens alike
run on tiles of a fixed number of rows, the last one filled up with zeros; attention runs query by query (`forward`'s `singly`).
What is left to assume is that a row's sum does not depend on its place in a tile of fixed shape, which holds for the BLAS
libraries at hand and is tested; with `rows=1` there is nothing to assume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.expert_ops import expert_spans
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


@dataclass(frozen=True)
class Tiled:
    """An observer: these stages on tiles of `rows` rows. It stands outside the precision plan, which rounds in each tile."""

    rows: int = 16

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """run(*args, **static), in tiles where it sums."""
        if stage.name in ROWWISE:
            x, *rest = args
            return np.concatenate(self._tiles(x[0], lambda t: run(t[None], *rest, **static)[0]))[None]
        if stage.name in GROUPED:
            return self._grouped(run, *args)
        return run(*args, **static)

    def _tiles(self, x: Array, run: Callable[[Array], Array]) -> list[Array]:
        """run on every `rows` rows of x.  x (N, ...) -> parts of (N, ...)."""
        found = []
        for i in range(0, len(x), self.rows):
            tile = np.zeros((self.rows, *x.shape[1:]), x.dtype)
            part = x[i : i + self.rows]
            tile[: len(part)] = part
            found.append(run(tile)[: len(part)])
        return found

    def _grouped(self, run: Callable[..., Any], rows: Array, ids: Array, *ws: Any) -> Array:
        found = []
        for e, span in enumerate(expert_spans(ids, len(ws))):
            own = np.full((1, self.rows, 1), e)
            found += self._tiles(rows[span], lambda t, own=own: run(t, own, *ws))  # type: ignore[misc]
        return np.concatenate(found)
