"""Numbers that parts of an output are multiplied by: a branch at 0.22, a factor forgotten, a slot that does not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from ..program import owner
from .evidence import Evidence, guess, near, short
from .words import DIGITS, likely

_SUMS = ("resid", "resid_mid", "moe.out")
SCORES = ("mla.scores", "mla.scores_absorbed")
PARTS = ("q k of nope channels", "q k of rotated ones")
"""What scores are the sum of."""
Weighing = Callable[[list[Any], Array], list[Any]]
"""The arguments of a stage that is a sum, with its parts multiplied by numbers."""


@dataclass(frozen=True)
class Parts:
    """The names of what a stage adds up, and how to weigh them."""

    names: list[str]
    weigh: Weighing


def parts_of(ev: Evidence) -> Parts | None:
    """What the stage adds up, None if it is no sum."""
    args, name = ev.args, ev.call.stage
    if name in _SUMS and all(isinstance(a, np.ndarray) for a in args):
        return Parts([short(n) for n in ev.call.args], lambda args, c: [a * k for a, k in zip(args, c, strict=True)])
    if name in SCORES:
        return Parts(["q k of latents" if "absorbed" in name else PARTS[0], PARTS[1]], _scores)
    if name == "moe.routed" and args[2] is not None:
        return Parts([f"slot {k}" for k in range(args[2].shape[-1])], lambda a, c: [a[0], a[1], a[2] * c])
    return None


def _scores(args: list[Any], c: Array) -> list[Any]:
    return [args[0] * c[0], args[1] * c[1], *args[2:]]


def factor(ev: Evidence) -> Iterator[Mutant]:
    """The output times a number."""
    if not ev.whole or ev.call.of.compare in ("exact", "set"):
        return
    (k,) = solved([ev.e], ev.x)
    if abs(k - 1) < 1e-9 or not near(ev.x, k * ev.e, ev.limit) or not ev.explained(k * ev.e):
        return
    name = ev.call.stage
    for value, said in likely(k, ev.config):
        if name in SCORES:
            yield guess(f"the softmax scale is {said} times what it should be", name, scaled(name, value))
        else:
            yield guess(f"{ev.call.of.tap} is {said} times what it should be", name, _times(name, value))


def scaled(name: str, by: float) -> Callable[..., Any]:
    """A stage of scores with so many times its scale."""
    return lambda *args, scale, **static: STAGES[name].fn(*args, scale=scale * by, **static)


def _times(name: str, by: float) -> Callable[..., Any]:
    return lambda *args, **static: STAGES[name].fn(*args, **static) * by


def weighed(ev: Evidence) -> Iterator[Mutant]:
    """The parts of a sum, each times a number."""
    parts, name = (parts_of(ev) if ev.whole else None), ev.call.stage
    if parts is None or len(parts.names) < 2:
        return
    n = len(parts.names)
    with np.errstate(all="ignore"):
        each = [STAGES[name].fn(*parts.weigh(ev.args, one), **ev.call.static) for one in np.eye(n)]
        numbers = solved(each, ev.x)
        if not ev.explained(sum((k * part for k, part in zip(numbers, each, strict=True)), np.zeros(()))):
            return
    for c in _few_digits(numbers):
        odd = [ev.calls[t] for t, k in zip(ev.call.args, c, strict=False) if k != 1 and t in ev.finding.region]
        if name in _SUMS and len(odd) == 1 and (c != 1).sum() == 1:  # a part that was not recorded
            (k,) = c[c != 1]
            yield guess(f"{odd[0].of.tap} is {k:g} times what it should be", odd[0].stage, _times(odd[0].stage, k))
        if len(set(c.tolist())) > 1:
            yield guess(f"{ev.call.of.tap} {_sum_in_words(parts.names, c)}", name, _weighed(name, parts.weigh, c))


def _weighed(name: str, weigh: Weighing, c: Array) -> Callable[..., Any]:
    return lambda *args, **static: STAGES[name].fn(*weigh(list(args), c), **static)


def with_others(ev: Evidence) -> Iterator[Mutant]:
    """A sum of two with another tap of the same layer, or of the stream before it, in the place of one or beside both."""
    if ev.call.stage not in _SUMS or not ev.whole or not all(isinstance(a, np.ndarray) for a in ev.args):
        return
    own = [short(n) for n in ev.call.args]
    one = f"{ev.call.of.tap} is"
    for called, z in others(ev):
        c = solved([*ev.args, z], ev.x)
        y = sum((k * a for k, a in zip(c, [*ev.args, z], strict=True)), np.zeros(()))
        if np.abs(c[-1]) > 1e-3 and near(ev.x, y, ev.limit) and ev.explained(y):
            for k in _few_digits(c):
                yield guess(f"{one} {_terms([*own, called], k)}", ev.call.stage, _with(z, k))


def _with(z: Array, c: Array) -> Callable[..., Any]:
    return lambda x, y: c[0] * x + c[1] * y + c[2] * z


def others(ev: Evidence) -> Iterator[tuple[str, Array]]:
    """Recorded taps of the shape of the output, of the same layer or the stream before it, that are no arguments of the call."""
    unit, tap = owner(ev.call.tap), ev.call.tap
    before = stream_before(ev, unit)
    mine = [t for t in ev.recorded.taps if owner(t) == unit and t != tap and t not in ev.call.args]
    for t in [*([before] if before and before not in ev.call.args else []), *mine]:
        z = ev.held(t)
        if z is not None and z.shape == ev.e.shape:
            yield ("the stream before attention" if t == before else short(t)), z


def stream_before(ev: Evidence, unit: str) -> str:
    """The tap that a layer reads, "" if there is none."""
    norm = ev.calls.get(f"{unit}/attn_norm")
    return str(norm.args[0]) if norm is not None else ""


def solved(parts: list[Array], x: Array) -> Array:
    """Least squares: the numbers c with sum c_i part_i = x, rows alike."""
    finite = np.isfinite(x) & np.all([np.isfinite(p) for p in parts], axis=0)
    a = np.stack([p[finite] for p in parts], axis=-1)
    gram = a.T @ a
    scale = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
    found: Array = np.linalg.lstsq(gram / scale / scale[:, None], (a.T @ x[finite]) / scale, rcond=1e-12)[0] / scale
    return found


def _few_digits(c: Array) -> Iterator[Array]:
    """The numbers with few digits, then with more; what is nearly none is none."""
    c = np.where(np.abs(c) < 1e-3, 0, c)
    c = np.where(np.abs(c - 1) < 1e-3, 1, c)
    seen = set[tuple[float, ...]]()
    for digits in DIGITS:
        value = tuple([float(f"{v:.{digits - 1}e}") for v in c])
        if value not in seen:
            seen.add(value)
            yield np.array(value)


def _sum_in_words(names: list[str], c: Array) -> str:
    """`is resid_mid + 0.5 x ffn_out`; of slots, those only that do not count once."""
    if not names[0].startswith("slot"):
        return f"is {_terms(names, c)}"
    odd = [(name, k) for name, k in zip(names, c, strict=True) if k != 1]
    said = [f"{name} of {len(names)} {'does not count' if k == 0 else f'counts {k:g} times'}" for name, k in odd]
    return f"adds up otherwise: {', '.join(said)}"


def _terms(names: list[str], c: Array) -> str:
    """`a + 0.5 x b - c`."""
    terms = [(name if abs(k) == 1 else f"{abs(k):g} x {name}", k < 0) for name, k in zip(names, c, strict=True) if k]
    signs = [" - " if negative else " + " for _, negative in terms]
    return (
        "".join([sign + term for sign, (term, _) in zip(signs, terms, strict=True)]).removeprefix(" + ").strip() or "0"
    )


def least(far: Callable[[float], float], low: float, high: float, turns: int = 60) -> float:
    """Where between two numbers a function that has one minimum is smallest: the golden section."""
    part = (math.sqrt(5) - 1) / 2
    a, b = high - part * (high - low), low + part * (high - low)
    at_a, at_b = far(a), far(b)
    for _ in range(turns):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - part * (high - low)
            at_a = far(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + part * (high - low)
            at_b = far(b)
    return (low + high) / 2
