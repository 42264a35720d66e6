"""The latent KV cache in bytes: FlashMLA's layout of 656 bytes per token, and INT8 in the same places."""

import struct
from fractions import Fraction

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.layers.numerics.formats import E4M3, E5M6, INT8, to_bf16
from refimpl.layers.numerics.quantisation import latent_bytes, pack_latent, unpack_latent
from refimpl.spec_tests.oracles import rational

f32 = np.float32


def tokens(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*shape, 512)).astype(f32), rng.normal(size=(*shape, 64)).astype(f32)


def by_hand(c_kv, k_rope):
    """One token as FlashMLA's tests/quant.py stores it: scale 2^ceil(log2 max(amax / 448, 1e-4)), codes of c / scale."""
    codes, scales = [], []
    for group in c_kv.reshape(4, 128):
        smallest = max(float(np.abs(group).max()) / 448, 1e-4)
        scale = Fraction(2) ** -20
        while scale < smallest:
            scale *= 2
        scales.append(float(scale))
        for v in group:
            code, _ = rational.nearest(Fraction(float(v)) / scale, "e4m3fn")
            codes.append(code | int(np.signbit(v)) << 7)
    key = [int(rational.nearest(Fraction(float(v)), "bf16")[0]) | int(np.signbit(v)) << 15 for v in k_rope]
    return struct.pack("<512B4f64H", *codes, *scales, *key)


def test_a_token_is_656_bytes_in_this_order():
    """Catches: scales before codes, a quantised key, scales in another precision or order, scales that divide."""
    c_kv, k_rope = tokens(2, 3)
    c_kv[0, 1, 128:256] *= f32(1e-6)  # under the floor of FlashMLA's scale
    packed = pack_latent(c_kv, k_rope)
    assert packed.shape == (2, 3, 656) and packed.dtype == np.uint8
    for at in np.ndindex(2, 3):
        assert packed[at].tobytes() == by_hand(c_kv[at], k_rope[at])


def test_what_is_unpacked_is_code_times_scale_in_bfloat16():
    """Catches: another group's scale, a key that lost bits it had, a latent kept in float32 where kernels round it."""
    c_kv, k_rope = tokens(4)
    packed = pack_latent(c_kv, k_rope)
    c, k = unpack_latent(packed)
    np.testing.assert_array_equal(k, to_bf16(k_rope))
    raw = packed[:, :512].copy().view(E4M3.dtype).astype(f32).reshape(4, 4, 128)
    scales = np.frombuffer(packed[:, 512:528].tobytes(), "<f4").reshape(4, 4, 1)
    np.testing.assert_array_equal(c, (raw * scales).reshape(4, 512))  # E4M3 times a power of two is a bfloat16
    exact, _ = unpack_latent(pack_latent(c_kv, k_rope, dialect="deepseek_v3"), bf16=False)
    rounded, _ = unpack_latent(pack_latent(c_kv, k_rope, dialect="deepseek_v3"))
    assert np.mean(exact != rounded) > 0.5
    np.testing.assert_array_equal(to_bf16(exact), rounded)
    assert np.abs(c - c_kv).max() <= np.abs(c_kv).max() * 2.0**-4


def test_the_cache_is_closed_under_storing():
    """Catches: a second round of rounding when a cached token is moved. With powers of two nothing changes."""
    packed = pack_latent(*tokens(5))
    np.testing.assert_array_equal(pack_latent(*unpack_latent(packed)), packed)


def test_int8_takes_the_same_room_and_errs_less_near_the_top():
    """Catches: INT8 codes read as E4M3, a scale of amax / 128. Steps are amax / 127, everywhere the same."""
    c_kv, k_rope = tokens(6)
    packed = pack_latent(c_kv, k_rope, fmt=INT8, dialect="deepseek_v3")
    assert packed.shape == (6, 656)
    c, _ = unpack_latent(packed, fmt=INT8, bf16=False)
    step = np.repeat(np.abs(c_kv).reshape(6, 4, 128).max(-1) / 127, 128, axis=1)
    assert np.all(np.abs(c - c_kv) <= step * 0.50001)
    fp8, _ = unpack_latent(pack_latent(c_kv, k_rope), bf16=False)
    assert np.mean((c - c_kv) ** 2) < np.mean((fp8 - c_kv) ** 2) / 4  # Gaussian latents
    assert not np.allclose(unpack_latent(packed)[0], c_kv, atol=5)  # read as E4M3


@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (128, 16), (200, 6), (13, 2)])
def test_other_widths_follow_the_same_plan(latent, rope):
    """Catches: 512 and 64 written into the code; a ragged last group without its scale."""
    rng = np.random.default_rng(1)
    c_kv, k_rope = rng.normal(size=(3, latent)).astype(f32), rng.normal(size=(3, rope)).astype(f32)
    packed = pack_latent(c_kv, k_rope)
    assert packed.shape[-1] == latent_bytes(latent, rope) == latent + 4 * -(-latent // 128) + 2 * rope
    c, k = unpack_latent(packed, latent=latent, rope=rope)
    assert np.abs(c - c_kv).max() <= np.abs(c_kv).max() * 2.0**-4 and np.array_equal(k, to_bf16(k_rope))


def test_an_empty_cache_is_one():
    """Catches: a prefill of nothing that cannot be stored."""
    c, k = unpack_latent(pack_latent(np.zeros((2, 0, 512), f32), np.zeros((2, 0, 64), f32)))
    assert c.shape == (2, 0, 512) and k.shape == (2, 0, 64)


def spoiled(where, value):
    packed = pack_latent(*tokens(2))
    packed[1, 512 + 4 * where : 516 + 4 * where] = np.frombuffer(struct.pack("<f", value), np.uint8)
    return packed


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: unpack_latent(np.zeros((2, 576), np.uint8), name="layer 3"),
            r"layer 3 has shape \(2, 576\) .* 656 bytes",
        ),
        (lambda: unpack_latent(np.zeros((2, 656), np.int8), name="layer 3"), "of int8"),
        (
            lambda: unpack_latent(spoiled(2, np.nan), name="layer 3"),
            r"layer 3 latent scale .* block \(1, 2\) = row 1, columns 256:384",
        ),
        (lambda: unpack_latent(spoiled(0, -1.0)), "finite, positive"),
        (lambda: unpack_latent(np.zeros((2, 656), np.uint8)), "finite, positive"),
        (
            lambda: pack_latent(np.ones((2, 512)), np.ones((3, 64)), name="layer 3"),
            "layer 3: latent .* different tokens",
        ),
        (
            lambda: pack_latent(np.full((2, 512), np.nan), np.ones((2, 64)), name="layer 3"),
            r"layer 3 latent: block \(0, 0\)",
        ),
        (
            lambda: pack_latent(np.ones((2, 512)), np.full((2, 64), np.inf), name="layer 3"),
            r"layer 3 key\[0, 0\] = inf",
        ),
        (lambda: pack_latent(np.ones((2, 512)), np.ones((2, 64)), fmt=E5M6), "e5m6 not 8 bits"),
    ],
)
def test_what_is_no_cache_is_refused_by_name(call, says):
    """Catches: a bfloat16 cache read as FP8, pages that were never written (scale 0), NaN kept for later."""
    with pytest.raises(SpecError, match=says):
        call()
