"""What is done to a document before it is packed (R 4.1): fill-in-the-middle, combined tokens split at random, length cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array

from .tokenizer import EOS, FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer


def cut_in_three(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """text -> prefix, middle, suffix, cut at two characters drawn independently (Bavarian et al. 2022, arXiv 2207.14255, section 3;
    the report does not say where it cuts).
    """
    a, b = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    return text[:a], text[a:b], text[b:]


def psm(prefix: Array, middle: Array, suffix: Array, ids: Mapping[str, int]) -> Array:
    """<fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>: prefix, suffix, middle (R 4.1)."""
    return np.concatenate([[ids[FIM_BEGIN]], prefix, [ids[FIM_HOLE]], suffix, [ids[FIM_END]], middle, [ids[EOS]]])


def plain(text: Array, ids: Mapping[str, int]) -> Array:
    """text <eos>."""
    return np.concatenate([text, [ids[EOS]]])


def truncated(ids: Array, most: int | None) -> Array:
    """The first `most` tokens. A document that is cut loses its <eos>: it did not end there."""
    return ids[:most]


@dataclass(frozen=True)
class Splitter:
    """Tokens that join punctuation with line breaks -> the ids of the two parts, encoded by themselves."""

    parts: Mapping[int, Array]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Splitter:
        """The combined tokens of a tokenizer: punctuation or symbols, perhaps after a space, then line breaks."""
        sentinels = set(tokenizer.ids.values())
        texts = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size) if i not in sentinels}
        halves = {i: (t.rstrip("\r\n"), t[len(t.rstrip("\r\n")) :]) for i, t in texts.items()}
        joint = {i: h for i, h in halves.items() if h[1] and _is_punctuation(h[0].removeprefix(" "))}
        encoded = tokenizer.encode([part for half in joint.values() for part in half])
        return cls({i: np.concatenate(encoded[2 * k : 2 * k + 2]) for k, i in enumerate(joint)})

    def __call__(self, ids: Array, rate: float, rng: np.random.Generator) -> Array:
        """ids (n,) -> ids (m,), each combined token split with probability `rate` ("a certain proportion", R 4.1)."""
        if not rate or not self.parts:
            return ids
        hit = np.isin(ids, np.fromiter(self.parts, np.int64)) & (rng.random(len(ids)) < rate)
        parts = [self.parts[int(i)] for i in ids[hit]]
        if not parts:
            return ids
        sizes = np.ones(len(ids), np.int64)
        sizes[hit] = [len(p) for p in parts]
        out = np.repeat(ids, sizes)
        out[np.repeat(hit, sizes)] = np.concatenate(parts)
        return out


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(c)[0] in "PS" and c != "\ufffd" for c in text)


@dataclass(frozen=True)
class Altering:
    """fim: the rate of fill-in-the-middle; split: of combined tokens; most: tokens of a document at most."""

    fim: float = 0.0
    split: float = 0.0
    most: int | None = None

    def __call__(
        self, texts: list[str], first: int, seed: int, tokenizer: Tokenizer, splitter: Splitter
    ) -> list[Array]:
        """Texts, of which the first is document number `first` -> ids of each. Every document has random numbers of its own, so the
        result does not depend on where a build was interrupted.
        """
        rngs = [np.random.default_rng([seed, first + i]) for i in range(len(texts))]
        cut = [cut_in_three(t, r) if r.random() < self.fim else (t,) for t, r in zip(texts, rngs, strict=True)]
        encoded = iter(tokenizer.encode([part for parts in cut for part in parts]))
        found = []
        for text, parts, rng in zip(texts, cut, rngs, strict=True):
            ids = [splitter(next(encoded), self.split, rng) for _ in parts]
            if len(ids) == 3 and (self.most is None or sum(map(len, ids)) + 4 <= self.most):
                found.append(psm(ids[0], ids[1], ids[2], tokenizer.ids))
                continue
            if len(ids) == 3:  # too long with its holes: cutting it would cut off what fills them
                ids = [splitter(tokenizer.encode([text])[0], self.split, rng)]
            found.append(truncated(plain(ids[0], tokenizer.ids), self.most))
        return found
