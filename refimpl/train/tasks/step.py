"""A training step on several tasks: L = sum_t w_t L_t + the MTP and balance losses of the whole batch.

L_t is a mean over the task's own labels in the batch, so a task with long answers does not outweigh one with short answers. MTP
modules learn from all answers alike. One clipping norm is over all gradients; what tasks have of their own (`Own`) is
trained by the same AdamW, with float32 moments and without weight decay, which would pull variances to 1 and heads to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array, Gradients, Parameter, data_of
from refimpl.layers.config import Config
from refimpl.layers.loss import IGNORE
from refimpl.model import Output
from refimpl.train import memory
from refimpl.train.optimizer import adamw, clip
from refimpl.train.recipe import Phase
from refimpl.train.shares import Share, terms
from refimpl.train.training import Recipe, Report, State, update

from . import own as names
from .losses import counted, cross_entropy, regression
from .own import Own
from .reader import TaskBatch
from .weighting import by_ratio, price, uncertain


def step(
    c: Config,
    state: State,
    own: Own,
    batch: TaskBatch,
    recipe: Recipe,
    phase: Phase,
    *,
    micro_batches: int = 1,
    policy: memory.Policy | None = None,
) -> tuple[State, Own, Report]:
    """Train on one batch of the phase's tasks -> the new state, what is the tasks' own, what was seen: `Report.parts` has each
    task's loss as "task.NAME", `Report.weights` the weight it had.
    """
    own = own.within(phase, c.hidden_size)
    leaves, grads = {n: Parameter(w) for n, w in own.weights.items()}, Gradients()
    aim = Objective(phase, batch, leaves, weights(own, phase), recipe.mtp_weight, len(batch.tokens) // micro_batches)
    loss, found, load, seen = memory.gradients(
        c, state, recipe=recipe, micro_batches=micro_batches, policy=policy, objective=aim, into=grads, **batch.inputs()
    )
    mine = {n: np.asarray(grads[w], np.float32) for n, w in leaves.items() if w in grads}
    clipped, norm = clip(found | mine, max_norm=recipe.max_norm)
    parts = {n: x for n, x in seen.items() if n != "main"} | {f"task.{n}": x for n, x in aim.losses.items()}
    new, report = update(
        c, state, loss, {n: clipped[n] for n in found}, load, replace(recipe, max_norm=math.inf), parts
    )
    opt = replace(recipe.opt, lr=recipe.opt.lr * recipe.schedule(state.adam.t), weight_decay=0.0, moments="fp32")
    trained, adam = adamw({n: own.weights[n] for n in mine}, {n: clipped[n] for n in mine}, own.adam, opt)
    adam = replace(adam, m={**own.adam.m, **adam.m}, v={**own.adam.v, **adam.v})
    history = own.history.added(list(aim.losses.values()), phase.weighting.window)
    after = replace(own, weights={**own.weights, **trained}, adam=adam, history=history)
    return new, after, replace(report, norm=norm, weights={n: float(data_of(w)) for n, w in aim.weights().items()})


def weights(own: Own, phase: Phase) -> dict[str, float] | None:
    """The weight of each task's loss in the next step; None where it is learned in the step."""
    by, tasks = phase.weighting, phase.tasks
    if by.by == "uncertainty":
        return None
    found = by_ratio(own.history, len(tasks), temperature=by.temperature) if by.by == "loss-ratio" else None
    return {t.name: t.weight if found is None else found[i] for i, t in enumerate(tasks)}


@dataclass
class Objective:
    """The loss of a batch, micro-batch by micro-batch of `size` rows; `losses` gathers each task's."""

    phase: Phase
    batch: TaskBatch
    leaves: Mapping[str, Any]
    given: Mapping[str, float] | None
    mtp_weight: float
    size: int
    losses: dict[str, float] = field(default_factory=dict)

    def weights(self) -> dict[str, Any]:
        """The weight of each task's loss, a function of its variance where that is learned."""
        if self.given is not None:
            return dict(self.given)
        return {t.name: uncertain(t.loss, s) for t, s in zip(self.phase.tasks, self._variances(), strict=True)}

    def __call__(self, i: int, out: Output, share: Share) -> Any:
        """What micro-batch i adds.  -> ()"""
        other = {name: part for name, part in out.losses.items() if name not in ("loss", "loss.main")}
        total = terms(other, share, self.mtp_weight)
        total = 0.0 if total is None else total
        if i == 0 and self.given is None:  # once a batch
            total = price(self._variances()) + total
        rows = slice(i * self.size, (i + 1) * self.size)
        for number, w in enumerate(self.weights().values()):
            loss = self._loss(number, rows, out)
            name = self.phase.tasks[number].name
            self.losses[name] = self.losses.get(name, 0.0) + float(data_of(loss))
            total = loss * w + total
        return total

    def _loss(self, number: int, rows: slice, out: Output) -> Any:
        """L_t of the task's rows among `rows`, over the labels that it has in the whole batch."""
        task, is_mine = self.phase.tasks[number], (self.batch.task == number)[:, None]
        labels, targets = self._only(is_mine)
        count = max(counted(labels, targets), 1)
        if task.loss == "cross-entropy":
            return cross_entropy(out.logits, labels[rows], count=count)
        w, b = self.leaves[names.weight(task.name)], self.leaves[names.bias(task.name)]
        return regression(out.hidden, targets[rows], w, b, count=count)

    def _only(self, is_mine: Array) -> tuple[Array, Array]:
        return np.where(is_mine, self.batch.labels, IGNORE), np.where(is_mine, self.batch.targets, np.nan)

    def _variances(self) -> list[Any]:
        return [self.leaves[names.log_variance(t.name)][0] for t in self.phase.tasks]
