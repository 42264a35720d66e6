"""R 3.4: decoding from a latent cache in bytes, and weights whose FP8 blocks come from a checkpoint."""

import numpy as np
import pytest

from refimpl import Impl, SpecError
from refimpl.layers import PRESETS
from refimpl.layers.fp8 import BLOCK
from refimpl.layers.numerics.quantisation import dequantize_blocks, latent_bytes, quantize, quantize_blocks
from refimpl.layers.precision import FP8, FP8_UE8M0
from refimpl.spec_tests import golden

IDS = golden.arrays("hf_tiny")["input_ids"]


def decoded(prefill=16, **options):
    """Logits of cached steps, and the state."""
    config, weights, _ = golden.case("hf_tiny")
    impl, cache = Impl(**options).load(config, weights), {}
    out = [impl.forward(IDS[:, :prefill], cache=cache)["logits"][:, -1:]]
    out += [impl.step(IDS[:, t], cache)["logits"] for t in range(prefill, IDS.shape[1])]
    return np.concatenate(out, axis=1), cache["kv"]


def test_the_bytes_of_a_token():
    """Catches a layout of another size: 656 bytes for V3, and that is what a step really keeps."""
    c = PRESETS["deepseek-v3"]
    assert latent_bytes(c.kv_lora_rank, c.qk_rope_head_dim) == 656
    _, kept = decoded(kv_format="fp8")
    assert all(rows.dtype == np.uint8 and rows.shape == (2, 24, latent_bytes(20, 8)) for rows in kept.layers)


@pytest.mark.parametrize(("name", "most"), [("fp8", 0.08), ("int8", 0.02)])
def test_a_packed_cache_is_near_and_not_equal(name, most):
    """Catches a cache packed for show and read unpacked, or a scale used on one side only (A21). E4M3 rounds by up to 2^-4,
    INT8 by up to amax/254; attention averages over keys, so the logits move by less than one rounding."""
    exact, _ = decoded()
    packed, _ = decoded(kv_format=name)
    error = np.linalg.norm(packed - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 0 < np.median(error) < most


def test_old_entries_are_never_packed_again():
    """Catches drift: a token's bytes must not change while the sequence grows."""
    _, short = decoded(prefill=16, kv_format="int8")
    config, weights, _ = golden.case("hf_tiny")
    cache = {}
    Impl(kv_format="int8").load(config, weights).forward(IDS[:, :16], cache=cache)
    for early, late in zip(cache["kv"].layers, short.layers, strict=True):
        np.testing.assert_array_equal(early, late[:, :16])


def test_a_result_can_be_gone_on_from():
    """Catches a step that silently decodes from nothing: the result of forward is a cache too, any other mapping is refused."""
    config, weights, recorded = golden.case("hf_tiny")
    impl = Impl().load(config, weights)
    out = impl.forward(IDS[:, :16])
    theirs = recorded["cached/logits"][:, 1]
    assert np.abs(impl.step(IDS[:, 16], out)["logits"][:, 0] - theirs).max() < 5e-5
    for wrong, says in (
        ({"a": 1}, "the cache holds a"),
        ({"kv": 5}, "the cache's entry is a int"),
        ([], "cache is a list"),
    ):
        with pytest.raises(SpecError, match=says):
            impl.step(IDS[:, 16], wrong)


def test_formats_do_not_mix():
    """Catches bytes read in a format they were not written in."""
    config, weights, _ = golden.case("hf_tiny")
    with pytest.raises(SpecError, match="known: fp8, int8"):
        Impl(kv_format="fp4")
    cache = {}
    Impl(kv_format="fp8").load(config, weights).forward(IDS[:, :4], cache=cache)
    with pytest.raises(SpecError, match="the cache is packed"):
        Impl().load(config, weights).step([1, 2], cache)
    plain = {}
    Impl().load(config, weights).forward(IDS[:, :4], cache=plain)
    with pytest.raises(SpecError, match="not packed"):
        Impl(kv_format="fp8").load(config, weights).step([1, 2], plain)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_the_fp8_plan_runs_on_the_checkpoint_s_own_codes(scale_fmt):
    """Catches weights quantised to other codes than the checkpoint holds: dequantised in float32 and quantised again in the same
    blocks, every code comes back (a block's largest code is 448, so amax / 448 is the scale again but for one rounding)."""
    w = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    codes, scales = quantize_blocks(w, scale_fmt=scale_fmt)
    plan = {None: FP8, "ue8m0": FP8_UE8M0}[scale_fmt]
    again = quantize(dequantize_blocks(codes, scales), BLOCK, dialect=plan.kernel("mla.q").weights)
    np.testing.assert_array_equal(again.codes, codes.view(np.uint8))
    np.testing.assert_allclose(again.scales, scales, rtol=0 if scale_fmt else 2.0**-23)


def test_the_block_size_is_the_config_s():
    """Catches a block size taken for granted or inferred from the scales' shape (F01, F07): 16 x 16 here."""
    config, weights, _ = golden.case("hf_tiny")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    codes, scales = quantize_blocks(weights[name], 16)
    held = dict(weights) | {name: codes, name + "_scale_inv": scales}
    with pytest.raises(SpecError, match="blocks of 128 x 128"):
        Impl().load(config, held)
    config = config | {"quantization_config": {"weight_block_size": [16, 16]}}
    expected = dict(weights) | {name: dequantize_blocks(codes, scales, 16)}
    logits = [Impl().load(config, w).forward(IDS[:1, :5])["logits"] for w in (held, expected)]
    np.testing.assert_array_equal(*logits)


def test_both_ways_to_multiply_an_fp8_checkpoint():
    """DeepSeek's inference code has two: gemm_impl "bf16" (weights dequantised, activations as they are) and "fp8" (both in codes).
    Catches one plan that stands for both."""
    config, weights, _ = golden.case("hf_tiny")
    held = {}
    for name, w in weights.items():
        if "_proj" in name and w.ndim == 2:
            held[name], held[name + "_scale_inv"] = quantize_blocks(w)
        else:
            held[name] = w
    full = Impl(precision="float64").load(config, held).forward(IDS[:1, :4])["logits"]
    error = {}
    for plan in ("bf16", "fp8"):
        logits = Impl(precision=plan).load(config, held).forward(IDS[:1, :4])["logits"]
        error[plan] = np.linalg.norm(logits - full) / np.linalg.norm(full)
    assert 0 < error["bf16"] < error["fp8"] < 1
