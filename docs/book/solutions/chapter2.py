"""Chapter 2: one way to do it."""


def _count(c, experts):
    d, h = c.hidden_size, c.num_attention_heads
    attention = d * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * h * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    attention += d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    attention += c.kv_lora_rank * h * (c.qk_nope_head_dim + c.v_head_dim) + h * c.v_head_dim * d
    expert = 3 * d * c.moe_intermediate_size
    moe = (experts + c.n_shared_experts) * expert + c.n_routed_experts * (d + 1)
    moes = sum(c.is_moe(i) for i in range(c.num_hidden_layers))
    dense = 3 * d * c.intermediate_size
    layers = c.num_hidden_layers * (attention + 2 * d) + moes * moe + (c.num_hidden_layers - moes) * dense
    return layers + 2 * c.vocab_size * d + d


def total(c):
    """All experts."""
    return _count(c, c.n_routed_experts)


def active(c):
    """Only those that were chosen; the router itself is met whole."""
    return _count(c, c.num_experts_per_tok)


def real_shape(letters, c, batch, length):
    """Look up, add, halve."""
    known = {
        "B": batch,
        "S": length,
        "T": length,
        "D": c.hidden_size,
        "V": c.vocab_size,
        "H": c.num_attention_heads,
        "Dn": c.qk_nope_head_dim,
        "Dr": c.qk_rope_head_dim,
        "Dv": c.v_head_dim,
        "C": c.kv_lora_rank,
        "Q": c.q_lora_rank,
        "E": c.n_routed_experts,
        "G": c.n_group,
        "K": c.num_experts_per_tok,
    }

    def one(term):
        top, _, under = term.partition("/")
        value = sum(int(t) if t.isdigit() else known[t] for t in top.split("+"))
        return value // int(under) if under else value

    return tuple(one(t) for t in letters.split())
