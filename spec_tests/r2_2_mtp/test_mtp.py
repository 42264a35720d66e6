"""Multi-token prediction (R 2.2, eqs 21-25), one position at a time."""

import numpy as np
import pytest

from refimpl.autograd import Parameter, backward
from refimpl.layers import Dialect, loss, mtp
from refimpl.spec_tests.cases.small_models import CLOSE, SMALL, logits, small, some_tokens

D = SMALL.hidden_size


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def with_mtp(depth=2, **changes):
    return small(num_nextn_predict_layers=depth, **changes)


def norm(x, w):
    return x * w / np.sqrt((x * x).mean(-1, keepdims=True) + SMALL.rms_norm_eps)


def chain(model, tokens, hidden):
    """MTP logits per depth from the main model's hidden, a layer call at a time (eqs 21-23)."""
    out, embedding = [], model.model.embed_tokens.weight
    for k in range(1, model.n_mtp + 1):
        layer, length = model.model.layers[SMALL.num_hidden_layers + k - 1], tokens.shape[1] - k
        x = np.empty((len(tokens), length, D))
        for b, i in np.ndindex(len(tokens), length):
            e = norm(embedding[tokens[b, i + k]], layer.enorm.weight)
            h = norm(hidden[b, i], layer.hnorm.weight)
            x[b, i] = layer.eh_proj.weight @ np.concatenate([e, h])
        cut = model.inputs(tokens[:, :length])
        y, _, _ = layer(x, model._tables(cut), model._mask(cut, (cut.positions, None, None)))
        hidden = norm(y, layer.shared_head.norm.weight)
        out.append(hidden @ model.lm_head.weight.T)
    return out


@pytest.mark.parametrize("depth", [1, 2])
def test_the_front_pairs_each_position_with_the_token_depth_ahead(depth):
    """R eq 21. Catches the embedding of another token, a hidden cut at its beginning, one norm's weight in the other's place."""
    tokens, w, h = some_tokens(2, 7), normal(SMALL.vocab_size, D), normal(2, 8 - depth, D, seed=1)
    we, wh = normal(D, seed=2), normal(D, seed=3)
    e, cut = mtp.emb(tokens, w, depth=depth), mtp.hidden(h)
    front = [mtp.enorm(e, we, eps=SMALL.rms_norm_eps), mtp.hnorm(cut, wh, eps=SMALL.rms_norm_eps)]
    last = mtp.norm(h, we * wh, eps=SMALL.rms_norm_eps)
    for b, i in np.ndindex(2, 7 - depth):
        np.testing.assert_array_equal(cut[b, i], h[b, i])
        np.testing.assert_allclose(front[0][b, i], norm(w[tokens[b, i + depth]], we), **CLOSE)
        np.testing.assert_allclose(front[1][b, i], norm(h[b, i], wh), **CLOSE)
    np.testing.assert_allclose(last[1, -1], norm(h[1, -1], we * wh), **CLOSE)
    assert cut.shape == e.shape == (2, 7 - depth, D)


def test_main_logits_do_not_depend_on_mtp():
    """R 2.2: "we can directly discard the MTP modules". Catches any bit that they change."""
    model, tokens = with_mtp(), some_tokens(2, 8)
    inputs = model.inputs(tokens)
    on, off = model(inputs, with_mtp=True), model(inputs)
    np.testing.assert_array_equal(on.logits, off.logits)
    assert len(on.mtp_logits) == 2 and off.mtp_logits == []


def test_depth_k_combines_position_i_with_token_i_plus_k():
    """Catches a shift off by one, the wrong half first, a norm left out or shared between halves."""
    model, tokens = with_mtp(3), some_tokens(2, 8)
    run = model(model.inputs(tokens), with_mtp=True)
    for ours, expected in zip(run.mtp_logits, chain(model, tokens, run.hidden), strict=True):
        np.testing.assert_allclose(ours, expected, **CLOSE)


def test_padding_on_the_left_reaches_no_module():
    """Catches `mtp.valid` left out, or cut at its beginning: a module would look at padding, or not at its first token."""
    model, tokens = with_mtp(), some_tokens(2, 9)
    given = np.ones_like(tokens)
    given[1, :3] = 0
    padded = model(model.inputs(tokens, valid=given), with_mtp=True).mtp_logits
    alone = model(model.inputs(tokens[1:, 3:]), with_mtp=True).mtp_logits
    for ours, expected in zip(padded, alone, strict=True):
        np.testing.assert_allclose(ours[1:, 3:], expected, **CLOSE)


def test_depth_k_knows_no_token_beyond_i_plus_k():
    """R 2.2: "keep the complete causal chain". Catches a module that sees the token it predicts."""
    model, tokens, at = with_mtp(), some_tokens(1, 9), 6
    changed = tokens.copy()
    changed[0, at] = (changed[0, at] + 1) % SMALL.vocab_size
    runs = [model(model.inputs(t), with_mtp=True).mtp_logits for t in (tokens, changed)]
    for k in (1, 2):
        moved = np.abs(runs[0][k - 1] - runs[1][k - 1]).max(-1)[0]
        assert moved[: at - k].max() < 1e-10 < 1e-3 < moved[at - k]


def test_swapped_halves_are_the_other_concatenation():
    """Catches mtp_concat with another meaning: R eq 21 prints [hidden; emb], released weights want
    [emb; hidden], and exchanging the halves of eh_proj's columns converts one into the other."""
    model, tokens = with_mtp(), some_tokens()
    other = with_mtp(dialect=Dialect(mtp_concat="hidden_first"))
    other = other.map(lambda n, w: np.roll(w, D, axis=1) if "eh_proj" in n else w)
    ours, theirs = (m(m.inputs(tokens), with_mtp=True).mtp_logits for m in (model, other))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_mtp_shares_embedding_and_head():
    """R 2.2: "shares the embedding layer and the output head". Catches copies that stop training
    together: both modules add to the gradients of the main model's."""
    model, tokens = with_mtp().with_gradients(), some_tokens()
    inputs = model.inputs(tokens, labels=tokens)
    shared = model.model.embed_tokens.weight, model.lm_head.weight
    grads = [backward(model.loss(inputs, mtp_weight=w)[0]) for w in (0.0, 0.3)]
    for w in shared:
        assert np.abs(grads[1][w] - grads[0][w]).max() > 1e-4


def test_the_mtp_loss_trains_the_main_model():
    """Catches a detached hidden: h^0 carries gradient into layer 0."""
    model, tokens = with_mtp().with_gradients(), some_tokens()
    out = model(model.inputs(tokens), with_mtp=True)
    grads = backward(loss.mtp(out.mtp_logits[0], tokens, depth=1, mean="valid"))
    assert grads[model.model.layers[0].self_attn.o_proj.weight].any()
    assert model.model.layers[-1].eh_proj.weight not in grads  # depth 2 took no part


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mtp_loss_is_divided_by_the_main_number_of_labels(depth):
    """R eq 24 divides T-k terms by T. Catches the mean over T-k (Dialect.mtp_loss_mean = "valid")."""
    length = 9
    y, labels = normal(2, length - depth, 7), np.random.default_rng(1).integers(0, 7, (2, length))
    labels[1, -2:] = -100
    terms = []
    for b in range(2):
        for i in range(length - depth - 1):
            target = labels[b, i + depth + 1]
            if target != -100:
                row = y[b, i]
                terms.append(np.log(np.exp(row).sum()) - row[target])
    main_labels = (labels[:, 1:] != -100).sum()
    by_length, by_valid = (loss.mtp(y, labels, depth=depth, mean=m) for m in ("length", "valid"))
    assert abs(by_length - sum(terms) / main_labels) < 1e-12
    assert abs(by_valid - sum(terms) / len(terms)) < 1e-12


def test_total_loss_is_main_plus_lambda_times_the_mean():
    """R eq 25. Catches the sum over depths, or lambda on the main loss."""
    model, tokens = with_mtp(), some_tokens()
    inputs = model.inputs(tokens, labels=tokens)
    total, parts = model.loss(inputs, mtp_weight=0.3, aux_weight=1e-2)
    aux = sum(v for n, v in parts.items() if n.endswith("seq_aux"))
    expected = parts["loss.main"] + 0.3 * (parts["loss.mtp1"] + parts["loss.mtp2"]) / 2 + aux
    assert abs(total - expected) < 1e-12 and aux > 0
    assert abs(parts["loss.main"] - loss.main(logits(model, tokens), tokens)) < 1e-12


def test_main_loss_is_the_mean_over_labels_that_count():
    """Catches a label that is not shifted, shifted twice, or -100 counted in the mean."""
    y, labels = normal(2, 5, 7), np.random.default_rng(1).integers(0, 7, (2, 5))
    labels[0, 1], labels[0, 0], labels[1, 4] = -100, -100, -100
    terms = [
        np.log(np.exp(y[b, i]).sum()) - y[b, i, labels[b, i + 1]]
        for b in range(2)
        for i in range(4)
        if labels[b, i + 1] != -100
    ]
    assert len(terms) == 6
    assert abs(loss.main(y, labels) - np.mean(terms)) < 1e-13


def test_no_label_at_all_is_a_loss_of_zero():
    """Catches 0/0 for a batch in which everything is ignored."""
    y = Parameter(normal(1, 3, 7))
    total = loss.main(y, np.full((1, 3), -100))
    assert total.data == 0.0
    assert not backward(total)[y].any()
