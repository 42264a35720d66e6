"""Every regime of the corpus of bugs, drawn (strategies/corpus.py): the stage that the bugs of its row sit in, by plain numbers."""

import ast
import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from refimpl import Impl, SpecError
from refimpl.layers import loss, mla, router
from refimpl.layers.common import rms_norm
from refimpl.layers.numerics.formats import E4M3, decode
from refimpl.layers.numerics.quantisation import quantize
from refimpl.layers.rope import RopeScaling, rope_tables
from refimpl.spec_tests.cases.configs import SMALL
from refimpl.spec_tests.cases.small_models import CLOSE, small, some_tokens
from refimpl.spec_tests.oracles.moe import best
from refimpl.spec_tests.oracles.rational import ladder, nearest
from refimpl.spec_tests.strategies import corpus
from refimpl.spec_tests.strategies.models import make_weights

some = settings(max_examples=25, deadline=None)
EXPERTS = corpus.EXPERTS


@some
@given(corpus.biased)
def test_a_bias_of_any_sign_selects_and_does_not_weigh(drawn):
    """Catches a bias in the weights (R01), dropped groups that count as 0 and win where all else is negative (R02)."""
    s, b = drawn
    choice = router.choice(s, b)
    kept = router.groups(router.group_scores(choice, n_group=4, best=2), topk_group=2)
    ids = router.ids(choice, kept, k=3, n_group=4, fill=-np.inf)
    g = router.weights(s, ids, normalise=True, eps=1e-20, scale=2.5)
    for n, token in enumerate(s):
        biased = [float(v + w) for v, w in zip(token, b, strict=True)]
        two = [sum(sorted(biased[3 * i : 3 * i + 3])[1:]) for i in range(4)]
        mine = best(biased, [e for e in range(EXPERTS) if e // 3 in best(two, range(4), 2)], 3)
        assert sorted(ids[n].tolist()) == mine
        total = math.fsum(token[e] for e in mine)
        np.testing.assert_allclose(g[n], [2.5 * token[e] / total for e in ids[n]], rtol=1e-13)  # a few roundings


@some
@given(corpus.near_ties)
def test_equal_choices_go_to_the_lower_index_and_near_ones_to_the_larger(a):
    """Catches a sort that is not stable, or in fewer bits than the scores have (R05, R06)."""
    ids = router.ids(a[None], None, k=5, n_group=1, fill=-np.inf)[0]
    exact = [Fraction(float(v)) for v in a]
    assert ids.tolist() == sorted(range(EXPERTS), key=lambda e: (-exact[e], e))[:5]


@some
@given(corpus.extreme_logits)
def test_extreme_logits_give_weights_that_sum_to_the_scale_or_to_nothing(z):
    """Catches overflow in a sigmoid, 0 / 0 where all chosen scores underflow (R12)."""
    s = router.scores(z[None], func="sigmoid")
    assert np.isfinite(s).all() and s.min() >= 0 and s.max() <= 1
    ids = router.ids(s, None, k=4, n_group=1, fill=-np.inf)
    g = router.weights(s, ids, normalise=True, eps=1e-20, scale=2.5)
    total = math.fsum(s[0][ids[0]].tolist())
    assert float(g.sum()) == pytest.approx(2.5 * total / (total + 1e-20), abs=1e-14)


@some
@given(corpus.groupings, corpus.biased)
def test_any_grouping_keeps_its_best_groups_and_experts(grouping, drawn):
    """Catches groups that are not consecutive experts, one group too few or too many, a K bounded by a group's size (R03, R15)."""
    (n, kept, k), (s, _) = grouping, drawn
    size = EXPERTS // n
    chosen = router.groups(router.group_scores(s, n_group=n, best=2), topk_group=kept)
    ids = router.ids(s, chosen, k=k, n_group=n, fill=-np.inf)
    for token, mine in zip(s, ids, strict=True):
        two = [math.fsum(sorted(token[g * size : (g + 1) * size])[-2:]) for g in range(n)]
        groups = best(two, range(n), kept)
        assert sorted(mine.tolist()) == best(token, [e for e in range(EXPERTS) if e // size in groups], k)


@some
@given(corpus.small_rows)
def test_eps_counts_in_rows_of_any_size(drawn):
    """Catches an eps that is another than the config's, outside the root, or left out: 0 / 0 in a row of zeros (A12)."""
    x, eps = drawn
    w = np.arange(1.0, 11.0)
    for row, got in zip(x.tolist(), np.asarray(rms_norm(x, w, eps=eps)), strict=True):
        root = math.sqrt(math.fsum(v * v for v in row) / 10 + eps)
        np.testing.assert_allclose(got, [g * v / root for g, v in zip(w, row, strict=True)], rtol=1e-13, atol=0)
    latent = mla.c_kv(np.concatenate([x, 9 + x[:, :2]], axis=1), w, eps=eps)
    np.testing.assert_array_equal(latent, rms_norm(x, w, eps=eps))


@some
@given(corpus.positions)
def test_any_positions_have_their_own_angles(p):
    """Catches tables that are looked up by place instead of position, and angles that lose bits on the way (A05, A14)."""
    table = rope_tables(p, dim=8, theta=10000.0, yarn=None, dtype=np.float64)
    same = rope_tables(p, dim=8, theta=10000.0, yarn=RopeScaling(factor=1.0), dtype=np.float64)
    np.testing.assert_array_equal(table, same)
    for s, at in enumerate(p[0].tolist()):
        angles = [at * 10000.0 ** (-i / 4) for i in range(4)]
        # an angle of up to 2e5 is itself rounded by 3e-11
        np.testing.assert_allclose(
            table[:, 0, s], [list(map(math.cos, angles)), list(map(math.sin, angles))], atol=1e-10
        )


@settings(max_examples=8, deadline=None)
@given(corpus.cuts)
def test_a_run_cut_anywhere_is_the_whole_run(drawn):
    """Catches a cache, a mask or a position that knows how the text arrived (A17 to A21)."""
    n, at = drawn
    model, tokens = small(), some_tokens(1, n)
    whole = model(model.inputs(tokens)).logits
    cache, parts = None, []
    for start, stop in itertools.pairwise(at):
        out = model(model.inputs(tokens[:, start:stop], cache=cache), cache)
        cache = out.cache
        parts.append(out.logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, **CLOSE)


@some
@given(corpus.fp8_rows)
def test_rows_of_any_width_and_size_have_the_nearest_codes(x):
    """Catches ragged tiles, zero and subnormal tiles, a largest number that saturates or does not (F01 to F14)."""
    q = quantize(x, (1, 128))
    for j in range(0, x.shape[1], 128):
        tile = x[0, j : j + 128]
        s = np.float32(max(float(np.abs(tile).max()), float(np.float32(1e-4)))) / np.float32(448)
        assert q.scales[0, j // 128] == s
        codes = [nearest(Fraction(float(v / s)), "e4m3fn")[0] for v in tile]
        found = decode(q.codes, E4M3)[0, j : j + 128]
        assert [Fraction(abs(float(v))) for v in found] == [ladder("e4m3fn")[c] for c in codes]


@some
@given(corpus.labels)
def test_a_loss_counts_the_labels_that_its_depth_can_see(drawn):
    """Catches labels that are shifted by another number, ignored ones that count, token 0 taken for padding (T01 to T06)."""
    depth, its = drawn
    if depth >= len(its):
        return
    z, y = corpus.normal(0, 1, len(its) - depth, 5), np.array([its])
    rows = [(z[0, i], y[0, i + depth + 1]) for i in range(len(its) - depth - 1) if y[0, i + depth + 1] != -100]
    terms = [math.log(math.fsum(np.exp(row).tolist())) - row[label] for row, label in rows]
    wide = max(sum(v != -100 for v in its[1:]), 1)
    got = loss.mtp(z, y, depth=depth, mean="length") if depth else loss.main(z, y)
    assert float(got) == pytest.approx(math.fsum(terms) / (wide if depth else max(len(terms), 1)), rel=1e-13)


@some
@given(corpus.micro_batches)
def test_micro_batches_weighted_by_their_labels_are_one_batch(batches):
    """Catches a mean of means, which favours short micro-batches (L03)."""
    width = max(map(len, batches))
    y = np.array([b + [-100] * (width - len(b)) for b in batches])
    z = corpus.normal(1, len(y), width, 4)
    counts = (y[:, 1:] != -100).sum(axis=1)
    parts = [float(loss.main(z[i : i + 1], y[i : i + 1])) * int(n) for i, n in enumerate(counts)]
    assert float(loss.main(z, y)) == pytest.approx(math.fsum(parts) / max(int(counts.sum()), 1), rel=1e-13, abs=1e-15)


@some
@given(corpus.loader_faults)
def test_weights_of_another_model_are_refused(fault):
    """Catches a loader that leaves a weight as it was, or drops what it does not know (R17, R18)."""
    weights = make_weights(SMALL.to_dict(), np.random.default_rng(0))
    name = "model.layers.1.mlp.gate.weight"
    w = weights.pop(name)
    if fault == "extra":
        weights |= {name: w, "model.layers.1.mlp.gate.scale": w}
    elif fault != "missing":
        new = {"renamed": (name.replace("gate", "router"), w), "transposed": (name, w.T), "short": (name, w[:-1])}[
            fault
        ]
        weights[new[0]] = new[1]
    with pytest.raises(SpecError):
        Impl().load(SMALL, weights)


def test_every_regime_of_the_corpus_has_a_strategy_that_a_test_draws_from():
    """Catches a regime that is listed and never drawn."""
    used = {n.attr for n in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(n, ast.Attribute)}
    named = {name for name, value in vars(corpus).items() if any(value is r for r in corpus.REGIMES.values())}
    assert list(corpus.REGIMES) == list(range(1, 12)) and len(named) == 11
    assert named <= used
