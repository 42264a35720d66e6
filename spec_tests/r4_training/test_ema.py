"""The average of the parameters (R 3.2.3), and which tensors weight decay reaches (R 4.2 does not say)."""

import threading

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.layers.presets import TINY
from refimpl.train import AdamState, AdamW, adamw, init
from refimpl.train import ema as room
from refimpl.train.ema import Ema, averaged

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def course(steps):
    rng = np.random.default_rng(0)
    return [
        {"w": rng.normal(size=(2, 3)).astype(np.float32), BIAS: rng.normal(size=4).astype(np.float32)}
        for _ in range(steps)
    ]


def test_the_average_is_the_weighted_sum_of_all_steps():
    """Catches decay on the wrong side, a start at zero, a bias averaged. Oracle: the closed form, in float64; eight float32
    roundings of values below 4.
    """
    weights, decay = course(5), 0.75
    with Ema(weights[0], decay) as ema:
        for w in weights[1:]:
            ema.add(w)
        found = ema.value()
    expected = decay**4 * weights[0]["w"].astype(float)
    for k, w in enumerate(weights[1:], 1):
        expected = expected + (1 - decay) * decay ** (4 - k) * w["w"].astype(float)
    np.testing.assert_allclose(found["w"], expected, atol=8 * 4 * 2**-24)
    np.testing.assert_array_equal(found[BIAS], weights[-1][BIAS])


def test_add_returns_before_the_average_is_done(monkeypatch):
    """Catches an average inside the step: `add` comes back while the computation is still held up."""
    gate = threading.Event()

    def held(*args):
        assert gate.wait(10)
        return averaged(*args)

    monkeypatch.setattr(room, "averaged", held)
    a, b = course(2)
    with Ema(a, 0.5) as ema:
        ema.add(b)
        gate.set()
        np.testing.assert_array_equal(ema.value()["w"], np.float32(0.5) * a["w"] + np.float32(0.5) * b["w"])


def test_going_on_from_a_stored_average_changes_no_bit():
    """Catches state beside the average that a checkpoint would lose."""
    weights = course(6)
    with Ema(weights[0], 0.9) as whole, Ema(weights[0], 0.9) as first:
        for w in weights[1:]:
            whole.add(w)
        for w in weights[1:3]:
            first.add(w)
        with Ema(first.value(), 0.9) as second:
            for w in weights[3:]:
                second.add(w)
            np.testing.assert_array_equal(second.value()["w"], whole.value()["w"])


def test_errors_come_out():
    """Catches an average that dies in its thread unseen, and a decay that never forgets."""
    a, _ = course(2)
    with Ema(a, 0.5) as ema:
        ema.add({"w": a["w"]})
        with pytest.raises(SpecError, match="different names"):
            ema.value()
    with pytest.raises(SpecError, match="decay is 1"):
        Ema(a, 1)


def test_matrices_only_leaves_the_gains_of_every_norm():
    """Catches a norm that decays under `matrices`, a matrix that does not, and a default that is not `all`: with zero gradients
    the step is the decay alone. Oracle: a gain is what `init` sets to 1 everywhere.
    """
    weights = {n: w for n, w in init(TINY).items() if not n.endswith("bias")}
    gains = {n for n, w in weights.items() if (w == 1).all()}
    assert {n.rsplit(".", 2)[-2] for n in gains} > {"norm", "q_a_layernorm", "kv_a_layernorm", "enorm", "hnorm"}
    zeros = {n: np.zeros_like(w) for n, w in weights.items()}
    for decays, kept in (("all", set()), ("matrices", gains)):
        new, _ = adamw(weights, zeros, AdamState(), AdamW(lr=0.5, weight_decay=0.5, decays=decays))
        assert {n for n, w in new.items() if (w == weights[n]).all()} == kept
