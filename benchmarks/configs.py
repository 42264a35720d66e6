"""The two model sizes of the benchmarks, in the keys of config.json, and the weights both sides load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SHARED: dict[str, Any] = {
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "rope_parameters": YARN,
}
TINY = SHARED | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MINI = SHARED | {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1280,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
SIZES = {"tiny": TINY, "mini": MINI}  # 0.13 M and 52.2 M parameters
BATCH, LENGTH = 2, 256
LR, GAMMA = 2.2e-4, 1e-3  # of a training step (R 4.2)
NODES = 1000  # of the autograd chain: mul, add, maximum in turn, then one sum


def draw(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Array]]:
    """(checkpoint name, float32 array), in the order of the names, so that every implementation draws the same; one
    at a time, so that none needs the weights twice in memory.
    """
    rng = np.random.default_rng(0)
    for name in sorted(shapes):
        if name.endswith("norm.weight"):
            yield name, np.ones(shapes[name], np.float32)
        else:
            spread = np.float32(0.05 if name.endswith("e_score_correction_bias") else 0.02)
            yield name, rng.standard_normal(shapes[name], dtype=np.float32) * spread


def tokens(size: str) -> Array:
    """Token ids (BATCH, LENGTH), the same for every implementation."""
    return np.random.default_rng(7).integers(0, SIZES[size]["vocab_size"], (BATCH, LENGTH))


def prompts(size: str, batch: int) -> Array:
    """Token ids (batch, LENGTH) to decode after: those of `tokens`, and more of the kind."""
    more = np.random.default_rng(8).integers(0, SIZES[size]["vocab_size"], (max(batch, BATCH) - BATCH, LENGTH))
    return np.concatenate([tokens(size), more])[:batch]


def prompt(size: str) -> Array:
    """Token ids (1, 512): a prompt."""
    return tokens(size).reshape(1, -1)


def chain_inputs() -> tuple[Array, Array, Array, Array]:
    """x, a, b, floor (4, 4) of the autograd chain y = max(y a + b, floor)."""
    x = np.random.default_rng(0).standard_normal((4, 4), dtype=np.float32)
    return x, np.full_like(x, 1.0001), np.full_like(x, 0.0001), np.full_like(x, -1.0)
