"""The gate of DeepSeekMoE (R 2.1.2, eqs 12-16), its balancing bias and the sequence-wise balance loss (eqs 17-20)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.tensor import Array, data_of

from .config import Config
from .module import Module, Unset
from .stage import stage


def top_k(x: Array, k: int) -> Array:
    """Indices of the k largest of the last axis, largest first; ties go to the lower index.  x (*, E) -> (*, k).

    DeepSeek's TileKernels state this tie rule; torch.topk leaves it open.
    """
    return np.argsort(-x, axis=-1, kind="stable")[..., :k]


@stage("router.logits", what="affinities before the sigmoid", eq="R eq 15, inside the sigmoid", shape="B S E")
def logits(x: Any, w: Any) -> Any:
    """u e_i for every expert.  x (B, S, D), w (E, D) -> (B, S, E)."""
    return nn_ops.linear(x, w)


@stage("router.scores", what="affinities s", eq="R eq 15", shape="B S E")
def scores(z: Any, *, func: Literal["sigmoid", "softmax"]) -> Any:
    """s = sigmoid(z) (V3), or softmax over all experts (V2).  z (B, S, E) -> (B, S, E)."""
    return nn_ops.sigmoid(z) if func == "sigmoid" else nn_ops.softmax(z)


@stage("router.choice", what="affinities plus bias: what is chosen by", eq="R eq 16: s + b", shape="B S E")
def choice(s: Array, b: Array) -> Array:
    """What the selection looks at, and nothing else does.  s (B, S, E), b (E,) -> (B, S, E); no gradient."""
    return data_of(s) + data_of(b)


@stage(
    "router.group_scores", what="score of every group of experts", eq="R 2.1.2 (node-limited routing)", shape="B S G"
)
def group_scores(a: Array, *, n_group: int, best: int) -> Array:
    """Sum of the `best` (V3: 2, V2: 1) highest affinities of each group of consecutive experts.  a (B, S, E) -> (B,
    S, G).
    """
    grouped = np.sort(data_of(a).reshape(*a.shape[:-1], n_group, a.shape[-1] // n_group), axis=-1)
    return grouped[..., -best:].sum(axis=-1)


@stage("router.groups", what="groups that are kept", eq="R 2.1.2 (at most M nodes)", shape="B S M", compare="set")
def groups(a: Array, *, topk_group: int) -> Array:
    """The groups with the highest scores.  a (B, S, G) -> (B, S, topk_group) int."""
    return top_k(a, topk_group)


@stage("router.ids", what="chosen experts", eq="R eq 16", shape="B S K", compare="set")
def ids(a: Array, kept: Array | None, *, k: int, n_group: int, fill: float) -> Array:
    """The top-k experts among the kept groups, best first; others count as `fill`.  a (B, S, E), kept (B, S, M) or
    None -> (B, S, K) int.
    """
    a = data_of(a)
    if kept is not None:
        inside = (np.arange(n_group, like=kept) == kept[..., None]).any(axis=-2)  # (B, S, G)
        inside = np.repeat(inside, a.shape[-1] // n_group, axis=-1)  # (B, S, E)
        a = np.where(inside, a, a.dtype.type(fill))
    return top_k(a, k)


@stage("router.weights", what="gating values g of the chosen experts", eq="R eqs 12-13", shape="B S K")
def weights(s: Any, ids: Array, *, normalise: bool, eps: float, scale: float) -> Any:
    """g_k = scale s_k / sum over the selected s, from the unbiased scores.  s (B, S, E), ids (B, S, K) -> (B, S, K).

    `scale` (2.5 in V3) is in the released config, not in R.
    """
    g = ops.take_along(s, ids)
    if normalise:
        g = g / (ops.sum(g, axis=-1, keepdims=True) + eps)
    return g * scale


@stage("router.counts", what="tokens of every expert", eq="R 2.1.2 (expert load)", shape="E", compare="exact")
def counts(ids: Array, *, n_experts: int) -> Array:
    """Tokens each expert received in the batch.  ids (B, S, K) -> (E,) int."""
    return np.bincount(ids.reshape(-1), minlength=n_experts)


@stage(
    "router.bias_update",
    what="selection bias after the step",
    eq="R 2.1.2 (auxiliary-loss-free)",
    shape="E",
    tap="router.bias",
)
def bias_update(b: Array, load: Array, *, gamma: float, zero_sum: bool) -> Array:
    """b + gamma for underloaded, b - gamma for overloaded experts, b at exactly the mean.  b (E,), load (E,) int ->
    (E,).
    """
    step = gamma * np.sign(load.mean() - load)
    return (b + (step - step.mean() if zero_sum else step)).astype(b.dtype)


@stage("loss.seq_aux", what="sequence-wise balance loss", eq="R eqs 17-20", shape="")
def seq_aux(s: Any, routed: Array | None, *, k: int, alpha: float) -> Any:
    """alpha sum_i f_i P_i per sequence, averaged over the batch.  s (B, S, E), routed (B, S, K) or None -> ().

    f_i = E/(K S) times the tokens whose unbiased, ungrouped top-K holds i (eq 18 as written), or with `routed` those
    sent to i; P_i = mean_t s_i,t / sum_j s_j,t. No gradient through f.
    """
    n_experts, length = s.shape[-1], s.shape[1]
    chosen = top_k(data_of(s), k) if routed is None else routed
    load = (chosen[..., None] == np.arange(n_experts, like=chosen)).sum(axis=(1, 2))  # (B, E)
    f = (load * (n_experts / (k * length))).astype(s.dtype)
    p = ops.mean(s / ops.sum(s, axis=-1, keepdims=True), axis=1)  # (B, E)
    return ops.sum(f * p) * (alpha / len(f))


@dataclass(frozen=True)
class Routing:
    """What a router decided: scores (B, S, E), ids (B, S, K), weights (B, S, K)."""

    scores: Any
    ids: Array
    weights: Any


class MoEGate(Module):
    """weight (E, D), and in V3 e_score_correction_bias (E,), trained by load instead of by gradient."""

    def __init__(self, c: Config) -> None:
        self.config = c
        self.weight: Any = Unset((c.n_routed_experts, c.hidden_size))
        if c.topk_method == "noaux_tc":
            self.e_score_correction_bias: Any = Unset((c.n_routed_experts,))

    def __call__(self, x: Any) -> Routing:
        """x (B, S, D) -> Routing."""
        c = self.config
        s = scores(logits(x, self.weight), func=c.scoring_func)
        a = choice(s, self.e_score_correction_bias) if c.topk_method == "noaux_tc" else s
        kept = None
        if c.n_group > 1 and c.topk_method != "greedy":
            best = 2 if c.topk_method == "noaux_tc" else 1
            kept = groups(group_scores(a, n_group=c.n_group, best=best), topk_group=c.topk_group)
        fill = -np.inf if c.dialect.masked_group_fill == "-inf" else 0.0
        chosen = ids(a, kept, k=c.num_experts_per_tok, n_group=c.n_group, fill=fill)
        g = weights(
            s,
            chosen,
            normalise=c.norm_topk_prob,
            eps=c.dialect.topk_denominator_eps,
            scale=c.routed_scaling_factor,
        )
        return Routing(s, chosen, g)
