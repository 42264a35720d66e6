"""A known bug as a changed stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refimpl.layers.config import Config
from refimpl.layers.stage import STAGES


def always(c: Config) -> bool:
    """Every config can show it."""
    return True


@dataclass(frozen=True)
class Mutant:
    """id of the corpus, with a letter where a family has several forms; what is wrong, in a sentence; the stage that is changed;
    `fn`, its replacement; threads where it happened; `regime`, what inputs must have for it to show; `applies`, whether a config
    has what it spoils; `reads`, what else of the same unit it needs: taps, or "w:" and the end of a weight's name, handed to `fn`
    as keyword `reads`, or "master", the weight that an optimiser moves; `also`, further stages that the one mistake changes.
    """

    id: str
    title: str
    stage: str
    fn: Callable[..., Any]
    threads: tuple[str, ...] = ()
    regime: str = "any"
    applies: Callable[[Config], bool] = always
    reads: tuple[str, ...] = ()
    also: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def at(self, stage: str) -> Callable[..., Any] | None:
        """What takes a stage's place, None if it stays as it is."""
        return self.fn if stage == self.stage else self.also.get(stage)


def stage(name: str) -> Callable[..., Any]:
    """The stage as it is."""
    return STAGES[name].fn


def setting(name: str, **changes: Any) -> Callable[..., Any]:
    """The stage with other settings."""
    return lambda *args, **static: stage(name)(*args, **static | changes)


def scaled(name: str, by: float) -> Callable[..., Any]:
    """The stage's output times a number."""
    return lambda *args, **static: stage(name)(*args, **static) * by


def threads(text: str) -> tuple[str, ...]:
    """Threads written with semicolons between."""
    return tuple([t.strip() for t in text.split(";")])
