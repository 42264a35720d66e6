"""Padding of a prompt: engines that have none are judged all the same, and what is held there is not looked at."""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest

from refimpl.diff import Case, Trace, render
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.dims import Sizes
from refimpl.diff.judge import judge
from refimpl.diff.padding import Padding, filled
from refimpl.layers.stage import STAGES, Call, Patch
from refimpl.record import trace_case

from .test_diff_partial import TINY

VALID = np.array([[0] * 5 + [1] * 19, [1] * 20 + [0] * 4], bool)
ENGINE = "attn_norm ffn_norm mla.q mla.c_kv mla.q_rope mla.k_rope mla.ctx attn_out resid_mid resid router.logits router.weights "
ENGINE += "router.ids moe.routed moe.shared ffn_out logits"


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The committed case, with padding in front of its first sequence and behind its second."""
    folder = tmp_path_factory.mktemp("padded") / "case"
    shutil.copytree(TINY, folder)
    run = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(run | {"valid": VALID.astype(int).tolist()}))
    return Case.read(folder)


@functools.cache
def ran(path, id=None):
    patches = [Patch(MUTANTS[id].stage, MUTANTS[id].fn)] if id else []
    return trace_case(Case.read(path), patches=patches)


def judged(case, change, id=None, keep=lambda t: True):
    trace = ran(case.path, id)
    taps = {t: change(t, np.asarray(a)) for t, a in trace.taps.items() if keep(t)}
    return judge(case, Trace(dataclasses.replace(trace.header, expected=[]), taps))


def packed(tap, a):
    """The real tokens one behind the other; scores of single sequences stay as they are."""
    if tap.endswith("rope_tables"):
        return a[:, VALID]
    return a[VALID] if a.shape[:2] == VALID.shape else a


def spoiled(tap, a):
    """NaN in every row of padding, no expert."""
    if tap.endswith(("mla.scores", "mla.probs")):  # B H S T
        return np.where(VALID[:, None, :, None], a, 0.5).astype(a.dtype)
    if tap.endswith("rope_tables"):
        return np.where(VALID[..., None], a, np.nan).astype(a.dtype)
    if a.shape[:2] != VALID.shape:
        return a
    here = ~VALID.reshape(*VALID.shape, *[1] * (a.ndim - 2))
    return np.where(here, -1 if a.dtype.kind in "iu" else np.nan, a).astype(a.dtype)


def filled_to(rows):
    """The real tokens one behind the other, then rows of nothing, up to so many."""

    def change(tap, a):
        if tap.endswith("rope_tables"):
            return garbage(packed(tap, a).swapaxes(0, 1), rows).swapaxes(0, 1)
        return garbage(packed(tap, a), rows) if a.shape[:2] == VALID.shape else a

    return change


def garbage(a, rows):
    """a with rows behind it that no token, and no expert, could have."""
    behind = np.full((rows - len(a), *a.shape[1:]), -1 if a.dtype.kind in "iu" else np.nan, a.dtype)
    behind[::2] = 99
    return np.concatenate([a, behind])


def engine(tap):
    return tap.rpartition("/")[2] in ENGINE.split()


@pytest.mark.parametrize("keep", [lambda t: True, engine], ids=["all", "engine"])
@pytest.mark.parametrize("change", [packed, spoiled])
def test_padding_is_nobodys_business(padded, change, keep):
    """Catches a serving engine, which has no padding, called another shape at every tap; and -1 or NaN in padding called a bug."""
    judgement = judged(padded, change, keep=keep)
    assert judgement.verdict in ("CONFORMS", "INCONCLUSIVE") and not judgement.culprits, render(judgement)
    said = "without padding: put in their places" if change is packed else "padding is sent to no expert"
    assert said in render(judgement)


@pytest.mark.parametrize("rows", [40, 48, *[pytest.param(n, marks=pytest.mark.slow) for n in (64, 128)]])
@pytest.mark.parametrize("keep", [pytest.param(lambda t: True, marks=pytest.mark.slow), engine], ids=["all", "engine"])
def test_packed_tokens_may_be_filled_up_to_a_multiple(padded, rows, keep):
    """Catches an engine that runs 39 tokens as 40, 48 (which is as many as tokens and padding), 64 or 128 rows."""
    judgement = judged(padded, filled_to(rows), keep=keep)
    assert judgement.verdict in ("CONFORMS", "INCONCLUSIVE") and not judgement.culprits, render(judgement)
    assert "then rows of no token: put in their places" in render(judgement)


@pytest.mark.parametrize("rows", [48, *[pytest.param(n, marks=pytest.mark.slow) for n in (40, 128)]])
def test_a_bug_is_named_behind_rows_of_no_token(padded, rows):
    """Catches rows that are cut where tokens are, and a reading chosen for a bug."""
    judgement = judged(padded, filled_to(rows), "R07", keep=engine)
    assert [d.id for d in judgement.causes] == ["R07"], render(judgement)
    assert {f.stage for f in judgement.culprits} == {MUTANTS["R07"].stage}


@pytest.mark.parametrize("at", [pytest.param((0, 5), marks=pytest.mark.slow), (1, 19)])
def test_the_first_and_the_last_token_count_among_filled_up_rows(padded, at):
    """Catches a cut that is a row too short, or begins in padding."""

    def wrong(tap, a):
        a = np.array(a)
        if tap == "fwd/logits":
            a[at][2] += 1
        return filled_to(48)(tap, a)

    assert [f.tap for f in judged(padded, wrong).culprits] == ["fwd/logits"]


@pytest.mark.parametrize("change", [packed, pytest.param(spoiled, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "id", ["R07", pytest.param("A04", marks=pytest.mark.slow), pytest.param("R04", marks=pytest.mark.slow)]
)
def test_a_bug_is_found_and_named_all_the_same(padded, change, id):
    """Catches rows of padding that no mistake reproduces, and real rows that go unseen with them."""
    judgement = judged(padded, change, id)
    assert {f.stage for f in judgement.culprits} == {MUTANTS[id].stage}, render(judgement)
    assert [d.id for d in judgement.causes] == [id], render(judgement)


@pytest.mark.parametrize("at", [(0, 3), (0, 5), (1, 0), (1, 19), (1, 20)])
def test_one_number_counts_where_there_is_a_token(padded, at):
    """Catches padding that is one row too wide, or of all sequences."""

    def wrong(tap, a):
        a = np.array(a)
        if tap == "fwd/logits":
            a[at][2] += 1
        return a

    assert [f.tap for f in judged(padded, wrong).culprits] == (["fwd/logits"] if VALID[at] else [])


def test_a_token_that_no_expert_gets_is_a_bug(padded):
    """Catches -1 for a real token, excused as if it were padding."""

    def lost(tap, a):
        a = np.array(spoiled(tap, a))
        if tap == "fwd/L1/router.ids":
            a[1, 2, 0] = -1
        return a

    assert "fwd/L1/router.ids" in {f.tap for f in judged(padded, lost, keep=engine).culprits}


@pytest.mark.parametrize("stage", ["resid", "mla.q", "mla.scores", "mla.k_rope", "moe.rows", "router.bias_update"])
def test_rows_of_padding_are_filled_and_no_others(stage):
    """Catches another token's row, or head's, taken for padding, where sizes do not tell axes apart. Oracle: a loop."""
    axes, rng = STAGES[stage].shape.split(), np.random.default_rng(0)
    padding = np.array([[1, 0], [0, 0]], bool)
    x, like = rng.random((2, *([2] * len(axes))))
    whole, at = x.copy(), [axes.index(a) for a in ("B", "S" if "S" in axes else "T") if a in axes]
    for i in np.ndindex(x.shape) if len(at) == 2 else ():
        whole[i] = like[i] if padding[i[at[0]], i[at[1]]] else x[i]
    call = Call(stage, f"fwd/L0/{stage}", (), {})
    padded = Padding(padding, Sizes.whole(2, 2))
    np.testing.assert_array_equal(filled(call, x, like, padded), whole)
    assert filled(call, x, like, None) is x and filled(call, x[..., :1], like, padded).shape[-1] == 1


def test_padding_that_is_seen_by_tokens_is_still_a_bug(padded):
    """Catches a mask that lets tokens see padding, excused as being about padding."""
    judgement = judged(padded, lambda t, a: a, "A17g")
    assert {f.stage for f in judgement.culprits} == {"mask"} and [d.id for d in judgement.causes] == ["A17g"], render(
        judgement
    )


def test_positions_counted_through_padding_are_explained(padded):
    """Catches positions that count the padding in front blamed on anything but the tables, or rotated q and k, or without the word
    that scores stay. Oracle: the same scores, where a query and its key are tokens, of the run and of ours.
    """
    valid = VALID[0]
    seen = valid[:, None] & valid & np.tri(24, dtype=bool)
    scores = [np.asarray(ran(padded.path, id).taps["fwd/L1/mla.scores"])[0][:, seen] for id in (None, "X24")]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=2e-5)  # float32 of scores up to 30
    tables = judged(padded, lambda t, a: a, "X24")
    assert {f.tap for f in tables.culprits} == {"fwd/mla.rope_tables"}
    without = judged(padded, lambda t, a: a, "X24", lambda t: not t.endswith("rope_tables"))
    assert {f.stage for f in without.culprits} == {"mla.q_rope", "mla.k_rope"}
    for judgement in (tables, without):
        assert "scores stay where all of a sequence's are off alike (X24)" in render(judgement)
