"""A toy to post-train: pairs of symbols, to be copied or reversed as the token before them says; a model learns it in seconds."""

import functools
from dataclasses import replace

import numpy as np

from refimpl.layers.precision import FLOAT32
from refimpl.layers.presets import TINY
from refimpl.train import AdamW, Recipe, State, init, step
from refimpl.train.post.examples import Example, one_a_row
from refimpl.train.post.likelihood import counted, logits_of
from refimpl.train.post.sft import cosine

SYMBOLS = 8
COPY, REVERSE, PLAIN = 8, 9, 10
TOY = TINY.replace(
    vocab_size=12,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    num_nextn_predict_layers=0,
)
RECIPE = Recipe(plan=FLOAT32, opt=AdamW(lr=1e-2, weight_decay=0.0), gamma=0.0)


def example(task, x, y, front=None):
    """[task or what stands in for it, x, y] -> x y, or y x."""
    return Example([task if front is None else front, x, y], [x, y] if task == COPY else [y, x])


def some(task, n, rng, front=None):
    """n random examples of a task."""
    return [example(task, *rng.integers(0, SYMBOLS, 2).tolist(), front=front) for _ in range(n)]


def every(task, front=None):
    """All pairs."""
    return [example(task, x, y, front=front) for x in range(SYMBOLS) for y in range(SYMBOLS)]


def accuracy(weights, examples, c=TOY, logits=logits_of):
    """The share of answers whose every token is the likeliest."""
    batch = one_a_row(examples)
    right = np.argmax(logits(c, weights, batch)[:, :-1], axis=-1) == batch.labels[:, 1:]
    return float((right | ~counted(batch.labels)).all(axis=1).mean())


def fine_tune(weights, batches, recipe=RECIPE, c=TOY):
    """Weights after a step on each list of examples."""
    state = State(weights)
    for examples in batches:
        state, _ = step(c, state, recipe=recipe, **one_a_row(examples).inputs())
    return state.weights


@functools.cache
def both(steps=160):
    """Weights that copy after COPY and reverse after REVERSE; share, do not change."""
    rng, falling = np.random.default_rng(0), replace(RECIPE, schedule=cosine(steps, end=0.1))
    return fine_tune(init(TOY, std=0.1), [some(COPY, 16, rng) + some(REVERSE, 16, rng) for _ in range(steps)], falling)
