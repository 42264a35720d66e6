"""Gradient accumulation: the gradients of a large batch from micro-batches, one graph alive at a time.

The parts of the loss are means over different things, so a micro-batch's part counts with its share of just that:

| part | mean over | share of a micro-batch |
|---|---|---|
| loss.main | labels that count (main) | its labels / all labels |
| loss.mtpK, `mtp_loss_mean` "length" (R eq 24) | the main labels too | the same |
| loss.mtpK, "valid" | labels that count at depth K | its labels at depth K / all of them |
| loss.seq_aux (R eq 17) | sequences | its sequences / all sequences |

Weighting all parts by tokens, or averaging micro-batches, is right only where every micro-batch has equally many of
each: with padding or answers-only labels it is another loss. Expert loads are counted over the whole batch, so the bias moves
once. In the same order of sums (micro-batches in turn, as a pipeline or one rank of a mesh adds them) the bits are the
same; against one pass over the large batch the order within a product differs, and under FP8 also the groups that share
a scale in Wgrad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.autograd import Array, Gradients, backward, data_of, require
from refimpl.layers.config import Config
from refimpl.layers.loss import IGNORE
from refimpl.layers.stage import observing
from refimpl.model import ForCausalLM, Inputs, Output
from refimpl.train.training import Recipe, Report, State, loads, named, update

from .policies import Frugal, Policy


def step(
    c: Config,
    state: State,
    tokens: Array,
    recipe: Recipe,
    *,
    micro_batches: int = 1,
    labels: Array | None = None,
    policy: Policy | None = None,
    in_place: bool = False,
) -> tuple[State, Report]:
    """`refimpl.train.step` on tokens (B, S) in micro-batches of B / micro_batches sequences, and under a memory policy.

    `labels` (B, S): by default the tokens; IGNORE (-100) does not count. SpecError unless B divides.
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
    labels = tokens if labels is None else labels
    parts = np.split(np.arange(len(tokens)), micro_batches)
    batches = [model.inputs(tokens[i], labels=labels[i]) for i in parts]
    loss, grads, load = accumulate(model, batches, recipe)
    return update(c, state, loss, named(model, grads), load, recipe, in_place=in_place)


def _given(model: ForCausalLM) -> list[tuple[str, Any]]:
    return [(n, w) for n, w in model.named_weights() if hasattr(w, "dtype")]


def accumulate(
    model: ForCausalLM, batches: Sequence[Inputs], recipe: Recipe
) -> tuple[float, Gradients, dict[str, Array]]:
    """Loss of all micro-batches together, its gradients by leaf, tokens per expert by layer. SpecError without labels."""
    require(batches, "no micro-batch")
    total, grads, load = 0.0, Gradients(), dict[str, Array]()
    counts = [_counts(b, model.n_mtp) for b in batches]
    whole = {key: max(sum([n[key] for n in counts]), 1) for key in counts[0]}
    for inputs, n in zip(batches, counts, strict=True):
        with observing(recipe.plan):
            out = model.forward_and_loss(inputs, mtp_weight=recipe.mtp_weight, aux_weight=recipe.aux_weight)
        loss = _share(out, {key: n[key] / whole[key] for key in n}, model, recipe)
        for at, seen in loads(model.config, out.routing).items():
            load[at] = load[at] + seen if at in load else seen
        del out  # logits and hidden states: backward needs none of them
        total += float(data_of(loss))
        backward(loss, into=grads)
    return total, grads, load


def _counts(inputs: Inputs, depths: int) -> dict[str, int]:
    """What the parts of the loss are means over: labels at every depth (0: main), sequences."""
    require(inputs.labels is not None, "accumulation needs labels: model.inputs(tokens, labels=...)")
    assert inputs.labels is not None
    labels = inputs.labels
    found = {f"labels{k}": int(np.sum(labels[:, k + 1 :] != IGNORE)) for k in range(depths + 1)}
    return found | {"sequences": len(labels)}


def _share(out: Output, share: dict[str, float], model: ForCausalLM, recipe: Recipe) -> Any:
    """What a micro-batch adds to the loss of the whole batch ()."""
    if len(set(share.values())) == 1:
        return out.loss * share["labels0"]
    valid = model.config.dialect.mtp_loss_mean == "valid"
    heads = [name for name in out.losses if name.startswith("loss.mtp")]
    loss = out.losses["loss.main"] * share["labels0"]
    for name, part in out.losses.items():
        if name in heads:
            depth = name.removeprefix("loss.mtp") if valid else "0"
            loss = loss + part * (share[f"labels{depth}"] * recipe.mtp_weight / len(heads))
        elif name.endswith("loss.seq_aux"):
            loss = loss + part * share["sequences"]
    return loss
