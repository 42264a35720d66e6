"""Mistakes of the router and of what is done with its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.router import top_k

from .mutant import Best, Mutant, scaled, setting, stage, threads

_WEIGHTS, _IDS, _BIAS = "router.weights", "router.ids", "w:mlp.gate.e_score_correction_bias"
_SMALL = "chosen scores whose sum is near 1e-20, or 0"


def _grouped(c: Config) -> bool:
    return c.n_group > 1 and c.topk_method != "greedy"


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


def _filled(a: Array, inside: Array, fill: float) -> Array:
    """a, and `fill` in groups that are not inside.  a (*, E), inside (*, G) -> (*, E)."""
    return np.where(np.repeat(inside, a.shape[-1] // inside.shape[-1], axis=-1), a, a.dtype.type(fill))


def _inside(kept: Array, n_group: int) -> Array:
    """Which groups are kept.  kept (*, M) -> (*, G)."""
    found: Array = (np.arange(n_group) == kept[..., None]).any(axis=-2)
    return found


def _zeros(a: Array, kept: Array | None, *, n_group: int, **static: Any) -> Array:
    return a if kept is None else _filled(a, _inside(kept, n_group), 0.0)


def _all_alike(a: Array, kept: Array | None, **static: Any) -> Array:
    return a


def _first_groups(a: Array, *, topk_group: int) -> Array:
    return np.broadcast_to(np.arange(topk_group), (*a.shape[:-1], topk_group)).copy()


def _grouped_after_all(groups: int, keep: int) -> Best:
    """Groups where the model has none."""

    def scores(a: Array, kept: Array | None, *, n_group: int, fill: float, **static: Any) -> Array:
        if kept is None and a.shape[-1] % groups == 0 and a.shape[-1] > groups:
            kept, n_group = top_k(stage("router.group_scores")(a, n_group=groups, best=2), keep), groups
        return a if kept is None else _filled(a, _inside(kept, n_group), fill)

    return Best(scores)


def _ungrouped(n_group: int, keep: int) -> Callable[[Config], bool]:
    """Whether a model has no groups, and enough experts for these."""

    def applies(c: Config) -> bool:
        each, rest = divmod(c.n_routed_experts, n_group)
        fits = not rest and each > 1 and keep * each >= c.num_experts_per_tok
        return c.n_group == 1 and c.topk_method == "noaux_tc" and fits

    return applies


def _by_threshold(a: Array, kept: Array | None, *, fill: float, reads: tuple[Array, ...], **static: Any) -> Array:
    """Every group is kept whose score is not below that of the last kept one."""
    assert kept is not None
    least = np.take_along_axis(reads[0], kept, axis=-1).min(axis=-1, keepdims=True)
    return _filled(a, reads[0] >= least, fill)


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


def _last_wins(down: Array, ids: Array, weights: Array | None) -> Array:
    """A scatter with duplicate indices: of a token's experts only the last one counts."""
    w = np.ones(ids.shape, down.dtype) if weights is None else weights
    last = np.argmax(ids, axis=-1)[..., None]
    only = np.where(np.arange(ids.shape[-1]) == last, w, 0)
    out: Array = stage("moe.routed")(down, ids, only)
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
    Mutant(
        "R02",
        "experts of dropped groups count as 0 instead of never",
        _IDS,
        Best(_zeros),
        threads(
            "vLLM #13474; transformers #45440; DeepSeek-V3 #741; ktransformers #1148; sglang #3705; flashinfer #4639"
        ),
        "biased scores below 0 in kept groups",
        _grouped,
    ),
    Mutant(
        "R03",
        "a group's score is its best expert's, not the sum of its two best",
        "router.group_scores",
        setting("router.group_scores", best=1),
        threads("vLLM #13474; mistral.rs #1278"),
        "groups",
        _grouped,
    ),
    Mutant("R04", "softmax instead of sigmoid", "router.scores", _softmax, threads("TensorRT-Model-Connect #669")),
    Mutant(
        "R04b", "sigmoid instead of softmax", "router.scores", _sigmoid, applies=lambda c: c.scoring_func == "softmax"
    ),
    Mutant(
        "R04c",
        "the best experts of all groups are chosen",
        _IDS,
        Best(_all_alike),
        threads("TensorRT-Model-Connect #669; sglang #29042"),
        "groups",
        _grouped,
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
        "R14",
        "the score is recovered as (s + b) - b",
        _WEIGHTS,
        _bias_cancels,
        threads("flashinfer #3875"),
        "scores far below the bias",
        _biased,
        (_BIAS,),
    ),
    Mutant("R15", "the first groups are kept, whatever their scores", "router.groups", _first_groups, applies=_grouped),
    *[
        Mutant(
            "R15b" if (groups, keep) == (8, 4) else f"R15b-{groups}-{keep}",
            f"a model without groups is routed in {groups}, of which {keep} {'is' if keep == 1 else 'are'} kept",
            _IDS,
            _grouped_after_all(groups, keep),
            threads("vLLM #33858") if (groups, keep) == (8, 4) else (),
            regime="no groups",
            applies=_ungrouped(groups, keep),
        )
        for groups, keep in ((8, 4), (8, 3), (8, 2), (4, 3), (4, 2), (4, 1), (2, 1))
    ],
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
    Mutant("X01", "the routed experts are not weighted", "moe.routed", _unweighted),
    Mutant("X04", "the weights are normalised over all experts", _WEIGHTS, _over_all),
    Mutant("X05", "the router reads the residual before the norm", "router.logits", _unnormed, reads=("resid_mid",)),
    Mutant(
        "X06",
        "groups whose score ties with the last kept one's are kept too",
        _IDS,
        Best(_by_threshold),
        regime="exact ties of groups",
        applies=_grouped,
        reads=("router.group_scores",),
    ),
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
)
