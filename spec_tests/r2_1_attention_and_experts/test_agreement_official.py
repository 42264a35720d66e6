"""The specification against DeepSeek's own inference/model.py (commit 9b4e9788) on hf_tiny's weights.

float32: naive and absorbed attention, the latent cache they keep, cached decoding. bfloat16: the first layer's cache against an
a-priori rounding bound, the logits against a family of admissible bfloat16 runs of the specification itself.
"""

import functools

import numpy as np
import pytest

from refimpl import Impl
from refimpl.autograd import ops
from refimpl.layers import Config, observing
from refimpl.layers.numerics.formats import to_bf16
from refimpl.layers.precision import BF16
from refimpl.layers.rope import inv_freq
from refimpl.model import ForCausalLM, effective
from refimpl.spec_tests import golden

LIMIT = 2e-5  # two float32 evaluations in different order, each within about 5e-6 of float64
U = 2.0**-8  # bfloat16 rounds by at most half of 2^-7 of the value's power of two
ATTEND = {"naive": "expanded", "absorb": "absorbed"}


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


@functools.cache
def forward(attend, precision="float32"):
    config, weights, _ = golden.case("hf_tiny")
    ids = golden.arrays("official_tiny")["input_ids"]
    return Impl(precision=precision, attend=attend).load(config, weights).forward(ids, taps="*")


@pytest.mark.parametrize("attn", ATTEND)
def test_float32_logits(attn):
    """Catches a wrong absorption, softmax scale, rotation layout or routing: position t is a fresh run on t+1 tokens there."""
    theirs = golden.arrays("official_tiny")[f"f32/{attn}/logits"]
    assert relative(forward(ATTEND[attn])["logits"], theirs) < LIMIT


@pytest.mark.parametrize("attn", ATTEND)
def test_float32_cached_decoding(attn):
    """Catches a step that differs from the full run: prefill of 16, eight single steps."""
    config, weights, _ = golden.case("hf_tiny")
    recorded = golden.arrays("official_tiny")
    impl, ids = Impl(attend=ATTEND[attn]).load(config, weights), recorded["input_ids"]
    cache = impl.new_cache()
    steps = [impl.forward(ids[:, :16], cache=cache)["logits"][:, -1:]]
    steps += [impl.step(ids[:, t], cache)["logits"] for t in range(16, 24)]
    assert relative(np.concatenate(steps, axis=1), recorded[f"f32/{attn}/cached_logits"]) < LIMIT


@pytest.mark.parametrize("layer", range(3))
def test_float32_caches(layer):
    """Catches a latent cached before its norm, a key cached before rotation or in another pair layout."""
    recorded, taps = golden.arrays("official_tiny"), forward("absorbed")
    assert relative(taps[f"fwd/L{layer}/mla.c_kv"], recorded[f"f32/kv_cache/layer{layer}"]) < LIMIT
    assert relative(taps[f"fwd/L{layer}/mla.k_rope"], recorded[f"f32/pe_cache/layer{layer}"]) < LIMIT


def test_rotation_angles():
    """Catches a wrong YaRN ramp or frequency: angles modulo 2 pi, to float32 rounding of angles up to 23."""
    theirs = golden.arrays("official_tiny")["f32/freqs_angle"]
    config = Config.from_dict(golden.case("hf_tiny")[0])
    angle = np.arange(24)[:, None] * inv_freq(config.qk_rope_head_dim, config.rope_theta, config.yarn)
    np.testing.assert_allclose(np.exp(1j * angle), np.exp(1j * theirs), atol=23 * 2.0**-22)


def test_bfloat16_cache_of_the_first_layer_is_within_its_rounding_bound():
    """Catches an operation in the wrong place before any routing: every element within the bound that bfloat16 alone explains.

    First order, element by element. x is exact (an embedding row). The norm rounds its output (U, twice: the official code
    may round before it multiplies by the weight). kv_a = W n then moves by at most |W| (2 U |n|) and rounds (U |kv_a|). The
    latent norm scales by r w, its own r moves with its input by Cauchy-Schwarz, and it rounds twice; a rotation mixes a pair
    with |cos| + |sin| <= sqrt 2 and rounds cos, sin and the result.
    """
    config, weights, recorded = *golden.case("hf_tiny")[:2], golden.arrays("official_tiny")
    rounded = effective(weights, BF16)
    exact = Impl(precision="float64").load(config, rounded).forward(recorded["input_ids"], taps="L0/*")
    n, kv = exact["fwd/L0/attn_norm"], exact["fwd/L0/mla.kv_a"]
    w = np.abs(rounded["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].astype(np.float64))
    d_kv = 2 * U * np.abs(n) @ w.T + U * np.abs(kv)
    dim = config["kv_lora_rank"]
    c, d_c = kv[..., :dim], d_kv[..., :dim]
    size = np.linalg.norm(c, axis=-1, keepdims=True)
    y = exact["fwd/L0/mla.c_kv"]
    gain = np.abs(y) / np.maximum(np.abs(c), 1e-30)
    bound_c = gain * d_c + np.abs(y) * np.linalg.norm(d_c, axis=-1, keepdims=True) / size + 2 * U * np.abs(y)
    assert (np.abs(y - recorded["bf16/kv_cache/layer0"]) <= bound_c).all()
    k, d_k = exact["fwd/L0/mla.k_rope"], d_kv[..., dim:]
    pair = np.sqrt(d_k[..., 0::2] ** 2 + d_k[..., 1::2] ** 2).repeat(2, axis=-1)
    length = np.hypot(k[..., 0::2], k[..., 1::2]).repeat(2, axis=-1)
    assert (np.abs(k - recorded["bf16/pe_cache/layer0"]) <= pair + 2 * U * length).all()
    # the bound means something: it stays well below the values themselves
    assert np.linalg.norm(bound_c) < 0.2 * np.linalg.norm(y)


def noisy(seed):
    """An observer that rounds every stage's output to one of its two bfloat16 neighbours, at random by distance."""
    rng = np.random.default_rng(seed)

    def observe(stage, run, /, *args, **static):
        out = run(*args, **static)
        if out.dtype.kind != "f" or stage.name in ("mask", "mla.rope_tables"):
            return out
        dither = (rng.random(out.shape) - 0.5) * 2.0**-7
        return ops.round_through(out, to=lambda x: to_bf16((x * (1 + dither)).astype(np.float32)))

    return observe


@pytest.mark.parametrize("attn", ATTEND)
def test_bfloat16_logits_are_within_the_family_of_bfloat16_runs(attn):
    """Catches a bfloat16 path that computes something else: DeepSeek's run lies no farther from float64 than our own runs do.

    Chained through two routers no a-priori bound is useful (a flipped expert moves a token by its whole output), so the bound
    is measured: 12 runs of the specification whose stages all round to bfloat16, with dithered rounding. One more draw of the
    same kind exceeds the largest of 12 with probability 1/13; a quarter is added for that.
    """
    config, weights, _ = golden.case("hf_tiny")
    recorded = golden.arrays("official_tiny")
    model = ForCausalLM.from_weights(Config.from_dict(config), effective(weights, BF16))
    inputs = model.inputs(recorded["input_ids"])
    truth = forward(ATTEND[attn], "float64")["logits"]

    def rms(x):
        return float(np.sqrt(np.mean((x - truth) ** 2)))

    family = []
    for seed in range(12):
        with observing(noisy(seed)):
            family.append(rms(model(inputs, attend=ATTEND[attn]).logits))
    theirs = rms(recorded[f"bf16/{attn}/logits"])
    assert theirs < 1.25 * max(family), (theirs, family)
    assert theirs > 0.25 * min(family)  # and it really is a bfloat16 run
