"""Pictures of taps: map, histogram and worst entries against naive loops; what is drawn of them, byte by byte."""

import base64
import dataclasses
import math
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest

from refimpl.diff.drawing import DECADES, heat_png, histogram_svg, png, strip_png, verdict_colour
from refimpl.diff.judge import judge
from refimpl.diff.picture import BINS, COLUMNS, LOWEST, ROWS, WORST, picture, pooled
from refimpl.layers.stage import STAGES, Patch
from refimpl.record import trace_case

from .test_diff_partial import SETS, case, only, recording

SHAPES = {  # stage -> a shape, and which axes are tokens
    "resid": ((2, 5, 6), (0, 1)),
    "mla.q": ((2, 3, 4, 5), (0, 1)),
    "mla.scores": ((2, 3, 4, 5), (0, 2)),
    "mla.rope_tables": ((2, 3, 4, 5), (1, 2)),
    "moe.rows": ((7, 6), (0,)),
    "router.bias_update": ((9,), ()),
}


def naive(x, e):
    """|x - e| / rms of the row of e, element by element."""
    out = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        row = e[at[:-1]]
        out[at] = abs(x[at] - e[at]) / math.sqrt(sum(float(v) ** 2 for v in row) / len(row))
    return out


@pytest.mark.parametrize("stage", SHAPES)
def test_a_picture_is_what_loops_find(stage):
    """Catches tokens and features exchanged, an axis flattened in another order, a histogram or a list of something else."""
    shape, tokens = SHAPES[stage]
    rng = np.random.default_rng(0)
    e = rng.normal(size=shape)
    x = e + rng.normal(size=shape) * 10.0 ** rng.integers(-6, 0, shape)
    x.flat[3] = e.flat[3]
    p, error = picture(STAGES[stage], x, e, None, {}), naive(x, e)
    features = [i for i in range(len(shape)) if i not in tokens]
    assert p.size == (math.prod(shape[i] for i in tokens), math.prod(shape[i] for i in features)) == p.heat.shape
    for r, token in enumerate(np.ndindex(*[shape[i] for i in tokens])):
        at = dict(zip(tokens, token, strict=True))
        index = tuple(at.get(i, slice(None)) for i in range(len(shape)))
        np.testing.assert_allclose(p.heat[r], error[index].ravel(), rtol=1e-6)  # the map is float32
        rows = np.sqrt((error**2).mean(axis=-1))  # the root mean square of a row's elements is the row's error
        np.testing.assert_allclose(
            p.strip[r], rows[tuple(at.get(i, slice(None)) for i in range(len(shape) - 1))].max(), rtol=1e-6
        )
    assert [w.at for w in p.worst] == sorted(np.ndindex(*shape), key=lambda at: -error[at])[:WORST]
    assert all((w.candidate, w.expected) == (x[w.at], e[w.at]) for w in p.worst)
    halves = [math.floor(2 * (math.log10(v) - LOWEST)) for v in error.ravel() if v]
    assert p.counts == (*[halves.count(k) for k in range(BINS)], 0) and p.equal == 1


def test_the_strip_is_what_the_verdict_is_about():
    """Catches a picture of other rows, another candidate or reference than the finding's: its worst row is the error."""
    for name in ("hf-bug", "hf-bfloat16"):
        judgement = judge(case(), recording(name), pictures=True)
        assert len(judgement.findings) == 93
        for f in judgement.findings:
            np.testing.assert_allclose(f.picture.strip.max(), f.error, rtol=1e-6, err_msg=f.tap)
        assert judgement.findings == judge(case(), recording(name)).findings  # and pictures change nothing


def test_a_lonely_wrong_element_is_not_pooled_away():
    """Catches means in place of maxima, a last block that is dropped, a map that grows with the tap."""
    rng = np.random.default_rng(1)
    for n, m in ((63, 97), (200, 1000), (64, 96), (1, 1), (129, 5)):
        a = rng.random((n, m))
        small = pooled(a, ROWS, COLUMNS)
        assert small.shape == (min(n, ROWS), min(m, COLUMNS))
        for i, j in [(0, 0), (n - 1, m - 1), *rng.integers(0, (n, m), (20, 2)).tolist()]:
            a[i, j] = 9.0
            assert (pooled(a, ROWS, COLUMNS) == 9.0).sum() == 1
            a[i, j] = 0.5
    assert np.isnan(pooled(np.full((200, 3), np.nan), ROWS, COLUMNS)).all()
    holed = np.full((200, 3), np.nan)
    holed[7, 1] = 2.0
    assert np.nanmax(pooled(holed, ROWS, COLUMNS)) == 2.0


def test_what_is_no_number_is_the_worst():
    """Catches NaN that vanishes from a map as if it had not been compared."""
    e = np.ones((1, 4, 3))
    x = e.copy()
    x[0, 2, 1], x[0, 3, 0] = np.nan, np.inf
    p = picture(STAGES["resid"], x, e, None, {})
    assert {w.at for w in p.worst} == {(0, 2, 1), (0, 3, 0)} and math.isnan(p.worst[0].candidate)
    assert np.isinf(p.heat[2, 1]) and p.counts[-1] == 2 and p.unseen == 0 and p.equal == 10
    assert levels(heat_png(p))[2][1] == 255 and "NaN or infinite: 2" in histogram_svg(p, 1e-6)


def test_chosen_experts_are_pictured_by_expert():
    """Catches slots compared in order: a set is a set, and the map's columns are experts."""
    e = np.array([[[3, 1], [0, 2]]])
    p = picture(STAGES["router.ids"], np.array([[[1, 3], [5, 0]]]), e, None, {})
    assert p.columns == ("E",) and p.heat.shape == (2, 6) and p.heat[0].sum() == 0
    assert np.flatnonzero(p.heat[1]).tolist() == [2, 5]
    assert [(w.at, w.candidate, w.expected) for w in p.worst] == [((0, 1, 2), 0, 1), ((0, 1, 5), 1, 0)]


def test_a_map_has_as_few_columns_as_experts_were_chosen():
    """Catches a column for an expert that nobody has heard of: of the first one only."""
    for last in (0, 1, 4):
        ids = np.array([[[last], [0]]])
        p = picture(STAGES["router.ids"], ids, ids, None, {})
        assert p.size == p.heat.shape == (2, last + 1) and p.equal == 2 * (last + 1)


def test_a_map_is_whole_up_to_64_by_96():
    """Catches cells that hold several elements where there is room for each (docs/diff.md says how much)."""
    for size, cells in (((64, 96), (64, 96)), ((65, 97), (64, 96)), ((63, 95), (63, 95)), ((1000, 1), (64, 1))):
        e = np.ones((1, *size))
        assert picture(STAGES["resid"], e + 1, e, None, {}).heat.shape == cells


def test_a_part_is_indexed_in_the_whole():
    """Catches entries numbered within the recorded part: the last position is not position 0."""
    e = np.arange(24.0).reshape(2, 4, 3) + 1
    last = e[:, -1:] + [0, 0, 9]
    p = picture(STAGES["resid"], last, e, None, {1: slice(-1, None)})
    assert p.ends == ((0, 3), (1, 3)) and {w.at for w in p.worst} == {(0, 3, 2), (1, 3, 2)}
    some = picture(STAGES["resid"], e[:, [1, 3]] + 1, e, None, {1: [1, 3]})
    assert {w.at[1] for w in some.worst} == {1, 3}


def test_doubtful_tokens_are_not_pictured():
    """Catches tokens whose experts rounding alone may change listed as the worst."""
    rng = np.random.default_rng(2)
    e = rng.normal(size=(1, 4, 3))
    x = e + 1e-3
    x[0, 2] = 99
    p = picture(STAGES["resid"], x, e, np.array([[True, True, False, True]]), {})
    assert p.unseen == 3 and np.isnan(p.heat[2]).all() and np.isnan(p.strip[2]) and all(w.at[1] != 2 for w in p.worst)
    assert levels(heat_png(p))[2] == [0, 0, 0] and levels(strip_png(p, 1e-3))[2] == [0]
    heads = rng.normal(size=(1, 2, 4, 3))
    settled = np.broadcast_to(np.array([[True, False, True, True]])[:, None], (1, 2, 4))
    assert np.isnan(picture(STAGES["mla.scores"], heads * 1.1, heads, settled, {}).heat[1]).all()


@pytest.mark.parametrize("part", ["logits", "weights of the experts alone"])
def test_in_a_judgement_doubtful_tokens_are_left_out(part):
    """Catches a picture of tokens that the finding did not compare: in these parts roundings may send some to other experts."""
    judgement = judge(case(), only(recording("hf-bfloat16"), SETS[part]), pictures=True)
    assert any(f.picture.unseen for f in judgement.findings)
    for f in judgement.findings:
        np.testing.assert_allclose(np.nanmax(f.picture.strip), f.error, rtol=1e-6, err_msg=f.tap)


def test_a_gauge_that_is_dropped_leaves_the_plain_picture():
    """Catches a blamed tap shown in the arrangement in which it would have fitted: q alone in the other order is off."""
    fn = STAGES["mla.q_rope"].fn
    bad = Patch("mla.q_rope", lambda q, table, *, interleaved: half(fn(q, table, interleaved=interleaved)))
    blamed = judge(case(), trace_case(case(), patches=[bad]), pictures=True).culprits
    assert "mla.q_rope" in {f.stage for f in blamed}
    for f in blamed:
        np.testing.assert_allclose(f.picture.strip.max(), f.error, rtol=1e-6)


def test_a_tap_in_a_gauge_is_pictured_in_it():
    """Catches a tap that conforms in another arrangement shown as it was recorded, wrong all over."""
    clean = recording("hf-float32")
    taps = {t: half(a) if t.endswith(("mla.q_rope", "mla.k_rope")) else a for t, a in clean.taps.items()}
    judgement = judge(case(), dataclasses.replace(clean, taps=taps), pictures=True)
    assert judgement.verdict == "CONFORMS_IN_GAUGE"
    for f in judgement.findings:
        np.testing.assert_allclose(f.picture.strip.max(), f.error, rtol=1e-6, err_msg=f.tap)


def half(a):
    return np.concatenate([a[..., 0::2], a[..., 1::2]], axis=-1)


# ---- Drawing


def levels(address):
    """The palette's indices of a PNG, read back by hand: signature, chunks with their checksums, unfiltered lines."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (n,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        parts[kind] = data[at + 8 : at + 8 + n]
        assert struct.unpack(">I", data[at + 8 + n : at + 12 + n]) == (zlib.crc32(kind + parts[kind]),)
        at += 12 + n
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    raw = zlib.decompress(parts[b"IDAT"])
    lines = [list(raw[i * (width + 1) : (i + 1) * (width + 1)]) for i in range(height)]
    assert all(line[0] == 0 for line in lines) and len(parts[b"PLTE"]) % 3 == 0
    return [line[1:] for line in lines]


def test_a_png_holds_what_was_drawn():
    """Catches rows and columns exchanged, a checksum that strict readers refuse."""
    a = np.arange(6).reshape(2, 3)
    assert levels(png(a, ((0, 0, 0),) * 6)) == a.tolist()


def test_a_darker_cell_is_a_larger_error():
    """Catches a scale that saturates where everything is far beyond what is allowed, or that treats zero as missing."""
    p = picture(STAGES["resid"], np.ones((1, 1, 5)), np.ones((1, 1, 5)), None, {})
    p = dataclasses.replace(p, heat=np.array([[0, 1e-3, 1e-2, 0.1, 1.0]]) * 3e5, strip=np.array([3e5]))
    (row,) = levels(heat_png(p))
    assert row[0] == 1 and row[-1] == 254 and all(b - a > 252 / DECADES - 2 for a, b in pairwise(row[1:]))
    assert levels(heat_png(dataclasses.replace(p, heat=np.array([[np.nan, np.inf]])))) == [[0, 255]]


def luminance(colour):
    """Relative luminance, WCAG 2: what is left of a colour in grey."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_verdicts_are_told_apart_in_grey():
    """Catches two colours of one lightness, which a printer or a colour-blind reader cannot tell apart; white figures on
    orange that nobody can read.
    """
    fine = [luminance(verdict_colour(r, ok=True)) for r in np.linspace(0, 1, 20)]
    wrong = [luminance(verdict_colour(10**k, ok=False)) for k in np.linspace(0, 7, 20)]
    assert fine == sorted(fine, reverse=True) and wrong == sorted(wrong, reverse=True)
    assert (min(fine) + 0.05) / (max(wrong) + 0.05) > 3  # WCAG's contrast for parts of a picture
    assert 1.05 / (max(wrong) + 0.05) > 4.5  # and for text


def test_the_strip_tells_within_from_beyond():
    """Catches a row at its limit coloured as wrong, or one beyond it as right."""
    p = picture(STAGES["resid"], np.ones((1, 6, 2)), np.ones((1, 6, 2)), None, {})
    p = dataclasses.replace(p, strip=np.array([0, 0.5, 1.0, 1.01, 1e9, np.nan]) * 2e-7)
    found = [row[0] for row in levels(strip_png(p, 2e-7))]
    assert found[0] == 1 and 1 < found[1] < found[2] == 127 and found[3] == 128 and found[4:] == [255, 0]
    exact = dataclasses.replace(p, strip=np.array([0, 1.0]))
    assert [row[0] for row in levels(strip_png(exact, 0.0))] == [1, 255]


def test_the_histogram_shows_every_bin_and_the_limit():
    """Catches a bar outside the drawing, counts without words for those who do not see them."""
    rng = np.random.default_rng(3)
    e = rng.normal(size=(2, 30, 8))
    x = e * (1 + 10.0 ** rng.uniform(-20, 8, e.shape))
    x[0, 0, 0] = np.nan
    p = picture(STAGES["resid"], x, e, None, {})
    svg = histogram_svg(p, 1e-6)
    bars = [float(part.split('"')[0]) for part in svg.split('<rect x="')[1:]]
    assert len(bars) == sum(1 for n in p.counts if n) + bool(p.equal) and min(bars) >= 0 and max(bars) < 560
    said = svg.split('aria-label="')[1].split('"')[0]
    assert sum(int(s.rpartition(": ")[2].replace(",", "")) for s in said.split("; ")) == x.size
    assert "allowed" in svg and "allowed" not in histogram_svg(p, 0.0)
