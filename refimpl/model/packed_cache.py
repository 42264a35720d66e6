"""The latent cache in bytes (FlashMLA's layout): what a serving engine keeps, 656 bytes a token and layer for V3."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.numerics.formats import E4M3, INT8, Format
from refimpl.layers.numerics.quantisation import pack_latent, unpack_latent

from .inputs import Cache

FORMATS: dict[str, tuple[Format, str]] = {"fp8": (E4M3, "flashmla"), "int8": (INT8, "deepseek_v3")}
"""Format name -> codes and how their scales are made; INT8 is our own layout, no released engine of DeepSeek has it."""


@dataclass(frozen=True)
class PackedCache:
    """Per layer rows of bytes (B, T, bytes), and a Cache without layers for positions, valid, documents (B, T)."""

    layers: tuple[Array, ...]
    rest: Cache

    def __len__(self) -> int:
        return len(self.rest)

    def kept(self, rows: Array, counts: Array) -> PackedCache:
        """As `Cache.kept`: the first `counts` (R,) tokens of the sequences `rows` (R,)."""
        columns, _ = self.rest.selection(rows, counts)
        if columns is None:
            return self
        return PackedCache(tuple([a[rows[:, None], columns] for a in self.layers]), self.rest.kept(rows, counts))


def kv_format(name: str) -> tuple[Format, str]:
    """The format of this name; SpecError lists them."""
    if name not in FORMATS:
        raise SpecError(f"cache format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def pack(cache: Cache, before: PackedCache | None, name: str) -> PackedCache:
    """The new entries of `cache` as bytes behind those packed before, which stay as they are. A token attends to itself and to
    its own prompt chunk before they are packed.
    """
    (fmt, dialect), past = kv_format(name), len(before) if before else 0
    rows = [pack_latent(c[:, past:], k[:, past:], fmt=fmt, dialect=dialect) for c, k in cache.layers]
    if before is not None:
        rows = [np.concatenate([old, new], axis=1) for old, new in zip(before.layers, rows, strict=True)]
    return PackedCache(tuple(rows), replace(cache, layers=()))


def unpack(packed: PackedCache, c: Config, name: str, dtype: Any) -> Cache:
    """What attention reads: float arrays of the packed values."""
    fmt, _ = kv_format(name)
    pairs = [unpack_latent(r, latent=c.kv_lora_rank, rope=c.qk_rope_head_dim, fmt=fmt) for r in packed.layers]
    return replace(packed.rest, layers=tuple([(kv.astype(dtype), k.astype(dtype)) for kv, k in pairs]))
