"""mlx-lm's files: experts stacked in switch_mlp, kv_b_proj as embed_q (H, C, Dn) and unembed_out (H, Dv, C), codes of 2 to 8 bits
packed into uint32 with a scale and a bias (or a power of two) a group.

w = scale * code + bias, codes packed from the lowest bit up (mlx.core.quantize).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.checkpoint import Checkpoint
from refimpl.checkpoint.held import Array, Part, Stored
from refimpl.layers.config import Config

_BITS = (1, 2, 3, 4, 5, 6, 8)
_FLOATS: dict[tuple[int, int], tuple[str, int, Any, Any]] = {
    (4, 32): ("mxfp4", 3, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e8m0fnu),
    (8, 32): ("mxfp8", 14, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu),
    (4, 16): ("nvfp4", 3, ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn),
}
"""(bits, group) of codes without biases -> mode, widest steps (4 to 6, 416 to 448) to the largest, dtypes of code and scale."""
_STACK = re.compile(r"(.+\.mlp)\.switch_mlp\.(.+)")


@dataclass(frozen=True)
class _Tensor:
    """A weight of the file, whole or one matrix of a stack, and how it is stored."""

    shape: tuple[int, ...]
    stored: Stored
    read: Callable[..., Array]


def parts(ckpt: Checkpoint, c: Config) -> Mapping[str, Part]:
    """Checkpoint names -> parts, dequantised when read. SpecError for packed codes that fit no width of the model."""
    found: dict[str, Part] = {}
    for name in ckpt:
        if name.endswith((".scales", ".biases")) or ".unembed_out." in name:
            continue
        if name.endswith(".embed_q.weight"):
            attention = name.removesuffix(".embed_q.weight")
            found[f"{attention}.kv_b_proj.weight"] = _joined(ckpt, attention, c)
        elif m := _STACK.fullmatch(name):
            t = _tensor(ckpt, name, _width(name, c))
            to = f"{m[1]}.experts.{{}}.{m[2]}"
            found |= {to.format(e): Part(t.shape[1:], (t.stored,), partial(t.read, e)) for e in range(t.shape[0])}
        else:
            t = _tensor(ckpt, name, _width(name, c))
            found[name] = Part(t.shape, (t.stored,), t.read)
    return found


def _joined(ckpt: Checkpoint, attention: str, c: Config) -> Part:
    """kv_b_proj (H (Dn + Dv), C)."""
    other = f"{attention}.unembed_out.weight"
    require(other in ckpt, f"{attention}.embed_q without unembed_out")
    k, v = _tensor(ckpt, f"{attention}.embed_q.weight", c.qk_nope_head_dim), _tensor(ckpt, other, c.kv_lora_rank)
    fit = len(k.shape) == len(v.shape) == 3 and v.shape[::2] == k.shape[:2]
    require(fit, f"embed_q is {k.shape}, unembed_out {v.shape}; expected (H, C, Dn) and (H, Dv, C)")
    heads, latent, nope = k.shape

    def joined() -> Array:
        return np.concatenate([k.read().transpose(0, 2, 1), v.read()], axis=1).reshape(-1, latent)

    def split(x: Array) -> tuple[Array, ...]:
        k_b, v_b = np.split(x.reshape(heads, -1, latent), [nope], axis=1)
        return k_b.transpose(0, 2, 1), v_b

    return Part((heads * (nope + v.shape[1]), latent), (k.stored, v.stored), joined, split)


def _width(name: str, c: Config) -> int:
    """Columns of the weight as the model has it: what a row of packed codes stands for; 0 where nothing is packed."""
    moe = ".switch_mlp." in name or ".shared_experts." in name
    inner = c.moe_intermediate_size * (c.n_shared_experts or 1 if ".shared_experts." in name else 1)
    columns = {
        "q_b_proj": c.q_lora_rank or 0,
        "kv_b_proj": c.kv_lora_rank,
        "o_proj": c.num_attention_heads * c.v_head_dim,
        "down_proj": inner if moe else c.intermediate_size,
        "eh_proj": 2 * c.hidden_size,
    }
    return columns.get(name.split(".")[-2], c.hidden_size)


def _tensor(ckpt: Checkpoint, name: str, width: int) -> _Tensor:
    base = name.removesuffix(".weight")
    if f"{base}.scales" not in ckpt:

        def plainly(e: int | None = None) -> Array:
            return ckpt[name] if e is None else ckpt[name][e]

        return _Tensor(ckpt.shape(name), Stored(ckpt.dtype(name)), plainly)
    packed, groups = ckpt.shape(name), ckpt.shape(f"{base}.scales")
    bits = packed[-1] * 32 / width
    fit = bits in _BITS and width % groups[-1] == 0 and packed[:-1] == groups[:-1] and ckpt.dtype(name) == "U32"
    require(fit, f"{name}: codes {packed} and scales {groups} do not make rows of {width}")
    group = width // groups[-1]
    has_biases = f"{base}.biases" in ckpt
    if not has_biases and (int(bits), group) not in _FLOATS:
        raise SpecError(f"{name}: {bits:g}-bit codes in groups of {group} without biases; expected {base}.biases")
    mode, steps = ("affine", 2 ** int(bits) - 1) if has_biases else _FLOATS[int(bits), group][:2]
    stored = Stored(f"{mode} {int(bits)} bits, groups of {group}", steps, group)
    return _Tensor((*packed[:-1], width), stored, partial(_values, ckpt, base, int(bits), group))


def _values(ckpt: Checkpoint, base: str, bits: int, group: int, e: int | None = None) -> Array:
    """scale * code + bias, a group of the last axis at a time."""

    def of(kind: str) -> Array:
        x = ckpt[f"{base}.{kind}"]
        return x if e is None else x[e]

    codes = unpacked(of("weight"), bits)
    grouped = codes.reshape(*codes.shape[:-1], -1, group)
    if f"{base}.biases" in ckpt:
        scales, biases = (of(kind).astype(np.float32)[..., None] for kind in ("scales", "biases"))
        x = grouped.astype(np.float32) * scales + biases
    else:
        *_, code, scale = _FLOATS[bits, group]
        x = grouped.view(code).astype(np.float32) * of("scales").view(scale).astype(np.float32)[..., None]
    flat: Array = x.reshape(codes.shape)
    return flat


def unpacked(words: Array, bits: int) -> Array:
    """uint32 (..., n bits / 32) -> codes uint8 (..., n), the first in the lowest bits."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    each = stream.reshape(*words.shape[:-1], -1, bits)
    codes: Array = np.packbits(each, axis=-1, bitorder="little")[..., 0]
    return codes
