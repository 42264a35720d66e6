"""Chapter 2's exercises, held against the tensors that the specification expects in a checkpoint and a recorded run."""

from math import prod

import numpy as np
import pytest

from refimpl import PRESETS, Impl
from refimpl.layers import STAGES
from refimpl.model.causal_lm import expected_tensors
from refimpl.train.training import init

SMALL = PRESETS["tiny"].replace(num_nextn_predict_layers=0)


@pytest.mark.parametrize("c", [SMALL, SMALL.replace(n_shared_experts=2, first_k_dense_replace=2), PRESETS["mini"]])
def test_total(mine, c):
    """Catches a forgotten norm, bias, head or shared expert, and layers of the wrong kind."""
    assert mine.total(c) == sum(prod(s) for s in expected_tensors(c, mtp=False).values())


def test_the_released_sizes(mine):
    """Catches experts left out of the active count, or all of them in it: the report's 671B and 37B."""
    c = PRESETS["deepseek-v3"]
    assert mine.total(c) == 671_026_419_200 and round(mine.active(c) / 1e9, 2) == 37.55
    idle = 58 * (256 - 8) * 3 * 7168 * 2048
    assert mine.total(c) - mine.active(c) == idle


def test_real_shape(mine):
    """Catches sums and halves read as letters: held against the arrays of a recorded run."""
    out = (
        Impl()
        .load(SMALL, init(SMALL))
        .forward(np.zeros((2, 3), int), taps=["L0/mla.*", "L1/router.scores", "fwd/mla.rope_tables"])
    )
    for tap, x in out.items():
        stage = STAGES.get(tap.rpartition("/")[2])
        if stage is not None:
            assert tuple(mine.real_shape(stage.shape, SMALL, 2, 3)) == x.shape, tap
