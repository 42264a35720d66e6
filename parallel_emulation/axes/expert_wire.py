"""How rows travel between experts: their own dtype, BF16, or FP8 with a scale per 128 values; and what combine rounds.

V3 dispatches in FP8 with power-of-two scales, forward the input of the experts and backward the gradient that comes
into them, and combines in BF16 both ways (R 3.3.3). Routing weights, and their gradients, are float32 beside either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from refimpl.autograd import Array, require
from refimpl.layers.numerics.quantisation import Quantized, quantize

Format = Literal["own", "bf16", "fp8"]
_TILE = 128


@dataclass(frozen=True)
class Wire:
    """The formats of dispatch and combine. `dialect`: how FP8 scales are made (numerics.quantise.DIALECTS)."""

    dispatch: Format = "own"
    combine: Literal["own", "bf16"] = "own"
    dialect: str = "deepgemm_ue8m0"

    def __post_init__(self) -> None:
        require(self.dispatch in ("own", "bf16", "fp8"), f"dispatch in 'own', 'bf16' or 'fp8', not {self.dispatch!r}")
        require(self.combine in ("own", "bf16"), f"combine in 'own' or 'bf16', not {self.combine!r}")


OWN = Wire()
"""Nothing is rounded."""
V3_TRAINING = Wire("fp8", "bf16")
"""R 3.3.3."""


@dataclass(frozen=True)
class Recipe:
    """Where and in which order combine adds up a token's rows. Every sum is in float32 or wider, and rounded at its end.

    `local`: a rank adds up its own experts, in slot order, before it sends; with nodes of several GPUs the relay adds
    up its node; the token's own rank adds up the rest. Otherwise every choice travels by itself.
    `order`: of the sums over ranks and nodes: ascending "rank", or the last top-k "slot" that each of them serves. For
    choices by themselves also ascending "expert". `backward`: of the same sum in the vjp of dispatch.
    """

    order: Literal["rank", "slot", "expert"]
    backward: Literal["rank", "slot"]
    local: bool

    def __post_init__(self) -> None:
        orders = {self.order, self.backward}
        require(not self.local or "expert" not in orders, "partial sums are in the order of ranks or slots")
        require(self.local or "rank" not in orders, "single choices are in the order of experts or slots")

    @property
    def by_slot(self) -> bool:
        """Whether partial sums are ordered by slot, which relays then have to know."""
        return self.local and "slot" in (self.order, self.backward)


V1 = Recipe("rank", "rank", local=True)
"""DeepEP's first generation, with which V3 was measured: the GPUs of a node ascending, then the nodes ascending."""
V2 = Recipe("slot", "slot", local=True)
"""DeepEP's ElasticBuffer with allow_multiple_reduction: hybrid over nodes, not hybrid with nodes of one GPU."""
V2_SINGLE = Recipe("slot", "slot", local=False)
"""The same without: one sum per token, K rows on the way back."""
ONE_RANK = Recipe("expert", "slot", local=False)
"""As `nn_ops.combine` and the vjp of `nn_ops.dispatch` add on one rank: the same bits, for K rows on the way back."""


def pack(rows: Array, width: int, fmt: Format, dialect: str = OWN.dialect) -> Array:
    """Rows as they travel, one message each.  rows (N, D + K), the first `width` = D of them hidden -> (N, *).

    Bytes a row: own s (D + K) with s the size of the dtype, bf16 2 D + 4 K, fp8 D + 4 ceil(D / 128) + 4 K.
    """
    if fmt == "own":
        return rows
    x, extra = rows[:, :width], rows[:, width:]
    fields: dict[str, Array] = {}
    if fmt == "bf16":
        fields["x"] = x.astype(ml_dtypes.bfloat16)
    else:
        q = quantize(x, (1, _TILE), dialect=dialect, name="dispatched rows")
        fields |= {"x": q.codes.view(ml_dtypes.float8_e4m3fn), "scales": q.scales}
    if extra.shape[1]:
        fields["extra"] = extra.astype(np.float32)
    sent = np.empty(len(rows), np.dtype([(name, part.dtype, part.shape[1:]) for name, part in fields.items()]))
    for name, part in fields.items():
        sent[name] = part
    return sent


def unpack(sent: Array, dtype: Any) -> Array:
    """The values of packed rows.  sent (N, *) -> (N, D + K) of that dtype."""
    names = sent.dtype.names
    if names is None:
        return sent.astype(dtype, copy=False)
    x = np.ascontiguousarray(sent["x"])
    if "scales" in names:
        x = Quantized(x, np.ascontiguousarray(sent["scales"]), (1, _TILE)).dequantize()
    parts = [x.astype(dtype)] + ([sent["extra"].astype(dtype)] if "extra" in names else [])
    return np.concatenate(parts, axis=1)


def ordered_sum(n: int, place: Array, key: Array, rows: Array, start: Array | None = None) -> Array:
    """z[p] = start[p] + the rows whose place is p, one after the other in the order of their keys.

    place (N,) in 0..n-1, key (N,), rows (N, *), start (n, *) or none -> z (n, *); 0 where there is neither. Without a
    start the first row is taken as it is (0 + -0 would lose its sign).
    """
    order = np.lexsort((key, place))
    at = place[order]
    nth = np.arange(len(at)) - np.searchsorted(at, at)  # how many rows of the same place come before
    z = np.zeros((n, *rows.shape[1:]), rows.dtype) if start is None else start.astype(rows.dtype)
    for turn in range(int(nth.max(initial=-1)) + 1):
        now = order[nth == turn]
        z[place[now]] = rows[now] if turn == 0 and start is None else z[place[now]] + rows[now]
    return z
