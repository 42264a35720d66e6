"""The fast form of the tensor core is the integer form, bit for bit: on recordings, random and malicious operands."""

import threading
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.layers.numerics import tensor_core_matmul
from refimpl.layers.numerics.tensor_cores import text as tensor_core
from refimpl.layers.numerics.tensor_cores.fast import COLUMNS, PANEL
from refimpl.layers.numerics.tensor_cores.machines import INPUTS, MACHINES, carrier
from refimpl.spec_tests.cases.tensor_core import KINDS, TARGETS, as_bits, blocks, operands

from .test_tensor_core import HOPPER, OTHER, hopper, other

each_target = pytest.mark.parametrize(("arch", "fmt", "accumulator"), TARGETS, ids=lambda x: getattr(x, "__name__", x))


def assert_same(a, b, c, **machine):
    expected = tensor_core.tensor_core_matmul(a, b, c, **machine)
    np.testing.assert_array_equal(as_bits(tensor_core_matmul(a, b, c, **machine)), as_bits(expected))


# ------------------------------------------------------------------------------------------------------ the recordings


@pytest.mark.parametrize("k", [32, 128, 512])
def test_every_recorded_hopper_row(k):
    """Catches a fast path that is only tried on friendly data; the rows are diagonals of 64 x 64 products."""
    a, b, c, d = hopper(k)
    np.testing.assert_array_equal(blocks(tensor_core_matmul, a, b, c, **HOPPER), d)


@pytest.mark.parametrize("k", [32, 128])
def test_every_output_of_products_of_recorded_rows(k):
    """Catches errors off the diagonal, where NaN rows meet infinite accumulators, subnormals the largest codes."""
    a, b, c, _ = hopper(k)
    rng = np.random.default_rng(k)
    for _ in range(4):
        m, n = rng.choice(len(a), 48), rng.choice(len(a), 96)
        assert_same(a[m], b[n], c[rng.choice(len(a), (48, 96))].view(np.float32), **HOPPER)


@pytest.mark.parametrize("name", OTHER)
def test_every_recorded_row_of_the_other_machines(name):
    """Catches the same in the float64 steps, E5M2, and float16 accumulators."""
    target, a, b, c, d = other(name)
    np.testing.assert_array_equal(blocks(tensor_core_matmul, a, b, c, **target), d)


# ------------------------------------------------------------------------------------------------- random and malicious


@pytest.mark.slow
@each_target
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 40),
    n=st.integers(2, 40),
    k=st.integers(1, 140),
)
def test_any_class_of_operands(arch, fmt, accumulator, seed, kind, m, n, k):
    """Catches what a class brings out: exponents out of a float's range, lost bits taken for kept, signs of zero, NaN."""
    a, b, c = operands(np.random.default_rng(seed), fmt, kind, m, n, k, accumulator)
    assert_same(a, b, c, arch=arch, fmt=fmt)


@pytest.mark.slow
@each_target
@pytest.mark.parametrize("kind", KINDS)
def test_any_class_of_operands_in_bulk(arch, fmt, accumulator, kind):
    """The same, 20,000 dot products per machine and class."""
    rng = np.random.default_rng(sum(map(ord, arch + fmt + kind)))
    for k in (32, 96, 17):
        assert_same(*operands(rng, fmt, kind, 64, 104, k, accumulator), arch=arch, fmt=fmt)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), fmt=st.sampled_from(["e4m3", "e5m2", "bf16"]), quantum=st.integers(-3, 3))
def test_addends_at_the_edge_of_the_quantum(data, fmt, quantum):
    """Catches an E or a quantum that is off by one: all products lie around 2^(E - F), the largest alone above."""
    F = MACHINES["hopper", fmt].F
    sizes = data.draw(st.lists(st.integers(-3, 3), min_size=10, max_size=10))
    signs = data.draw(st.lists(st.sampled_from([1, -1]), min_size=10, max_size=10))
    x = np.array([2.0**6] + [s * 1.75 * 2.0**e for s, e in zip(signs, sizes, strict=True)], np.float32)
    y = np.array([1.0] + [2.0 ** max(6 - F + quantum, -8)] * 10, np.float32)
    a, b = (v.astype(INPUTS[fmt].dtype).view(carrier(INPUTS[fmt])) for v in (x, y))
    c = np.float32(data.draw(st.floats(-(2.0**8), 2.0**8, width=32)))
    assert_same(np.tile(a, (9, 1)), np.tile(b, (9, 1)), c, arch="hopper", fmt=fmt)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "bf16", "tf32"])
@pytest.mark.parametrize(("m", "n", "k"), [(3, COLUMNS + 65, PANEL + 33), (70, 40, 2 * PANEL + 5), (1, 300, PANEL)])
def test_shapes_beyond_one_block(fmt, m, n, k):
    """Catches seams: more columns than a block, more k than a panel, ragged ends, one row, tall results (turned)."""
    a, b, c = operands(np.random.default_rng(m), fmt, "specials", m, n, k)
    b[:2], a[0] = 0, 0x40 if fmt == "e4m3" else a[0]
    assert_same(a, b, c, arch="hopper", fmt=fmt)


def test_infinities_where_the_accumulator_overflows_on_the_way():
    """Catches specials settled after the fact: +inf by overflow first and then an infinite product is NaN, the other way
    round the infinity stays.
    """
    a, b = np.zeros((9, 32), np.float32), np.ones((9, 32), np.float32)
    a[:4, 3], b[:4, 3] = 2.0**127, 4.0  # overflows in the first step of 16
    a[2:6, 20] = -np.inf
    a[6:, 0], a[6:, 20], b[6:, 20] = -np.inf, 2.0**127, 4.0
    codes = [x.astype(ml_dtypes.bfloat16).view(np.uint16) for x in (a, b)]
    c = np.zeros((9, 9), np.float32)
    assert_same(*codes, c, arch="hopper", fmt="bf16")
    assert len(np.unique(as_bits(tensor_core_matmul(*codes, c, arch="hopper", fmt="bf16")))) >= 4


# -------------------------------------------------------------------------------------------------------- housekeeping


def test_memory_is_bounded_by_blocks():
    """Catches temporaries of M x N x K or of the operands' size in float64: 24 MB here, and 8 times that in products."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 0x70, (n, 2048)).astype(np.uint8) for n in (64, 4096))
    c = np.zeros((64, 4096), np.float32)
    tensor_core_matmul(a[:, :64], b[:64, :64], c[:, :64], **HOPPER)  # tables
    tracemalloc.start()
    d = tensor_core_matmul(a, b, c, **HOPPER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < d.nbytes + 14e6, f"{peak / 1e6:.1f} MB at the peak"


def test_numpys_buffer_size_is_put_back_also_after_an_error(monkeypatch):
    """Catches a buffer of 16 elements left behind, which makes every later cast in the process slow."""
    before = np.getbufsize()
    a, b, c = operands(np.random.default_rng(0), "e4m3", "gauss", 20, 20, 32)
    tensor_core_matmul(a, b, c, **HOPPER)
    assert np.getbufsize() == before
    monkeypatch.setattr("refimpl.layers.numerics.tensor_cores.narrow.NarrowSteps._step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tensor_core_matmul(a, b, c, **HOPPER)
    assert np.getbufsize() == before


def test_threads_do_not_share_work_arrays():
    """Catches work arrays in module state: two threads at once give what each gives alone."""
    inputs = [operands(np.random.default_rng(i), "e4m3", "gauss", 64, 256, 256) for i in range(4)]
    alone = [as_bits(tensor_core_matmul(*x, **HOPPER)) for x in inputs]
    together = [None] * 4

    def run(i):
        together[i] = as_bits(tensor_core_matmul(*inputs[i], **HOPPER))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    np.testing.assert_array_equal(together, alone)


def test_tiny_matrices_in_a_batch_take_the_integer_form_and_agree():
    """Catches a threshold at which results change."""
    a, b, c = operands(np.random.default_rng(1), "e4m3", "finite", 50 * 8, 50 * 8, 64)
    a, b = a.reshape(50, 8, 64), b.reshape(50, 8, 64)
    d = tensor_core_matmul(a, b, c[:8, :8], **HOPPER)
    for i in range(50):
        wide = tensor_core_matmul(a[i], np.repeat(b[i], 2, axis=0), np.repeat(c[:8, :8], 2, axis=1), **HOPPER)
        np.testing.assert_array_equal(as_bits(wide)[:, ::2], as_bits(d[i]))
