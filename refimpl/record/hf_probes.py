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
    torch, _ = libraries()  # cos and sin hold every frequency twice
    return torch.stack([t[..., : c.qk_rope_head_dim // 2] for t in seen.out])


def _q_rope(seen: Seen, c: Config) -> Any:
    if seen.args[0].shape[-1] != c.qk_nope_head_dim + c.qk_rope_head_dim:
        return None  # a product of the two parts apart, or of something else
    return seen.args[0][..., -c.qk_rope_head_dim :].transpose(1, 2)  # (B, H, S, Dn+Dr) -> (B, S, H, Dr)


def _k_rope(seen: Seen, c: Config) -> Any:
    if seen.args[1].shape[-2] != c.qk_nope_head_dim + c.qk_rope_head_dim:
        return None
    shared = seen.args[1][:, 0]  # (B, H, Dn+Dr, T): the rotated part is the same in every head
    return shared[:, -c.qk_rope_head_dim :].transpose(1, 2)


def _mask(seen: Seen, c: Config) -> Any:
    mask = seen.kwargs["attention_mask"]  # None where an attention kernel masks by itself
    return None if mask is None else _minus_inf(mask)


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
}
"""What of a call is taken, where it is not what the call gives."""


@dataclass(frozen=True)
class Probe:
    """Where a tap is seen: at a module, or (`function`) at the nth call of a function while that module runs, if function
    `after` was called there before.
    """

    module: str
    tap: str
    pick: Pick
    function: str | None = None
    nth: int = 0
    after: str = ""

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
    Probe("self_attn", "mla.q_rope", _q_rope, "matmul", 0),
    Probe("self_attn", "mla.k_rope", _k_rope, "matmul", 0),
    Probe("self_attn", "mla.scores", _scores, "softmax", 0),
    Probe("self_attn", "mla.probs", _in, "matmul", 1, after="softmax"),
    Probe("self_attn.o_proj", "mla.ctx", _in),
    Probe("self_attn.o_proj", "attn_out", _out),
    Probe("post_attention_layernorm", "resid_mid", _in),
    Probe("post_attention_layernorm", "ffn_norm", _out),
    Probe("mlp", "ffn_out", _out),
    Probe("", "resid", _out),
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
    Probe("mlp.gate", "router.scores", _out, "sigmoid", 0),
    Probe("mlp.gate", "router.choice", _in, "topk", 0),  # of which the best two of every group are taken
    Probe("mlp.gate", "router.weights", _nth(1)),
    Probe("mlp.gate", "router.ids", _nth(2)),
    Probe("mlp.experts", "moe.routed", _out),
    *_swiglu("mlp.shared_experts", "shared"),
    Probe("mlp.shared_experts", "moe.shared", _out),
)
_GROUPS = (
    Probe("mlp.gate", "router.group_scores", _in, "topk", 1),
    Probe("mlp.gate", "router.groups", _nth(1), "topk", 1),
)
EXPERTS = ("moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down")
BUSY = ("self_attn", "mlp.gate", "mlp.experts")  # the modules within which functions are watched


def expected_taps(c: Config, experts: str = "eager") -> dict[str, Probe | None]:
    """Every tap that a run of this config is meant to give -> its probe; None for what is seen of all experts together."""
    found: dict[str, Probe | None] = {f"fwd/{p.tap}": p for p in _ENDS}
    for i in range(c.num_hidden_layers):
        rows = _LAYER + (_FULL_RANK_Q if c.q_lora_rank is None else _LOW_RANK_Q)
        rows += _DENSE if not c.is_moe(i) else _MOE + _GROUPS if c.n_group > 1 else _MOE
        for p in rows:
            path = f"model.layers.{i}.{p.module}".rstrip(".")
            found[f"fwd/L{i}/{p.tap}"] = replace(p, module=path)
        if c.is_moe(i) and experts == "eager":
            found |= {f"fwd/L{i}/{tap}": None for tap in EXPERTS}
    return found


def dims(tap: str) -> str:
    """The axes of a tap in letters, "B S H Dn+Dr"."""
    return _DIMS[tap.rpartition("/")[2]]
