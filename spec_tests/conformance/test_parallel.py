"""W ranks give what one rank gives: of the implementation's stages, of its loads, of its own ranks."""

import numpy as np
import pytest

from refimpl.conformance.bench import PLAIN
from refimpl.conformance.parallel import AXES, CUTS, by_stages, joined, whole_and_sum
from refimpl.diff.judge import judge

from .plugin import claim


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis", AXES)
@claim("PA-001-{axis}", "parallel", "R 3.2")
def test_ranks_made_of_its_stages_are_one_rank(bench, axis, world):
    """Catches a stage that knows the whole model's heads, channels or experts only, or that keeps something between calls."""
    case = bench.loaded()
    assert not bench.near(PLAIN, by_stages(bench.of, case, axis, world), by_stages(bench.of, case))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", CUTS)
@claim("PA-002-{what}", "parallel", "R 3.2")
def test_loads_of_a_ranks_part_each_add_up_to_the_whole(bench, what, world):
    """Catches what is scaled, added or normed once a rank instead of once: by sizes that a cut model has fewer of."""
    whole, total = whole_and_sum(bench.of, bench.case(), what, world)
    assert not bench.near_sum(what, world, whole, total)


@pytest.mark.parametrize("axis", AXES)
@claim("PA-003-{axis}", "parallel", "R 3.2")
def test_its_own_ranks_are_one_rank(bench, axis, tmp_path):
    """Catches a collective left out, taken twice or over other ranks, and parts in another order than they are put together in."""
    case = bench.loaded()
    found = joined(bench.of, case, {axis: 2}, tmp_path)
    judgement = judge(case, found)
    assert judgement.verdict != "DIVERGES", [f"{f.tap}: {f.note}" for f in judgement.culprits][:3]
    assert not bench.near(PLAIN, np.asarray(found.taps["fwd/logits"], np.float64), bench.of.logits(case.tokens))
