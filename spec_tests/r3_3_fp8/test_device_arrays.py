"""The codecs and quantisers on arrays that are not NumPy's: the same lines serve CuPy. See cases/duck.py."""

import numpy as np
import pytest

from refimpl.layers.numerics.formats import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    E5M6,
    FORMATS,
    FP16,
    INT8,
    UE8M0,
    decode,
    encode,
    pack_e2m1,
    pack_e5m6,
    pack_ue8m0,
    to_bf16,
    unpack_e2m1,
    unpack_e5m6,
    unpack_ue8m0,
)
from refimpl.layers.numerics.quantisation import pack_latent, unpack_latent
from refimpl.layers.numerics.quantisation.mx import encode_e2m1_ties_down, quantize_mx, quantize_nvfp4
from refimpl.layers.numerics.quantisation.quantise import DIALECTS, quantize, quantize_with
from refimpl.layers.numerics.quantisation.scales import encode_scales
from refimpl.spec_tests.cases.duck import Duck


class Device(Duck):
    """A Duck with what codecs need beside: views of the bytes, and `np.asarray(table, like=it)` as the way in."""

    def view(self, dtype):
        return Device(self._array.view(dtype))

    def __array_function__(self, func, types, args, kwargs):
        if func is np.asarray:
            return Device(args[0])
        return device(super().__array_function__(func, types, args, kwargs))

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return device(super().__array_ufunc__(ufunc, method, *inputs, **kwargs))

    def __getitem__(self, index):
        return device(super().__getitem__(index))

    @property
    def T(self):
        return Device(self._array.T)


def _method(name):
    return lambda self, *args, **kwargs: device(getattr(Duck, name)(self, *args, **kwargs))


for _name in ("reshape", "transpose", "astype", "copy", "sum", "max", "min", "any", "all", "argmax"):
    setattr(Device, _name, _method(_name))


def device(x):
    if isinstance(x, tuple | list):
        return type(x)(device(v) for v in x)
    if isinstance(x, Duck):
        return x if isinstance(x, Device) else Device(x.get())
    return Device(x) if isinstance(x, np.ndarray) else x


def same(there, here):
    """The same bits, and still on the device."""
    assert isinstance(there, Device), type(there)
    assert there.dtype == here.dtype and there.shape == here.shape
    np.testing.assert_array_equal(there.get(), here)


X = (np.random.default_rng(0).normal(size=(40, 300)) * 3).astype(np.float32)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_codecs_give_the_same_bits_on_a_device_array(fmt):
    """Catches: any silent way to NumPy, and a rule for other modules that differs from the compiled one."""
    codes = np.arange(2**fmt.bits).astype(fmt.container)
    same(decode(Device(codes), fmt), decode(codes, fmt))
    if fmt is not UE8M0:
        x = np.concatenate([X.ravel() * np.float32(200), [np.inf, -0.0, 1e-40]]).astype(np.float32)
        for overflow in ["saturate"] + ["overflow"] * (fmt.overflow is not None):
            same(encode(Device(x), fmt, overflow=overflow), encode(x, fmt, overflow=overflow))
            wide = x.astype(float)
            same(encode(Device(wide), fmt, overflow=overflow), encode(wide, fmt, overflow=overflow))
    if fmt in (E4M3, E5M2, E5M6, BF16, FP16):
        nan = np.array([1, np.nan, -np.nan], np.float32)
        same(encode(Device(nan), fmt, overflow="overflow"), encode(nan, fmt, overflow="overflow"))


def test_to_bf16_gives_the_same_bits_on_a_device_array():
    """Catches: ml_dtypes' cast where there is none."""
    u = np.random.default_rng(1).integers(0, 2**32, 10_000, dtype=np.uint32)
    x = u.view(np.float32)
    same(to_bf16(Device(x)).view(np.uint32), to_bf16(x).view(np.uint32))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (32, 128)])
def test_quantisers_give_the_same_bits_on_a_device_array(dialect, tile):
    """Catches: the same, in amax, scales, ragged edges and on the way back."""
    there, here = quantize(Device(X), tile, dialect=dialect), quantize(X, tile, dialect=dialect)
    same(there.codes, here.codes)
    same(there.scales, here.scales)
    same(there.dequantize(bf16=True), here.dequantize(bf16=True))
    same(there.T.dequantize(), here.T.dequantize())
    same(there.requantize((128, 1)).codes, here.requantize((128, 1)).codes)
    again = quantize_with(Device(X), there.scales, tile, overflow="saturate")
    same(again.codes, quantize_with(X, here.scales, tile, overflow="saturate").codes)


def test_block_formats_and_the_cache_give_the_same_bits_on_a_device_array():
    """Catches: the same, in packing and in everything built on the quantisers."""
    for scale in ("up", "down"):
        there, here = quantize_mx(Device(X), E2M1, scale=scale), quantize_mx(X, E2M1, scale=scale)
        same(there.codes, here.codes)
        same(encode_scales(there.scales, rounding="exact"), here.scale_codes)
    there, here = quantize_nvfp4(Device(X)), quantize_nvfp4(X)
    same(there.dequantize(), here.dequantize())
    same(encode_e2m1_ties_down(Device(X)), encode_e2m1_ties_down(X))
    codes = np.arange(16, dtype=np.uint8)
    for pack, unpack, c in (
        (pack_e2m1, unpack_e2m1, codes),
        (pack_ue8m0, unpack_ue8m0, codes),
        (pack_e5m6, unpack_e5m6, codes.astype(np.uint16)),
    ):
        same(pack(Device(c)), pack(c))
        same(unpack(pack(Device(c))), c)
    for fmt, dialect in ((E4M3, "flashmla"), (INT8, "deepseek_v3")):
        there, here = (pack_latent(a[:, :200], a[:, 200:], fmt=fmt, dialect=dialect) for a in (Device(X), X))
        same(there, here)
        for a, b in zip(*(unpack_latent(p, latent=200, rope=100, fmt=fmt) for p in (there, here)), strict=True):
            same(a, b)
