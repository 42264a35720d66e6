"""Gradient accumulation: the gradients of a large batch from micro-batches, one graph alive at a time.

Each part of the loss by its own share of the batch (`refimpl.train.shares`). Expert loads are counted over the whole batch,
so the bias moves once. In the same order of sums (micro-batches in turn, as a pipeline or one rank of a mesh adds them) the
bits are the same; against one pass over the large batch the order within a product differs, and under FP8 also the groups
that share a scale in Wgrad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.autograd import Array, Gradients, backward, data_of, require
from refimpl.layers.config import Config
from refimpl.layers.stage import observing
from refimpl.model import ForCausalLM, Inputs, Output
from refimpl.train.shares import Share, shared, shares
from refimpl.train.training import Found, Recipe, Report, State, loads, named, parts, update

from .policies import Frugal, Policy

Objective = Callable[[int, Output, Share], Any]
"""Number of a micro-batch, what the model gave, its shares -> what it adds to the loss of the whole batch ()."""


def step(
    c: Config,
    state: State,
    tokens: Array,
    recipe: Recipe,
    *,
    micro_batches: int = 1,
    labels: Array | None = None,
    valid: Array | None = None,
    documents: Array | None = None,
    policy: Policy | None = None,
    in_place: bool = False,
) -> tuple[State, Report]:
    """`refimpl.train.step` on tokens (B, S) in micro-batches of B / micro_batches sequences, and under a memory policy.

    `labels` (B, S): by default the tokens; IGNORE (-100) does not count. `valid`, `documents` as there. SpecError unless B
    divides.
    """
    loss, grads, load, seen = gradients(
        c,
        state,
        tokens,
        recipe,
        micro_batches=micro_batches,
        labels=labels,
        valid=valid,
        documents=documents,
        policy=policy,
    )
    return update(c, state, loss, grads, load, recipe, seen, in_place=in_place)


def gradients(
    c: Config,
    state: State,
    tokens: Array,
    recipe: Recipe,
    *,
    micro_batches: int = 1,
    labels: Array | None = None,
    valid: Array | None = None,
    documents: Array | None = None,
    policy: Policy | None = None,
    objective: Objective | None = None,
    into: Gradients | None = None,
    scale: float = 1.0,
) -> Found:
    """What a step updates by, as `training.gradients`; `objective`: another loss than V3's, whose own leaves' gradients are added
    to `into`.
    """
    require(
        micro_batches >= 1 and len(tokens) % micro_batches == 0,
        f"{len(tokens)} sequences do not divide among {micro_batches} micro-batches",
    )
    held = {n: recipe.plan.weight(n, w) for n, w in state.weights.items()}
    model = ForCausalLM.from_weights(c, held).with_gradients()
    if policy is not None:
        policy.check(c)
        model = Frugal.from_weights(c, dict(_given(model))).following(policy, recipe.plan)
    rows = {"labels": tokens if labels is None else labels, "valid": valid, "documents": documents}
    batches = [
        model.inputs(tokens[i], **{name: x[i] for name, x in rows.items() if x is not None})
        for i in np.split(np.arange(len(tokens)), micro_batches)
    ]
    loss, grads, load, seen = accumulate(model, batches, recipe, objective, into, scale)
    return loss, named(model, grads), load, seen


def _given(model: ForCausalLM) -> list[tuple[str, Any]]:
    return [(n, w) for n, w in model.named_weights() if hasattr(w, "dtype")]


def accumulate(
    model: ForCausalLM,
    batches: Sequence[Inputs],
    recipe: Recipe,
    objective: Objective | None = None,
    into: Gradients | None = None,
    scale: float = 1.0,
) -> tuple[float, Gradients, dict[str, Array], dict[str, float]]:
    """Loss of all micro-batches together, the gradients of `scale` times it by leaf, tokens per expert by layer, the loss's parts.
    SpecError without labels.
    """
    require(batches, "no micro-batch")
    labels = [b.labels for b in batches if b.labels is not None]
    require(len(labels) == len(batches), "accumulation needs labels: model.inputs(tokens, labels=...)")
    total, grads, load, seen = 0.0, Gradients() if into is None else into, dict[str, Array](), dict[str, float]()
    for i, (inputs, share) in enumerate(zip(batches, shares(model.config, labels, model.n_mtp), strict=True)):
        with observing(recipe.plan):
            out = model.forward_and_loss(inputs, mtp_weight=recipe.mtp_weight, aux_weight=recipe.aux_weight)
        loss = shared(out.loss, out.losses, share, recipe.mtp_weight) if objective is None else objective(i, out, share)
        for name, part in parts(out.losses).items():
            seen[name] = seen.get(name, 0.0) + part * share[name]
        for at, counted in loads(model.config, out.routing).items():
            load[at] = load[at] + counted if at in load else counted
        del out  # logits and hidden states: backward needs none of them
        total += float(data_of(loss))
        backward(loss, np.full_like(data_of(loss), scale), into=grads)
    return total, grads, load, seen
