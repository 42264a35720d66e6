"""Regimes of cases: each does what it says, conforms in our own run, and shows bugs that a plain case hides.

What each regime says is checked in `test_regime_facts.py`, mistakes of FP8 loaders in `test_regime_loaders.py`.
"""

import functools
import itertools
import json
import re
import tempfile

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.diff import Case, render
from refimpl.diff.corpus import MUTANTS, NOT_STAGES
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS, Config
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.stage import Patch
from refimpl.record import new_case, trace_case
from refimpl.record.regimes import NOT_REGIMES, REGIMES, named
from refimpl.record.shrink import shrink
from refimpl.spec_tests.cases.mutated import Mutated

from .test_corpus import QUIET, form

V2 = shrink(PRESETS["deepseek-v2"])


@functools.cache
def home():
    return tempfile.TemporaryDirectory()


@functools.cache
def made(regimes="", seed=0, mtp=False, config=PRESETS["tiny"]):
    """A case of preset tiny, or another config, in these regimes; shorter where its matrices are large."""
    folder, length = tempfile.mkdtemp(dir=home().name), 8 if "ragged" in regimes else 16
    return Case.read(new_case(folder, config, seed=seed, length=length, regimes=regimes, mtp=mtp))


def contents(case):
    return {p.name: p.read_bytes() for p in case.path.iterdir()}


def judged(case, *patches, precision="float32", attend="expanded"):
    with np.errstate(all="ignore"):
        return judge(case, trace_case(case, precision=precision, attend=attend, patches=patches))


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("regime", REGIMES)
def test_our_own_run_conforms(regime, precision):
    """Catches a tolerance that a rare value breaks: ties decided the other way, scores of 0, positions of 163,839."""
    judgement = judged(made(regime), precision=precision)
    assert judgement.verdict == "CONFORMS", render(judgement)


# ---- Every regime shows what a plain case hides

SHOWN = [
    (r.id, m) for r in REGIMES.values() for id in r.shows for m in MUTANTS.values() if re.fullmatch(f"{id}(-.*)?", m.id)
]
COARSE = {"A12"}
"""Seen in bfloat16 only here; float32 sees an eps wherever latents have a size of 1."""


def test_every_regime_shows_something_of_the_corpus():
    """Catches a regime for nothing, and a family that does not exist or that this file does not try."""
    tried = {(r, m.id[:3]) for r, m in SHOWN}
    for r in REGIMES.values():
        families = {id[:3] for id in r.shows}
        assert families and families <= {m[:3] for m in MUTANTS} | set(NOT_STAGES), r.id
        missing = {f for f in families if (r.id, f) not in tried and f[0] != "F"}  # F: test_regime_loaders.py
        assert missing <= {"R06"}, (r.id, missing)  # a test of its own, below


@pytest.mark.slow
@pytest.mark.parametrize(("regime", "mutant"), SHOWN, ids=lambda x: getattr(x, "id", x))
def test_a_regime_shows_a_bug_that_a_plain_case_hides(regime, mutant):
    """Catches a regime in which the bugs it is for stay hidden, blame on another stage, and a bug that needs no regime."""
    plain, case = made(mtp=True), made(regime)
    precision = "bf16" if mutant.id[:3] in COARSE else "float32"
    assert mutant.applies(case.config)
    if mutant.applies(plain.config):
        hidden = judged(plain, Mutated(mutant, plain), precision=precision, attend=form(mutant))
        assert hidden.verdict == "CONFORMS", render(hidden)
    shown = judged(case, Mutated(mutant, case), precision=precision, attend=form(mutant))
    assert {f.stage for f in shown.culprits} == {mutant.stage}, render(shown)
    assert mutant.title in {one.title for d in shown.causes for one in (d, *d.rivals)}, render(shown)


def test_what_the_committed_case_hides_some_regime_shows():
    """Catches a bug of the corpus that nobody can see: every one that preset tiny hides has its regime."""
    shown = {m.id for _, m in SHOWN} | {
        m.id for m in MUTANTS.values() if m.regime == "cache"
    }  # a second chunk shows these
    nowhere = {"R12b"}  # a score of 1e-40 that became 0: whatever reads it adds 1e-20
    nowhere |= {"A12-q_a_norm-1e-06", "A12-c_kv-1e-06"}  # the specification's own eps of latents
    assert set(QUIET) - shown == nowhere


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("router.choice", lambda s, b: s + to_bf16(b)),
        ("router.logits", lambda x, w: to_bf16(x @ to_bf16(w).T)),
    ],
    ids=["R05", "R06"],
)
def test_near_ties_show_a_coarse_router_by_its_ids_alone(stage, change):
    """Catches a near tie that bfloat16 does not turn: with nothing of the router recorded but its ids, a bias (R05) or product
    (R06) in bfloat16 stays hidden where decisions are won clearly.
    """
    found = []
    for regime in ("", "near-ties"):
        case = made(regime)
        trace = trace_case(case, taps=["fwd/L1/ffn_norm", "fwd/L1/router.ids"], patches=[Patch(stage, change)])
        found.append({f.stage for f in judge(case, trace).culprits})
    assert found == [set(), {"router.ids"}]


# ---- Ties


def higher(a, kept, *, k, n_group, fill):
    """router.ids by loops over tokens, ties to the higher index."""
    out = np.zeros((*a.shape[:2], k), np.int64)
    size = a.shape[-1] // n_group
    for at in np.ndindex(a.shape[:2]):
        inside = [e for e in range(a.shape[-1]) if e // size in kept[at]]
        out[at] = sorted(inside, key=lambda e: (a[at][e], e), reverse=True)[:k]
    return out


def higher_groups(a, *, topk_group):
    order = [sorted(range(a.shape[-1]), key=lambda g: (row[g], g), reverse=True) for row in a.reshape(-1, a.shape[-1])]
    return np.array(order)[:, :topk_group].reshape(*a.shape[:-1], topk_group)


@pytest.mark.parametrize(
    "taps", [["*"], ["*/resid", "*/resid_mid", "*/attn_norm", "*/ffn_norm", "fwd/logits"]], ids=["all", "few"]
)
@pytest.mark.parametrize(
    "patches", [[("router.ids", higher)], [("router.ids", higher), ("router.groups", higher_groups)]]
)
def test_either_way_of_a_tie_conforms(patches, taps):
    """Catches blame for a tie rule, which nothing prescribes: the higher index instead of the lower, of experts and of groups."""
    case = made("ties")
    ours, theirs = (trace_case(case, taps=taps, patches=p).taps for p in ([], [Patch(*p) for p in patches]))
    assert any(not np.array_equal(a, theirs[t]) for t, a in ours.items())
    judgement = judge(case, trace_case(case, taps=taps, patches=[Patch(*p) for p in patches]))
    assert judgement.verdict in ("CONFORMS", "INCONCLUSIVE") and not judgement.culprits, render(judgement)


# ---- Together, by seed, refused


ALL = "bias-negative,near-ties,small-latents,eps,padding,long-positions,mscale,raw-weights,scaling-1,ragged-128,mtp-2,fp8-weights"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [ALL, "extreme-logits,offset,full-rank-q,no-groups,small-latents", "ties,bias-positive,padding,offset"]
)
def test_regimes_that_do_not_contradict_each_other_go_together(text):
    """Catches a regime that undoes another or relies on what another took away."""
    case = made(text, seed=5)
    for precision in ("float32", "bf16"):
        judgement = judged(case, precision=precision)
        assert judgement.verdict == "CONFORMS", render(judgement)
    assert json.loads((case.path / "tokens.json").read_text())["regimes"] == [
        i for i in REGIMES if i in text.split(",")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("regimes", ["bias-negative,long-positions", "ties", "extreme-logits,padding,fp8-weights"])
def test_a_real_model_made_small_takes_regimes(regimes):
    """Catches regimes that only preset tiny can have."""
    real = Config.from_dict(PRESETS["deepseek-v3"].to_dict())
    case = made(regimes, config=shrink(real))
    assert judged(case).verdict == "CONFORMS"


@pytest.mark.slow
def test_softmax_scores_have_a_margin_of_their_size():
    """Catches the margin of sigmoids asked of 32 scores that sum to 1: no case of V2 could be drawn."""
    for regimes in ("", "small-latents", "ties"):
        assert judged(made(regimes, config=V2)).verdict == "CONFORMS"


@pytest.mark.slow
def test_a_seed_is_a_case_in_a_regime():
    """Catches a regime with a memory, one that ignores the seed, and an order of names that matters."""
    a, b, c, d = (contents(made(*x)) for x in [("ties,eps", 1), ("eps, ties", 1), ("ties,eps", 2), ("", 1)])
    assert a == b == contents(made.__wrapped__("ties,eps", 1))
    assert not [n for n in a if n != "config.json" and a[n] in (c[n], d[n])]


def test_what_a_regime_does_not_touch_stays_as_it_was():
    """Catches a regime whose draws move those of other tensors, so that two cases differ in more than it."""
    plain, case = made().weights(), made("near-ties").weights()
    assert [n for n in plain if not np.array_equal(plain[n], case[n])] == [
        n for n in plain if n.endswith("correction_bias")
    ]


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(REGIMES, 2)))
def test_contradictory_regimes_are_refused(a, b):
    """Catches two regimes of which the second silently undoes the first: both decide the same thing."""
    both = set(REGIMES[a].sets.split()) & set(REGIMES[b].sets.split())
    if both:
        with pytest.raises(SpecError, match=f"{a} and {b} contradict each other: both decide {min(both)}"):
            named(f"{b},{a}")
    else:
        assert [r.id for r in named(f"{b},{a}")] == [a, b]
    known = (
        {"bias-positive", "bias-negative"},
        {"ties", "near-ties"},
        {"one-group", "no-groups"},
        {"offset", "long-positions"},
    )
    assert bool(both) or {a, b} not in known


@pytest.mark.parametrize(
    ("regime", "config", "message"),
    [
        (
            "bias-negativ",
            PRESETS["tiny"],
            r"regime 'bias-negativ'; did you mean 'bias-negative'\?\n  known: one-group, ",
        ),
        ("xyz", PRESETS["tiny"], r"regime 'xyz'\n  known: one-group, .*fp8-weights$"),
        ("bias-negative", V2, r"the selection bias \(noaux_tc\), and this config has none\n  in regime bias-negative"),
        ("ties", PRESETS["tiny"].replace(n_routed_experts=0), "routed experts, and this config has none"),
        ("mscale", PRESETS["tiny"].replace(rope_scaling=None), "YaRN, and this config has none"),
        (
            "long-positions",
            PRESETS["tiny"].replace(max_position_embeddings=256),
            "max_position_embeddings=256 is too few",
        ),
        (
            "offset",
            PRESETS["tiny"].replace(max_position_embeddings=89),
            "positions up to 89 need more than max_position_emb",
        ),
    ],
)
def test_a_regime_that_cannot_be_is_refused_and_nothing_written(regime, config, message, tmp_path):
    """Catches an unknown name taken for none, and a case that is not in the regime it is said to be in."""
    with pytest.raises(SpecError, match=message):
        new_case(tmp_path / "case", config, length=16, regimes=regime)
    assert not list(tmp_path.iterdir())


def test_the_command_makes_and_lists_regimes(tmp_path, capsys):
    """Catches a flag that does nothing, a list that leaves some out, a contradiction that leaves half a case."""
    assert main(["case", str(tmp_path / "a"), "--regime", "bias-negative", "--seed", "0"]) == 0
    biases = [w for n, w in Case.read(tmp_path / "a").weights().items() if n.endswith("correction_bias")]
    assert all((b < -1).all() for b in biases) and len(biases) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["case", "--regimes"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(r.id in shown and r.does in shown for r in REGIMES.values())
    assert all(what in shown and why in shown for what, why in NOT_REGIMES.items())
    assert main(["case", str(tmp_path / "b"), "--regime", "ties,near-ties"]) == 3
    assert "contradict" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_rows_of_the_corpus_that_are_listed_exist():
    """Catches a reason given for a row that there is none of."""
    rows = {id for text in (*NOT_REGIMES, *NOT_REGIMES.values()) for id in re.findall(r"\b[RAFTL]\d\d", text)}
    assert rows and rows <= {m[:3] for m in MUTANTS} | set(NOT_STAGES)
