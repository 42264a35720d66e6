"""mlx-lm's deepseek_v3 as an implementation to test, in float32 on MLX's CPU backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Trace
from refimpl.record import mlx
from refimpl.record.candidate import library, plain_only
from refimpl.record.watch import array

from .engine import Cache, Engine


class Impl(Engine):
    """Loads as mlx-lm does, through its `sanitize`."""

    package = "mlx-lm"

    def make(self, case: Case) -> Any:
        """Without MTP layers, which mlx-lm has not."""
        with mlx.on_cpu():
            return mlx.load(case)

    def run(self, case: Case) -> Array:
        """One pass."""
        return self._called(self._plain(case).tokens)

    def more(self, tokens: Array, cache: Cache) -> Array:
        """On the cache that mlx-lm makes for a prompt."""
        make = library("mlx_lm.models.cache", "mlx").make_prompt_cache
        return self._called(tokens, cache.setdefault("cache", make(self.model)))

    def watched(self, case: Case) -> Trace:
        """Its recorder's."""
        with mlx.on_cpu():
            return mlx.trace_of(self.model, self._plain(case))

    def _called(self, tokens: Any, cache: Any = None) -> Array:
        mx = library("mlx.core", "mlx")
        with mlx.on_cpu():
            return array(self.model(mx.array(np.asarray(tokens)), cache=cache))

    @staticmethod
    def _plain(case: Case) -> Case:
        if case.valid is not None:
            raise NotImplementedError("padding")
        if case.positions is not None and any(row != list(range(len(row))) for row in case.positions):
            raise NotImplementedError("positions of its own")
        plain_only(case, "mlx-lm's model")
        return case
