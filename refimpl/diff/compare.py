"""One recorded tap against its replay: the finding, and in words where and how it is off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES, Call

from . import tolerance


@dataclass(frozen=True)
class Finding:
    """One tap: its error against float64, the worst twin's, what was allowed, where it is worst; `chained` is the
    distance to our own run, drift and all.
    """

    tap: str
    stage: str
    ok: bool
    error: float
    twin: float = 0.0
    allowed: float = 0.0
    note: str = ""
    chained: float = float("nan")


def unusable(x: Array, ours: Array, limit: int | None) -> str:
    """What keeps a recorded tap from being an input of a replay, or "": another shape, another kind of numbers, ids that name
    nothing (`limit` of them exist).
    """
    if x.shape != ours.shape:
        return f"shape {x.shape}, expected {ours.shape}"
    integers = ours.dtype.kind in "iu"
    if integers != (x.dtype.kind in "iu") or x.dtype.kind == "b":
        return f"dtype {x.dtype}, expected {'integers' if integers else 'floating-point numbers'}"
    if limit is not None and x.size and (int(x.min()) < 0 or int(x.max()) >= limit):
        return f"ids from {int(x.min())} to {int(x.max())}, expected 0 to {limit - 1}"
    return ""


def compare(call: Call, x: Array, exact: Array, twins: list[Array], chained: Array) -> Finding:
    """x is the candidate's tap, `exact` its stage in float64 on the same inputs, `twins` the same at its precision."""
    kind = STAGES[call.stage].compare
    if kind == "set":
        return _sets(call, x, exact, chained)
    if kind == "exact":
        wrong = int((x != exact).sum())
        note = f"{wrong} of {x.size} elements differ" if wrong else ""
        return Finding(call.tap, call.stage, not wrong, float(wrong), note=note, chained=float((x != chained).sum()))
    y = x.astype(np.float64)
    family = max(tolerance.worst(t, exact) for t in twins)
    limit = tolerance.allowed(call.stage, x.dtype.name, family)
    error, drift = tolerance.worst(y, exact), tolerance.worst(y, chained)
    note = "" if error <= limit else _describe(y, exact, limit)
    return Finding(call.tap, call.stage, error <= limit, error, family, limit, note, drift)


def _sets(call: Call, x: Array, exact: Array, chained: Array) -> Finding:
    """Unordered along the last axis; the error is the share of tokens that chose others."""
    x, exact, chained = (np.sort(a, axis=-1) for a in (x, exact, chained))
    wrong = (x != exact).any(axis=-1)
    n, note = int(wrong.sum()), ""
    if n:
        first = tuple(np.argwhere(wrong)[0].tolist())
        note = f"{n} of {wrong.size} tokens choose others, the first at {list(first)}: {x[first].tolist()}"
        note += f", expected {exact[first].tolist()}"
    flips = float((x != chained).any(axis=-1).mean())
    return Finding(call.tap, call.stage, not n, n / max(wrong.size, 1), note=note, chained=flips)


def _describe(x: Array, e: Array, limit: float) -> str:
    """Where it is worst, how much of it is off, and whether a plain factor explains it."""
    holes = int((~np.isfinite(x) & np.isfinite(e)).sum())
    if holes:
        return f"{holes} elements are NaN or infinite"
    error = tolerance.row_errors(x, e)
    at = [int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape)]
    finite = np.isfinite(e) & np.isfinite(x)
    a, b = x[finite], e[finite]
    ratio = float(a @ b) / max(float(b @ b), 1e-300)
    residual = float(np.linalg.norm(a - ratio * b)) / max(float(np.linalg.norm(b)), 1e-300)
    fit = f"; the candidate is {ratio:.4f} x ours" if abs(ratio - 1) > 1e-3 and residual < 1e-3 else ""
    return f"worst row {at}, {int((error > limit).sum())} of {error.size} rows affected{fit}"
