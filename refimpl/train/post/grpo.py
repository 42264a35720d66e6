"""Group relative policy optimisation (R 5.2.2, eqs 26-28; Shao et al. 2024, arXiv 2402.03300): advantages from the rewards of a
group of answers to one prompt, no value model.

R prints ratio and KL for whole answers; the paper that introduced GRPO, and every library, for tokens. Both are here. R
publishes neither epsilon nor beta nor what a group of equal rewards does; the defaults are 0.2 (TRL 1.16), 0.04 (the paper,
section 4.2) and TRL's std with n - 1 plus 1e-4, so that equal rewards teach nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of


@dataclass(frozen=True)
class Variant:
    """`ratio`: of the probabilities of a whole answer, or of each token. `average`: over each answer's tokens and then over
    answers ("answer"), over all tokens ("token"), or the sum over N x `longest` ("constant"). `clip`: how far the ratio may
    fall below 1 and rise above. `beta` weighs the KL term; `scaled`: advantages are divided by their group's deviation.
    """

    ratio: Literal["answer", "token"] = "answer"
    average: Literal["answer", "token", "constant"] = "answer"
    clip: tuple[float, float] = (0.2, 0.2)
    beta: float = 0.04
    scaled: bool = True
    longest: int = 0

    def __post_init__(self) -> None:
        require(self.ratio in ("answer", "token"), f"ratio is {self.ratio!r}; expected answer or token")
        require(self.average in ("answer", "token", "constant"), f"average is {self.average!r}")
        require(self.average != "constant" or self.longest > 0, "average by a constant needs longest, in tokens")
        require(0 <= self.clip[0] <= 1 and self.clip[1] >= 0 <= self.beta, f"clip is {self.clip}, beta {self.beta}")


V3 = Variant()
"""R eqs 26-28 as printed."""
DEEPSEEK_MATH = Variant(ratio="token")
"""arXiv 2402.03300, eq 3: ratio and KL token by token, averaged over each answer."""
DAPO = replace(DEEPSEEK_MATH, average="token", clip=(0.2, 0.28), beta=0.0)
"""Clip-higher, token-level loss, no KL (Yu et al. 2025, arXiv 2503.14476). Described in articles, not in V3."""


def dr_grpo(longest: int) -> Variant:
    """Neither the answer's length nor the deviation divides (Liu et al. 2025, arXiv 2503.20783); `longest` is the most tokens that
    an answer may have. Described in articles, not in V3.
    """
    return replace(DEEPSEEK_MATH, average="constant", scaled=False, beta=0.0, longest=longest)


def advantages(rewards: Array, *, scaled: bool = True) -> Array:
    """A = (r - mean r) / std r within each group (R eq 28); only r - mean r if not scaled.  rewards (P, G) -> (P, G)."""
    require(rewards.ndim == 2 and rewards.shape[1] >= 2, f"rewards {rewards.shape}; expected (P, G), G at least 2")
    require(bool(np.isfinite(rewards).all()), "a reward is NaN or infinite")
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4) if scaled else centred


def surrogate(logp: Any, old: Array, advantage: Array, *, clip: tuple[float, float]) -> Any:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), rho = e^(logp - old) (R eq 26).  logp (N, T), old (N, T), advantage (N, 1) ->
    (N, T).

    Where the clipped product is the smaller one it is constant: no gradient.
    """
    rho = ops.exp(logp - old)
    clipped = np.clip(data_of(rho), 1 - clip[0], 1 + clip[1])
    return ops.maximum(rho * -advantage, clipped * -advantage) * -1.0


def kl(logp: Any, reference: Array) -> Any:
    """pi_ref / pi - log(pi_ref / pi) - 1 (R eq 27): unbiased under samples of pi, never negative (Schulman 2020, "Approximating
    KL divergence", k3).  logp (N, T), reference (N, T) -> (N, T).
    """
    d = reference - logp
    return ops.exp(d) - d - 1.0


def loss(
    logp: Any, old: Array, reference: Array | None, counts: Array, advantage: Array, *, variant: Variant = V3
) -> Any:
    """- J of R eq 26.  logp (N, T), old (N, T), reference (N, T) or None if beta is 0: log-probabilities of the answers'
    tokens under the policy, under the one that sampled, under the fixed one; counts (N, T) 1 on answers, advantage (N,) -> ().
    """
    v, shape = variant, tuple(logp.shape)
    require(v.beta == 0 or reference is not None, "beta is not 0: the KL term needs the reference's log-probabilities")
    given = [a.shape for a in (old, counts, *([] if reference is None else [reference]))]
    fits = all(s == shape for s in given) and advantage.shape == shape[:1]
    require(fits, f"logp {shape}, others {given}, advantage {advantage.shape}; expected (N, T) and (N,)")
    require(bool(counts.any(axis=1).all()), "an answer has no token that counts")
    counts = counts.astype(logp.dtype)
    if v.ratio == "answer":
        logp, old = ops.sum(logp * counts, axis=1, keepdims=True), (old * counts).sum(axis=1, keepdims=True)
        reference = None if reference is None else (reference * counts).sum(axis=1, keepdims=True)
        counts = np.ones_like(old)
    terms = surrogate(logp, old, advantage[:, None].astype(counts.dtype), clip=v.clip)
    if v.beta:
        terms = terms - kl(logp, reference) * v.beta
    return ops.sum(terms * (_weights(v, counts) * -1.0))


def _weights(v: Variant, counts: Array) -> Array:
    """What each term counts for: (N, T), or (N, 1) where a term is a whole answer."""
    n = len(counts)
    if v.average == "constant":
        return counts / (n * v.longest)
    return counts / (n * counts.sum(axis=1, keepdims=True)) if v.average == "answer" else counts / counts.sum()
