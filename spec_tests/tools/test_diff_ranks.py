"""Traces of many ranks: put together by the marks in their dims, replicas compared, what cannot be one run refused.

The shards are cut by hand with NumPy from one whole trace, which is the oracle.
"""

import dataclasses
from functools import partial

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.diff import Case, Trace, render
from refimpl.diff.header import read_file
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import observing, tap_name
from refimpl.model import ForCausalLM, effective
from refimpl.parallel_emulation import axes
from refimpl.parallel_emulation.axes.placed import Placed, placed
from refimpl.parallel_emulation.comm import spmd
from refimpl.record import new_case, trace_case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case.read(new_case(tmp_path_factory.mktemp("case"), PRESETS["tiny"], seed=1, length=16, margin=0.1))


@pytest.fixture(scope="module", params=["float32", "bf16"])
def whole(case, request):
    return trace_case(case, precision=request.param)


@pytest.fixture(scope="module")
def plain(case):
    return trace_case(case)


def write(folder, trace, number, at, taps=None, dims=None, **header):
    """The file of one rank: at, axis -> (coordinate, size)."""
    ranks = {"ranks": header.pop("ranks")} if "ranks" in header else {}
    parallel = {"rank": number, "axes": {a: list(pair) for a, pair in at.items()}} | ranks
    taps = dict(trace.taps if taps is None else taps)
    told = {t: d for t, d in (trace.header.dims | (dims or {})).items() if t in taps}
    header = {"parallel": parallel, "dims": told} | header
    folder.mkdir(exist_ok=True)
    path = folder / f"r{number}.safetensors"
    Trace(dataclasses.replace(trace.header, **header), taps).write(path)
    return path


def assert_same(found, trace):
    """Bit for bit the taps, and the header but for the order of what was expected."""
    assert set(found.taps) == set(trace.taps)
    for tap, a in trace.taps.items():
        got = np.asarray(found.taps[tap])
        assert got.dtype == a.dtype and got.shape == a.shape, tap
        np.testing.assert_array_equal(got.astype(np.float64), a.astype(np.float64), err_msg=tap)
    assert found.header == trace.header


def gate(judgement):
    return next(g for g in judgement.gates if g.name == "ranks")


HEADS = {  # three ranks for the four heads of tiny: 2, 1, 1
    "mla.q": ("B S H@tp Dn+Dr", [np.s_[:, :, :2], np.s_[:, :, 2:3], np.s_[:, :, 3:]]),
    "mla.q_rope": ("B S H@tp Dr", [np.s_[:, :, :2], np.s_[:, :, 2:3], np.s_[:, :, 3:]]),
    "mla.kv_b": ("B T H@tp Dn+Dv", [np.s_[:, :, :2], np.s_[:, :, 2:3], np.s_[:, :, 3:]]),
    "mla.scores": ("B H@tp S T", [np.s_[:, :2], np.s_[:, 2:3], np.s_[:, 3:]]),
    "mla.probs": ("B H@tp S T", [np.s_[:, :2], np.s_[:, 2:3], np.s_[:, 3:]]),
    "mla.ctx": ("B S H@tp Dv", [np.s_[:, :, :2], np.s_[:, :, 2:3], np.s_[:, :, 3:]]),
    "mlp.gate": ("B S F@tp", [np.s_[:, :, :50], np.s_[:, :, 50:70], np.s_[:, :, 70:]]),
    "mlp.up": ("B S F@tp", [np.s_[:, :, :50], np.s_[:, :, 50:70], np.s_[:, :, 70:]]),
    "logits": ("B S V@tp", [np.s_[:, :, :60], np.s_[:, :, 60:61], np.s_[:, :, 61:]]),
}
SUMS = {"attn_out": [0.25, 0.5, 0.25], "moe.routed": [0.5, 0.25, 0.25]}
"""Share of the whole that each rank has of a sum: powers of two, so nothing is rounded."""


def tensor_parallel(folder, trace, change=lambda rank, taps: None):
    """Heads, channels and vocabulary unevenly over three ranks, two kinds of taps before their all-reduce."""
    last = {t: t.rpartition("/")[2] for t in trace.taps}
    for rank in range(3):
        taps, dims = {}, {}
        for tap, name in last.items():
            a = np.asarray(trace.taps[tap])
            if name in HEADS:
                dims[tap], cuts = HEADS[name]
                a = a[cuts[rank]]
            elif name in SUMS:
                dims[tap], a = "B S D +tp", (a.astype(np.float32) * SUMS[name][rank]).astype(a.dtype)
            taps[tap] = a
        change(rank, taps)
        write(folder, trace, rank, {"tp": (rank, 3)}, taps, dims)
    return folder


def test_tensor_parallel(case, whole, tmp_path):
    """Catches parts joined along another axis or in another order, even shares assumed, a sum taken as a replica or as a mean,
    a sum of bfloat16 that becomes float32, and marks left in dims.
    """
    found = Trace.read(tensor_parallel(tmp_path, whole))
    assert_same(found, whole)
    judgement = judge(case, found)
    assert judgement.verdict == "CONFORMS", render(judgement)
    n = sum(t.rpartition("/")[2] in {**HEADS, **SUMS} for t in whole.taps)
    assert (
        gate(judgement).text == f"3 ranks: {n} taps put together, {len(whole.taps) - n} agree between ranks bit for bit"
    )


def test_data_and_sequence_parallel(case, whole, tmp_path):
    """Catches axes put together in another order than outermost first: sequences over dp, their tokens unevenly over sp, in
    arrays with both axes and in flattened ones; and files taken in the order of their names.
    """
    spans = [slice(0, 11), slice(11, 16)]
    for dp in range(2):
        for sp in range(2):
            taps, dims = {}, {}
            for tap, a in whole.taps.items():
                a, name = np.asarray(a), tap.rpartition("/")[2]
                if name in ("resid", "attn_norm", "router.ids"):
                    rest = {"router.ids": "K"}.get(name, "D")
                    dims[tap], a = f"B@dp S@sp {rest}", a[dp : dp + 1, spans[sp]]
                elif name == "router.scores":
                    dims[tap], a = "N@dp@sp E", a[dp, spans[sp]]
                elif whole.header.dims[tap].startswith("B "):
                    dims[tap], a = whole.header.dims[tap].replace("B ", "B@dp ", 1), a[dp : dp + 1]
                taps[tap] = a
            write(tmp_path, whole, 3 - 2 * dp - sp, {"sp": (sp, 2), "dp": (dp, 2)}, taps, dims)
    found = Trace.read(tmp_path)
    assert found.header.dims["fwd/L1/router.scores"] == "N E"
    flat = {t: a.reshape(-1, a.shape[-1]) if t.endswith("router.scores") else a for t, a in whole.taps.items()}
    told = {t: "N E" for t in flat if t.endswith("router.scores")}
    assert_same(found, Trace(dataclasses.replace(whole.header, dims=whole.header.dims | told), flat))
    assert judge(case, found).verdict == "CONFORMS"


def test_expert_parallel_over_the_ranks_of_dp(case, whole, tmp_path):
    """Catches axes that must be independent: experts live on the ranks of dp, dispatched rows follow their experts, and counts
    are of each rank's own tokens.
    """
    for rank in range(2):
        taps, dims = {}, {}
        for tap, a in whole.taps.items():
            unit, _, name = tap.rpartition("/")
            a = np.asarray(a)
            if name in ("moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down"):
                ids = np.asarray(whole.taps[f"{unit}/router.ids"])
                first = sum(1 for e in ids.ravel().tolist() if e < 8)
                assert 0 < first < len(a) and 2 * first != len(a)  # uneven, or it would prove less
                dims[tap] = whole.header.dims[tap].replace("M", "M@ep")
                a = a[:first] if rank == 0 else a[first:]
            elif whole.header.dims[tap].startswith("B "):
                dims[tap], a = whole.header.dims[tap].replace("B ", "B@dp ", 1), a[rank : rank + 1]
            taps[tap] = a
        for tap in [t for t in taps if t.endswith("router.ids")]:
            taps[f"{tap}.counted"] = np.bincount(taps[tap].ravel(), minlength=16)
            dims[f"{tap}.counted"] = "E +dp"
        write(tmp_path, whole, rank, {"dp": (rank, 2), "ep": (rank, 2)}, taps, dims, ranks=2)
    found = Trace.read(tmp_path)
    ids = np.asarray(whole.taps["fwd/L1/router.ids"]).ravel().tolist()
    assert np.asarray(found.taps["fwd/L1/router.ids.counted"]).tolist() == [ids.count(e) for e in range(16)]
    taps = {t: a for t, a in found.taps.items() if not t.endswith(".counted")}
    dims = {t: d for t, d in found.header.dims.items() if not t.endswith(".counted")}
    assert_same(Trace(dataclasses.replace(found.header, dims=dims), taps), whole)


def test_pipeline_stages_and_gathered_taps(case, plain, tmp_path):
    """Catches a tap that must be on every rank: layers belong to one stage of pp, logits were gathered on one rank; digests and
    what was expected are those of each rank's own layers.
    """
    for pp in range(2):
        mine = {t for t in plain.taps if (t.split("/")[1] in ("L2", "final_norm", "logits")) == bool(pp)}
        for tp in range(2):
            kept = {t for t in mine if not (tp and t.endswith("/logits"))}
            dims = {t: "N (H@tp Dv)" for t in mine if t.endswith("mla.ctx")}
            taps = {t: np.asarray(a) for t, a in plain.taps.items() if t in kept}
            taps |= {t: taps[t][:, :, 2 * tp : 2 * tp + 2].reshape(32, -1) for t in dims}
            digests = {n: d for n, d in plain.header.weights.items() if (".layers.2." in n) == bool(pp)}
            at = {"pp": (pp, 2), "tp": (tp, 2)}
            write(tmp_path, plain, 2 * pp + tp, at, taps, dims, expected=sorted(kept), weights=digests)
    found = Trace.read(tmp_path)
    assert set(found.taps) == set(plain.taps) and found.header.expected == plain.header.expected
    ctx = np.asarray(plain.taps["fwd/L1/mla.ctx"])
    np.testing.assert_array_equal(np.asarray(found.taps["fwd/L1/mla.ctx"]), ctx.reshape(32, -1))
    judgement = judge(case, found)
    assert judgement.verdict == "CONFORMS", render(judgement)


def test_a_training_step(case, tmp_path):
    """Catches gradients by weight that cannot be summed over dp or split over tp, and losses, which have no axis."""
    trace = trace_case(case, training={"mtp_weight": 0.0, "aux_weight": 0.01, "gamma": 0.001})
    split, summed = "grad/model.layers.1.self_attn.o_proj.weight", "grad/model.norm.weight"
    for rank in range(4):
        tp, dp = rank % 2, rank // 2
        taps = {t: np.asarray(a) for t, a in trace.taps.items()}
        taps[summed] = taps[summed] * np.float32(0.75 if dp else 0.25)
        taps[split] = taps[split][:, 30:] if tp else taps[split][:, :30]
        if tp and dp:
            taps["fwd/loss.total"] = taps["fwd/loss.total"] * np.float32(2)
            taps[summed] = taps[summed] * np.float32(2)
        dims = {split: "D F@tp", summed: "D +dp"}
        write(tmp_path, trace, rank, {"tp": (tp, 2), "dp": (dp, 2)}, taps, dims)
    found = Trace.read(tmp_path)
    for tap, a in trace.taps.items():
        np.testing.assert_array_equal(np.asarray(found.taps[tap]), a, err_msg=tap)
    judgement = judge(case, found)
    assert not judgement.culprits, render(judgement)
    loss, gradient = gate(judgement).details
    assert loss.startswith("fwd/loss.total differs between ranks 0 and 3: worst row [] by 1.0e+00")
    assert gradient.startswith(f"{summed} differs between tp ranks 0 and 1 (at dp 1): worst row [] by 1.0e+00")


# ---- Replicas


def off(tap, by, on=2):
    """A change of one rank's tap: every element times 1 + by."""

    def change(rank, taps):
        if rank == on:
            taps[tap] = (taps[tap] * np.float32(1 + by)).astype(taps[tap].dtype)

    return change


def test_ranks_that_disagree_are_a_finding(case, whole, tmp_path):
    """Catches a rank that left the run unseen because another one counts, one blamed on the mathematics, and taps told in
    another order than the model's.
    """

    def change(rank, taps):
        for tap in ("fwd/L2/attn_norm", "fwd/L1/resid", "fwd/L1/router.scores"):
            off(tap, 0.25)(rank, taps)

    judgement = judge(case, Trace.read(tensor_parallel(tmp_path, whole, change)))
    found = gate(judgement)
    assert found.state == "FAIL" and judgement.verdict == "DIVERGES" and not judgement.culprits
    assert found.text.startswith("fwd/L1/router.scores differs between tp ranks 0 and 2: worst row [")
    assert found.text.endswith("these ranks were meant to hold the same; and 2 more taps")
    assert [d.split()[0] for d in found.details] == ["fwd/L1/router.scores", "fwd/L1/resid", "fwd/L2/attn_norm"]


def test_rank_0_counts(case, plain, tmp_path):
    """Catches the replay fed by another rank than the lowest: what is wrong on rank 0 is wrong in the run as well."""
    folder = tensor_parallel(tmp_path, plain, off("fwd/L1/resid", 0.25, on=0))
    (folder / "r0.safetensors").rename(folder / "z.safetensors")  # ranks are told by their headers
    judgement = judge(case, Trace.read(folder))
    assert "fwd/L1/resid" in {f.tap for f in judgement.culprits}
    assert gate(judgement).text.startswith("fwd/L1/resid differs between tp ranks 0 and 1, 2: ")


@pytest.mark.parametrize(("roundoffs", "state"), [(3, "ok"), (30, "FAIL")])
@pytest.mark.parametrize("tap", ["fwd/L0/resid", "fwd/L1/router.logits"])
def test_replicas_may_differ_by_rounding(case, whole, tmp_path, tap, roundoffs, state):
    """Catches a bound that asks for equal bits, or none: 8 units of roundoff, 2^-24 in float32 and 2^-9 in bfloat16, in which
    router logits are kept in float32 and yet follow what is rounded to bfloat16.
    """
    assert whole.taps["fwd/L1/router.logits"].dtype == np.float32
    half = whole.taps["fwd/L0/resid"].dtype != np.float32
    shift = roundoffs * (2.0**-9 if half else 2.0**-24)
    found = gate(judge(case, Trace.read(tensor_parallel(tmp_path, whole, off(tap, shift)))))
    assert found.state == state
    assert ("1 of them to rounding" in found.text) == (state == "ok")


@pytest.mark.parametrize(("before", "state"), [(0, "FAIL"), (6, "ok"), (4, "FAIL")])
def test_drift_grows(case, plain, tmp_path, before, state):
    """Catches ranks that round differently called wrong where a later stage magnifies it: 20 units of roundoff are too many, unless
    an earlier tap differs by a quarter of that.
    """

    def change(rank, taps):
        off("fwd/L1/router.scores", before * 2.0**-24)(rank, taps)
        off("fwd/L1/resid", 20 * 2.0**-24)(rank, taps)

    assert gate(judge(case, Trace.read(tensor_parallel(tmp_path, plain, change)))).state == state


def test_small_rows_of_scores(case, plain, tmp_path):
    """Catches replicas held to more than a candidate is: a row of scores counts as a tenth of the largest one at least."""
    tap = "fwd/L1/mla.scores"
    scores = np.asarray(plain.taps[tap]).copy()
    scores[0, 0, 15] = 0.01
    for rank in range(2):
        write(tmp_path, plain, rank, {"tp": (rank, 2)}, {tap: scores}, expected=[])
        scores[0, 0, 15] *= np.float32(1 + 30 * 2.0**-24)
    text = "2 ranks: 0 taps put together, 1 agree between ranks, 1 of them to rounding"
    assert gate(judge(case, Trace.read(tmp_path))).text == text


def test_ids_and_holes_have_no_rounding(case, plain, tmp_path):
    """Catches integers compared within a tolerance, and a NaN that compares as nothing."""

    def change(rank, taps):
        if rank:
            taps["fwd/L1/router.ids"] = np.asarray(taps["fwd/L1/router.ids"]) ^ (np.arange(4) >= 4 - rank)
        else:
            taps["fwd/L2/resid"] = np.where(np.arange(48) == 5, np.nan, taps["fwd/L2/resid"])

    found = gate(judge(case, Trace.read(tensor_parallel(tmp_path, plain, change))))
    ids, hole = found.details
    assert ids.startswith(
        "fwd/L1/router.ids differs between tp ranks 0 and 1, 2: 64 of 128 elements, the first at [0, 0, 2];"
    )
    assert hole.startswith("fwd/L2/resid differs between tp ranks 0 and 1, 2: worst row [0, 0] by inf")


def test_what_does_not_fit_is_left_out(case, plain, tmp_path):
    """Catches a crash, or a guess, where a tap's parts are not parts of one array: a forgotten mark, a merged axis, two dtypes, a
    part that nobody recorded.
    """

    def change(rank, taps):
        if rank == 1:
            taps["fwd/L1/attn_norm"] = taps["fwd/L1/attn_norm"][..., :7]
            taps["fwd/L1/mla.q"] = taps["fwd/L1/mla.q"].reshape(2, 16, -1)
            taps["fwd/L1/resid"] = taps["fwd/L1/resid"].astype(np.float64)
            taps["fwd/L2/mla.q"] = taps["fwd/L2/mla.q"][..., :7]
            taps["fwd/L2/attn_out"] = taps["fwd/L2/attn_out"][:, :15]
            del taps["fwd/L2/mla.ctx"]

    found = Trace.read(tensor_parallel(tmp_path, plain, change))
    assert len(found.taps) == len(plain.taps) - 6
    details = gate(judge(case, found)).details
    where = ["fwd/L1/attn_norm", "fwd/L1/mla.q", "fwd/L1/resid", "fwd/L2/mla.q", "fwd/L2/attn_out"]
    assert [d.split()[0] for d in details] == where
    assert "do not fit together along axis 2" in details[3] and "to be summed" in details[4]
    assert "its dims must say so" in details[0] and "in brackets" in details[1] and "float32 and float64" in details[2]
    assert found.taps.missing == {"fwd/L2/mla.ctx": "no rank at tp 1 recorded it"}


def test_what_a_rank_was_meant_to_record(case, plain, tmp_path):
    """Catches a replica that is not there counted as one that agrees."""
    folder = tensor_parallel(tmp_path, plain, lambda rank, taps: rank == 1 and taps.pop("fwd/L1/resid"))
    judgement = judge(case, Trace.read(folder))
    assert gate(judgement).text == "fwd/L1/resid meant for r1.safetensors, which lacks it"
    assert judgement.verdict == "INCONCLUSIVE"


def test_self_checks_of_all_ranks(plain, tmp_path):
    """Catches one rank's failed self-check hidden by another's, and notes that are lost or said once a rank."""
    for rank, off_by in enumerate((0, 0.5, 0)):
        header = {"self_check": {"taps": off_by, f"own{rank}": 0}, "notes": "eager" if rank else "graphs"}
        write(tmp_path, plain, rank, {"tp": (rank, 3)}, **header)
    found = Trace.read(tmp_path).header
    assert found.self_check == {"taps": 0.5, "own0": 0, "own1": 0, "own2": 0} and found.notes == "graphs\neager"


# ---- What is no run


@pytest.mark.parametrize(("dims", "alone"), [("B S D", True), ("B S@tp D", False), ("B S D +tp", False)])
def test_one_rank_alone(plain, tmp_path, dims, alone):
    """Catches a part taken for the whole; a rank whose taps are whole is a trace."""
    tap = "fwd/L1/resid"
    path = write(tmp_path, plain, 1, {"tp": (1, 2)}, {tap: np.asarray(plain.taps[tap])}, {tap: dims}, expected=[])
    if alone:
        assert list(Trace.read(path).taps) == [tap]
    else:
        with pytest.raises(SpecError, match=r"rank 0 of 2 is missing; there is r1.safetensors"):
            Trace.read(path)


def test_refused(plain, tmp_path):
    """Catches a half-read run: each of these was another experiment, and the message says what and in which file."""
    few = {"fwd/L1/resid": np.asarray(plain.taps["fwd/L1/resid"])}
    one, two = {"tp": (0, 2)}, {"tp": (1, 2)}
    other = [[*plain.header.tokens[0][:-1], 0], *plain.header.tokens[1:]]
    refused = [
        ("rank 1 of 2 is missing; there is r0.safetensors", [(0, one, {})]),
        ("r0.safetensors and r1.safetensors are both of tp 0", [(0, one, {}), (1, one, {})]),
        (
            "r2.safetensors is of rank 2; there are 2",
            [(r, {"tp": (r % 2, 2), "ep": (r // 2, 2)}, {"ranks": 2}) for r in range(3)],
        ),
        ("r0.safetensors and r1.safetensors declare axes", [(0, one, {}), (1, {"tp": (1, 3)}, {})]),
        ("no rank is at ep 1, of 2", [(r, {"tp": (r, 2), "ep": (0, 2)}, {"ranks": 2}) for r in range(2)]),
        ("3 ranks, but axes {'tp': 2} tell 2 apart", [(r, {"tp": (r % 2, 2)}, {"ranks": 3}) for r in range(3)]),
        ("r1.safetensors declare 2 and None ranks", [(0, one, {"ranks": 2}), (1, two, {})]),
        ("dims 'B S@sp D' name the axis ['sp']", [(r, {"tp": (r, 2)}, {"dims": "B S@sp D"}) for r in range(2)]),
        ("names another axis of ranks", [(r, {"tp": (r, 2)}, {"dims": "B S@tp D@tp"}) for r in range(2)]),
        ("record it unmerged", [(r, {"tp": (r, 2)}, {"dims": "(B S@tp) D"}) for r in range(2)]),
        ("a bracket is open", [(r, {"tp": (r, 2)}, {"dims": "(B S@tp D"}) for r in range(2)]),
        ("declare different dims of fwd/L1/resid: 'B S D'", [(0, one, {}), (1, two, {"dims": "B S@tp D"})]),
        ("r0.safetensors and r1.safetensors declare different tokens", [(0, one, {}), (1, two, {"tokens": other})]),
        ("declare different digests of lm_head", [(0, one, {}), (1, two, {"weights": {"lm_head.weight": "sha256:0"}})]),
        ("axis tp is [2, 2], expected [coordinate, size]", [(0, one, {}), (1, {"tp": (2, 2)}, {})]),
        ("r1.safetensors lacks the header key 'parallel'", [(0, one, {}), (1, two, {"parallel": {}})]),
        ("unknown keys: world", [(0, one, {"parallel": {"rank": 0, "world": 2}})]),
        ("rank is True", [(0, one, {"parallel": {"rank": True}})]),
        ("axes is [0], expected name", [(0, one, {"parallel": {"rank": 0, "axes": [0]}})]),
        ("ranks is 0", [(0, one, {"parallel": {"rank": 0, "ranks": 0}})]),
        *[(f"rank is {n!r}, expected", [(0, one, {"parallel": {"rank": n}})]) for n in (-1, 0.0, "0", None)],
        *[
            (f"ranks is {n!r}, expected", [(0, one, {"parallel": {"rank": 0, "ranks": n}})])
            for n in (-1, 1.0, "1", True)
        ],
        *[
            (f"axis tp is {pair!r}, expected", [(0, one, {"parallel": {"rank": 0, "axes": {"tp": pair}}})])
            for pair in ([-1, 2], [0, 0], [0], [0, 1, 2], [False, 1], [0, 1.0], "01", None)
        ],
        ("no *.safetensors", []),
    ]
    for i, (message, files) in enumerate(refused):
        folder = tmp_path / str(i)
        folder.mkdir()
        for number, at, header in files:
            dims = {"dims": {"fwd/L1/resid": header["dims"]}} if "dims" in header else {}
            write(folder, plain, number, at, few, **{"expected": []} | header | dims)
        with pytest.raises(SpecError) as error:
            Trace.read(folder)
        assert message in str(error.value) and f"while reading trace {folder}" in str(error.value), str(error.value)


def test_shards_that_nothing_declares_are_told_how_to(case, plain, tmp_path):
    """Catches shards called replicas that differ, with no word of what to declare: of equal and of unequal shares, of two axes of
    ranks; and the advice where shares do not make the whole.
    """

    def undeclared(rank, taps):
        for tap in [t for t in taps if t.endswith(("/attn_out", "/moe.routed"))]:
            taps[tap] = plain.taps[tap]

    folder = tensor_parallel(tmp_path / "uneven", plain, undeclared)
    for rank in range(3):
        path = folder / f"r{rank}.safetensors"
        one = Trace(*read_file(path))
        Trace(dataclasses.replace(one.header, dims={}), {t: np.array(a) for t, a in one.taps.items()}).write(path)
    told = gate(judge(case, Trace.read(folder))).details
    for name, dims in (("L0/mla.q", "B S H@tp Dn+Dr"), ("L0/mlp.gate", "B S F@tp"), ("L1/mla.probs", "B H@tp S T")):
        (line,) = [t for t in told if t.startswith(f"fwd/{name} ")]
        assert f'declare dims "{dims}"' in line, line
    assert not [t for t in told if "attn_out" in t or "resid" in t]
    for dp, tp in np.ndindex(2, 2):
        gates = {
            t: np.array(a)[..., 40 * tp : 40 * tp + 40] for t, a in plain.taps.items() if t.endswith("L0/mlp.gate")
        }
        short = {t: np.array(a)[..., 20 * tp : 20 * tp + 20] for t, a in plain.taps.items() if t.endswith("L0/mlp.up")}
        write(tmp_path / "two", plain, 2 * dp + tp, {"dp": (dp, 2), "tp": (tp, 2)}, gates | short, expected=[])
    up, wide = (
        next(t for t in gate(judge(case, Trace.read(tmp_path / "two"))).details if n in t) for n in ("up", "gate")
    )
    assert 'declare dims "B S F@tp"' in wide and "declare" not in up, (up, wide)


def test_a_file_that_is_no_trace_is_named_once(tmp_path):
    """Catches "while reading trace" said of a file and of its folder, of which only one cannot be read."""
    (tmp_path / "r0.safetensors").write_bytes(b"")
    with pytest.raises(SpecError) as error:
        Trace.read(tmp_path)
    assert str(error.value).count("while reading trace") == 1 and "r0.safetensors" in str(error.value)


def test_two_files_of_one_rank(plain, tmp_path):
    """Catches a rank that was recorded twice, under two names, and of which one is dropped."""
    path = write(tmp_path, plain, 0, {"tp": (0, 2)})
    (tmp_path / "again.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(SpecError, match=r"again.safetensors and r0.safetensors are both of rank 0"):
        Trace.read(tmp_path)


# ---- By command, and of a real run of ranks


def test_command_line(case, plain, tmp_path, capsys):
    """Catches a folder that only Python reads, one rank's file taken for all, marks that stay when the whole is written."""
    folder = tensor_parallel(tmp_path / "ranks", plain, off("fwd/L1/resid", 1e-3, on=1))
    assert main(["diff", str(case.path), str(folder)]) == 1
    out = capsys.readouterr().out
    assert "ranks     FAIL  fwd/L1/resid differs between tp ranks 0 and 1: " in out and "culprit: ranks" in out
    assert main(["diff", str(case.path), str(folder / "r0.safetensors")]) == 3
    assert "rank 1, 2 of 3 is missing" in capsys.readouterr().err
    Trace.read(folder).write(tmp_path / "one.safetensors")
    assert main(["diff", str(case.path), str(tmp_path / "one.safetensors"), "--quiet"]) == 0


def test_ranks_of_the_simulator(case, tmp_path):
    """Catches a notation that no tensor-parallel program can be recorded in: heads and dense channels of the repository's own,
    three ranks, recorded by an observer on each; attention and dense feed-forward before their all-reduce.
    """
    marked = {n: dims for n, (dims, _) in HEADS.items() if n != "logits"} | {
        "mlp.act": "B S F@tp",
        "attn_out": "B S D +tp",
    }
    reference, held = trace_case(case), effective(case.weights(), FLOAT32)

    def program(comm):
        model, taps = ForCausalLM.from_weights(case.config, held), {}
        layers = []
        for layer in model.model.layers:
            attention = axes.tensor.shard_attention(comm, layer.self_attn)
            parts = {"self_attn": Placed(attention, partial(axes.tensor.attention, comm))}
            if hasattr(layer.mlp, "gate_proj"):
                dense = axes.tensor.shard_mlp(comm, layer.mlp)
                parts["mlp"] = Placed(dense, lambda m, x: (axes.tensor.mlp(comm, m, x), None))
            layers.append(placed(layer, **parts))
        model.model.layers = layers

        def keep(stage, run, /, *args, **static):
            taps[tap_name(stage)] = out = run(*args, **static)
            return out

        with observing(keep):
            model(model.inputs(case.tokens))
        return taps

    for rank, taps in enumerate(spmd(3, program)):
        dims = {t: marked[n] for t in taps if (n := t.rpartition("/")[2]) in marked} | {"fwd/L0/ffn_out": "B S D +tp"}
        write(tmp_path, reference, rank, {"tp": (rank, 3)}, taps, dims)
    found = Trace.read(tmp_path)
    judgement = judge(case, found)
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert found.taps["fwd/L1/mla.q"].shape == reference.taps["fwd/L1/mla.q"].shape
    assert set(found.taps) == set(reference.taps)
