"""One round of GRPO: sample a group of answers to every prompt, reward them, take steps (R 5.2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, Parameter
from refimpl.infer import Settings
from refimpl.layers.config import Config
from refimpl.layers.precision import Plan
from refimpl.layers.stage import observing
from refimpl.train.data import Batch
from refimpl.train.training import Recipe, Report, State, step_on

from . import grpo
from .examples import one_a_row
from .likelihood import counted, logits_of, token_logp
from .rewards import Reward
from .sampling import sample


@dataclass(frozen=True)
class Sampled:
    """P groups of G answers as P G rows, group by group: rewards (P, G), and the log-probabilities (P G, S-1) that the sampling
    policy and the reference (None: no KL term) gave to their tokens.
    """

    batch: Batch
    rewards: Array
    old: Array
    reference: Array | None


def rollout(
    c: Config,
    state: State,
    reference: Mapping[str, Array] | None,
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    settings: Settings,
    *,
    group: int,
    plan: Plan,
) -> Sampled:
    """`group` answers to each prompt, sampled as `settings` say, and what the losses need to know of them. With the plan of the
    training steps the first ratio is 1, bit for bit.
    """
    require(group >= 2, f"a group of {group}: an answer is judged by the others to its prompt")
    examples = sample(c, state.weights, [p for p in prompts for _ in range(group)], settings, plan=plan)
    rewards = np.array([reward(e.prompt, e.answer) for e in examples], np.float64).reshape(len(prompts), group)
    batch = one_a_row(examples)
    old = known_logp(c, state.weights, batch, plan)
    return Sampled(batch, rewards, old, None if reference is None else known_logp(c, reference, batch, plan))


def known_logp(c: Config, weights: Mapping[str, Array], batch: Batch, plan: Plan) -> Array:
    """log p of the labels under fixed weights.  batch (B, S) -> (B, S-1), 0 where nothing counts."""
    with observing(plan):
        logits = logits_of(c, {n: plan.weight(n, w) for n, w in weights.items()}, batch)
        return token_logp(logits, batch.labels)


def update(
    c: Config, state: State, seen: Sampled, recipe: Recipe, *, variant: grpo.Variant = grpo.V3
) -> tuple[State, Report]:
    """A step on what was sampled; several steps may follow one rollout, then the ratio leaves 1."""
    labels = seen.batch.labels
    advantage = grpo.advantages(seen.rewards, scaled=variant.scaled).reshape(-1)

    def objective(leaves: dict[str, Parameter]) -> object:
        logp = token_logp(logits_of(c, state.weights | leaves, seen.batch), labels)
        reference = seen.reference if variant.beta else None
        return grpo.loss(logp, seen.old, reference, counted(labels), advantage, variant=variant)

    return step_on(state, objective, recipe)
