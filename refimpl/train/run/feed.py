"""The batches of a job, by step: each phase has its shards, or the samples of its tasks, and each corpus its cursor.

Where a run is in its data is a cursor for every corpus it has begun, by fingerprint, so that phases that share one go on in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require, where
from refimpl.train.data import Batch, Cursor, Reader, Shards, load_tokenizer
from refimpl.train.data.tokenizer import PAD
from refimpl.train.recipe import Phase, Setting, divided
from refimpl.train.tasks import Rows, TaskReader, joined, samples

from .job import Job

Cursors = Mapping[str, Cursor]
"""Fingerprint of shards -> where a run is in them."""


class Feed:
    """The shards of a job, opened and checked. SpecError for those of another tokenizer, of other lengths than the phase's
    sequences, or with fewer rows than the job takes in its epochs.
    """

    def __init__(self, job: Job) -> None:
        made = None if job.tokenizer is None else load_tokenizer(job.tokenizer).fingerprint
        self._readers: dict[str, Reader] = {}
        opened: dict[Path, Shards] = {}
        for p in [p for p in job.run.phases if not p.tasks]:
            with where(f"in phase {p.name!r}"):
                folder = job.shards[p.name]
                if folder not in opened:
                    opened[folder] = Shards(folder, tokenizer=made, vocab_size=job.config.vocab_size)
                    made = opened[folder].tokenizer  # that of all phases
                shards = opened[folder]
                fits = shards.length == p.sequence
                require(fits, f"{folder} has rows of {shards.length} tokens, the phase sequences of {p.sequence}")
                self._readers[p.name] = Reader(shards, job.seed, job.epochs, p.masked)
        self.tokenizer = made
        self._tasks = {p.name: task_readers(job, p, made) for p in job.run.phases if p.tasks}
        self._enough(job)

    def _enough(self, job: Job) -> None:
        """A job that would come to the end of its data says so before its first step."""
        if job.epochs is None:
            return
        taken: dict[str, int] = {}
        for s in map(job.run.at, range(len(job))):
            for reader, n in self._parts(s):
                of, end = reader.corpus.fingerprint, reader.end or 0
                taken[of] = taken.get(of, 0) + n
                if taken[of] > end:
                    rows = f"{reader.corpus.source} gives {end} sequences in {job.epochs} epochs"
                    raise SpecError(
                        f"{rows}; the {len(job)} steps take more from step {s.step} on, in phase {s.phase.name!r}"
                    )

    def _parts(self, s: Setting) -> list[tuple[Reader | TaskReader, int]]:
        """From which readers a step's batch comes, and how many rows of each."""
        tasks = s.phase.tasks
        if not tasks:
            return [(self._readers[s.phase.name], s.batch)]
        return list(zip(self._tasks[s.phase.name], divided(s.batch, [t.share for t in tasks]), strict=True))

    def take(self, s: Setting, cursors: Cursors) -> tuple[Batch, Cursors]:
        """A step's batch, whole, and where the run is after it."""
        found: list[Batch] = []
        for reader, n in self._parts(s):
            of = reader.corpus.fingerprint
            batch, after = reader.take(cursors.get(of) or reader.start(), n)
            cursors = {**cursors, of: after}
            found.append(batch)
        return joined(found) if s.phase.tasks else found[0], cursors

    def restored(self, saved: Mapping[str, Any], last: Phase | None) -> Cursors:
        """The cursors of a checkpoint whose last step was in phase `last` (None: no step yet). SpecError for those of other shards,
        of another order, or past the end.
        """
        found = {of: Cursor.from_dict(d) for of, d in saved.items()}
        every: list[Reader | TaskReader] = [
            *self._readers.values(),
            *[r for some in self._tasks.values() for r in some],
        ]
        readers = {r.corpus.fingerprint: r for r in every}
        for of, cursor in found.items():
            if of in readers:
                readers[of].check(cursor)
        if last is not None:
            read = ", ".join(found) or "none"
            for r in self._tasks[last.name] if last.tasks else [self._readers[last.name]]:
                of = r.corpus.fingerprint
                require(of in found, f"{r.corpus.source} is {of}; the run has read {read}")
        return found


def task_readers(job: Job, p: Phase, made: str | None) -> list[TaskReader]:
    """A reader for each task of a phase, in their order; `made`: the tokenizer of the job's shards, by fingerprint."""
    with where(f"in phase {p.name!r}"):
        tokenizer = load_tokenizer(job.known_tokenizer(made, "tasks"))
        size, most = tokenizer.vocab_size, job.config.vocab_size
        require(size <= most, f"the tokenizer has {size} ids; the model has only {most}")
        readers = []
        for number, t in enumerate(p.tasks):
            path = job.tasks[t.name]
            rows = Rows(samples(path, t, tokenizer), p.sequence, t.masked, tokenizer.ids[PAD], str(path))
            readers.append(TaskReader(rows, number, job.seed, job.epochs))
        return readers
