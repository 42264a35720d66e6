"""Masks of articles, by distance and by a window, alone and under MLA."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.layers import STAGES, common, observing
from refimpl.layers.stage import Patch
from refimpl.model import Cache
from refimpl.spec_tests.cases.small_models import CLOSE, SMALL, logits, small, some_tokens

LAYERS = SMALL.num_hidden_layers


def stage(name):
    return STAGES[f"variant.{name}"]


def causal(s, t):
    return common.mask(np.zeros((2, s), int), None, None, None, past=t - s, dtype=np.float64)


def instead(name, **static):
    """An observer under which the model's mask is followed by a variant's."""
    return Patch("mask", lambda *a, **k: stage(name).fn(common.mask.fn(*a, **k), **static))


SHAPES = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda p: (p[0], sum(p)))


@given(SHAPES, st.integers(0, 7), st.booleans())
def test_the_printed_mask_keeps_near_or_far(shape, beyond, is_causal):
    """Catches >= for >, the distance the other way round, a query placed at the first key instead of the last: by loops."""
    s, t = shape
    base = causal(s, t) if is_causal else np.zeros((2, 1, s, t))
    near, far = (stage("distance_mask")(base, ones=ones, beyond=beyond) for ones in ("attend", "hide"))
    for i in range(s):
        for j in range(t):
            pos_diff = (t - s + i) - j
            printed = 0 if pos_diff > beyond else 1
            open_ = base[0, 0, i, j] == 0
            assert (near[:, 0, i, j] == 0).all() == (open_ and printed == 1)
            assert (far[:, 0, i, j] == 0).all() == (open_ and printed == 0)


def test_near_is_a_window_and_far_is_blind():
    """Catches the claim of a balance: of V3's mask, one reading keeps a window of 6, the other all but that."""
    base = causal(12, 12)
    near, far = stage("distance_mask")(base, ones="attend"), stage("distance_mask")(base, ones="hide")
    np.testing.assert_array_equal(near, stage("sliding_window")(base, window=6))
    np.testing.assert_array_equal(np.maximum(near, far), base)
    assert not ((near == 0) & (far == 0)).any()
    assert (far[:, :, :6] == -np.inf).all() and (far[:, :, 6:, 0] == 0).all()
    p = STAGES["mla.probs"](far)
    assert (p[:, :, :6] == 0).all()  # six queries attend to nothing; torch's softmax would give NaN
    uncausal = stage("distance_mask")(np.zeros((1, 1, 12, 12)), ones="attend")
    assert (uncausal[0, 0][np.triu_indices(12, 1)] == 0).all()  # as printed, the whole future is near


@given(SHAPES, st.integers(1, 20))
def test_a_window_by_loops(shape, window):
    """Catches a window of one more or one less, and one that opens the future."""
    s, t = shape
    found = stage("sliding_window")(causal(s, t), window=window)
    for i in range(s):
        here = t - s + i
        assert np.flatnonzero(found[1, 0, i] == 0).tolist() == list(range(max(0, here - window + 1), here + 1))


def test_a_window_of_nothing():
    """Catches rows without any key, which a softmax would turn into zeros or NaN."""
    with pytest.raises(SpecError, match="a window of 0 sees nothing"):
        stage("sliding_window")(causal(2, 2), window=0)


@pytest.mark.parametrize("window", [11, 12, 500])
def test_a_window_over_everything_is_full_attention(window):
    """Catches a window that hides the first token: the same bits as V3's own mask."""
    model, tokens = small(), some_tokens(2, 11)
    with observing(instead("sliding_window", window=window)):
        found = logits(model, tokens)
    with observing(Patch("mask", common.mask.fn)):  # observed too, so that both take the same form of attention
        np.testing.assert_array_equal(found, logits(model, tokens))


@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
def test_a_window_under_mla_reaches_back_layer_by_layer(attend):
    """Catches a window that attention does not see: through two layers, the last token feels 2 (window - 1) places back."""
    model, tokens, window = small(), some_tokens(1, 14), 4
    reach = LAYERS * (window - 1)

    def last(tokens):
        with observing(instead("sliding_window", window=window)):
            return logits(model, tokens, attend=attend)[0, -1]

    def changed(place):
        other = tokens.copy()
        other[0, place] = (other[0, place] + 1) % SMALL.vocab_size
        return np.abs(last(other) - last(tokens)).max()

    # an expert that got another number of rows adds them up in another order: roundings, which no reach of a window is
    felt = np.array([changed(place) for place in range(14)])
    unfelt, least = felt[: 13 - reach].max(), felt[13 - reach :].min()
    assert least > 1000 * max(unfelt, np.finfo(last(tokens).dtype).eps)


def test_a_cache_of_the_window_is_enough():
    """Catches a window that still needs what it hides: one more token, the cache cut to window - 1 entries."""
    model, tokens, window = small(), some_tokens(2, 12), 5
    with observing(instead("sliding_window", window=window)):
        whole = logits(model, tokens)[:, -1]
        cache = model(model.inputs(tokens[:, :-1])).cache
        short = Cache(
            tuple((c[:, 1 - window :], k[:, 1 - window :]) for c, k in cache.layers),
            *(None if a is None else a[:, 1 - window :] for a in (cache.positions, cache.valid, cache.documents)),
        )
        found = model(model.inputs(tokens[:, -1:], np.full((2, 1), 11), cache=short), short).logits[:, 0]
    assert len(short) == window - 1
    np.testing.assert_allclose(found, whole, **CLOSE)
