"""The CLIP-style head: images among texts, texts among images, at toy scale."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd import SpecError, Tensor, backward, nn_ops
from refimpl.layers import STAGES
from refimpl.layers.variants.contrastive import FIRST, MOST
from refimpl.train import AdamState, AdamW, adamw


def stage(name):
    return STAGES[f"variant.{name}"]


@pytest.fixture
def rng():
    return np.random.default_rng(23)


def test_logits_are_scaled_cosines(rng):
    """Catches features that are not normalised (as article 3 prints it), a scale that divides, texts along the rows."""
    image, text, t = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), 0.7
    found = stage("clip_logits")(image, text, np.array(t))
    for i, j in np.ndindex(4, 4):
        a, b = image[i].tolist(), text[j].tolist()
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        assert found[i, j] == pytest.approx(math.exp(t) * cosine, rel=1e-12)
    longer = stage("clip_logits")(image * 7, text / 3, np.array(t))
    np.testing.assert_allclose(longer, found, rtol=1e-12)


def test_the_scale_is_learned_up_to_100(rng):
    """Catches a temperature that is not learned, and one that grows without end; it starts at 1 / 0.07."""
    image, text = rng.normal(size=(2, 4, 6))
    for t, scale, learns in ((FIRST, 1 / 0.07, True), (MOST + 5, 100, False)):
        leaf = Tensor(np.array(t))
        y = stage("clip_logits")(image, image, leaf)
        np.testing.assert_allclose(np.diag(y.data), scale, rtol=1e-12)
        slope = backward(stage("clip_loss")(stage("clip_logits")(image, text, leaf)))[leaf]
        assert (slope != 0) == learns


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_loss_is_both_cross_entropies(n, seed):
    """Catches one direction only, a sum for a mean, wrong pairs."""
    z = np.random.default_rng(seed).normal(size=(n, n)) * 3

    def among(row, i):
        return math.log(sum(math.exp(v) for v in row)) - row[i]

    images = sum(among(z[i].tolist(), i) for i in range(n)) / n
    texts = sum(among(z[:, i].tolist(), i) for i in range(n)) / n
    assert stage("clip_loss")(z) == pytest.approx((images + texts) / 2, rel=1e-9, abs=1e-12)
    assert stage("clip_loss")(z.T) == pytest.approx(stage("clip_loss")(z), rel=1e-12, abs=1e-12)


def test_what_knows_nothing_pays_the_logarithm_of_the_batch():
    """Catches a loss per entry instead of per row."""
    assert stage("clip_loss")(np.full((8, 8), 3.0)) == pytest.approx(math.log(8), rel=1e-12)
    with pytest.raises(SpecError, match="pairs were expected"):
        stage("clip_loss")(np.zeros((3, 4)))


def test_two_towers_learn_which_text_is_of_which_image(rng):
    """Catches a loss that trains nothing: linear towers on two noisy views of the same 4 hidden numbers, 32 unseen pairs."""
    views = {"image": rng.normal(size=(4, 12)), "text": rng.normal(size=(4, 9))}

    def pairs(n):
        hidden = rng.normal(size=(n, 4))
        return {k: hidden @ v + 0.1 * rng.normal(size=(n, v.shape[1])) for k, v in views.items()}

    def logits(w, batch):
        towers = [nn_ops.linear(batch[k], w[k]) for k in views]
        return stage("clip_logits")(*towers, w["log_scale"])

    def hits(w):
        z = logits(w, unseen)
        return (z.argmax(1) == np.arange(32)).mean()

    unseen = pairs(32)
    w = {k: 0.1 * rng.normal(size=(4, v.shape[1])) for k, v in views.items()} | {"log_scale": np.array(FIRST)}
    before, state, opt = hits(w), AdamState(), AdamW(lr=0.02, weight_decay=0.0)
    for _ in range(150):
        leaves = {k: Tensor(v) for k, v in w.items()}
        grads = backward(stage("clip_loss")(logits(leaves, pairs(32))))
        w, state = adamw(w, {k: grads[v] for k, v in leaves.items()}, state, opt)
    assert before < 0.3 and hits(w) > 0.9
    assert w["log_scale"] != FIRST
