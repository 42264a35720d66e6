"""Chapter 4: one way to do it."""

import numpy as np


def cache_bytes(c, tokens, kind):
    """Numbers a token and layer, times two bytes."""
    pairs = {"mha": c.num_attention_heads, "gqa8": 8, "mqa": 1}
    numbers = c.kv_lora_rank + c.qk_rope_head_dim if kind == "mla" else 2 * c.v_head_dim * pairs[kind]
    return 2 * numbers * c.num_hidden_layers * tokens


def absorb(q, w_uk):
    """The sum runs over Dn, which both have; heads stay apart."""
    return np.einsum("shd,hdc->shc", q, w_uk)


def cheaper(c, new, keys):
    """Unfolding costs keys, absorbing costs queries; each pair costs what its vectors are long."""
    h, latent = c.num_attention_heads, c.kv_lora_rank
    both = c.qk_nope_head_dim + c.v_head_dim
    expanded = keys * h * latent * both + new * keys * h * (both + c.qk_rope_head_dim)
    absorbed = new * h * latent * both + new * keys * h * (2 * latent + c.qk_rope_head_dim)
    return "expanded" if expanded <= absorbed else "absorbed"
