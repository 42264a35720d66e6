"""A training step: losses and gradients of weights, judged by the diff (R 2.2, 4.2)."""

import numpy as np
import pytest

from refimpl.diff.judge import judge

from .plugin import claim

LAMBDA, ALPHA = 0.3, 1e-2
"""Weights of the MTP loss and of the balance loss; the latter 100 times R's, so that it shows."""


def judged(bench, taps, **weights):
    """The judgement of one step's losses and gradients."""
    case = bench.loaded()
    found = bench.of.call("loss_and_grads", case.tokens, case.tokens, taps=taps, **weights)
    return judge(case, bench.of.trace(case, dict(found) | {}, weights))


@pytest.mark.parametrize("weights", [{}, {"mtp_weight": LAMBDA}, {"aux_weight": ALPHA}], ids=["main", "mtp", "balance"])
@claim("TR-001", "train", "R 4.2")
def test_gradients_of_weights_conform(bench, weights):
    """Catches a weight whose gradient lacks a path, is scaled, or is another weight's."""
    found = judged(bench, [], **weights)
    assert sum(f.tap.startswith("grad/") for f in found.findings) > 20
    assert not found.culprits, [f"{f.tap}: {f.note}" for f in found.culprits][:3]


@claim("TR-002", "train", "R 4.2")
def test_the_loss_is_the_mean_over_the_tokens_that_count(bench):
    """Catches labels that are not shifted, ignored labels that count, and sums instead of means."""
    case = bench.loaded()
    labels = np.asarray(case.tokens).copy()
    labels[:, -7:] = -100
    loss = float(np.asarray(bench.of.call("loss_and_grads", case.tokens, labels)["loss"]))
    z = bench.of.logits(case.tokens)[:, :-1]
    z = z - z.max(axis=-1, keepdims=True)
    surprise = np.log(np.exp(z).sum(axis=-1)) - np.take_along_axis(z, np.asarray(case.tokens)[:, 1:, None], -1)[..., 0]
    # float32 or bfloat16 logits: their own roundoff is what a mean of surprises may be off
    assert loss == pytest.approx(surprise[labels[:, 1:] != -100].mean(), rel=max(1e-5, bench.spread("plain")))
