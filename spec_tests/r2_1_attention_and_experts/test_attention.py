"""Multi-head latent attention (R 2.1.1): who sees whom, and three ways to compute the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.autograd import attention_op
from refimpl.layers import common, mla, observing
from refimpl.spec_tests.cases.small_models import CLOSE, SMALL, gradients, logits, pull, small, some_tokens

VARIANTS = {
    "V3": {},
    "no query latent": {"q_lora_rank": None},
    "half layout": {"rope_interleave": False},
    "biases": {"attention_bias": True},
    "V2": {
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy",
        "rope_scaling": None,
    },
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def apart(a, b):
    """Largest difference over the vocabulary, per position."""
    return np.abs(a - b).max(axis=-1)


# ---- The mask


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mask_is_order_padding_and_document(data):
    """Catches < for <=, an offset forgotten with a cache, padding taken from the queries, documents compared across rows."""
    b, s, past = 2, data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    t = past + s

    def ints(n, top):
        return data.draw(hnp.arrays(np.int64, (b, n), elements=st.integers(0, top)))

    positions, dq, dk = ints(s, 5), ints(s, 1), ints(t, 1)
    valid = data.draw(st.none() | st.just(ints(t, 1)))
    with_documents = data.draw(st.booleans())
    documents = (dq, dk) if with_documents else (None, None)
    m = common.mask(positions, valid, *documents, past=past, dtype=np.float32)
    assert m.dtype == np.float32 and m.shape == (b, 1, s, t)
    for n, i, j in np.ndindex(b, s, t):
        sees = j <= past + i  # the query is the (past + i)-th token, whatever its position says
        sees = sees and (valid is None or valid[n, j] == 1)
        sees = sees and (not with_documents or dq[n, i] == dk[n, j])
        assert m[n, 0, i, j] == (0 if sees else -np.inf)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_position_sees_the_future(variant):
    """Catches a mask that is not applied, is transposed, or leaks at the block edge of `attend`."""
    model, tokens = small(**VARIANTS[variant]), some_tokens(2, 70)
    changed = tokens.copy()
    changed[:, 66] = (changed[:, 66] + 1) % SMALL.vocab_size
    moved = apart(logits(model, tokens), logits(model, changed))
    assert moved[:, :66].max() < 1e-10 < 1e-3 < moved[:, 66:].max(axis=1).min()


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 0, 1, 2, 3], [5] * 8, [7, 6, 5, 4, 3, 2, 1, 0]])
def test_no_position_sees_the_future_whatever_the_positions(positions):
    """R 4.1 packs documents and separates nothing. Catches causality read from positions alone:
    where they restart or repeat, later tokens would become visible."""
    model, tokens = small(), some_tokens(1, 8)
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % SMALL.vocab_size
    at = np.array([positions])
    moved = apart(*(logits(model, t, positions=at) for t in (tokens, changed)))
    assert moved[0, :5].max() < 1e-10


def test_the_first_tokens_reach_the_last_position():
    """Catches a window, and a block of queries that stops short of its keys."""
    model, tokens = small(), some_tokens(1, 70)
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % SMALL.vocab_size
    assert apart(logits(model, tokens), logits(model, changed))[0, -1] > 1e-6


@pytest.mark.parametrize("positions", ["restart", "count on"])
def test_packed_documents_are_each_alone(positions):
    """R 5.1: "sample masking". Catches a document mask on one side, and absolute positions."""
    model, tokens = small(), some_tokens(1, 9)
    ids = np.array([[7, 7, 7, 7, 2, 2, 2, 2, 2]])
    at = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]]) if positions == "restart" else None
    packed = logits(model, tokens, documents=ids, positions=at)
    np.testing.assert_allclose(packed[:, :4], logits(model, tokens[:, :4]), **CLOSE)
    np.testing.assert_allclose(packed[:, 4:], logits(model, tokens[:, 4:]), **CLOSE)
    assert apart(packed, logits(model, tokens))[0, 4:].min() > 1e-3  # R 4.1: none in pre-training


@pytest.mark.parametrize("variant", ["V3", "half layout"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, variant):
    """Catches keys of padding, positions that count it, and NaN from rows that see no key."""
    model, tokens = small(**VARIANTS[variant]), some_tokens(2, 9)
    valid = np.ones_like(tokens)
    pad = slice(0, 3) if side == "left" else slice(6, 9)
    valid[1, pad] = 0
    padded = logits(model, tokens, valid=valid)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:1], logits(model, tokens[:1]), **CLOSE)
    real = valid[1] == 1
    np.testing.assert_allclose(padded[1, real], logits(model, tokens[1:, real])[0], **CLOSE)


def test_attention_is_scaled_as_the_config_says():
    """Catches a scale applied to the nope half only: softmax_scale = 0 would average the values."""
    shapes = ((1, 3, 2, 7), (1, 3, 2, 2), (1, 4, 2, 9), (1, 4, 2), (1, 1, 3, 4))
    q, qr, kv, kr, m = (normal(*s, seed=i) for i, s in enumerate(shapes))
    s = mla.scores(q, qr, kv, kr, m * 0, scale=0.3)
    for n, h, i, t in np.ndindex(1, 2, 3, 4):
        expected = 0.3 * (q[n, i, h, :5] @ kv[n, t, h, :5] + qr[n, i, h] @ kr[n, t])
        assert abs(s[n, h, i, t] - expected) < 1e-12


# ---- Absorbed = expanded


@pytest.mark.parametrize("queries", [1, 2, 50])
def test_absorbed_scores_are_one_sum_a_pair(queries):
    """Catches operands turned around without their axes, for few rows (queries x heads) and for many; a row of another text."""
    heads, keys = 3, 7
    q, qr = normal(2, queries, heads, 5), normal(2, queries, heads, 4, seed=1)
    c, kr, mask = normal(2, keys, 5, seed=2), normal(2, keys, 4, seed=3), normal(2, 1, queries, keys, seed=4)
    s = mla.scores_absorbed(q, qr, c, kr, mask, scale=0.3)
    assert s.shape == (2, heads, queries, keys)
    for n, h, i, t in np.ndindex(s.shape):
        expected = 0.3 * (sum(q[n, i, h] * c[n, t]) + sum(qr[n, i, h] * kr[n, t])) + mask[n, 0, i, t]
        assert abs(s[n, h, i, t] - expected) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_absorbed_attention_is_the_expanded_one(variant):
    """Catches W_UK and W_UV mixed up, heads regrouped, the scale lost. Values and the gradient of
    every weight; kv_b_proj's arrives by another route."""
    model, tokens = small(**VARIANTS[variant]), some_tokens()
    expanded, absorbed = (logits(model, tokens, attend=a) for a in ("expanded", "absorbed"))
    np.testing.assert_allclose(absorbed, expanded, **CLOSE)
    ours, theirs = (gradients(model, tokens, a) for a in ("expanded", "absorbed"))
    assert ours.keys() == theirs.keys() and any("kv_b_proj" in n for n in ours)
    for name, g in ours.items():
        np.testing.assert_allclose(theirs[name], g, rtol=1e-10, atol=1e-10 * np.abs(g).max())


@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
def test_absorption_does_not_depend_on_the_mask(attend):
    """Catches a mask read in one form only: padding and documents under both."""
    model, tokens = small(), some_tokens()
    valid, documents = np.ones_like(tokens), np.arange(9)[None] // 5 + np.zeros_like(tokens)
    valid[0, :2] = 0
    how = {"valid": valid, "documents": documents}
    plain = logits(model, tokens, attend="expanded", **how)
    np.testing.assert_allclose(logits(model, tokens, attend=attend, **how), plain, **CLOSE)


# ---- Fused = three stages


@settings(max_examples=40, deadline=None)
@given(seen=hnp.arrays(bool, (2, 1, 7, 5)), block=st.integers(1, 8), dv=st.integers(1, 3))
def test_fused_attention_is_its_three_stages(seen, block, dv):
    """Catches keys cut off in a block of queries, and gradients lost between blocks, under any mask;
    rows that see nothing give zeros, not NaN."""
    m = np.where(seen, 0.0, -np.inf)
    shapes = ((2, 7, 2, 5), (2, 7, 2, 2), (2, 5, 2, 3 + dv), (2, 5, 2))
    args = [normal(*s, seed=i) for i, s in enumerate(shapes)]

    def fused(q, qr, kv, kr):
        return attention_op.attend(q, qr, kv, kr, m, scale=0.4)

    def staged(q, qr, kv, kr):
        p = mla.probs(mla.scores(q, qr, kv, kr, m, scale=0.4))
        return mla.ctx(p, kv, v_dim=dv)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_op, "QUERY_BLOCK", block)
        (y, grads), (expected, slopes) = pull(fused, *args), pull(staged, *args)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    for g, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(g, slope, rtol=1e-11, atol=1e-12)
    blind = ~seen.any(-1)[:, 0]
    assert not y[blind].any() and not grads[0][blind].any()


def test_observed_and_fused_models_agree():
    """Catches a recorded run that is not the run that was timed."""
    model, tokens = small(), some_tokens(2, 70)
    with observing(lambda stage, run, /, *args, **static: run(*args, **static)):
        seen = logits(model, tokens)
    np.testing.assert_allclose(logits(model, tokens), seen, **CLOSE)
