"""The diff's small rules by themselves: forms of masks and tables, legal arrangements, holes, lengths of axes."""

import itertools
import math

import numpy as np
import pytest

from refimpl.diff.axes import axes_at, axes_of
from refimpl.diff.compare import unusable
from refimpl.diff.dims import Sizes, letters, size_of
from refimpl.diff.forms import in_our_form
from refimpl.diff.gauges import alternatives, broken, by_rank, swap_pairs
from refimpl.diff.glimpse import Glimpse
from refimpl.diff.holes import excused, mended, torn
from refimpl.diff.wide import Place, Wide
from refimpl.layers import PRESETS, STAGES
from refimpl.layers.fp8_parts import SCALE
from refimpl.layers.stage import Call
from refimpl.model.phases import Part

# ---- Forms

HIDDEN = np.where(np.tri(3, 4, 1, dtype=bool), 0.0, -np.inf)  # three queries after one cached key
OTHER = np.where(np.tri(3, 4, 1, dtype=bool) & (np.arange(4) != 1), 0.0, -np.inf)
"""A second sequence, in which the cached key's follower is padding."""
BOTH = np.stack([HIDDEN, OTHER])[:, None]
STRICT = np.broadcast_to(np.where(np.tri(3, 4, 0, dtype=bool), 0.0, -np.inf), (2, 1, 3, 4))
"""A wrong one: a query does not see itself."""
TRUTH, HEADS, ONE = "truth values", "same for every head", "one for all sequences"
MASKS = {
    "ours": (BOTH, BOTH, []),
    "additive with a finite number": (np.maximum(BOTH, -1e4), np.maximum(BOTH, -1e4), []),
    "where a key is seen": (BOTH == 0, BOTH, [TRUTH]),
    "where a key is hidden": (BOTH != 0, BOTH, [TRUTH]),
    "where a key is hidden, a query's own too": (STRICT != 0, STRICT, [TRUTH]),
    "where a key is seen, but not a query's own": (STRICT == 0, STRICT, [TRUTH]),
    "ones and zeros": ((BOTH == 0).astype(np.int32), BOTH, [TRUTH]),
    "ones and zeros in float": ((BOTH == 0).astype(np.float32), BOTH, [TRUTH]),
    "hidden keys as ones in float": ((BOTH != 0).astype(np.float32), BOTH, [TRUTH]),
    "a row for every head": (np.repeat(BOTH, 2, axis=1), BOTH, [HEADS]),
    "truth for every head": (np.repeat(BOTH == 0, 2, axis=1), BOTH, [TRUTH, HEADS]),
    "heads that differ": (np.concatenate([BOTH, BOTH[::-1]], axis=1), np.concatenate([BOTH, BOTH[::-1]], axis=1), []),
    "of one sequence": (HIDDEN, np.stack([HIDDEN, HIDDEN])[:, None], [ONE]),
    "of one sequence, with its axes": (HIDDEN[None, None], np.stack([HIDDEN, HIDDEN])[:, None], [ONE]),
    "truth of one sequence": (HIDDEN == 0, np.stack([HIDDEN, HIDDEN])[:, None], [TRUTH, ONE]),
    "turned": (HIDDEN.T, HIDDEN.T, []),
    "no square": (np.zeros(24), np.zeros(24), []),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read_in_every_form(name):
    """Catches True read as hidden where it means seen, heads or sequences that differ taken for one, a note that is not so."""
    x, expected, notes = MASKS[name]
    found, said = in_our_form("mask", x, (2, 1, 3, 4))
    np.testing.assert_array_equal(found, expected)
    assert len(said) == len(notes) and all(a in b for a, b in zip(notes, said, strict=True))
    if name == "of one sequence, with its axes":
        assert in_our_form("mask", x, (1, 1, 3, 4))[1] == []  # it is all there is
    assert in_our_form("resid", x, (2, 1, 3, 4))[0] is x


ANGLE = np.arange(6.0).reshape(1, 3, 2) + np.array([0.0, 0.5]).reshape(2, 1, 1)
TABLE = np.stack([np.cos(ANGLE), np.sin(ANGLE)])  # 2 B S Dr/2
TWICE, SEQUENCE = "every frequency twice", "those of one sequence"
TABLES = {
    "ours": (TABLE, TABLE, []),
    "halves": (np.concatenate([TABLE, TABLE], axis=-1), TABLE, [TWICE]),
    "neighbours": (np.repeat(TABLE, 2, axis=-1), TABLE, [TWICE]),
    "twice as wide": (np.concatenate([TABLE, -TABLE], axis=-1), np.concatenate([TABLE, -TABLE], axis=-1), []),
    "of one sequence": (TABLE[:, 0], np.repeat(TABLE[:, :1], 2, axis=1), [SEQUENCE]),
    "of one sequence, with its axis": (TABLE[:, :1], np.repeat(TABLE[:, :1], 2, axis=1), [SEQUENCE]),
    "halves of one sequence": (
        np.concatenate([TABLE[:, 0]] * 2, axis=-1),
        np.repeat(TABLE[:, :1], 2, axis=1),
        [TWICE, SEQUENCE],
    ),
    "flat": (np.arange(4.0), np.arange(4.0), []),
    "a scalar": (np.array(1.0), np.array(1.0), []),
}


@pytest.mark.parametrize("name", TABLES)
def test_rotary_tables_are_read_in_every_form(name):
    """Catches frequencies that are not there twice cut in half, pairs taken for halves, one sequence's tables spread over a batch
    of one and called so.
    """
    x, expected, notes = TABLES[name]
    found, said = in_our_form("mla.rope_tables", x, (2, 2, 3, 2))
    np.testing.assert_array_equal(found, expected)
    assert len(said) == len(notes) and all(a in b for a, b in zip(notes, said, strict=True))
    assert in_our_form("mla.rope_tables", TABLE[:, :1], (2, 1, 3, 2))[1] == []


# ---- Arrangements


def test_pairs_and_halves_are_each_others_inverse():
    """Catches a channel that is lost or taken twice."""
    x = np.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(swap_pairs(x, to_interleaved=True), x[:, [0, 3, 1, 4, 2, 5]])
    np.testing.assert_array_equal(swap_pairs(x, to_interleaved=False), x[:, [0, 2, 4, 1, 3, 5]])


def test_numbers_in_the_order_of_others():
    """Catches a sort that turns signs or loses a number: the largest stands where the other array has its largest."""
    x, like = np.array([[3.0, -1.0, 2.5], [0.0, 7.0, -2.0]]), np.array([[0.1, 0.9, -0.3], [5.0, 4.0, 6.0]])
    np.testing.assert_array_equal(by_rank(x, like), [[2.5, 3.0, -1.0], [0.0, -2.0, 7.0]])


TINY = PRESETS["tiny"]
SCALE_OF = TINY.softmax_scale
BASE_2 = 1 / math.log(2)
SHARES_OF = {
    side: {
        f"the softmax scale is multiplied into {side}": SCALE_OF,
        "the root of the softmax scale is multiplied into q and k": math.sqrt(SCALE_OF),
        f"the softmax scale times log2 e is multiplied into {side}, softmax is to base 2": SCALE_OF * BASE_2,
        "the softmax scale times log2 e (its root) is multiplied into q and k, softmax is to base 2": math.sqrt(
            SCALE_OF * BASE_2
        ),
    }
    for side in "qk"
}
"""What a candidate may have multiplied into q or k, and how much it is."""
PAIRED = np.random.default_rng(0).standard_normal((3, 3, 2, 4))


def given(stage, x, exact=None, unit="fwd/L1"):
    call = Call(stage, f"{unit}/{STAGES[stage].tap if stage in STAGES else stage}", (), {})
    return [(" + ".join(what), np.asarray(a)) for what, a in alternatives(call, x, x if exact is None else exact, TINY)]


def by_value(*args):
    return [(text, a) for text, a in given(*args) if not text.startswith("axes")]


def test_arrangements_that_a_tap_may_have():
    """Catches an arrangement that is not tried, one of another stage, a factor applied the wrong way, axes that no shape betrays
    and that are not turned. The candidate's array is made by hand of ours; undoing must give ours back.
    """
    x = PAIRED
    texts = dict(given("mla.q_rope", x))
    half, own, root = (
        "rotated channels in the other order",
        "scale is multiplied into q",
        "root of the softmax scale is",
    )
    ways = [a for text, a in given("mla.q_rope", x) if text == half]
    assert len(ways) == 2 and np.array_equal(swap_pairs(ways[0].astype(float), to_interleaved=False), x)
    np.testing.assert_allclose(next(a for t, a in texts.items() if t.endswith(own)), x / SCALE_OF, rtol=1e-12)
    np.testing.assert_allclose(next(a for t, a in texts.items() if root in t), x / math.sqrt(SCALE_OF), rtol=1e-12)
    np.testing.assert_array_equal(texts["axes in the order 1 0 2 3"], x.swapaxes(0, 1))
    assert [t for t in texts if t.startswith("axes")] == ["axes in the order 1 0 2 3"]
    square = np.arange(27.0).reshape(3, 3, 3)
    turned = dict(given("resid", square))
    orders = [o for o in itertools.permutations(range(3)) if o != (0, 1, 2)]
    assert list(turned) == [f"axes in the order {' '.join(map(str, o))}" for o in orders]
    for o in orders:
        np.testing.assert_array_equal(turned[f"axes in the order {' '.join(map(str, o))}"], square.transpose(o))
    factors = SHARES_OF["k"]
    found = given("mla.k_rope", PAIRED[:, 0, 0])
    assert [t for t, _ in found] == [half, half, *factors, *[f"{half} + {f}" for f in factors] * 2]
    for text, factor in factors.items():
        np.testing.assert_allclose(dict(found)[text], PAIRED[:, 0, 0] / factor, rtol=1e-12)
    two = [a for t, a in given("mla.q_rope", x) if t.startswith(half) and t.endswith(own)]
    np.testing.assert_allclose(swap_pairs(two[1].astype(float), to_interleaved=True), x / SCALE_OF, rtol=1e-12)
    found = given("mla.q", np.ones((5, 3, 2, 4)))
    assert [t for t, _ in found] == list(SHARES_OF["q"])
    np.testing.assert_allclose([a[0, 0, 0, 0] for _, a in found], [1 / f for f in SHARES_OF["q"].values()], rtol=1e-12)
    assert given("ffn_norm", PAIRED[0, 0]) == []


def test_arrangements_of_weights_scores_and_scales():
    """Catches scores before their mask taken for any wrong mask, weights whose order is free judged by it, scales not turned."""
    w, ours = np.array([[[1.0, 2.0, 4.0]]]), np.array([[[4.0, 1.0, 2.0]]])
    (order, a), (factor, b), (two, d) = given("router.weights", w, ours)[:3]
    assert two == f"{order} + {factor}" and np.array_equal(d, ours * TINY.routed_scaling_factor)
    assert "another order than the ids" in order and np.array_equal(a, ours)
    assert "applied after the experts" in factor and np.array_equal(b, w * TINY.routed_scaling_factor)
    scores, seen = np.arange(6.0).reshape(1, 1, 2, 3), np.array([[[[True, False, False], [True, True, False]]]])
    exact = np.where(seen, scores, -np.inf)
    found, before = by_value("mla.scores", scores, exact), "scores are those before the mask"
    base2, unscaled = "to base 2", "scores are those before the softmax scale"
    kinds = [tuple(what in t for what in (before, base2, unscaled)) for t, _ in found]
    assert kinds == [(True, False, False), *[(mask, two, not two) for mask in (False, True) for two in (True, False)]]
    two, one = math.log(2), TINY.softmax_scale
    for (_, a), ours in zip(found, (exact, scores * two, scores * one, exact * two, exact * one), strict=True):
        np.testing.assert_allclose(a, ours, rtol=1e-12)
    some = np.where(np.arange(3) == 2, -np.inf, scores)  # of some keys: a wrong mask
    for x, e in ((exact, exact), (scores, scores), (some, exact)):
        assert before not in " ".join(t for t, _ in by_value("mla.scores", x, e))
    s = np.arange(6.0).reshape(1, 2, 3)
    ((text, a),) = by_value(SCALE, s)
    assert "group-major" in text
    np.testing.assert_array_equal(a, s.reshape(3, 2).T.reshape(1, 2, 3))


def test_an_order_of_channels_holds_for_queries_and_keys():
    """Catches q in the other order and k not called a gauge."""
    other = "rotated channels in the other order"
    q, k = "fwd/L1/mla.q_rope", "fwd/L1/mla.k_rope"
    both = (other, "the softmax scale is multiplied into q")
    assert broken({q: both, k: (other,)}, [q, k]) == set() == broken({}, [q, k]) == broken({q: both}, [q])
    assert broken({q: both}, [q, k]) == {q} and broken({k: (other,)}, [q, k]) == {k}


def test_shares_of_queries_and_keys_make_one_factor():
    """Catches a scale, or log2 e, in both of q and k excused, and a root in one alone; products counted by hand in powers."""
    q, k, n = "fwd/L1/mla.q_rope", "fwd/L1/mla.k_rope", len(SHARES_OF["q"])
    powers = [(0, 0), (1, 0), (0.5, 0), (1, 1), (0.5, 0.5)]  # of nothing, then of the shares in their order
    for i, j in itertools.product(range(n + 1), repeat=2):
        some = {t: (list(SHARES_OF[s])[m - 1],) for t, s, m in ((q, "q", i), (k, "k", j)) if m}
        fits = all(a + b in (0, 1) for a, b in zip(powers[i], powers[j], strict=True))
        assert broken(some, [q, k]) == (set() if fits else set(some)), some


# ---- Holes


def test_where_a_number_is_missing():
    """Catches a masked key called a hole, a weight searched for holes, a hole in one of several arguments overlooked."""
    hole, masked, fine = np.array([1.0, np.nan]), np.array([1.0, -np.inf]), np.array([1.0, 2.0])
    assert torn("L1/resid", hole) and torn("L1/resid", masked) and not torn("L1/resid", fine)
    assert torn("L1/mla.scores", hole) and not torn("L1/mla.scores", masked) and not torn("mask", masked)
    assert torn("mask", np.array([np.inf, 0.0])) and not torn("w/model.norm.weight", hole)
    assert not torn(None, hole) and not torn("L1/router.ids", np.array([1, 2]))
    assert torn(("L1/resid", ("w/a", "L1/ffn_out")), (fine, (hole, hole)))
    assert not torn(("L1/resid", ("w/a", "L1/ffn_out")), (fine, (hole, fine)))


def test_what_depends_on_a_hole_is_unknown():
    """Catches a row that a hole does not reach called unknown, one that it reaches compared."""
    x = np.array([[1.0, np.nan], [3.0, 4.0]])
    found = mended(lambda args: args[0].sum(axis=-1), ("resid",), (x,))
    np.testing.assert_array_equal(found, [np.nan, 7.0])
    found = mended(lambda args: args[0] * 0 + 1, ("resid",), (x,))
    np.testing.assert_array_equal(found, np.ones((2, 2)))
    np.testing.assert_array_equal(mended(lambda args: np.argsort(args[0]), ("resid",), (x * 0,)).shape, (2, 2))


def test_what_floating_point_makes_nothing_of_is_excused():
    """Catches a NaN of the candidate's own excused, or one that every program has blamed."""
    e, nan = np.array([1.0, 2.0, 3.0, -np.inf, 5.0]), np.nan
    naive, x = np.array([nan, nan, 3.0, -np.inf, np.inf]), np.array([nan, 2.0, nan, -np.inf, np.inf])
    np.testing.assert_array_equal(excused(x, e, naive), [nan, 2.0, 3.0, -np.inf, nan])
    assert excused(x, e, None) is e


# ---- Shapes


def test_lengths_of_axes():
    """Catches a letter with another's number, a sum taken for a product, a ragged part that is not counted."""
    n = {"S": 7, "H": 4, "Dn": 12, "Dr": 8, "k": 2}
    for axis, size in {
        "S": 7,
        "2H": 8,
        "Dn+Dr": 20,
        "S-k": 5,
        "H*Dn": 48,
        "Dr/2": 4,
        "Dn/8": 2,
        "2": 2,
        "S-1": 6,
    }.items():
        assert size_of(axis, n) == size, axis


def test_letters_of_a_run_in_parts():
    """Catches keys counted without those before, the kept groups taken for dispatched rows, a width of another feed-forward."""
    sizes = Sizes(2, [Part("fwd", 0, 6), Part("decode", 6, 7)])
    of = {tap: letters(TINY, STAGES[s], tap, sizes) for tap, s in TAPS.items()}
    assert [of[t]["S"] for t in TAPS] == [6, 1, 6, 6, 5, 6, 6]
    assert [of[t]["T"] for t in TAPS] == [6, 7, 6, 6, 5, 6, 6]
    assert (
        of["fwd/L1/router.groups"]["M"] == TINY.topk_group
        and of["decode/L1/moe.down"]["M"] == 2 * TINY.num_experts_per_tok
    )
    shared = TINY.moe_intermediate_size * TINY.n_shared_experts
    assert (of["fwd/L0/mlp.gate"]["F"], of["fwd/L1/shared.gate"]["F"]) == (TINY.intermediate_size, shared)
    assert of["decode/L1/moe.down"]["F"] == TINY.moe_intermediate_size and of["fwd/mtp1/resid"]["k"] == 1


TAPS = {
    "fwd/L1/router.groups": "router.groups",
    "decode/L1/moe.down": "moe.down",
    "fwd/L0/mlp.gate": "mlp.gate",
    "fwd/L1/shared.gate": "shared.gate",
    "fwd/mtp1/resid": "resid",
    "grad/L1/resid": "resid",
    "fwd/resid": "resid",
}


def test_axes_of_an_argument_are_its_readers():
    """Catches axes of another argument, of the last one for all, of an array of another rank."""
    call = Call("mla.q", "fwd/L1/mla.q", ("x", "w/q"), {"n_heads": 4})
    assert axes_at("x", call, 3) == axes_of(STAGES["mla.q"].fn)[0]["x"]
    assert axes_at("w/q", call, 2) == (("H", "Dn+Dr"), ("Q",))
    assert axes_at("fwd/L1/mla.q", call, 4) == (("B",), ("S",), ("H",), ("Dn+Dr",))
    assert axes_at("x", call, 2) == (("x[0]",), ("x[1]",)) and axes_at("y", call, 1, "z") == (("z[0]",),)
    many = Call("moe.gate", "fwd/L1/moe.gate", ("rows", "ids", "w/0", "w/1"), {})
    assert axes_at("w/1", many, 2) == (("F",), ("D",)) == axes_at("w/0", many, 2)


def test_arrays_that_are_no_input():
    """Catches ids that name nothing let through, whole numbers taken for floating-point ones."""
    assert (
        unusable(np.array([0, 15]), integers=True, limit=16) == "" == unusable(np.zeros(2), integers=False, limit=None)
    )
    assert "ids from 0 to 16" in unusable(np.array([0, 16]), integers=True, limit=16)
    assert "ids from -1 to 3" in unusable(np.array([3, -1]), integers=True, limit=16)
    assert "expected integers" in unusable(np.zeros(2), integers=True, limit=None)
    assert "floating" in unusable(np.zeros(2, int), integers=False, limit=None)
    assert (
        unusable(np.zeros(2, bool), integers=True, limit=None)
        and unusable(np.zeros(0, int), integers=True, limit=4) == ""
    )


def test_a_part_of_a_twin_beside_another_that_sees_fewer_keys():
    """Catches keys that only one of two blocks holds cut off, or a block of other queries: probabilities so small that they are 0
    in one twin are 0 behind its last key.
    """
    place = Place((2, 3, 4, 5), 1, 2, 4)
    whole = np.random.default_rng(0).random((2, 3, 4, 5))
    for mine, theirs in ((5, 3), (3, 5), (4, 4)):
        a, b = (whole[place.index] * (np.arange(5) < n) for n in (mine, theirs))
        other = Wide(place.shape, whole.dtype, 0.0, lambda at, b=b, n=theirs: b[..., :n])
        x, y = Glimpse(place, a[..., :mine]).of(other)
        n = max(mine, theirs)
        np.testing.assert_array_equal(x, a[..., :n])
        np.testing.assert_array_equal(y, b[..., :n])
    x, y = Glimpse(place, whole[place.index]).of(whole)
    np.testing.assert_array_equal(x, y)
