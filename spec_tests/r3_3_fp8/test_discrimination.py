"""Could the recordings tell the rule from its neighbours? Every change of one detail must be wrong on many of them."""

import numpy as np
import pytest

from refimpl.spec_tests.cases import tensor_core_mutants as mutants

from .test_tensor_core import hopper

# Wrong outputs among the recorded rows with K = 32 (2,262, single steps) and K = 128 (660)
ON_RECORDINGS = {
    "output to nearest": (181, 119),
    "output in full float32": (346, 53),
    "no alignment loss": (1097, 452),
    "F 14": (785, 373),
    "F 12": (1222, 489),
    "groups of 16": (455, 228),
    "groups of 8": (667, 284),
    "alignment to nearest": (1142, 452),
    "alignment to floor": (1735, 583),
    "products renormalised": (250, 127),
    "zeros take part": (16, 0),
}


def test_the_rule_itself_is_never_wrong():
    """Catches a harness that calls everything wrong."""
    for k in (32, 128):
        a, b, c, d = hopper(k)
        np.testing.assert_array_equal(mutants.rows("none", a, b, c), d)


@pytest.mark.parametrize("mutant", [*mutants.MACHINE, *mutants.PATCH])
def test_one_changed_detail_is_found_wrong(mutant):
    """Catches recordings that a wrong rule would also reproduce, and a mutant that does nothing."""
    wrong = []
    for k in (32, 128):
        a, b, c, d = hopper(k)
        wrong.append(int((mutants.rows(mutant, a, b, c) != d).sum()))
    assert tuple(wrong) == ON_RECORDINGS[mutant]
