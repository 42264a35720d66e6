"""The tensor core against measured outputs of H100, L40S, Ada and B200: 5,000 dot products per GPU and format.

The measurements are other people's data and not part of this repository; docs/tensor_core.md says how to obtain and
convert them. REFIMPL_HARDWARE_VECTORS names the converted file; without it these tests are skipped, saying so.
"""

import functools
import os
import pathlib

import numpy as np
import pytest

from refimpl.layers.numerics import tensor_core_matmul
from refimpl.layers.numerics.tensor_cores import text as tensor_core
from refimpl.spec_tests.cases import tensor_core_mutants as mutants
from refimpl.spec_tests.cases.tensor_core import blocks, rows

VARIABLE = "REFIMPL_HARDWARE_VECTORS"
WHERE = os.environ.get(VARIABLE, "")
pytestmark = pytest.mark.skipif(
    not WHERE,
    reason=f"{VARIABLE} is not set: measured GPU outputs are public but not ours to ship; docs/tensor_core.md, section \
'Measured outputs', says which files to fetch and how `python -m refimpl.spec_tests.convert_hardware` makes the file",
)
ARCH = {"h100": "hopper", "l40s": "ada", "ada": "ada", "b200": "blackwell"}
MEASURED = [f"{gpu}_{fmt}" for gpu in ("h100", "l40s", "ada") for fmt in ("e4m3", "e5m2", "bf16", "fp16")]
MEASURED += ["b200_bf16", "b200_fp16"]


@functools.cache
def measured():
    """{name: array}. A variable that names no file is an error, not a skip."""
    with np.load(pathlib.Path(WHERE)) as file:
        return dict(file)


def vectors(name):
    gpu, fmt = name.split("_")
    machine = {"arch": ARCH[gpu], "fmt": fmt.replace("fp16", "f16")}
    return machine, *(measured()[f"{name}_{x}"] for x in "abcd")


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_output_is_equal_to_the_bit(name):
    """Catches a rule that only simulators agree on: 5,000 outputs of silicon, both forms of the code."""
    machine, a, b, c, d = vectors(name)
    assert len(d) == 5000
    np.testing.assert_array_equal(rows(tensor_core.tensor_core_matmul, a, b, c, **machine), d)
    np.testing.assert_array_equal(blocks(tensor_core_matmul, a, b, c, **machine), d)


@pytest.mark.parametrize(("mutant", "wrong"), mutants.ON_H100)
def test_the_h100_outputs_tell_the_rule_from_its_neighbours(mutant, wrong):
    """Catches data that could not tell: each change of one detail is wrong on this many of 5,000 H100 outputs."""
    _, a, b, c, d = vectors("h100_e4m3")
    assert int((mutants.rows(mutant, a, b, c) != d).sum()) == wrong
