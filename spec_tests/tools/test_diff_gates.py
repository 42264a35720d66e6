"""Coverage, self-checks and weights by themselves: what keeps a comparison from being one, on programs of a few lines."""

import numpy as np
import pytest

from refimpl.diff import Trace
from refimpl.diff.gates import coverage_gate, phases_of, self_check_gate, weights_gate
from refimpl.diff.header import Header
from refimpl.diff.trace import digest
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.stage import Call

TAPS = (
    "fwd/embed",
    "fwd/L0/resid",
    "fwd/L0/ffn_norm",
    "fwd/L1/resid",
    "fwd/logits",
    "fwd/mtp1/resid",
    "fwd/mtp1/logits",
)
PROGRAM = [Call(t.rpartition("/")[2], t, (), {}) for t in TAPS]


def header(**parts):
    return Header(config={}, tokens=[[1]], **parts)


def covered(taps, blind=(), program=PROGRAM, **parts):
    gate = coverage_gate(program, Trace(header(**parts), dict.fromkeys(taps, np.zeros(1))), blind)
    return gate.state, gate.text, gate.details


def test_a_run_is_covered_if_something_of_every_unit_is():
    """Catches a layer or the logits that nobody recorded passed over, MTP's logits taken for the model's, a list of what is absent
    of something else.
    """
    whole = "7 of 7 taps recorded"
    assert covered(TAPS) == ("ok", whole, ())
    few = ("fwd/embed", "fwd/L0/resid", "fwd/L1/resid", "fwd/logits", "fwd/mtp1/resid")
    assert covered(few) == ("ok", "5 of 7 taps recorded", ("fwd/L0/ffn_norm", "fwd/mtp1/logits"))
    state, text, details = covered([t for t in TAPS if "L0" not in t])
    assert (state, text) == ("?", "5 of 7 taps recorded; nothing of fwd/L0") and details == (
        "fwd/L0/resid",
        "fwd/L0/ffn_norm",
    )
    assert covered([t for t in TAPS if t != "fwd/logits"])[:2] == ("?", "6 of 7 taps recorded; nothing of fwd/logits")
    two = [*PROGRAM, Call("resid", "dec1/L0/resid", (), {}), Call("logits", "dec1/logits", (), {})]
    rest = [t for t in TAPS if t != "fwd/logits"]
    assert covered([*rest, "dec1/L0/resid", "dec1/logits"], program=two)[0] == "ok"  # only the last need have any
    assert covered([*TAPS, "dec1/L0/resid"], program=two)[1].endswith("nothing of dec1, dec1/logits")
    assert covered(["fwd/L7/x", "a"]) == (
        "?",
        "nothing to compare: no tap of the trace is one of ours",
        ("a", "fwd/L7/x"),
    )


def test_what_was_meant_to_be_recorded_is_asked_for():
    """Catches layers that were not meant to be recorded missed, an expected tap that is not, unknown or blind taps unsaid."""
    assert covered(["fwd/L1/resid"], slices={"layers": [1]})[0] == "ok"
    assert covered(["fwd/L1/resid"], slices={"layers": [0, 1]})[1] == "1 of 7 taps recorded; nothing of fwd/L0"
    assert covered(TAPS, expected=["fwd/L1/resid", "x", "y"]) == (
        "?",
        "7 of 7 taps recorded; expected but never recorded: x, y",
        ("x", "y"),
    )
    assert covered([*TAPS, "b", "a"]) == ("?", "7 of 7 taps recorded; unknown taps: a, b", ("a", "b"))
    assert covered(TAPS, blind=["fwd/L0/resid"])[:2] == (
        "?",
        "7 of 7 taps recorded; what fwd/L0/resid is computed from is not known or not finite",
    )
    gradients = [*PROGRAM, Call("g", "bwd/L0/resid", (), {}), Call("g", "grad/w", (), {})]
    assert covered(TAPS, program=gradients)[1] == "7 of 7 taps recorded"  # nobody meant them
    assert covered([*TAPS, "grad/w"], program=gradients)[1] == "8 of 8 taps recorded"
    assert covered(TAPS, program=gradients, phases=["fwd", "bwd"])[1] == "7 of 8 taps recorded; nothing of bwd/L0"


def test_phases_are_those_that_were_declared_or_that_names_begin_with():
    """Catches a phase that is lost, gradients taken for a part of the run."""
    assert phases_of(header(), ["fwd/logits", "dec2/x", "dec1/y", "grad/w", "bwd/L0/x"]) == [
        "fwd",
        "dec1",
        "dec2",
    ]
    assert phases_of(header(), []) == ["fwd"]
    assert phases_of(header(phases=["fwd", "dec3"]), ["dec1/y"]) == ["fwd", "dec3"]


def test_a_recorder_that_changes_what_it_records_is_told():
    """Catches a probe's own finding that nobody reads, the second of several most of all."""
    assert self_check_gate(header()).state == "ok"
    fine = self_check_gate(header(self_check={"off": 0, "repeat": 0.0}))
    assert (fine.state, fine.text) == ("ok", "the recorder's self-checks are 0: off, repeat")
    bad = self_check_gate(header(self_check={"off": 0, "repeat": 1e-3}))
    assert (bad.state, bad.text) == ("?", "the recorder's self-check repeat is 0.001, not 0")


WEIGHTS = {n: np.random.default_rng(i).standard_normal((3, 4)).astype(np.float32) for i, n in enumerate("abc")}
OWN = {n: digest(w) for n, w in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("declared", "storage", "state", "text", "rounded"),
    [
        ({}, "float32", "?", "declares no weight digests", {}),
        (OWN, "float32", "ok", "3 of 3 tensors agree", {}),
        (OWN | {"b": "sha256:0"}, "float32", "FAIL", "1 of 3 tensors differ from the case: b", {}),
        ({"a": OWN["a"]}, "float32", "FAIL", "2 tensors not loaded, 0 not in the case: b", {}),
        (OWN | {"d": "sha256:0"}, "float32", "FAIL", "0 tensors not loaded, 1 not in the case: d", {}),
        (
            OWN | {"b": digest(to_bf16(WEIGHTS["b"]).astype(np.float32))},
            "float32",
            "FAIL",
            "1 of 3 tensors differ from the case: b",
            {},
        ),
    ],
)
def test_weights_are_the_cases(declared, storage, state, text, rounded):
    """Catches a tensor that is not compared, one that was rounded though nobody said so."""
    gate, found = weights_gate(WEIGHTS, header(weights=declared), storage)
    assert (gate.state, found) == (state, rounded) and text in gate.text
