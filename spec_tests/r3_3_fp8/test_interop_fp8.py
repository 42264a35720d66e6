"""The codecs against torch's own conversions, which many implementations rely on."""

import numpy as np
import pytest

from refimpl.layers.numerics.formats import BF16, E4M3, E5M2, FP16, encode

from .test_formats import all_bfloat16, hard_cases

REASON = "comes with the extra 'interop'; before 2.12 its float8_e4m3fn overflowed to NaN (PR 178817)"
torch = pytest.importorskip("torch", minversion="2.12", reason=REASON)

DTYPES = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2", BF16: "bfloat16", FP16: "float16"}


@pytest.mark.parametrize("fmt", DTYPES, ids=lambda f: f.name)
def test_torch_encodes_alike(fmt):
    """Catches: another rounding, and another overflow: torch saturates E4M3, and E5M2 only up to its infinity."""
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32).view(np.float32)
    x = np.concatenate([all_bfloat16(), hard_cases(fmt), random])
    x = x[~np.isnan(x)]
    theirs = torch.from_numpy(x).to(getattr(torch, DTYPES[fmt]))
    codes = theirs.view(torch.uint8 if fmt.bits == 8 else torch.uint16).numpy()
    np.testing.assert_array_equal(encode(x, fmt, overflow="saturate" if fmt is E4M3 else "overflow"), codes)


@pytest.mark.parametrize("fmt", DTYPES, ids=lambda f: f.name)
def test_torch_decodes_alike(fmt):
    """Catches: a code that means another number there."""
    codes = np.arange(2**fmt.bits).astype(fmt.container)
    theirs = torch.from_numpy(codes).view(getattr(torch, DTYPES[fmt])).float().numpy()
    np.testing.assert_array_equal(theirs, fmt.values)
