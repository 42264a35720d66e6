"""Every regime does what it says, told by loops over the files and over our float64 run of the case."""

import functools
import itertools
import json
import math

import ml_dtypes
import numpy as np
import pytest

from refimpl.layers.numerics.formats import to_bf16
from refimpl.record import trace_case
from refimpl.record.regimes import REGIMES

from .test_make_case import closest
from .test_regimes import made


@functools.cache
def taps(regime):
    with np.errstate(all="ignore"):
        return trace_case(made(regime), precision="float64").taps


def biases(regime):
    return [w for n, w in made(regime).weights().items() if n.endswith("e_score_correction_bias")]


def routers(regime, tap):
    """An array a MoE layer: preset tiny's are 1 and 2."""
    return [taps(regime)[f"fwd/L{i}/router.{tap}"] for i in (1, 2)]


def tokens(a):
    return [row for sequence in a for row in sequence]


def representable(x):
    return to_bf16(x.astype(np.float32)) == x


def raw(regime, name="config.json"):
    return json.loads((made(regime).path / name).read_text())


def one_group():
    assert raw("one-group")["n_group"] == raw("one-group")["topk_group"] == 1
    assert "fwd/L1/router.ids" in taps("one-group") and "fwd/L1/router.groups" not in taps("one-group")


def no_groups():
    assert raw("no-groups")["n_group"] is None and raw("no-groups")["topk_group"] is None
    assert "fwd/L1/router.groups" not in taps("no-groups")


def raw_weights():
    for s, ids, g in zip(*(routers("raw-weights", t) for t in ("scores", "ids", "weights")), strict=True):
        for at in np.ndindex(ids.shape):
            assert math.isclose(g[at], 2.5 * s[at[:2]][ids[at]], rel_tol=1e-14)
    assert all(abs(sum(row) - 2.5) > 0.1 for g in routers("raw-weights", "weights") for row in tokens(g))


def scaling_1():
    assert all(abs(sum(row) - 1) < 1e-12 for g in routers("scaling-1", "weights") for row in tokens(g))


def full_rank_q():
    names = made("full-rank-q").weights()
    assert "model.layers.0.self_attn.q_proj.weight" in names and not [n for n in names if "q_a_" in n or "q_b_" in n]


def mscale():
    cos, sin = taps("mscale")["fwd/mla.rope_tables"]
    ratio = (0.1 * 0.707 * math.log(40) + 1) / (0.1 * 1.3 * math.log(40) + 1)
    np.testing.assert_allclose(np.hypot(cos, sin), ratio, rtol=1e-12)
    assert ratio < 0.9


def mtp_2():
    assert [n for n in made("mtp-2").weights() if "eh_proj" in n] == [
        f"model.layers.{i}.eh_proj.weight" for i in (3, 4)
    ]
    assert taps("mtp-2")["fwd/mtp2/logits"].shape[1] == 14


def ragged_128():
    shapes = {n: w.shape for n, w in made("ragged-128").weights().items()}
    assert not [n for n, shape in shapes.items() if any(size % 128 == 0 for size in shape)]
    large = [n for n, shape in shapes.items() if len(shape) == 2 and max(shape) > 128]
    assert len(large) == len([s for s in shapes.values() if len(s) == 2])
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (129, 160)


def bias_positive():
    assert all(b.min() == 8 and b.max() < 9 and not representable(b).all() for b in biases("bias-positive"))


def bias_negative():
    assert all((b < -1).all() for b in biases("bias-negative"))
    assert all((a < 0).all() for a in routers("bias-negative", "choice"))


def near_ties():
    config = made("near-ties").config
    naive = [
        min(closest(list(t), config) for t in layers)
        for layers in zip(*map(tokens, routers("near-ties", "choice")), strict=True)
    ]
    assert min(naive) > 0.9e-5 and max(naive) < 5.1e-3  # chosen in float32, whose scores are off by 1e-6
    assert sum(gap < 1e-3 for gap in naive) > len(naive) / 2
    assert not any(representable(b).all() for b in biases("near-ties"))
    with np.errstate(all="ignore"):
        coarser = trace_case(made("near-ties"), taps=["*/router.ids"]).taps
    assert all(np.array_equal(np.sort(a), np.sort(taps("near-ties")[t])) for t, a in coarser.items())


def ties():
    weights, found = made("ties").weights(), set()
    for i, (choice, kept) in enumerate(zip(routers("ties", "choice"), routers("ties", "groups"), strict=True), 1):
        row, expert = weights[f"model.layers.{i}.mlp.gate.weight"], f"model.layers.{i}.mlp.experts."
        for a, b in [(0, 1), (4, 5), (12, 13), *[(4 + e, 8 + e) for e in range(4)]]:
            assert np.array_equal(row[a], row[b]) and (choice[..., a] == choice[..., b]).all()
            assert not np.array_equal(weights[f"{expert}{a}.up_proj.weight"], weights[f"{expert}{b}.up_proj.weight"])
        for at, (a, groups) in enumerate(zip(tokens(choice), tokens(kept), strict=True)):
            sums = sorted((sum(sorted(a[4 * g : 4 * g + 4])[2:]) for g in range(4)), reverse=True)
            inside = sorted((a[4 * g + e] for g in groups for e in range(4)), reverse=True)
            for kind, gap in (("groups", sums[1] - sums[2]), ("experts", inside[3] - inside[4])):
                assert gap == 0 or gap > 0.019, (i, at, kind, gap)
                found |= {(kind, at)} if gap == 0 else set()
    assert {at for _, at in found} == set(range(32)) and {kind for kind, _ in found} == {"groups", "experts"}


def extreme_logits():
    assert all(b.min() == 12 for b in biases("extreme-logits"))
    for z, choice in zip(routers("extreme-logits", "logits"), routers("extreme-logits", "choice"), strict=True):
        usual, low, lowest, highest = (z[:, k::4] for k in range(4))
        assert np.abs(usual).max() < 5 and low.min() > -60 and low.max() < -9
        assert lowest.max() < -110 and highest.min() > 90
        assert all(closest(list(t), made("extreme-logits").config) > 0.019 for t in tokens(choice))


def small_latents():
    for i in range(3):
        q, kv = (taps("small-latents")[f"fwd/L{i}/mla.{t}_a"] for t in ("q", "kv"))
        for latent in (q, kv[..., :20]):
            size = np.sqrt((latent**2).mean(axis=-1))
            assert (size > 1e-3).all() and (size < 2e-2).all()
        assert np.sqrt((kv[..., 20:] ** 2).mean()) > 0.3  # the rotated channels have no norm


def eps():
    assert raw("eps")["rms_norm_eps"] == 1e-5
    assert all(
        (np.square(row, dtype=np.float64)).mean() < 1e-5 for row in made("eps").weights()["model.embed_tokens.weight"]
    )


def padding():
    first, second = made("padding").valid
    assert first == [0] * 4 + [1] * 12 and second == [1] * 12 + [0] * 4
    mask = taps("padding")["fwd/mask"]
    assert np.isneginf(mask[0, 0, :, :4]).all() and mask[0, 0, 15, 4:].tolist() == [0] * 12


def offset():
    assert made("offset").positions == [list(range(37, 53)), list(range(74, 90))]


def long_positions():
    first, second = made("long-positions").positions
    assert first == list(range(4088, 4104))  # the original length is 4096
    assert second[0] == 257 and 163_836 <= second[-1] < 163_840
    assert all(a < b for a, b in itertools.pairwise(second))
    assert not any(float(ml_dtypes.bfloat16(p)) == p for p in second)


def fp8_weights():
    case, plain = made("fp8-weights"), made().weights()
    codes = [n for n in case.checkpoint if case.checkpoint.dtype(n) == "F8_E4M3"]
    assert codes == [n for n in plain if "_proj" in n]
    assert raw("fp8-weights")["quantization_config"]["weight_block_size"] == [128, 128]
    for n in codes[:8]:
        c, scales = case.checkpoint.raw(n)
        assert scales.dtype == np.float32 and scales.shape == (1, 1)
        np.testing.assert_array_equal(case.weights()[n], c.astype(np.float32) * scales[0, 0])
        assert 0 < np.abs(case.weights()[n] - plain[n].astype(np.float32)).max() < 2**-4 * np.abs(plain[n]).max()


FACTS = {f.__name__.replace("_", "-"): f for f in (
    one_group, no_groups, raw_weights, scaling_1, full_rank_q, mscale, mtp_2, ragged_128, bias_positive, bias_negative,
    near_ties, ties, extreme_logits, small_latents, eps, padding, offset, long_positions, fp8_weights,
)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_does_what_it_says(regime):
    """Catches a regime that is none: weights drawn over, an input left out, a size that came out even, a tie that is not equal."""
    FACTS[regime]()


@pytest.mark.parametrize(
    "regime", ["padding", "offset", "long-positions", "mscale", "eps", "bias-positive", "fp8-weights"]
)
def test_decisions_are_won_clearly_in_a_regime_too(regime):
    """Catches tokens drawn for other positions, padding or weights than the case has: their decisions would be anyone's."""
    config, layers = made(regime).config, [tokens(a) for a in routers(regime, "choice")]
    assert min(closest(list(t), config) for a in layers for t in a) > 0.019


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["near-ties", "ties"])
def test_tokens_stay_various(regime):
    """Catches the closest decision taken for the best one again and again: a case of one token, which shows nothing else."""
    assert all(len({t for row in made(regime, seed).tokens for t in row}) > 16 for seed in range(3))


def test_a_plain_case_is_in_no_regime():
    """Catches facts that hold anyway, which would prove nothing."""
    assert made().positions is None and made().valid is None and raw("", "tokens.json").keys() == {"tokens"}
    assert all(b.min() < 0 < b.max() and representable(b).all() for b in biases(""))
    gaps = [
        min(closest(list(t), made().config) for t in layers)
        for layers in zip(*map(tokens, routers("", "choice")), strict=True)
    ]
    assert min(gaps) > 0.02 and np.abs(routers("", "logits")).max() < 10
    assert np.sqrt((taps("")["fwd/L0/mla.q_a"] ** 2).mean()) > 0.5
