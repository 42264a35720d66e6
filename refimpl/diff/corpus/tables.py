"""Mistakes of rotary tables: positions, frequencies, YaRN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.rope import RopeScaling, inv_freq, mscale

from .mutant import Mutant, setting, threads

_TABLES = "mla.rope_tables"
Change = Callable[[Any], Any]
"""What is made of a part of the tables."""


def yarn(c: Config) -> bool:
    """Whether YaRN stretches anything."""
    return c.yarn is not None and c.yarn.factor > 1


def _same(x: Any) -> Any:
    return x


def _factor(scaling: RopeScaling | None) -> float:
    return scaling.attention_factor if scaling else 1.0


def _one(scaling: RopeScaling | None) -> float:
    return 1.0


def uneven(c: Config) -> bool:
    """Whether YaRN multiplies cos and sin by a factor that is not 1."""
    return yarn(c) and c.yarn is not None and c.yarn.attention_factor != 1


def _tables(
    *,
    places: Change = _same,
    scaling: Change = _same,
    freq: Change = _same,
    angles: Change = _same,
    factor: Change = _factor,
) -> Callable[..., Array]:
    """Tables with changed positions, YaRN settings of the frequencies, frequencies, angles, or factor of YaRN's settings on cos and
    sin.
    """

    def fn(positions: Array, *, dim: int, theta: float, yarn: RopeScaling | None, dtype: Any) -> Array:
        angle = angles(places(positions.astype(np.float64))[..., None] * freq(inv_freq(dim, theta, scaling(yarn))))
        out: Array = (np.stack([np.cos(angle), np.sin(angle)]) * factor(yarn)).astype(dtype)
        return out

    return fn


def _counted(positions: Array) -> Array:
    """0, 1, 2, ... whatever is given."""
    return np.arange(positions.shape[1], dtype=np.float64) + 0 * positions


def _narrow(x: Array) -> Array:
    return to_bf16(x.astype(np.float32)).astype(np.float64)


def _other_theta(theta: float) -> Callable[[Config], bool]:
    return lambda c: c.rope_theta != theta


MUTANTS = (
    Mutant(
        "A06",
        "cos and sin are multiplied by one mscale instead of the ratio of two",
        _TABLES,
        _tables(factor=lambda y: mscale(y.factor, y.mscale or 1.0)),
        threads("imp #880; sglang #22711; exllamav3 #259"),
        "YaRN",
        yarn,
    ),
    Mutant(
        "A06b",
        "cos and sin are not multiplied by the ratio of the two mscales",
        _TABLES,
        _tables(factor=_one),
        regime="mscale that is not mscale_all_dim",
        applies=yarn,
    ),
    Mutant(
        "A06c",
        "cos and sin are multiplied by one mscale as well as by the ratio of two",
        _TABLES,
        _tables(factor=lambda y: mscale(y.factor, y.mscale or 1.0) * y.attention_factor),
        regime="mscale that is not mscale_all_dim",
        applies=uneven,
    ),
    Mutant(
        "A11",
        "the frequencies are those without YaRN",
        _TABLES,
        _tables(scaling=lambda y: None),
        threads("deepseek.cpp #15"),
        "long positions",
        yarn,
    ),
    Mutant(
        "A11c",
        "there is no YaRN in the rotary tables, neither its frequencies nor its factor",
        _TABLES,
        _tables(scaling=lambda y: None, factor=_one),
        regime="mscale that is not mscale_all_dim",
        applies=uneven,
    ),
    Mutant(
        "A10",
        "YaRN starts from max_position_embeddings instead of the original length",
        _TABLES,
        _tables(
            scaling=lambda y: replace(
                y, original_max_position_embeddings=int(y.original_max_position_embeddings * y.factor)
            )
        ),
        threads("Megatron-LM #1418; Pai-Megatron #560"),
        "long positions",
        yarn,
    ),
    Mutant(
        "A11b",
        "positions are divided by the factor (linear scaling instead of YaRN)",
        _TABLES,
        lambda p, *, yarn, **k: _tables(scaling=lambda y: None, places=lambda x: x / yarn.factor, factor=_one)(
            p, yarn=yarn, **k
        ),
        regime="long positions",
        applies=yarn,
    ),
    Mutant(
        "A14",
        "positions are rounded to bfloat16",
        _TABLES,
        _tables(places=_narrow),
        threads("flashinfer #585; sglang #33117; prime-rl #3584"),
        "positions from 256 on",
    ),
    Mutant(
        "A14b",
        "frequencies are rounded to bfloat16",
        _TABLES,
        _tables(freq=_narrow),
        threads("flashinfer #585"),
        "positions",
    ),
    Mutant(
        "A14c",
        "positions, frequencies and angles are rounded to bfloat16",
        _TABLES,
        _tables(places=_narrow, freq=_narrow, angles=_narrow),
        regime="positions",
    ),
    Mutant("X10", "positions begin at 1", _TABLES, _tables(places=lambda p: p + 1)),
    Mutant(
        "X24",
        "positions are counted from 0, whatever they are; scores stay where all of a sequence's are off alike",
        _TABLES,
        _tables(places=_counted),
        regime="positions that do not begin at 0",
    ),
    *[
        Mutant(
            f"X11{letter}",
            f"RoPE's theta is {text}",
            _TABLES,
            setting(_TABLES, theta=float(text)),
            applies=_other_theta(float(text)),
        )
        for letter, text in (("", "1e6"), ("b", "500000"), ("c", "10000"))
    ],
)
