"""The optimiser's step in a trace: norm, clipped gradients, moments and weights after it, judged, named and taken apart."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd import SpecError
from refimpl.diff import Trace, render
from refimpl.diff.corpus import MUTANTS
from refimpl.diff.examined import examined
from refimpl.diff.judge import judge
from refimpl.diff.optimizer import doubtful, read_optimizer
from refimpl.diff.part import smallest
from refimpl.diff.terms import terms_of
from refimpl.layers import STAGES
from refimpl.layers.precision import plan
from refimpl.layers.stage import Patch
from refimpl.record import trace_case
from refimpl.spec_tests.oracles import optimiser
from refimpl.train import AdamW, Recipe, State, step

from .test_diff_partial import case, drawn, only

ADAM = {"lr": 1e-3, "decays": "matrices", "moments": "bfloat16"}
LATER = ADAM | {"step": 3}
NAMES = ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.experts.3.down_proj.weight")
QUIET = {
    "O09": "the case's weights are bfloat16 numbers already",
    "O06d": "no sum is of more than 1e5 numbers here: such a loop is right",
}
SETTINGS = {"O04d": LATER, "O05c": ADAM | {"max_norm": 100.0}}
"""What a mutant needs to show: a step before this one, a norm below the limit."""


class Spoiled:
    """An observer that runs a mutant in its stages' place, and hands it the weight that the tap is of."""

    def __init__(self, mutant):
        self.mutant = mutant

    def __call__(self, stage, run, /, *args, **static):
        fn = self.mutant.at(stage.name)
        if fn is None:
            return run(*args, **static)
        reads = self.mutant.reads and stage.name == self.mutant.stage
        more = {"reads": (weights()[stage.tap.removesuffix(".clipped")],)} if reads else {}
        return fn(*args, **static, **more)


@functools.cache
def weights():
    return case().weights()


@functools.cache
def stepped(precision="float32", id=None, **changes):
    adam = SETTINGS.get(id, ADAM) | changes
    patches = [Spoiled(MUTANTS[id])] if id else []
    with np.errstate(all="ignore"):
        return trace_case(
            case(), precision=precision, training={"aux_weight": 0.01, "optimizer": adam}, patches=patches
        )


def step_only(trace):
    """The step and what leads to it: no forward taps, no gradients by taps."""
    return only(trace, lambda t: t.startswith(("upd/", "grad/")))


# ---- Right steps


OTHERS = [{"step": 3}, {"masters": "bfloat16", "max_norm": None, "lr": 0.1}]
RIGHT = [("bf16", {}), *[pytest.param(p, c, marks=pytest.mark.slow) for p in ("float32", "bf16") for c in OTHERS]]


@pytest.mark.parametrize(("precision", "changes"), RIGHT)
def test_a_step_conforms(precision, changes):
    """Catches moments, masters or gradients judged in another dtype than they are kept in, and a step that is not its own."""
    judgement = judge(case(), stepped(precision, **changes))
    assert judgement.verdict == "CONFORMS", render(judgement)
    assert {f"upd/{n}{end}" for n in NAMES for end in ("", ".exp_avg", ".clipped")} <= {
        f.tap for f in judgement.findings
    }


def test_a_step_is_that_of_a_scalar_at_a_time():
    """Catches a step that is judged against itself only. The oracle is torch's order of operations on Python floats; float64."""
    trace = stepped("float64", moments="float32", decays="all", eps=1e-4, beta1=0.8)
    grads = {t.removeprefix("grad/"): a for t, a in trace.taps.items() if t.startswith("grad/")}
    clipped, norm = optimiser.clip(grads, 1.0)
    assert trace.taps["upd/grad_norm"].item() == pytest.approx(norm, rel=1e-12)
    for name in NAMES:
        zero = np.zeros_like(grads[name])
        w = weights()[name].astype(np.float64)
        found = optimiser.adamw(w, clipped[name], zero, zero, 1, lr=1e-3, betas=(0.8, 0.95), eps=1e-4)
        for end, e in zip(("", ".exp_avg", ".exp_avg_sq"), found, strict=True):
            np.testing.assert_allclose(trace.taps[f"upd/{name}{end}"], e, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_the_step_of_our_own_trainer_is_judged():
    """Catches a replay that disagrees with what trains: weights and moments after `refimpl.train.step`, from its tokens alone."""
    opt = AdamW(lr=1e-3, decays="matrices", moments="bf16")
    state, report = step(
        case().config, State(weights()), np.asarray(case().tokens), Recipe(plan("float32"), opt, aux_weight=0.01)
    )
    taps = {f"upd/{n}": state.weights[n] for n in state.adam.m} | {"upd/grad_norm": np.float32(report.norm).reshape(())}
    taps |= {f"upd/{n}.exp_avg": m for n, m in state.adam.m.items()}
    header = dataclasses.replace(stepped().header, expected=[])
    judgement = judge(case(), Trace(header, taps))
    assert len(judgement.findings) == len(taps) > 250 and not judgement.culprits, render(judgement)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["float32", "bf16"]), st.integers(0, 10**6), st.sampled_from([0.6, 0.3, 0.1]))
def test_no_part_of_a_step_is_called_wrong(precision, seed, share):
    """Catches a sign of a first step, which roundings may turn round, held against a candidate whose gradient is unknown."""
    judgement = judge(case(), drawn(stepped(precision), seed, share))
    assert not judgement.culprits, render(judgement)


@pytest.mark.slow
def test_a_weight_that_is_wrong_beyond_signs_is_found_without_its_gradient():
    """Catches a tolerance for signs that hides everything: half of one row of the weights moves twice as far."""
    trace, tap = stepped("bf16"), "upd/lm_head.weight"
    few = only(trace, lambda t: t.startswith("fwd/") or t == tap)
    assert not judge(case(), few).culprits
    wrong, before = np.array(few.taps[tap]), weights()["lm_head.weight"]
    wrong[3, :24] = before[3, :24] + 2 * (wrong[3, :24] - before[3, :24])
    judgement = judge(case(), Trace(few.header, dict(few.taps) | {tap: wrong}))
    assert [f.tap for f in judgement.culprits] == [tap], render(judgement)


def test_a_sign_is_in_doubt_where_roundings_may_turn_it_round():
    """Catches every entry, or none, held to be in doubt: those whose moment is no more than so many times what a twin is away."""
    m = np.array([[1.0, -1.0, 1e-6, -3e-6, 0.0]])
    twins = [m + np.array([[0.1, 1e-7, 1e-6, 0.0, 0.0]]), m - np.array([[0.0, 2e-7, 0.0, 1e-9, 0.0]])]

    def made(*moments, stage="optim.step"):
        return SimpleNamespace(
            call=SimpleNamespace(stage=stage), inputs=lambda: iter([(None, its, None) for its in moments])
        )

    assert doubtful(made(m, *twins)).tolist() == [
        [False, False, True, False, True]
    ]  # 4 x 1e-6 reaches 1e-6, 4 x 0.1 not 1
    assert doubtful(made(m[:, :2], m[:, :2])) is None and doubtful(made(m, *twins, stage="optim.clip")) is None


@pytest.mark.slow
def test_moments_that_nobody_recorded_are_asked_for():
    """Catches CONFORMS for a third step of which the moments before it are unknown."""
    trace = only(stepped(step=3), lambda t: not t.endswith(".before") and ".exp_avg" not in t)
    judgement = judge(case(), trace)
    assert judgement.verdict == "INCONCLUSIVE" and not judgement.culprits
    assert "is computed from is not known" in render(judgement)
    known = judge(case(), only(stepped(step=3), lambda t: not t.endswith(".before")))
    opened = {f.tap.rpartition(".")[2] for f in known.findings if f.open}
    assert opened == {"exp_avg", "exp_avg_sq"} and not known.culprits


def summed_in_turn(*grads):
    """The norm of a plain loop over all numbers, one float32 sum."""
    total = np.float32(0)
    for g in grads:
        for x in g.astype(np.float32).ravel():
            total += x * x
    return np.sqrt(total)


@pytest.mark.slow
def test_a_norm_that_is_summed_in_turn_clips_rightly():
    """Catches a loop's lost bits, here 1,500 u, taken for a wrong norm, and what is clipped by it, or stepped, for a wrong step."""
    trace = trace_case(
        case(), training={"aux_weight": 0.01, "optimizer": ADAM}, patches=[Patch("optim.grad_norm", summed_in_turn)]
    )
    away = float(trace.taps["upd/grad_norm"].item() / stepped().taps["upd/grad_norm"].item()) - 1
    assert 1e-5 < abs(away) < 1e-3 and trace.taps["upd/grad_norm"] > 1  # clipping is active
    for some in (step_only(trace), only(trace, lambda t: t.startswith("grad/") or t.endswith((".clipped", "weight")))):
        judgement = judge(case(), some)
        assert len(judgement.findings) > 250 and not judgement.culprits, render(judgement)


@pytest.mark.slow
def test_a_norm_without_the_norms_gradients_is_still_found():
    """Catches an allowance for loops that lets the smallest mistake of this case through: 1.7 % of the norm."""

    def few(*grads):
        return np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads if g.ndim != 1))

    trace = trace_case(
        case(), training={"aux_weight": 0.01, "optimizer": ADAM}, patches=[Patch("optim.grad_norm", few)]
    )
    assert {f.tap for f in judge(case(), step_only(trace)).culprits} == {"upd/grad_norm"}
    unseen = only(trace, lambda t: t.startswith("grad/") or t.endswith(".clipped"))
    assert {f.tap.rpartition(".")[2] for f in judge(case(), unseen).culprits} == {"clipped"}


# ---- Wrong ones


SOME = ["O06"]
ALL = [id for id in MUTANTS if id[0] == "O" and id not in QUIET]


@pytest.mark.parametrize(
    ("id", "precision"),
    [*[(id, "float32") for id in SOME]]
    + [
        pytest.param(id, p, marks=pytest.mark.slow)
        for id in ALL
        for p in ("float32", "bf16")
        if (id, p) not in [(i, "float32") for i in SOME]
    ],
)
def test_bugs_of_the_step_are_named(id, precision):
    """Catches a diagnosis that finds nothing, something else or several things, and blame on a stage that is right."""
    judgement = judge(case(), step_only(stepped(precision, id)))
    assert {f.stage for f in judgement.culprits} <= {MUTANTS[id].stage, *MUTANTS[id].also}
    assert [d.title for d in judgement.causes] == [MUTANTS[id].title], render(judgement)
    assert {t for d in judgement.causes for t in d.taps} == {f.tap for f in judgement.culprits}


@pytest.mark.slow
def test_a_bug_that_the_case_cannot_show_is_quiet_for_its_reason():
    """Catches an excuse that is none, and a mutant that is the specification."""
    assert judge(case(), step_only(stepped("float32", "O09"))).exit_code != 1
    w = np.float64([1 + 2**-12, 2.0])
    static = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1, "steps": 1}
    away = MUTANTS["O09"].fn(w, w, w, **static) - STAGES["optim.step"].fn(w, w, w, **static)
    assert away == pytest.approx([-(2**-12) * (1 - 0.1 * 0.1), 0.0], abs=1e-15)


@pytest.mark.slow
def test_a_bug_of_two_stages_is_named_where_one_of_them_was_seen():
    """Catches L2 decay named only where clipped gradients were recorded; and a decay that is absent taken for it."""
    coarse = only(stepped("float32", "O02"), lambda t: t.startswith("grad/") or t.endswith(("weight", "grad_norm")))
    assert [d.id for d in judge(case(), coarse).causes] == ["O02"]
    assert [d.id for d in judge(case(), step_only(stepped("float32", "O03"))).causes] == ["O03"]


@pytest.mark.slow
def test_a_number_of_the_step_is_taken_apart():
    """Catches terms of another weight, and slopes by a step that is too large for a second moment."""
    judgement = judge(case(), step_only(stepped("float64", moments="float32")))
    part = smallest(examined(judgement, "upd/lm_head.weight").part((3, 5)))
    slopes = {t.name: t.slope for found in terms_of(part).by_name.values() for t in found}
    assert {a.shape for a in part.leaves.values()} == {(1, 1)}
    _, m, v = (a.item() for a in part.leaves.values())
    root = np.sqrt(v / 0.05)
    expected = [1 - 1e-4, -1e-3 / 0.1 / (root + 1e-8), 1e-3 / 0.1 * m / (root + 1e-8) ** 2 / (2 * root * 0.05)]
    assert [slopes[n] for n in part.leaves] == pytest.approx(expected, rel=1e-7)
    norm = examined(judgement, "upd/grad_norm")
    assert sum(t.product for t in terms_of(norm.part(())).largest) == pytest.approx(float(norm.step.exact), rel=1e-12)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "optimizer is 3"),
        ({}, "lacks lr"),
        ({"lr": 1, "beta": 0.9}, "unknown key 'beta'"),
        ({"lr": -1}, "lr is -1; expected a number from 0 on"),
        ({"lr": 10**400}, "expected a number from 0 on"),
        ({"lr": 1, "beta1": 1.0}, "beta1 is 1.0; expected a number from 0 to 1"),
        ({"lr": 1, "step": 0}, "whole number from 1 on"),
        ({"lr": 1, "moments": "fp8"}, "expected float32 or bfloat16"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, says):
    """Catches a misspelt setting that counts as its default."""
    with pytest.raises(SpecError, match=says):
        read_optimizer(given)
