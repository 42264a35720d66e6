"""The loss on held-out shards: the same rows every time, no gradient, nothing learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.layers.config import Config
from refimpl.train.data import Batch, Reader, Shards
from refimpl.train.shares import shares
from refimpl.train.training import Recipe

from .engine import Engine
from .job import Job


class Evaluator:
    """The first rows of the job's held-out shards, in the order of seed 0. SpecError for another tokenizer's, or too few."""

    def __init__(self, job: Job, tokenizer: str | None) -> None:
        self._batches: list[Batch] = []
        self.every = 0
        if job.evaluation is None:
            return
        e, self.every = job.evaluation, job.evaluation.every
        with where("in [evaluation]"):
            held = Shards(e.shards, tokenizer=tokenizer, vocab_size=job.config.vocab_size)
            require(len(held) >= e.sequences, f"{e.shards} has {len(held)} rows; sequences is {e.sequences}")
            require(e.sequences % e.batch == 0, f"{e.sequences} sequences are no batches of {e.batch}")
        reader = Reader(held, masked=job.run.phases[0].masked)
        cursor = reader.start()
        while cursor.samples < e.sequences:
            batch, cursor = reader.take(cursor, e.batch)
            self._batches.append(batch)

    def due(self, done: int, end: int) -> bool:
        """Whether a step is one after which it is asked for."""
        return bool(self._batches) and (done % self.every == 0 or done == end)

    def __call__(self, engine: Engine, c: Config, recipe: Recipe) -> dict[str, float]:
        """eval/main, eval/mtp1, ...: each part's mean over all that it is a mean over (`shares.py`)."""
        depths = c.num_nextn_predict_layers if recipe.mtp_weight else 0
        each = shares(c, [np.asarray(b.labels) for b in self._batches], depths)
        found: dict[str, float] = {}
        for batch, share in zip(self._batches, each, strict=True):
            parts: Mapping[str, float] = engine.evaluate(c, recipe, batch)
            for name in share.keys() & parts.keys() - {"balance"}:
                found[f"eval/{name}"] = found.get(f"eval/{name}", 0.0) + parts[name] * share[name]
        return dict(sorted(found.items()))
