"""The axes of a stage's arguments and result, as its docstring writes them: what may be cut away, and together with what.

"w (H (Dn+Dr), Q)" has two axes, the first of the factors H and Dn+Dr. A test of the whole house holds docstrings to be true.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from refimpl.layers.stage import Call

from .gradients import gradient_name

Factors = tuple[str, ...]
"""The names whose product an axis is: ("H", "Dn+Dr")."""
Axes = tuple[Factors, ...]


def axes_of(fn: Callable[..., Any]) -> tuple[dict[str, Axes], Axes]:
    """Parameter -> its axes; the result's. What the docstring does not say is absent, or ()."""
    doc = " ".join((fn.__doc__ or "").split())
    found, end = {}, 0
    for p in inspect.signature(fn).parameters.values():
        name = p.name.removesuffix("s") if p.kind is p.VAR_POSITIONAL else p.name
        match = re.search(rf"(?<![\w.^]){name} \((?=[\w\s,+/().*-]*\))", doc)
        if match and p.kind is not p.KEYWORD_ONLY:
            text = _inside(doc, match.end())
            found[p.name], end = _axes(text), max(end, match.end() + len(text))
    result = re.compile(r"-> \(").search(doc, end)
    return found, _axes(_inside(doc, result.end())) if result else ()


def fitted(axes: Axes, ndim: int) -> Axes | None:
    """The axes of an array of that many: "..." or "*" stands for as many as are missing; None if they do not fit."""
    for some in ("...", "*"):
        if (some,) in axes:
            i, missing = axes.index((some,)), ndim - len(axes) + 1
            axes = (*axes[:i], *[(f"{some}{k}",) for k in range(missing)], *axes[i + 1 :])
    return axes if len(axes) == ndim else None


def axes_at(name: str, call: Call, ndim: int, shown: str = "") -> Axes:
    """A leaf's axes by the docstring of the first stage that reads it, or gives it; a gradient's are those of what it is by."""
    readers = call.static.get("readers", ())
    for reader, result in [(r, gradient_name(r.tap)) for r in readers] or [(call, call.tap)]:
        known, given = axes_of(reader.of.fn)
        parameters = list(inspect.signature(reader.of.fn).parameters)
        pairs = [(a, known.get(parameters[min(i, len(parameters) - 1)], ())) for i, a in enumerate(reader.args)]
        for arg, axes in [*pairs, (result, given)]:
            if arg == name and (found := fitted(axes, ndim)) is not None:
                return found
    return _unnamed(shown or name, ndim)


def _unnamed(name: str, ndim: int) -> Axes:
    """Axes that nothing is known of: names that occur once."""
    return tuple([(f"{name}[{i}]",) for i in range(ndim)])


def _inside(text: str, start: int) -> str:
    """From `start` to the parenthesis that closes the one before it."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return text[start:i]
    return ""


def _axes(text: str) -> Axes:
    return tuple([tuple(_split(axis, " ")) for axis in _split(text, ",")])


def _split(text: str, at: str) -> Iterator[str]:
    """Parts outside parentheses, without their own."""
    depth, part = 0, ""
    for ch in text + at:
        depth += {"(": 1, ")": -1}.get(ch, 0)
        if ch == at and not depth:
            if part.strip():
                yield part.strip().removeprefix("(").removesuffix(")") if at == " " else part.strip()
            part = ""
        else:
            part += ch
