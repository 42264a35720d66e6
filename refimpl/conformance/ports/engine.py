"""What the ports have in common: a framework's own loader and forward pass, watched by its recorder where taps are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.names import SCALE
from refimpl.diff import Case, Trace
from refimpl.record.candidate import version_of

Cache = MutableMapping[str, Any]


class Engine:
    """A port: `make` builds the framework's model of a case, `run` gives its logits, `watched` the trace of its recorder.

    What a framework has no words for raises NotImplementedError, which is a typed skip.
    """

    package = ""
    layouts: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self.held: tuple[dict[str, Any], Mapping[str, Any]] | None = None
        self.model: Any = None

    def info(self) -> dict[str, Any]:
        """The distribution and its version."""
        precision = {"storage": "float32", "accumulate": "float32"}
        version = version_of(self.package)
        return {"name": self.package, "version": version, "precision": precision, "layouts": dict(self.layouts)}

    def load(self, config: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """The framework's model of these, by its own loader."""
        self.held = None
        self.model = self.make(self._case(dict(config), weights, [[0]]))
        self.held = dict(config), weights

    def forward(
        self,
        tokens: Any,
        positions: Any = None,
        cache: Cache | None = None,
        taps: Iterable[str] = (),
        *,
        valid: Any = None,
    ) -> dict[str, Any]:
        """{tap: array} with "logits", and the taps' axes under "dims"."""
        assert self.held is not None
        if cache is not None:
            if positions is not None or valid is not None:
                raise NotImplementedError("positions or padding with a cache")
            return {"logits": self.more(np.asarray(tokens), cache)}
        case = self._case(*self.held, tokens, positions, valid)
        if not list(taps):
            return {"logits": self.run(case)}
        trace = self.watched(case)
        found = {t: np.asarray(trace.taps[t]) for t in trace.taps}
        return {"logits": found["fwd/logits"], "dims": dict(trace.header.dims)} | found

    def step(self, token: Any, cache: Cache, taps: Iterable[str] = ()) -> dict[str, Any]:
        """One token a sequence behind those that the cache holds."""
        return self.forward(np.asarray(token).reshape(-1, 1), cache=cache)

    def close(self) -> None:
        """Let the model go."""
        self.model = None

    @staticmethod
    def _case(
        config: dict[str, Any], weights: Mapping[str, Any], tokens: Any, positions: Any = None, valid: Any = None
    ) -> Case:
        listed = (None if x is None else np.asarray(x).tolist() for x in (tokens, positions, valid))
        return Case(Path(), config, cast(Checkpoint, weights), *listed)  # type: ignore[arg-type]

    # ---- What a framework brings

    def make(self, case: Case) -> Any:
        """Its model, holding the case's weights."""
        raise NotImplementedError

    def run(self, case: Case) -> Array:
        """Logits (B, S, V)."""
        raise NotImplementedError

    def more(self, tokens: Array, cache: Cache) -> Array:
        """Logits (B, S, V) of tokens behind those that the cache holds."""
        raise NotImplementedError("a cache")

    def watched(self, case: Case) -> Trace:
        """What its recorder sees."""
        raise NotImplementedError("taps")


def without_codes(case: Case) -> Case:
    """The case, if its weights are numbers: the recorders hand over dequantised ones."""
    if any(n.endswith(SCALE) for n in case.checkpoint):
        raise NotImplementedError("weights in FP8 codes")
    return case
