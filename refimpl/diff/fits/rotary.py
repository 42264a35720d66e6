"""What rotary tables say of how they were made: another theta, other settings of YaRN, positions that are off or stretched.

A table, or what q's and k's channels were turned by, is an angle f p of every frequency f and position p. From one token to the
next it grows by f, which no choice of the first position changes; by how much all angles are off tells the positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.rope import RopeScaling, inv_freq
from refimpl.layers.stage import STAGES, Call

from ..corpus import Mutant
from ..hypothesis import readings
from .evidence import Evidence, guess
from .sums import least, solved
from .words import listed, rounded

_TABLES = "mla.rope_tables"
_TURNED = ("mla.q_rope", "mla.k_rope")
FURTHEST = 4096
"""Positions by which others may be off."""
TOKENS = 256
"""Tokens of which each is asked for its own position, which is less than twice as many."""
_ROUND = [float(1 << k) for k in range(21)]
"""What people write: powers of two."""
STEPS = 400
"""Values between a 1000th and 1000 times the right one that are tried, before the best is made better."""


def turns_of(ev: Evidence) -> tuple[Array, Array] | None:
    """By what the candidate turned, and what is right: exp(i f p), (B, S, Dr/2) each; None where the tap does not tell."""
    if not ev.whole or ev.call.stage not in (_TABLES, *_TURNED):
        return None
    if ev.call.stage == _TABLES:
        return _unit(ev.x[0] + 1j * ev.x[1]), _unit(ev.e[0] + 1j * ev.e[1])
    table, pairs = ev.args[1], ev.call.static["interleaved"]
    before = _complex(ev.args[0][..., -2 * table.shape[-1] :], pairs)
    turn = _complex(ev.x, pairs) * before.conj()
    return _unit(turn.sum(axis=2) if turn.ndim == 4 else turn), _unit(table[0] + 1j * table[1])


def _unit(z: Array) -> Array:
    return z / np.maximum(np.abs(z), np.finfo(float).tiny)


def _complex(x: Array, pairs: bool) -> Array:
    half = x.shape[-1] // 2
    return x[..., 0::2] + 1j * x[..., 1::2] if pairs else x[..., :half] + 1j * x[..., half:]


def positions(ev: Evidence) -> Iterator[Mutant]:
    """Positions that are off by a number, in the tables or where q or k is turned; none, or the last stale."""
    if _TABLES in [c.stage for c in ev.region[:-1]] and ev.call.stage not in _TURNED:
        yield guess("all positions are 0", _TABLES, _at_positions(lambda p: p * 0))
        yield guess("the last token has the position of the one before", _TABLES, _at_positions(_stale))
    found, call = turns_of(ev), _tables_of(ev)
    if found is None or call is None:
        return
    freq = inv_freq(call.static["dim"], call.static["theta"], call.static["yarn"])
    by = _offset(found[0] * found[1].conj(), freq)
    in_tables = _TABLES in [c.stage for c in ev.region]
    if by:
        side = f"{abs(by)} too {'large' if by > 0 else 'small'}"
        if in_tables:
            yield guess(f"positions are {side}", _TABLES, _at_positions(lambda p: p + by))
        name = ev.call.stage
        if name in _TURNED:
            yield guess(f"{name[4]} is rotated by positions that are {side}", name, _turned(name, by * freq))


def _stale(p: Array) -> Array:
    return np.minimum(p, p.max(axis=-1, keepdims=True) - 1)


def single(ev: Evidence) -> Iterator[Mutant]:
    """Positions of tokens one by one: those by which each turn (B, S, F) is explained, if all are."""
    found, call = turns_of(ev), _tables_of(ev)
    if found is None or call is None or call not in ev.region:
        return
    turn, right = found[0], np.asarray(ev.recorded.inputs[str(call.args[0])])
    if turn.shape[1] > TOKENS or right.shape != turn.shape[:2]:
        return
    freq = inv_freq(call.static["dim"], call.static["theta"], call.static["yarn"])
    at = np.arange(2 * TOKENS)
    fit = (np.exp(-1j * at[:, None] * freq) @ turn.swapaxes(1, 2)).real  # (B, places, S)
    own = fit.argmax(axis=1)
    if (fit.max(axis=1) < 0.99 * len(freq)).any() or (own == right).all():
        return
    said = "all positions are 0"
    if own.any():
        odd = np.flatnonzero((own != right).any(axis=0))
        are = "s of tokens" if len(odd) > 1 else " of token"
        said = f"position{are} {listed(odd)}: {listed(own[0, odd])} instead of {listed(right[0, odd])}"
    yield guess(said, _TABLES, _at_positions(lambda p: own[: p.shape[0], : p.shape[1]] + 0.0 * p))


def pairs(ev: Evidence) -> Iterator[Mutant]:
    """Pairs (a, b) rotated by another formula: each of both is a sum of a cos, a sin, b cos, b sin."""
    name = ev.call.stage
    if not ev.whole or name not in _TURNED:
        return
    table, way = ev.args[1], ev.call.static["interleaved"]
    a, b = _halved(ev.args[0][..., -2 * table.shape[-1] :], way)
    cos, sin = table if a.ndim == 3 else table[:, :, :, None]
    terms = [a * cos, a * sin, b * cos, b * sin]
    for x in readings(ev.finding, ev.x):
        c = np.array([solved(terms, half) for half in _halved(x, way)])
        whole = np.round(c)
        if np.abs(c - whole).max() < 0.05 and not (whole == _RIGHT).all():
            said = ", ".join([_in_words(row) for row in whole])
            yield guess(f"pairs (a, b) are rotated to ({said})", name, _rotated(name, whole))


_RIGHT = np.array([[1, 0, 0, -1], [0, 1, 1, 0]])


def _halved(x: Array, way: bool) -> tuple[Array, Array]:
    z = _complex(x, way)
    return z.real, z.imag


def _in_words(c: Array) -> str:
    terms = zip(c, ("a cos", "a sin", "b cos", "b sin"), strict=True)
    said = "".join([f" {'-' if k < 0 else '+'} {'' if abs(k) == 1 else f'{abs(k):g} '}{t}" for k, t in terms if k])
    return said.removeprefix(" + ").strip() or "0"


def _rotated(name: str, c: Array) -> Callable[..., Any]:
    def fn(x: Array, table: Array, *, interleaved: bool) -> Array:
        a, b = _halved(x[..., -2 * table.shape[-1] :], interleaved)
        cos, sin = table if a.ndim == 3 else table[:, :, :, None]
        both = np.tensordot(c, np.stack([a * cos, a * sin, b * cos, b * sin]), 1)
        return (
            np.stack(list(both), axis=-1).reshape(x[..., -2 * table.shape[-1] :].shape)
            if interleaved
            else np.concatenate(list(both), -1)
        )

    return fn


def _offset(turn: Array, freq: Array) -> int:
    """The whole number of positions by which these turns (B, S, F) are explained best, 0 if by none."""
    mean = turn.mean(axis=(0, 1))
    at = np.arange(-FURTHEST, FURTHEST + 1)
    fit = (np.exp(-1j * at[:, None] * freq) * mean).real.sum(axis=-1)
    best = int(fit.argmax())
    return int(at[best]) if fit[best] > 0.99 * len(freq) else 0


def _at_positions(change: Callable[[Array], Array]) -> Callable[..., Any]:
    return lambda p, **static: STAGES[_TABLES].fn(change(p), **static)


def _turned(name: str, angle: Array) -> Callable[..., Any]:
    def fn(x: Array, table: Array, *, interleaved: bool) -> Array:
        on = (table[0] + 1j * table[1]) * np.exp(1j * angle)
        out: Array = STAGES[name].fn(x, np.stack([on.real, on.imag]), interleaved=interleaved)
        return out

    return fn


def frequencies(ev: Evidence) -> Iterator[Mutant]:
    """Another theta or YaRN setting, the tables being computed from here on."""
    found, call = turns_of(ev), _tables_of(ev)
    if found is None or call is None or call not in ev.region or found[0].shape[1] < 2:
        return
    step, places = _per_token(found[0]), _per_token(found[1])
    static = call.static
    right = inv_freq(static["dim"], static["theta"], static["yarn"])
    if not np.allclose(places, right, rtol=1e-2, atol=1e-6):
        return  # positions that do not follow each other: an angle does not tell how often it went round
    stretch = float(step @ right / (right @ right))
    for v in rounded(stretch) if np.linalg.norm(step - stretch * right) < 1e-2 * np.linalg.norm(step) else ():
        if v != 1:
            yield guess(f"positions are multiplied by {v:g}", _TABLES, _at_positions(partial(np.multiply, v)))
    guesses = list[tuple[int, str, Callable[..., Any]]]()
    for key, meant, freq_of, made in _choices(call):
        unsure = "" if key in ("theta", "factor") else ", or another that gives the same frequencies"
        values = list(enumerate(rounded(_best(step, freq_of, meant)))) + ([(-1, v) for v in _ROUND] if unsure else [])
        guesses += [(i, f"RoPE's {key} is {v:.9g}{unsure}", made(v)) for i, v in values if v != meant]
    for _, said, fn in sorted(guesses, key=lambda one: one[0]):  # numbers that people write down first
        yield guess(said, _TABLES, fn)


def _tables_of(ev: Evidence) -> Call | None:
    """The call that makes the tables that this tap is, or is turned by."""
    if ev.call.stage == _TABLES:
        return ev.call
    return ev.calls.get(str(ev.call.args[1])) if ev.call.stage in _TURNED else None


def _per_token(turn: Array) -> Array:
    """What a turn (B, S, F) grows by from one token to the next, on average.  -> (F,)."""
    growth = np.angle(turn[:, 1:] * turn[:, :-1].conj())
    return np.asarray(growth.mean(axis=(0, 1)))


Choice = tuple[str, float, Callable[[float], Array], Callable[[float], Callable[..., Any]]]
"""A setting, its value, the frequencies of another one, and the stage with it."""


def _choices(call: Call) -> Iterator[Choice]:
    dim, theta, yarn = call.static["dim"], call.static["theta"], call.static["yarn"]
    fn = STAGES[_TABLES].fn
    yield (
        "theta",
        theta,
        lambda v: inv_freq.__wrapped__(dim, v, yarn),
        lambda v: lambda p, **static: fn(p, **static | {"theta": v}),
    )
    for name in [f.name for f in fields(RopeScaling) if not f.name.startswith("mscale")] if yarn else ():
        yield _of_yarn(name, yarn, dim, theta)


def _of_yarn(name: str, yarn: RopeScaling, dim: int, theta: float) -> Choice:
    def other(v: float) -> RopeScaling:
        changed: dict[str, Any] = {name: v}
        return replace(yarn, **changed)

    return (
        name,
        float(getattr(yarn, name)),
        lambda v: inv_freq.__wrapped__(dim, theta, other(v)),
        lambda v: lambda p, **static: STAGES[_TABLES].fn(p, **static | {"yarn": other(v)}),
    )


def _best(step: Array, freq_of: Callable[[float], Array], meant: float) -> float:
    """The value whose frequencies are nearest: of a grid, then between its neighbours."""

    def far(exponent: float) -> float:
        return float(np.linalg.norm(freq_of(meant * 10.0**exponent) - step))

    grid = np.linspace(-3, 3, STEPS + 1)
    best = min(grid, key=far)
    return float(meant * 10.0 ** least(far, best - 6 / STEPS, best + 6 / STEPS))
