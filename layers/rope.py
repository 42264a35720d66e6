"""Rotary position embedding and YaRN (R 2.1.1 eqs 4, 8; R 4.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array

from .stage import stage


def mscale(factor: float, m: float) -> float:
    """0.1 m ln(factor) + 1 for factor > 1, else 1: YaRN's sqrt(1/t) (R 4.3; arXiv 2309.00071)."""
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's settings, `rope_scaling` of config.json. The defaults are DeepSeek-V3's (R 4.3: s = 40, alpha = 1, beta
    = 32).
    """

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float | None = 1.0
    mscale_all_dim: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            good = isinstance(value, int | float) and math.isfinite(value) and value > 0
            require(good, f"rope_scaling.{name} is {value!r}; it must be a positive number")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and math.isfinite(value)
            require(value is None or number, f"rope_scaling.{name} is {value!r}; it must be a number or null")

    @classmethod
    def from_dict(cls, d: Mapping[str, Any] | None) -> RopeScaling | None:
        """From `rope_scaling` (key "type") or `rope_parameters` (key "rope_type"); None for plain RoPE."""
        kind = "default" if d is None else d.get("rope_type", d.get("type", "default"))
        if kind == "default":
            return None
        assert d is not None
        require(kind == "yarn", f"rope type {kind!r}; the specification has 'default' and 'yarn'")
        known = {"rope_type", "type", "rope_theta", "attention_factor", "truncate", *cls.__dataclass_fields__}
        unknown = sorted(set(d) - known)
        require(not unknown, f"rope settings that the specification does not know: {', '.join(unknown)}")
        if d.get("attention_factor") is not None or d.get("truncate") is False:
            raise SpecError("rope attention_factor / truncate=false are not part of DeepSeek-V3")
        for key in ("factor", "original_max_position_embeddings"):
            require(d.get(key) is not None, f"rope type yarn needs {key!r}")
        values = {k: d[k] for k in cls.__dataclass_fields__ if d.get(k) is not None}
        return cls(**({"mscale": None, "mscale_all_dim": None} | values))

    def to_dict(self) -> dict[str, Any]:
        """The `rope_scaling` form."""
        return {"type": "yarn"} | asdict(self)

    @property
    def softmax_factor(self) -> float:
        """m(factor, mscale_all_dim)^2, or 1 if mscale_all_dim is not given."""
        return mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    @property
    def attention_factor(self) -> float:
        """What multiplies cos and sin: m(factor, mscale) / m(factor, mscale_all_dim), 1 for V3."""
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor, 1.0)


@cache
def inv_freq(dim: int, theta: float, yarn: RopeScaling | None) -> Array:
    """theta^(-2i/Dr), slowed down by `factor` where a wavelength exceeds the original context -> (Dr/2,) float64.

    corr(r) is the channel whose wavelength makes r turns within the original length; channels below corr(beta_fast)
    keep their frequency, those above corr(beta_slow) are divided by factor, a linear ramp lies between (R 4.3).
    """
    i = np.arange(dim // 2, dtype=np.float64)
    freq = theta ** (-2 * i / dim)
    if yarn is None:
        return _kept(freq)

    def corr(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(corr(yarn.beta_fast)), 0)
    high: float = min(math.ceil(corr(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((i - low) / (high - low), 0, 1)
    return _kept(freq / yarn.factor * ramp + freq * (1 - ramp))


def _kept(freq: Array) -> Array:
    """The array, which every run shares from now on: read-only."""
    freq.flags.writeable = False
    return freq


@stage(
    "mla.rope_tables",
    what="cos, then sin, of every position and frequency",
    eq="R 2.1.1 (RoPE), 4.3 (YaRN)",
    shape="2 B S Dr/2",
)
def rope_tables(positions: Array, *, dim: int, theta: float, yarn: RopeScaling | None, dtype: Any) -> Array:
    """cos and sin of position times frequency.  positions (B, S) int -> (2, B, S, Dr/2).

    The angle is formed in `dtype`, as every implementation does (float32: at position 163,839 it is off by up to
    0.008 rad).
    """
    freq = inv_freq(dim, theta, yarn).astype(dtype)
    angle = positions[..., None].astype(dtype) * np.asarray(freq, like=positions)  # (B, S, Dr/2)
    factor = yarn.attention_factor if yarn else 1.0
    return np.stack([np.cos(angle) * factor, np.sin(angle) * factor])
