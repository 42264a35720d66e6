"""Every variant is marked, has its row in the claims ledger and its true gradient, and is in no run of the model."""

import re
import tomllib

import numpy as np
import pytest

from refimpl.autograd import Tensor, directional, nn_ops
from refimpl.layers import STAGES, observing
from refimpl.layers.variants import MARK
from refimpl.record import catalogue_text
from refimpl.spec_tests.cases import variants
from refimpl.spec_tests.cases.small_models import SMALL, some_tokens
from refimpl.spec_tests.tools.tree import ROOT, in_repository
from refimpl.train import Recipe, State, init, step

NAMES = sorted(n for n in STAGES if n.startswith("variant."))
SIZES = {"B": 2, "S": 3, "T": 5, "D": 4, "E": 6, "K": 2, "V": 7}
CALLS = variants.calls(np.random.default_rng(3), **SIZES)
CONSTANT = {
    "variant.top2_ones": "ones have no slope",
    "variant.load_factor": "a count",
    "variant.kept": "a decision",
    "variant.rerouted": "a decision",
    "variant.distance_mask": "a mask",
    "variant.sliding_window": "a mask",
    "variant.segment_memory": "the source stops the gradient",
    "variant.ece": "a measure, no loss",
}


def rows():
    """id -> row of the claims ledger."""
    files = sorted((ROOT / "docs" / "claims").glob("*.toml"))
    return {c["id"]: c for f in files for c in tomllib.loads(f.read_text(encoding="utf-8"))["claim"]}


def test_there_is_a_call_of_every_variant():
    """Catches a variant that no test of this file sees."""
    assert set(CALLS) == set(NAMES) and set(CONSTANT) < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_marked(name):
    """Catches a stage of an article that could be taken for one of V3's."""
    assert STAGES[name].what.endswith(f"({MARK})")


@in_repository
def test_claims_and_variants_name_each_other():
    """Catches a variant without a row, a row that leads to none, a claim that was renumbered."""
    by_stage = {n: set(re.findall(r"\ba\d-\d\d\b", STAGES[n].eq)) for n in NAMES}
    assert all(by_stage.values())
    by_row = {n: {id for id, row in rows().items() if n in row.get("here", [])} for n in NAMES}
    assert by_stage == by_row


@in_repository
def test_the_page_is_what_the_stages_say():
    """Catches a variant that changed without `refimpl taps --markdown docs/variants.md`, and prose about one that is gone."""
    page = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
    assert catalogue_text.rewritten(page) == page
    assert set(re.findall(r"`(variant\.\w+)`", page)) == set(NAMES)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CONSTANT)))
def test_gradient(name):
    """Catches a wrong vjp, float64 central differences. A locked expert's -inf has no difference: its affinity has."""
    args, static = CALLS[name]

    def fn(*args):
        y = STAGES[name](*args, **static)
        return nn_ops.softmax(y) if name == "variant.cold_start" else y

    assert directional(fn, *args) < 1e-7


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CONSTANT)))
def test_the_gradient_reaches_something(name):
    """Catches a detached input: then the analytic derivative is 0, and a check against a flat function would pass."""
    args, static = CALLS[name]
    args = [Tensor(a) if a.dtype.kind == "f" else a for a in args]
    assert isinstance(STAGES[name](*args, **static), Tensor)


@pytest.mark.parametrize("name", sorted(CONSTANT))
def test_constants_stay_off_the_tape(name):
    """Catches a gradient through a decision, a mask, a memory or a measure."""
    args, static = CALLS[name]
    kept = [Tensor(a) if a.dtype.kind == "f" and "mask" not in name and "window" not in name else a for a in args]
    if name in ("variant.segment_memory", "variant.ece"):
        kept[0] = args[0]  # a memory, a confidence: arrays by their type
        kept[1:] = [args[1]] if name == "variant.ece" else kept[1:]
    assert not isinstance(STAGES[name](*kept, **static), Tensor)


def test_no_run_of_the_model_calls_one():
    """Catches a variant that became a default: a training step with every loss, all stages noted."""
    seen = set()

    def note(stage, run, /, *args, **static):
        seen.add(stage.name)
        return run(*args, **static)

    config = SMALL.replace(num_nextn_predict_layers=1)
    with observing(note):
        step(config, State(init(config)), some_tokens(), Recipe(mtp_weight=0.1, aux_weight=0.1))
    assert "router.ids" in seen and "router.bias_update" in seen and not seen & set(NAMES)
