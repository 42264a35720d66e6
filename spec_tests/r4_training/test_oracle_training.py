"""The oracle's MTP, losses, slopes and optimiser against transformers 5.23.0 and torch.

A recorded gradient is checked against what it claims: the slope of the oracle's loss along a random
direction. So the oracle vouches for the gradients, and the gradients for the oracle.
"""

import functools

import numpy as np
import pytest

from refimpl.model import Impl
from refimpl.spec_tests import golden
from refimpl.spec_tests.oracles.model import loss
from refimpl.spec_tests.oracles.moe import bias_update, seq_balance_loss
from refimpl.spec_tests.oracles.mtp import mtp_forward, mtp_from_hidden, mtp_loss, mtp_losses
from refimpl.spec_tests.oracles.optimiser import adamw, clip
from refimpl.spec_tests.oracles.slopes import direction, inner, slope
from refimpl.spec_tests.r2_1_attention_and_experts.test_oracle_golden import CASES, near


@functools.cache
def mtp_case():
    config, weights, _ = golden.case("hf_tiny")
    extra = golden.tensors(golden.file("hf_tiny_mtp.weights.safetensors"))
    return config, weights | extra, golden.arrays("hf_tiny_mtp")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_recorded_gradients_are_slopes_of_the_loss(name, seed):
    """Catches a recorded gradient that belongs to another loss. The routing margins (> 1e-3) forbid a flip at 1e-5."""
    config, weights, recorded = golden.case(name)
    gradients = {k.removeprefix("grad/"): v for k, v in recorded.items() if k.startswith("grad/")}
    along = direction(weights, gradients, np.random.default_rng(seed))
    measured = slope(lambda w: loss(config, w, recorded["input_ids"], recorded["labels"]), weights, along)
    expected, size = inner(gradients, along)
    assert abs(measured - expected) < 2e-5 * size  # float32 gradients: 5.6e-6 of the largest entry


@pytest.mark.parametrize(("tag", "depth"), [("pre", 1), ("pre", 2), ("post", 1), ("post", 2)])
def test_multi_token_prediction(tag, depth):
    """Catches a hidden taken on the wrong side of the final norm, a swapped concatenation, a shift off by one."""
    config, weights, recorded = mtp_case()
    taps = mtp_forward(config, weights, recorded["input_ids"], depth, hidden=f"{tag}_norm")
    near(taps[f"fwd/mtp{depth}/norm"], recorded[f"{tag}/depth{depth}/hidden"])
    near(taps[f"fwd/mtp{depth}/logits"], recorded[f"{tag}/depth{depth}/logits"])
    near(
        mtp_losses(taps, recorded["input_ids"], depth)[-1],
        recorded[f"{tag}/depth{depth}/loss"],
        2e-6,
    )


@pytest.mark.parametrize("tag", ["pre", "post"])
def test_mtp_loss_is_a_fraction_of_the_mean_over_depths(tag):
    """Catches a sum over depths, and a main loss mixed in."""
    config, weights, recorded = mtp_case()
    tokens = recorded["input_ids"]
    near(
        mtp_loss(config, weights, tokens, tokens, 2, hidden=f"{tag}_norm"),
        recorded[f"{tag}/mtp_loss"],
        2e-6,
    )


def test_mtp_reads_either_order_of_the_halves():
    """R eq 21 puts the hidden first: with the matrix halves exchanged the result is the same."""
    config, weights, recorded = mtp_case()
    swapped = weights | {n: np.roll(w, w.shape[1] // 2, axis=1) for n, w in weights.items() if "eh_proj" in n}
    tokens, hidden = recorded["input_ids"], recorded["hidden_post_norm"]
    ours = mtp_from_hidden(config, swapped, tokens, hidden, 2, "hidden_first")["fwd/mtp2/logits"]
    near(ours, recorded["post/depth2/logits"])


@pytest.mark.parametrize("tag", ["pre", "post"])
def test_recorded_mtp_gradients_are_slopes_of_the_mtp_loss(tag):
    """Catches gradients that flow into the main model, which is a constant here."""
    config, weights, recorded = mtp_case()
    tokens, hidden = recorded["input_ids"], recorded[f"hidden_{tag}_norm"]
    at = f"{tag}/grad/"
    gradients = {k.removeprefix(at): v for k, v in recorded.items() if k.startswith(at)}
    along = direction(weights, gradients, np.random.default_rng(2))

    def total(w):
        return 0.15 * sum(mtp_losses(mtp_from_hidden(config, w, tokens, hidden, 2), tokens, 2))

    expected, size = inner(gradients, along)
    assert abs(slope(total, weights, along) - expected) < 2e-5 * size  # float32 gradients


@pytest.mark.parametrize("step", range(1, 7))
def test_adamw_is_torchs(step):
    """Catches coupled decay, a missing bias correction, eps inside the root, a clip that scales small gradients up."""
    recorded, names = golden.arrays("torch_adamw"), ["matrix", "vector"]
    state = {n: (recorded[f"before/{n}"], 0.0 * recorded[f"before/{n}"], 0.0 * recorded[f"before/{n}"]) for n in names}
    for t in range(1, step + 1):
        gradients, norm = clip({n: recorded[f"grad{t}/{n}"] for n in names}, 1.0)
        state = {n: adamw(state[n][0], gradients[n], *state[n][1:], t, lr=3e-3) for n in names}
    np.testing.assert_allclose(norm, recorded[f"norm{step}"], rtol=1e-12)
    for n in names:
        np.testing.assert_allclose(state[n][0], recorded[f"after{step}/{n}"], rtol=0, atol=1e-13)  # float64 rounding


def test_five_training_steps():
    """Our gradients, clipped and stepped by the oracle's AdamW, are the recorded training run.

    Catches a decay that spares norms or embeddings, a clip after the moments, and a bias that
    moves.
    """
    config, weights, _ = golden.case("hf_tiny")
    recorded = golden.arrays("hf_tiny_train")
    state = {n: (w.astype(float), 0.0 * w, 0.0 * w) for n, w in weights.items()}
    for step, batch in enumerate(recorded["data"]):
        now = {n: s[0] for n, s in state.items()}
        result = (
            Impl(precision="float64").load(config | {"num_nextn_predict_layers": 0}, now).loss_and_grads(batch, batch)
        )
        raw = {n.removeprefix("grad/"): g for n, g in result.items() if n.startswith("grad/")}
        gradients, norm = clip(raw, 1.0)
        near(result["loss"], recorded["loss"][step], 1e-5)  # float32 training, five steps
        near(norm / recorded["grad_norm"][step], np.array(1.0), 1e-5)
        for n, g in gradients.items():
            state[n] = adamw(state[n][0], g, *state[n][1:], step + 1, lr=2e-3)
    for n, w in weights.items():
        moved, after = recorded[f"after/{n}"] - w, recorded[f"after/{n}"]
        # Adam turns the rounding noise of a near-zero gradient into a step of up to lr: compare norms.
        assert np.linalg.norm(state[n][0] - after) <= 2e-3 * np.linalg.norm(moved), n


@pytest.mark.parametrize("k", [1, 2, 3])
def test_perfect_balance_costs_alpha(k):
    """R eqs 17-20: every expert chosen equally often by equal shares gives sum f_i P_i = 1."""
    turns = np.array([np.roll([8.0, 4.0, 2.0, 1.0], t) for t in range(4)])  # (S, E): each expert in each rank once
    np.testing.assert_allclose(seq_balance_loss(turns, k, 0.01), 0.01, rtol=1e-15)


def test_collapse_onto_k_experts_costs_more():
    """All tokens on two of eight experts: f = 8/2 for both, their shares sum to 4/5, so 16/5 alpha by hand."""
    scores = np.tile([[2.0, 2.0, *[1 / 6] * 6]], (5, 1))
    np.testing.assert_allclose(seq_balance_loss(scores, 2, 1.0), 3.2, rtol=1e-15)


def test_the_bias_moves_against_the_load():
    """Catches the wrong sign, a step proportional to the load, and a move at exactly the mean."""
    moved = bias_update([0.0, 0.5, -0.5, 0.1], [6, 4, 1, 5], 0.001)
    np.testing.assert_allclose(moved, [-0.001, 0.5, -0.499, 0.099], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(bias_update([0.3, -0.3], [7, 7], 0.001), [0.3, -0.3])
