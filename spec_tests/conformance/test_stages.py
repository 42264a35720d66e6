"""Rung 3: each stage alone, on the inputs of our own run of a case (R 2.1, 2.2, 4.2)."""

import pytest

from refimpl.conformance.bench import PLAIN
from refimpl.layers.stage import STAGES
from refimpl.record.regimes import REGIMES

from .plugin import claim

QUICK = (PLAIN, "bias-negative", "extreme-logits", "offset")
"""Regimes of the default run; the others are slow ones."""


def profile_of(name):
    """The profile that a stage belongs to."""
    return "mtp" if name.startswith("mtp.") else "yarn" if name == "mla.rope_tables" else "core"


NOT_FORWARD = ("cache.", "loss.", "int8.", "variant.", "optim.", "router.counts", "router.bias_update", "mtp.valid")
NOT_FORWARD += ("mtp.documents", "mtp.positions")  # inputs moved along
FORWARD = [s for s in STAGES if not s.startswith(NOT_FORWARD) and not s.endswith(("absorbed", "latent"))]


def stages():
    """Every stage of a forward pass, each the claim of its name."""
    marks = {name: claim(f"ST-{name}", profile_of(name), STAGES[name].eq) for name in FORWARD}
    return [pytest.param(name, id=name, marks=mark) for name, mark in marks.items()]


def regimes():
    """Every regime."""
    return [pytest.param(r, id=r, marks=() if r in QUICK else pytest.mark.slow) for r in (PLAIN, *REGIMES)]


@pytest.mark.parametrize("name", stages())
@pytest.mark.parametrize("regime", regimes())
def test_a_stage_gives_what_its_equation_says(bench, regime, name):
    """Catches a stage that computes another function than its equation, on inputs that are exact."""
    found = bench.stages(regime).get(name, [])  # nothing to ask where a case has no such stage
    lacking = [f for f in found if not hasattr(f, "ok")]
    if lacking:
        raise lacking[0]
    wrong = [f for f in found if not f.ok]
    assert not wrong, f"{wrong[0].tap}: off by {wrong[0].error:.2g}, {wrong[0].allowed:.2g} is allowed; {wrong[0].note}"
