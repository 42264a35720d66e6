"""Mistakes of the router and of what is done with its weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.numerics.formats import to_bf16

from .mutant import Mutant, scaled, setting, stage, threads

_WEIGHTS, _BIAS = "router.weights", "w:mlp.gate.e_score_correction_bias"
_SMALL = "chosen scores whose sum is near 1e-20, or 0"


def _biased(c: Config) -> bool:
    return c.topk_method == "noaux_tc" and c.n_routed_experts > 0


def _bias_leaks(s: Array, ids: Array, *, reads: tuple[Array, ...], **static: Any) -> Array:
    """The weights come from s + b."""
    out: Array = stage(_WEIGHTS)(s + reads[0], ids, **static)
    return out


def _bias_cancels(s: Array, ids: Array, *, reads: tuple[Array, ...], **static: Any) -> Array:
    """s is recovered as (s + b) - b in float32."""
    b = reads[0].astype(np.float32)
    out: Array = stage(_WEIGHTS)(((s.astype(np.float32) + b) - b).astype(s.dtype), ids, **static)
    return out


def _eps_after(s: Array, ids: Array, *, eps: float, **static: Any) -> Array:
    """The epsilon is added to the quotient instead of the denominator."""
    out: Array = stage(_WEIGHTS)(s, ids, eps=0.0, **static) + eps
    return out


def _sum_of_half(s: Array, ids: Array, *, normalise: bool, scale: float, **static: Any) -> Array:
    """g scale / max(sum g, 2^-14)."""
    g = np.take_along_axis(s, ids, axis=-1)
    return g / np.maximum(g.sum(axis=-1, keepdims=True), 2.0**-14) * scale if normalise else g * scale


def _scale_with_norm_only(s: Array, ids: Array, *, normalise: bool, scale: float, **static: Any) -> Array:
    out: Array = stage(_WEIGHTS)(s, ids, normalise=normalise, scale=scale if normalise else 1.0, **static)
    return out


def _shifted_ids(s: Array, ids: Array, **static: Any) -> Array:
    """Each weight is the one of the next slot."""
    return np.roll(stage(_WEIGHTS)(s, ids, **static), 1, axis=-1)


def _over_all(s: Array, ids: Array, *, scale: float, eps: float, **static: Any) -> Array:
    """Weights normalised by the scores of all experts."""
    out: Array = np.take_along_axis(s, ids, axis=-1) / (s.sum(axis=-1, keepdims=True) + eps) * scale
    return out


def _unnormed(x: Array, w: Array, *, reads: tuple[Array, ...]) -> Array:
    """The router reads the residual stream instead of its norm."""
    out: Array = stage("router.logits")(reads[0], w)
    return out


def _softmax(z: Array, **static: Any) -> Array:
    out: Array = stage("router.scores")(z, func="softmax")
    return out


def _sigmoid(z: Array, **static: Any) -> Array:
    out: Array = stage("router.scores")(z, func="sigmoid")
    return out


def _plain_sigmoid(z: Array, **static: Any) -> Array:
    """1 / (1 + exp(-z)) in float32, which is 0 below -88.7."""
    with np.errstate(over="ignore"):
        out: Array = (1 / (1 + np.exp(-z.astype(np.float32)))).astype(z.dtype)
    return out


def _before_sigmoid(s: Array, b: Array) -> Array:
    """sigmoid(z + b), z = log(s / (1 - s))."""
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / (1 + (1 - s) / s * np.exp(-b))


def _weighted_rows(x: Array, ids: Array, *, n_experts: int, reads: tuple[Array, ...]) -> Array:
    """Rows times the weights of their slots, in the order in which they are dispatched."""
    out: Array = stage("moe.rows")(x, ids, n_experts=n_experts)
    return out * reads[0].ravel()[np.argsort(ids, axis=None, kind="stable")][:, None]


def _last_wins(down: Array, ids: Array, weights: Array | None) -> Array:
    """A scatter with duplicate indices: of a token's experts only the last one counts."""
    w = np.ones(ids.shape, down.dtype) if weights is None else weights
    last = np.argmax(ids, axis=-1)[..., None]
    only = np.where(np.arange(ids.shape[-1]) == last, w, 0)
    out: Array = stage("moe.routed")(down, ids, only)
    return out


def _twice(down: Array, ids: Array, weights: Array | None) -> Array:
    out: Array = stage("moe.routed")(down, ids, None if weights is None else weights * weights)
    return out


def _unweighted(down: Array, ids: Array, weights: Array | None) -> Array:
    out: Array = stage("moe.routed")(down, ids, np.ones(ids.shape, down.dtype))
    return out


MUTANTS = (
    Mutant(
        "R01",
        "the selection bias leaks into the experts' weights",
        _WEIGHTS,
        _bias_leaks,
        threads("vLLM #11971; vLLM #12002; transformers #41647; MaxText #1492"),
        "any bias that is not constant",
        _biased,
        (_BIAS,),
    ),
    Mutant("R04", "softmax instead of sigmoid", "router.scores", _softmax, threads("TensorRT-Model-Connect #669")),
    Mutant(
        "R04b", "sigmoid instead of softmax", "router.scores", _sigmoid, applies=lambda c: c.scoring_func == "softmax"
    ),
    Mutant(
        "R05",
        "the selection bias is rounded to bfloat16",
        "router.choice",
        lambda s, b: stage("router.choice")(s, to_bf16(b.astype(np.float32)).astype(s.dtype)),
        threads("vLLM #23640; transformers #42580; sglang #8729; vLLM #50761"),
        "near ties",
        _biased,
    ),
    Mutant(
        "R07",
        "the chosen experts' weights are not renormalised",
        _WEIGHTS,
        setting(_WEIGHTS, normalise=False),
        threads("torchtitan #1418; torchtitan #1419; torchtitan #1448"),
        applies=lambda c: c.norm_topk_prob,
    ),
    Mutant(
        "R07b",
        "the chosen experts' weights are renormalised though the config says no",
        _WEIGHTS,
        setting(_WEIGHTS, normalise=True),
        applies=lambda c: not c.norm_topk_prob,
    ),
    Mutant(
        "R08",
        "the scaling factor is applied only where weights are renormalised",
        _WEIGHTS,
        _scale_with_norm_only,
        threads("sglang-jax #1282"),
        "norm_topk_prob false",
        lambda c: not c.norm_topk_prob,
    ),
    Mutant(
        "R09",
        "the routed scaling factor is applied twice by the router",
        _WEIGHTS,
        lambda s, ids, *, scale, **k: stage(_WEIGHTS)(s, ids, scale=scale * scale, **k),
        threads("vLLM #24118; vLLM #24119; vLLM #24132; vLLM #45037; sglang #8402; sglang #8511"),
    ),
    Mutant(
        "R09b",
        "the routed scaling factor is applied again by the experts",
        "moe.routed",
        scaled("moe.routed", 2.5),
        threads("vLLM #24118; sglang #8402; sglang #35152"),
        applies=lambda c: c.routed_scaling_factor == 2.5,
    ),
    Mutant(
        "R10",
        "the routed scaling factor is not applied",
        _WEIGHTS,
        setting(_WEIGHTS, scale=1.0),
        threads("sglang #12998"),
    ),
    Mutant(
        "R12",
        "the denominator lacks its 1e-20",
        _WEIGHTS,
        setting(_WEIGHTS, eps=0.0),
        threads("sglang #30989; sglang #31017; flashinfer #3803"),
        _SMALL,
    ),
    Mutant("R12b", "the sigmoid overflows below -88", "router.scores", _plain_sigmoid, regime="logits below -88"),
    Mutant("R13", "the epsilon is added after the division", _WEIGHTS, _eps_after, threads("tt-metal #33153"), _SMALL),
    Mutant(
        "R13b",
        "the denominator is no smaller than 2^-14, float16's smallest normal number",
        _WEIGHTS,
        _sum_of_half,
        regime="chosen scores whose sum is below 6e-5",
    ),
    Mutant(
        "R14",
        "the score is recovered as (s + b) - b",
        _WEIGHTS,
        _bias_cancels,
        threads("flashinfer #3875"),
        "scores far below the bias",
        _biased,
        (_BIAS,),
    ),
    Mutant(
        "R18",
        "the selection bias is 0",
        "router.choice",
        lambda s, b: stage("router.choice")(s, b * 0),
        threads("Megatron-Bridge #4199; prime-rl #2681; TRT-LLM #15154; MaxText #2494"),
        "a bias that is not 0",
        _biased,
    ),
    Mutant(
        "R20", "of a token's experts only the last one counts", "moe.routed", _last_wins, threads("Megatron-LM #175")
    ),
    Mutant("X46", "the routing weights are applied twice", "moe.routed", _twice),
    Mutant("X01", "the routed experts are not weighted", "moe.routed", _unweighted),
    Mutant("X04", "the weights are normalised over all experts", _WEIGHTS, _over_all),
    Mutant("X05", "the router reads the residual before the norm", "router.logits", _unnormed, reads=("resid_mid",)),
    Mutant(
        "X07",
        "the routed scaling factor is 2.5, whatever the config says",
        _WEIGHTS,
        setting(_WEIGHTS, scale=2.5),
        regime="another factor",
        applies=lambda c: c.routed_scaling_factor != 2.5,
    ),
    Mutant("X02", "each slot has its neighbour's weight", _WEIGHTS, _shifted_ids),
    Mutant(
        "X03",
        "the selection bias is subtracted",
        "router.choice",
        lambda s, b: stage("router.choice")(s, -b),
        applies=_biased,
    ),
    Mutant(
        "X44",
        "the selection bias is added before the sigmoid",
        "router.choice",
        _before_sigmoid,
        applies=lambda c: _biased(c) and c.scoring_func == "sigmoid",
    ),
    Mutant(
        "X45",
        "the routing weights multiply what the experts read",
        "moe.rows",
        _weighted_rows,
        reads=("router.weights",),
        also={"moe.routed": _unweighted},
    ),
)
