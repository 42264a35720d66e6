"""Entries for a tap map, proposed by value: on a case that a model is known to compute right, a module's tensor that holds what our
own run has at a tap is that tap.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff import Case
from refimpl.diff.names import by_value
from refimpl.layers.stage import STAGES

from .candidate import Candidate, library, plain_only
from .ours import trace_case
from .torch_arrays import one_thread
from .watch import array

_AXES = {s.tap: s.shape for s in STAGES.values()}
_SLOTS = 0.05
"""Sorted numbers are near each other whatever they are: weights, which are compared so, must be nearer."""
_SAME = 1e-3
"""What differs by less is the same quantity; more, up to what `by_value` accepts, is said."""


class Found(NamedTuple):
    """A place that holds a tap: its text in a map, how far it is away, its axes if they have to be declared."""

    text: str
    away: float
    axes: str


def suggest(made: Candidate, case: Case) -> dict[str, tuple[str, str]]:
    """Tap -> (entry, remark) for every tap that is held somewhere in every layer that has it, in model order.

    Of several places that hold the same numbers, what a module gives is preferred to what goes into one, and the shorter path.
    """
    tensors = _tensors(made, case)
    ours = trace_case(case).taps
    layers: dict[str, list[set[Found]]] = {}
    for tap, x in ours.items():
        unit, name = _split(tap)
        if unit is not None:
            layers.setdefault(name, []).append(set(_holding(tensors, x, name, unit)))
    return {name: chosen for name, sets in layers.items() if (chosen := _chosen(sets))}


def as_toml(entries: Mapping[str, tuple[str, str]], name: str) -> str:
    """A tap map of these entries."""
    rows = [f'"{tap}" = "{entry}"' + (f"  # {remark}" if remark else "") for tap, (entry, remark) in entries.items()]
    return "\n".join([f'name = "{name}"', "", "[taps]", *rows, ""])


def _split(tap: str) -> tuple[int | None, str]:
    """(layer, name); -1 for what belongs to none, None for MTP."""
    found = re.fullmatch(r"fwd/(?:L(\d+)/)?([\w.]+)", tap)
    return (None, tap) if not found else (int(found[1]) if found[1] else -1, found[2])


def _tensors(made: Candidate, case: Case) -> dict[tuple[str, str], Array]:
    """(place, path) -> tensor, for all that goes into the modules of one run and comes out of them, first calls only."""
    torch, seen = library("torch", "torch"), dict[tuple[str, str], Array]()
    require(callable(getattr(made.module, "named_modules", None)), "not a torch module")

    def keep(place: str, path: str, x: Any) -> None:
        if torch.is_tensor(x):
            seen.setdefault((place, path), array(x))
        elif isinstance(x, (tuple, list)):
            for i, part in enumerate(x):
                if torch.is_tensor(part):
                    seen.setdefault((f"{place}[{i}]", path), array(part))

    def leave(path: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            keep(path, path, out)
            for i, x in enumerate([*args, *kwargs.values()]):
                keep(f"input {i} of {path}" if i else f"input of {path}", path, x)

        return hook

    with one_thread(), ExitStack() as stack:
        for path, module in made.module.named_modules():
            if path:
                stack.callback(module.register_forward_hook(leave(path), with_kwargs=True).remove)
        if made.call is None:
            plain_only(case, "a module called with tokens alone")
            made.module(torch.tensor(case.tokens))
        else:
            made.call(made.module, case.tokens)
    return seen


def _holding(tensors: Mapping[tuple[str, str], Array], ours: Array, tap: str, layer: int) -> Iterator[Found]:
    """The places of one layer that hold a tap's numbers, the layer's number put back to i."""
    axes = _AXES[tap]
    of = {}
    for (place, path), x in tensors.items():
        numbers = {int(n) for n in re.findall(r"(?<!\w)\d+(?!\w)", path)}
        if layer < 0 or layer in numbers or not numbers:
            of[place] = x
    exact, slots = ours.dtype.kind in "iu", tap == "router.weights"  # slots may come in any order
    ours = np.sort(ours, axis=-1) if exact or slots else ours
    for place, x in of.items():
        for turned, order in _turned(x, ours.shape, axes.split()):
            theirs = np.sort(turned, axis=-1) if exact or slots else turned
            same = theirs.dtype.kind in "iu" and np.array_equal(theirs, ours)
            away = (0.0 if same else None) if exact else next((a for _, a in by_value({place: theirs}, ours)), None)
            if away is not None and not (slots and away > _SLOTS):
                yield Found(_general(place, layer), away, order)
                break


def _turned(x: Array, shape: tuple[int, ...], axes: list[str]) -> Iterator[tuple[Array, str]]:
    """x as it is or its axes turned, with the axes to declare."""
    if x.size != np.prod(shape):
        return
    same = x.shape == shape
    yield x.reshape(shape), "" if same else " ".join(axes)
    for order in ((1, 0, *range(2, len(shape))), (0, 2, 1, *range(3, len(shape)))):
        if len(order) == len(shape) and sorted(order) == list(range(len(shape))):
            yield x.reshape([shape[i] for i in order]).transpose(np.argsort(order)), " ".join([axes[i] for i in order])


def _general(place: str, layer: int) -> str:
    return place if layer < 0 else re.sub(rf"(?<=\.){layer}(?=\.|\[|$)", "i", place, count=1)


def _chosen(sets: list[set[Found]]) -> tuple[str, str] | None:
    """The best place among those that hold the tap in every layer; or several, each for layers that those before it lack."""
    left, parts, remarks = list(sets), list[str](), list[str]()
    while left:
        held = Counter(key for s in left for key in {(f.text, f.axes) for f in s})
        most = max(held.values(), default=0)
        if most == 0:
            return None
        worst = {
            key: max(f.away for s in left for f in s if (f.text, f.axes) == key) for key in held if held[key] == most
        }
        text, axes = best = min(worst, key=lambda k: (worst[k] > _SAME, k[0].startswith("input"), len(k[0]), k[0]))
        parts.append(text + (f" ({axes})" if axes else ""))
        remarks += [f"differs by {worst[best]:.1g}"] if worst[best] > _SAME else []
        also = sorted({t for t, _ in worst} - {text})
        remarks += [f"also {', '.join(also[:2])}{' ...' * (len(also) > 2)}"] if also else []
        left = [s for s in left if all((f.text, f.axes) != best for f in s)]
    return " | ".join(parts), "; ".join(remarks)
