"""Mistakes of matrix products that sizes hide."""

from __future__ import annotations

from refimpl.autograd.tensor import Array

from .mutant import Mutant, stage

_PRODUCTS = ("mla.q_a", "mla.kv_a", "mlp.gate", "mlp.up", "mlp.down", "shared.gate", "shared.up", "moe.shared")
_BLOCK = 128


def _whole_blocks(name: str, x: Array, w: Array, b: Array | None = None) -> Array:
    """A loop over whole blocks of input channels, where there is one."""
    k = x.shape[-1] // _BLOCK * _BLOCK or x.shape[-1]
    out: Array = stage(name)(x[..., :k], w[..., :k], b)
    return out


MUTANTS = tuple(
    [
        Mutant(
            f"X50-{name}",
            "input channels behind the last whole block of 128 are left out of a product",
            name,
            lambda x, w, b=None, name=name: _whole_blocks(name, x, w, b),
            regime="more than 128 input channels, no multiple of 128",
        )
        for name in _PRODUCTS
    ]
)
