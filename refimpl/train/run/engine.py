"""What takes the steps of a run: a model with its optimiser, here on one rank (`on_mesh.py`: on many)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from refimpl.autograd import Array, data_of
from refimpl.layers.config import Config
from refimpl.layers.module import is_buffer
from refimpl.layers.neighbours import LossScale
from refimpl.layers.stage import observing
from refimpl.model import ForCausalLM
from refimpl.train import loss_scale, memory
from refimpl.train.checkpoints import Saved, Snapshot, serial
from refimpl.train.data import Batch
from refimpl.train.ema import Ema
from refimpl.train.guard import guarded_step
from refimpl.train.recipe import Phase, Setting
from refimpl.train.tasks import Own, TaskBatch
from refimpl.train.tasks import step as task_step
from refimpl.train.training import Recipe, Report, State, parts

from .beginning import beginning
from .job import Job

SCALE = "loss_scale"
"""Of the counters in a checkpoint."""


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


@dataclass
class Beside:
    """What a run on one rank has beside its state: what is the tasks' own, the scale of FP16."""

    own: Own
    scale: LossScale | None

    @classmethod
    def new(cls, job: Job) -> Beside:
        """That of a run that begins."""
        first = job.run.optimizer.loss_scale
        return cls(Own(), None if first is None else LossScale(first))

    @classmethod
    def found(cls, job: Job, saved: Saved) -> Beside:
        """That of a checkpoint."""
        told = saved.facts["counters"].get(SCALE)
        return cls(Own.found(saved), LossScale(**told)) if told else replace(cls.new(job), own=Own.found(saved))

    def kept(self, s: Snapshot) -> Snapshot:
        """A snapshot with all of it."""
        s = self.own.kept(s) if self.own.phase else s
        told = {} if self.scale is None else {SCALE: asdict(self.scale)}
        return replace(s, facts={**s.facts, "counters": {**s.facts["counters"], **told}})

    def stepping(self, batch: Batch, phase: Phase, how: Mapping[str, Any]) -> Callable[..., tuple[State, Report]]:
        """The step on such a batch, as `guarded_step` takes it; it changes me."""

        def scaled(c: Config, state: State, tokens: Array, recipe: Recipe, **rows: Any) -> tuple[State, Report]:
            assert self.scale is not None
            found = partial(memory.gradients, **how)
            new, self.scale, report = loss_scale.until_finite(c, state, self.scale, tokens, recipe, found=found, **rows)
            return new, report

        def tasks(c: Config, state: State, tokens: Array, recipe: Recipe, **_: Any) -> tuple[State, Report]:
            assert isinstance(batch, TaskBatch)
            new, self.own, report = task_step(c, state, self.own, batch, recipe, phase, **how)
            return new, report

        if isinstance(batch, TaskBatch):
            return tasks
        return partial(memory.step, **how) if self.scale is None else scaled


class Serial:
    """The whole model on one rank."""

    def __init__(
        self, job: Job, state: State, ema: Mapping[str, Array] | None = None, beside: Beside | None = None
    ) -> None:
        self._job, self._state, self._beside = job, state, beside or Beside.new(job)
        self._policies: dict[Any, memory.Policy | None] = {}
        decay = job.run.ema
        self._ema = None if decay is None else Ema(ema or state.weights, decay)

    @classmethod
    def start(cls, job: Job, saved: Saved | None) -> Serial:
        """From a checkpoint, or from new weights. SpecError for a checkpoint of another config."""
        if saved is None:
            return cls(job, State(beginning(job)))
        found = serial.resume(saved, job.model_after(saved.step))
        return cls(job, found.state, found.ema, Beside.found(job, saved))

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
        after = replace(self._beside)
        take = after.stepping(batch, s.phase, how)
        alone = self._ema is None  # the average is added up in a thread, from the arrays as they are after this step
        found = guarded_step(c, self._state, recipe=recipe, take=take, in_place=alone, **batch.inputs())
        self._state, report = found
        self._beside = after
        if self._ema is not None:
            self._ema.add(self._state.weights)
        return report

    def evaluate(self, c: Config, recipe: Recipe, batch: Batch) -> dict[str, float]:
        """One pass forward, without a tape."""
        model = ForCausalLM.from_weights(c, {n: recipe.plan.weight(n, w) for n, w in self._state.weights.items()})
        with observing(recipe.plan), np.errstate(over="ignore"):
            out = model.forward_and_loss(model.inputs(**batch.inputs()), mtp_weight=recipe.mtp_weight)
        return {"loss": float(data_of(out.loss))} | parts(out.losses)

    def snapshot(self, facts: Mapping[str, Any]) -> Snapshot:
        """All of it."""
        ema = None if self._ema is None else self._ema.value()
        return self._beside.kept(serial.snapshot(self._state, facts, ema=ema))

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
