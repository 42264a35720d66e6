"""Chapter 15's exercises."""

import ml_dtypes
import numpy as np
import pytest

from refimpl.checkpoint import write_file
from refimpl.layers.numerics.quantisation.blocks import dequantize_blocks, quantize_blocks


def test_read(mine, tmp_path):
    """Catches offsets from the file's beginning, a bfloat16 read as float16, a lost shape, an empty tensor."""
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "a.weight": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "steps": np.array(-7),
        "none": np.zeros((0, 4), np.float32),
    }
    write_file(tmp_path / "x.safetensors", tensors, metadata={"format": "pt"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    for name, expected in tensors.items():
        got = mine.read(raw, name)
        assert got.shape == expected.shape and got.dtype == (np.float32 if name != "steps" else np.int64)
        np.testing.assert_array_equal(got, expected.astype(got.dtype))


@pytest.mark.parametrize("bits, dtype", [(4, ml_dtypes.float8_e4m3fn), (5, ml_dtypes.float8_e5m2)])
def test_fp8_of_all_256_bytes(mine, bits, dtype):
    """Catches subnormals with a leading one, a wrong bias, infinities where there are none, -0 that lost its sign."""
    expected = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    got = np.array([mine.fp8(b, bits) for b in range(256)])
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got[::128]), np.signbit(expected[::128]))


@pytest.mark.parametrize("shape, block", [((8, 8), 4), ((9, 6), 4), ((3, 13), 4), ((5, 5), 128)])
def test_dequantise(mine, shape, block):
    """Catches scales by row alone, transposed ones, a ragged edge that reads beyond or is dropped."""
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    codes, scales = quantize_blocks(w, block)
    got = mine.dequantise(codes.astype(np.float32), scales, block)
    np.testing.assert_array_equal(got, dequantize_blocks(codes, scales, block))
