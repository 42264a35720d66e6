"""Mistakes of real ports in block FP8, one test each: what the bug computes, and that ours differs or refuses.

The numbers F01 to F14 and the issues they come from are those of the bug corpus this suite was built on.
"""

import re

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics import dequantize_blocks, quantize_blocks
from refimpl.layers.numerics.formats import E4M3, pack_ue8m0, unpack_ue8m0
from refimpl.layers.numerics.quantisation.quantise import Quantized, quantize, quantize_with
from refimpl.layers.numerics.quantisation.scales import decode_scales, encode_scales

f32 = np.float32


def weight(rows=576, columns=256, seed=0):
    """kv_a_proj_with_mqa in small: 4.5 blocks of rows, each block of another size."""
    rng = np.random.default_rng(seed)
    sizes = np.repeat(np.exp2(rng.integers(-3, 3, size=(-(-rows // 128), 1))), 128, axis=0)[:rows]
    return (rng.normal(size=(rows, columns)) * sizes * 0.02).astype(f32)


def off(a, b):
    """Relative root mean square difference."""
    return np.sqrt(np.mean((a.astype(float) - b) ** 2) / np.mean(b.astype(float) ** 2))


W = weight()
CODES, SCALES = quantize_blocks(W)
RIGHT = dequantize_blocks(CODES, SCALES)


def test_the_right_way():
    """What the mistakes below are measured against: E4M3's rounding, and no more."""
    assert off(RIGHT, W) < 0.04


@pytest.mark.parametrize("size", [116, 125])
def test_f01_f02_block_size_inferred_from_the_scales(size):
    """TensorRT-LLM #14793, Model-Connect #1115: ceil(rows / scale rows). The shapes agree: the size has to be given."""
    assert -(-576 // size) == SCALES.shape[0]
    wrong = np.repeat(SCALES, size, axis=0)[:576]
    mistaken = CODES.astype(f32) * np.repeat(wrong, 128, axis=1)
    assert off(mistaken, RIGHT) > 0.1
    assert off(dequantize_blocks(CODES, SCALES, (size, 128)), mistaken) == 0  # accepted, if that is what one says


@pytest.mark.parametrize("rows", [576, 127, 129, 1])
def test_f03_dimensions_that_128_does_not_divide(rows):
    """ms-swift #6851, llm-compressor #1817, unsloth #6848: refused, or the last block scaled by its neighbour."""
    w = weight(rows, 200, seed=rows)
    codes, scales = quantize_blocks(w)
    assert scales.shape == (-(-rows // 128), 2)
    assert off(dequantize_blocks(codes, scales), w) < 0.04
    with pytest.raises(SpecError, match="shape"):
        dequantize_blocks(codes, scales[: max(rows // 128, 1), :1])


def test_f04_rows_permuted_but_not_their_scales():
    """sglang #35703: fused or reordered rows. Whole blocks may move with their scales; single rows have to be requantised."""
    halves = np.r_[256:512, 0:256, 512:576]
    mistaken = dequantize_blocks(CODES[halves], SCALES)
    assert off(mistaken, RIGHT[halves]) > 0.3
    moved = dequantize_blocks(CODES[halves], SCALES[[2, 3, 0, 1, 4]])
    np.testing.assert_array_equal(moved, RIGHT[halves])


def test_f05_scales_ignored():
    """abliterix #94: the name of the scale tensor was not recognised, the codes were taken for the weights."""
    raw = CODES.astype(f32)
    assert np.abs(raw).max() / np.abs(RIGHT).max() > 1000
    with pytest.raises(SpecError, match="dtype float32"):
        dequantize_blocks(raw, SCALES)


def test_f06_the_wrong_axis():
    """vLLM #28637: N read from the other axis. The grid of a matrix that is not square is refused transposed."""
    says = re.escape(f"weight scales have shape {SCALES.T.shape}; expected {SCALES.shape}")
    with pytest.raises(SpecError, match=says):
        dequantize_blocks(CODES, SCALES.T)
    square = quantize(weight(512, 512), 128)
    turned = Quantized(square.codes, square.scales.T.copy(), square.tile)  # nothing can tell, but the values
    assert off(turned.dequantize(), square.dequantize()) > 0.3
    np.testing.assert_array_equal(square.T.T.dequantize(), square.dequantize())


def test_f07_a_stale_block_size():
    """vllm-gaudi #1220: the configured block size did not arrive, 128 was used for blocks of 64."""
    codes, scales = quantize_blocks(W, 64)
    with pytest.raises(SpecError, match=r"shape \(9, 4\); expected \(5, 2\)"):
        dequantize_blocks(codes, scales)
    assert off(dequantize_blocks(codes, scales, 64), W) < 0.04


def test_f08_a_block_of_zeros():
    """lmdeploy #3652: 0 / 0. Clamped or not, a tile of zeros has a positive scale and gives zeros back."""
    x = np.random.default_rng(1).normal(size=(4, 256)).astype(f32)
    x[2, :128] = 0
    with np.errstate(invalid="ignore"):
        mistaken = x[2, :128] / (np.abs(x[2, :128]).max() / f32(448))
    assert np.isnan(mistaken).all()
    for dialect in ("deepseek_v3", "deepseek_v3_unclamped", "flashmla", "tilekernels"):
        q = quantize(x, dialect=dialect)
        assert np.all(q.scales > 0) and not q.dequantize()[2, :128].any()


def test_f09_the_scale_rounded_after_the_division():
    """sglang #28307, #28418, #26766: codes of x / s beside 2^ceil(log2 s). Scales 1.3 to 1.5 too large on average."""
    x = np.random.default_rng(2).normal(size=(256, 1024)).astype(f32)
    exact, right = quantize(x), quantize(x, dialect="deepseek_v32_ue8m0")
    mistaken = Quantized(exact.codes, right.scales, exact.tile).dequantize()
    inflation = np.mean(right.scales / exact.scales)
    assert 1.25 < inflation < 1.55
    assert off(mistaken, x) > 8 * off(right.dequantize(), x)


@pytest.mark.parametrize("mistake", ["rounded up", "cut off"])
def test_f10_weight_scales_changed_without_the_codes(mistake):
    """transformers #46763, #47030, sglang #13067 and others: finite, silent and wrong, by up to a factor of two."""
    if mistake == "rounded up":
        wrong = decode_scales(encode_scales(SCALES, rounding="up"))
    else:
        wrong = (SCALES.view(np.uint32) >> 23 << 23).view(f32)
    assert off(dequantize_blocks(CODES, wrong), RIGHT) > 0.2
    with pytest.raises(SpecError, match="expected a power of two"):
        encode_scales(SCALES, rounding="exact")
    again = Quantized(CODES, SCALES, (128, 128)).requantize(128, "deepgemm_ue8m0")
    assert off(again.dequantize(), RIGHT) < 0.04
    np.testing.assert_array_equal(decode_scales(again.scale_codes), again.scales)


def test_f11_scales_in_the_wrong_format():
    """vLLM #22399: float32 scales handed to a kernel that reads packed UE8M0, or the reverse: GSM8K 0."""
    x = np.random.default_rng(3).normal(size=(8, 512)).astype(f32)
    q = quantize(x, dialect="deepgemm_ue8m0")
    words = pack_ue8m0(q.scale_codes)
    mistaken = words.view(f32)  # one float32 per four scales
    assert mistaken.shape != q.scales.shape
    for scales in (words, q.scale_codes):
        with pytest.raises(SpecError, match="scales have"):
            Quantized(q.codes, scales, q.tile)
    with pytest.raises(SpecError, match="expected 32-bit words"):
        unpack_ue8m0(q.scales)
    np.testing.assert_array_equal(decode_scales(unpack_ue8m0(words)), q.scales)


def test_f12_f14_scales_in_the_other_order():
    """sglang #29036, #29038, vLLM #54521: token-major read as group-major; right for one token or one group only."""
    x = (np.random.default_rng(4).normal(size=(4, 512)) * np.exp2(np.arange(4))[:, None]).astype(f32)
    q = quantize(x)
    mistaken = Quantized(q.codes, q.scales.ravel().reshape(4, 4, order="F"), q.tile)
    assert off(mistaken.dequantize(), x) > 0.3
    with pytest.raises(SpecError, match=r"x scales have shape \(4, 3\); expected \(3, 4\)"):
        Quantized(q.codes[:3], q.scales[:3].T, q.tile)
    one = q.scales[:1]
    np.testing.assert_array_equal(one.ravel(), one.ravel(order="F"))  # M = 1: why nobody noticed


def test_f13_another_rule_for_powers_of_two():
    """sglang #29954, #29956: bit differences at the edge. By the log2 of float32 the scale is half as large here."""
    s = np.nextafter(np.exp2(np.arange(-20, -4)).astype(f32), f32(1))
    x = np.stack([s * f32(448), np.zeros(16, f32)], axis=1)
    bits, log2 = (quantize(x, (1, 2), dialect=d).scales[:, 0] for d in ("deepseek_v32_ue8m0", "deepseek_v31"))
    np.testing.assert_array_equal(bits, 2 * log2)


def test_saturation_hides_what_a_wrong_scale_does():
    """Catches: taking finite output for right. Half the scale, saturated, is finite and several per cent off."""
    x = np.random.default_rng(6).normal(size=(64, 256)).astype(f32)
    half = quantize(x).scales / 2
    silent = quantize_with(x, half, overflow="saturate").dequantize()
    assert np.isfinite(silent).all() and off(silent, x) > 0.1
    with pytest.raises(SpecError, match=r"x / scale\[\d+, \d+\]"):
        quantize_with(x, half, overflow="refuse")
    assert E4M3.max == 448
