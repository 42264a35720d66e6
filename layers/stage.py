"""The stage: a pure function with a stable, never reused name. The name is the spine of the whole specification.

The model is a list of stage calls; a trace holds what went into and came out of each; the diff re-runs one alone; a
precision plan is a table over stages. One mechanism serves them all: observers, held in a context variable, stand
around every call and may note it, round its output, or run something else. Nobody observing costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, Protocol

from refimpl.autograd.errors import SpecError
from refimpl.autograd.tensor import data_of

Compare = Literal["exact", "set", "value", "gauge", "distribution", "given"]
STAGES: dict[str, Stage] = {}


@dataclass(frozen=True, eq=False)
class Stage:
    """A named pure function: `fn(*arrays, **static) -> array`, what it gives, its place in the report, how its output is
    compared.
    """

    name: str
    fn: Callable[..., Any]
    what: str
    eq: str
    compare: Compare
    shape: str
    tap: str

    def __call__(self, *args: Any, **static: Any) -> Any:
        """fn(*args, **static), inside the observers of this context."""
        run: Callable[..., Any] = self.fn
        for observer in _observers.get():
            run = partial(observer, self, run)
        return run(*args, **static)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.fn.__doc__


class Observer(Protocol):
    """Stands around a stage call: runs it, and returns its output or what is to take its place."""

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """`run(*args, **static)` is the call as the observers further in make it."""


_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())
_at: ContextVar[str] = ContextVar("at", default="fwd")


def stage(
    name: str, *, what: str, eq: str, shape: str, compare: Compare = "value", tap: str | None = None
) -> Callable[[Callable[..., Any]], Stage]:
    """Give a pure function its place: name, output in words, equation or section of R, shape in letters, comparison class.

    `tap` is for a second form of a quantity (absorbed attention's scores): another stage, the same tap.
    """

    def define(fn: Callable[..., Any]) -> Stage:
        assert name not in STAGES, f"stage {name} is defined twice"
        STAGES[name] = Stage(name, fn, what, eq, compare, shape, tap or name)
        return STAGES[name]

    return define


@contextmanager
def observing(*observers: Observer) -> Iterator[None]:
    """Let observers stand around every stage call in this context (and thread), the first one innermost."""
    token = _observers.set(_observers.get() + observers)
    try:
        yield
    finally:
        _observers.reset(token)


def observed(*names: str) -> bool:
    """Whether anyone observes one of these stages (without names: any): then the fused, faster forms of neighbouring stages stand
    back. An observer that leaves some stages as they are says so by `watches(name)`.
    """
    return any(_watches(observer, names) for observer in _observers.get())


def _watches(observer: Any, names: tuple[str, ...]) -> bool:
    tell: Callable[[str], bool] | None = getattr(observer, "watches", None)
    return not names or tell is None or any(map(tell, names))


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the run whose taps follow: `fwd`, or `dec7` for one cached step with 7 tokens already in the cache."""
    token = _at.set(name)
    try:
        yield
    finally:
        _at.reset(token)


@contextmanager
def unit(name: str) -> Iterator[None]:
    """Name the layer (`L3`) or MTP module (`mtp1`) whose taps follow: `fwd/L3/<tap>`."""
    token = _at.set(f"{_at.get().partition('/')[0]}/{name}")
    try:
        yield
    finally:
        _at.reset(token)


def tap_name(stage: Stage) -> str:
    """The tap of a call made here: `fwd/L3/mla.q_rope`; inside an MTP unit the prefix falls: `fwd/mtp1/cat`."""
    here = _at.get()
    tap = stage.tap.removeprefix("mtp.") if "/mtp" in here else stage.tap
    return f"{here}/{tap}"


def tap_matches(tap: str, pattern: str) -> bool:
    """Whether a tap fits a pattern (`fwd/L*/router.*`), which may leave out the phase."""
    return fnmatchcase(tap, pattern) or fnmatchcase(tap.partition("/")[2], pattern)


@dataclass(frozen=True)
class Patch:
    """A mutation: an observer that puts another function of the same arguments in one stage's place."""

    stage: str
    fn: Callable[..., Any]

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """The other function where the stage is the patched one."""
        return (self.fn if stage.name == self.stage else run)(*args, **static)


@dataclass(frozen=True)
class Call:
    """One line of a program: a stage, the tap it produced, and the names of what it consumed. `own` is the stage itself where it
    is made for this call, as gradients are, and has no place among STAGES.
    """

    stage: str
    tap: str
    args: tuple[Any, ...]  # a name, a tuple of names, None or a number
    static: dict[str, Any]
    own: Stage | None = None

    @property
    def of(self) -> Stage:
        """The stage that is called."""
        return self.own or STAGES[self.stage]


class Recorder:
    """An observer that writes the program down and keeps what every tap held.

    `recorder.know(name, array)` introduces inputs and weights. An array argument that nobody introduced and no stage
    produced raises SpecError: every tensor has a stage.
    """

    def __init__(self, keep: Callable[[str], bool] = lambda tap: True) -> None:
        self.program: list[Call] = []
        self.taps: dict[str, Any] = {}
        self._keep = keep
        self._produced: set[str] = set()
        self._names: dict[int, tuple[str, Any]] = {}  # id -> name, and the array itself so that the id stays taken

    def know(self, name: str, array: Any) -> None:
        """Introduce an input or a weight."""
        array = data_of(array)
        self._names[id(array)] = (name, array)

    def __call__(self, stage: Stage, run: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
        """Note the call; the output goes on unchanged."""
        tap = tap_name(stage)
        names = tuple([self._name(a, tap) for a in args])
        out = run(*args, **static)
        if tap in self._produced:
            raise SpecError(f"tap {tap} was produced twice; run under another phase, or with a new Recorder")
        self._produced.add(tap)
        self.program.append(Call(stage.name, tap, names, static))
        self.know(tap, out)
        if self._keep(tap):
            self.taps[tap] = out
        return out

    def _name(self, arg: Any, tap: str) -> Any:
        if isinstance(arg, tuple | list):
            return tuple([self._name(a, tap) for a in arg])
        if arg is None or isinstance(arg, int | float):
            return arg
        known = self._names.get(id(data_of(arg)))
        if known is None:
            raise SpecError(f"{tap} consumes an array {arg.shape} that no stage produced and nobody introduced")
        return known[0]
