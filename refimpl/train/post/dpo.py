"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290). Described in articles, not in V3, which uses GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refimpl.autograd import ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.train.data import Batch

from .examples import Example, one_a_row
from .likelihood import log_sigmoid, token_logp


def pairs(chosen: Sequence[Example], rejected: Sequence[Example], *, pad: int = 0) -> Batch:
    """N preferences as 2N rows: the chosen answers, then the rejected ones, to the same prompts."""
    same = len(chosen) == len(rejected) and all(
        list(a.prompt) == list(b.prompt) for a, b in zip(chosen, rejected, strict=True)
    )
    require(same, "chosen and rejected answers must be to the same prompts, in the same order")
    return one_a_row([*chosen, *rejected], pad=pad)


def sequence_logp(logits: Any, labels: Array) -> Any:
    """log pi(y | x): the sum over the answer's tokens, not their mean.  logits (B, S, V), labels (B, S) -> (B,)."""
    return ops.sum(token_logp(logits, labels), axis=1)


def loss(policy: Any, reference: Array, *, beta: float = 0.1) -> Any:
    """- mean log sigmoid(beta ((policy_w - reference_w) - (policy_l - reference_l))).  policy (2N,), reference (2N,) log
    probabilities of whole answers, chosen (w) first, then rejected (l) -> ().  Eq 7 of the paper.
    """
    n = policy.shape[0] // 2
    require(
        policy.shape == reference.shape == (2 * n,) and n > 0,
        f"policy {policy.shape}, reference {reference.shape}; expected (2N,) each, chosen and rejected",
    )
    gain = policy - reference
    return ops.mean(log_sigmoid((gain[:n] - gain[n:]) * beta)) * -1.0
