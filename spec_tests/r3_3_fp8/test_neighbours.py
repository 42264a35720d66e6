"""INT8 and FP16 neighbours of the FP8 recipe."""

import numpy as np
import pytest

from refimpl.autograd import SpecError, Tensor, backward, ops
from refimpl.layers import STAGES, neighbours
from refimpl.layers.neighbours import LossScale

rng = np.random.default_rng(0)


def test_fake_quant_is_the_integer_grid():
    """Catches an asymmetric grid (-128), truncation for rounding, a scale per tensor: by loops over elements."""
    x = rng.standard_normal((2, 3, 5))
    s = STAGES["int8.scale"](x)
    y = STAGES["int8.fake_quant"](x, s)
    for i, j, k in np.ndindex(x.shape):
        scale = max(abs(v) for v in x[i, j]) / 127
        assert y[i, j, k] == pytest.approx(round(x[i, j, k] / scale) * scale, rel=1e-12)
    assert np.abs(y - x).max() <= 0.5 * s.max() * (1 + 1e-12)


def test_the_gradient_stops_where_it_clipped():
    """Catches a gradient through clipped values, and one through the rounding (zero everywhere)."""
    x = Tensor(np.array([[[0.3, 1.0, -5.0, 5.0]]]))
    y = STAGES["int8.fake_quant"](x, np.array([[[1 / 127]]]))
    np.testing.assert_array_equal(y.data[0, 0, 2:], [-1, 1])
    np.testing.assert_array_equal(backward(y, np.ones((1, 1, 4)))[x], [[[1, 1, 0, 0]]])


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_and_bad_scales(bits):
    """Catches 0 / 0 for a row of zeros, and a scale that means nothing."""
    x = np.zeros((1, 2, 3))
    assert (STAGES["int8.fake_quant"](x, STAGES["int8.scale"](x, bits=bits), bits=bits) == 0).all()
    with pytest.raises(SpecError, match="positive"):
        STAGES["int8.fake_quant"](x, np.zeros((1, 2, 1)))


def test_mixed_decomposition_saves_the_small_channels():
    """Catches outliers left in the integer part: one channel of 60 would cost all others their bits."""
    x, w = rng.standard_normal((2, 4, 64)), rng.standard_normal((8, 64))
    x[0, 1, 7] = 60.0
    exact = x @ w.T
    mixed, all_int = (STAGES["int8.mixed_linear"](x, w, threshold=t) for t in (6.0, np.inf))

    def error(y):
        return np.abs(y - exact)[0, 1].max()

    assert error(mixed) < 0.2 * error(all_int)
    # by loops: every other channel on its integer grid, channel 7 exact
    keep = [k for k in range(64) if k != 7]
    for i, j, f in np.ndindex(exact.shape):
        sx, sw = max(abs(x[i, j, keep])) / 127, max(abs(w[f, keep])) / 127
        y = sum(round(x[i, j, k] / sx) * round(w[f, k] / sw) for k in keep) * sx * sw + x[i, j, 7] * w[f, 7]
        assert mixed[i, j, f] == pytest.approx(y, rel=1e-9, abs=1e-9)


def test_loss_scaling_saves_small_gradients_and_backs_off():
    """Catches a scale that is applied once, unscaled in FP16, or never lowered: FP16's smallest number is 6e-8."""
    w, tiny = Tensor(np.ones(3, np.float16)), np.float16(1e-4)
    small = np.full(3, 1e-4, np.float16)

    def grads(scaler):
        loss = scaler.scaled(ops.cast(ops.sum(ops.mul(ops.mul(w, small), tiny)), dtype=np.float32))
        return {"w": backward(loss)[w]}

    assert not grads(LossScale(scale=1.0))["w"].any()  # 1e-8 flushes to zero
    scaler = LossScale(scale=2.0**10)
    np.testing.assert_allclose(scaler.unscale(grads(scaler))["w"], 1e-8, rtol=2e-2)  # two FP16 factors
    assert scaler.unscale({"w": np.array([np.inf], np.float16)}) is None
    assert scaler.update(True).scale == 2.0**9
    for _ in range(2000):
        scaler = scaler.update(False)
    assert scaler.scale == 2.0**11 and scaler.good == 0
    assert neighbours.LossScale(scale=1.0).update(True).scale == 1.0
