"""The KV transfer: what a prefill unit knows of a prompt, handed over (R 3.4): latents, C + Dr numbers a token and layer.

70,272 bytes a token of V3 in BF16; in FP8, in FlashMLA's layout with the key in BF16, 656 x 61 = 40,016. Every tensor-parallel
rank of the prefill unit sends the tokens that it holds anyway, so all of its links are used and nothing is sent twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np

from refimpl.autograd import Array
from refimpl.autograd.errors import require
from refimpl.layers.config import Config
from refimpl.layers.mla import KV
from refimpl.layers.numerics.quantisation import pack_latent, unpack_latent
from refimpl.parallel_emulation.collectives import shares
from refimpl.parallel_emulation.comm import Recv, Send

KVFormat = Literal["own", "bf16", "fp8"]


def to_wire(c_kv: Array, k_rope: Array, fmt: KVFormat) -> Array:
    """Latents as they travel.  c_kv (T, C), k_rope (T, Dr) -> (T, C+Dr), or (T, bytes) in FP8."""
    require(fmt in ("own", "bf16", "fp8"), f"the KV transfer is in 'own', 'bf16' or 'fp8', not {fmt!r}")
    if fmt == "fp8":
        return pack_latent(c_kv, k_rope)
    both = np.concatenate([c_kv, k_rope], axis=1)
    return both.astype(ml_dtypes.bfloat16) if fmt == "bf16" else both


def from_wire(rows: Array, c: Config, fmt: KVFormat, dtype: Any) -> KV:
    """What attention reads.  rows (T, *) -> c_kv (1, T, C), k_rope (1, T, Dr)."""
    if fmt == "fp8":
        latent, key = unpack_latent(rows, latent=c.kv_lora_rank, rope=c.qk_rope_head_dim)
    else:
        latent, key = rows[:, : c.kv_lora_rank], rows[:, c.kv_lora_rank :]
    return latent.astype(dtype)[None], key.astype(dtype)[None]


def sends(layers: Sequence[KV], to: int, fmt: KVFormat) -> list[Send]:
    """One message a layer, of my tokens.  layers: c_kv (T, C), k_rope (T, Dr) -> messages to rank `to`."""
    return [Send(to, to_wire(c, k, fmt), f"kv.L{i}") for i, (c, k) in enumerate(layers)]


def recvs(c: Config, sources: Sequence[int]) -> list[Recv]:
    """The same, layer by layer from each of the ranks that share the prompt's tokens."""
    return [Recv(source, f"kv.L{i}") for source in sources for i in range(c.num_hidden_layers)]


def joined(parts: Sequence[Array], c: Config, length: int, ranks: int, fmt: KVFormat, dtype: Any) -> list[KV]:
    """The messages that `recvs` brought, as the cache of a prompt of that length: c_kv (1, T, C), k_rope (1, T, Dr) a layer."""
    n = c.num_hidden_layers
    held = [len(parts[r * n]) for r in range(ranks)]
    require(held == shares(length, ranks), f"{held} tokens of a prompt of {length} came from {ranks} ranks")
    whole = [np.concatenate([parts[r * n + i] for r in range(ranks)]) for i in range(n)]
    return [from_wire(rows, c, fmt, dtype) for rows in whole]
