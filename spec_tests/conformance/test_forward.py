"""Rung 2: whole runs, judged by the diff from whatever the implementation shows of them."""

from dataclasses import replace

import numpy as np
import pytest

from refimpl.conformance.bench import PLAIN
from refimpl.diff.judge import judge

from .plugin import claim
from .test_stages import regimes


def judged(bench, case, taps):
    """The diff's judgement of what was given."""
    return judge(case, bench.of.trace(case, taps))


def asked(bench, case, taps):
    """The implementation's answer, with padding and positions where the case has them."""
    given = {k: v for k, v in (("positions", case.positions), ("valid", case.valid)) if v is not None}
    return bench.of.call("forward", case.tokens, taps=taps, **given)


@pytest.mark.parametrize("regime", regimes())
@claim("FW-001", "core", "R 2.1")
def test_every_tap_that_is_shown_conforms(bench, regime):
    """Catches a stage that is right alone and wrong in the model: another input, another order, another weight."""
    case = bench.loaded(regime)
    found = judged(bench, case, asked(bench, case, ["*"]))
    assert found.verdict != "DIVERGES", [f"{f.tap}: {f.note}" for f in found.culprits][:3]
    assert np.isfinite([f.error for f in found.findings]).all()


@pytest.mark.parametrize("regime", regimes())
@claim("FW-002", "core", "R 2.1")
def test_the_logits_are_a_correct_runs(bench, regime):
    """Catches what an implementation without taps gets wrong: its logits are further from ours than roundings reach."""
    case = bench.loaded(regime)
    found = judged(bench, case, {"logits": asked(bench, case, [])["logits"]})
    assert found.verdict != "DIVERGES", [f.note for f in found.culprits]


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
SCALINGS = {
    "none": None,
    "another-factor": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "two-mscales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
}


@pytest.mark.parametrize("scaling", SCALINGS)
@claim("FW-004-{scaling}", "yarn", "R 4.3 (YaRN)")
def test_logits_follow_the_configs_rope_scaling(bench, scaling):
    """Catches YaRN's ramp, its mscale or its original length taken from elsewhere than the config, or applied where it has none."""
    case = bench.case()
    case = replace(case, raw_config=case.raw_config | {"rope_scaling": SCALINGS[scaling]})
    bench.of.load(case)
    found = judged(bench, case, {"logits": asked(bench, case, [])["logits"]})
    assert found.verdict != "DIVERGES", [f.note for f in found.culprits]


@claim("FW-003", "mtp", "R 2.2 eqs 21-23")
def test_mtp_modules_conform(bench):
    """Catches the two halves of a module's input swapped, norms left out, an embedding of the same instead of the next token."""
    case = bench.loaded(PLAIN)
    taps = {t: a for t, a in asked(bench, case, ["*"]).items() if "mtp" in t}
    if not taps:
        pytest.skip("NOT-IMPLEMENTED taps of MTP modules")
    found = judged(bench, case, taps)
    assert found.verdict != "DIVERGES", [f"{f.tap}: {f.note}" for f in found.culprits][:3]
