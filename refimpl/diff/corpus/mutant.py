"""A known bug as a changed stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.router import top_k
from refimpl.layers.stage import STAGES


def always(c: Config) -> bool:
    """Every config can show it."""
    return True


@dataclass(frozen=True)
class Mutant:
    """id of the corpus, with a letter where a family has several forms; what is wrong, in a sentence; the stage that is changed;
    `fn`, its replacement; threads where it happened; `regime`, what inputs must have for it to show; `applies`, whether a config
    has what it spoils; `reads`, what else of the same unit it needs: taps, or "w:" and the end of a weight's name, handed to `fn`
    as keyword `reads`, or "master", the weight that an optimiser moves; `also`, further stages that the one mistake changes; `made`
    gives `fn` where it takes settings that the stage does not see; `ahead`, whether tokens see others that come after them.
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
    made: Callable[[Config], Callable[..., Any]] | None = None
    ahead: bool = False

    def under(self, c: Config) -> Mutant:
        """The mutant in a model of this config."""
        return replace(self, fn=self.made(c)) if self.made else self

    def at(self, stage: str) -> Callable[..., Any] | None:
        """What takes a stage's place, None if it stays as it is."""
        return self.fn if stage == self.stage else self.also.get(stage)


@dataclass(frozen=True)
class Best:
    """A wrong choice: the k best by `scores(*args, **static)`. By itself ties go to the lower index, as ours do; a candidate's may
    fall any way.
    """

    scores: Callable[..., Array]

    def __call__(self, *args: Any, k: int, **static: Any) -> Array:
        """Indices of the k largest scores, largest first.  -> (*, k)."""
        return top_k(self.scores(*args, **static), k)

    def allows(self, ids: Array, scores: Array) -> bool:
        """Whether ids (*, k) are k best of these scores (*, E)."""
        chosen, best = (np.take_along_axis(scores, i, axis=-1) for i in (ids, top_k(scores, ids.shape[-1])))
        once = (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all()
        return bool(once and (np.sort(chosen, axis=-1) == np.sort(best, axis=-1)).all())


def unmade(*args: Any, **static: Any) -> Any:
    """In the place of `fn` until a config is known."""
    raise AssertionError("this mutant is made of a config: Mutant.under")


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
