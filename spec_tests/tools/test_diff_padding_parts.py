"""Padding in a run in parts, in dispatched rows and in MTP modules: each tap has its own stretch of it, which nobody looks at."""

import dataclasses
import functools

import numpy as np
import pytest

from refimpl.diff import Case, Trace, render
from refimpl.diff.dims import Sizes
from refimpl.diff.judge import judge
from refimpl.diff.padding import Padding, may_be_packed
from refimpl.layers import PRESETS
from refimpl.layers.stage import STAGES, Call, Patch, tap_name
from refimpl.model.phases import parts_of
from refimpl.record import new_case, trace_case

from .test_diff_partial import case, drawn

VALID = np.array([[0] * 7 + [1] * 17, [1] * 19 + [0] * 5], bool)
WHOLE, TWO, STEP = ("fwd",), ("fwd", "dec12"), ("fwd", "dec5", "dec6")
ENGINE = (
    "attn_norm ffn_norm mla.q mla.c_kv attn_out resid_mid resid router.weights router.ids moe.routed ffn_out logits"
)


def padded():
    return dataclasses.replace(case(), valid=VALID.astype(int).tolist())


@functools.cache
def ran(phases, careless=False):
    """A candidate; a careless one whose padding holds random embeddings, and whose queries without keys weigh all alike."""
    rng = np.random.default_rng(0)

    def here():
        return stretch(tap_name(STAGES["embed"]), phases)

    def embed(*args):
        y = np.array(STAGES["embed"].fn(*args))
        y[~here()] = rng.standard_normal(y[~here()].shape)
        return y

    def probs(scores):
        y = np.array(STAGES["mla.probs"].fn(scores))
        rows = ~stretch(tap_name(STAGES["mla.probs"]), phases)
        return np.where(rows[:, None, :, None], np.asarray(1 / y.shape[-1], y.dtype), y)

    patches = [Patch("embed", embed), Patch("mla.probs", probs)] if careless else []
    with np.errstate(all="ignore"):
        return trace_case(padded(), phases=phases, patches=patches)


def bounds(tap, phases):
    starts = {name: int(name.removeprefix("dec")) if name != "fwd" else 0 for name in phases}
    start = starts[tap.partition("/")[0]]
    return start, min([s for s in starts.values() if s > start], default=24)


def stretch(tap, phases, keys=False):
    """The valid tokens that a tap has rows of."""
    start, stop = bounds(tap, phases)
    return VALID[:, 0 if keys else start : stop]


def places(tap, phases):
    """Every (row, is it of a token) of a tap, one after the other."""
    (axes,) = {s.shape for s in STAGES.values() if tap.endswith(f"/{s.tap}")}
    axes = axes.split()
    column = next((i for i, a in enumerate(axes) if a in ("S", "T")), None)
    if axes[0] == "M" or column is None or "1" in axes or len(axes) < 3:
        return
    real, sequence = stretch(tap, phases, axes[column] == "T"), axes.index("B")
    for b, s in np.ndindex(real.shape):
        at = [slice(None)] * (column + 1)
        at[sequence], at[column] = b, s
        yield tuple(at), real[b, s]


def judged(trace, taps, keep=lambda t: True):
    return judge(
        padded(), Trace(dataclasses.replace(trace.header, expected=[]), {t: a for t, a in taps.items() if keep(t)})
    )


@pytest.mark.parametrize("phases", [WHOLE, TWO, STEP], ids=["whole", "two", "step"])
def test_padding_holds_what_it_likes_in_every_part(phases):
    """Catches padding that is looked for in taps of the whole run only, and a cache of which the new tokens alone have any."""
    rng, taps = np.random.default_rng(0), {}
    for tap, a in ran(phases).taps.items():
        taps[tap] = x = np.array(a)
        for at, real in places(tap, phases):
            if not real and x.dtype.kind == "f":
                x[at] = rng.standard_normal(x[at].shape)
    assert sum(not np.array_equal(x, ran(phases).taps[t], equal_nan=True) for t, x in taps.items()) > 60 * len(phases)
    judgement = judged(ran(phases), taps)
    assert judgement.verdict == "CONFORMS" and not judgement.culprits, render(judgement)


@pytest.mark.parametrize(
    ("tap", "at"),
    [
        *[("fwd/logits", at) for at in ((0, 6), (0, 7))],
        *[("dec12/L1/attn_out", at) for at in ((1, 6), (1, 7))],
        *[("dec12/L1/cache.c_kv", at) for at in ((0, 6), (0, 7), (1, 19))],
        *[pytest.param("fwd/logits", at, marks=pytest.mark.slow) for at in ((0, 11), (1, 11))],
        pytest.param("dec12/L1/attn_out", (0, 0), marks=pytest.mark.slow),
        pytest.param("dec12/L1/cache.c_kv", (1, 18), marks=pytest.mark.slow),
    ],
)
def test_one_number_counts_where_a_part_has_a_token(tap, at):
    """Catches another part's stretch, one that is a token too wide, and keys counted from where the queries begin."""
    taps = dict(ran(TWO).taps)
    taps[tap] = x = np.array(taps[tap])
    x[at][2] += 1
    blamed = {f.tap for f in judged(ran(TWO), taps).culprits}
    assert (tap in blamed) == stretch(tap, TWO, "cache" in tap)[at], blamed


@pytest.mark.parametrize(
    ("tap", "ids"), [("fwd/L1/moe.rows", True), ("dec12/L2/moe.down", True), ("fwd/L1/moe.rows", False)]
)
def test_a_dispatched_row_counts_where_it_is_of_a_token(tap, ids):
    """Catches rows of padding that are judged, real ones that are not, and another order of them, with or without ids in the
    trace. Oracle: expert by expert.
    """
    trace, real, rows = ran(TWO), stretch(tap, TWO), []
    chosen = trace.taps[tap.rpartition("/")[0] + "/router.ids"]
    for expert in range(case().config.n_routed_experts):
        rows += [real[at[:2]] for at in np.ndindex(chosen.shape) if chosen[at] == expert]
    assert len(rows) == len(trace.taps[tap])
    for kind in (False, True):
        x, at = np.array(trace.taps[tap]), rows.index(kind)
        x[[i for i, r in enumerate(rows) if not r] if not kind else at] *= -2
        taps = trace.taps | {tap: x}
        blamed = {f.tap for f in judged(trace, taps, lambda t: ids or not t.endswith("router.ids")).culprits}
        assert (tap in blamed) == kind, blamed


@pytest.mark.parametrize("unseen", [("mla.", "attn_out", "resid", "ffn_norm"), ("embed", "resid", "ffn_norm")])
@pytest.mark.parametrize("phases", [WHOLE, TWO], ids=["whole", "two"])
def test_rows_of_padding_may_lie_among_any_experts(phases, unseen):
    """Catches rows counted off by experts that padding has in our run and not in the candidate's, of which there are no ids."""
    trace = ran(phases, careless=True)
    judgement = judged(trace, trace.taps, lambda t: not t.rpartition("/")[2].startswith((*unseen, "router.")))
    assert not judgement.culprits, render(judgement)
    assert any(f.stage == "moe.routed" and f.open for f in judgement.findings)


@pytest.mark.parametrize("seed", [0, 1, *[pytest.param(s, marks=pytest.mark.slow) for s in range(2, 25)]])
@pytest.mark.parametrize("phases", [WHOLE, STEP])
def test_no_part_of_a_careless_run_is_called_wrong(phases, seed):
    """Catches a tap whose padding is judged because something else of it was not recorded."""
    judgement = judge(padded(), drawn(ran(phases, careless=True), seed, (0.9, 0.6, 0.3)[seed % 3]))
    assert not judgement.culprits, render(judgement)


def test_a_part_may_be_packed():
    """Catches chunks of tokens without padding, as serving engines run them, called another shape."""
    trace, taps = ran(TWO), {}
    for tap, a in trace.taps.items():
        real = stretch(tap, TWO)
        taps[tap] = a[real] if tap.rpartition("/")[2] in ENGINE.split() else a
    judgement = judged(trace, taps, lambda t: t.rpartition("/")[2] in ENGINE.split())
    assert not judgement.culprits and "without padding: put in their places" in render(judgement), render(judgement)
    x = taps["dec12/L1/ffn_out"]
    x[-1, 3] += 1
    assert "dec12/L1/ffn_out" in {f.tap for f in judged(trace, taps, lambda t: t in taps and "/L1/f" in t).culprits}


def test_a_part_with_as_many_rows_as_tokens_may_be_packed():
    """Catches rows counted against the tokens of the whole run."""
    padding = Padding(~VALID, Sizes(2, parts_of(TWO, 24)))
    for rows, known in (((2, 12), False), ((24, 5), True), ((23, 5), False)):
        assert may_be_packed({"dec12/L1/resid": np.zeros(rows)}, padding) == known
    assert not may_be_packed({"dec12/L1/resid": np.zeros((24, 5))}, None)


@pytest.mark.parametrize(
    ("stage", "tap", "columns"),
    [
        ("mtp.proj", "fwd/mtp1/proj", range(11)),
        ("attn_out", "fwd/mtp2/attn_out", range(10)),
        ("mla.kv_b", "dec12/L1/mla.kv_b", range(24)),
        ("cache.c_kv", "dec12/mtp1/cache.c_kv", range(23)),
        ("mla.scores", "dec12/mtp1/mla.scores", range(12, 23)),
        ("moe.rows", "fwd/L1/moe.rows", None),
        ("cache.positions", "dec12/cache.positions", None),
    ],
)
def test_a_tap_has_the_padding_of_its_columns(stage, tap, columns):
    """Catches an MTP module's tokens counted as the model's: module k has k fewer. Arrays with a number a token have no rows."""
    found = Padding(~VALID, Sizes(2, parts_of(TWO, 24))).at(Call(stage, tap, (), {}))
    assert found is None if columns is None else found.tolist() == [[not VALID[b, s] for s in columns] for b in (0, 1)]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("padded") / "mtp"
    config = PRESETS["tiny"].replace(num_nextn_predict_layers=1)
    c = Case.read(new_case(folder, config, seed=1, length=12, margin=0, mtp=True))
    return dataclasses.replace(c, valid=[[0] * 3 + [1] * 9, [1] * 10 + [0] * 2])


@pytest.mark.slow
def test_an_mtp_module_has_padding_too(module):
    """Catches rows of padding judged where a module has a token fewer, and its rows of tokens passed over."""
    trace = trace_case(module)
    for places, real in ((((0, 2), (1, 10)), False), (((0, 3), (1, 9)), True)):
        taps = {tap: np.array(trace.taps[tap]) for tap in ("fwd/mtp1/proj", "fwd/mtp1/attn_out")}
        for x, at in zip(taps.values(), places, strict=True):
            x[at] *= -2
        blamed = {f.tap for f in judge(module, Trace(trace.header, trace.taps | taps)).culprits}
        assert taps.keys() <= blamed if real else not blamed, blamed
