"""The case's tensors against a candidate's, one at a time: equal, rounded, or which mistake makes the one of the other.

Explanations are tried from the innocent to the far-fetched: the same numbers, a rounding of them, a permutation (also rounded), a
factor, an offset, another tensor of the case, rows or columns in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.errors import where
from refimpl.checkpoint import Checkpoint, Unscaled
from refimpl.checkpoint.held import Array, Held, Part
from refimpl.checkpoint.names import is_mtp_copy, layer_of
from refimpl.layers.config import Config

from .findings import Finding, Status
from .kin import Kin, kinship, order_of
from .relations import BLOCKS, factors, permuted, rescaled
from .rounding import alike, distance

_RESIDUE = 2.0**-7
"""More than rounding to bf16 leaves behind a factor; said if so."""
_SAME = 2.0**-20
"""Two orders of the same float32 operations are nearer."""


def held_against(
    checkpoint: Checkpoint, config: Config, held: Held, *, track: Callable[[list[Any]], Iterable[Any]] = iter
) -> Iterator[Finding]:
    """A finding for each tensor of the case, then one for each that the case has not; one tensor of each in memory at a time."""
    kin = Kin(checkpoint)
    for name in track(list(checkpoint)):
        if name in held:
            yield _Pair(checkpoint, config, held, kin, name).finding()
        elif (layer_of(name) or 0) >= config.num_hidden_layers:
            yield Finding(name, "left out", "MTP")
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            yield Finding(name, "left out", "tied to the embedding")
        else:
            yield Finding(name, "missing")
    for name in held:
        if name not in checkpoint and not is_mtp_copy(name, config.num_hidden_layers):
            yield Finding(name, "extra", stored=_stored(held.part(name)))


def _stored(part: Part) -> str:
    return " and ".join(dict.fromkeys(s.name for s in part.stored))


@dataclass
class _Pair:
    """One tensor on both sides."""

    checkpoint: Checkpoint
    config: Config
    held: Held
    kin: Kin
    name: str

    def finding(self) -> Finding:
        """The first explanation that holds."""
        part = self.held.part(self.name)
        with where(f"while comparing {self.name}"):
            try:
                ours, theirs = np.asarray(self.checkpoint[self.name], np.float32), self.held[self.name]
            except Unscaled:
                how = "the case's own" if self.checkpoint.unscaled(self.name) else ""
                return Finding(self.name, "no scale", how, _stored(part))
            error = distance(ours, theirs) if ours.shape == theirs.shape else float("inf")
            status, how, source = next(self._explained(ours, theirs, part))
            return Finding(self.name, status, how, _stored(part), error, ours.size, source)

    def _explained(self, ours: Array, theirs: Array, part: Part) -> Iterator[tuple[Status, str, str]]:
        bad = int(theirs.size - np.isfinite(theirs).sum())
        if bad and np.isfinite(ours).all():
            yield "not finite", f"{bad} of {theirs.size} numbers", ""
        if (how := alike(ours, theirs, part)) is not None:
            yield ("rounded" if how else "equal"), how, ""
        if not theirs.any():
            yield "zero", "", ""
        for relation, x in permuted(self.name, ours, self.config):
            if (how := alike(x, theirs, _of_shape(part, x, ours))) is not None:
                yield "permuted", relation + (f"; rounded to {how}" if how else ""), ""
        if ours.shape != theirs.shape:
            yield "misshapen", f"{theirs.shape}; expected {ours.shape}", ""
            return
        yield from self._scaled(ours, theirs, part)
        yield from self._moved(ours, theirs, part)
        yield "differs", "", ""

    def _scaled(self, ours: Array, theirs: Array, part: Part) -> Iterator[tuple[Status, str, str]]:
        codes, scales = self.checkpoint.raw(self.name)
        if scales is not None:
            for mistake, x in rescaled(codes, scales, self.checkpoint.block):
                if distance(x, theirs) <= _SAME or alike(x, theirs, part) is not None:
                    yield "scaled", mistake, ""
        s, x = factors(ours, theirs)
        if _explains(x, theirs, ours, part):
            yield "scaled", f"by {s.item():.6g}{_leaving(x, theirs)}", ""
        if (
            ours.ndim < 2
            and (c := float((theirs - ours).mean()))
            and _explains(ours + np.float32(c), theirs, ours, part)
        ):
            yield "offset", f"by {c:.6g}", ""
        for what, rows, columns in BLOCKS if ours.ndim == 2 and min(ours.shape) > 1 else ():
            s, x = factors(ours, theirs, rows, columns)
            if s.size < ours.size // 2 and _explains(x, theirs, ours, part):
                yield "scaled", f"by a factor for each {what}, {s.min():.4g} to {s.max():.4g}{_leaving(x, theirs)}", ""

    def _moved(self, ours: Array, theirs: Array, part: Part) -> Iterator[tuple[Status, str, str]]:
        if source := self.kin.nearest(self.name, theirs):
            how = alike(np.asarray(self.checkpoint[source], np.float32), theirs, part)
            if how is not None:
                kind = kinship(self.name, source, exchanged=self._exchanged(source))
                yield "copy", kind + (f"; rounded to {how}" if how else ""), source
        for axis, what in enumerate(("rows", "columns")[: ours.ndim]):
            order = _order(np.moveaxis(ours, axis, 0), np.moveaxis(theirs, axis, 0))
            x = np.take(ours, order, axis=axis)
            if alike(x, theirs, part) is not None:
                groups = self.config.n_group if ".mlp.gate." in self.name else 0
                yield "permuted", f"{what} {order_of(order.tolist(), groups or 0)}", ""

    def _exchanged(self, source: str) -> bool:
        """Whether what lies at `source` is nearer to this tensor than to its own."""
        if source not in self.held or (theirs := self.held[source]).shape != self.checkpoint.shape(source):
            return False
        mine, its = (np.asarray(self.checkpoint[n], np.float32) for n in (self.name, source))
        return bool(distance(mine, theirs) < distance(its, theirs))


def _of_shape(part: Part, x: Array, ours: Array) -> Part:
    """The part for a tensor of another shape: in one piece."""
    return part if x.shape == ours.shape else Part(x.shape, part.stored[:1], part.read)


def _explains(x: Array, theirs: Array, ours: Array, part: Part) -> bool:
    """Whether x leaves a quarter at most of what ours is off by, or half where the rest is a rounding."""
    left, error = distance(x, theirs), distance(ours, theirs)
    return left <= error / 4 or (left <= error / 2 and alike(x.astype(np.float32), theirs, part) is not None)


def _leaving(x: Array, theirs: Array) -> str:
    left = distance(x, theirs)
    return f", leaving {left:.1e}" if left > _RESIDUE else ""


def _order(ours: Array, theirs: Array) -> Array:
    """Which row of ours each row of theirs is, if they are the same rows: both sorted by their products with one vector."""
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (ours, theirs))
    along = np.cos(np.arange(1, a.shape[1] + 1))
    order = np.empty(len(a), np.intp)
    order[np.argsort(b @ along, kind="stable")] = np.argsort(a @ along, kind="stable")
    return order
