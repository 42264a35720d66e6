"""The batches of a job, by step: each phase has its shards, each corpus its cursor.

Where a run is in its data is a cursor for every corpus it has begun, by fingerprint, so that phases that share one go on in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require, where
from refimpl.train.data import Batch, Cursor, Reader, Shards, load_tokenizer
from refimpl.train.recipe import Phase, Setting

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
        for p in job.run.phases:
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
        self._enough(job)

    def _enough(self, job: Job) -> None:
        """A job that would come to the end of its data says so before its first step."""
        if job.epochs is None:
            return
        taken: dict[str, int] = {}
        for s in map(job.run.at, range(len(job))):
            reader = self._readers[s.phase.name]
            of = reader.shards.fingerprint
            taken[of] = taken.get(of, 0) + s.batch
            end = reader.end or 0
            if taken[of] > end:
                rows = f"{reader.shards.folder} gives {end} sequences in {job.epochs} epochs"
                raise SpecError(
                    f"{rows}; the {len(job)} steps take more from step {s.step} on, in phase {s.phase.name!r}"
                )

    def take(self, s: Setting, cursors: Cursors) -> tuple[Batch, Cursors]:
        """A step's batch, whole, and where the run is after it."""
        reader = self._readers[s.phase.name]
        of = reader.shards.fingerprint
        batch, after = reader.take(cursors.get(of) or reader.start(), s.batch)
        return batch, {**cursors, of: after}

    def restored(self, saved: Mapping[str, Any], last: Phase | None) -> Cursors:
        """The cursors of a checkpoint whose last step was in phase `last` (None: no step yet). SpecError for those of other shards,
        of another order, or past the end.
        """
        found = {of: Cursor.from_dict(d) for of, d in saved.items()}
        readers = {r.shards.fingerprint: r for r in self._readers.values()}
        for of, cursor in found.items():
            if of in readers:
                readers[of].check(cursor)
        if last is not None:
            shards = self._readers[last.name].shards
            read = ", ".join(found) or "none"
            require(shards.fingerprint in found, f"{shards.folder} is {shards.fingerprint}; the run has read {read}")
        return found
