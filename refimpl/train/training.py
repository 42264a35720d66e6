"""One training step, end to end (R 4.2): forward and backward under a precision plan, clipping, AdamW on float32 masters, and the
balancing bias moved by the batch's expert loads (R 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, Gradients, Parameter, backward, data_of
from refimpl.layers.config import Config
from refimpl.layers.module import is_buffer
from refimpl.layers.precision import BF16, Plan
from refimpl.layers.router import Routing, bias_update, counts
from refimpl.layers.stage import observing, phase, unit
from refimpl.model import ForCausalLM, expected_tensors

from .in_place import adamw_over
from .optimizer import AdamState, AdamW, adamw, clipping, global_norm, scaled
from .shares import part_of

Found = tuple[float, dict[str, Array], dict[str, Array], dict[str, float]]
"""Loss, gradients by checkpoint name, tokens per expert by layer, parts of the loss."""


def constant(step: int) -> float:
    """1 at every step."""
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """`schedule`: factor of `opt.lr` by step, from 0; gamma moves the bias; mtp_weight is lambda, aux_weight alpha (R 4.2).
    `loss_scale`, which V3 has not: the scale that a run under `loss_scale.step` begins with.
    """

    plan: Plan = BF16
    opt: AdamW = field(default_factory=AdamW)
    schedule: Callable[[int], float] = constant
    max_norm: float = 1.0
    gamma: float = 1e-3
    mtp_weight: float = 0.0
    aux_weight: float = 0.0
    loss_scale: float | None = None


@dataclass(frozen=True)
class State:
    """float32 master weights by checkpoint name (buffers too), and the optimiser's moments."""

    weights: dict[str, Array]
    adam: AdamState = field(default_factory=AdamState)


@dataclass(frozen=True)
class Report:
    """What a step saw: the loss before its update, the gradient norm before clipping, tokens per expert by layer, and what the loss
    is made of, before lambda: "main", "mtp1", ..., and "balance", alpha and all layers in it. `weights`: of tasks (`train.tasks`);
    `loss_scale`: the one that it took under FP16.
    """

    step: int
    loss: float
    norm: float
    load: dict[str, Array]
    parts: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    loss_scale: float | None = None


def init(c: Config, *, seed: int = 0, std: float = 0.006) -> dict[str, Array]:
    """Weights of a new model: normal with standard deviation `std` (R 4.2), norms 1, bias 0. MTP only if the config has it."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in expected_tensors(c).items():
        if len(shape) > 1:
            weights[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
        else:
            weights[name] = np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
    return weights


def step(
    c: Config,
    state: State,
    tokens: Array,
    recipe: Recipe,
    *,
    labels: Array | None = None,
    valid: Array | None = None,
    documents: Array | None = None,
    in_place: bool = False,
) -> tuple[State, Report]:
    """Train on one batch, tokens (B, S): each predicts the next, or what `labels` has there (-100: nothing). `valid` is 0 for
    padding, attention stays inside `documents` (all as the model's inputs). -> the new state, what was seen.

    `in_place`: the same bits, written over the state that was given, in half the memory. A step whose loss or gradient norm
    is no number changes nothing then, and the state comes back as it was.
    """
    loss, grads, load, seen = gradients(c, state, tokens, recipe, labels=labels, valid=valid, documents=documents)
    return update(c, state, loss, grads, load, recipe, seen, in_place=in_place)


def gradients(
    c: Config,
    state: State,
    tokens: Array,
    recipe: Recipe,
    *,
    labels: Array | None = None,
    valid: Array | None = None,
    documents: Array | None = None,
    scale: float = 1.0,
) -> Found:
    """What a step updates by: the loss, the gradients of `scale` times the loss, tokens per expert by layer, the loss's parts.
    Inputs as `step`.
    """
    held = {n: recipe.plan.weight(n, w) for n, w in state.weights.items()}
    model = ForCausalLM.from_weights(c, held).with_gradients()
    inputs = model.inputs(tokens, labels=tokens if labels is None else labels, valid=valid, documents=documents)
    with observing(recipe.plan):
        out = model.forward_and_loss(inputs, mtp_weight=recipe.mtp_weight, aux_weight=recipe.aux_weight)
    loss, load, seen = out.loss, loads(c, out.routing), parts(out.losses)
    del out  # logits and hidden states: backward needs none of them
    return float(data_of(loss)), named(model, backward(loss, np.full_like(data_of(loss), scale))), load, seen


def parts(losses: Mapping[str, Any]) -> dict[str, float]:
    """What a model's `losses` are made of, as `Report.parts` names it."""
    found = dict[str, float]()
    for name, loss in losses.items():
        if name != "loss":
            part = part_of(name)
            found[part] = found.get(part, 0.0) + float(data_of(loss))
    return found


def loads(c: Config, routing: Mapping[str, Routing]) -> dict[str, Array]:
    """Layer -> tokens (E,) that each of its experts received."""
    with phase("upd"):
        return {at: counts.fn(r.ids, n_experts=c.n_routed_experts) for at, r in routing.items()}


def named(model: ForCausalLM, grads: Gradients) -> dict[str, Array]:
    """Gradients in float32 by checkpoint name, of the weights that the loss reaches."""
    leaves = [(n, w) for n, w in model.named_weights() if isinstance(w, Parameter)]
    return {n: grads[w].astype(np.float32, copy=False) for n, w in leaves if w in grads}


def update(
    c: Config,
    state: State,
    loss: float,
    grads: dict[str, Array],
    load: dict[str, Array],
    recipe: Recipe,
    parts: Mapping[str, float],
    *,
    in_place: bool = False,
) -> tuple[State, Report]:
    """Clip, AdamW on the masters, bias by load: what a step does with its gradients. -> the new state, what was seen."""
    norm = global_norm(grads)
    if in_place and not (np.isfinite(loss) and np.isfinite(norm)):
        return state, Report(state.adam.t + 1, loss, norm, load, parts)
    state = descend(state, grads, recipe, norm, in_place=in_place)
    weights = dict(state.weights)
    with phase("upd"):
        for place, n in load.items():
            name = f"model.layers.{place[1:]}.mlp.gate.e_score_correction_bias"
            if name in weights and recipe.gamma:
                zero_sum = c.dialect.bias_update == "zero_sum"
                with unit(place):
                    weights[name] = bias_update(weights[name], n, gamma=recipe.gamma, zero_sum=zero_sum)
    return replace(state, weights=weights), Report(state.adam.t, loss, norm, load, parts)


def check_unscaled(recipe: Recipe) -> None:
    """SpecError where a recipe asks for a loss scale: without it, small FP16 gradients are zero and nobody is told."""
    require(recipe.loss_scale is None, "this recipe trains under a loss scale: step by refimpl.train.loss_scale.step")


def descend(state: State, grads: dict[str, Array], recipe: Recipe, norm: float, *, in_place: bool = False) -> State:
    """Clip gradients of this norm, AdamW on the masters that have one -> the new state. SpecError where the recipe asks for a
    loss scale, which only `loss_scale.step` keeps.
    """
    check_unscaled(recipe)
    opt = replace(recipe.opt, lr=recipe.opt.lr * recipe.schedule(state.adam.t))
    masters, scale = {n: state.weights[n] for n in grads}, clipping(norm, recipe.max_norm)
    if in_place:
        trained, adam = adamw_over(masters, grads, state.adam, opt, scale=scale)
    else:
        trained, adam = adamw(masters, scaled(grads, scale), state.adam, opt)
    return State(state.weights | trained, adam)


def step_on(state: State, objective: Callable[[dict[str, Parameter]], Any], recipe: Recipe) -> tuple[State, Report]:
    """One step down any objective: a function of all of `state.weights`, as leaves by name, that gives a loss (). For what `step`
    does not train: other losses, adapters beside frozen weights. Balancing biases stay where they are.
    """
    leaves = {n: Parameter(recipe.plan.weight(n, w)) for n, w in state.weights.items() if not is_buffer(n)}
    with observing(recipe.plan):
        loss = objective(leaves)
    grads = backward(loss)
    found = {n: grads[w].astype(np.float32, copy=False) for n, w in leaves.items() if w in grads}
    norm = global_norm(found)
    state = descend(state, found, recipe, norm)
    return state, Report(state.adam.t, float(data_of(loss)), norm, {})


def train(
    c: Config, weights: dict[str, Array], batches: Iterable[Array], recipe: Recipe
) -> Iterator[tuple[State, Report]]:
    """Step through batches of tokens (B, S); yields after every step, so stopping between two loses nothing."""
    state = State(weights)
    for tokens in batches:
        state, report = step(c, state, tokens, recipe)
        yield state, report


def text_batches(text: bytes, *, batch: int, length: int, steps: int, seed: int = 0) -> Iterator[Array]:
    """`steps` batches of random windows of a text, one token per byte -> (B, S) int."""
    data, rng = np.frombuffer(text, np.uint8).astype(np.int64), np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(0, len(data) - length, batch)
        yield data[starts[:, None] + np.arange(length)]
