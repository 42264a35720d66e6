"""Prompts with answers as batches in which only the answers are labels (R 5.1: supervised fine-tuning).

A row holds one example and padding, or several, packed; then each sees only itself ("sample masking", R 5.1: "ensure that these
examples remain isolated and mutually invisible").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.layers.loss import IGNORE
from refimpl.train.data import Batch, best_fit


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, which is given, and of an answer, which is learned."""

    prompt: Sequence[int]
    answer: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def one_a_row(examples: Sequence[Example], *, pad: int = 0) -> Batch:
    """Example b in row b, padded behind to the longest -> tokens, labels, valid (B, S)."""
    _check(examples, None)
    length = max(len(e) for e in examples)
    return _filled(examples, [(b, 0) for b in range(len(examples))], (len(examples), length), pad, isolated=False)


def packed(examples: Sequence[Example], length: int, *, pad: int = 0) -> Batch:
    """Examples in rows of `length`, longest first into the fullest row with room -> tokens, labels, valid, documents (B, S).

    SpecError for an example that is longer: cutting it would separate an answer from its prompt.
    """
    _check(examples, length)
    pieces = best_fit([len(e) for e in examples], length)
    places = {p.document: (p.row, p.at) for p in pieces}
    shape = (1 + max(p.row for p in pieces), length)
    return _filled(examples, [places[i] for i in range(len(examples))], shape, pad, isolated=True)


def _check(examples: Sequence[Example], most: int | None) -> None:
    require(len(examples) > 0, "no examples")
    for i, e in enumerate(examples):
        with where(f"in example {i}"):
            require(len(e.prompt) > 0, "an empty prompt: the answer's first token would follow nothing")
            require(len(e.answer) > 0, "an empty answer: there is nothing to learn")
            require(most is None or len(e) <= most, f"{len(e)} tokens; a row has {most}")


def _filled(
    examples: Sequence[Example], places: list[tuple[int, int]], shape: tuple[int, int], pad: int, *, isolated: bool
) -> Batch:
    tokens, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORE, np.int64)
    documents = np.zeros(shape, np.int64)  # 0 is padding
    for i, (e, (row, at)) in enumerate(zip(examples, places, strict=True)):
        middle, end = at + len(e.prompt), at + len(e)
        tokens[row, at:end] = [*e.prompt, *e.answer]
        labels[row, middle:end] = e.answer
        documents[row, at:end] = i + 1
    return Batch(tokens, labels, (documents != 0).astype(np.int64), documents if isolated else None)
