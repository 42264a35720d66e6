"""R 3.3: the three products of a linear layer in FP8, what waits for backward, and the plan that says which layers do so."""

import numpy as np
import pytest

from refimpl import Impl
from refimpl.autograd import Parameter, Tensor, backward, expert_ops, nn_ops
from refimpl.cli import main
from refimpl.layers import STAGES
from refimpl.layers.fp8 import BLOCK, EXACT, POWER_OF_TWO, Fp8
from refimpl.layers.numerics.formats import E5M6
from refimpl.layers.precision import BF16, FP8, fp8_plan
from refimpl.layers.stage import observing
from refimpl.spec_tests.cases.small_models import small, some_tokens


def e4m3(v):
    """The nearest E4M3 value, ties to the even neighbour, by search: the oracle of every code here."""
    grid = [m / 8 * 2.0 ** (e if e > -6 else -6) for e in range(-6, 9) for m in range(8, 16)]
    grid = sorted({0.0, *[m / 8 * 2.0**-6 for m in range(8)], *[g for g in grid if g <= 448]})
    best = min(abs(g - abs(v)) for g in grid)
    near = [i for i, g in enumerate(grid) if abs(g - abs(v)) == best]
    return np.copysign(grid[next((i for i in near if i % 2 == 0), near[0])], v)


def tiles(x, rows, cols, power_of_two=False, clamp=1e-4):
    """x through E4M3 with one scale per tile, by loops."""
    y = np.zeros(x.shape)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], cols):
            part = x[i : i + rows, j : j + cols].astype(np.float32)
            s = np.float32(max(np.abs(part).max(), clamp)) / np.float32(448)
            s = np.float32(2.0 ** np.ceil(np.log2(float(s)))) if power_of_two else s
            y[i : i + rows, j : j + cols] = np.vectorize(e4m3)(part / s) * np.float64(s)
    return y


def problem(n=5, d=130, f=7, seed=0):
    """x (N, D), w (F, D), dy (N, F), with rows of very different size."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-2, 3, (n, 1))
    x, w, dy = rng.standard_normal((n, d)) * scale, rng.standard_normal((f, d)), rng.standard_normal((n, f))
    return [a.astype(np.float32) for a in (x, w, dy)]


def run(kernel, x, w, dy):
    """y and the gradients of x and w."""
    leaf, weight = Tensor(x), Parameter(w)
    y = kernel.linear(leaf, weight, None)
    grads = backward(y, dy)
    return y.data, grads[leaf], grads[weight]


@pytest.mark.parametrize("pow2", [False, True])
def test_the_three_products_quantise_along_their_own_sums(pow2):
    """Catches a group across the reduction axis, a weight quantised anew for Dgrad, dy used unquantised, x taken from before
    its quantisation in Wgrad."""
    x, w, dy = problem()
    how = POWER_OF_TWO if pow2 else EXACT
    y, dx, dw = run(Fp8(inputs=how, gradients=how), x, w, dy)
    qx, qw = tiles(x, 1, 128, pow2), tiles(w, 128, 128, clamp=0)
    np.testing.assert_allclose(
        y, qx @ qw.T, rtol=1e-5, atol=1e-6 * np.abs(qx @ qw.T).max()
    )  # float32 scales and output
    np.testing.assert_allclose(dx, tiles(dy, 1, 128, pow2) @ qw, rtol=1e-5, atol=1e-6)
    again = tiles(qx.astype(np.float32), 128, 1, pow2)
    ours, theirs = dw, tiles(dy, 128, 1, pow2).T @ again
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())


def test_the_gradient_is_straight_through():
    """Catches a gradient of the rounding itself (zero almost everywhere): it must be near the exact one, not equal to it."""
    x, w, dy = problem(n=40, d=256, f=64)
    exact = (dy.astype(np.float64) @ w, dy.T.astype(np.float64) @ x)
    for got, true in zip(run(Fp8(), x, w, dy)[1:], exact, strict=True):
        error = np.linalg.norm(got - true) / np.linalg.norm(true)
        assert 0.005 < error < 0.06  # E4M3 rounds by up to 2^-4, about 2.6 % rms each, two factors


def test_grouped_rows_are_their_experts_own_layers():
    """Catches tiles over tokens that reach into the next expert's rows."""
    rng = np.random.default_rng(1)
    ids = np.array([[0, 2], [2, 0], [0, 3], [2, 3]])
    rows, ws = rng.standard_normal((8, 130)).astype(np.float32), rng.standard_normal((4, 6, 130)).astype(np.float32)
    dy = rng.standard_normal((8, 6)).astype(np.float32)
    leaf, weights = Tensor(rows), [Parameter(w) for w in ws]
    y = Fp8().grouped_linear(leaf, ids, *weights)
    grads = backward(y, dy)
    ends = expert_ops.by_expert(ids, 4)[2]
    for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if a == b:
            assert not grads[weights[e]].any()
            continue
        alone = run(Fp8(), rows[a:b], ws[e], dy[a:b])
        for got, want in zip((y.data[a:b], grads[leaf][a:b], grads[weights[e]]), alone, strict=True):
            np.testing.assert_array_equal(got, want)


def test_what_waits_after_attention_is_e5m6():
    """Catches E4M3 kept for o_proj's Wgrad: six mantissa bits must leave a smaller error than three."""
    x, w, dy = problem(n=128, d=128, f=16)
    exact = dy.T.astype(np.float64) @ x

    def error(kernel):
        return np.linalg.norm(run(kernel, x, w, dy)[2] - exact) / np.linalg.norm(exact)

    assert error(Fp8(kept=E5M6)) < 0.95 * error(Fp8())
    assert FP8.kernel("attn_out").kept is E5M6


def test_swiglu_is_recomputed_from_fp8_copies():
    """Catches a backward at the unrounded inputs, and a Wgrad of down_proj at the activation that forward saw."""
    rng = np.random.default_rng(2)
    gate, up = (rng.standard_normal((6, 130)).astype(np.float32) for _ in range(2))
    kernel = Fp8(recompute=True)
    leaves = Tensor(gate), Tensor(up)
    y = kernel.swiglu(*leaves)
    np.testing.assert_array_equal(y.data, nn_ops.swiglu(gate, up))
    copies = [tiles(a, 1, 128).astype(np.float32) for a in (gate, up)]
    np.testing.assert_allclose(y.saved(), nn_ops.swiglu(*copies), rtol=1e-5)
    dy = np.ones_like(gate)
    grads = backward(y, dy)
    at_copies = [Tensor(c) for c in copies]
    expected = backward(nn_ops.swiglu(*at_copies), dy)
    for leaf, copy in zip(leaves, at_copies, strict=True):
        np.testing.assert_allclose(grads[leaf], expected[copy], rtol=1e-5, atol=1e-6)
    # the recomputed value is what down_proj's Wgrad sees, also behind the plan's rounding of the activation
    w, d = rng.standard_normal((4, 130)).astype(np.float32), rng.standard_normal((6, 4)).astype(np.float32)
    weight = Parameter(w)
    with observing(fp8_plan()):
        down = STAGES["moe.shared"](STAGES["shared.act"](Tensor(gate), Tensor(up)), weight)
    theirs = tiles(d, 128, 1).T @ tiles(BF16_(nn_ops.swiglu(*copies)), 128, 1)
    np.testing.assert_allclose(backward(down, d)[weight], theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def BF16_(x):
    """bfloat16 through ml_dtypes."""
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


IN_FP8 = {
    "mla.q_a",
    "mla.q",
    "mla.kv_a",
    "mla.kv_b",
    "attn_out",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
    "shared.gate",
    "shared.up",
}
IN_FP8 |= {"moe.shared", "moe.gate", "moe.up", "moe.down"}


def test_the_plan_quantises_what_the_report_says_and_nothing_else():
    """Catches a router, head, embedding, norm or attention core in FP8, and a linear layer forgotten."""
    model = small()
    seen = {}

    def spy(stage, run, /, *args, **static):
        out = run(*args, **static)
        plain = stage.fn(*args, **static)
        seen[stage.name] = bool(np.any(np.asarray(out) != np.asarray(plain)))
        return out

    model = model.map(lambda n, w: FP8.weight(n, w))
    only_gemms = fp8_plan().__class__("gemms", np.float32, gemms=FP8.gemms)
    with observing(only_gemms, spy):
        model(model.inputs(some_tokens(2, 9)))
    assert {name for name, changed in seen.items() if changed} == IN_FP8 & set(seen)
    assert len(IN_FP8 - set(seen)) <= 1  # q_lora_rank


def test_weights_and_outputs_of_the_plan():
    """Catches masters rounded to bf16 before they are quantised, and a bias that loses bits."""
    w = np.float32(1) + np.float32(2.0**-20) * np.ones((3, 3), np.float32)
    assert FP8.weight("model.layers.1.self_attn.o_proj.weight", w)[0, 0] == w[0, 0]
    assert FP8.weight("model.layers.3.eh_proj.weight", w)[0, 0] == 1
    assert FP8.weight("model.norm.weight", w)[0, 0] == 1 == BF16.weight("lm_head.weight", w)[0, 0]
    assert FP8.weight("model.layers.1.mlp.gate.e_score_correction_bias", w)[0, 0] == w[0, 0]
    assert FP8.format("mla.q") == "bf16" and FP8.format("router.logits") == "fp32"


def test_block_wise_gradients_are_worse():
    """R App. B.2: 128 x 128 tiles of activation gradients lose the small rows. Catches the ablation doing nothing."""
    x, w, dy = problem(n=128, d=128, f=128)
    dy = (dy * 10.0 ** np.random.default_rng(3).integers(-6, 1, (128, 1))).astype(np.float32)
    exact = dy.astype(np.float64) @ w
    row = np.linalg.norm(run(Fp8(), x, w, dy)[1] - exact, axis=1) / np.linalg.norm(exact, axis=1)
    block = np.linalg.norm(run(Fp8(gradient_tile=BLOCK), x, w, dy)[1] - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert block.max() > 5 * row.max()


def test_a_user_s_own_plan(capsys):
    """Catches a plan that only the built-in names can use, and a table that is not printed."""
    from refimpl.spec_tests import golden

    config, weights, recorded = golden.case("hf_tiny")
    mine = fp8_plan("mine", gradient_tile=BLOCK)
    logits = Impl(precision=mine).load(config, weights).forward(recorded["input_ids"])["logits"]
    np.testing.assert_array_equal(
        logits, Impl(precision="fp8").load(config, weights).forward(recorded["input_ids"])["logits"]
    )
    assert main(["precision", "fp8"]) == 0
    table = capsys.readouterr().out
    assert "attn_out" in table and "e5m6" in table and "router.scores" in table
