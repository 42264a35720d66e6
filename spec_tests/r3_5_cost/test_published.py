"""Figures that others have published, typed from their tables, and what follows from them in exact arithmetic."""

from fractions import Fraction

import pytest

from refimpl.checkpoint import count_parameters
from refimpl.layers import PRESETS, Config
from refimpl.layers.presets import DEEPSEEK_V2
from refimpl.parallel_emulation.cost import Job, Plan, plan_text, published, scale
from refimpl.parallel_emulation.cost.cluster import Cluster
from refimpl.parallel_emulation.cost.traffic import uniform_copies

TABLES = """
R 1, R 4.2          gpus 2048  pipeline 16  expert_parallel 64  sequence 4096  sequences_per_step 15360  trillions 14.8
R table 1           pretraining_hours 2664e3  extension_hours 119e3  post_training_hours 5e3  dollars_per_hour 2
R 4.2               gpu_hours_per_trillion 180e3
HW table 4          step_s 19.926  tokens_per_day 272.80e9  causal_tflops 385  peak_tflops 989  optimizer_s 0.29
HW table 2          flops_per_token 250e9
"""
TRACE = "attention F 4363  mlp F 4604  attention I 9341  mlp I 5306  mlp W 3540  attention W 2388"
NORMAL = "8: 153 158  16: 43 43  32: 58 57  64: 51 50  128: 45.34 41.6"
LOW_LATENCY = "8: 77 114  16: 118 195  32: 155 273  64: 173 314  128: 192 369  256: 194 360"


def by_size(line):
    return {int(size): tuple(map(float, row.split())) for size, row in (c.split(":") for c in line.split("  "))}


def test_the_figures_are_those_of_the_tables():
    """The report, "Insights into DeepSeek-V3", the README of DeepEP's first generation, the public trace. Catches a digit."""
    typed = [entry.split() for line in TABLES.strip().splitlines() for entry in line[20:].split("  ")]
    assert vars(published.TRAINING) == {name: float(value) for name, value in typed}
    assert dict(published.TRACE_US) == {e.rpartition(" ")[0]: float(e.rpartition(" ")[2]) for e in TRACE.split("  ")}
    assert published.TRACE_PAIR_US == 129_000
    assert dict(published.NORMAL_GBS) == by_size(NORMAL) and dict(published.LOW_LATENCY_US) == by_size(LOW_LATENCY)


def test_what_follows_from_the_step_is_exact():
    """In fractions. Catches a day of 86,401 s, and any factor that a tolerance of a published figure lets through."""
    tokens, step = 15360 * 4096, Fraction("19.926")
    rate = scale.published_rate()
    assert rate.tokens_per_day == pytest.approx(float(tokens * 24 * 3600 / step), rel=1e-12)
    assert rate.gpu_hours_per_trillion == pytest.approx(float(10**12 * step * 2048 / tokens / 3600), rel=1e-12)
    assert rate.tflops == pytest.approx(float(250 * 10**9 * tokens / (2048 * step) / 10**12), rel=1e-12)
    assert rate.utilisation == pytest.approx(float(250 * 10**9 * tokens / (2048 * step) / (989 * 10**12)), rel=1e-12)
    kernels = sum(float(e.split()[-1]) for e in TRACE.split("  "))
    assert scale.trace_overlap() == pytest.approx(4 * kernels / 129e3, rel=1e-12)
    assert sum(scale.trace_seconds().values()) == pytest.approx(kernels * 1e-6, rel=1e-12)


def test_the_comparison_names_every_published_figure():
    """Catches a figure that the table shows against another than its own; the last six are identities, to the digit."""
    rows = {what: (model, known) for what, model, known in plan_text.comparisons()}
    for line, kernels, unit in ((NORMAL, "normal", "GB/s"), (LOW_LATENCY, "low-latency", "us")):
        for size, (dispatch, combine) in by_size(line).items():
            if (kernels, size) != ("low-latency", 8):  # one node: another limit
                assert rows.pop(f"{kernels} dispatch, EP {size}, {unit}")[1] == dispatch
                assert rows.pop(f"{kernels} combine, EP {size}, {unit}")[1] == combine
    assert [known for _, known in rows.values()] == [19.926, 180.0, 272.8, 385.0, 2788.0, 5576.0]
    assert [round(model, 2) for model, _ in rows.values()][2:] == [272.8, 385.43, 2788.0, 5576.0]


# ---- Models

CONFIG_236B = {  # inference/configs/config_236B.json of DeepSeek-V3, and V2's config.json
    **{"vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536},
    **{"num_hidden_layers": 60, "first_k_dense_replace": 1, "num_attention_heads": 128, "n_routed_experts": 160},
    **{"n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0},
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    **{"num_nextn_predict_layers": 0, "max_position_embeddings": 163840},
}


def test_v2s_sizes_are_the_released_ones():
    """Catches a digit of the preset; V3's and V2-Lite's are held against DeepSeek's own reader in test_save.py."""
    assert {key: getattr(DEEPSEEK_V2, key) for key in CONFIG_236B} == CONFIG_236B


def test_what_a_v2_config_leaves_out_is_not_v3s():
    """DeepseekV2Config of transformers 5.23.0. Catches V3's sigmoid, bias, renormalisation, 2.5 and MTP in a model of before."""
    c = Config.from_dict({"model_type": "deepseek_v2"})
    assert (c.scoring_func, c.topk_method, c.norm_topk_prob) == ("softmax", "greedy", False)
    assert (c.routed_scaling_factor, c.num_nextn_predict_layers) == (1.0, 0)
    assert Config.from_dict({"model_type": "deepseek_v2", "routed_scaling_factor": 16.0}).routed_scaling_factor == 16


@pytest.mark.parametrize(
    ("name", "total", "layers", "heads", "experts", "chosen"),
    [("tiny", 128_468, 3, 4, 16, 4), ("mini", 52_221_792, 4, 8, 32, 4)],
)
def test_small_models_keep_their_size(name, total, layers, heads, experts, chosen):
    """Recorded: weights and router biases without MTP. Catches a changed preset, which makes recorded cases another model's."""
    c = PRESETS[name]
    assert count_parameters(c).total == total
    assert (c.num_hidden_layers, c.num_attention_heads, c.n_routed_experts) == (layers, heads, experts)
    assert (c.num_experts_per_tok, c.n_group, c.topk_group, c.first_k_dense_replace) == (chosen, 4, 2, 1)


# ---- Copies of a plan


@pytest.mark.parametrize(("groups", "limit"), [(1, 16), (2, 1), (4, 1), (4, 2)])
def test_a_plan_counts_the_copies_of_its_models_routing(groups, limit):
    """Sixteen experts on four nodes. Catches a limit taken from a model without groups, or none taken from one with two."""
    config = PRESETS["tiny"].replace(n_group=groups, topk_group=limit if groups > 1 else 1, num_experts_per_tok=2)
    found = Plan(Job(config, Cluster(8, 2), pp=1, ep=8, micro_batches=2, schedule="1f1b", sequence=16)).copies
    assert found == uniform_copies(8, experts=16, k=2, gpus_per_node=2, node_limit=limit)
    assert found.nodes <= limit
