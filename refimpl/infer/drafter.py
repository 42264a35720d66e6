"""Drafts by the MTP modules (R 2.2 "MTP in inference", 5.4.3), with a latent cache of their own.

Main model and tokens: t_0 .. t_m are decided, the main model has seen t_0 .. t_(m-1), so h^0_i is known for i < m. Entry i of
module k takes h^(k-1)_i and t_(i+k) and foretells t_(i+k+1); its last entry i = m-1 foretells t_(m+k), the draft of depth k.
Entry i is final when t_(i+k) is decided, i <= m-k; what came from drafts is forgotten after every step and made again from the
tokens that stood. With one module nothing is ever forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.mla import Attend
from refimpl.model import Cache, Impl, Inputs
from refimpl.model.inputs import extend

from .ragged import padded
from .verify import Draft

Propose: TypeAlias = Callable[[int, Array, Sequence[int]], Draft]
"""(row, logits (V,), the drafts before) -> a draft."""


@dataclass(frozen=True)
class Speculation:
    """How to draft. `depth`: tokens ahead. `recycle`: beyond the last module, that module again, on its own output and one
    position further (as vLLM does with the single module of V3); without it, depth is at most the number of modules.
    `greedy`: draft the most likely token instead of drawing from the request's own distribution; what comes out is the same,
    the acceptance is not.
    """

    depth: int = 1
    recycle: bool = False
    greedy: bool = False

    def __post_init__(self) -> None:
        require(
            isinstance(self.depth, int) and self.depth >= 1, f"depth is {self.depth!r}; expected a whole number from 1"
        )


class Drafter:
    """The modules' cache over the entries that are final, and h^0 of those after them. Lives as long as one batch."""

    def __init__(self, impl: Impl, how: Speculation) -> None:
        model = impl.model
        require(model.n_mtp, "the checkpoint has no MTP module to draft with; generate without speculation")
        fits = how.depth <= model.n_mtp or how.recycle
        require(
            fits, f"depth {how.depth} needs as many MTP modules, the checkpoint has {model.n_mtp}; or recycle the last"
        )
        self.greedy = how.greedy
        self._impl, self._depth, self._modules = impl, how.depth, min(how.depth, model.n_mtp)
        self._cache: Cache | None = None
        self._hidden: list[Array] = []  # per row h^0 (W, D) of entries that are not in the cache

    def propose(
        self, rows: Sequence[int], hidden: Sequence[Array], tokens: Sequence[list[int]], draft: Propose, most: int
    ) -> list[list[Draft]]:
        """`depth` drafts for each row, or `most`, but one of each module at least.  rows: which of those before go on; hidden:
        h^0 (S, D) of each one's newly seen tokens; tokens: all that is decided, t_0 .. t_m.
        """
        self._go_on(rows, hidden)
        final = [max(len(t) - 1 - len(h), len(t) - self._modules, 0) for t, h in zip(tokens, self._hidden, strict=True)]
        drafts: list[list[Draft]] = [[] for _ in rows]
        with self._impl.rounding():
            entries, last = self._chain(tokens, drafts, draft)
            self._recycle(entries, last, tokens, drafts, draft, min(self._depth, most) - self._modules)
        seen = [len(t) - 1 - len(h) for t, h in zip(tokens, self._hidden, strict=True)]
        self._hidden = [h[f - s :] for h, f, s in zip(self._hidden, final, seen, strict=True)]
        self._cache = entries.kept(np.arange(len(rows)), np.array(final))
        return drafts

    def _go_on(self, rows: Sequence[int], hidden: Sequence[Array]) -> None:
        if self._cache is None:
            self._hidden = list(hidden)
            return
        self._hidden = [np.concatenate([self._hidden[b], h]) for b, h in zip(rows, hidden, strict=True)]
        counts = (
            np.full(len(self._cache.positions), len(self._cache))
            if self._cache.valid is None
            else self._cache.valid.sum(1)
        )
        self._cache = self._cache.kept(np.array(rows), counts[list(rows)])

    def _chain(self, tokens: Sequence[list[int]], drafts: list[list[Draft]], draft: Propose) -> tuple[Cache, Array]:
        """Each module in turn over the entries not in the cache -> the cache with them, the last module's h (B, D) at m-1."""
        h, valid = padded(self._hidden)
        size = valid.sum(1)
        start = np.array([len(t) - 1 for t in tokens]) - size
        inputs = Inputs(valid, (start[:, None] + np.arange(valid.shape[1])) * valid, valid)
        keys, layers = extend(self._cache, _marked(inputs, self._cache)), []
        for k in range(1, self._modules + 1):
            known = [t + [d.token for d in ds] for t, ds in zip(tokens, drafts, strict=True)]
            ahead, _ = padded([np.array(t[c + k : c + k + n]) for t, c, n in zip(known, start, size, strict=True)])
            past = self._cache.layers[k - 1] if self._cache else None
            y, h, kv = self._impl.model.mtp_module(k, ahead, h, inputs, keys, past, attend=self._attend)
            layers.append(kv)
            for b, n in enumerate(size):
                drafts[b].append(draft(b, y[b, n - 1], [d.token for d in drafts[b]]))
        return Cache(tuple(layers), *keys), h[np.arange(len(size)), size - 1]

    def _recycle(
        self,
        entries: Cache,
        h: Array,
        tokens: Sequence[list[int]],
        drafts: list[list[Draft]],
        draft: Propose,
        times: int,
    ) -> None:
        """The last module again, so many times: entry m takes its own h_(m-1) (B, D) for h_m, and its draft; then m+1."""
        cache = replace(entries, layers=entries.layers[-1:])
        h, one = h[:, None], np.ones((len(tokens), 1), np.int64)
        for j in range(times):
            at = np.array([[len(t) - 1 + j] for t in tokens])
            inputs = _marked(Inputs(one, at), cache)
            keys, last = extend(cache, inputs), np.array([[ds[-1].token] for ds in drafts])
            y, h, kv = self._impl.model.mtp_module(
                self._modules, last, h, inputs, keys, cache.layers[0], attend=self._attend
            )
            cache = Cache((kv,), *keys)
            for b, ds in enumerate(drafts):
                ds.append(draft(b, y[b, 0], [d.token for d in ds]))

    @property
    def _attend(self) -> Attend:
        """Absorbed once there is a cache: a step reads latents, it does not expand them."""
        return "absorbed" if self._cache is not None and self._impl.attend == "auto" else self._impl.attend


def _marked(inputs: Inputs, cache: Cache | None) -> Inputs:
    """The inputs with padding marked, if the cache marks its own."""
    unmarked = cache is not None and cache.valid is not None and inputs.valid is None
    return replace(inputs, valid=np.ones_like(inputs.positions)) if unmarked else inputs
