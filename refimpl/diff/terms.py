"""One number of a stage, taken apart: which inputs entered, how much of the number each of them is.

The stage is run on the tape, and the derivative of the one number says how it leans on every input: term = input x slope. Where
the stage is homogeneous of degree one in some of its arguments together (a matrix product in x, attention scores in q, q_rope and
mask, a sum in all of them) Euler's theorem makes the terms sum to the number, exactly: `exact` holds those arguments, and the
property is checked on the inputs at hand, never assumed. In any other argument (a softmax's scores, a norm's input) terms are first
order: by how much the number moves, relatively, with a relative change of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, Tensor, backward, data_of
from refimpl.layers import adamw

from .part import Index, Part
from .tangents import along, is_gradient, slopes_of_gradient

DIFFERENCES = 1e-8
"""Share of a gradient's number to which its slopes are known: they are differences of a loss of some nats over steps of 2**-7,
so float64 leaves 1e-16 x 5 / 2**-7 = 6e-14 of numbers of about 1e-5.
"""
PROBES = 20_000
"""So many inputs are tried one by one where a stage has no gradient."""


@dataclass(frozen=True)
class Term:
    """An input (`name`, `index` in the whole array), its value, the number's derivative by it, their product; `partner`, the input
    of another argument that is the other factor, and what is left of the slope then.
    """

    name: str
    index: Index
    value: float
    slope: float
    product: float
    partner: tuple[str, Index, float] | None = None


@dataclass(frozen=True)
class Terms:
    """A number y; the names whose terms sum to it; all terms by name, largest first (`exact` ones, and names in `first_order`)."""

    y: float
    exact: tuple[str, ...]
    first_order: tuple[str, ...]
    by_name: dict[str, list[Term]]

    @property
    def largest(self) -> list[Term]:
        """The terms that sum to y, largest first."""
        return sorted([t for n in self.exact for t in self.by_name[n]], key=lambda t: -abs(t.product))


FEW = 8
"""Arguments of which groups are tried; where a region has more, each by itself."""


def terms_of(part: Part) -> Terms:
    """The terms of the part's one number. SpecError where there are too many inputs to try."""
    y = float(np.asarray(part.result())[part.at])
    slopes = {n: g for n, g in slopes_of(part).items() if g.any()}
    with np.errstate(invalid="ignore"):
        products = {n: np.where(g == 0, 0.0, part.leaves[n] * g) for n, g in slopes.items()}
    groups = list(_exact(part, y, products)) if np.isfinite(y) else []
    most = max(groups, key=lambda g: _enlightening(g, products), default=())
    for n in slopes:  # what adds nothing here (a mask of 0) belongs to the sum all the same
        if most and not any(n in g for g in groups) and _homogeneous(part, y, (*most, n), products):
            most = (*most, n)
    partners = {n for g in groups for n in g} - set(most)
    terms = {n: _terms(part, n, slopes[n], products[n]) for n in slopes}
    for n in most:
        terms[n] = [_partnered(part, t, {m: products[m] for m in sorted(partners)}) for t in terms[n]]
    rest = tuple([n for n in slopes if n not in partners and n not in most])
    return Terms(y, most, rest, terms)


def slopes_of(part: Part) -> dict[str, Array]:
    """The derivative of the part's one number by every floating-point leaf: by the tape, or by trying where a stage leaves it."""
    last = part.calls[-1]
    if is_gradient(last):
        return dict(slopes_of_gradient(part.calls, part.values(), part.shape, part.at))
    if last.stage == adamw.grad_norm.name:  # |g|, of which the slope is g / |g|
        return {n: a / part.result() for n, a in part.leaves.items()}
    if last.own is not None:
        return {n: _one_by_one(part, n) for n in part.leaves}
    leaves = {n: Tensor(a) if a.dtype.kind == "f" else a for n, a in part.leaves.items()}
    with np.errstate(all="ignore"):
        y = part.result(leaves)
        if not isinstance(y, Tensor):
            return {n: _differences(part, n) for n, a in part.leaves.items() if a.dtype.kind == "f"}
        dy = np.zeros(y.shape)
        dy[part.at] = 1
        found = backward(y, dy)
    return {n: np.asarray(found.get(x, np.zeros(x.shape))) for n, x in leaves.items() if isinstance(x, Tensor)}


def _differences(part: Part, name: str) -> Array:
    """Central differences, exact to rounding where the stage is piecewise linear, as those without a gradient are."""
    a = part.leaves[name]
    require(
        a.size <= PROBES, f"{part.tap} has no gradient, and {name} holds {a.size} numbers; at most {PROBES} are tried"
    )
    found = np.zeros(a.shape)
    for i in np.ndindex(a.shape):
        h = 2.0**-16 * max(1.0, abs(float(a[i])))
        up, down = (_with(part, name, i, a[i] + s * h) for s in (1, -1))
        found[i] = (float(up) - float(down)) / (2 * h) if up != down else 0.0
    return found


def _one_by_one(part: Part, name: str) -> Array:
    """The slope by every number of an input of a smooth stage that has no tape."""
    a = part.leaves[name]
    require(a.size <= PROBES, f"{part.tap}: {name} holds {a.size} numbers; at most {PROBES} are tried")
    found = np.zeros(a.shape)
    for i in np.ndindex(a.shape):
        own = a[i].reshape(1)

        def f(x: Array, i: Index = i) -> Array:
            return np.asarray(_with(part, name, i, x.item())).reshape(())

        found[i] = along(f, own, np.ones(1))
    return found


def moved_by(part: Part) -> Iterator[tuple[str, Index, int]]:
    """The integers among the inputs that the number depends on: name, index in the whole array, value."""
    y = np.asarray(part.result())[part.at]
    for name, a in part.leaves.items():
        if a.dtype.kind in "iu" and a.size <= PROBES:
            for i in np.ndindex(a.shape):
                if any(_differ(part, name, i, int(a[i]) + s, y) for s in (1, -1)):
                    yield name, part.origin(name, i), int(a[i])


def _differ(part: Part, name: str, i: Index, value: int, y: Array) -> bool:
    try:
        return bool(_with(part, name, i, value) != y)
    except (IndexError, ValueError):
        return True  # an id that names nothing: the number does depend on it


def _with(part: Part, name: str, i: Index, value: float) -> Array:
    """The part's number with one input changed."""
    a = part.leaves[name].copy()
    a[i] = value
    return np.asarray(data_of(part.result(part.leaves | {name: a})))[part.at]


def _exact(part: Part, y: float, products: dict[str, Array]) -> Iterator[tuple[str, ...]]:
    """The smallest groups of arguments in which, together, the number is homogeneous of degree one."""
    for n in range(1, (4 if len(products) <= FEW else 1) + 1):
        found = [g for g in combinations(products, n) if _homogeneous(part, y, g, products)]
        if found:
            yield from found
            return
    if len(products) > FEW and _homogeneous(part, y, tuple(products), products):
        yield tuple(products)


def _homogeneous(part: Part, y: float, group: tuple[str, ...], products: dict[str, Array]) -> bool:
    terms = np.concatenate([products[n].reshape(-1) for n in group])
    digits = DIFFERENCES if is_gradient(part.calls[-1]) else 1e-9
    near = digits * (float(np.abs(terms).sum()) + abs(y))
    if not abs(float(terms.sum()) - y) <= near:
        return False
    scaled = [
        np.asarray(part.result(part.leaves | {n: part.leaves[n] * by for n in group}))[part.at] for by in (2.0, 0.5)
    ]
    return bool(abs(scaled[0] - 2 * y) <= 2 * near and abs(scaled[1] - y / 2) <= near)


def _enlightening(group: tuple[str, ...], products: dict[str, Array]) -> tuple[int, int]:
    """More terms first, then activations before weights."""
    return sum(int(np.count_nonzero(products[n])) for n in group), -sum(n.startswith("w/") for n in group)


def _terms(part: Part, name: str, slope: Array, product: Array) -> list[Term]:
    some = np.argwhere(slope != 0)
    found = []
    for row in some[np.argsort(-np.abs(product[tuple(some.T)]), axis=None, kind="stable")]:
        i = tuple([int(k) for k in row])
        found.append(Term(name, part.origin(name, i), float(part.leaves[name][i]), float(slope[i]), float(product[i])))
    return found


def _partnered(part: Part, t: Term, others: dict[str, Array]) -> Term:
    """The term with its other factor: the input of another argument whose own term is the same product."""
    if not t.product:
        return t
    for name, products in others.items():
        i = np.unravel_index(int(np.argmin(np.abs(products - t.product))), products.shape)
        at = tuple([int(k) for k in i])
        value = float(part.leaves[name][at])
        if abs(float(products[at]) - t.product) <= 1e-12 * abs(t.product):
            return Term(t.name, t.index, t.value, t.slope, t.product, (name, part.origin(name, at), t.slope / value))
    return t
