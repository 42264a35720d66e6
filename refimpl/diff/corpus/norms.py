"""Mistakes of RMSNorm, the same at each of the model's norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

from .mutant import Mutant, setting

NORMS = ("attn_norm", "ffn_norm", "final_norm", "mtp.hnorm", "mtp.enorm", "mtp.norm")


def rms(x: Array, eps: float) -> Array:
    """sqrt(mean(x^2) + eps).  x (*, D) -> (*, 1)."""
    out: Array = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return out


def _left_out(x: Array, w: Array, *, eps: float) -> Array:
    return x


def _bare(x: Array, w: Array, *, eps: float) -> Array:
    out: Array = x / rms(x, eps)
    return out


def _from_one(x: Array, w: Array, *, eps: float) -> Array:
    out: Array = (1 + w) * x / rms(x, eps)
    return out


def _centred(x: Array, w: Array, *, eps: float) -> Array:
    out: Array = _bare(x - x.mean(axis=-1, keepdims=True), w, eps=eps) * w
    return out


def _by_length(x: Array, w: Array, *, eps: float) -> Array:
    out: Array = w * x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + eps)
    return out


def _then_by_length(x: Array, w: Array, *, eps: float) -> Array:
    """The norm, and then what its mean left out: epsilon counts once for every channel."""
    out: Array = w * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) / np.sqrt(x.shape[-1])
    return out


_WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "N02": ("a norm is left out", _left_out),
    "N03": ("a norm's weight is left out", _bare),
    "N04": ("a norm's weight counts from 1", _from_one),
    "N05": ("LayerNorm instead of RMSNorm", _centred),
    "N06": ("norms divide by the length instead of the root mean square", _by_length),
    "N06b": ("norms divide by the length instead of the root mean square", _then_by_length),
}


def _at(name: str) -> list[Mutant]:
    eps = [
        Mutant(f"N01-{name}-{e:g}", f"the norms' eps is {e:g}", name, setting(name, eps=e)) for e in (1e-5, 1e-6, 1e-12)
    ]
    return eps + [Mutant(f"{id}-{name}", title, name, fn) for id, (title, fn) in _WRONG.items()]


MUTANTS = (
    *[m for name in NORMS for m in _at(name)],
    Mutant("N06-q_a", _WRONG["N06"][0], "mla.q_a_norm", _by_length),
    Mutant(
        "N06-c_kv", _WRONG["N06"][0], "mla.c_kv", lambda kv, w, *, eps: _by_length(kv[..., : w.shape[0]], w, eps=eps)
    ),
)
