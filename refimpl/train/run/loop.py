"""The loop of a training run: batches in, steps, metrics and checkpoints out; resumed, it has the bits of one that never stopped.

from refimpl.train.run import load_job, train

end = train(load_job("recipe.toml"), "run")            # or resume=True

RUN/metrics.jsonl   a record a step (`monitor.py`)      RUN/samples.jsonl   texts the model made
RUN/checkpoints/    `refimpl.train.checkpoints`         RUN/tensorboard/    the metrics once more
RUN/lock            who trains here (`alone.py`)        RUN/stop            somebody asks it to end (`stopping.py`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refimpl.autograd import Array
from refimpl.autograd.errors import require, where
from refimpl.layers.config import Config
from refimpl.parallel_emulation.comm import Comm, spmd
from refimpl.train.checkpoints import Keeper, Saved, Snapshot, facts
from refimpl.train.guard import NotFinite
from refimpl.train.training import Recipe

from . import stopping
from .alone import alone
from .engine import Engine, Serial
from .evaluation import Evaluator
from .feed import Cursors, Feed
from .job import Job
from .journal import Record
from .monitor import Monitor, said, seen
from .on_mesh import OnMesh
from .ranks import Ranks
from .sampling import Sampler


@dataclass(frozen=True)
class End:
    """Where a run ended: steps done, whether that is all of it, the masters (on a mesh a rank's weights) by checkpoint name; and
    steps done when it went on.
    """

    step: int
    complete: bool
    weights: Mapping[str, Array]
    began: int = 0


def never() -> bool:
    """Nobody asks to stop."""
    return False


def train(
    job: Job,
    folder: str | Path,
    *,
    resume: bool = False,
    comm: Comm | None = None,
    cores: int = 1,
    stop: Callable[[], bool] = never,
    tell: Callable[[Record], None] = lambda record: None,
) -> End:
    """Run a job, its files in `folder`: by itself, or as one of the ranks of `comm`, which all call this with the same job, on
    `cores` processors. `stop` is asked after every step: True, on any rank, saves and ends, and so does `stopping.ask(folder)`.
    `tell` hears every record, on rank 0.

    SpecError for a job that does not add up, a folder that holds a run already (or none, to resume) or in which another process
    trains, a checkpoint of another run, a full disk; NotFinite for a loss that is no number, with the last good state saved.
    """
    job.check()
    feed, folder, ranks = Feed(job), Path(folder), Ranks(comm)
    more = Evaluator(job, feed.tokenizer), Sampler(job, feed.tokenizer)
    require(not resume or (folder / "checkpoints").is_dir(), f"no run to resume in {folder}")
    with ExitStack() as stack, where(f"while training in {folder}"):
        stack.enter_context(alone(folder, comm))
        if ranks.first:
            stopping.forget(folder)
            stack.callback(stopping.forget, folder)
        keeper = stack.enter_context(Keeper(folder / "checkpoints", comm=comm, keep=job.checkpoints.retention))
        saved = _begun(keeper, resume)
        cursors = _cursors(job, feed, saved)
        engine: Engine = Serial.start(job, saved) if ranks.comm is None else OnMesh.start(job, saved, ranks.comm)
        stack.callback(engine.close)
        monitor = stack.enter_context(Monitor(job, folder, engine.done, tell, cores)) if ranks.first else None
        loop = Loop(job, feed, ranks, engine, keeper, monitor, *more)
        return loop.run(cursors, lambda: stop() or (ranks.first and stopping.asked(folder)))


def simulated(job: Job, folder: str | Path, ranks: int, **how: Any) -> list[End]:
    """`train` on so many ranks of the simulator -> what each of them ended with."""

    def program(comm: Comm) -> End:
        return train(job, folder, comm=comm, **how)

    return spmd(ranks, program)


def _begun(keeper: Keeper, resume: bool) -> Saved | None:
    """The checkpoint to go on from; None to begin."""
    found = keeper.newest() if resume else None
    if found is None:
        steps = keeper.steps()
        held = f"{keeper.folder} holds a run of {steps[-1] if steps else 0} steps"
        require(not steps, f"{held}; --resume goes on with it, or choose another folder")
        return None
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


@dataclass(frozen=True)
class Loop:
    """What a run needs between two steps."""

    job: Job
    feed: Feed
    ranks: Ranks
    engine: Engine
    keeper: Keeper
    monitor: Monitor | None
    evaluator: Evaluator
    sampler: Sampler

    def run(self, cursors: Cursors, stop: Callable[[], bool]) -> End:
        """Steps until the job is done or somebody asks to stop; saved at the end, and where a step gives no number."""
        stopped, began = False, self.engine.done
        if not self.engine.done:
            self._sample(*self._now(0))
        while self.engine.done < len(self.job) and not stopped:
            try:
                cursors, stopped = self._step(cursors, stop)
            except NotFinite as error:
                self._save(cursors)
                kept = f"kept: {self.keeper.path(self.engine.done)}" if self.engine.done else "it was the first step"
                raise NotFinite(f"{error}\n  {kept}") from None
        self._save(cursors)
        return End(self.engine.done, self.engine.done >= len(self.job), self.engine.weights(), began)

    def _now(self, step: int) -> tuple[Config, Recipe]:
        return self.job.model(step), self.job.run.recipe(step)

    def _step(self, cursors: Cursors, stop: Callable[[], bool]) -> tuple[Cursors, bool]:
        """One step with everything due after it -> the cursors after it, whether to stop."""
        s, end = self.job.run.at(self.engine.done), len(self.job)
        c, recipe = self._now(s.step)
        batch, cursors = self.feed.take(s, cursors)
        began = time.perf_counter()
        report = self.engine.step(c, s, recipe, batch)
        seconds, taken = time.perf_counter() - began, self.ranks.taken()
        held = self.evaluator(self.engine, c, recipe) if self.evaluator.due(report.step, end) else {}
        self.ranks.taken()
        heard = self.ranks.meet(said(report, self.engine.biases(), taken) | {"stop": stop()})
        self.keeper.finish() if self.ranks.plain else None  # begun a step ago
        if self.monitor is not None:
            self.monitor.add(c, s, seen(s, report, heard) | held, seconds)
        self._sample(c, recipe)
        if report.step % self.job.checkpoints.every == 0:
            self.keeper.begin(self._snapshot(cursors))
        return cursors, any(part["stop"] for part in heard)

    def _sample(self, c: Config, recipe: Recipe) -> None:
        if self.monitor is not None and self.sampler.due(self.engine.done, len(self.job)):
            self.monitor.sampled(self.sampler(self.engine.done, c, recipe, self.engine.weights()))

    def _save(self, cursors: Cursors) -> None:
        """The state as it is, unless that is saved."""
        self.keeper.finish()
        if self.engine.done > max(self.keeper.steps(), default=0):
            self.keeper.save(self._snapshot(cursors))

    def _snapshot(self, cursors: Cursors) -> Snapshot:
        """My part of all that a run needs to go on; the records before it are on the disk."""
        if self.monitor is not None:
            self.monitor.sync()
        job, done = self.job, self.engine.done
        cursor, counters = {of: c.to_dict() for of, c in cursors.items()}, {"job": job.identity(done)}
        return self.engine.snapshot(facts(job.model_after(done), cursor=cursor, counters=counters))
