"""Mistakes around every block: residuals, feed-forward, shared experts, embedding, head, MTP."""

from __future__ import annotations

from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

from .mutant import Mutant, scaled, stage, threads

_ACTS = ("mlp.act", "shared.act", "moe.act")


def _shared(c: Config) -> bool:
    return c.n_shared_experts > 0


def _mtp(c: Config) -> bool:
    return c.num_nextn_predict_layers > 0


def _gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def _gelu_tanh(x: Array) -> Array:
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _other_act(f: Callable[[Array], Array]) -> Callable[..., Any]:
    """f(gate) up, times the routing weight if ids and weights are given: rows lie by expert, then by token."""

    def fn(gate: Array, up: Array, ids: Array | None = None, weights: Array | None = None) -> Any:
        y = (f(gate) * up).astype(gate.dtype)
        if ids is None or weights is None:
            return y
        return y * weights.reshape(-1)[np.argsort(ids, axis=None, kind="stable")][:, None]

    return fn


def _acts() -> list[Mutant]:
    kinds = {
        "exact GELU instead of SiLU": _gelu,
        "tanh GELU instead of SiLU": _gelu_tanh,
        "ReLU instead of SiLU": lambda x: np.maximum(x, 0),
        "sigmoid instead of SiLU": lambda x: 1 / (1 + np.exp(-x)),
        "GELU's approximation x sigmoid(1.702 x) instead of SiLU": lambda x: x / (1 + np.exp(-1.702 * x)),
    }
    found = [
        Mutant(f"X30-{name}-{i}", title, name, _other_act(f))
        for name in _ACTS
        for i, (title, f) in enumerate(kinds.items())
    ]
    swapped: list[Mutant] = [
        Mutant(f"X31-{name}", "gate and up are swapped", name, lambda g, u, *rest, name=name: stage(name)(u, g, *rest))
        for name in _ACTS
    ]
    return found + swapped


def _from_norm(x: Array, y: Array, *, reads: tuple[Array, ...]) -> Array:
    return reads[0] + y


MUTANTS = (
    *_acts(),
    Mutant(
        "R16",
        "the shared experts are left out",
        "moe.out",
        lambda routed, shared: routed * 1,
        threads("sglang #38963"),
        applies=_shared,
    ),
    Mutant(
        "R17",
        "the shared experts give nothing",
        "moe.shared",
        scaled("moe.shared", 0.0),
        threads("ROCm/ATOM #1527"),
        applies=_shared,
    ),
    Mutant("X32", "the shared experts are scaled too", "moe.out", lambda r, s: r + 2.5 * s, applies=_shared),
    Mutant("X33", "the routed experts are left out", "moe.out", lambda r, s: s * 1, applies=_shared),
    Mutant("X41", "routed and shared experts are averaged", "moe.out", lambda r, s: (r + s) / 2, applies=_shared),
    Mutant("X42", "the residual is taken after attention's norm", "resid_mid", _from_norm, reads=("attn_norm",)),
    Mutant("X43", "the residual is taken after the feed-forward's norm", "resid", _from_norm, reads=("ffn_norm",)),
    Mutant("X34", "the residual is left out after attention", "resid_mid", lambda x, y: y * 1),
    Mutant("X35", "the residual is left out after the feed-forward", "resid", lambda x, y: y * 1),
    Mutant("X36", "attention is left out of the residual", "resid_mid", lambda x, y: x * 1),
    Mutant("X37", "the feed-forward is left out of the residual", "resid", lambda x, y: x * 1),
    Mutant("X38", "the residual counts twice", "resid", lambda x, y: 2 * x + y),
    Mutant(
        "X39",
        "the embedding is scaled by the root of its width",
        "embed",
        lambda t, w: stage("embed")(t, w) * w.shape[1] ** 0.5,
    ),
    Mutant(
        "X40",
        "the tokens are shifted by one",
        "embed",
        lambda t, w: stage("embed")(np.roll(t, 1, axis=1), w),
        ahead=True,
    ),
    Mutant(
        "T01",
        "the halves of MTP's input are swapped",
        "mtp.cat",
        lambda e, h, *, hidden_first: stage("mtp.cat")(e, h, hidden_first=not hidden_first),
        threads("mlx-lm #1469; MaxText #1977; sglang #6423; Megatron-LM #1588; DeepSeek-V3 #712"),
        applies=_mtp,
    ),
    Mutant(
        "T03",
        "MTP's embedding at position 0 is zeroed",
        "mtp.emb",
        lambda t, w, *, depth: stage("mtp.emb")(t, w, depth=depth) * (np.arange(t.shape[1] - depth) > 0)[None, :, None],
        threads("vLLM #33299; vLLM #49938"),
        applies=_mtp,
    ),
    Mutant(
        "T08",
        "MTP embeds the tokens unshifted",
        "mtp.emb",
        lambda t, w, *, depth: stage("mtp.emb")(t, w, depth=0)[:, : t.shape[1] - depth],
        threads("vLLM #14137"),
        applies=_mtp,
    ),
    Mutant(
        "T08b",
        "every MTP depth embeds the tokens shifted by one",
        "mtp.emb",
        lambda t, w, *, depth: stage("mtp.emb")(t, w, depth=1)[:, : t.shape[1] - depth],
        regime="two MTP modules",
        applies=lambda c: c.num_nextn_predict_layers > 1,
    ),
)
