"""A vector added, the same for all tokens: a selection bias that counts twice, or in another order; a bias where none belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from .evidence import Evidence, guess, near
from .moved import origin
from .words import order_in_words, rounded


def bias(ev: Evidence) -> Iterator[Mutant]:
    """What is chosen by is s + c b, or s plus the biases of other experts; or an output has a vector too much."""
    if not ev.whole or ev.letters[:2] != ["B", "S"] or ev.letters[2:] == ["K"]:
        if any(c.stage == "router.choice" for c in ev.region):
            yield guess("the selection bias counts 2 times", "router.choice", lambda s, b: s + 2 * b)
        return
    extra = (ev.x - ev.e).mean(axis=(0, 1))
    if not near(ev.x, ev.e + extra, ev.limit) or not ev.explained(ev.e + extra):
        return
    name = ev.call.stage
    if name == "router.choice":
        b = np.asarray(ev.args[1], np.float64)
        yield from _of_bias(b, extra)
    if near(extra, extra.mean() + 0 * extra, 0.1):
        for v in rounded(float(extra.mean())):
            yield guess(f"{ev.call.of.tap} has {v:g} added to every number", name, _plus(name, v + 0 * extra))
    least = 1e-6 * np.abs(extra).max()
    words = ", ".join([f"{v:.3g}" for v in np.where(np.abs(extra) > least, extra, 0).flat[:4]])
    title = f"{ev.call.of.tap} has a vector too much, the same for every token: {words} ..."
    yield guess(title, name, _plus(name, extra))


def _of_bias(b: Array, extra: Array) -> Iterator[Mutant]:
    k = 1 + float(extra @ b) / max(float(b @ b), np.finfo(float).tiny)
    if near(b + extra, k * b, 1e-2):
        for v in [round(k, digits) for digits in (0, 1, 2, 4)]:
            yield guess(f"the selection bias counts {v:g} times", "router.choice", lambda s, b, v=v: s + v * b)
    order = origin((b + extra)[:, None], b[:, None], 0, 1e-3)
    if order is not None:
        said = f"selection biases: {order_in_words(order, 'experts')}"
        yield guess(said, "router.choice", lambda s, b: s + b[order])


def _plus(name: str, extra: Array) -> Callable[..., Any]:
    return lambda *args, **static: STAGES[name].fn(*args, **static) + extra
