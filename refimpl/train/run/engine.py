"""What takes the steps of a run: a model with its optimiser, here on one rank (`on_mesh.py`: on many)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np

from refimpl.autograd import Array, data_of
from refimpl.layers.config import Config
from refimpl.layers.module import is_buffer
from refimpl.layers.stage import observing
from refimpl.model import ForCausalLM
from refimpl.train import memory
from refimpl.train.checkpoints import Saved, Snapshot, serial
from refimpl.train.data import Batch
from refimpl.train.ema import Ema
from refimpl.train.guard import guarded_step
from refimpl.train.recipe import Setting
from refimpl.train.tasks import Own, TaskBatch
from refimpl.train.tasks import step as task_step
from refimpl.train.training import Recipe, Report, State, init, parts

from .job import Job


class Engine(Protocol):
    """One rank's part of a model in training. A step that gives no number raises NotFinite and changes nothing."""

    @property
    def done(self) -> int:
        """Steps taken."""

    def step(self, c: Config, s: Setting, recipe: Recipe, batch: Batch) -> Report:
        """Take a step on a whole batch."""

    def evaluate(self, c: Config, recipe: Recipe, batch: Batch) -> dict[str, float]:
        """The parts of the loss on a whole batch; nothing is learned."""

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot:
        """All that is mine, for a checkpoint."""

    def biases(self) -> dict[str, Array]:
        """The balancing biases (E,) of my layers, by place ("L3")."""

    def weights(self) -> dict[str, Array]:
        """My masters by checkpoint name."""

    def close(self) -> None:
        """End what runs beside it."""


class Serial:
    """The whole model on one rank."""

    def __init__(self, job: Job, state: State, ema: Mapping[str, Array] | None = None, own: Own | None = None) -> None:
        self._job, self._state, self._own = job, state, own or Own()
        self._policies: dict[Any, memory.Policy | None] = {}
        decay = job.run.ema
        self._ema = None if decay is None else Ema(ema or state.weights, decay)

    @classmethod
    def start(cls, job: Job, saved: Saved | None) -> Serial:
        """From a checkpoint, or from new weights. SpecError for a checkpoint of another config."""
        if saved is None:
            return cls(job, State(init(job.model_after(0), seed=job.seed, std=job.run.optimizer.init_std)))
        found = serial.resume(saved, job.model_after(saved.step))
        return cls(job, found.state, found.ema, Own.found(saved))

    @property
    def done(self) -> int:
        """Steps taken."""
        return self._state.adam.t

    def step(self, c: Config, s: Setting, recipe: Recipe, batch: Batch) -> Report:
        """`memory.step`, or that of several tasks, watched for what is no number."""
        key = c, s.batch, s.sequence, bool(recipe.mtp_weight)
        if key not in self._policies:
            self._policies[key] = self._job.policy(c, s)
        how: dict[str, Any] = {"micro_batches": self._job.micro_batches(s.batch), "policy": self._policies[key]}
        own = self._own

        def tasks(c: Config, state: State, tokens: Array, recipe: Recipe, **_: Any) -> tuple[State, Report]:
            nonlocal own
            assert isinstance(batch, TaskBatch)
            state, own, report = task_step(c, state, own, batch, recipe, s.phase, **how)
            return state, report

        take = tasks if isinstance(batch, TaskBatch) else partial(memory.step, **how)
        alone = self._ema is None  # the average is added up in a thread, from the arrays as they are after this step
        found = guarded_step(c, self._state, recipe=recipe, take=take, in_place=alone, **batch.inputs())
        self._state, report = found
        self._own = own
        if self._ema is not None:
            self._ema.add(self._state.weights)
        return report

    def evaluate(self, c: Config, recipe: Recipe, batch: Batch) -> dict[str, float]:
        """One pass forward, without a tape."""
        model = ForCausalLM.from_weights(c, {n: recipe.plan.weight(n, w) for n, w in self._state.weights.items()})
        with observing(recipe.plan):
            out = model.forward_and_loss(model.inputs(**batch.inputs()), mtp_weight=recipe.mtp_weight)
        return {"loss": float(data_of(out.loss))} | parts(out.losses)

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot:
        """All of it."""
        all_but = serial.snapshot(self._state, facts, ema=None if self._ema is None else self._ema.value())
        return self._own.kept(all_but) if self._own.phase else all_but

    def biases(self) -> dict[str, Array]:
        """The balancing biases (E,) by place."""
        return places(self._state.weights)

    def weights(self) -> dict[str, Array]:
        """The masters."""
        return self._state.weights

    def close(self) -> None:
        """End the thread of the average."""
        if self._ema is not None:
            self._ema.__exit__(None, None, None)


def places(weights: Mapping[str, Array]) -> dict[str, Array]:
    """The balancing biases among weights, by place: model.layers.3.mlp.gate... -> "L3"."""
    return {f"L{n.split('.')[2]}": np.asarray(w) for n, w in weights.items() if is_buffer(n)}
