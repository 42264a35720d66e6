"""Easy data augmentation (Wei and Zou 2019, arXiv 1901.11196): four small changes of a sentence's words. Described in articles, not
in V3, whose data is not augmented so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from refimpl.autograd.errors import require

Words = list[str]
Thesaurus = Mapping[str, Sequence[str]]
"""Word -> other words for it. The paper takes WordNet; which one is the caller's choice, and none comes with the package."""


def synonyms(
    words: Sequence[str], n: int, rng: np.random.Generator, thesaurus: Thesaurus, stop: Collection[str] = ()
) -> Words:
    """Up to n different words that are no stop words, and all their occurrences, replaced by a synonym drawn at random."""
    out = list(words)
    known = sorted({w for w in words if w not in stop and thesaurus.get(w)})
    for i in rng.permutation(len(known))[:n]:
        other = thesaurus[known[i]]
        new = other[int(rng.integers(len(other)))]
        out = [new if w == known[i] else w for w in out]
    return out


def insertion(
    words: Sequence[str], n: int, rng: np.random.Generator, thesaurus: Thesaurus, stop: Collection[str] = ()
) -> Words:
    """n times, a synonym of a random word that is no stop word put at a random place."""
    out = list(words)
    for _ in range(n):
        known = [w for w in out if w not in stop and thesaurus.get(w)]
        if not known:
            return out
        other = thesaurus[known[int(rng.integers(len(known)))]]
        out.insert(int(rng.integers(len(out) + 1)), other[int(rng.integers(len(other)))])
    return out


def swap(words: Sequence[str], n: int, rng: np.random.Generator) -> Words:
    """n times, two different places exchanged."""
    out = list(words)
    for _ in range(n if len(out) > 1 else 0):
        i, j = rng.choice(len(out), 2, replace=False).tolist()
        out[i], out[j] = out[j], out[i]
    return out


def deletion(words: Sequence[str], p: float, rng: np.random.Generator) -> Words:
    """Each word left out with probability p; one word, drawn at random, if none would be left."""
    out = [w for w, drawn in zip(words, rng.random(len(words)), strict=True) if drawn >= p]
    return out if out or not words else [words[int(rng.integers(len(words)))]]


def augment(
    words: Sequence[str],
    rng: np.random.Generator,
    thesaurus: Thesaurus,
    *,
    alpha: float = 0.1,
    times: int = 4,
    stop: Collection[str] = (),
) -> list[Words]:
    """`times` new sentences, the four changes in turn, each of n = max(1, alpha l) words of l (deletion: with p = alpha)."""
    require(0 <= alpha <= 1, f"alpha is {alpha}; a part of the words is in 0..1")
    n = max(1, int(alpha * len(words)))
    changes: tuple[Callable[[], Words], ...] = (
        lambda: synonyms(words, n, rng, thesaurus, stop),
        lambda: insertion(words, n, rng, thesaurus, stop),
        lambda: swap(words, n, rng),
        lambda: deletion(words, alpha, rng),
    )
    return [changes[i % 4]() for i in range(times)] if words else []
