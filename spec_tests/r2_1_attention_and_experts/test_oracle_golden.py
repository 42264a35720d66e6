"""The oracle against recorded runs of transformers 5.23.0 and DeepSeek's inference/model.py.

Everything else in this folder may lean on the oracle because of this file. The recordings are
float32, so what is compared is mostly their rounding: the largest difference is 1.1e-5 in the
logits and 3.7e-5 in the residual stream, whose entries reach 20; LIMIT is 5e-5.
"""

import functools
import json

import numpy as np
import pytest

from refimpl.spec_tests import golden
from refimpl.spec_tests.oracles import attention as oracle_attention
from refimpl.spec_tests.oracles.attention import attention_factor, frequencies, softmax_scale
from refimpl.spec_tests.oracles.model import cross_entropy, forward

LIMIT = 5e-5
CASES = ["hf_tiny", "hf_plain", "hf_corners", "hf_v2", "hf_v2_lite"]
TAPS = {
    "hidden": "resid",
    "attn_out": "attn_out",
    "attn_prob": "mla.probs",
    "kv_latent": "mla.c_kv",
    "mlp_out": "ffn_out",
}
GLOBAL = {
    "hidden/embed": "fwd/embed",
    "hidden/final_norm": "fwd/final_norm",
    "logits": "fwd/logits",
}


@functools.cache
def run(name, changes="{}"):
    """The oracle's taps for a recorded case, config keys changed by JSON text (hashable)."""
    config, weights, recorded = golden.case(name)
    return forward(config | json.loads(changes), weights, recorded["input_ids"])


def recorded_activations():
    """Every recorded array that is an activation, as (case, key, tap)."""
    for name in CASES:
        for key in golden.arrays(name):
            kind, _, layer = key.partition("/layer")
            if key in GLOBAL:
                yield name, key, GLOBAL[key]
            elif kind in TAPS:
                yield name, key, f"fwd/L{layer}/{TAPS[kind]}"
            elif kind == "router" and key.endswith("/logits"):
                yield name, key, f"fwd/L{layer.removesuffix('/logits')}/router.logits"


def routed_layers():
    for name in CASES:
        for key in golden.arrays(name):
            if key.endswith("/indices"):
                yield name, int(key.split("/")[1].removeprefix("layer"))


def near(ours, theirs, limit=LIMIT):
    np.testing.assert_allclose(np.reshape(ours, theirs.shape), theirs, rtol=0, atol=limit)


def spread(ids, shares, experts):
    """(N, E) weights with zeros where an expert was not chosen; ids and shares (..., K)."""
    dense = np.zeros((ids.size // ids.shape[-1], experts))
    np.put_along_axis(dense, ids.reshape(len(dense), -1), shares.reshape(len(dense), -1), axis=1)
    return dense


@pytest.mark.parametrize(("name", "key", "tap"), list(recorded_activations()))
def test_activation_is_what_transformers_computed(name, key, tap):
    """Catches any wrong equation, at the first tap it reaches."""
    near(run(name)[tap], golden.arrays(name)[key])


@pytest.mark.parametrize(("name", "layer"), list(routed_layers()))
def test_the_same_experts_get_the_same_weights(name, layer):
    """Catches a bias that leaks into the weights, a wrong group rule, and a missing or doubled scale."""
    config, _, recorded = golden.case(name)
    taps, at = run(name), f"router/layer{layer}/"
    ids, shares = taps[f"fwd/L{layer}/router.ids"], taps[f"fwd/L{layer}/router.weights"]
    np.testing.assert_array_equal(ids.reshape(-1, ids.shape[-1]), np.sort(recorded[at + "indices"], axis=1))
    experts = config["n_routed_experts"]
    near(
        spread(ids, shares, experts),
        spread(recorded[at + "indices"], recorded[at + "weights"], experts),
    )


@pytest.mark.parametrize("layer", [1, 2])
def test_load_counts_the_tokens_of_each_expert(layer):
    """Catches a load counted per slot or per sequence instead of per expert over the batch."""
    counts = np.bincount(run("hf_tiny")[f"fwd/L{layer}/router.ids"].ravel(), minlength=16)
    np.testing.assert_array_equal(counts, golden.arrays("hf_tiny")[f"router/layer{layer}/load"])


@pytest.mark.parametrize("name", CASES)
def test_loss_shifts_the_labels_once_and_skips_minus_100(name):
    """Catches a missing or doubled shift, and a mean over all positions instead of the labelled ones."""
    recorded = golden.arrays(name)
    near(cross_entropy(run(name)["fwd/logits"], recorded["labels"]), recorded["loss"], 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_rotary_constants(name):
    """Catches every YaRN mistake: ramp ends, blend, cos/sin factor (mscale given, missing, unequal), softmax scale."""
    config, _, recorded = golden.case(name)
    np.testing.assert_allclose(frequencies(config), recorded["rope/inv_freq"], rtol=1e-6)  # float32
    np.testing.assert_allclose(attention_factor(config), recorded["rope/attention_scaling"], rtol=1e-12)
    np.testing.assert_allclose(softmax_scale(config), recorded["rope/softmax_scale"], rtol=1e-12)


@pytest.mark.parametrize("name", ["hf_tiny", "hf_plain"])
def test_rotary_tables(name):
    """Catches sin and cos exchanged, and positions off by one (the tables repeat each frequency twice)."""
    recorded, tables = golden.arrays(name), run(name)["fwd/mla.rope_tables"]
    for table, key in zip(tables, ["rope/cos", "rope/sin"], strict=True):
        near(np.concatenate([table[0], table[0]], axis=-1), recorded[key], 1e-5)  # float32 angles up to 23


@pytest.mark.parametrize("name", ["hf_tiny", "hf_plain"])
def test_a_cache_changes_nothing(name):
    """Prefill of 16 and eight cached steps are the causal forward: catches a position or a key that is not causal."""
    near(run(name)["fwd/logits"][:, 15:], golden.arrays(name)["cached/logits"])


def test_greedy_tokens():
    """Twelve greedy tokens: catches a head applied to the wrong position."""
    config, weights, recorded = golden.case("hf_tiny")
    tokens = recorded["greedy/tokens"]
    chosen = forward(config, weights, tokens)["fwd/logits"].argmax(-1)
    np.testing.assert_array_equal(chosen[:, 7:-1], tokens[:, 8:])


YARN = golden.case("hf_tiny")[0]["rope_parameters"]
VARIANTS = {
    "rope_halves": {"rope_interleave": False},
    "no_yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "yarn_mscale": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3}},
    "no_group_limit": {"n_group": 1, "topk_group": 1},
    "no_norm_topk": {"norm_topk_prob": False},
    "eps_1e-2": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_setting_changed(variant):
    """Catches a setting read but not obeyed; eps_1e-2 also that the latent norms keep 1e-6."""
    recorded = golden.arrays("hf_tiny")
    logits = run("hf_tiny", json.dumps(VARIANTS[variant]))["fwd/logits"]
    near(logits, recorded[f"variant/{variant}/logits"])
    near(cross_entropy(logits, recorded["labels"]), recorded[f"variant/{variant}/loss"], 2e-6)


def test_both_config_dialects_mean_the_same():
    """`rope_scaling` with `rope_theta` (the released config.json) equals transformers 5's `rope_parameters`."""
    config, weights, recorded = golden.case("hf_tiny")
    old = {k: v for k, v in config.items() if k != "rope_parameters"} | {"rope_theta": YARN["rope_theta"]}
    old["rope_scaling"] = {k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")} | {"type": "yarn"}
    np.testing.assert_array_equal(
        forward(old, weights, recorded["input_ids"])["fwd/logits"], run("hf_tiny")["fwd/logits"]
    )


def test_left_padding_is_invisible():
    """Catches padded keys that are attended to; padded rows themselves mean nothing and are not compared."""
    config, weights, recorded = golden.case("hf_tiny")
    mask = recorded["variant/left_padded/attention_mask"]
    positions = recorded["variant/left_padded/position_ids"]
    logits = forward(config, weights, recorded["input_ids"], positions, valid=mask)["fwd/logits"]
    near(logits[mask == 1], recorded["variant/left_padded/logits"][mask == 1])


@pytest.mark.parametrize("kind", ["naive", "absorb"])
def test_logits_of_deepseeks_own_code(kind):
    """Catches a convention that only transformers has (both forms of attention)."""
    recorded, logits = golden.arrays("official_tiny"), run("hf_tiny")["fwd/logits"]
    near(logits, recorded[f"f32/{kind}/logits"])
    near(logits[:, 15:], recorded[f"f32/{kind}/cached_logits"])


@pytest.mark.parametrize("layer", range(3))
def test_caches_of_deepseeks_own_code(layer):
    """The cache holds the normed latent and the rotated key, pairs interleaved: catches a half layout."""
    recorded, taps = golden.arrays("official_tiny"), run("hf_tiny")
    near(taps[f"fwd/L{layer}/mla.c_kv"], recorded[f"f32/kv_cache/layer{layer}"])
    near(taps[f"fwd/L{layer}/mla.k_rope"], recorded[f"f32/pe_cache/layer{layer}"])


def test_angles_of_deepseeks_own_code():
    """Catches another frequency table; angles were recorded wrapped, so their cosines and sines are compared."""
    angles, (cos, sin) = (
        golden.arrays("official_tiny")["f32/freqs_angle"],
        run("hf_tiny")["fwd/mla.rope_tables"],
    )
    near(cos[0], np.cos(angles), 1e-5)  # float32 angles up to 23
    near(sin[0], np.sin(angles), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_absorbed_attention_is_the_same_attention(name):
    """q_nope . k_nope = absorbed . latent: catches a W_UK or W_UV slice of the wrong head."""
    config, weights, _ = golden.case(name)
    scores, ctx = oracle_attention.absorbed_attention(config, weights, run(name), 1)
    np.testing.assert_allclose(scores, run(name)["fwd/L1/mla.scores"], rtol=0, atol=1e-12)  # float64 rounding
    np.testing.assert_allclose(ctx, run(name)["fwd/L1/mla.ctx"], rtol=0, atol=1e-12)


def test_packed_documents_do_not_see_each_other():
    """Two documents in one row, positions restarted, give what each gives alone."""
    config, weights, recorded = golden.case("hf_corners")
    row = recorded["input_ids"][:1]
    packed = forward(config, weights, row, [[0, 1, 2, 3, 4, *range(7)]], documents=[[0] * 5 + [1] * 7])["fwd/logits"]
    alone = [forward(config, weights, part)["fwd/logits"] for part in (row[:, :5], row[:, 5:])]
    np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=0, atol=1e-12)  # float64 rounding


# What the recordings must show when it is lost: case, config changes, weight factors.
LOST = {
    "bias ignored": ("hf_tiny", {}, {"e_score_correction_bias": 0.0}),
    "attention bias ignored": ("hf_plain", {}, {"proj_with_mqa.bias": 0.0}),
    "query latent bias ignored": ("hf_corners", {}, {"q_a_proj.bias": 0.0}),
    "output bias ignored": ("hf_corners", {}, {"o_proj.bias": 0.0}),
    "shared expert scaled": ("hf_tiny", {}, {"shared_experts.down_proj.weight": 2.5}),
    "not scaled": ("hf_tiny", {"routed_scaling_factor": 1.0}, {}),
    "one group": ("hf_v2", {"n_group": 1}, {}),
    "groups by their two best": ("hf_v2", {"topk_method": "noaux_tc"}, {}),
    "sigmoid for softmax": ("hf_v2_lite", {"scoring_func": "sigmoid"}, {}),
    "renormalised": ("hf_v2", {"norm_topk_prob": True}, {}),
    "head not tied": ("hf_corners", {}, {"embed_tokens.weight": -1.0}),
    "halves for pairs": ("hf_v2", {"rope_interleave": False}, {}),
    "pairs for halves": ("hf_plain", {"rope_interleave": True}, {}),
}


@pytest.mark.parametrize("mistake", LOST)
def test_the_recordings_would_notice(mistake):
    """A recording that no mistake can change proves nothing: each must move the logits."""
    name, config_changes, factors = LOST[mistake]
    config, weights, recorded = golden.case(name)
    scaled = {n: w * f for n, w in weights.items() for end, f in factors.items() if n.endswith(end)}
    wrong = forward(config | config_changes, weights | scaled, recorded["input_ids"])["fwd/logits"]
    assert bool(scaled) == bool(factors)
    assert np.abs(wrong - recorded["logits"]).max() > 100 * LIMIT


def test_the_recordings_would_notice_another_latent_eps(monkeypatch):
    """The variant eps_1e-2 sees it; hf_plain's 1e-5 in the latent norms would move 4e-5 only."""
    config, weights, recorded = golden.case("hf_tiny")
    monkeypatch.setattr(oracle_attention, "LATENT_EPS", 1e-2)
    wrong = forward(config | VARIANTS["eps_1e-2"], weights, recorded["input_ids"])["fwd/logits"]
    assert np.abs(wrong - recorded["variant/eps_1e-2/logits"]).max() > 100 * LIMIT
