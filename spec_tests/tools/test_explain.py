"""`refimpl explain`: one number down to its terms, by the stage's own gradient; regions cut to what a number needs."""

import dataclasses
import functools

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.diff import Trace
from refimpl.diff.axes import axes_of, fitted
from refimpl.diff.examined import examine, examined, index_of
from refimpl.diff.explanation import explain_number
from refimpl.diff.judge import judge
from refimpl.diff.part import Part, smallest
from refimpl.diff.terms import moved_by, slopes_of, terms_of
from refimpl.layers import STAGES
from refimpl.layers.stage import Call, Patch, Stage
from refimpl.record import trace_case

from .test_diff_partial import TINY, case, only, recording

NOT_LINEAR = {"mla.probs", "router.scores", "router.weights", "mla.rope_tables", "mask"}
"""Stages of the forward run that are of degree one in no group of their inputs: softmax, sigmoid, quotient, cosine, comparison."""


@functools.cache
def clean(attend="expanded"):
    return judge(case(), trace_case(case(), precision="float64", attend=attend))


def at(tap, *index, judgement=None):
    """The tap, and its smallest part at an index (default: somewhere in the middle, where keys are seen and masked)."""
    x = examined(judgement or clean(), tap)
    index = index or tuple(n // 2 for n in x.step.exact.shape)
    return x, index, smallest(x.part(index))


def taps_of(judgement):
    return [f.tap for f in judgement.findings if f.stage not in ("router.ids", "router.groups")]


# ---- The terms, against naive loops


def w(name):
    return np.asarray(case().checkpoint[name], np.float64)


def values(tap):
    return np.asarray(clean().grounds.recorded.taps[tap], np.float64)


def loop_linear(i, x, weight):
    b, s, f = i
    return {(b, s, d): x[b, s, d] * weight[f, d] for d in range(x.shape[-1])}


def loop_q(i, x, weight):
    b, s, h, d = i
    width = len(weight) // 4
    return {(b, s, c): x[b, s, c] * weight[h * width + d, c] for c in range(x.shape[-1])}


def loop_out(i, x, weight):
    b, s, d = i
    heads, dim = x.shape[2:]
    return {(b, s, h, v): x[b, s, h, v] * weight[d, h * dim + v] for h in range(heads) for v in range(dim)}


def loop_context(i, p, kv):
    b, s, h, d = i
    first = kv.shape[-1] - 10  # v_head_dim
    return {(b, h, s, t): p[b, h, s, t] * kv[b, t, h, first + d] for t in range(p.shape[-1]) if p[b, h, s, t]}


LOOPS = {
    "L1/mla.kv_a": (loop_linear, "attn_norm", "self_attn.kv_a_proj_with_mqa.weight"),
    "L1/shared.up": (loop_linear, "ffn_norm", "mlp.shared_experts.up_proj.weight"),
    "L1/router.logits": (loop_linear, "ffn_norm", "mlp.gate.weight"),
    "L1/mla.q": (loop_q, "mla.q_a_norm", "self_attn.q_b_proj.weight"),
    "L1/attn_out": (loop_out, "mla.ctx", "self_attn.o_proj.weight"),
    "L1/mla.ctx": (loop_context, "mla.probs", "mla.kv_b"),
}


@pytest.mark.parametrize("tap", LOOPS)
def test_terms_of_a_product_are_those_of_a_loop(tap):
    """Catches a term under another input's name, one that is lost, and one of a token or head that did not enter."""
    loop, first, second = LOOPS[tap]
    x, index, part = at(tap)
    other = w(f"model.layers.1.{second}") if second.endswith("weight") else values(f"fwd/L1/{second}")
    expected = loop(index, values(f"fwd/L1/{first}"), other)
    terms = terms_of(part)
    found = {t.index: t.product for t in terms.largest}
    assert terms.exact == (f"fwd/L1/{first}",) and found.keys() == expected.keys()
    size = sum(map(abs, expected.values()))
    assert max(abs(found[k] - expected[k]) for k in expected) <= 1e-14 * size  # float64, the same products
    assert abs(sum(found.values()) - float(x.step.exact[index])) <= 1e-14 * size
    assert all(t.partner is not None and abs(t.partner[2] - 1) < 1e-9 for t in terms.largest)


def test_terms_of_scores_are_those_of_a_loop():
    """Catches the scale that is lost, the two halves of the keys exchanged, and a mask that is left out of the sum."""
    b, h, s, t = index = (1, 2, 9, 4)
    _, _, part = at("L1/mla.scores", *index)
    q, qr, kv, kr = (values(f"fwd/L1/{n}") for n in ("mla.q", "mla.q_rope", "mla.kv_b", "mla.k_rope"))
    scale, nope = case().config.softmax_scale, case().config.qk_nope_head_dim
    expected = {("fwd/L1/mla.q", (b, s, h, d)): q[b, s, h, d] * kv[b, t, h, d] * scale for d in range(nope)}
    expected |= {("fwd/L1/mla.q_rope", (b, s, h, d)): qr[b, s, h, d] * kr[b, t, d] * scale for d in range(qr.shape[-1])}
    expected["fwd/mask", (b, 0, s, t)] = 0.0
    terms = terms_of(part)
    found = {(x.name, x.index): x.product for x in terms.largest}
    assert found == pytest.approx(expected, rel=1e-13)
    assert sum(expected.values()) == pytest.approx(terms.y, rel=1e-12)
    assert {round(x.partner[2], 12) for x in terms.largest if x.partner} == {round(scale, 12)}


def test_terms_of_routed_experts_are_those_of_a_loop():
    """Catches the row of another token, or another expert's weight, in the sum over experts."""
    b, s, d = index = (0, 7, 17)
    ids = clean().grounds.recorded.taps["fwd/L1/router.ids"]
    g, down = values("fwd/L1/router.weights"), values("fwd/L1/moe.down")
    sent = sorted((int(e), bb * 24 + ss, kk, bb, ss) for (bb, ss, kk), e in np.ndenumerate(ids))
    expected = {(m, d): down[m, d] * g[b, s, k] for m, (_, _, k, bb, ss) in enumerate(sent) if (bb, ss) == (b, s)}
    terms = terms_of(at("L1/moe.routed", *index)[2])
    assert {t.index: t.product for t in terms.largest} == pytest.approx(expected, rel=1e-13)
    m = next(m for m, row in enumerate(sent) if row[3:] == (1, 5))
    (expert, *_), part = sent[m], at("L1/moe.gate", m, 3)[2]
    weight, row = w(f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"), values("fwd/L1/moe.rows")[m]
    terms = terms_of(part)
    assert {t.index[1]: t.product for t in terms.largest} == pytest.approx(dict(enumerate(row * weight[3])), rel=1e-13)
    assert terms.largest[0].partner[0] == f"w/model.layers.1.mlp.experts.{expert}.gate_proj.weight"


ROOTS = {n: (lambda *x, n=n: np.prod(x, axis=0) ** (1 / n), n) for n in (2, 3, 4, 5, 9)}
SUMS = {
    n: (lambda *x, n=n: sum(x[:-1]) - (n - 3) * x[-1], n) for n in (8, 9)
}  # all are 1: what the first two add, and 0
GROUPS = [  # a function, of how many, which of them its number is of degree one in
    (lambda a, b: a * b, 2, "a"),
    (lambda a, b, c: a * b + c, 3, "ac"),
    (lambda a, b, c: a + 0 * b + (c - 1) * a, 3, "a"),
    (lambda a: np.exp(a), 1, ""),
    (*ROOTS[2], "ab"),
    (*ROOTS[3], "abc"),
    (*ROOTS[4], "abcd"),
    (*ROOTS[5], ""),
    (*ROOTS[9], "abcdefghi"),
    (*SUMS[8], "ab"),
    (*SUMS[9], "abcdefghi"),
    (lambda *x: x[0] * np.prod(x[1:], axis=0) ** 2, 9, "a"),
    (lambda *x: x[0] * x[1] ** 0.5 + 0 * sum(x), 9, "a"),
]


@pytest.mark.parametrize("which", range(len(GROUPS)))
def test_the_smallest_group_that_sums_to_the_number_is_found(which):
    """Catches a larger group taken, none of four, one of five that is claimed, of many arguments two that sum by accident."""
    fn, n, expected = GROUPS[which]
    leaves = {name: np.ones(1) for name in "abcdefghi"[:n]}
    call = Call("made", "made", tuple(leaves), {}, Stage("made", fn, "", "", "value", "I", "made"))
    part = Part((call,), leaves, (0,), {}, {name: (np.arange(1),) for name in (*leaves, "made")})
    assert terms_of(part).exact == tuple(expected)


@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
def test_terms_sum_to_the_number_wherever_that_is_claimed(attend):
    """Catches 'exact' said of a stage that is not, and a linear stage of which it is not said. Float64: 1e-12 of the terms."""
    judgement, inexact = clean(attend), set()
    for tap in taps_of(judgement):
        x, index, part = at(tap, judgement=judgement)
        terms = terms_of(part)
        if not terms.exact and np.isfinite(terms.y):
            inexact.add(x.stage.name)
        products = [t.product for t in terms.largest]
        assert not products or abs(sum(products) - float(x.step.exact[index])) <= 1e-12 * sum(map(abs, products)), tap
    assert inexact <= NOT_LINEAR


@pytest.mark.parametrize("tap", ["L1/mla.probs", "L1/ffn_norm", "L1/router.weights", "L1/router.scores", "L1/moe.act"])
def test_slopes_are_the_derivatives_of_the_whole_stage(tap):
    """Catches a cut that changes a derivative, a transposed gradient. Central differences of the uncut stage: h^2 = 1e-10."""
    x, index, part = at(tap)
    whole, slopes = x.part(index), slopes_of(part)
    for name, slope in slopes.items():
        for i in np.argwhere(slope != 0)[:3]:
            there, h = part.origin(name, tuple(i)), 1e-5
            moved = []
            for sign in (1, -1):
                a = whole.leaves[name].copy()
                a[there] += sign * h
                moved.append(float(whole.result(whole.leaves | {name: a})[index]))
            assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(slope[tuple(i)], rel=1e-6, abs=1e-8), (name, there)


def test_first_order_is_said_of_what_is_not_linear():
    """Catches a norm whose input is silent because its weight alone makes the number, and a partner listed twice."""
    terms = terms_of(at("L1/ffn_norm")[2])
    assert terms.exact == ("w/model.layers.1.post_attention_layernorm.weight",)
    assert terms.first_order == ("fwd/L1/resid_mid",) and len(terms.by_name["fwd/L1/resid_mid"]) == 48
    assert terms_of(at("L1/shared.up")[2]).first_order == ()


def test_a_choice_without_gradient_is_taken_apart_by_trying():
    """Catches router stages, which leave the tape, reported as depending on nothing."""
    terms = terms_of(at("L1/router.group_scores", 0, 11, 2)[2])
    group = values("fwd/L1/router.choice")[0, 11, 8:12]
    best = {(0, 11, 8 + int(i)): float(group[i]) for i in np.argsort(group)[-2:]}
    assert {t.index: t.value for t in terms.largest} == best
    assert [t.slope for t in terms.largest] == pytest.approx([1.0, 1.0], rel=1e-9)
    assert list(moved_by(at("mla.rope_tables", 1, 0, 21, 1)[2])) == [("positions", (0, 21), 21)]


# ---- Cutting


def test_every_part_is_cut_to_its_token_and_gives_the_same_number():
    """Catches a cut that changes the number, and tokens that are carried along: nothing of a tokenwise stage holds two."""
    for tap in taps_of(clean()):
        x, index, part = at(tap)
        assert part.result()[part.at] == pytest.approx(float(x.step.exact[index]), rel=1e-9, nan_ok=True), tap
        assert part.origin(part.tap, part.at) == index
        assert part.result().shape == part.shape == part.of_result(x.step.exact).shape, tap
        if x.stage.name not in ("mask", "mla.probs", "mla.ctx"):
            heads = [("H",)] if ("H",) in part.axes[part.tap] else []
            for name, axes in part.axes.items():
                sizes = dict(zip(axes, map(len, part.spans[name]), strict=True))
                assert all(sizes.get(a, 1) == 1 for a in [("B",), ("S",), ("T",), *heads]), (tap, name)


def test_attention_keeps_the_keys_that_are_seen():
    """Catches a softmax cut to one key, or carried along with those that are masked."""
    _, _, part = at("L1/mla.probs", 0, 1, 5, 5)
    assert part.leaves["fwd/L1/mla.scores"].shape == (1, 1, 1, 6)
    _, _, part = at("L1/mla.ctx", 0, 5, 1, 7)
    assert part.leaves["fwd/L1/mla.kv_b"].shape == (1, 6, 1, 22)
    _, _, part = at("mask", 1, 0, 12, 5)  # 0 as any other that is seen, but of this place
    assert part.leaves["positions"].shape == (1, 13) and part.origin(part.tap, part.at) == (1, 0, 12, 5)


def test_experts_that_nobody_chose_fall_away():
    """Catches matrices of all experts written out for one row, and ids that then name another expert."""
    _, _, part = at("L1/moe.down")
    assert len([n for n in part.leaves if ".experts." in n]) == 1 and part.leaves["fwd/L1/router.ids"].tolist() == [
        [[0]]
    ]
    _, _, part = at("embed", 1, 3, 7)
    assert part.leaves["w/model.embed_tokens.weight"].shape[0] == 1


def test_a_region_is_cut_as_a_whole():
    """Catches a number of a coarse trace that cannot be explained, or keeps the tokens after it."""
    few = only(recording("hf-bug"), lambda t: t.endswith(("resid", "logits")))
    x = examine(case(), few, "L1/resid")
    part = smallest(x.part((0, 5, 3)))
    assert part.leaves["fwd/L0/resid"].shape[:2] == (1, 6) and len(part.calls) > 20
    text = "\n".join(explain_number(x, (0, 5, 3)))
    assert f"{len(part.calls)} stages that were not recorded apart" in text and "first order" in text


def test_axes_are_read_from_docstrings():
    """Catches factors of an axis taken for one, and dots that swallow an axis."""
    inputs, result = axes_of(STAGES["mla.q"].fn)
    assert inputs["w"] == (("H", "Dn+Dr"), ("Q",)) and result == (("B",), ("S",), ("H",), ("Dn+Dr",))
    assert axes_of(STAGES["mtp.proj"].fn)[0]["x"][-1] == ("2", "D")
    assert axes_of(STAGES["moe.gate"].fn)[0]["ws"] == (("F",), ("D",))
    assert fitted((("...",), ("F",)), 3) == (("...0",), ("...1",), ("F",)) and fitted((("F",),), 2) is None


# ---- In words


def test_a_missing_term_is_named():
    """Catches a reader left to find out that the shared experts are what is missing."""
    bad = trace_case(case(), patches=[Patch("moe.out", lambda routed, shared: routed * 1)])
    text = "\n".join(explain_number(examine(case(), bad, "L2/ffn_out")))
    assert "the candidate's number is the sum without the term of fwd/L2/moe.shared" in text
    doubled = trace_case(case(), patches=[Patch("moe.out", lambda routed, shared: routed + 2 * shared)])
    assert "with twice the term of fwd/L2/moe.shared" in "\n".join(
        explain_number(examine(case(), doubled, "L2/ffn_out"))
    )
    clean_text = "\n".join(explain_number(examine(case(), recording("hf-float32"), "L2/ffn_out")))
    assert "hint" not in clean_text and "within" in clean_text


def test_the_number_that_is_furthest_off_is_the_default():
    """Catches an explanation of the first number, or of the largest, instead of the wrong one."""
    taps = dict(recording("hf-float32").taps)
    taps["fwd/L1/moe.shared"] = np.array(taps["fwd/L1/moe.shared"])
    taps["fwd/L1/moe.shared"][1, 3, 5] += 0.5
    lines = explain_number(examine(case(), Trace(recording("hf-float32").header, taps), "L1/moe.shared"))
    assert lines[0].startswith("fwd/L1/moe.shared[1, 3, 5]: ")
    assert any("difference +5.000e-01" in line for line in lines) and any("beyond" in line for line in lines)


def test_a_choice_is_explained_by_its_scores():
    """Catches the wrong margin, and experts of dropped groups shown as if they could have been chosen."""
    x = examine(case(), recording("hf-float32"), "L1/router.ids")
    lines = explain_number(x, (0, 0, 0))
    choice, kept = (np.asarray(x.grounds.recorded.taps[f"fwd/L1/router.{n}"])[0, 0] for n in ("choice", "groups"))
    eligible = [e for e in range(16) if e // 4 in kept]
    falling = sorted(choice[eligible], reverse=True)
    margin = next(line for line in lines if "margin" in line)
    assert float(margin.split()[1]) == pytest.approx(falling[3] - falling[4], rel=1e-3)
    assert sum("not eligible" in line for line in lines) == 16 - len(eligible)
    assert sum("float64  candidate" in line for line in lines) == 4


def test_masked_scores_say_why():
    """Catches NaN terms where a score is masked."""
    x = examine(case(), recording("hf-float32"), "L1/mla.scores")
    text = "\n".join(explain_number(x, (0, 0, 0, 5)))
    assert "because of fwd/mask[0, 0, 0, 5] = -inf" in text and "nan" not in text


@pytest.mark.parametrize(
    ("tap", "index", "says"),
    [
        ("L9/resid", None, "no tap 'L9/resid'"),
        ("L1/resid", "1,2", "3 whole numbers"),
        ("L1/resid", "a,b,c", "3 whole numbers"),
        ("L1/resid", "0,0,99", "outside shape"),
        ("L1/resid", "0,0,-1", "outside shape"),
        ("L1/resid", "-1,-1,-1", "index [-1, -1, -1] lies outside shape"),
    ],
)
def test_what_names_no_number_is_refused(tap, index, says, capsys):
    """Catches a negative index read from the end or taken for an option, and a traceback for a slip of the pen."""
    given = [] if index is None else [index]
    args = ["explain", str(TINY), str(TINY / "hf-float32.safetensors"), tap, *given]
    assert main(args) == 3 and says in capsys.readouterr().err
    assert index_of(None, (2, 3)) is None and index_of("[1, 2]", (2, 3)) == (1, 2)


def test_taps_that_cannot_be_looked_at_are_refused():
    """Catches our own numbers explained in the candidate's name."""
    trace = recording("hf-float32")
    without = only(trace, lambda t: t != "fwd/L1/resid")
    with pytest.raises(SpecError, match="does not hold it"):
        examine(case(), without, "L1/resid")
    bad = Trace(trace.header, dict(trace.taps) | {"fwd/L1/resid": np.zeros((2, 2), np.float32)})
    with pytest.raises(
        SpecError, match=r"expected .*: that is all that is wrong with it, its numbers were not compared"
    ):
        examine(case(), bad, "L1/resid")


def test_a_part_of_a_tap_is_looked_at_where_it_was_recorded():
    """Catches an index that counts recorded tokens only, and rows that nobody recorded called the worst."""
    trace, tokens = recording("hf-bug"), [3, 12, 20]
    header = dataclasses.replace(trace.header, slices={"tokens": tokens}, expected=[])
    taps = {t: np.asarray(a)[:, tokens] if t.endswith("router.weights") else a for t, a in trace.taps.items()}
    x = examine(case(), Trace(header, taps), "L1/router.weights")
    assert x.worst_row()[1] in tokens and x.candidate().shape == (2, 24, 4)
    assert float(x.candidate()[0, 12, 3]) == float(trace.taps["fwd/L1/router.weights"][0, 12, 3])
    assert "not recorded" in "\n".join(explain_number(x, (0, 0, 0)))


def test_doubtful_rows_are_not_the_worst():
    """Catches a token whose experts rounding alone may change shown as the finding."""
    x = examine(case(), recording("hf-bug"), "L1/router.weights")
    b, s = x.worst_row()
    doubt = np.zeros((2, 24), bool)
    doubt[b, s] = True
    other = dataclasses.replace(x, step=dataclasses.replace(x.step, unsettled=doubt))
    assert other.worst_row() != (b, s) and other.errors()[b, s] == 0 < x.errors()[b, s]


def test_command_line(capsys):
    """Catches an explanation that a script cannot have, and an exit code that reads as a verdict."""
    args = ["explain", str(TINY), str(TINY / "hf-bug.safetensors"), "L1/moe.routed", "0,7,17", "--terms", "2"]
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert shown.count(" x  fwd/L1/router.weights") == 2 and "the other 2 terms" in shown
