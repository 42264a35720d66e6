"""What the specification rejects, and what it says: the values, then where they were met.

Each case catches one wrong input that would otherwise run, crash elsewhere, or give numbers.
"""

import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError, require, where
from refimpl.layers import router
from refimpl.model import Impl
from refimpl.spec_tests.cases.small_models import SMALL, small, some_tokens
from refimpl.spec_tests.strategies.models import make_weights

from .tree import ROOT

DICT = SMALL.to_dict()


def rejected(run, *parts):
    """run() raises SpecError whose message has these parts, each on a line after the one before."""
    with pytest.raises(SpecError) as caught:
        run()
    lines = str(caught.value).split("\n")
    for part in parts:
        while lines and not re.search(part, lines[0]):
            lines.pop(0)
        assert lines, f"no {part!r} in:\n{caught.value}"
    return str(caught.value)


# ---- The two levels


def test_what_is_refused_says_where_it_was_met():
    """Catches messages of one level: what is wrong, then in which part of what was asked."""
    impl = Impl().load(DICT, weights_with(lambda w: None))
    rejected(lambda: impl.forward([[99]]), r"token id 99 at \[0, 0\]", "^  in the inputs of forward$")
    rejected(lambda: impl.loss_and_grads([[1, 2]], [[1]]), "labels has shape", "^  in the inputs of loss_and_grads$")
    rejected(lambda: impl.load(DICT | {"n_group": 5}, {}), "n_group=5 does not divide", "^  in the config$")
    rejected(lambda: impl.load(DICT, {}), "tensors missing", "^  in the weights of a model of 2 layers$")


def test_a_number_too_large_for_the_plan_is_reported():
    """Catches an infinity made by the conversion itself: 1e300 is finite in float64 and not in float32."""
    weights = weights_with(with_number(NORM, 1e300, (2,)))
    rejected(lambda: Impl().load(DICT, weights), r"NaN or infinite, the first at \[2\]", f"while loading {NORM}")
    assert Impl(precision="float64").load(DICT, weights)


def test_an_error_says_what_then_where_from_inside_out():
    """Catches contexts in the wrong order, or one that hides the message."""
    with pytest.raises(SpecError) as caught, where("in the model"), where("in layer 3"):
        require(1 == 2, "topk_group=5 exceeds n_group=4")
    assert str(caught.value) == "topk_group=5 exceeds n_group=4\n  in layer 3\n  in the model"
    assert isinstance(caught.value, ValueError)


def test_other_errors_pass_through_as_they_are():
    """Catches our own bugs dressed up as bad input."""
    with pytest.raises(ZeroDivisionError), where("anywhere"):
        _ = 1 / 0


# ---- Weights

NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate.weight"


def weights_with(change):
    """The weights of SMALL after change(dict)."""
    weights = make_weights(DICT, np.random.default_rng(0))
    change(weights)
    return weights


def with_number(name, value, at=()):
    def change(weights):
        w = weights[name].copy()
        w[at or (0,) * w.ndim] = value
        weights[name] = w

    return change


def with_dtype(name, dtype):
    return lambda weights: weights.__setitem__(name, weights[name].astype(dtype))


LOADING = rf"^  while loading {re.escape(NORM)}$"
WEIGHTS = {
    "missing": (lambda w: w.pop(NORM), [rf"1 tensors missing: {re.escape(NORM)}"]),
    "all missing": (lambda w: w.clear(), [r"\d+ tensors missing: model.embed_tokens.weight, .* and \d+ more"]),
    "extra": (
        lambda w: w.__setitem__("model.layers.9.x", w[NORM]),
        ["1 tensors that the model does not have: model.layers.9.x"],
    ),
    "transposed": (
        lambda w: w.__setitem__(GATE, w[GATE].T),
        [r"the checkpoint has shape \(24, 12\), the model \(12, 24\)", f"while loading {GATE}"],
    ),
    "one axis more": (
        lambda w: w.__setitem__(NORM, w[NORM][None]),
        [r"the checkpoint has shape \(1, 24\), the model \(24,\)", LOADING],
    ),
    "NaN": (
        with_number(NORM, np.nan, (3,)),
        [r"1 elements are NaN or infinite, the first at \[3\]: nan", LOADING],
    ),
    "infinity": (with_number(GATE, np.inf, (2, 5)), [r"first at \[2, 5\]: inf", GATE]),
    "NaN in the bias": (
        with_number("model.layers.1.mlp.gate.e_score_correction_bias", np.nan),
        [r"first at \[0\]: nan", "e_score_correction_bias"],
    ),
    "integers": (with_dtype(NORM, np.int64), ["dtype int64; a weight is a floating-point array", LOADING]),
    "complex": (with_dtype(NORM, complex), ["dtype complex128; a weight is", LOADING]),
    "FP8 without scales": (
        with_dtype(GATE, ml_dtypes.float8_e4m3fn),
        ["dtype float8_e4m3fn without its weight_scale_inv", GATE],
    ),
    "scales of another grid": (
        lambda w: w.update(
            {
                GATE: w[GATE].astype(ml_dtypes.float8_e4m3fn),
                GATE + "_scale_inv": np.ones((2, 1), np.float32),
            }
        ),
        [r"scales? .*shape \(2, 1\); expected \(1, 1\)", GATE],
    ),
    "scales without codes": (
        lambda w: w.__setitem__(GATE + "_scale_inv", np.ones((1, 1), np.float32)),
        ["codes have dtype float64; expected float8_e4m3fn", GATE],
    ),
    "scales of nothing": (
        lambda w: w.__setitem__("model.layers.9.x.weight_scale_inv", np.ones((1, 1), np.float32)),
        ["model.layers.9.x.weight_scale_inv"],
    ),
}


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
@pytest.mark.parametrize("flaw", WEIGHTS)
def test_wrong_weights(flaw, precision):
    """Nothing wrong is hidden: not by a plan that converts, not by a float that is not a number."""
    change, parts = WEIGHTS[flaw]
    weights = weights_with(change)
    rejected(lambda: Impl(precision=precision).load(DICT, weights), *parts)


def test_good_weights_are_accepted_with_optional_copies():
    """Catches a check that rejects everything, and MTP's copies of embedding and head refused."""
    c = SMALL.replace(num_nextn_predict_layers=1)
    weights = make_weights(c.to_dict(), np.random.default_rng(0), mtp=1)
    copies = {
        "model.layers.2.embed_tokens.weight": weights["model.embed_tokens.weight"],
        "model.layers.2.shared_head.head.weight": weights["lm_head.weight"],
    }
    impl = Impl(precision="float64").load(c.to_dict(), weights | copies)
    assert np.isfinite(impl.forward(some_tokens())["logits"]).all()


def test_large_finite_weights_are_not_called_infinite():
    """Catches a check by the sum alone: it overflows in float32 while every element is finite."""
    weights = weights_with(lambda w: w.__setitem__(NORM, np.full(24, 3e38, np.float32)))
    Impl(precision="float32").load(DICT, weights)


def test_no_model_no_answer():
    """Catches an AttributeError for a call before `load`."""
    rejected(lambda: Impl().forward([[1]]), r"no model is loaded; call load\(config, weights\)")


# ---- Inputs

MODEL = small()
CACHE = MODEL(MODEL.inputs(some_tokens(2, 4))).cache
LAST = SMALL.max_position_embeddings - 1
OK = [[1, 2, 3], [4, 5, 6]]
INPUTS = {
    "id too large": (lambda: MODEL.inputs([[1, 29]]), [r"token id 29 at \[0, 1\]: outside 0..28 \(vocab_size=29\)"]),
    "negative id": (lambda: MODEL.inputs([[1], [-1]]), [r"token id -1 at \[1, 0\]: outside 0..28"]),
    "floats": (lambda: MODEL.inputs([[1.0, 2.0]]), ["dtype float64; expected integers", "^  in tokens$"]),
    "booleans": (lambda: MODEL.inputs(np.ones((1, 2), bool)), ["dtype bool; expected integers", "in tokens"]),
    "ragged": (lambda: MODEL.inputs([[1, 2], [3]]), ["not a rectangular array", "in tokens"]),
    "text": (lambda: MODEL.inputs([["a", "b"]]), ["dtype <U1; expected integers", "in tokens"]),
    "nothing": (lambda: MODEL.inputs(None), ["in tokens"]),
    "empty batch": (lambda: MODEL.inputs([]), [r"tokens has shape \(0,\); expected \(B, S\), not empty"]),
    "empty text": (lambda: MODEL.inputs([[], []]), [r"tokens has shape \(2, 0\); expected \(B, S\)"]),
    "one axis": (lambda: MODEL.inputs([1, 2]), [r"tokens has shape \(2,\); expected \(B, S\)"]),
    "position too large": (
        lambda: MODEL.inputs([[1, 2]], positions=[[0, 512]]),
        [r"position 512 at \[0, 1\]: outside 0..511 \(max_position_embeddings=512\)"],
    ),
    "negative position": (lambda: MODEL.inputs([[1]], positions=[[-1]]), ["position -1 at"]),
    "too long a text": (
        lambda: MODEL.inputs(np.zeros((1, 513), int)),
        [r"position 512 at \[0, 512\]: outside 0..511"],
    ),
    "positions of another shape": (lambda: MODEL.inputs(OK, positions=[[0, 1]]), ["positions"]),
    "float positions": (lambda: MODEL.inputs([[1]], positions=[[0.5]]), ["dtype float64", "in positions"]),
    "valid of another shape": (
        lambda: MODEL.inputs(OK, valid=[[1, 1]]),
        [r"valid has shape \(1, 2\), tokens \(2, 3\)"],
    ),
    "valid beyond 0 and 1": (lambda: MODEL.inputs(OK, valid=[[1, 2, 1], [1, 1, 1]]), ["valid"]),
    "documents of another shape": (
        lambda: MODEL.inputs(OK, documents=[[0, 0]]),
        [r"documents has shape \(1, 2\), tokens \(2, 3\)"],
    ),
    "label too large": (
        lambda: MODEL.inputs([[1, 2]], labels=[[0, 29]]),
        [r"label 29 at \[0, 1\]: outside 0..28 \(vocab_size=29\)"],
    ),
    "label -1": (lambda: MODEL.inputs([[1, 2]], labels=[[-1, 2]]), [r"label -1 at \[0, 0\]: outside 0..28"]),
    "labels of another shape": (lambda: MODEL.inputs(OK, labels=[[1]]), [r"labels has shape \(1, 1\)"]),
    "no labels": (lambda: MODEL.loss(MODEL.inputs(OK)), ["the loss needs labels"]),
    "cache of another batch": (
        lambda: MODEL.inputs([[1]], cache=CACHE),
        ["the cache holds 2 sequences, tokens 1"],
    ),
    "documents missing from the cache": (
        lambda: MODEL(MODEL.inputs(OK, documents=OK, cache=CACHE), CACHE),
        ["documents must be given for every part of a sequence or for none"],
    ),
}


@pytest.mark.parametrize("flaw", INPUTS)
def test_wrong_input(flaw):
    """Each names the value, its place, and the limit."""
    run, parts = INPUTS[flaw]
    rejected(run, *parts)


def test_the_limits_themselves_are_allowed():
    """Catches limits off by one: the last id, the last position, -100, an array of int32."""
    inputs = MODEL.inputs(np.array([[0, 28]], np.int32), positions=[[LAST - 1, LAST]], labels=[[-100, 28]])
    assert np.isfinite(MODEL(inputs).logits).all()
    assert np.isfinite(MODEL.loss(inputs)[0])


def test_a_full_context_cannot_be_continued():
    """Catches a rope table read beyond its end by a decoding loop."""
    model = small(max_position_embeddings=4)
    cache = model(model.inputs(some_tokens(1, 4))).cache
    rejected(lambda: model.inputs([[1]], cache=cache), r"position 4 at .*max_position_embeddings=4")


@pytest.mark.parametrize("length", [1, 2])
def test_mtp_needs_more_tokens_than_modules(length):
    """Catches an empty window deep inside a module."""
    model = small(num_nextn_predict_layers=2)
    inputs = model.inputs(some_tokens(1, length), labels=some_tokens(1, length))
    rejected(lambda: model.loss(inputs, mtp_weight=0.3), "2 MTP modules need more than 2 tokens")
    model.loss(inputs)  # without MTP there is nothing to refuse


# ---- Single stages, as a port calls them


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda i: i.stage("router.idz", {}), ["no stage 'router.idz'; there are: "]),
        (lambda i: i.stage("router.choice", {"s": 1.0}), ["argument 'b' is missing", r"in stage router.choice\("]),
        (
            lambda i: i.stage("router.groups", {"a": [1.0], "k": 3}),
            ["unknown arguments: k", r"in stage router.groups\("],
        ),
        (lambda i: i.forward([[1]], taps=["fwd/L7/attn_out"]), ["no tap matches 'fwd/L7/attn_out'"]),
        (lambda i: Impl(precision="fp7"), ["precision 'fp7'; known: float64, float32"]),
        (lambda i: i.forward([[1]], taps=3), ["taps are names or patterns, not .3."]),
        (lambda i: i.forward([[1]], cache=[]), ["cache is a list; expected a dict"]),
        (lambda i: i.step(1, None), ["step needs the cache that forward filled"]),
        (lambda i: Impl().load(None, {}), ["the config is a NoneType; expected the keys of config.json"]),
        (lambda i: Impl().load(DICT, ["a"]), ["weights is a list; expected a mapping"]),
    ],
    ids=[
        *("no such stage", "argument missing", "argument too many", "no such tap", "no such plan"),
        *(
            "taps that are no names",
            "cache that is no dict",
            "step without cache",
            "no config",
            "weights without names",
        ),
    ],
)
def test_wrong_question(call, parts):
    """Catches a KeyError or TypeError where a sentence belongs."""
    impl = Impl(precision="float64").load(DICT, weights_with(lambda w: None))
    rejected(lambda: call(impl), *parts)


def test_router_functions_keep_their_inputs():
    """Catches a selection that sorts or masks the scores in place."""
    a = np.random.default_rng(0).random((1, 2, 12))
    a.flags.writeable = False
    kept = router.groups(router.group_scores(a, n_group=4, best=2), topk_group=2)
    router.ids(a, kept, k=4, n_group=4, fill=0.0)


@pytest.mark.parametrize("command", ["case --regimes", "diff --schema", "schedule dualpipe --pp 8 --microbatches 20"])
def test_a_reader_that_stops_reading_is_no_error(command):
    """Catches a traceback, or an exit code that reads as a verdict, for `refimpl ... | head -1`."""
    run = [sys.executable, "-m", "refimpl", *command.split()]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as p:
        p.stdout.close()  # as `head` does when it has enough
        error = p.stderr.read()
    assert (p.returncode, error) == (0, b"")
