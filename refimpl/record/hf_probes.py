"""Where transformers' DeepSeek-V3 shows each tap: at the call of a module, or of a torch function while a module runs.

The tables are read with the config alone, so that a module which another version renames, or a function which it no
longer calls, is noticed. A module's output is the model's own word, whatever its shape; that the nth matmul holds the
scores is our guess, so what does not look like it counts as not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from refimpl.layers.config import Config
from refimpl.layers.stage import STAGES

from .torch_arrays import libraries

_DIMS = {s.tap: s.shape for s in STAGES.values()}


@dataclass(frozen=True)
class Seen:
    """One call of a module or function: what went in and what came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


Pick = Callable[[Seen, Config], Any]
"""Which tensor of a call is the tap; None if this call has none."""


def _in(seen: Seen, c: Config) -> Any:
    return seen.args[0]


def _out(seen: Seen, c: Config) -> Any:
    return seen.out


def _nth(n: int) -> Pick:
    return lambda seen, c: seen.out[n]


def _tables(seen: Seen, c: Config) -> Any:
    torch, _ = libraries()
    if hasattr(seen.out, "real"):  # V2's, complex; a tuple has no real part
        return torch.stack([seen.out.real, seen.out.imag])
    return torch.stack([t[..., : c.qk_rope_head_dim // 2] for t in seen.out])  # cos and sin hold every frequency twice


def _q_rope(seen: Seen, c: Config) -> Any:
    if seen.args[0].shape[-1] != c.qk_nope_head_dim + c.qk_rope_head_dim:
        return None  # a product of the two parts apart, or of something else
    return seen.args[0][..., -c.qk_rope_head_dim :].transpose(1, 2)  # (B, H, S, Dn+Dr) -> (B, S, H, Dr)


def _k_rope(seen: Seen, c: Config) -> Any:
    if seen.args[1].shape[-2] != c.qk_nope_head_dim + c.qk_rope_head_dim:
        return None
    shared = seen.args[1][:, 0]  # (B, H, Dn+Dr, T): the rotated part is the same in every head
    return shared[:, -c.qk_rope_head_dim :].transpose(1, 2)


def _key(seen: Seen, c: Config) -> Any:
    if seen.args[1].shape[-1] != c.qk_nope_head_dim + c.qk_rope_head_dim:
        return None
    return seen.args[1][:, 0, :, -c.qk_rope_head_dim :]  # (B, H, T, Dn+Dr) of a kernel that takes keys as they are


def _k_rope_grad(seen: Seen, c: Config) -> Any:
    return (
        seen.args[1][:, :, -c.qk_rope_head_dim :].sum(1).transpose(1, 2)
    )  # what every head sends back to the shared part


def _key_grad(seen: Seen, c: Config) -> Any:
    return seen.args[1][..., -c.qk_rope_head_dim :].sum(1)


def _in_second(seen: Seen, c: Config) -> Any:
    return seen.args[1]


def _mask(seen: Seen, c: Config) -> Any:
    torch, _ = libraries()
    mask = seen.kwargs["attention_mask"]  # None where an attention kernel masks by itself
    if mask is None:
        return None
    if hasattr(mask, "mask_mod"):  # FlexAttention's BlockMask holds blocks and the function
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, mask.shape[0], 1, *mask.seq_lengths, device="cpu")
    if mask.dtype == torch.bool:  # True: seen
        return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return _minus_inf(mask)


def _scores(seen: Seen, c: Config) -> Any:
    return _minus_inf(seen.args[0])


def _minus_inf(x: Any) -> Any:
    torch, _ = libraries()
    return x.masked_fill(x <= torch.finfo(x.dtype).min / 2, -torch.inf)


_SIDE: dict[Pick, str] = {
    _in: "input",
    _mask: "attention_mask",
    _q_rope: "last Dr channels of the first factor",
    _k_rope: "last Dr channels of the second factor",
    _key: "last Dr channels of the second argument",
    _in_second: "second argument",
}
"""What of a call is taken, where it is not what the call gives."""


@dataclass(frozen=True)
class Probe:
    """Where a tap is seen: at a module, or (`function`) at the nth call of a function while that module runs, if function
    `after` was called there before. `optional`: not every run has it. `grad` picks its gradient from those of the call, where that
    is not the same place.
    """

    module: str
    tap: str
    pick: Pick
    function: str | None = None
    nth: int = 0
    after: str = ""
    optional: bool = False
    grad: Pick | None = None

    @property
    def where(self) -> str:
        """The same in words, without the layer: `input of matmul 2 in self_attn`."""
        module = re.sub(r"(model\.)?layers\.\d+\.?", "", self.module) or "layers.i"
        call = f"{self.function} {self.nth + 1} in {module}" if self.function else module
        return f"{_SIDE[self.pick]} of {call}" if self.pick in _SIDE else call


_ENDS = (
    Probe("model.embed_tokens", "embed", _out),
    Probe("model.rotary_emb", "mla.rope_tables", _tables),
    Probe("model.layers.0", "mask", _mask),
    Probe("model.norm", "final_norm", _out),
    Probe("lm_head", "logits", _out),
)
_LAYER = (
    Probe("input_layernorm", "attn_norm", _out),
    Probe("self_attn.kv_a_proj_with_mqa", "mla.kv_a", _out),
    Probe("self_attn.kv_a_layernorm", "mla.c_kv", _out),
    Probe("self_attn.kv_b_proj", "mla.kv_b", _out),
    Probe("self_attn.o_proj", "mla.ctx", _in),
    Probe("self_attn.o_proj", "attn_out", _out),
    Probe("post_attention_layernorm", "resid_mid", _in),
    Probe("post_attention_layernorm", "ffn_norm", _out),
    Probe("mlp", "ffn_out", _out),
    Probe("", "resid", _out),
)
_EAGER = (
    Probe("self_attn", "mla.q_rope", _q_rope, "matmul", 0),
    Probe("self_attn", "mla.k_rope", _k_rope, "matmul", 0, grad=_k_rope_grad),
    Probe("self_attn", "mla.scores", _scores, "softmax", 0),
    Probe("self_attn", "mla.probs", _in, "matmul", 1, after="softmax"),
)


def _kernel(function: str) -> tuple[Probe, ...]:
    """A function that gives attention's output from queries and keys: nothing between them is seen."""
    return (
        Probe("self_attn", "mla.q_rope", _q_rope, function, 0),
        Probe("self_attn", "mla.k_rope", _key, function, 0, grad=_key_grad),
    )


KERNELS = {
    "sdpa": _kernel("scaled_dot_product_attention"),
    "flex_attention": _kernel("compile_friendly_flex_attention"),
}
"""Attention kernel -> what is seen of it; any other is watched as the eager one is."""
_CACHED = (
    Probe("self_attn", "mla.k_rope", _in_second, "cache.update", 0),
    Probe("self_attn", "cache.c_kv", _nth(0), "cache.update", 0),
    Probe("self_attn", "cache.k_rope", _nth(1), "cache.update", 0),
)
_FULL_RANK_Q = (Probe("self_attn.q_proj", "mla.q", _out),)
_LOW_RANK_Q = (
    Probe("self_attn.q_a_proj", "mla.q_a", _out),
    Probe("self_attn.q_a_layernorm", "mla.q_a_norm", _out),
    Probe("self_attn.q_b_proj", "mla.q", _out),
)


def _swiglu(module: str, tap: str) -> tuple[Probe, ...]:
    """A SwiGLU's inside: what its two input matrices give, and what goes into its output matrix."""
    ends = (("gate_proj", "gate", _out), ("up_proj", "up", _out), ("down_proj", "act", _in))
    return tuple([Probe(f"{module}.{matrix}", f"{tap}.{name}", pick) for matrix, name, pick in ends])


_DENSE = _swiglu("mlp", "mlp")
_MOE = (
    Probe("mlp.gate", "router.logits", _nth(0)),
    Probe("mlp.gate", "router.weights", _nth(1)),
    Probe("mlp.gate", "router.ids", _nth(2)),
    Probe("mlp.experts", "moe.routed", _out),
    *_swiglu("mlp.shared_experts", "shared"),
    Probe("mlp.shared_experts", "moe.shared", _out),
)
CHOICE = (
    "its choice of experts"  # no function of torch: known when the gate is left, from all that were called (hf_choice)
)
_CHOICE = (Probe("mlp.gate", "router.choice", _out, CHOICE),)
EXPERTS = ("moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down")
SEEN_INSIDE = ("eager", "batched_mm", "grouped_mm")  # implementations of experts
BUSY = ("self_attn", "mlp.gate", "mlp.experts")  # the modules within which functions are watched
NO_GRADIENT = frozenset(
    {"mask", "mla.rope_tables", "router.choice", "router.group_scores", "router.groups", "router.ids"}
)
"""Taps that no loss depends on, but for a choice."""


def _moe(c: Config) -> tuple[Probe, ...]:
    """All of a layer's experts. V2's topk of groups is the first one, V3's the second."""
    biased = c.topk_method == "noaux_tc"
    scores = Probe("mlp.gate", "router.scores", _out, {"sigmoid": "sigmoid", "softmax": "softmax"}[c.scoring_func], 0)
    groups = (
        Probe("mlp.gate", "router.group_scores", _in, "topk", int(biased)),
        Probe("mlp.gate", "router.groups", _nth(1), "topk", int(biased)),
    )
    grouped = c.n_group > 1 and c.topk_method != "greedy"
    rows = (_MOE[0], scores, *(_CHOICE if biased else ()), *_MOE[1:])
    return rows + groups if grouped else rows


def _attention(kernel: str, phase: str) -> tuple[Probe, ...]:
    """Around the kernel; of a part that finds something in the cache, the cache tells old keys from new ones."""
    found = KERNELS.get(kernel, _EAGER)
    return found if phase == "fwd" else (*[p for p in found if p.tap != "mla.k_rope"], *_CACHED)


def expected_taps(
    c: Config, experts: str = "eager", *, attention: str = "eager", phase: str = "fwd"
) -> dict[str, Probe | None]:
    """Every tap that a run of this config can give -> its probe; None for what is seen of all experts together."""
    free = attention in KERNELS  # masks by itself where it can
    found: dict[str, Probe | None] = {f"{phase}/{p.tap}": replace(p, optional=free and p.tap == "mask") for p in _ENDS}
    for i in range(c.num_hidden_layers):
        rows = _LAYER[:4] + _attention(attention, phase) + _LAYER[4:]
        rows += _FULL_RANK_Q if c.q_lora_rank is None else _LOW_RANK_Q
        rows += _moe(c) if c.is_moe(i) else _DENSE
        for p in rows:
            path = f"model.layers.{i}.{p.module}".rstrip(".")
            found[f"{phase}/L{i}/{p.tap}"] = replace(p, module=path)
        if c.is_moe(i) and experts in SEEN_INSIDE:
            found |= {f"{phase}/L{i}/{tap}": None for tap in EXPERTS}
    return found


def dims(tap: str) -> str:
    """The axes of a tap in letters, "B S H Dn+Dr"."""
    return _DIMS[tap.rpartition("/")[2]]
