"""The program of a run: its stage calls in model order, what feeds what, found without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call, Recorder, Stage, observing, tap_name
from refimpl.model import ForCausalLM, Inputs
from refimpl.model.phases import Part, run_parts

from .dims import Sizes, shape_of

_ZERO = bytes(4)
"""The memory of every placeholder."""


def program_of(
    c: Config, inputs: Inputs, *, n_mtp: int, parts: Sequence[Part], losses: Mapping[str, float] | None = None
) -> list[Call]:
    """The stage calls of a run of this config on inputs of these shapes, with the losses if their weights are given."""
    shapes = tuple([(name, array.shape) for name, array in inputs.named()])
    return list(_program(c, shapes, n_mtp, tuple(parts), None if losses is None else tuple(losses.items())))


@lru_cache(maxsize=64)
def _program(
    c: Config,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    n_mtp: int,
    parts: tuple[Part, ...],
    losses: tuple[tuple[str, float], ...] | None,
) -> tuple[Call, ...]:
    """The model is called, its stages are not: which stages run depends on no value, so one run serves all of its shapes."""
    inputs = Inputs(**{name: np.zeros(shape, np.int64) for name, shape in shapes})
    model = ForCausalLM(c, n_mtp=n_mtp).map(lambda _, unset: placeholder(unset.shape))
    recorder = Recorder()
    with observing(_Dry(c, Sizes(len(inputs.tokens), parts)), recorder):
        run_parts(model, inputs, parts, recorder, with_mtp=bool(n_mtp), losses=None if losses is None else dict(losses))
    return tuple(recorder.program)


class _Dry:
    """An observer that runs no stage: it hands on an array of the right shape, in no memory, that nobody reads."""

    def __init__(self, c: Config, sizes: Sizes) -> None:
        self.config, self.sizes = c, sizes

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Array:
        shape = shape_of(Call(stage.name, tap_name(stage), (), static), self.config, self.sizes)
        return placeholder(shape)


def placeholder(shape: tuple[int, ...]) -> Array:
    """Zeros of a shape, in no memory."""
    return np.ndarray(shape, np.float32, _ZERO, strides=(0,) * len(shape))


def integers(stage: Stage) -> bool:
    """Whether a stage gives integers: ids, counts, positions."""
    return stage.compare == "set" or (stage.compare == "exact" and stage.name != "mask")


def owner(tap: str) -> str:
    """The unit that a tap is of: `fwd/L3` of `fwd/L3/mla.q`."""
    return tap.rpartition("/")[0]


def names(args: Iterable[Any]) -> Iterator[str]:
    """The names among a call's arguments, those in tuples too."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from names(arg)
        elif isinstance(arg, str):
            yield arg


def standing(args: Iterable[Any], values: Iterable[Any], name: str) -> Iterator[Any]:
    """The values of a call's arguments that stand where the name stands."""
    for arg, value in zip(args, values, strict=True):
        if isinstance(arg, tuple):
            yield from standing(arg, value, name)
        elif arg == name:
            yield value


def replaced(args: Iterable[Any], values: Iterable[Any], name: str, by: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The values of a call's arguments, by(value) wherever the name stands."""
    pairs = zip(args, values, strict=True)
    return tuple([replaced(a, v, name, by) if isinstance(a, tuple) else by(v) if a == name else v for a, v in pairs])


def needed(program: list[Call], given: Iterable[str], outputs: Iterable[str] = ()) -> set[str]:
    """Taps that have to be computed: those given, those to be compared only, and what leads to them without passing a given
    one.
    """
    given = set(given)
    wanted = given | set(outputs)
    for call in reversed(program):
        if call.tap in wanted:
            wanted |= {n for n in names(call.args) if n not in given and not n.startswith("w/")}
    return wanted


def last_use(program: list[Call]) -> dict[str, int]:
    """Tap -> the index of the last call that reads it, its own where none does."""
    last = {call.tap: i for i, call in enumerate(program)}
    for i, call in enumerate(program):
        last |= {n: i for n in names(call.args) if n in last}
    return last


def regions(program: list[Call], given: Iterable[str], outputs: Iterable[str] = ()) -> dict[str, tuple[str, ...]]:
    """Tap that is compared -> the taps that were computed for it, itself last: the stages among which a difference at it lies."""
    given = set(given)
    shown = given | set(outputs)
    inside: dict[str, set[str]] = {}
    order = {call.tap: i for i, call in enumerate(program)}
    for call in program:
        inner = [inside[n] for n in names(call.args) if n in inside and n not in given]
        inside[call.tap] = {call.tap}.union(*inner)
    return {tap: tuple(sorted(found, key=order.__getitem__)) for tap, found in inside.items() if tap in shown}
