"""Known bugs of what FP8 products read: they show in a trace that holds codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.fp8 import Fp8
from refimpl.layers.fp8_parts import (
    CODES,
    SCALE,
    TILE,
    codes_of,
    group_major,
    on_codes,
    rows_of,
    scales_of,
    tiles_of,
)
from refimpl.layers.precision import FP8
from refimpl.layers.stage import STAGES

from .mutant import Mutant, threads

_KERNELS = {name: FP8.kernel(name) for name in STAGES}
PRODUCTS = [name for name, k in _KERNELS.items() if isinstance(k, Fp8) and not k.recompute]
"""Stages whose product an FP8 run quantises."""


def _exact(how: Fp8) -> Fp8:
    """The kernel without powers of two."""
    return replace(how, inputs=replace(how.inputs, power_of_two=None))


def _divided_by_zero(x: Array, s: Array, *, how: Fp8, lead: int) -> Array:
    rows = rows_of(x, lead)
    dead = np.repeat(np.abs(tiles_of(rows)).max(axis=-1) == 0, TILE, axis=-1)[..., : rows.shape[-1]]
    return np.where(dead.reshape(x.shape), np.nan, codes_of(x, s, how=how, lead=lead))


def _exact_then_rounded(x: Array, s: Array, *, how: Fp8, lead: int) -> Array:
    return codes_of(x, scales_of(x, how=_exact(how), lead=lead), how=how, lead=lead)


def _rounded(up_from: float) -> Callable[..., Array]:
    """Powers of two rounded up from that many times the lower one."""

    def fn(x: Array, *, how: Fp8, lead: int) -> Array:
        s = scales_of(x, how=_exact(how), lead=lead)
        if not how.inputs.power_of_two:
            return s
        mantissa, exponent = np.frexp(s)  # mantissa in [0.5, 1)
        return np.ldexp(np.ones((), s.dtype), exponent - 1 + (2 * mantissa >= up_from))

    return fn


def _reading(change: Callable[[Array, int], Array], stage: str) -> Callable[..., Array]:
    """A product that reads other scales than those it is given."""

    def fn(codes: Array, s: Array, *rest: Any, how: Fp8, lead: int, **static: Any) -> Array:
        width = rows_of(codes, lead).shape[-1]
        return on_codes(stage)(codes, change(s, width), *rest, how=how, lead=lead, **static)

    return fn


def _group_major(s: Array, width: int) -> Array:
    return group_major(s)


def _token_major(s: Array, width: int) -> Array:
    """The other way: scales a tile after the other, read a token after the other."""
    return np.ascontiguousarray(s.reshape(-1, s.shape[-1]).T).reshape(s.shape)


def _exponent(s: Array, width: int) -> Array:
    _, exponent = np.frexp(s)
    return np.ldexp(np.ones((), s.dtype), exponent - 1)


def _last_whole(s: Array, width: int) -> Array:
    """The ragged tile with the scale of the one before."""
    if width < TILE or width % TILE == 0:
        return s
    return np.concatenate([s[..., :-1], s[..., -2:-1]], axis=-1)


_READINGS = (
    (
        "F12",
        "the product reads scales of activations tile by tile that were written token by token",
        _group_major,
        "sglang #29036; sglang #29038; vLLM #54521",
    ),
    ("F12b", "the product reads scales of activations token by token that were written tile by tile", _token_major, ""),
    ("F11", "the product takes only the exponent of the scales of activations", _exponent, "vLLM #22399"),
    (
        "F16",
        "the ragged last tile of activations is read with the scale of the tile before",
        _last_whole,
        "torchao #4714; vLLM #21787",
    ),
)


def _products() -> Iterator[Mutant]:
    for id, title, change, where in _READINGS:
        for stage in PRODUCTS:
            yield Mutant(f"{id}-{stage}", title, stage, _reading(change, stage), threads(where) if where else (), "fp8")


MUTANTS = (
    Mutant(
        "F08",
        "a tile of zeros is divided by its scale of 0",
        CODES,
        _divided_by_zero,
        threads("lmdeploy #3652"),
        "fp8",
    ),
    Mutant(
        "F09",
        "codes are made with the exact scale, which is then rounded to a power of two",
        CODES,
        _exact_then_rounded,
        threads("sglang #28307; sglang #28418; sglang #26766"),
        "fp8",
    ),
    Mutant(
        "F13",
        "scales are rounded to the nearest power of two instead of up",
        SCALE,
        _rounded(1.5),
        threads("sglang #29954; sglang #29956"),
        "fp8",
    ),
    Mutant("F13b", "scales are rounded down to a power of two instead of up", SCALE, _rounded(2.0), (), "fp8"),
    *_products(),
)
