"""Batches of several tasks: each task's rows in an order of its own, by a cursor of its own, a fixed number of each in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.train.data import Batch, Cursor
from refimpl.train.data.reader import Ordered

from .samples import Rows


@dataclass(frozen=True, kw_only=True)
class TaskBatch(Batch):
    """A batch with the number of each row's task (B,), and targets (B, S): a number to be told at a position, or NaN."""

    task: Array
    targets: Array

    def inputs(self) -> dict[str, Array]:
        """As keyword arguments of the model's `inputs`."""
        return {name: a for name, a in super().inputs().items() if name not in ("task", "targets")}


@dataclass(frozen=True)
class TaskReader(Ordered):
    """The rows of task number `task` in the order of `seed`, another one in every epoch."""

    rows: Rows
    task: int
    seed: int = 0
    epochs: int | None = 1

    @property
    def corpus(self) -> Rows:
        """The rows."""
        return self.rows

    def take(self, cursor: Cursor, n: int) -> tuple[TaskBatch, Cursor]:
        """The next n rows, and the cursor after them."""
        which, after = self.following(cursor, n)
        return TaskBatch(task=np.full(len(which), self.task), **self.rows.filled(which)), after


def joined(parts: Sequence[Batch]) -> TaskBatch:
    """Batches of tasks one below the other."""
    return TaskBatch(**{name: np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0])})
