"""A language in which what a model remembers can be measured: assignments far back, and local structure on the way.

A text is filler, every token of which depends on the two before it (8 ids; the likeliest of three followers has 0.8), with a few
assignments "k = v" of 8 variables and 8 values (one token each, 64 ids) and many questions "k ?" (8 ids). What follows a
question is v of the last assignment of k: it is the label there, but not written in the text, where filler goes on; so a question
is answered from the assignment and from nothing else, however far back it is; an older assignment of the same variable is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

FILLER, VARIABLES, VALUES = 8, 8, 8
ASSIGN = FILLER
ASK = ASSIGN + VARIABLES * VALUES
ANSWER = ASK + VARIABLES
VOCABULARY = ANSWER + VALUES
ASSIGNMENTS, EVERY = 8, 5
"""Assignments of a text, however long; a question comes every so many tokens on average."""
_FOLLOWERS = np.random.default_rng(5).permuted(np.tile(np.arange(FILLER), (FILLER**2, 1)), axis=1)[:, :3]


def filler(rng: np.random.Generator, rows: int, length: int) -> Array:
    """Tokens (rows, length), each of which depends on the two before it."""
    x, chosen = rng.integers(0, FILLER, (rows, length)), rng.choice(3, size=(rows, length), p=[0.8, 0.15, 0.05])
    for t in range(2, length):
        x[:, t] = _FOLLOWERS[x[:, t - 2] * FILLER + x[:, t - 1], chosen[:, t]]
    return x


def texts(rng: np.random.Generator, rows: int, length: int) -> tuple[Array, Array, Array]:
    """Tokens, labels, which labels are answers; all (rows, length)."""
    tokens = filler(rng, rows, length)
    labels, answers = tokens.copy(), np.zeros(tokens.shape, bool)
    for x, y, asked in zip(tokens, labels, answers, strict=True):
        _write(rng, x, y, asked)
    return tokens, labels, answers


def _write(rng: np.random.Generator, x: Array, y: Array, asked: Array) -> None:
    """Assignments and questions into one text, at even places; the first of them is an assignment."""
    places = np.sort(rng.permutation(len(x) // 2)[: ASSIGNMENTS + len(x) // EVERY]) * 2
    assigns = np.zeros(len(places), bool)
    assigns[np.concatenate([[0], 1 + rng.permutation(len(places) - 1)[: ASSIGNMENTS - 1]])] = True
    now: dict[int, int] = {}
    for p, is_assignment in zip(places, assigns, strict=True):
        if is_assignment:
            k, v = int(rng.integers(VARIABLES)), int(rng.integers(VALUES))
            now[k], x[p] = v, ASSIGN + k * VALUES + v
        else:
            k = list(now)[rng.integers(len(now))]
            x[p], y[p + 1], asked[p + 1] = ASK + k, ANSWER + now[k], True
        y[p] = x[p]


def needles(rng: np.random.Generator, rows: int, length: int, depth: float) -> tuple[Array, Array]:
    """Texts (rows, length) whose last token asks for a variable that was assigned once, at `depth` of the way (0 is the beginning);
    the others of the usual assignments are of other variables, anywhere. -> tokens, answers (rows,).
    """
    tokens, answers = filler(rng, rows, length), np.zeros(rows, np.int64)
    at = round(depth * (length - 2))
    for r in range(rows):
        free = np.setdiff1d(np.arange(length - 1), [at])
        places = np.concatenate([[at], rng.permutation(free)[: ASSIGNMENTS - 1]])
        k, values = int(rng.integers(VARIABLES)), rng.integers(0, VALUES, ASSIGNMENTS)
        others = (k + rng.integers(1, VARIABLES, ASSIGNMENTS - 1)) % VARIABLES
        tokens[r, places] = ASSIGN + np.concatenate([[k], others]) * VALUES + values
        tokens[r, -1], answers[r] = ASK + k, ANSWER + values[0]
    return tokens, answers
