"""The tasks of a phase from a recipe file: [[phase.task]] and `weighting = { by = ... }`, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from refimpl.autograd.errors import require, where

from .tasks import LOSSES, WEIGHTINGS, Task, Weighting, divided
from .values import known_keys, number, tables, text, whole

_TASK = tuple([f.name for f in fields(Task)])
_WEIGHTING = tuple([f.name for f in fields(Weighting)])


def read_tasks(given: Any, masked: bool, batches: Sequence[int]) -> tuple[Task, ...]:
    """The tasks of a phase whose batches have these sizes; `masked` unless they say otherwise. SpecError also where a batch has no
    row for one of them.
    """
    require(given == [] or tables(given), f"task is {given!r}; expected [[phase.task]] tables")
    tasks = tuple([_task(d, i, masked) for i, d in enumerate(given, 1)])
    names = [t.name for t in tasks]
    require(len(set(names)) == len(names), f"two tasks have the same name: {names}")
    for batch in batches if tasks else ():
        counts = divided(batch, [t.share for t in tasks])
        said = ", ".join([f"{t.name} {n}" for t, n in zip(tasks, counts, strict=True)])
        require(min(counts) >= 1, f"a batch of {batch} sequences has no row for every task: {said}")
    return tasks


def _task(d: Mapping[str, Any], number_: int, masked: bool) -> Task:
    with where(f"in task {d.get('name', number_)!r}"):
        known_keys(d, _TASK, "a task")
        name = text(d, "name")
        require(re.fullmatch(r"[\w-]+", name), f"name is {name!r}; expected letters, digits, _ and -")
        for key in ("share", "weight"):
            require(number(d.get(key, 1)) and d.get(key, 1) > 0, f"{key} is {d.get(key)!r}; expected a positive number")
        require(d.get("loss", LOSSES[0]) in LOSSES, f"loss is {d.get('loss')!r}; known: {', '.join(LOSSES)}")
        require(isinstance(d.get("prefix", ""), str), f"prefix is {d.get('prefix')!r}; expected a text")
        require(isinstance(d.get("masked", True), bool), f"masked is {d.get('masked')!r}; expected true or false")
        values = {key: float(d[key]) for key in ("share", "weight") if key in d}
        return Task(**({"masked": masked} | dict(d) | values))


def read_weighting(d: Any, tasks: Sequence[Task]) -> Weighting:
    """How the tasks' losses are weighed. SpecError for settings that would have no effect."""
    require(isinstance(d, Mapping), f'weighting is {d!r}; expected a table such as {{ by = "uncertainty" }}')
    with where("in weighting"):
        known_keys(d, _WEIGHTING, "the weighting")
        by = d.get("by", WEIGHTINGS[0])
        require(by in WEIGHTINGS, f"by is {by!r}; known: {', '.join(WEIGHTINGS)}")
        require(tasks or not d, "a weighting, but no [[phase.task]]")
        odd = [key for key in ("temperature", "window") if key in d and by != "loss-ratio"]
        require(not odd, f"{' and '.join(odd)}: of loss-ratio only, not of {by}")
        odd = [t.name for t in tasks if t.weight != 1 and by != "fixed"]
        require(not odd, f"a weight for {', '.join(odd)}, but weights are found by {by}, not fixed")
        t = d.get("temperature", 2.0)
        require(number(t) and t > 0, f"temperature is {t!r}; expected a positive number")
        return Weighting(by, float(t), whole(d, "window", 1))
