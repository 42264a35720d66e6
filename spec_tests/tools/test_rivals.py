"""Several known mistakes that fit: the one that the candidate made, or all of them where nothing tells them apart."""

import json
from math import erf

import ml_dtypes
import numpy as np
import pytest

from refimpl.diff import Case, Trace, render
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.gauges import swap_pairs
from refimpl.diff.judge import judge
from refimpl.diff.report import to_json
from refimpl.diff.rivals import nearest
from refimpl.diff.sarif import to_sarif
from refimpl.layers import PRESETS
from refimpl.layers.stage import STAGES, Patch
from refimpl.record import new_case, trace_case
from refimpl.spec_tests.cases.mutated import Mutated

from .test_diff_partial import case, only


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """regimes -> a case."""
    found = {}

    def make(regimes):
        if regimes not in found:
            folder = tmp_path_factory.mktemp("case") / "case"
            found[regimes] = Case.read(new_case(folder, PRESETS["tiny"], seed=0, length=12, regimes=regimes))
        return found[regimes]

    return make


def judged(case, *patches, precision="float32"):
    with np.errstate(all="ignore"):
        return judge(case, trace_case(case, precision=precision, patches=patches))


# ---- The line between two


def drawn(seed, rows=40, n=16):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rows, n)) * 10.0 ** rng.integers(-3, 3, (rows, 1))
    return a, a * (1 + 1e-3 * rng.standard_normal((rows, n))), rng


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_the_nearer_of_two_is_named(dtype):
    """Catches a difference below a roundoff that is thought to be lost in it: 3,200 roundings do not all go one way."""
    for seed in range(5):
        a, b, _ = drawn(seed, rows=200)
        for i, e in enumerate((a, b)):
            assert nearest([e.astype(dtype).astype(np.float64)], [[a], [b]])[0] == [i]


def test_what_noise_hides_is_left_open():
    """Catches a choice between two by chance: errors of 1 beside a difference of 1e-3, and a candidate half-way."""
    for seed in range(5):
        a, b, rng = drawn(seed)
        assert nearest([a * (1 + rng.standard_normal(a.shape))], [[a], [b]]) == ([0, 1], False)
        assert nearest([(a + b) / 2], [[a], [b]]) == ([0, 1], False)


def test_equal_numbers_are_said_to_be_equal():
    """Catches rivals that nothing can part, called a matter of noise; and a third, which is another, counted among them."""
    a, b, _ = drawn(0)
    assert nearest([a], [[a], [a * (1 + 1e-15)]]) == ([0, 1], True)
    assert nearest([a], [[a], [b], [a]]) == ([0, 2], True)
    a[1], b[1] = 0, 1  # what gives nothing where the other gives something is no equal
    assert nearest([b], [[a], [b]]) == ([1], True)
    assert nearest([], [[], []]) == ([0, 1], True)


def test_rows_that_are_no_numbers_part_nothing():
    """Catches one NaN, or a row of zeros, that makes every comparison undecided."""
    a, b, _ = drawn(3)
    x = a.astype(np.float32).astype(np.float64)
    x[0, 0], b[1, 0] = np.nan, np.inf
    x[2], a[2], b[2] = 0, 0, 0
    assert nearest([x], [[a], [b]])[0] == [0]


# ---- In a judgement


def gelu(kind):
    """The activations with a GELU, as a loop over numbers computes it; inside in float64, out as the run has it."""
    exact, tanh = (
        lambda x: 0.5 * (1 + erf(x / 2**0.5)),
        lambda x: 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    )
    part = np.vectorize({"exact": exact, "tanh": tanh}[kind])

    def fn(gate, up, ids=None, weights=None):
        g = gate.astype(np.float64)
        y = g * part(g) * up if gate.size else g
        return y.astype(gate.dtype)

    return [Patch(name, fn) for name in ("mlp.act", "shared.act", "moe.act")]


@pytest.mark.parametrize("kind", ["exact", pytest.param("tanh", marks=pytest.mark.slow)])
def test_two_gelus_are_told_apart_in_bfloat16(kind):
    """Catches a name that is given up because both fit what bfloat16 allows."""
    judgement = judged(case(), *gelu(kind), precision="bf16")
    assert [d.said for d in judgement.causes] == [f"{kind} GELU instead of SiLU"], render(judgement)


def test_mistakes_that_are_the_same_numbers_are_named_together(made):
    """Catches one of two taken at random, and reports that show half: 1e-20 left out, or added to a quotient of 0.17."""
    small = made("extreme-logits")
    judgement = judged(small, Mutated(MUTANTS["R12"], small))
    (d,) = judgement.causes
    assert d.ids == ("R12", "R13") and d.same and "sglang #30989" in d.threads and "tt-metal #33153" in d.threads
    text = render(judgement)
    assert "the same numbers on this case" in text and "R12, R13, sglang #30989" in text
    (told,) = json.loads(to_json(judgement))["causes"]
    assert told["same_numbers"] and [x["id"] for x in told["rivals"]] == ["R13"]
    taxa = json.loads(to_sarif(judgement))["runs"][0]["taxonomies"][0]["taxa"]
    assert [t["id"] for t in taxa] == ["R12", "R13"]


def test_numbers_that_only_fewer_bits_lose_are_reproduced(made):
    """Catches a mistake that is not named because float64 holds what the candidate's dtype does not: scores of 1e-173 that were
    not recorded, whose sum is 0 in float32 and not in float64.
    """
    small = made("extreme-logits")
    with np.errstate(all="ignore"):
        trace = trace_case(small, patches=[Mutated(MUTANTS["R12"], small)])
    part = only(trace, lambda t: not t.endswith(("router.scores", "router.choice")))
    assert np.isnan(part.taps["fwd/L1/router.weights"]).any()
    judgement = judge(small, part)
    assert {f.tap.rpartition("/")[2] for f in judgement.culprits} == {"router.weights"}
    assert [d.ids for d in judgement.causes] == [("R12", "R13")], render(judgement)


def test_an_order_that_one_of_a_pair_cannot_tell_is_that_of_the_other(made):
    """Catches q blamed for the order of its rotated channels where k, behind many stages that were not recorded, fits in either."""
    ties = made("near-ties")
    trace = trace_case(ties, precision="bf16")
    names = ("shared.gate", "moe.up", "mla.q_a_norm", "mlp.up", "mla.q_rope", "mla.k_rope")
    part = only(trace, lambda t: t.rpartition("/")[2] in names)
    half = {t: swap_pairs(a, to_interleaved=False) if t.endswith("_rope") else a for t, a in part.taps.items()}
    assert not judge(ties, Trace(part.header, half)).culprits
    mixed = {t: a if t.endswith("k_rope") else half[t] for t, a in part.taps.items()}  # k of the first layer tells
    assert {f.tap for f in judge(ties, Trace(part.header, mixed)).culprits} >= {"fwd/L0/mla.q_rope"}


@pytest.mark.parametrize("id", ["X13", "X22"])
def test_a_wrong_rotation_of_k_is_found_beside_halves_in_both(id):
    """Catches q, and the scores of both, blamed for an order of channels that k has too, because k is wrong in any."""
    trace = trace_case(case(), patches=[Mutated(MUTANTS[id], case())])
    half = {t: swap_pairs(a, to_interleaved=False) if t.endswith("_rope") else a for t, a in trace.taps.items()}
    judgement = judge(case(), Trace(trace.header, half))
    assert {f.tap.rpartition("/")[2] for f in judgement.culprits} == {"mla.k_rope"}, render(judgement)
    assert [d.id for d in judgement.causes] == [id] and judgement.gauges


def zeros_with_ties(a, kept, *, k, n_group, fill):
    """R02 whose ties go to the higher index, expert by expert."""
    ids = np.zeros((*a.shape[:-1], k), np.int64)
    each = a.shape[-1] // n_group
    for at in np.ndindex(a.shape[:-1]):
        scored = [(a[at][e] if e // each in kept[at] else 0.0, e) for e in range(a.shape[-1])]
        ids[at] = [e for _, e in sorted(scored, reverse=True)[:k]]
    return ids


def test_ties_of_a_wrong_choice_may_fall_any_way(made):
    """Catches a mistake that is named only if the candidate breaks its ties as we do; and one that is named for any choice."""
    negative = made("bias-negative")
    with np.errstate(all="ignore"):
        trace = trace_case(negative, patches=[Patch("router.ids", zeros_with_ties)])
        ours = trace_case(negative, patches=[Patch("router.ids", MUTANTS["R02"].fn)])
    taps = [t for t in trace.taps if t.endswith("router.ids")]
    assert any((np.sort(trace.taps[t]) != np.sort(ours.taps[t])).any() for t in taps)
    judgement = judge(negative, trace)
    assert {f.stage for f in judgement.culprits} == {"router.ids"}
    assert [d.id for d in judgement.causes] == ["R02"], render(judgement)
    wrong = {t: np.array(trace.taps[t]) for t in taps}
    for t in taps:
        biased = trace.taps[t.replace("ids", "choice")]
        wrong[t][0, 0, 0] = np.argsort(biased[0, 0])[0]  # an expert that no score speaks for
    assert judge(negative, Trace(trace.header, dict(trace.taps) | wrong)).causes == []


def test_groups_where_there_are_none_are_named_with_their_number(made):
    """Catches a model without groups that is routed in 4, of which 2 are kept, known to nobody."""
    alone = made("one-group")

    def grouped(a, kept, *, k, n_group, fill):
        ids = np.zeros((*a.shape[:-1], k), np.int64)
        for at in np.ndindex(a.shape[:-1]):
            parts = np.split(a[at], 4)
            best = sorted(range(4), key=lambda g: -sum(sorted(parts[g])[-2:]))[:2]
            scored = [(x if e // len(parts[0]) in best else -np.inf, -e) for e, x in enumerate(a[at])]
            ids[at] = [-e for _, e in sorted(scored, reverse=True)[:k]]
        return ids

    (d,) = judged(alone, Patch("router.ids", grouped)).causes
    assert d.title == "a model without groups is routed in 4, of which 2 are kept"


@pytest.mark.parametrize("id", ["A05b", *[pytest.param(i, marks=pytest.mark.slow) for i in ("A06c", "A11c")]])
def test_the_two_mscales_are_kept_apart(made, id):
    """Catches mistakes of one of two factors that are named as those of the other. In this case their ratio is not 1."""
    uneven = made("mscale")
    judgement = judged(uneven, Mutated(MUTANTS[id], uneven))
    assert [d.ids for d in judgement.causes] == [(id,)], render(judgement)


def test_a_scale_by_the_wrong_mscale_is_the_one_of_its_name(made):
    """Catches a mutant of settings that computes another scale than its title says."""
    c = made("mscale").config
    m = [0.1 * x * np.log(c.yarn.factor) + 1 for x in (c.yarn.mscale, c.yarn.mscale_all_dim)]
    q, kv, mask = np.ones((1, 2, 1, 3)), np.ones((1, 2, 1, 3)), np.zeros((1, 1, 2, 2))
    rope = np.ones((1, 2, 1, 1)), np.ones((1, 2, 1))
    given = (q, rope[0], kv, rope[1], mask)
    ours = STAGES["mla.scores"].fn(*given, scale=m[1] ** 2 * 3**-0.5)
    theirs = MUTANTS["A05b"].under(c).fn(*given, scale=m[1] ** 2 * 3**-0.5)
    np.testing.assert_allclose(theirs / ours, (m[0] / m[1]) ** 2, rtol=1e-12)
