"""Codes and scales of FP8 products in a trace: recorded as they are multiplied, judged exactly, their known bugs named."""

import dataclasses
import pathlib
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.cli import main
from refimpl.diff import Case, Trace, render
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.fp8_rules import QUOTIENT, Tiles, fits
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.layers.fp8 import EXACT, POWER_OF_TWO, Fp8
from refimpl.layers.numerics.formats import E4M3, decode
from refimpl.layers.numerics.quantisation import DIALECTS, quantize
from refimpl.layers.precision import plan
from refimpl.layers.stage import Patch
from refimpl.record import new_case, trace_case

from .test_diff_partial import drawn, only

f32, f64 = np.float32, np.float64
TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
INPUTS = {
    "mla.q_a": "attn_norm",
    "mla.kv_a": "attn_norm",
    "mla.q": "mla.q_a_norm",
    "mla.kv_b": "mla.c_kv",
    "attn_out": "mla.ctx",
    "mlp.gate": "ffn_norm",
    "mlp.up": "ffn_norm",
    "ffn_out": "mlp.act",
    "shared.gate": "ffn_norm",
    "shared.up": "ffn_norm",
    "moe.shared": "shared.act",
    "moe.gate": "moe.rows",
    "moe.up": "moe.rows",
    "moe.down": "moe.act",
}
"""R 3.3.1: the products that are in FP8, and what each reads."""
POWERS = ("attn_out", "moe.gate", "moe.up")
"""R 3.3.3: whose scales are powers of two."""
WEIGHTS = {"mla.q_a": "self_attn.q_a_proj", "mla.q": "self_attn.q_b_proj", "attn_out": "self_attn.o_proj"}


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """Two tiles and more along every product's sum, the last one ragged."""
    c = PRESETS["tiny"].replace(
        hidden_size=192,
        q_lora_rank=160,
        kv_lora_rank=144,
        intermediate_size=200,
        moe_intermediate_size=136,
        v_head_dim=40,
        num_hidden_layers=2,
    )
    folder = tmp_path_factory.mktemp("fp8") / "case"
    return Case.read(new_case(folder, c, seed=1, batch=1, length=8, margin=0.005))


@pytest.fixture(scope="session")
def traces(case):
    return {p: trace_case(case, precision=p) for p in ("fp8", "fp8_ue8m0")}


def products(trace):
    """(tap of the product, its name, its input as recorded, rows (N, K))"""
    for tap in trace.taps:
        if tap.endswith(".act.q"):
            product = tap.removesuffix(".act.q")
            unit, _, name = product.rpartition("/")
            x = np.asarray(trace.taps[f"{unit}/{INPUTS[name]}"], f32)
            rows = x if INPUTS[name].startswith(("moe.rows", "moe.act")) else x.reshape(x.shape[0] * x.shape[1], -1)
            yield product, name, rows


def naive(rows, powers):
    """Scales and codes by loops over tiles."""
    n, k = rows.shape
    scales, codes = np.zeros((n, -(-k // 128)), f32), np.zeros((n, k), ml_dtypes.float8_e4m3fn)
    for i in range(n):
        for g in range(scales.shape[1]):
            tile = rows[i, g * 128 : (g + 1) * 128]
            s = max(f32(1e-4), max(abs(v) for v in tile)) / f32(448)
            if powers:
                p = f32(2.0**-60)
                while p < s:
                    p *= f32(2)
                s = p
            scales[i, g] = s
            for j, v in enumerate(tile):
                codes[i, g * 128 + j] = f32(v / s).astype(ml_dtypes.float8_e4m3fn)
    return scales, codes


def changed(trace, taps):
    return Trace(dataclasses.replace(trace.header, expected=[]), dict(trace.taps) | taps)


def blamed(case, trace):
    return {f.tap for f in judge(case, trace).culprits}


# ---- What is recorded


@pytest.mark.parametrize("precision", ["fp8", "fp8_ue8m0"])
def test_every_product_has_the_codes_and_scales_that_loops_over_tiles_give(traces, precision):
    """Catches a product without codes or a bf16 one with them, tiles across heads cut per head, a ragged tile scaled with its
    neighbour, powers of two where the recipe has none."""
    trace, seen = traces[precision], set()
    for product, name, rows in products(trace):
        s, q = (np.asarray(trace.taps[f"{product}.act.{what}"]) for what in ("scale", "q"))
        assert s.dtype == f32 and q.dtype == ml_dtypes.float8_e4m3fn
        scales, codes = naive(rows, precision == "fp8_ue8m0" or name in POWERS)
        np.testing.assert_array_equal(s.reshape(scales.shape), scales, err_msg=product)
        np.testing.assert_array_equal(q.reshape(codes.shape).view(np.uint8), codes.view(np.uint8), err_msg=product)
        seen.add(name)
    assert seen == set(INPUTS)
    assert {t.rpartition(".")[0] for t in trace.taps if t.endswith(".scale")} == {
        t.rpartition(".")[0] for t in trace.taps if t.endswith(".act.q")
    }


def test_the_recorded_codes_are_what_is_multiplied(case, traces):
    """Catches codes made beside the run: codes x scales x naively quantised weights are the recorded product."""
    trace = traces["fp8"]
    for name, weight in WEIGHTS.items():
        w = np.asarray(case.weights()[f"model.layers.0.{weight}.weight"], f32)
        held = np.zeros(w.shape)
        for i in range(0, w.shape[0], 128):
            for j in range(0, w.shape[1], 128):
                block = w[i : i + 128, j : j + 128]
                s = abs(block).max() / f32(448)
                held[i : i + 128, j : j + 128] = (block / s).astype(ml_dtypes.float8_e4m3fn).astype(f64) * f64(s)
        q = np.asarray(trace.taps[f"fwd/L0/{name}.act.q"]).astype(f64)
        q = q.reshape(q.shape[0] * q.shape[1], -1)
        s = np.repeat(np.asarray(trace.taps[f"fwd/L0/{name}.act.scale"], f64).reshape(len(q), -1), 128, axis=1)
        y = np.asarray(trace.taps[f"fwd/L0/{name}"]).astype(f64).reshape(len(q), -1)
        # one rounding to bfloat16, and the order of a float64 sum where that is a tie
        np.testing.assert_allclose((q * s[:, : q.shape[1]]) @ held.T, y, rtol=2.0**-8, atol=1e-5)


def test_other_precisions_record_none(case):
    """Catches calls for codes in a run that has none."""
    assert not [t for t in trace_case(case, precision="bf16").taps if ".act." in t]
    only = trace_case(case, precision="fp8", taps=["*.act.scale"])
    assert only.taps and all(t.endswith(".act.scale") for t in only.taps)


# ---- What conforms


@pytest.mark.parametrize("precision", ["fp8", "fp8_ue8m0", "fp8_hopper"])
def test_a_run_with_codes_conforms(case, precision, tmp_path):
    """Catches codes judged against another arithmetic, and a file that does not give back what it was given."""
    trace_case(case, precision=precision).write(tmp_path / "t.safetensors")
    trace = Trace.read(tmp_path / "t.safetensors")
    judgement = judge(case, trace)
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert len([f for f in judgement.findings if f.stage in ("act.q", "act.scale")]) == 2 * len(list(products(trace)))


def test_chunks_and_a_training_step_conform():
    """Catches codes of cached steps with the shapes of the whole run, and gradients that look for theirs."""
    tiny = Case.read(TINY)
    chunks = trace_case(tiny, precision="fp8", phases=("fwd", "dec20"), attend="auto")
    step = trace_case(tiny, precision="fp8", training={"aux_weight": 0.01, "gamma": 0.001})
    assert "dec20/L1/mla.q.act.q" in chunks.taps and "bwd/L1/mla.q" in step.taps
    for trace in (chunks, only(step, lambda t: t.startswith("fwd"))):
        assert not judge(tiny, trace).culprits


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("precision", ["fp8", "fp8_ue8m0"])
def test_no_part_of_a_run_with_codes_is_called_wrong(case, traces, precision, seed):
    """Catches codes held to the bit where their input, or a product before it, was not recorded."""
    judgement = judge(case, drawn(traces[precision], seed, [0.8, 0.5, 0.3, 0.15][seed % 4]))
    assert not judgement.culprits, render(judgement)


@pytest.mark.parametrize("precision", ["fp8", "fp8_ue8m0"])
def test_behind_another_product_codes_are_held_to_a_norm(case, traces, precision):
    """Catches single codes judged by an input that quantising has moved by several per cent, and nothing judged there at all."""
    codes = ("attn_out.act.q", "ffn_out.act.q", "moe.shared.act.q", "moe.down.act.q")
    kept = ("attn_norm", "ffn_norm", "router.ids", "router.weights", *codes)
    few = only(traces[precision], lambda t: t.endswith(kept))
    assert not judge(case, few).culprits
    tap = "fwd/L0/ffn_out.act.q"
    assert "fwd/L0/mlp.act" in next(f.region for f in judge(case, few).findings if f.tap == tap)
    q = np.array(few.taps[tap])
    q.view(np.uint8)[0, 5, 128:] ^= 128
    assert blamed(case, changed(few, {tap: q})) == {tap}


def test_every_way_to_write_them_is_read(case, traces):
    """Catches bytes taken for numbers: codes as uint8, scales as E8M0 numbers and as their bytes, tokens flattened."""
    trace, taps = traces["fp8_ue8m0"], {}
    for i, (tap, a) in enumerate(trace.taps.items()):
        a = np.asarray(a)
        if tap.endswith(".act.q"):
            flat = a.reshape(a.shape[0] * a.shape[1], -1) if a.ndim > 2 else a
            taps[tap] = np.ascontiguousarray(flat).view(np.uint8)
        elif tap.endswith(".act.scale"):
            e8m0 = a.astype(ml_dtypes.float8_e8m0fnu)
            taps[tap] = e8m0 if i % 2 else e8m0.view(np.uint8)
    judgement = judge(case, changed(trace, taps))
    assert judgement.exit_code == 0 and not judgement.culprits, render(judgement)


DIVIDED = ["deepseek_v3", "deepseek_v32", "deepgemm", "tilekernels", "deepseek_v3_unclamped"]


@pytest.mark.parametrize("dialect", DIVIDED)
def test_every_public_way_to_divide_conforms(case, traces, dialect):
    """Catches a legal last bit called wrong: each of DeepSeek's quantisers, in the place of ours."""
    trace, taps = traces["fp8"], {}
    for product, name, rows in products(trace):
        if name not in POWERS:
            q = quantize(rows, dialect=dialect)
            shape = np.asarray(trace.taps[f"{product}.act.q"]).shape
            taps |= {f"{product}.act.q": q.codes.reshape(shape)}
            taps |= {f"{product}.act.scale": q.scales.reshape(trace.taps[f"{product}.act.scale"].shape)}
    assert not [t for t in blamed(case, changed(trace, taps)) if ".act." in t]


# ---- Every boundary between two codes


def tiles(rows, powers=False):
    """Rows as a product reads them, with a scale that is given apart."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 128))).reshape(len(rows), -1, 128)
    amax = abs(padded).max(axis=-1)
    return Tiles(rows, amax, 0.0, np.ones(amax.shape, bool), Fp8(inputs=POWER_OF_TWO if powers else EXACT))


LADDER = np.sort(decode(np.arange(127, dtype=np.uint8), E4M3))  # 0 to 448
BETWEEN = [(Fraction(float(a)) + Fraction(float(b))) / 2 for a, b in pairwise(LADDER)]


def right_codes(x, s, codes):
    """Which of the codes (N,) are right for x (N,) by the scale s."""
    x, codes = (np.asarray(a, f64)[:, None] for a in (x, codes))
    return fits(tiles(x), np.full(x.shape, f64(s)), codes)[:, 0]


@pytest.mark.parametrize("s", [f32(1 / 3), f32(3.1e-5), f32(0.7)])
@pytest.mark.parametrize("sign", [1, -1])
def test_either_code_is_right_at_a_boundary_and_one_beyond(s, sign):
    """Catches a tie called wrong, and a slack that hides a code: all 126 boundaries, x stepped through by single ulps."""
    xs, gaps, near, far = [], [], [], []
    for at, (low, high) in zip(BETWEEN, pairwise(LADDER), strict=True):
        x = f32(float(at * Fraction(float(s))))
        for k in range(-12, 13):
            xs.append(f32(x + k * np.spacing(x)))
            gaps.append(Fraction(float(xs[-1])) / Fraction(float(s)) / at - 1)  # exact
            near.append(low if gaps[-1] < 0 else high)
            far.append(high if gaps[-1] < 0 else low)
    xs, near, far = (sign * np.array(a, f64) for a in (xs, near, far))
    assert right_codes(xs, s, near).all()
    other = right_codes(xs, s, far)
    close, apart = (np.array([test(abs(g) * 2**24) for g in gaps]) for test in (lambda u: u < 3, lambda u: u > 5))
    assert close.sum() > 126 and other[close].all()
    assert apart.sum() > 126 and not other[apart].any()


@pytest.mark.parametrize("s", [2.0**-9, 1.0, 2.0**5])
def test_by_a_power_of_two_every_code_is_exact(s):
    """Catches a slack where no division rounds: at a tie only the even code, one ulp beside it only the nearest."""
    for i, (at, (low, high)) in enumerate(zip(BETWEEN, pairwise(LADDER), strict=True)):
        tie = f32(float(at) * s)
        beside = (np.nextafter(tie, f32(0)), low), (np.nextafter(tie, f32(np.inf)), high)
        for x, right in ((tie, (low, high)[i % 2]), *beside):
            assert LADDER[right_codes(np.full(len(LADDER), x), s, LADDER)].tolist() == [right], (i, x)


def test_beyond_the_range_it_saturates_or_is_nan():
    """Catches NaN accepted within the range, and a saturated code refused beyond it."""
    for v, allowed in ((448.0, {448.0}), (463.9, {448.0}), (464.1, {448.0, None}), (1e6, {448.0, None})):
        for code in (416.0, 448.0, None):
            q = np.array([[np.nan if code is None else code]])
            assert fits(tiles(np.array([[v]])), np.ones((1, 1)), q)[0, 0] == (code in allowed), (v, code)


def test_an_input_that_is_known_to_a_fifth_is_a_norm():
    """Catches single codes asked of an input that quantising another product has moved: one may be anything, forty may not."""
    x = np.random.default_rng(0).choice([-1.0, 1.0], (1, 128)) * 448
    vague = dataclasses.replace(tiles(x), doubt=0.2)
    one, forty = x.copy(), x.copy()
    one[0, 5], forty[0, :40] = 0, -forty[0, :40]
    assert fits(vague, np.ones((1, 1)), one).all() and not fits(vague, np.ones((1, 1)), forty).any()
    clear = dataclasses.replace(vague, doubt=0.01)
    assert np.flatnonzero(~fits(clear, np.ones((1, 1)), one)[0]).tolist() == [5]


# ---- Scales


def test_scales_are_held_to_float32_and_powers_to_the_next_one_at_an_edge():
    """Catches a scale rounded to bfloat16, a power of two too far, and the legal neighbour at an edge called wrong."""
    amax = np.array([[3.3], [448.0 * 4], [448.0 * 4 * (1 + 2.0**-20)], [0.0], [5e-5]])
    plain, power = tiles(amax), tiles(amax, powers=True)
    exact = np.maximum(amax, 1e-4) / 448
    assert plain.right(exact).all() and plain.right(exact * (1 + 2.0**-23)).all()
    assert plain.right(exact * (1 + 2.0**-20)).ravel().tolist() == [False, False, False, True, False]
    assert plain.right(amax / 448)[4] and not plain.right(amax / 448 * 3)[4]  # with the floor 1e-4 or without
    for s, right in (
        ([2.0**-7, 4.0, 8.0, 1.0, 2.0**-22], [1, 1, 1, 1, 1]),
        ([2.0**-8, 8.0, 4.0, 0.0, 2.0**-23], [0, 1, 0, 1, 1]),
        ([2.0**-6, 2.0, 16.0, 3.0, 2.0**-21], [0, 0, 0, 1, 0]),
        ([0.0074, 5.0, 6.0, np.nan, 1e-7], [0, 0, 0, 0, 0]),
    ):
        assert power.right(np.array(s)[:, None]).ravel().tolist() == [bool(r) for r in right]


def test_a_wrong_scale_is_blamed_and_its_codes_are_not(case, traces):
    """Catches one mistake said twice: codes that were made with the right scale beside one that is 1.3 times too large."""
    tap = "fwd/L0/mla.q.act.scale"
    s = np.array(traces["fp8"].taps[tap])
    s[0, 3, 1] *= f32(1.3)
    found = judge(case, changed(traces["fp8"], {tap: s}))
    assert {f.tap for f in found.culprits if ".act." in f.tap} == {tap}
    note = next(f.note for f in found.culprits if f.tap == tap)
    assert "1 of 16 scales differ, the first at [0, 3, 1]" in note


def test_one_wrong_code_is_found(case, traces):
    """Catches a rule that looks at norms: one code of a product, one step off."""
    tap = "fwd/L1/moe.down.act.q"
    q = np.array(traces["fp8"].taps[tap])
    bits = q.view(np.uint8)
    bits[5, 130] = bits[5, 130] - 1 if bits[5, 130] & 127 else 1
    found = blamed(case, changed(traces["fp8"], {tap: q}))
    assert {t for t in found if ".act." in t} == {tap}
    assert found <= {tap, "fwd/L1/moe.down"}  # which was made with the right one


def test_nan_of_a_candidate_is_blamed_where_it_begins(case, traces):
    """Catches NaN that passes for a code, and codes blamed for the NaN of their input."""
    trace = traces["fp8"]
    q, s = (np.array(trace.taps[f"fwd/L0/mla.q.act.{what}"]) for what in ("q", "scale"))
    q[0, 2, 7] = np.nan
    assert "fwd/L0/mla.q.act.q" in blamed(case, changed(trace, {"fwd/L0/mla.q.act.q": q}))
    s[0, 2, 1] = np.nan
    assert "fwd/L0/mla.q.act.scale" in blamed(case, changed(trace, {"fwd/L0/mla.q.act.scale": s}))
    x = np.array(trace.taps["fwd/L0/mla.q_a_norm"])
    x[0, 2, 150] = np.nan
    found = blamed(case, changed(trace, {"fwd/L0/mla.q_a_norm": x}))
    assert "fwd/L0/mla.q_a_norm" in found and not [t for t in found if ".act." in t]


# ---- Layout


def test_scales_recorded_group_major_are_a_gauge(case, traces):
    """Catches a layout of the recording called a bug: the product used them as they should be."""
    taps = {}
    for tap, a in traces["fp8"].taps.items():
        if tap.endswith(".act.scale"):
            rows = np.asarray(a).reshape(-1, a.shape[-1])
            flat = np.array([rows[t, g] for g in range(rows.shape[1]) for t in range(rows.shape[0])], f32)
            taps[tap] = flat.reshape(a.shape)
    judgement = judge(case, changed(traces["fp8"], taps))
    assert judgement.verdict == "CONFORMS_IN_GAUGE", render(judgement)
    assert any("group-major" in g for g in judgement.gauges)


# ---- Known bugs


def multiplied(case, trace, name, scales):
    """The product of recorded codes with other scales, as a candidate would hold it."""
    w = np.asarray(case.weights()[f"model.layers.0.{WEIGHTS[name]}.weight"], f32)
    q = np.asarray(trace.taps[f"fwd/L0/{name}.act.q"]).astype(f64)
    q = q.reshape(q.shape[0] * q.shape[1], -1)
    s = np.repeat(np.asarray(scales, f64).reshape(len(q), -1), 128, axis=1)[:, : q.shape[1]]
    y = (q * s) @ quantize(w, (128, 128), dialect="deepseek_v3_unclamped").dequantize().astype(f64).T
    return y.reshape(trace.taps[f"fwd/L0/{name}"].shape).astype(ml_dtypes.bfloat16)


def written_group_major(s):
    rows = s.reshape(-1, s.shape[-1])
    return rows.ravel().reshape(rows.shape[1], rows.shape[0]).T


def neighbour(s):
    s = s.copy()
    s[..., -1] = s[..., -2]
    return s


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_product_of_the_recorded_scales_is_right(case, traces, name):
    """Catches a product of the tests below that is wrong before its scales are."""
    trace = traces["fp8"]
    right = multiplied(case, trace, name, trace.taps[f"fwd/L0/{name}.act.scale"])
    assert not blamed(case, changed(trace, {f"fwd/L0/{name}": right}))


MISREAD = {
    "F12": (written_group_major, "mla.q_a"),
    "F12b": (lambda s: s.reshape(-1, s.shape[-1]).T.ravel(), "mla.q"),
    "F16": (neighbour, "attn_out"),
    "F11": (lambda s: 2.0 ** np.floor(np.log2(s.astype(f64))), "mla.q"),
}
"""Mistake -> what it makes of the scales, and a product that shows it; the others are slow."""


@pytest.mark.parametrize(
    ("id", "name"),
    [
        pytest.param(id, name, marks=[] if name == one else pytest.mark.slow)
        for id, (_, one) in MISREAD.items()
        for name in WEIGHTS
        if not (id == "F11" and name in POWERS)  # powers of two have nothing else
    ],
)
def test_what_a_product_reads_wrongly_is_named(case, traces, id, name):
    """Catches scales read in another layout or format blamed on the codes, or on nobody: 15 % is what quantising itself may do."""
    trace, mistake = traces["fp8"], MISREAD[id][0]
    y = multiplied(case, trace, name, mistake(np.asarray(trace.taps[f"fwd/L0/{name}.act.scale"])))
    judgement = judge(case, changed(trace, {f"fwd/L0/{name}": y}))
    assert f"fwd/L0/{name}" in {f.tap for f in judgement.culprits}
    assert not [f for f in judgement.culprits if ".act." in f.tap]
    (d,) = [d for d in judgement.causes if f"fwd/L0/{name}" in d.taps]
    assert d.title == MUTANTS[f"{id}-{name}"].title, render(judgement)


@pytest.mark.parametrize("id", ["F09", *[pytest.param(i, marks=pytest.mark.slow) for i in ("F13", "F13b")]])
def test_bugs_of_powers_of_two_are_named(case, id):
    """Catches F09 taken for a wrong scale (its scales are right), and a rounding rule that nobody knows."""
    m = MUTANTS[id]
    trace = trace_case(case, precision="fp8_ue8m0", patches=[Patch(m.stage, m.fn)])
    judgement = judge(case, changed(trace, {}))
    codes = [f for f in judgement.culprits if ".act." in f.tap]
    assert {f.stage for f in codes} == {m.stage} and len(codes) > 10
    assert [d.title for d in judgement.causes if set(d.taps) & {f.tap for f in codes}] == [m.title], render(judgement)


def test_a_tile_of_zeros_may_have_any_scale_but_no_nan(case, traces):
    """Catches F08, 0 / 0, and a scale of 0 or 1 called wrong although nothing is multiplied with it."""
    trace, row = traces["fp8"], (0, 4)
    x, q, s = (np.array(trace.taps[f"fwd/L0/{t}"]) for t in ("mla.q_a_norm", "mla.q.act.q", "mla.q.act.scale"))
    y = np.array(trace.taps["fwd/L0/mla.q"])
    x[row], y[row], q[row] = 0, 0, 0
    for scale in (0.0, 1.0, 1e-4 / 448):
        s[row] = scale
        taps = {"fwd/L0/mla.q_a_norm": x, "fwd/L0/mla.q.act.q": q, "fwd/L0/mla.q.act.scale": s, "fwd/L0/mla.q": y}
        assert not [
            t for t in blamed(case, changed(trace, taps)) if t.startswith("fwd/L0/mla.q.act") or t == "fwd/L0/mla.q"
        ]
    q[row], s[row] = np.nan, 0
    judgement = judge(case, changed(trace, taps | {"fwd/L0/mla.q.act.q": q, "fwd/L0/mla.q.act.scale": s}))
    assert {f.tap for f in judgement.culprits if ".act." in f.tap} == {"fwd/L0/mla.q.act.q"}
    assert [d.id for d in judgement.causes if "fwd/L0/mla.q.act.q" in d.taps] == ["F08"], render(judgement)


def test_the_tools_take_codes(case, traces, tmp_path, capsys):
    """Catches a traceback of --explain-tolerance, --html or impact on a trace whose codes are wrong."""
    q = np.array(traces["fp8"].taps["fwd/L0/mla.q.act.q"])
    q.view(np.uint8)[0, 0, :] ^= 128
    file = tmp_path / "bad.safetensors"
    changed(traces["fp8"], {"fwd/L0/mla.q.act.q": q}).write(file)
    tap = "fwd/L0/mla.q.act.q"
    assert (
        main(["diff", str(case.path), str(file), "--html", str(tmp_path / "x.html"), "--sarif", str(tmp_path / "s")])
        == 1
    )
    assert main(["diff", str(case.path), str(file), "--explain-tolerance", tap]) in (0, 1)
    assert "4 roundings" in capsys.readouterr().out
    main(["impact", str(case.path), str(file)])


def test_the_slack_covers_every_quotient_of_float32():
    """Catches a derivation that is wrong: over all bfloat16 mantissas and 64 scales, no public quotient leaves the slack."""
    x = (1 + np.arange(128) / 128).astype(f32)
    for amax in (1 + np.arange(64) / 64 + 1 / 8192).astype(f32):
        s = amax / f32(448)
        true = x.astype(f64) / f64(s)
        for v in (x / s, x * (f32(1) / s), x * (f32(448) / amax)):
            assert abs(v.astype(f64) / true - 1).max() <= QUOTIENT
    assert set(DIVIDED) < set(DIALECTS) and plan("fp8").kernel("mla.q").inputs == EXACT
