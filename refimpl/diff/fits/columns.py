"""Factors that are constant in blocks of what a product sums over, or in the blocks of its weight: y = sum_j f_ij x_j w_ijT.

What is read in 128 x 128 blocks has a scale a block. One that is left out, or taken from another block, multiplies the block by a
number, which a product of few blocks and many tokens tells by least squares; and the scales themselves are known but for that,
max abs w / 448 of every block, so that other blocks' scales, or none, need no fitting at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.numerics import block_scales
from refimpl.layers.stage import STAGES, Call

from ..corpus import Mutant
from .blocks import SHOWN, in_words, is_staircase
from .evidence import Evidence, guess
from .rearranged import EXPERTS, suspects
from .sums import solved

BLOCK = 128
"""Rows and columns that have a scale in DeepSeek's FP8 weights."""
PERIODS = sorted({k << i for k in (1, 3) for i in range(2, 12)}, reverse=True)
"""Blocks that are tried: 4, 8, ... and 12, 24, ...; of heads' channels those of heads as well."""
LARGEST = 1 << 24
"""Numbers of all parts of a product."""
MANY = 8
"""Numbers of the tap that there have to be for every factor."""
PRODUCTS = (
    *("mla.q_a", "mla.kv_a", "mla.q", "mla.kv_b", "attn_out", "mlp.gate", "mlp.up", "mlp.down", "shared.gate"),
    *("shared.up", "moe.shared", "router.logits", "logits", "mtp.proj"),
)
"""Stages that are x wT of their first two arguments, whatever shape they give it."""


def products(ev: Evidence) -> Iterator[Mutant]:
    """A product whose input channels, or weight's blocks, have factors of their own."""
    if not ev.whole or ev.call.stage not in PRODUCTS:
        return
    x, w = ev.args[0], ev.args[1]
    rows, y = x.reshape(-1, w.shape[1]), ev.x.reshape(-1, w.shape[0])
    few = max(1, LARGEST // (w.shape[0] * len(_parts(w.shape[1], PERIODS[-1]))))
    rows, y = rows[:few], y[:few]
    heads = [x.shape[-1]] if x.ndim == 4 else []
    for period in sorted({*PERIODS, *heads}, reverse=True):
        if 1 < len(_parts(w.shape[1], period)) <= y.size // MANY:
            f, far = _factors(rows, w, y, period)
            if far <= ev.limit and is_staircase(f, ev.limit):
                yield from _of_channels(ev, f, period, "heads" if period in heads else "channels")
                return
    for period in [p for p in PERIODS if 1 < _grid(w, p)[0] * _grid(w, p)[1] <= y.size // MANY]:
        fs = [_factors(rows, w[o : o + period], y[:, o : o + period], period) for o in range(0, len(w), period)]
        grid = np.stack([f for f, _ in fs])
        if max(far for _, far in fs) <= ev.limit and is_staircase(grid.ravel(), ev.limit):
            rows_, columns = (_period(np.moveaxis(grid, axis, 0), ev.limit) for axis in (0, 1))
            if rows_ < grid.shape[0] and columns < grid.shape[1]:  # else it is none of the weight's blocks
                yield from _of_weight(ev, grid[::rows_, ::columns], (rows_ * period, columns * period))
            return


def _period(f: Array, tolerance: float) -> int:
    """How many entries of the first axis are always the same, one behind the other."""
    apart = (np.abs(np.diff(f, axis=0)) > tolerance * np.abs(f[1:])).any(axis=1)
    return int(np.gcd.reduce(np.flatnonzero(apart) + 1)) or len(f)


def _parts(n: int, period: int) -> range:
    return range(0, n, period)


def _grid(w: Array, period: int) -> tuple[int, int]:
    return len(_parts(w.shape[0], period)), len(_parts(w.shape[1], period))


def _factors(rows: Array, w: Array, y: Array, period: int) -> tuple[Array, float]:
    """The factors of blocks of columns with which a product is nearest to y, and how far it is then, of its size."""
    parts = [rows[:, c : c + period] @ w[:, c : c + period].T for c in _parts(w.shape[1], period)]
    f = solved(parts, y)
    fitted = sum(k * part for k, part in zip(f, parts, strict=True))
    return f, float(np.linalg.norm(y - fitted)) / max(float(np.linalg.norm(fitted)), np.finfo(float).tiny)


def _digits(f: Array) -> Iterator[Array]:
    for digits in (2, 3, 5, 9):
        yield np.array([float(f"{v:.{digits - 1}e}") for v in f.ravel()]).reshape(f.shape)


def _of_channels(ev: Evidence, f: Array, period: int, what: str) -> Iterator[Mutant]:
    for v in _digits(f):
        said = in_words(what, 1 if what == "heads" else period, v)
        yield guess(
            f"of what {ev.call.of.tap} reads, {said}", ev.call.stage, _with(ev.call.stage, v[None], (0, period))
        )


def _of_weight(ev: Evidence, f: Array, block: tuple[int, int]) -> Iterator[Mutant]:
    for v in _digits(f):
        more = f" and {v.size - SHOWN} more" if v.size > SHOWN else ""
        numbers = ", ".join([f"{k:g}" for k in v.ravel()[:SHOWN]])
        said = f"{ev.call.of.tap}'s weight has blocks of {block[0]} x {block[1]} with factors of their own"
        yield guess(f"{said}: {numbers}{more}", ev.call.stage, _with(ev.call.stage, v, block))


def _spread(f: Array, block: tuple[int, int], w: Array) -> Array:
    """A number of every block as one of every entry of w; a block of 0 rows has all of them."""
    return np.repeat(np.repeat(f, block[0] or len(w), 0)[: len(w)], block[1], 1)[:, : w.shape[1]]


def _with(name: str, f: Array, block: tuple[int, int]) -> Callable[..., Any]:
    return lambda x, w, *rest, **static: STAGES[name].fn(x, w * _spread(f, block, w), *rest, **static)


def scales(ev: Evidence) -> Iterator[Mutant]:
    """A weight whose blocks have no scale, or other blocks' scales."""
    for call in suspects(ev):
        at = [i for i, n in enumerate(call.args) if isinstance(n, str) and n.startswith("w/")]
        if at and call.stage in (*PRODUCTS, *EXPERTS) and _has_blocks(ev, call, at):
            for said, other in OTHERS:
                title = f"{call.of.tap}'s weight: the scales of its {BLOCK} x {BLOCK} blocks are {said}"
                yield guess(title, call.stage, _scaled(call.stage, at, other))


def _has_blocks(ev: Evidence, call: Call, at: list[int]) -> bool:
    return all(max(ev.recorded.weights(call.args[i][2:], ev.recorded.plan).shape) > BLOCK for i in at)


def _as_halves(s: Array) -> Array:
    """The scales that a loop over blocks of 64 reads, one after the other, and from the start again behind the last."""
    i, j = (np.arange(2 * n) % n for n in s.shape)
    return s[np.ix_(i, j)]


OTHERS: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("not applied", lambda s: 1 + 0 * s),
    ("applied twice", lambda s: s * s),
    ("divided by where it is to be multiplied", lambda s: 1 / s),
    ("those of the blocks to the right", lambda s: np.roll(s, -1, axis=1)),
    ("those of the blocks to the left", lambda s: np.roll(s, 1, axis=1)),
    ("those of the blocks below", lambda s: np.roll(s, -1, axis=0)),
    ("those of the blocks above", lambda s: np.roll(s, 1, axis=0)),
    ("read as those of blocks of 64", _as_halves),
    ("read transposed", lambda s: np.ascontiguousarray(s.T).reshape(s.shape)),
    ("those of the first block, for all", lambda s: s[:1, :1] + 0 * s),
    ("those of the first block of their rows", lambda s: s[:, :1] + 0 * s),
    ("those of the first block of their columns", lambda s: s[:1] + 0 * s),
)
"""What else is read where a block's scale belongs."""


def _scaled(name: str, at: list[int], other: Callable[[Array], Array]) -> Callable[..., Any]:
    def change(w: Array) -> Array:
        right = block_scales(w).astype(np.float64)
        read, meant = _spread(other(right), _block(other), w), _spread(right, _block(None), w)
        if (read == meant).all():
            raise ValueError("every block has its own scale")
        return w / meant * read

    return lambda *args, **static: STAGES[name].fn(*[change(a) if i in at else a for i, a in enumerate(args)], **static)


def _block(other: Callable[[Array], Array] | None) -> tuple[int, int]:
    size = BLOCK // 2 if other is _as_halves else BLOCK
    return size, size
