"""What a layer costs, tensor by tensor, and who is asked what of a cluster."""

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import count_parameters
from refimpl.layers import PRESETS
from refimpl.parallel_emulation.cost import layer_cost
from refimpl.parallel_emulation.cost.traffic import count_copies, uniform_copies

PRIME = {"hidden_size": 53, "kv_lora_rank": 23, "q_lora_rank": 19, "num_attention_heads": 7, "qk_nope_head_dim": 11}
PRIME |= {
    "qk_rope_head_dim": 6,
    "v_head_dim": 13,
    "intermediate_size": 83,
    "moe_intermediate_size": 17,
    "vocab_size": 131,
}
SIZES = {  # V2-Lite has no latent of queries, two shared experts; sizes that are no powers of two tell + from |
    "V3": PRESETS["deepseek-v3"],
    "V2-Lite": PRESETS["deepseek-v2-lite"],
    "prime": PRESETS["tiny"].replace(n_shared_experts=3, num_experts_per_tok=5, **PRIME),
}


def projections(c):
    """(in, out) of every matrix of MLA."""
    q, qk = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank
    yield from [(c.hidden_size, q)] if qk is None else [(c.hidden_size, qk), (qk, q)]
    yield c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim
    yield c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield c.num_attention_heads * c.v_head_dim, c.hidden_size


def mlps(c, layer):
    """(in, out) of every matrix that a token goes through after attention."""
    d = c.hidden_size
    if layer < c.first_k_dense_replace:
        return [(d, c.intermediate_size)] * 2 + [(c.intermediate_size, d)]
    experts = [(d, c.moe_intermediate_size)] * 2 + [(c.moe_intermediate_size, d)]
    return experts * (c.num_experts_per_tok + c.n_shared_experts) + [(d, c.n_routed_experts)]


def products(shapes):
    return sum(n * m for n, m in shapes)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("length", [1, 16])
def test_flop_are_twice_the_products(name, length):
    """Matrix by matrix; scores and context key by key. Catches a projection twice, and a mask that is not causal."""
    c = SIZES[name]
    seen = sum(1 for query in range(length) for key in range(length) if key <= query) / length
    core = 2 * seen * c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    attention = 2 * products(projections(c))
    layers = [attention + core + 2 * products(mlps(c, i)) for i in range(c.num_hidden_layers)]
    forward = sum(layers) + 2 * products([(c.hidden_size, c.vocab_size)])
    assert layer_cost.core_flop(c, length) == pytest.approx(core, rel=1e-14)
    assert layer_cost.training_flop(c, length) == pytest.approx(3 * forward, rel=1e-14)
    mlp, groups = 2 * products(mlps(c, c.num_hidden_layers - 1)), layer_cost.group_flop(c, length)
    assert [groups[g] for g in ("mlp F", "mlp I", "mlp W", "attention W")] == [mlp, mlp, mlp, attention]
    assert groups["attention F"] == pytest.approx(attention + core) and set(groups) == set(layer_cost.GROUPS)
    assert groups["attention I"] == pytest.approx(attention + 2 * core)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_checkpoint(name):
    """Counted from shapes there, from a formula here; with sizes of our own, unlike the presets in test_scale.py."""
    c = SIZES[name]
    counts, layers = count_parameters(c), range(c.num_hidden_layers)
    dense = sum(layer_cost.dense_parameters(c, i) for i in layers)
    assert dense == counts.total - counts.routed_experts - counts.embedding - counts.head - c.hidden_size
    experts = sum(c.n_routed_experts * layer_cost.expert_parameters(c) for i in layers if c.is_moe(i))
    assert experts == counts.routed_experts


@pytest.mark.parametrize("name", SIZES)
def test_bytes_that_a_token_keeps(name):
    """(values, bits) of every kept tensor (R 3.2.3, R 3.3.3). Catches gate without up, and 12 bits counted as 2 bytes."""
    c = SIZES[name]
    d, heads = c.hidden_size, c.num_attention_heads
    kept = [(d, 16), (d, 16), (c.q_lora_rank or d, 16), (c.kv_lora_rank + c.qk_rope_head_dim, 16)]
    kept += [(heads * c.v_head_dim, 12), (heads, 32)]
    dense = [*kept, (c.intermediate_size, 8), (c.intermediate_size, 8)]
    moe = [*kept, *[(d, 8)] * c.num_experts_per_tok]
    moe += [(c.moe_intermediate_size, 8)] * 2 * (c.num_experts_per_tok + c.n_shared_experts)
    assert layer_cost.activation_bytes(c, moe=False) == products(dense) / 8
    assert layer_cost.activation_bytes(c) == products(moe) / 8
    assert layer_cost.kv_cache_bytes(c, 1) == c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim)


# ---- Copies at the edges of what there is


def test_every_gpu_may_be_a_node_of_its_own():
    """Catches nodes of one GPU refused; every copy but a token's own then goes over the network."""
    c = uniform_copies(4, experts=8, k=2, gpus_per_node=1, node_limit=4, tokens=512)
    assert c.ranks == c.nodes and c.nvlink == 0 and 1 < c.remote_nodes < 2


@pytest.mark.parametrize(
    ("expert", "source", "good"),
    [(0, 0, True), (-1, 0, True), (7, 3, True), (-2, 0, False), (8, 0, False), (0, -1, False), (0, 4, False)],
)
def test_the_first_and_the_last_expert_and_rank_exist(expert, source, good):
    """Eight experts on four ranks. Catches a limit off by one, by which the last expert or one more is on some rank."""
    ids, sources = np.array([[expert, 0]]), np.array([source])
    if good:
        assert count_copies(ids, sources, 8, 4, 2).ranks == len({expert * 4 // 8, 0} - {-1})
    else:
        with pytest.raises(SpecError, match="expert ids must lie in"):
            count_copies(ids, sources, 8, 4, 2)
