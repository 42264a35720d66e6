"""What other tools go by: cosine and divergence of the logits, SGLang's and DeepGEMM's statistic, each against our own run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.diff import Case
from refimpl.model import Impl

_ROTATED = ("mla.q_rope", "mla.k_rope")


def our_run(case: Case) -> dict[str, Array]:
    """Every tap of the specification's float32 run, arranged as transformers does: halves, not pairs."""
    impl = Impl(precision="float32", attend="expanded").load(case.config, case.weights())
    taps = dict(impl.forward(case.tokens, case.positions, taps=["*"]))
    return {t: np.concatenate((x[..., 0::2], x[..., 1::2]), -1) if t.endswith(_ROTATED) else x for t, x in taps.items()}


def changes(taps: Mapping[str, Array], clean: Mapping[str, Array]) -> dict[str, float]:
    """Tap -> |x - clean| / |clean| over the whole tap; infinite for another shape, another set of ids, a tap too few."""
    return {t: _change(_in_order(t, taps[t]), _in_order(t, clean[t])) if t in taps else np.inf for t in clean}


def _in_order(tap: str, x: Any) -> Array:
    """Routing weights by size: transformers leaves the order of a token's experts open."""
    return np.sort(x, axis=-1) if tap.endswith("router.weights") else np.asarray(x)


def _change(x: Array, e: Array) -> float:
    if x.shape != e.shape:
        return float("inf")
    if e.dtype.kind in "iu":
        return 0.0 if np.array_equal(np.sort(x, axis=-1), np.sort(e, axis=-1)) else float("inf")
    x, e = _finite(x), _finite(e)
    distance = float(np.linalg.norm(x - e)) / max(float(np.linalg.norm(e)), 1e-300)
    return distance if np.isfinite(distance) else float("inf")


def _finite(x: Array) -> Array:
    """float64, masked places 0."""
    y = x.astype(np.float64)
    return np.where(y < -9e3, 0, y)


def against_ours(taps: Mapping[str, Array], ours: Mapping[str, Array]) -> dict[str, Any]:
    """Mean and least cosine and mean divergence KL(ours, theirs) of the logits, and 1 - 2<x,y> / (|x|^2 + |y|^2) per tap."""
    found: dict[str, Any] = {"statistic": {}}
    for tap, y in ours.items():
        x = np.asarray(taps[tap]) if tap in taps else None
        if x is not None and x.shape == y.shape and y.dtype.kind == "f":
            found["statistic"][tap] = _statistic(_finite(_in_order(tap, x)), _finite(_in_order(tap, y)))
    if "fwd/logits" in taps:
        found |= _of_logits(_finite(np.asarray(taps["fwd/logits"])), _finite(ours["fwd/logits"]))
    return found


def _statistic(x: Array, y: Array) -> float:
    size = float((x * x + y * y).sum())
    return 1 - 2 * float((x * y).sum()) / size if size else 0.0


def _of_logits(x: Array, y: Array) -> dict[str, float]:
    cosine = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
    p, q = (z - z.max(-1, keepdims=True) for z in (y, x))
    p, q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (p, q))
    divergence = (np.exp(p) * (p - q)).sum(-1)
    return {"cosine": float(cosine.mean()), "least_cosine": float(cosine.min()), "kl": float(divergence.mean())}
