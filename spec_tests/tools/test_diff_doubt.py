"""Tokens whose experts nobody can know, because of rounding or NaN: nothing made of their choice is blamed, all else is."""

import dataclasses
import functools

import numpy as np
import pytest

from refimpl.diff import Case, Trace, render
from refimpl.diff.dims import Sizes
from refimpl.diff.judge import judge
from refimpl.diff.padding import Padding
from refimpl.diff.settled import Unsettled
from refimpl.layers.stage import STAGES, Call, Patch, tap_name
from refimpl.record import new_case, trace_case

from .test_diff_partial import case, drawn, only

HOLE = "fwd/L1/mla.scores"
ROWS = ("moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down")


@functools.cache
def torn():
    """A candidate with infinity in one score of one head of one token; so all of that token behind it is NaN."""

    def scores(*args, **static):
        y = np.array(STAGES["mla.scores"].fn(*args, **static))
        if tap_name(STAGES["mla.scores"]) == HOLE:
            y[0, 3, 20, 10] = np.inf
        return y

    with np.errstate(all="ignore"):
        return trace_case(case(), patches=[Patch("mla.scores", scores)])


def without(trace, *taps):
    return only(trace, lambda t: t not in {f"fwd/L1/{tap}" for tap in taps})


def wrong(trace, tap, at):
    x = np.array(trace.taps[tap])
    assert np.isfinite(x[at]).all()
    x[at] *= -2
    return Trace(trace.header, dict(trace.taps) | {tap: x})


def blamed(trace, c=None):
    return [f.tap for f in judge(c or case(), trace).culprits]


@pytest.mark.parametrize(
    "unseen",
    [(), ("router.ids",), ("router.ids", "router.groups"), ("router.ids", "moe.down"), ("router.ids", *ROWS[:4])],
)
def test_infinity_in_a_score_is_blamed_alone(unseen):
    """Catches dispatched rows that are counted off by experts of a NaN token, which nobody knows."""
    assert blamed(without(torn(), *unseen)) == [HOLE]


@pytest.mark.parametrize("seed", [3, 29, *[pytest.param(s, marks=pytest.mark.slow) for s in range(40)]])
def test_no_region_without_the_hole_is_blamed(seed):
    """Catches regions that span a choice made from NaN, and the layers behind them, blamed for what it does to other tokens."""
    judgement = judge(case(), drawn(torn(), seed, 0.6))
    assert all(HOLE in f.region for f in judgement.culprits), render(judgement)


@pytest.mark.parametrize(
    ("unseen", "found"),
    [((), True), (("router.ids", *ROWS), True), (("router.ids", *ROWS[1:]), False), (ROWS, True)],
    ids=["all", "no rows", "some rows and no ids", "ids and no rows"],
)
def test_a_token_beyond_doubt_is_judged_wherever_its_rows_are_known(unseen, found):
    """Catches one NaN token that hides all others although ids, or our own rows, say which is which."""
    trace = wrong(without(torn(), *unseen), "fwd/L1/moe.routed", (1, 5))
    assert ("fwd/L1/moe.routed" in blamed(trace)) == found


def test_without_doubt_rows_without_ids_are_judged():
    """Catches dispatched rows excused whenever the ids were not recorded."""
    clean = without(trace_case(case()), "router.ids", "router.weights")
    assert not blamed(clean)
    for tap, at in (("fwd/L1/moe.routed", (1, 5)), ("fwd/L1/moe.rows", 7)):
        assert tap in blamed(wrong(clean, tap, at))


@functools.cache
def near():
    """Other tokens in bfloat16, of which some choose by less than roundings move scores: a candidate in which one falls the other
    way.
    """
    tokens = np.random.default_rng(2).integers(0, case().config.vocab_size, (2, 24)).tolist()
    c = dataclasses.replace(case(), tokens=tokens)

    def ids(choice, groups, *, k, **static):
        more = STAGES["router.ids"].fn(choice, groups, k=k + 1, **static)
        best = np.take_along_axis(np.asarray(choice), more, axis=-1)
        gap, out = best[..., k - 1] - best[..., k], np.array(more[..., :k])
        if tap_name(STAGES["router.ids"]) == "fwd/L1/router.ids":
            at = np.unravel_index(int(np.argmin(gap)), gap.shape)
            assert 0 < gap[at] < 0.003
            out[at][k - 1] = more[at][k]
        return out

    return c, trace_case(c, precision="bf16", patches=[Patch("router.ids", ids)])


def test_a_choice_within_rounding_leaves_recorded_rows_to_nobody():
    """Catches what combines dispatched rows held to an assignment of them to tokens that may be another by rounding alone."""
    c, trace = near()
    router = [t for t in trace.taps if t.startswith("fwd/L1/router.")]
    unseen = only(trace, lambda t: t not in router and t != "fwd/L1/ffn_norm")
    judgement = judge(c, unseen)
    (routed,) = [f for f in judgement.findings if f.tap == "fwd/L1/moe.routed"]
    assert routed.open and "record router.ids" in routed.note and not judgement.culprits, render(judgement)
    ours = only(unseen, lambda t: t not in {f"fwd/L1/{tap}" for tap in ROWS})
    (routed,) = [f for f in judge(c, ours).findings if f.tap == "fwd/L1/moe.routed"]
    assert routed.ok and not routed.open


def see(u, stage, unit, args, values, recorded=(), own=None, **static):
    """Show a call to `u`, its values given."""
    call = Call(stage, f"fwd/{unit}/{STAGES[stage].tap}", args, static, own)
    given = {n: values[n] for n in values if n in recorded}
    u.see(call, {n: values[n] for n in values if n not in recorded or n == call.tap}, [], given)
    return u.of(call, values[call.tap].shape)


@pytest.mark.parametrize("recorded", [(), ("fwd/L0/router.ids",), ("fwd/L0/moe.down",)])
def test_doubt_goes_with_the_rows_of_a_token(recorded):
    """Catches doubt about rows of other tokens, or none about a doubtful token's. Oracle: expert by expert, token by token."""
    rng = np.random.default_rng(0)
    scores = rng.permutation(24).reshape(1, 4, 6) / 24
    scores[0, 2, [1, 4]] = 0.99  # with k = 1 this token's experts are equally good
    ids = np.argmax(scores, axis=-1)[..., None]
    n = [f"fwd/L0/{t}" for t in ("router.choice", "router.ids", "moe.down", "moe.routed", "router.weights")]
    values = dict(zip(n, (scores, ids, np.zeros((4, 3)), np.zeros((1, 4, 3)), np.zeros((1, 4, 1))), strict=True))
    routed = Call("moe.routed", n[3], (n[2], n[1], n[4]), {})
    down = Call("moe.down", n[2], ("x", n[1]), {})
    u = Unsettled([down, routed], recorded)
    u.marks["x"] = np.array([[True, False, False, False]])
    doubt = see(u, "router.ids", "L0", (n[0], None), values, recorded, k=1, n_group=1)
    assert doubt.tolist() == [[False, False, True, False]]
    of_rows = see(u, "moe.down", "L0", ("x", n[1]), values, recorded)
    rows = [t for expert in range(6) for t in range(4) if ids[0, t, 0] == expert]
    known = n[1] in recorded
    assert of_rows.tolist() == [t == 0 for t in rows] if known else of_rows.any()
    whole = see(u, "moe.routed", "L0", (n[2], n[1], n[4]), values, recorded)
    expected = {0: known or not recorded, 1: False, 2: not known, 3: False}
    assert whole[0].tolist() == [n[2] in recorded or expected[t] for t in range(4)]


def test_doubt_about_padding_is_nobodys():
    """Catches a doubtful choice of padding that is said of tokens behind it, or said at all where no rows lie by it."""
    padding = Padding(np.array([[True, False, False]]), Sizes.whole(1, 3))
    names = ("moe.down", "router.ids", "router.weights", "moe.routed")
    down, ids, weights, routed = (f"fwd/L0/{t}" for t in names)
    values = {"keys": np.zeros((1, 3, 2)), "fwd/L0/mla.ctx": np.zeros((1, 3, 2, 2)), "choice": np.eye(3)[None]}
    values |= {ids: np.array([[[0], [1], [2]]]), routed: np.zeros((1, 3, 4))}
    program = [Call("moe.down", down, ("x", ids), {})]
    for recorded in ((), (down,)):
        u = Unsettled(program, recorded, padding)
        u.loose.add("choice")
        see(u, "router.ids", "L0", ("choice", None), values, k=1, n_group=1)
        assert (ids in u.marks) == bool(recorded)
    u = Unsettled([], (), padding)
    u.marks[ids] = np.array([[True, False, False]])
    assert see(u, "moe.routed", "L0", (down, ids, weights), values).tolist() == [[True, False, False]]
    assert see(u, "mla.ctx", "L0", (routed,), values).tolist() == [[True, False, False]]
    u.marks[ids] = np.array([[False, True, False]])
    see(u, "moe.routed", "L0", (down, ids, weights), values)
    assert see(u, "mla.ctx", "L0", (routed,), values).all()


def test_doubt_goes_with_a_token_into_other_stages():
    """Catches a stage on FP8 codes taken for a gradient, which all tokens enter, and an MTP module with as many rows."""
    u = Unsettled([], ())
    u.marks["x"] = np.array([[False, True, False]])
    values = {"fwd/L0/attn_out": np.zeros((1, 3, 4)), "fwd/mtp1/mtp.hidden": np.zeros((1, 2, 4))}
    assert see(u, "attn_out", "L0", ("x",), values, own=STAGES["attn_out"]).tolist() == [[False, True, False]]
    assert see(u, "mtp.hidden", "mtp1", ("x",), values).tolist() == [[False, True]]


def test_doubts_of_the_main_model_and_of_its_mtp_module_meet_in_a_gradient(tmp_path):
    """Catches a traceback, of 23 tokens' doubts where 24 are meant, from a correct training step of which a choice and a gradient
    before it were recorded.
    """
    config = case().config.replace(num_nextn_predict_layers=1)
    made = Case.read(new_case(tmp_path / "case", config, mtp=True, length=12))
    trace = trace_case(made, precision="bf16", training={"mtp_weight": 0.3})
    for names in (
        ("fwd/L2/router.choice", "bwd/L1/ffn_norm"),
        ("fwd/mtp1/router.choice", "bwd/L1/ffn_norm", "bwd/mtp1/ffn_norm"),
    ):
        assert set(names) <= set(trace.taps)
        judgement = judge(made, only(trace, lambda t, names=names: t in names))
        assert not judgement.culprits and judgement.verdict in ("CONFORMS", "INCONCLUSIVE")
