"""What a run is about, checked: tokens and what goes with them, and the cache that decoding goes on from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array, data_of
from refimpl.layers import mla, mtp
from refimpl.layers.config import Config
from refimpl.layers.loss import IGNORE
from refimpl.layers.mla import KV


@dataclass(frozen=True)
class Cache:
    """What decoding remembers: per layer c_kv (B, T, C) and k_rope (B, T, Dr); positions, valid, documents (B, T). `model`: whose
    it is (`identity`), if that is known.
    """

    layers: tuple[KV, ...]
    positions: Array
    valid: Array | None = None
    documents: Array | None = None
    model: str = ""

    def __len__(self) -> int:
        return int(self.positions.shape[1])

    def kept(self, rows: Array, counts: Array) -> Cache:
        """A new cache of the sequences `rows` (R,), of each its first `counts` (R,) tokens: a roll-back, and whoever is done
        leaves.

        Padding goes behind the tokens, as much as the longest needs.
        """
        columns, valid = self.selection(rows, counts)
        if columns is None:
            return self
        layers = tuple([(c[rows[:, None], columns], k[rows[:, None], columns]) for c, k in self.layers])
        documents = None if self.documents is None else self.documents[rows[:, None], columns]
        positions = self.positions[rows[:, None], columns]
        return replace(self, layers=layers, positions=positions, valid=valid, documents=documents)

    def selection(self, rows: Array, counts: Array) -> tuple[Array | None, Array | None]:
        """Columns (R, T) of each row's first `counts` tokens, which of them are tokens (None: all). (None, _): all as it is."""
        seen = np.ones(self.positions.shape, np.int64) if self.valid is None else self.valid
        have = seen[rows].sum(axis=1)
        require((counts <= have).all(), f"{counts.tolist()} tokens are to be kept of {have.tolist()} in the cache")
        longest = int(counts.max(initial=0))
        same = len(rows) == len(seen) and (rows == np.arange(len(rows))).all() and (counts == len(self)).all()
        if same:
            return None, None
        columns = np.argsort(seen[rows] == 0, axis=1, kind="stable")[:, :longest]
        valid = (np.arange(longest) < counts[:, None]).astype(np.int64)
        return columns, None if valid.all() else valid

    def check(self, c: Config, model: str) -> None:
        """SpecError unless a model of this config could have filled the cache, and `model` did, if it says who did."""
        require(
            len(self.layers) == c.num_hidden_layers,
            f"the cache has {len(self.layers)} layers, the model {c.num_hidden_layers}: it is another model's",
        )
        for i, pair in enumerate(self.layers):
            found = tuple([int(a.shape[-1]) for a in pair])
            expected = (c.kv_lora_rank, c.qk_rope_head_dim)
            require(found == expected, f"the cache of layer {i} holds {found} numbers a token, the model {expected}")
        require(
            self.model in ("", model),
            f"the cache is another model's, of the same shape: {self.model} filled it, this one is {model}",
        )


@dataclass(frozen=True)
class Inputs:
    """What a run is about: tokens (B, S), positions (B, S), valid (B, S) 0 for padding, documents (B, S), labels (B,
    S).
    """

    tokens: Array
    positions: Array
    valid: Array | None = None
    documents: Array | None = None
    labels: Array | None = None

    def named(self) -> Iterable[tuple[str, Array]]:
        """(name, array) of what is given, for a recorder."""
        return [(n, a) for n, a in vars(self).items() if a is not None]


def read_inputs(
    c: Config,
    tokens: Any,
    positions: Any = None,
    valid: Any = None,
    documents: Any = None,
    labels: Any = None,
    *,
    cache: Cache | None = None,
) -> Inputs:
    """Checked inputs. Positions default to counting the tokens that are not padding, on from the cache; labels are the
    tokens themselves (the loss shifts them), -100 to ignore.

    Raises SpecError for ids outside the vocabulary, positions outside the table, empty batches, odd shapes.
    """
    tokens = _integers("tokens", tokens)
    require(tokens.ndim == 2 and tokens.size > 0, f"tokens has shape {tokens.shape}; expected (B, S), not empty")
    _within("token id", tokens, c.vocab_size, "vocab_size")
    valid = None if valid is None else _like("valid", valid, tokens)
    require(valid is None or ((valid == 0) | (valid == 1)).all(), "valid holds other numbers than 0 and 1")
    if valid is None and cache is not None and cache.valid is not None:
        valid = np.ones_like(tokens)
    documents = None if documents is None else _like("documents", documents, tokens)
    if cache is not None:
        batch = cache.positions.shape[0]
        require(batch == len(tokens), f"the cache holds {batch} sequences, tokens {len(tokens)}")
    positions = _count(tokens, valid, cache) if positions is None else _spread("positions", positions, tokens)
    _within("position", positions, c.max_position_embeddings, "max_position_embeddings")
    if labels is not None:
        labels = _like("labels", labels, tokens)
        _within("label", np.where(labels == IGNORE, 0, labels), c.vocab_size, "vocab_size")
    return Inputs(tokens, positions, valid, documents, labels)


def extend(cache: Cache | None, inputs: Inputs) -> tuple[Any, Any, Any]:
    """positions, valid, documents of all keys: the cache's, then the new ones."""
    if cache is None:
        return inputs.positions, inputs.valid, inputs.documents
    if (inputs.documents is None) != (cache.documents is None):
        raise SpecError("documents must be given for every part of a sequence or for none")
    return (
        mla.cache_positions(cache.positions, inputs.positions),
        None if inputs.valid is None else mla.cache_valid(cache.valid, inputs.valid, past=len(cache)),
        None if inputs.documents is None else mla.cache_documents(cache.documents, inputs.documents),
    )


def shrink(i: Inputs) -> Inputs:
    """The inputs of the next MTP depth: one position fewer."""
    return Inputs(
        i.tokens,
        mtp.positions(i.positions),
        None if i.valid is None else mtp.valid(i.valid),
        None if i.documents is None else mtp.documents(i.documents),
    )


def _integers(name: str, a: Any) -> Array:
    with where(f"in {name}"):
        try:
            a = data_of(a) if hasattr(a, "dtype") else np.asarray(a)
        except ValueError:
            raise SpecError("not a rectangular array") from None
        require(a.dtype.kind in "iu" or a.size == 0, f"dtype {a.dtype}; expected integers")
        return a.astype(np.int64)


def _within(what: str, a: Array, limit: int, name: str) -> None:
    if a.size and (a.min() < 0 or a.max() >= limit):
        bad = np.argwhere((a < 0) | (a >= limit))[0].tolist()
        raise SpecError(f"{what} {int(a[tuple(bad)])} at {bad}: outside 0..{limit - 1} ({name}={limit})")


def _like(name: str, a: Any, tokens: Array) -> Array:
    a = _integers(name, a if not (hasattr(a, "dtype") and a.dtype == bool) else a.astype(np.int64))
    require(a.shape == tokens.shape, f"{name} has shape {a.shape}, tokens {tokens.shape}")
    return a


def _spread(name: str, a: Any, tokens: Array) -> Array:
    """a, given per sequence (B, S) or once for all (S,) or (1, S)."""
    a = _integers(name, a)
    fits = a.ndim <= 2 and a.shape[-1:] == tokens.shape[-1:] and a.shape[:-1] in ((), (1,), tokens.shape[:1])
    require(fits, f"{name} has shape {a.shape}, tokens {tokens.shape}")
    return np.ascontiguousarray(np.broadcast_to(a, tokens.shape))


def _count(tokens: Array, valid: Array | None, cache: Cache | None) -> Array:
    """0, 1, 2, ... over the tokens that are not padding, on from those in the cache; padding gets 0."""
    ones = np.ones_like(tokens) if valid is None else valid
    start = np.zeros_like(tokens[:, :1])
    if cache is not None:
        seen = np.ones_like(cache.positions) if cache.valid is None else cache.valid
        start = np.where(seen != 0, cache.positions + 1, 0).max(axis=1, keepdims=True, initial=0)
    return np.where(ones != 0, start + np.cumsum(ones, axis=1) - 1, 0)
