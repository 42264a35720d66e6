"""The latents themselves, in blocks: per layer (blocks, size, C + Dr) numbers, or rows of bytes (R 3.4; packed_cache)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.quantisation import pack_latent, unpack_latent
from refimpl.model import Impl
from refimpl.model.packed_cache import kv_format

from .blocks import Blocks, Copy


class Pages:
    """The cache of one loaded model: its blocks and what is in them. Engines of the same model may follow one another on it."""

    def __init__(self, impl: Impl, *, blocks: int, size: int) -> None:
        c = impl.model.config
        self.model, self.kv_format = impl.model, impl.kv_format
        self.dtype, self.latent, self.rope = np.dtype(impl.plan.dtype), c.kv_lora_rank, c.qk_rope_head_dim
        row = self._encode(np.zeros((1, self.latent), self.dtype), np.zeros((1, self.rope), self.dtype))
        try:
            self.blocks = Blocks(blocks, size)
            self._rows = [np.zeros((blocks * size, row.shape[1]), row.dtype) for _ in range(c.num_hidden_layers)]
        except (MemoryError, OverflowError, ValueError):  # ValueError: more than NumPy can count
            raise SpecError(f"{blocks} blocks of {size} tokens are more than there is memory for") from None

    @property
    def nbytes(self) -> int:
        """Memory of the latents."""
        return sum(a.nbytes for a in self._rows)

    def check(self, impl: Impl) -> None:
        """SpecError unless it was made for this very model, and in its number format."""
        require(self.model is impl.model, "the pages are another model's; what they hold means nothing to this one")
        require(
            (self.dtype, self.kv_format) == (np.dtype(impl.plan.dtype), impl.kv_format),
            f"the pages hold {self.kv_format or self.dtype}, this engine {impl.kv_format or np.dtype(impl.plan.dtype)}",
        )

    def copy(self, copies: Sequence[Copy]) -> None:
        """Blocks whose content goes elsewhere, one after the other."""
        size = self.blocks.size
        for old, new in copies:
            for rows in self._rows:
                rows[new * size : (new + 1) * size] = rows[old * size : (old + 1) * size]

    def slots(self, table: Sequence[int] | Array, start: int, stop: int) -> Array:
        """Rows of the tokens start..stop of a table.  -> (stop - start,) int."""
        at = np.arange(start, stop)
        return np.asarray(table, np.int64)[at // self.blocks.size] * self.blocks.size + at % self.blocks.size

    def write(self, layer: int, slots: Array, c: Array, k: Array) -> None:
        """New latents.  slots (N,) int, c (N, C), k (N, Dr)."""
        self._rows[layer][slots] = self._encode(c, k)

    def read(self, layer: int, slots: Array) -> tuple[Array, Array]:
        """What attention sees.  slots (T,) int -> c (1, T, C), k (1, T, Dr)."""
        rows = self._rows[layer][slots]
        if self.kv_format is None:
            return rows[None, :, : self.latent], rows[None, :, self.latent :]
        fmt, _ = kv_format(self.kv_format)
        c, k = unpack_latent(rows, latent=self.latent, rope=self.rope, fmt=fmt)
        return c.astype(self.dtype)[None], k.astype(self.dtype)[None]

    def _encode(self, c: Array, k: Array) -> Array:
        if self.kv_format is None:
            return np.concatenate([c, k], axis=1)
        fmt, dialect = kv_format(self.kv_format)
        return pack_latent(c, k, fmt=fmt, dialect=dialect)
