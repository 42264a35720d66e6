"""The loop of a training run: batches in, steps, metrics and checkpoints out; resumed, it has the bits of one that never stopped.

from refimpl.train.run import load_job, train

end = train(load_job("recipe.toml"), "run")            # or resume=True

RUN/metrics.jsonl   a record a step (`journal.py`)
RUN/checkpoints/    `refimpl.train.checkpoints`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.autograd import Array
from refimpl.autograd.errors import require
from refimpl.train.checkpoints import Keeper, Saved, facts
from refimpl.train.guard import NotFinite

from .engine import Engine, Serial
from .feed import Cursors, Feed
from .job import Job
from .journal import Record
from .monitor import Monitor


@dataclass(frozen=True)
class End:
    """Where a run ended: steps done, whether that is all of it, the last record, the masters by checkpoint name."""

    step: int
    complete: bool
    record: Record
    weights: Mapping[str, Array]


def never() -> bool:
    """Nobody asks to stop."""
    return False


def train(
    job: Job,
    folder: str | Path,
    *,
    resume: bool = False,
    stop: Callable[[], bool] = never,
    tell: Callable[[Record], None] = lambda record: None,
) -> End:
    """Run a job, its files in `folder`. `stop` is asked after every step: True saves and ends. `tell` hears every record.

    SpecError for a job that does not add up, a folder that holds a run already (or none, to resume), a checkpoint of another
    run, a full disk; NotFinite for a loss that is no number, with the last good state saved.
    """
    job.check()
    feed, folder = Feed(job), Path(folder)
    require(not resume or folder.is_dir(), f"no run to resume in {folder}")
    with ExitStack() as stack:
        keeper = stack.enter_context(Keeper(folder / "checkpoints", keep=job.checkpoints.retention))
        saved = _begun(keeper, resume)
        cursors = _cursors(job, feed, saved)
        engine = Serial.start(job, saved)
        stack.callback(engine.close)
        monitor = stack.enter_context(Monitor(job, folder, engine.done, tell))
        return _Loop(job, feed, engine, keeper, monitor).run(cursors, stop)


def _begun(keeper: Keeper, resume: bool) -> Saved | None:
    """The checkpoint to go on from; None to begin."""
    steps = keeper.steps()
    if not resume:
        held = f"{keeper.folder} holds a run of {steps[-1] if steps else 0} steps"
        require(not steps, f"{held}; --resume goes on with it, or choose another folder")
        return None
    found = keeper.newest()
    bad = "\n".join([f"  {name}: {what}" for name, what in found.passed_over.items()])
    require(found.saved or not bad, f"no checkpoint in {keeper.folder} is whole:\n{bad}")
    return found.saved


def _cursors(job: Job, feed: Feed, saved: Saved | None) -> Cursors:
    """Where the data goes on. SpecError if the run was begun with another recipe, or has steps that this one does not have."""
    if saved is None:
        return {}
    require(saved.step <= len(job.run), f"{saved.folder}: the recipe has {len(job.run)} steps")
    then, now = saved.facts["counters"].get("job", {}), job.identity(saved.step)
    other = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    said = "; ".join([f"{key} was {then.get(key)!r:.100}, is {now.get(key)!r:.100}" for key in other])
    require(not other, f"{saved.folder} is of a run with another recipe: {said}")
    return feed.restored(saved.facts["cursor"], job.run.at(saved.step - 1).phase if saved.step else None)


class _Loop:
    """What a run needs between two steps."""

    def __init__(self, job: Job, feed: Feed, engine: Engine, keeper: Keeper, monitor: Monitor) -> None:
        self.job, self.feed, self.engine, self.keeper, self.monitor = job, feed, engine, keeper, monitor

    def run(self, cursors: Cursors, stop: Callable[[], bool]) -> End:
        """Steps until the job is done or somebody asks to stop; saved at the end, also at a step that gives no number."""
        stopped = False
        while self.engine.done < len(self.job) and not stopped:
            try:
                cursors = self._step(cursors)
            except NotFinite as error:
                self._save(cursors)
                raise NotFinite(f"{error}\n  kept: {self.keeper.path(self.engine.done)}") from None
            stopped = stop()
        self._save(cursors)
        done = self.engine.done
        return End(done, done == len(self.job), self.monitor.last, self.engine.weights())

    def _step(self, cursors: Cursors) -> Cursors:
        """One step with everything due after it -> the cursors after it."""
        s = self.job.run.at(self.engine.done)
        c, recipe = self.job.run.config(s.step, self.job.config), self.job.run.recipe(s.step)
        batch, cursors = self.feed.take(s, cursors)
        with self.monitor.step(c, s) as note:
            note(self.engine.step(c, s, recipe, batch), self.engine.biases())
        if self.engine.done % self.job.checkpoints.every == 0:
            self.keeper.begin(self.engine.snapshot(self._facts(cursors)))
        return cursors

    def _save(self, cursors: Cursors) -> None:
        """The state as it is, unless that is saved."""
        self.keeper.finish()
        if self.engine.done > max(self.keeper.steps(), default=-1):
            self.keeper.save(self.engine.snapshot(self._facts(cursors)))

    def _facts(self, cursors: Cursors) -> dict[str, Any]:
        cursor = {of: c.to_dict() for of, c in cursors.items()}
        return facts(
            self.job.model(self.engine.done), cursor=cursor, counters={"job": self.job.identity(self.engine.done)}
        )
