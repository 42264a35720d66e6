"""Logits recorded behind their softmax, row by row in plain loops: recognised, and a mistake in them still blamed."""

import dataclasses
import functools
import math
import pathlib

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.diff import Case, Trace, render
from refimpl.diff.judge import judge
from refimpl.diff.likelihoods import as_logits

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
DTYPES = ["float32", "bfloat16"]


@functools.cache
def recorded(dtype):
    trace = Trace.read(TINY / f"hf-{dtype}.safetensors")
    return Trace(trace.header, {t: np.asarray(a) for t, a in trace.taps.items()})


def rows(x, of):
    """of(v, log-sum-exp of its row) for every number of x."""
    y = np.empty(x.shape, np.float64)
    for at in np.ndindex(x.shape[:-1]):
        row = [float(v) for v in x[at]]
        top = max(row)
        total = top + math.log(math.fsum(math.exp(v - top) for v in row))
        y[at] = [of(v, total) for v in row]
    return y.astype(x.dtype)


FORMS = {
    "log-softmax": (lambda v, total: v - total, "logits are log-softmaxes"),
    "softmax": (lambda v, total: math.exp(v - total), "logits are softmax probabilities"),
}


def judged(dtype, change, cut=np.s_[:]):
    trace = recorded(dtype)
    taps = trace.taps | {"fwd/logits": change(trace.taps["fwd/logits"])[cut]}
    return judge(Case.read(TINY), Trace(dataclasses.replace(trace.header, expected=[], dims={}), taps))


@pytest.mark.parametrize("cut", [np.s_[:], np.s_[:, -1]], ids=["all positions", "the last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMS)
def test_a_softmax_of_the_logits_is_told_and_not_blamed(how, dtype, cut):
    """Catches a correct port blamed for the constant of a row that log-softmax takes off, or for its probabilities."""
    judgement = judged(dtype, lambda x: rows(x, FORMS[how][0]), cut)
    assert judgement.verdict == "CONFORMS_IN_GAUGE", render(judgement)
    assert [g.partition(":")[0] for g in judgement.gauges] == [FORMS[how][1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMS)
def test_other_logits_behind_a_softmax_are_blamed(how, dtype):
    """Catches a softmax that hides a temperature, or one wrong row, or makes any row with a sum of 1 ours."""

    def warm(x):
        return rows((x * np.float32(1.125)).astype(x.dtype), FORMS[how][0])

    def rolled(x):
        y = rows(x, FORMS[how][0]).copy()
        y[1, 5] = np.roll(y[1, 5], 1)
        return y

    for wrong in (warm, rolled):
        assert {f.tap for f in judged(dtype, wrong).culprits} == {"fwd/logits"}


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_a_constant_is_free_only_where_it_makes_the_sum_1(off):
    """Catches logits that are off by a constant of a row (a bias of the head) taken for log-softmaxes."""
    exact = recorded("float32").taps["fwd/logits"].astype(np.float64)
    x = rows(exact, lambda v, total: v - total + off).astype(np.float32)
    found = list(as_logits(x, exact))
    assert len(found) == (not off)
    for _, y in found:
        np.testing.assert_allclose(y, exact, atol=1e-5)  # x has float32's 24 bits of numbers below 16


def test_what_rounding_does_to_log_probabilities_is_no_mistake():
    """Catches small logits of a large vocabulary held to the rounding of their own size, which log p does not keep; and a constant
    of a row, from the rounded sum, that counts as off in every number.
    """
    exact = 0.05 * np.random.default_rng(0).standard_normal((4, 2048))
    x = rows(exact, lambda v, total: v - total + 0.02).astype(ml_dtypes.bfloat16).astype(np.float32)
    ((_, y),) = as_logits(x, exact)
    off = np.linalg.norm(y - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert (off < 4 * 2.0**-9).all()  # log p is 150 times as large, so 0.9 u of it would be 140 u of a logit


def test_probabilities_that_vanish_are_not_minus_infinity():
    """Catches p that underflows to 0 counted as off, and a 0 where p does not vanish let pass."""
    exact = np.array([[0.0, 1.0, -120.0, 2.0]])
    p = rows(exact, lambda v, total: math.exp(v - total)).astype(np.float32)
    assert p[0, 2] == 0
    ((_, y),) = as_logits(p, exact)
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-5)
    p[0, 0] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        assert not any(np.isfinite(y).all() for _, y in as_logits(p, exact))
