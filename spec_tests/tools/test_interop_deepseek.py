"""The stand-in for DeepSeek's inference/model.py (cases/deepseek_inference.py) gives what was recorded of the
released code. What the shipped map sees of it, and three faults placed in it: test_interop_adapters.py."""

import numpy as np
import pytest

from refimpl.spec_tests import golden

LIMIT = 5e-6  # both are float32 runs of the same operations by torch; each lies within about 5e-6 of float64


@pytest.fixture(params=["naive", "absorb"])
def attention(request, monkeypatch):
    pytest.importorskip("torch", reason="comes with the extra 'torch'; CI runs these tests with it")
    from refimpl.spec_tests.cases import deepseek_inference

    monkeypatch.setattr(deepseek_inference, "attn_impl", request.param)
    return request.param


@pytest.fixture
def model(attention):
    from refimpl.spec_tests.cases.deepseek_inference import loaded

    config, weights, _ = golden.case("hf_tiny")
    return loaded({k: v for k, v in config.items() if k != "_golden"}, weights)


def relative(x, recorded):
    return np.linalg.norm(np.stack(x, axis=1) - recorded) / np.linalg.norm(recorded)


def test_its_logits_are_the_released_codes(model, attention):
    """Catches a stand-in that computes something else than DeepSeek's code, whose map would then be right about nothing:
    position t is a fresh run on t + 1 tokens there.
    """
    import torch

    recorded = golden.arrays("official_tiny")
    ids = torch.tensor(recorded["input_ids"])
    found = [model(ids[:, : t + 1]).numpy() for t in range(ids.shape[1])]
    assert relative(found, recorded[f"f32/{attention}/logits"]) < LIMIT


def test_its_cached_steps_and_its_angles_are_the_released_codes(model, attention):
    """Catches a cache of its own kind, and YaRN frequencies that only look alike in the first tokens."""
    import torch

    recorded = golden.arrays("official_tiny")
    ids = torch.tensor(recorded["input_ids"])
    found = [model(ids[:, :16]).numpy(), *[model(ids[:, t : t + 1], t).numpy() for t in range(16, 24)]]
    assert relative(found, recorded[f"f32/{attention}/cached_logits"]) < LIMIT
    turned = np.exp(1j * recorded["f32/freqs_angle"])
    np.testing.assert_allclose(model.freqs_cis[:24].numpy(), turned, atol=23 * 2.0**-22)  # angles up to 23
