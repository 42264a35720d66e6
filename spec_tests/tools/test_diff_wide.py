"""Attention's squares judged a block of queries at a time, against the same numbers made whole."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refimpl
from refimpl.autograd.tensor import Array
from refimpl.diff import Case, Trace, replay, rows, to_json, wide
from refimpl.diff.drift import drift
from refimpl.diff.judge import judge
from refimpl.diff.lanes import Lane, Recorded
from refimpl.diff.tolerance import Noise, distance
from refimpl.layers.stage import STAGES, Call

CASE = Path(refimpl.__file__).parent / "cases" / "tiny"


def _report(case: Case, trace: Trace) -> Any:
    return json.loads(to_json(judge(case, trace)))


def _close(a: Any, b: Any, apart: float, key: str = "") -> bool:
    """The same report, numbers to 1e-5. Sums in blocks round otherwise: what measures nothing but float32 roundings, our own run's
    distance and in float32 the twins', may be apart by `apart` of itself.
    """
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k], apart, k) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_close(u, v, apart, key) for u, v in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        most = apart if key in ("chained", "twin", "allowed", "upright") else 1e-5
        return a == b or abs(a - b) <= max(most * abs(a), 1e-10)
    return bool(a == b)


_PARTS = (("hf-float32", ""), ("hf-bfloat16", "mla.scores mla.probs mla.q"), ("hf-bug", "mla mask"))


@pytest.mark.parametrize(("name", "without"), _PARTS)
def test_blocks_give_the_same_report(name: str, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches keys left out that count, blocks put in another place, twins moved otherwise in blocks than whole, and a stage run
    on another tap's blocks. Oracle: the same judgement with every array whole.
    """
    case, trace = Case.read(CASE), Trace.read(CASE / f"{name}.safetensors")
    taps = {t: a for t, a in trace.taps.items() if not any(w in t for w in without.split())}
    trace = dataclasses.replace(trace, taps=taps)
    whole = _report(case, trace)
    monkeypatch.setattr(replay, "glimpse", lambda *a: None)  # which are of blocks only
    monkeypatch.setattr(wide, "LEAST", 1)
    monkeypatch.setattr(wide, "BLOCK", 150)
    assert _close(whole, _report(case, trace), 0.5 if trace.header.precision["storage"] == "float32" else 1e-4)


@pytest.mark.parametrize("what", ["seen", "far", "nan", "shown"])
def test_a_wrong_number_behind_the_last_key(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a block that is compared only as far as our own keys go: a score or a probability of a key that nobody may see, a
    NaN among them, is seen, and a finite mask still conforms.
    """
    case, trace = Case.read(CASE), Trace.read(CASE / "hf-float32.safetensors")
    tap = "fwd/L1/mla.probs" if what == "shown" else "fwd/L1/mla.scores"
    x = np.array(trace.taps[tap])
    x[..., 0, -1] = {"seen": 1.0, "far": -1e9, "nan": np.nan, "shown": 0.1}[what]
    monkeypatch.setattr(wide, "LEAST", 1)
    monkeypatch.setattr(wide, "BLOCK", 150)
    found = judge(case, dataclasses.replace(trace, taps={**trace.taps, tap: x}))
    assert (tap in {f.tap for f in found.culprits}) == (what != "far")


def test_keys_that_are_no_numbers_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches keys left out although they count: 0 times NaN is NaN, in all earlier tokens' attention too, and whoever recorded
    that is not blamed for it. Oracle: the same judgement with every array whole.
    """
    case, trace = Case.read(CASE), Trace.read(CASE / "hf-float32.safetensors")
    kv, ctx = (np.array(trace.taps[f"fwd/L1/mla.{name}"]) for name in ("kv_b", "ctx"))
    kv[:, -1], ctx[:] = np.nan, np.nan
    trace = dataclasses.replace(trace, taps={**trace.taps, "fwd/L1/mla.kv_b": kv, "fwd/L1/mla.ctx": ctx})
    whole = {f.tap: f.ok for f in judge(case, trace).findings}
    monkeypatch.setattr(wide, "LEAST", 1)
    monkeypatch.setattr(wide, "BLOCK", 150)
    assert {f.tap: f.ok for f in judge(case, trace).findings} == whole and whole["fwd/L1/mla.ctx"]


def test_blocks_of_our_own_run_are_made_for_its_context_and_of_some_for_what_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches scores and probabilities of our own run that everyone who reads them makes again: the time of all attention."""
    made: Counter[tuple[str, wide.Place]] = Counter()
    blocks = rows.blocks

    def counted(lane: Lane, call: Call, r: Recorded) -> rows.Block:
        block = blocks(lane, call, r)

        def one(place: wide.Place) -> Array:
            made[call.tap, place] += 0 if lane.given else 1
            return block(place)

        return one

    monkeypatch.setattr(wide, "LEAST", 1)
    monkeypatch.setattr(wide, "BLOCK", 150)
    monkeypatch.setattr(rows, "blocks", counted)
    judge(Case.read(CASE), Trace.read(CASE / "hf-float32.safetensors"))
    again = {at: n for at, n in made.items() if n > 1}
    most = {"mla.scores": 3, "mla.probs": 2}  # for each tap's own distance, and for the context
    assert len(made) > 100 and len(again) <= len(made) / 6
    assert all(n == most[tap.rpartition("/")[2]] for (tap, _), n in again.items())


def test_our_own_runs_distance_is_that_of_some_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches blocks left out that should count, or the other way round: the last of every eight, masked numbers as none. Oracle: a
    loop.
    """
    monkeypatch.setattr(wide, "BLOCK", 64)
    rng, shape = np.random.default_rng(5), (2, 2, 24, 8)
    ours = rng.standard_normal(shape)
    ours[..., 5:] = -np.inf
    x = np.where(np.isinf(ours), -1e9, ours + rng.standard_normal(shape))
    blocks = wide.Wide(shape, ours.dtype, -np.inf, lambda p: ours[p.index])
    shown = [(b, 4 * k + i) for b, k in ((1, 5), (0, 3)) for i in range(4)]  # four rows a block, six blocks a sequence
    far = sum(
        (x[b, :, s, :5] - ours[b, :, s, :5]).ravel() @ (x[b, :, s, :5] - ours[b, :, s, :5]).ravel() for b, s in shown
    )
    size = sum(ours[b, :, s, :5].ravel() @ ours[b, :, s, :5].ravel() for b, s in shown)
    assert drift(x, blocks) == pytest.approx(np.sqrt(far / size), rel=1e-5)
    assert drift(x, ours) == pytest.approx(
        np.linalg.norm((x - ours)[..., :5]) / np.linalg.norm(ours[..., :5]), rel=1e-5
    )


def test_a_block_is_moved_as_all_of_it_would_be() -> None:
    """Catches draws that begin at another number of the sequence: odd places, later heads, later sequences. Oracle: the whole array
    moved at once.
    """
    x = np.random.default_rng(0).random((2, 3, 5, 7), np.float32)
    noise, call = Noise(lambda tap: 0.25, lambda c: "fp32"), Call("mla.probs", "fwd/L0/mla.probs", (), {})
    whole = noise.given(call, x, 2)
    for place in [wide.Place(x.shape, b, s, e) for b in range(2) for s, e in ((0, 2), (1, 2), (3, 5))]:
        assert (noise.given(call, x[place.index][..., :6], 2, place) == whole[place.index][..., :6]).all()
    assert not (whole == x).any()


def test_what_is_left_out_is_what_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches keys left out, or said to hold nothing, where something is: in a row, a head or a block of them. Oracle: a loop."""
    monkeypatch.setattr(wide, "BLOCK", 32)
    rng, shape = np.random.default_rng(3), (2, 2, 5, 8)
    for fill, others in ((-np.inf, (-1e9, 0.5, np.nan)), (0.0, (1e-9, -1e-9, np.nan))):
        like = wide.Wide(shape, np.float64, fill, lambda p, fill=fill: np.full((1, 2, p.stop - p.start, p.stop), fill))
        for chance in (0.01, 0.05, 0.2):
            x = np.full(shape, fill)
            here = rng.random(shape) < chance
            x[here] = rng.choice(others, size=int(here.sum()))
            ends: dict[wide.Place, int] = {}
            shown = wide.looked_at(x, like, ends)
            assert isinstance(shown, wide.Wide)
            for place in wide.places(shape):
                block = shown.block(place)
                rest = [
                    x[place.sequence, h, s, k]
                    for h in range(2)
                    for s in range(place.start, place.stop)
                    for k in range(place.stop, 8)
                ]
                empty = all(v == fill for v in rest)
                assert ends.get(place) == (place.stop if empty else None)
                n = place.stop if empty or all(v < wide.MASKED for v in rest) else shape[-1]
                np.testing.assert_array_equal(block, x[place.index][..., :n])


def test_blocks_are_rows_that_a_cache_holds() -> None:
    """Catches rows left out or in two blocks, sequences that share one, and blocks of a row, which cost more than they compute."""
    for shape in ((2, 3, 5, 7), (1, 16, 4096, 4096), (3, 128, 512, 2048), (1, 128, 8, 65536)):
        found = list(wide.places(shape))
        rows = [(p.sequence, s) for p in found for s in range(p.start, p.stop)]
        assert rows == [(b, s) for b in range(shape[0]) for s in range(shape[2])] and {p.shape for p in found} == {
            shape
        }
        row, most = 8 * shape[1] * shape[3], max(p.stop - p.start for p in found)
        assert most in (1, shape[2]) or 2**20 <= most * row <= 2**22  # bytes in float64: what a core has for itself
        assert most == 1 or most * row <= 2**22
        assert most > 1 or 2 * row > 2**20


def test_the_keys_that_are_seen() -> None:
    """Catches a last key that only another query, or another head, than the last sees. Oracle: every column looked at."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        a = np.where(rng.random((1, 2, 3, 8)) < 0.1, 1.0, 0.0)
        columns = [t for t in range(8) if (a[..., t] != 0).any()]
        assert wide.seen(a, 0.0) == max([*columns, 0]) + 1


def test_distances_of_blocks() -> None:
    """Catches a row whose second part, where masked scores are, is dropped or replaces the first. Oracle: a loop over rows."""
    rng, stage = np.random.default_rng(2), "mla.scores"
    assert stage in STAGES
    e = rng.standard_normal((2, 2, 6, 9))
    e[:, :, np.arange(6)[:, None] + 3 < np.arange(9)] = -np.inf
    x = np.where(np.isinf(e), -1e9, e * (1 + 1e-3 * rng.standard_normal(e.shape)))
    blocks = wide.Wide(e.shape, e.dtype, -np.inf, lambda p: e[p.index])
    rows = [(u[np.isfinite(v)], v[np.isfinite(v)]) for u, v in zip(x.reshape(-1, 9), e.reshape(-1, 9), strict=True)]
    sizes = [np.linalg.norm(v) for _, v in rows]
    worst = max(np.linalg.norm(u - v) / max(n, 0.1 * max(sizes)) for (u, v), n in zip(rows, sizes, strict=True))
    assert abs(distance(stage, x, blocks).worst - worst) < 1e-12  # rounding of sums of nine
