"""One mistake in a trace that is innocently arranged otherwise: the arrangement is said, the mistake's stage blamed alone, named.

Every arrangement is made by hand of what our own run recorded, a wrong run is a patched one: which stage was patched is known.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from refimpl.diff import Case, Trace, render
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.judge import judge
from refimpl.diff.supposed import fitted
from refimpl.layers.stage import STAGES, Call, Patch
from refimpl.record import trace_case

from .test_diff_fits import ENGINE
from .test_diff_partial import TINY, case


class OnActivation(Case):
    """The case, run by a program that multiplies the activation by the routing weight, and does not say so."""

    @property
    def config(self):
        config = super().config
        return config.replace(dialect=dataclasses.replace(config.dialect, routing_weight_on="activation"))


def each(change, *names):
    """The same change of every tap with one of these names, made in float32."""

    def arranged(taps):
        meant = {t: a for t, a in taps.items() if t.rpartition("/")[2] in names}
        return taps | {t: change(t, np.float32(a), taps).astype(a.dtype) for t, a in meant.items()}

    return arranged


def halves(tap, a, taps):
    return np.concatenate([a[..., 0::2], a[..., 1::2]], axis=-1)


def unmasked(tap, a, taps):
    """What stands at a key that is not seen nobody reads."""
    return np.where(np.isinf(a), np.random.default_rng(0).standard_normal(a.shape, np.float32), a)


def ids_ascending(taps):
    return taps | {t: np.sort(a, axis=-1) for t, a in taps.items() if t.endswith("router.ids")}


def chain(*changes):
    return lambda taps: functools.reduce(lambda t, change: change(t), changes, taps)


SCALE = case().config.softmax_scale
HALF = each(halves, "mla.q_rope", "mla.k_rope")
SCALED = each(lambda t, a, taps: a * np.float32(SCALE), "mla.q_rope", "mla.q")
ROOTED = each(lambda t, a, taps: a * np.float32(SCALE**0.5), "mla.q_rope", "mla.k_rope", "mla.q")
SCALED_K = each(lambda t, a, taps: a * np.float32(SCALE), "mla.k_rope")
INTO_EXP2 = each(lambda t, a, taps: a * np.float32(SCALE / np.log(2)), "mla.q_rope")
EXP2 = each(lambda t, a, taps: a * np.float32(1 / np.log(2)), "mla.scores")
"""As kernels that compute 2^x have them."""
BEFORE = each(unmasked, "mla.scores")
LATER = each(lambda t, a, taps: a / np.float32(2.5), "router.weights")
FLAT = each(
    lambda t, a, taps: a.reshape(-1, *a.shape[2:]), "mla.q", "attn_norm", "mla.kv_b", "router.weights", "moe.routed"
)
"""Tokens one behind the other."""

TURNED, INTO_Q, INTO_BOTH = "rotated channels in the other order", "multiplied into q", "into q and k"
INTO_K, BASE_2, SCORES_2 = "multiplied into k", "log2 e is multiplied into q", "scores are multiplied by log2 e"
UNSEEN, MATCHED, AFTER, DIALECT = (
    "before the mask",
    "another order than the ids",
    "after the experts",
    "routing_weight_on",
)
ATTENTION = {
    "half": (HALF, [TURNED]),
    "scaled q": (SCALED, [INTO_Q]),
    "scaled q and k": (ROOTED, [INTO_BOTH]),
    "scaled k": (SCALED_K, [INTO_K]),
    "scaled q, base 2": (chain(INTO_EXP2, EXP2), [BASE_2, SCORES_2]),
    "before the mask": (BEFORE, [UNSEEN]),
    "half, scaled q": (chain(HALF, SCALED), [TURNED, INTO_Q]),
    "half, before the mask": (chain(HALF, BEFORE), [TURNED, UNSEEN]),
    "before the mask, flat": (chain(BEFORE, FLAT), [UNSEEN]),
}
ROUTER = {
    "ids ascending": (ids_ascending, [MATCHED]),
    "scaled later": (LATER, [AFTER]),
    "ids ascending, scaled later": (chain(ids_ascending, LATER), [MATCHED, AFTER]),
    "ids ascending, flat": (chain(ids_ascending, FLAT), [MATCHED]),
    "on the activation": (dict, [DIALECT]),
    "on the activation, ids ascending": (ids_ascending, [DIALECT, MATCHED]),
}
ARRANGED = ATTENTION | ROUTER
DTYPES = ("float32", "bf16")
ROUNDED_TWICE = {(how, "bf16") for how in ARRANGED if "scaled" in how and "later" not in how}
"""A candidate's scores are made of the scaled queries that it rounded; ours were made before they are scaled and rounded here."""


def stage(name):
    return STAGES[name].fn


def leaks():
    """The bias in the weights, of one layer after the other."""
    weights = case().weights()
    biases = itertools.cycle([weights[n] for n in sorted(weights) if n.endswith("score_correction_bias")])
    return lambda s, ids, **k: stage("router.weights")(s + next(biases), ids, **k)


def of_corpus(*ids):
    return {i: (MUTANTS[i].stage, lambda i=i: MUTANTS[i].under(case().config).fn, {i}) for i in ids}


def sorted_weights(s, ids, **k):
    return np.sort(stage("router.weights")(s, ids, **k), axis=-1)


def without_nope(q, q_rope, kv, k_rope, mask, *, scale):
    return q_rope.transpose(0, 2, 1, 3) @ k_rope.swapaxes(1, 2)[:, None] * scale + mask


ATTENTION_BUGS = of_corpus("A04", "X13", "X14", "X15", "X17", "X22", "A01k", "A13c") | {
    "only rotated channels": ("mla.scores", lambda: without_nope, set()),
    "values first": ("mla.kv_b", lambda: lambda x, w, **k: np.roll(stage("mla.kv_b")(x, w, **k), 3, axis=-1), set()),
    "a weaker softmax": ("mla.probs", lambda: lambda s: stage("mla.probs")(s * 0.8), set()),
}
ROUTER_BUGS = of_corpus("R03", "R07", "R09", "R10", "X01", "X04", "X31-moe.act", "X30-moe.act-1", "R16") | {
    "R01": ("router.weights", leaks, {"R01"}),
    "sorted weights": ("router.weights", lambda: sorted_weights, set()),
}
BUGS = ATTENTION_BUGS | ROUTER_BUGS
NOT_SEEN = {
    *(("R09", "scaled later"), ("R09", "ids ascending, scaled later")),  # right weights, scaled again by the experts
    *(("X01", "on the activation"), ("X01", "on the activation, ids ascending")),  # there experts give weighted outputs
}


@functools.cache
def recorded(bug, precision, on_activation):
    """A run with a mistake in it, or none."""
    of = (OnActivation if on_activation else Case).read(TINY)
    patches = [Patch(BUGS[bug][0], BUGS[bug][1]())] if bug else []
    with np.errstate(all="ignore"):
        return trace_case(of, precision=precision, patches=patches)


def arranged(bug, how, precision, names=None):
    trace = recorded(bug, precision, "activation" in how)
    taps = {t: np.array(a) for t, a in trace.taps.items() if names is None or t.rpartition("/")[2] in names}
    return Trace(dataclasses.replace(trace.header, expected=[], dims={}), ARRANGED[how][0](taps))


def said(judgement):
    return [*judgement.gauges, *judgement.contested]


ALONE = [
    pytest.param(h, p, marks=[pytest.mark.slow] if p != "float32" or h.startswith("on the") else [])
    for h, p in itertools.product(ARRANGED, DTYPES)
    if (h, p) not in ROUNDED_TWICE
]


@pytest.mark.parametrize(("how", "precision"), ALONE)
def test_arrangements_alone_and_two_at_once_conform(how, precision):
    """Catches two gauges at once blamed where each alone is known: half and scaled, other slots and scaled later."""
    judgement = judge(case(), arranged("", how, precision))
    assert judgement.exit_code == 0 and judgement.verdict != "CONFORMS", render(judgement)
    assert all(any(text in what for what in said(judgement)) for text in ARRANGED[how][1]), said(judgement)


PAIRS = [
    (b, h)
    for bugs, hows in ((ATTENTION_BUGS, ATTENTION), (ROUTER_BUGS, ROUTER))
    for b in bugs
    for h in hows
    if (b, h) not in NOT_SEEN
]
QUICK = {
    *(
        ("R07", "ids ascending"),
        ("sorted weights", "ids ascending"),
        ("R01", "ids ascending"),
        ("R10", "on the activation"),
        ("X17", "before the mask"),
    ),
    *(("X14", "half"), ("X17", "half, scaled q"), ("R07", "ids ascending, scaled later")),
}
ALL = [(b, h, p) for (b, h), p in itertools.product(PAIRS, DTYPES) if (h, p) not in ROUNDED_TWICE]
COMBINED = [
    pytest.param(*one, marks=[] if one[:2] in QUICK and one[2] == "float32" else pytest.mark.slow) for one in ALL
]


@pytest.mark.parametrize(("bug", "how", "precision"), COMBINED)
def test_a_mistake_in_another_arrangement_is_blamed_alone_and_named(bug, how, precision):
    """Catches a right stage blamed because what it reads is wrong and arranged otherwise, and a name lost with it."""
    judgement = judge(case(), arranged(bug, how, precision))
    assert {f.stage for f in judgement.culprits} == {BUGS[bug][0]}, render(judgement)
    assert BUGS[bug][2] == {i for d in judgement.causes for i in d.ids}, render(judgement)
    assert all(any(text in what for what in said(judgement)) for text in ARRANGED[how][1]), said(judgement)


@pytest.mark.parametrize(("bug", "how", "precision"), ALL)
@pytest.mark.slow
def test_the_region_that_is_blamed_holds_the_mistake_with_an_engine_s_taps(bug, how, precision):
    """Catches the same where the stages between were not recorded."""
    judgement = judge(case(), arranged(bug, how, precision, ENGINE))
    tap = STAGES[BUGS[bug][0]].tap
    assert all(any(t.endswith(f"/{tap}") for t in f.region) for f in judgement.culprits), render(judgement)
    assert judgement.exit_code == 1, render(judgement)


def test_a_scale_in_both_of_q_and_k_is_a_mistake():
    """Catches the softmax scale multiplied in twice excused as two gauges, seen by the scores or by nothing behind them."""
    trace = arranged("", "scaled k", "float32")
    wrong = SCALED(each(lambda t, a, taps: a * np.float32(SCALE), "mla.scores")(trace.taps))
    assert judge(case(), Trace(trace.header, wrong)).exit_code == 1
    some = {t: a for t, a in wrong.items() if "/L0/" in t and t.endswith(("attn_norm", "mla.q_rope", "mla.k_rope"))}
    judgement = judge(case(), Trace(trace.header, some))
    assert {f.stage for f in judgement.culprits} <= {"mla.q_rope", "mla.k_rope"} and judgement.exit_code == 1


@pytest.mark.parametrize("factor", [SCALE**0.75, SCALE * 1.05, SCALE / np.log(2) ** 2])
def test_a_wrong_factor_in_the_keys_is_a_mistake(factor):
    """Catches any factor of the keys taken for a share of the softmax scale."""
    wrong = each(lambda t, a, taps: a * np.float32(factor), "mla.k_rope")
    trace = recorded("", "float32", False)
    judgement = judge(case(), Trace(trace.header, wrong(dict(trace.taps))))
    assert judgement.exit_code == 1 and {f.stage for f in judgement.culprits} <= {"mla.k_rope", "mla.scores"}


def test_a_factor_that_shows_nowhere_else_is_no_gauge():
    """Catches queries that are too small excused as scaled by a wrong softmax scale, where no score tells."""
    trace = arranged("", "half", "float32", ("attn_norm", "mla.q", "mla.q_rope", "mla.k_rope"))
    short = trace.taps | {t: a * np.float32(1.3 * SCALE) for t, a in trace.taps.items() if t.endswith("mla.q_rope")}
    judgement = judge(case(), Trace(trace.header, {t: a for t, a in short.items() if "/L0/" in t}))
    assert {f.stage for f in judgement.culprits} == {"mla.q_rope"}, render(judgement)


@pytest.mark.parametrize(
    "names", [("mla.q_rope",), pytest.param(("mla.q_rope", "mla.q"), marks=pytest.mark.slow)], ids=len
)
@pytest.mark.parametrize("turn", [dict, HALF], ids=["interleaved", "half"])
def test_a_wrong_scale_in_the_queries_is_the_scores_mistake(turn, names):
    """Catches queries blamed that hold the wrong softmax scale instead of the right one, in either order of channels."""
    c = case().config
    wrong = SCALE * np.sqrt((c.qk_nope_head_dim + c.qk_rope_head_dim) / c.qk_nope_head_dim)
    scaled = each(lambda t, a, taps: a * np.float32(wrong), *names)
    trace = arranged("X17", "half", "float32") if turn is HALF else recorded("X17", "float32", False)
    judgement = judge(case(), Trace(dataclasses.replace(trace.header, dims={}), scaled(dict(trace.taps))))
    assert {f.stage for f in judgement.culprits} == {"mla.scores"}, render(judgement)
    assert [d.id for d in judgement.causes] == ["X17"] and any(INTO_Q in what for what in judgement.gauges)


def test_queries_that_are_too_small_are_no_gauge_if_scores_are_right_on_them():
    """Catches a mistake of the queries shifted to the scores, which are right on them, by a gauge that is supposed."""
    small = Patch("mla.q_rope", lambda *a, **k: stage("mla.q_rope")(*a, **k) * np.float32(1.2 * SCALE))
    judgement = judge(case(), trace_case(case(), patches=[small]))
    assert {f.stage for f in judgement.culprits} == {"mla.q_rope"} and not judgement.gauges, render(judgement)


def two_heads(trace):
    """The trace with heads 1 and 2 alone, of which nothing is said."""
    second, first = ("mla.q", "mla.q_rope", "mla.kv_b", "mla.ctx"), ("mla.scores", "mla.probs")
    cut = each(lambda t, a, taps: a[:, :, 1:3], *second)(each(lambda t, a, taps: a[:, 1:3], *first)(trace.taps))
    return Trace(trace.header, cut)


@pytest.mark.parametrize("how", ["half", "before the mask", "half, scaled q"])
def test_some_heads_in_another_arrangement_conform(how):
    """Catches later stages run on the recorded heads as they were recorded, beside heads in our arrangement."""
    judgement = judge(case(), two_heads(arranged("", how, "float32")))
    assert judgement.verdict == "CONFORMS_IN_GAUGE", render(judgement)


@pytest.mark.parametrize("how", ["half", "before the mask"])
def test_heads_are_told_though_one_tap_of_them_is_wrong(how):
    """Catches taps of two undeclared heads blamed for their shape, all of them, because the values of one are wrong. What comes of
    the heads that were not recorded is wrong too, and told of a region that holds the mistake.
    """
    judgement = judge(case(), two_heads(arranged("values first", how, "float32")))
    assert {f.stage for f in judgement.culprits} == {"mla.kv_b", "attn_out"}, render(judgement)
    assert all(any(t.endswith("mla.kv_b") for t in f.region) for f in judgement.culprits)
    assert any('"heads": [1, 2]' in note for note in judgement.notes), judgement.notes


def test_the_weights_of_slots_are_told_by_what_experts_gave():
    """Catches slots of several tokens mixed, a factor of the reader taken for the weights', rows taken for tokens."""
    rng, tokens = np.random.default_rng(0), 5
    ids, w = np.array([[[3, 1], [0, 2], [2, 3], [1, 0], [3, 0]]]), rng.random((1, tokens, 2)) + 0.1
    down, shared = rng.standard_normal((2 * tokens, 6)), rng.standard_normal((1, tokens, 6))
    place = sorted((int(ids[0, t, k]), t, k) for t in range(tokens) for k in range(2))
    out, rows = shared.copy(), np.zeros((2 * tokens, 6))
    for i, (_, t, k) in enumerate(place):
        out[0, t] += 2.5 * w[0, t, k] * down[i]
        rows[i] = w[0, t, k] * down[i]
    calls = {s: Call(s, f"fwd/L1/{STAGES[s].tap}", (), {}) for s in ("moe.out", "moe.act")}
    answers = [shared.copy() for _ in range(3)]
    for i, (_, t, k) in enumerate(place):
        answers[1 + k][0, t] += down[i]
    np.testing.assert_allclose(fitted(answers, out, calls["moe.out"], ids), 2.5 * w[0], rtol=1e-9)
    of_slot = np.array([k for _, _, k in place])[:, None]
    answers = [rows * 0, *[down * (of_slot == k) for k in range(2)]]
    np.testing.assert_allclose(fitted(answers, rows, calls["moe.act"], ids), w[0], rtol=1e-9)
