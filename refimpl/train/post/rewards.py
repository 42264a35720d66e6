"""Rewards by rule (R 5.2.1): where an answer can be checked, it is checked, not judged by a model.

R asks "the model to provide the final answer within a designated format (e.g., in a box), allowing us to apply rules to verify the
correctness". Compilers and tests for code (R 5.2.1) need what runs them and are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

Reward: TypeAlias = Callable[[Sequence[int], Sequence[int]], float]
"""(prompt, answer), token ids -> a number."""


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} holds, inner braces included; None if there is none."""
    end = len(text)
    while (start := text.rfind(r"\boxed{", 0, end)) >= 0:
        depth, first = 1, start + len(r"\boxed{")
        for i in range(first, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[first:i]
        end = start
    return None


def accuracy(text: str, expected: str) -> float:
    """1 if the boxed answer is the expected one, blanks aside; else 0."""
    found = boxed(text)
    return float(found is not None and "".join(found.split()) == "".join(expected.split()))


def overlap(answer: Sequence[int], expected: Sequence[int]) -> float:
    """The share of positions that hold the expected token; what is too short or too long counts as wrong."""
    return sum(a == b for a, b in zip(answer, expected, strict=False)) / max(len(answer), len(expected), 1)
