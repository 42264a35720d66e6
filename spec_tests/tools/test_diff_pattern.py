"""What a report says a mistake is over, read back: the words name exactly what was spoilt, and nothing is said of noise."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.autograd.tensor import Array
from refimpl.diff import render
from refimpl.diff.compare import Finding
from refimpl.diff.judge import judge
from refimpl.diff.pattern import Scene, pattern
from refimpl.diff.spans import over_layers
from refimpl.diff.subsets import in_words
from refimpl.layers.stage import STAGES, Patch
from refimpl.record import trace_case

from .test_diff_partial import case

LIMIT = 1e-6
WIDTHS = {"B": 2, "S": 12, "T": 12, "H": 4, "Dn": 12, "Dr": 8, "Dv": 10, "C": 20, "E": 16, "G": 4, "K": 4}


def meant(words: str, n: int) -> set[int]:
    """The numbers that words name, of n: every form that there is, read by its pattern."""
    every, at = set(range(n)), [int(i) for i in re.findall(r"\d+", words)]
    if m := re.match(r"(\w+?)s? (\d+)-(\d+) of every (\d+)$", words):
        return {i for i in every if int(m[2]) <= i % int(m[4]) <= int(m[3])}
    if m := re.match(r"every (\d+)(?:st|nd|rd|th) \w+ from (\d+) on$", words):
        return {i for i in every if i % int(m[1]) == int(m[2])}
    if words.split()[0] in ("even", "odd"):
        return {i for i in every if i % 2 == (words[0] == "o")}
    if m := re.match(r"\w+ of blocks ([\d, ]+) of 128$", words):
        return {i for i in every if str(i // 128) in m[1].split(", ")}
    if words.startswith("all"):
        return every - set(at)
    if m := re.match(r"\w+ from (\d+) on", words):
        return every - set(range(int(m[1])))
    if m := re.match(r"\w+ (\d+)-(\d+)", words):
        return set(range(int(m[1]), int(m[2]) + 1))
    if re.match(r"\w+ \d+(, the last)?$", words) or "group" in words or "block " in words:
        return {at[0]}
    assert re.match(r"\w+ \d+(, \d+)+$", words), words
    return set(at)


def a_stretch(n: int, draw: Any) -> set[int]:
    low = draw(st.integers(0, n - 2))
    return set(range(low, draw(st.integers(low + 1, n))))


def every_so_many(n: int, draw: Any) -> set[int]:
    period = draw(st.sampled_from([p for p in range(2, n // 3 + 1) if n % p == 0] or [1]))
    low = draw(st.integers(0, period - 1))
    high = draw(st.integers(low, period - 1))
    return {i for i in range(n) if low <= i % period <= high}


def anything(n: int, draw: Any) -> set[int]:
    return draw(st.sets(st.integers(0, n - 1), max_size=n))


def whole_blocks(n: int, draw: Any) -> set[int]:
    blocks = draw(st.sets(st.integers(0, (n - 1) // 128), max_size=3))
    return {i for i in range(n) if i // 128 in blocks}


@given(
    st.data(),
    st.sampled_from([2, 3, 4, 12, 48, 400]),
    st.sampled_from([a_stretch, every_so_many, anything, whole_blocks]),
)
def test_words_name_what_is_off_and_nothing_else(data: Any, n: int, kind: Any) -> None:
    """Catches a bound that is one off, an offset or a period left out, and a plain stretch or rhythm of which nothing is said."""
    off = kind(n, data.draw)
    words = in_words(np.isin(np.arange(n), list(off)), "head")
    if words:
        assert meant(words, n) == off
    else:
        assert kind is anything or len(off) in (0, n)
    assert not words or "heads" in words or words.startswith("head ") or " head " in words


@pytest.mark.parametrize(
    ("off", "n", "said"),
    [
        ({0, 5}, 10, "heads 0, 5"),  # twice is no rhythm
        ({i for i in range(16) if i % 5}, 16, ""),  # the last of these fives is none
        ({0, 2, 3}, 5, ""),
        (set(range(7)) - {1, 4}, 7, ""),
        (set(range(8)) - {1, 4}, 8, "all heads but 1, 4"),
        (set(range(8)) - {1, 4, 6}, 8, ""),
    ],
)
def test_how_few_are_a_few(off: set[int], n: int, said: str) -> None:
    """Catches a list of most things, a rhythm seen in two of them or in what it does not divide."""
    assert in_words(np.isin(np.arange(n), list(off)), "head") == said


@pytest.mark.parametrize(
    ("low", "end", "n", "said"),
    [
        (0, 24, 48, "channels 0-23, the first half"),
        (24, 48, 48, "channels from 24 on, the second half"),
        (128, 256, 512, "channels 128-255, block 1 of 128"),
        (256, 512, 640, "channels 256-511, blocks 2-3 of 128"),
        (256, 300, 300, "channels from 256 on, block 2 of 128, which has 44"),
        (3, 7, 48, "channels 3-6"),
        (1, 2, 2, "channel 1"),
        (12, 20, 20, "channels from 12 on, the rotated part"),
    ],
)
def test_what_a_stretch_is(low: int, end: int, n: int, said: str) -> None:
    """Catches the wrong half, a block counted from 1, a ragged one taken for whole, a part that is not named."""
    at = np.arange(n)
    assert (
        in_words((low <= at) & (at < end), "channel", parts=[("the rotated part", 12, 20)] if n == 20 else ()) == said
    )


def test_things_that_were_left_out_have_their_own_numbers() -> None:
    """Catches places told where labels are meant, and a rhythm or a half said of what has holes."""
    labels = np.array([2, 3, 5, 8, 9, 11])
    assert in_words(np.array([0, 0, 1, 1, 1, 0], bool), "token", labels) == "tokens 5-9"
    assert in_words(np.array([0, 1, 0, 1, 0, 1], bool), "token", labels) == "tokens 3, 8, 11"
    assert in_words(np.array([0, 0, 0, 1, 1, 1], bool), "token", labels) == "tokens from 8 on"
    assert in_words(np.array([1, 1, 0], bool), "distance", np.array([-2, -1, 0])) == "distances -2 to -1"
    assert in_words(np.arange(12) != 4, "frequency") == "all frequencies but 4"


def scene(stage: str, shape: tuple[int, ...], off: Array, by: float = 0.5, **more: Any) -> Scene:
    """A tap of that shape, right but for roundings, and off where `off` says."""
    rng = np.random.default_rng(0)
    e = rng.standard_normal(shape)
    x = e * (1 + 1e-8 * rng.standard_normal(shape)) + np.where(off, by * rng.standard_normal(shape), 0)
    entries = [np.arange(n) for n in shape]
    widths = WIDTHS | dict(zip(STAGES[stage].shape.split(), shape, strict=True))
    return replace(Scene(STAGES[stage], x, e, entries, None, LIMIT, widths), **more)


Q = (2, 12, 4, 20)
B, S, H, D = np.ix_(*map(np.arange, Q))


@pytest.mark.parametrize(
    ("off", "said"),
    [
        (H == 2, "all of head 2"),
        ((H == 2) & (S >= 5), "all of head 2, tokens from 5 on"),
        ((H % 2 == 1) & (B == 1), "all of sequence 1, odd heads"),
        ((S == 11) & (D >= 12), "all of token 11, the last; there channels from 12 on, the rotated part"),
        (D < 10, "in channels 0-9, the first half"),
        (D % 2 == 0, "in even channels"),
        (S > 0, "all of tokens from 1 on"),
        (S >= 0, ""),
        ((B == 0) & (S == 3) & (H == 1), ""),  # one row, which the note names
        ((B == 0) & (S == 3) & (H == 1) & (D == 7), "in channel 7"),
        ((B == 0) & ((S == 3) | (S == 7)) & (H == 1), ""),  # two rows are in few places whatever they are
        ((H == 1) & ((S + B) % 3 == 0), "only in head 1"),
    ],
)
def test_over_what_a_tap_is_off(off: Array, said: str) -> None:
    """Catches an axis taken for another, `all of` where it is some, channels told of rows that are right, one row told twice."""
    assert pattern(scene("mla.q", Q, np.broadcast_to(off, Q))) == said


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9))
def test_nothing_is_said_of_rows_at_random(seed: int, share: float) -> None:
    """Catches a pattern seen in rows that are off by chance: of 96 rows with no order no axis is told."""
    off = np.random.default_rng(seed).random((2, 12, 4, 1)) < share
    assert not re.search("head|sequence|all of", pattern(scene("mla.q", Q, np.broadcast_to(off, Q))))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8, 96]))
def test_nothing_is_said_of_channels_that_are_right_by_chance(seed: int, rows: int) -> None:
    """Catches channels left out because a few rows happen to be right there: errors of all sizes, a coarse limit."""
    rng, off = np.random.default_rng(seed), np.zeros(96, bool)
    off[rng.choice(96, rows, replace=False)] = True
    s = scene("mla.q", Q, np.broadcast_to(off.reshape(2, 12, 4, 1), Q), by=0.05, limit=1e-2)
    assert "channel" not in pattern(s)


def test_channels_are_told_only_where_the_others_are_right() -> None:
    """Catches channels told that are a little further off than others, or less far off than others that are off as well."""
    s = scene("mla.q", Q, np.ones(Q, bool), limit=1e-2)
    signs, first = np.sign(s.x - s.e) * np.sqrt(np.mean(s.e**2, axis=-1, keepdims=True)), D < 10
    assert pattern(replace(s, x=s.e + signs * np.where(first, 0.1, 9e-3))) == "in channels 0-9, the first half"
    assert pattern(replace(s, x=s.e + signs * np.where(first, 3e-2, 9e-3))) == ""
    assert pattern(replace(s, x=s.e + signs * np.where(first, 1, 2e-2))) == ""


def test_what_does_not_count_is_left_out() -> None:
    """Catches rows in doubt that are told or break a pattern, and a part of a tap told by places instead of by its own numbers."""
    s = scene("mla.q", Q, np.broadcast_to(S >= 6, Q))
    doubt = np.ones((2, 12, 4), bool)
    doubt[:, 8] = False
    x = np.where(S == 8, s.e, s.x)
    assert pattern(replace(s, x=x)) == ""
    assert pattern(replace(s, x=x, settled=doubt)) == "all of tokens from 6 on"
    assert pattern(replace(scene("mla.q", Q, np.broadcast_to(S == 8, Q)), settled=doubt)) == ""
    part = scene("mla.q", (2, 12, 2, 20), np.broadcast_to(H[:, :, :2] == 1, (2, 12, 2, 20)))
    assert pattern(replace(part, entries=[*part.entries[:2], np.array([1, 3]), np.arange(20)])) == "all of head 3"


def test_experts_are_told_by_their_tokens_and_by_their_rows() -> None:
    """Catches an expert whose tokens are a part of another's named beside it, rows counted in the wrong order, and experts named
    that have one token in common with what is off.
    """
    ids = np.array([[[0, 1], [1, 2], [2, 3], [3, 1], [0, 2], [1, 4]], [[5, 6]] * 6])
    widths, members = {"E": 8}, (ids == 1).any(-1)
    s = scene("moe.routed", (2, 6, 20), members[..., None], ids=ids)
    assert pattern(replace(s, widths=s.widths | widths)) == "all tokens of expert 1"  # 4's only token is one of them
    assert pattern(replace(s, widths=s.widths | widths, ids=None)) == ""
    rows = np.sort(ids.ravel())
    s = scene("moe.down", (24, 20), (rows == 2)[:, None], ids=ids)
    assert pattern(replace(s, widths=s.widths | widths)) == "all of expert 2"
    s = scene("moe.routed", (2, 6, 20), (members & (np.arange(6) > 1))[..., None], ids=ids)
    assert "expert" not in pattern(replace(s, widths=s.widths | widths))
    ids = np.arange(12).reshape(2, 6, 1) % 8
    s = scene("moe.routed", (2, 6, 20), ids < 5, ids=ids)
    assert pattern(replace(s, widths=s.widths | widths)) == ""  # of most experts


def test_keys_are_told_by_their_distance() -> None:
    """Catches a sliding window, a query's own key, keys ahead of it told as so many single keys."""
    query, key = np.ogrid[:12, :12]
    for off, said in (
        (query - key >= 4, "all of tokens from 4 on; there keys at distances from 4 on (query - key)"),
        (query == key, "in keys at distance 0 (query - key)"),
        ((query >= key) & (key == 0), "in key 0"),
    ):
        s = scene("mla.scores", (2, 4, 12, 12), np.broadcast_to(off & (query >= key), (2, 4, 12, 12)))
        masked = np.broadcast_to(query < key, s.e.shape)
        assert pattern(replace(s, x=np.where(masked, -np.inf, s.x), e=np.where(masked, -np.inf, s.e))) == said


def test_errors_that_grow() -> None:
    """Catches growth that is not seen, seen the wrong way round, or seen in errors of one size."""
    s = scene("resid", (2, 12, 48), np.ones((2, 12, 48), bool))
    slope = np.linspace(0.01, 1, 12)[:, None]
    assert pattern(replace(s, x=s.e + slope * (s.x - s.e))) == "more from token to token"
    assert pattern(replace(s, x=s.e + slope[::-1] * (s.x - s.e))) == "less from token to token"
    rough = np.array([1, 2, 3, 90, 80, 70, 60, 50, 40, 100, 110, 120])[:, None]
    assert pattern(replace(s, x=s.e + rough * (s.x - s.e))) == ""
    assert pattern(s) == ""


def test_right_or_wrong() -> None:
    """Catches sets compared slot by slot, and experts that nobody chose among those of which something is said."""
    e = np.broadcast_to(np.arange(4), (2, 12, 4))
    x = np.where((e == 2) & (np.arange(12) > 7)[:, None], 9, e)[..., ::-1]
    base = scene("router.ids", e.shape, np.zeros(e.shape, bool), limit=0.0)
    assert pattern(replace(base, x=x, e=e)) == "all of tokens from 8 on; there experts 2, 9"
    assert pattern(replace(base, x=np.where(e > 1, e + 6, e), e=e)) == ""  # four of six that were chosen
    counts = scene("router.counts", (16,), np.zeros(16, bool), limit=0.0)
    assert pattern(replace(counts, x=counts.e + (np.arange(16) == 5))) == "in expert 5"


def _spoilt(f: Any, **where: int) -> Any:
    def stage(*args: Any, **static: Any) -> Any:
        out = np.array(f(*args, **static))
        out[:, :, where["head"]] *= 1 + 0.1 * np.random.default_rng(0).standard_normal(out.shape[-1])
        return out

    return stage


def test_the_report_says_it() -> None:
    """Catches a pattern that is computed and not shown, of another array than the one that was judged."""
    bug = trace_case(case(), patches=[Patch("mla.q", _spoilt(STAGES["mla.q"].fn, head=2))])
    text = render(judge(case(), bug))
    assert "48 of 192 rows affected: all of head 2" in text and "mla.q in L0-L2 (all layers compared)" in text


def _f(tap: str, *, ok: bool = False, **more: Any) -> Finding:
    return Finding(tap, tap.rpartition("/")[2], ok, 1.0, **more)


def test_over_layers() -> None:
    """Catches dense layers taken for the others, layers that were not compared counted, and what the numbers tell said again."""
    routed = [_f(f"fwd/L{i}/moe.routed", ok=True) for i in range(3, 9)]
    norms = [_f(f"fwd/L{i}/attn_norm") for i in range(9)]

    def said(*wrong: int) -> str:
        findings = [replace(f, ok=i not in wrong) for i, f in enumerate(norms)] + routed
        return over_layers([f for f in findings if not f.ok], findings)

    assert said(*range(9)) == "all layers compared"
    assert said(*range(3)) == "the dense layers alone"
    assert said(*range(3, 9)) == "the MoE layers alone"
    assert said(1, 3, 5, 7) == "odd layers" and said(0, 3, 6) == "every 3rd layer from 0 on"
    assert said(4) == said(2, 3) == said(1, 2, 8) == ""
    assert over_layers([_f("fwd/logits")], [_f("fwd/logits")]) == ""
    assert (
        over_layers([norms[0], norms[2]], [norms[0], replace(norms[1], open=True), norms[2]]) == "all layers compared"
    )
    assert over_layers(norms[1:4:2], [replace(f, ok=not i % 2) for i, f in enumerate(norms)][1:5]) == ""
    assert over_layers([_f("fwd/mtp1/attn_norm")], norms) == over_layers(norms[:1], norms[:1]) == ""
