"""Factors that are constant in blocks of an axis, of what a product reads, of its weight: the period and the factors are told."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS, STAGES
from refimpl.layers.stage import Patch
from refimpl.record import new_case, trace_case

from .test_diff_fits import ENGINE, judged, titles, weight
from .test_diff_partial import case

FN = {name: stage.fn for name, stage in STAGES.items()}
FACTORS = (0.25, 0.5, 0.7, 1, 1.3, 1.7, 2)
AXES = {
    ("attn_norm", -1): ("channels", 48, 2),
    ("mla.q_a", -1): ("channels", 24, 2),
    ("mla.kv_a", -1): ("channels", 28, 2),
    ("mla.ctx", -1): ("channels", 10, 2),
    ("mla.ctx", 2): ("heads", 4, 1),
    ("mla.q", 2): ("heads", 4, 1),
    ("attn_out", 1): ("tokens", 24, 2),
    ("router.logits", -1): ("experts", 16, 2),
    ("mlp.up", -1): ("channels", 80, 2),
    ("logits", -1): ("channels", 128, 2),
}
"""(stage, axis) -> what its entries are called, how many there are, the shortest period that is said."""


def times(name, each, axis):
    """A stage whose output is multiplied entry by entry of an axis."""

    def fn(*a, **k):
        y = FN[name](*a, **k)
        return np.moveaxis(np.moveaxis(y, axis, -1) * np.asarray(each, y.dtype), -1, axis)

    return Patch(name, fn)


def entries(n, period, factors):
    """The factor of every entry, one after the other."""
    return [factors[i // period] for i in range(n)]


@st.composite
def stairs(draw):
    """(stage, axis), a period, a factor a block: neighbours differ, and more than one is not 1."""
    at = draw(st.sampled_from(sorted(AXES)))
    _, n, least = AXES[at]
    period = draw(st.integers(least, n - 1))
    blocks = -(-n // period)
    f = [draw(st.sampled_from(FACTORS)) for _ in range(blocks)]
    for i in range(1, blocks):
        f[i] = f[i] if f[i] != f[i - 1] else FACTORS[(FACTORS.index(f[i]) + 1) % len(FACTORS)]
    if sum(v != 1 for v in f) < 2:
        f = [(0.5, 2)[i % 2] for i in range(blocks)]
    return at, period, f


def told(found):
    """The one thing that is said of all that is blamed."""
    (said,) = titles(found)
    return said


def check(drawn, precision):
    (name, axis), period, f = drawn
    what, n, _ = AXES[name, axis]
    more = f" and {len(f) - 8} more" if len(f) > 8 else ""
    blocks = f" in blocks of {period}" if period > 1 else ""
    numbers = ", ".join(f"{v:g}" for v in f[:8])
    expected = f"{name}: {what}{blocks} are multiplied by factors of their own: {numbers}{more}"
    taps = [f"*/{t}" for t in (name, *ENGINE, "mla.q_a", "mla.kv_a", "mlp.gate", "mlp.act", "mla.kv_b", "mla.probs")]
    assert told(judged(times(name, entries(n, period, f), axis), precision, taps)) == expected


@settings(max_examples=3, deadline=None)
@given(stairs())
@example((("logits", -1), 32, [1.7, 0.5, 1.3, 0.7]))
@example((("mla.kv_a", -1), 16, [1.7, 0.5]))
def test_the_period_and_its_factors_are_told(drawn):
    """Catches a period that is half or twice as long, a ragged last block that goes unseen, factors of the wrong block."""
    check(drawn, "float32")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(stairs(), st.sampled_from(["float32", "bf16"]))
def test_the_period_and_its_factors_are_told_often(drawn, precision):
    """Catches what a few draws do not, and factors that only float32 tells."""
    check(drawn, precision)


def test_blocks_that_run_across_heads():
    """Catches blocks of rows that are looked for within a head only: 128 rows are two thirds of one of V3's."""
    factors = np.repeat([1.7, 0.5, 1.3, 0.7, 2], 16)
    patch = Patch("mla.q", lambda *a, **k: (FN["mla.q"](*a, **k) * factors.reshape(4, 20)).astype(np.float32))
    assert told(judged(patch)) == (
        "mla.q: channels of all heads in blocks of 16 are multiplied by factors of their own: 1.7, 0.5, 1.3, 0.7, 2"
    )


def test_experts_with_factors_of_their_own():
    """Catches rows taken for tokens: dispatched rows lie by expert, of which each has as many as chose it."""
    patch = Patch(
        "moe.gate", lambda x, ids, *ws: FN["moe.gate"](x, ids, *[w * np.float32(1 + i / 4) for i, w in enumerate(ws)])
    )
    assert told(judged(patch)).startswith("moe.gate: experts are multiplied by factors of their own: 1, 1.2")


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_of_a_part_of_a_tap_the_period_is_told(precision):
    """Catches blocks counted from the first head that was recorded; what was not recorded has no factor that one can tell."""
    trace = trace_case(case(), precision=precision, patches=[times("mla.q", [1.7, 0.5, 1.3, 0.7], 2)])
    some = [1, 3]
    heads = {t: np.asarray(a)[:, :, some] for t, a in trace.taps.items() if t == "fwd/L0/mla.q"}
    kept = {t: trace.taps[t] for t in ("fwd/L0/attn_norm", "fwd/L0/mla.q_a_norm")}
    header = dataclasses.replace(trace.header, expected=[], dims={}, slices={"heads": some})
    found = judge(case(), Trace(header, kept | heads))
    assert {f.tap for f in found.culprits} == set(heads), render(found)
    (said,) = {d.said for d in found.causes}
    assert said == "mla.q: heads are multiplied by factors of their own: ?, 0.5, ?, 0.7"


def test_one_head_is_no_period():
    """Catches a period told of a single block: one number and its place say no more."""
    assert told(judged(times("mla.ctx", [1, 0.5, 1, 1], 2))) == "mla.ctx: head 1 is 0.5 times what it should be"
    assert told(judged(times("attn_norm", [1] * 20 + [0.5] * 9 + [1] * 19, -1))) == (
        "attn_norm: channels 20-28 are 0.5 times what they should be"
    )


def noisy_head(y):
    y = np.array(y)
    y[:, :, 2] *= 1 + 0.2 * np.random.default_rng(1).normal(size=y[:, :, 2].shape)
    return y


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mla.q", noisy_head),
        pytest.param("mla.q", lambda y: y[:, :, [2, 0, 3, 1]], marks=pytest.mark.slow),
        ("attn_norm", lambda y: y * (1 + 0.01 * np.arange(48))),
        pytest.param("attn_norm", lambda y: y * np.random.default_rng(2).uniform(0.5, 2, 48), marks=pytest.mark.slow),
        pytest.param(
            "mla.q_a", lambda y: y * (1 + 0.2 * np.random.default_rng(3).normal(size=y.shape)), marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_has_no_period_gets_none(name, change, precision):
    """Catches a staircase seen in noise, in a slope that bfloat16 cannot tell from short steps, in a factor of every channel."""
    patch = Patch(name, lambda *a, **k: change(FN[name](*a, **k)).astype(np.float32))
    assert "blocks of" not in str([d.said for d in judged(patch, precision)[1]])


PARTS = {
    "heads": (
        weight("attn_out", lambda w: w * np.repeat([1.5, 0.5, 2, 0.25], 10).astype(w.dtype)),
        "of what attn_out reads, heads are multiplied by factors of their own: 1.5, 0.5, 2, 0.25",
    ),
    "channels": (
        weight("mla.kv_a", lambda w: w * np.repeat([1.5, 0.5, 2], 16).astype(w.dtype)),
        "of what mla.kv_a reads, channels in blocks of 16 are multiplied by factors of their own: 1.5, 0.5, 2",
    ),
    "blocks": (
        weight("mla.q_a", lambda w: w * np.kron([[1.5, 0.5, 2], [0.3, 1, 1.3]], np.ones((12, 16))).astype(w.dtype)),
        "mla.q_a's weight has blocks of 12 x 16 with factors of their own: 1.5, 0.5, 2, 0.3, 1, 1.3",
    ),
    "square blocks": (
        weight("logits", lambda w: w * np.kron(np.arange(1, 25).reshape(8, 3) / 8, np.ones((16, 16))).astype(w.dtype)),
        "logits's weight has blocks of 16 x 16 with factors of their own: 0.125, 0.25, 0.375, * and 16 more",
    ),
}


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["heads", *[pytest.param(n, marks=pytest.mark.slow) for n in PARTS if n != "heads"]])
def test_blocks_of_a_product_are_told(name, precision):
    """Catches factors of what is summed over, which no entry of the output shows, and a period of one side said of both."""
    patch, expected = PARTS[name]
    first, _, last = expected.partition("*")
    said = told(judged(patch, precision))
    assert said.startswith(first) and said.endswith(last)


def test_one_block_of_a_product_is_no_period():
    """Catches blocks of 16 told of a weight of which some neighbouring columns are off: where others would begin, nothing says."""
    patch = weight("mla.kv_a", lambda w: w * np.repeat([1, 0.5, 1], 16).astype(w.dtype))
    assert judged(patch)[1] == []


def naive_scales(w):
    """max abs w / 448 of every 128 x 128 block: {(i, j): scale}."""
    rows, columns = (range(0, n, 128) for n in w.shape)
    return {
        (i // 128, j // 128): float(np.abs(w[i : i + 128, j : j + 128]).max()) / 448
        for i, j in itertools.product(rows, columns)
    }


def rescaled(w, other, block=128):
    """Every entry by the scale that is read for its block instead of its own."""
    s, out = naive_scales(w), np.array(w, np.float64)
    shape = tuple(n + 1 for n in max(s))
    for i, j in itertools.product(range(0, w.shape[0], block), range(0, w.shape[1], block)):
        here = (i // 128, j // 128)
        out[i : i + block, j : j + block] *= other(s, i // block, j // block, shape) / s[here]
    return out.astype(w.dtype)


READ = {
    "not applied": (lambda s, i, j, n: 1.0, 128),
    "applied twice": (lambda s, i, j, n: s[i, j] ** 2, 128),
    "those of the blocks below": (lambda s, i, j, n: s[(i + 1) % n[0], j], 128),
    "those of the blocks to the right": (lambda s, i, j, n: s[i, (j + 1) % n[1]], 128),
    "read transposed": (lambda s, i, j, n: [s[a, b] for b in range(n[1]) for a in range(n[0])][i * n[1] + j], 128),
    "read as those of blocks of 64": (lambda s, i, j, n: s[i % n[0], j % n[1]], 64),
    "those of the first block of their rows": (lambda s, i, j, n: s[i, 0], 128),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model with a weight of 3 x 2 blocks, both sides ragged."""
    config = PRESETS["tiny"].replace(hidden_size=160, intermediate_size=272, num_hidden_layers=2)
    return Case.read(new_case(tmp_path_factory.mktemp("wide") / "case", config, length=8, batch=1))


@pytest.mark.parametrize(
    "said", ["not applied", *[pytest.param(n, marks=pytest.mark.slow) for n in READ if n[0] != "n"]]
)
def test_other_blocks_scales_are_told(said, wide):
    """Catches scales of a weight that are left out or another block's: no factor has to be fitted, so few tokens are enough."""
    other, block = READ[said]
    patch = weight("mlp.gate", lambda w: rescaled(w, other, block))
    found = judge(wide, trace_case(wide, patches=[patch]))
    assert told((found, found.causes)) == f"mlp.gate's weight: the scales of its 128 x 128 blocks are {said}"
