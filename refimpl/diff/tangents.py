"""How one number of a gradient leans on the gradients behind it, without a second derivative.

dx = sum over readers y of J_y^T dy, so the slope of dx[at] by dy is J_y e_at: how the forward values move when x[at] does. That is
pushed along the readers, from the tap on, to every tap whose gradient was recorded; each by differences of its own function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .gradients import gradient_name


def is_gradient(call: Call) -> bool:
    """Whether a call gives the gradient by a tap or a weight."""
    return "readers" in call.static


def along(f: Callable[[Array], Array], x: Array, dx: Array) -> Array:
    """The derivative of f at x in the direction dx: central differences of three steps, of which the errors h^2 and h^4 cancel.
    x (*), dx (*) -> (...).
    """
    largest = np.max(np.abs(dx), initial=0)
    if not largest:
        return 0 * f(x)
    finite = x[np.isfinite(x)]
    size = min(1.0, float(np.sqrt(np.mean(finite * finite))) if finite.size else 1.0) or 1.0
    found = []
    for k in (6, 7, 8):
        h = size * 2.0**-k / largest
        up, down = f(x + h * dx), f(x - h * dx)
        with np.errstate(invalid="ignore"):  # a masked score less itself
            found.append(np.where(up == down, 0.0, up - down) / (2 * h))
    a, b = (4 * found[1] - found[0]) / 3, (4 * found[2] - found[1]) / 3
    return (16 * b - a) / 15


def seeds(calls: tuple[Call, ...]) -> Iterator[tuple[Call, Call]]:
    """Every (gradient, reader) along which the last call's number is reached, each after those that lead to it."""
    reached = {str(calls[-1].static["name"])}
    for call in reversed(calls):
        if is_gradient(call) and call.static["name"] in reached:
            for reader in call.static["readers"]:
                reached.add(reader.tap)
                yield call, reader


def ends(calls: tuple[Call, ...]) -> list[str]:
    """The forward taps at which the way ends: their gradient was recorded, or is the loss' own, 1."""
    inner = {str(c.static["name"]) for c in calls if is_gradient(c)}
    return list(dict.fromkeys([r.tap for _, r in seeds(calls) if r.tap not in inner]))


def slopes_of_gradient(calls: tuple[Call, ...], values: Mapping[str, Any], shape: tuple[int, ...], at: Any) -> Any:
    """The slope of a gradient's number at `at` by every gradient that was recorded, by name."""
    unit = np.zeros(shape)
    unit[at] = 1
    moved = {str(calls[-1].static["name"]): unit}
    for call, reader in seeds(calls):
        name = str(call.static["name"])

        def f(x: Array, reader: Call = reader, name: str = name) -> Array:
            put = {**values, name: x}
            out: Array = reader.of.fn(*[value_of(a, put) for a in reader.args], **reader.static)
            return out

        step = along(f, np.asarray(values[name]), moved[name])
        moved[reader.tap] = moved[reader.tap] + step if reader.tap in moved else step
    return {gradient_name(tap): moved[tap] for tap in ends(calls)}


def value_of(arg: Any, values: Mapping[str, Any]) -> Any:
    """What a call's argument is among these values."""
    if isinstance(arg, tuple):
        return tuple([value_of(a, values) for a in arg])
    return values[arg] if isinstance(arg, str) else arg
