"""The model's description: `config.json` keys, and the named points where implementations differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from refimpl.autograd.errors import SpecError, require

from .families import check_described, check_family
from .rope import RopeScaling


@dataclass(frozen=True)
class Dialect:
    """Points where public implementations legitimately differ; the defaults are the specification's choice.

    Evidence is one line each; a known bug is never here. O = deepseek-ai/DeepSeek-V3 inference at 9b4e978, HF =
    transformers 5.23.0, TT = torchtitan b5bcd76, MG = Megatron-LM d98e8a6, R = technical report.
    """

    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """h^0 handed to MTP after the final norm (HF, vLLM, SGLang, MG) or before it (TT); R 2.2 does not say."""
    mtp_recycle: Literal["post_norm", "pre_norm"] = "post_norm"
    """h^k handed to depth k+1 after shared_head.norm (HF, TT, SGLang) or before it (vLLM)."""
    mtp_concat: Literal["embedding_first", "hidden_first"] = "embedding_first"
    """[emb; hidden] is what the released weights and all code expect; R eq 21 writes [hidden; emb]."""
    mtp_loss_mean: Literal["length", "valid"] = "length"
    """L^k divided by T (R eq 24) or by the number of labels that count (MG, TT)."""
    latent_norm_eps: float | None = 1e-6
    """eps of q_a/kv_a norms: HF's class default 1e-6 whatever the config says; None = rms_norm_eps (vLLM #35515)."""
    topk_denominator_eps: float = 1e-20
    """Added to the sum of the selected scores: 1e-20 (HF, MG, TT); 0 in O. Only visible when all of them underflow."""
    masked_group_fill: Literal["-inf", "zero"] = "-inf"
    """Scores outside the kept groups: -inf (O since 1398800, HF 5); 0.0 in HF 4.51-4.56 and the first O."""
    yarn_applies: Literal["configured", "beyond_original"] = "configured"
    """YaRN whenever configured (HF, TT, MG, vLLM), or only if max_position_embeddings exceeds the original (O)."""
    routing_weight_on: Literal["output", "activation"] = "output"
    """Routing weight multiplies the expert's output (O, HF, TT) or its activation before down_proj (TileKernels,
    MG).
    """
    seq_aux_counts: Literal["unbiased_topk", "routed"] = "unbiased_topk"
    """f_i counts the ungrouped, unbiased top-K (R eq 18 as written, MG) or the experts actually used."""
    bias_update: Literal["sign", "zero_sum"] = "sign"
    """b += gamma*sign(mean load - load) (MG; R 2.1.2), or the same with its mean subtracted (TT)."""

    @staticmethod
    def choices() -> dict[str, tuple[Any, ...]]:
        """Point -> the values that implementations use."""
        hints = get_type_hints(Dialect)
        numbers = {"latent_norm_eps": (1e-6, None), "topk_denominator_eps": (1e-20, 0.0)}
        return {name: numbers.get(name) or get_args(hint) for name, hint in hints.items()}


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_HARMLESS = _keys(
    "architectures model_type torch_dtype dtype transformers_version auto_map bos_token_id eos_token_id pad_token_id"
    " use_cache initializer_range pretraining_tp output_router_logits num_key_value_heads ep_size attention_dropout"
    " quantization_config aux_loss_alpha seq_aux head_dim qk_head_dim num_local_experts num_mtp_layers hidden_act"
    " mlp_bias rope_parameters rope_scaling rope_theta scoring_func topk_method _name_or_path chunk_size_feed_forward"
    " is_encoder_decoder output_attentions output_hidden_states return_dict id2label label2id problem_type"
)
_DIALECT_KEY = "dialect"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }
}
"""model_type -> what its config.json may leave out and V3's defaults would get wrong (transformers 5.23.0)."""


@dataclass(frozen=True)
class Config:
    """A DeepSeek-V2/V3 model in the keys of Hugging Face's `config.json`. Raises SpecError for impossible values.

    Letters of the shapes: D hidden_size, V vocab_size, H num_attention_heads, Dn qk_nope_head_dim, Dr qk_rope_head_dim,
    Dv v_head_dim, C kv_lora_rank, Q q_lora_rank, E n_routed_experts, G n_group, K num_experts_per_tok, L
    num_hidden_layers.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    dialect: Dialect = Dialect()

    @classmethod
    def described(cls, d: Mapping[str, Any]) -> Config:
        """`from_dict` of a file that has to say which model it is: of an empty one, defaults would make DeepSeek-V3."""
        check_described(d)
        return cls.from_dict(d)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Config:
        """Read `config.json` (old `rope_scaling` + `rope_theta`, or transformers 5's `rope_parameters`)."""
        require(isinstance(d, Mapping), f"the config is a {type(d).__name__}; expected the keys of config.json")
        odd = [k for k in d if not isinstance(k, str)]
        require(not odd, f"config keys must be names, not {odd!r}")
        check_family(d)
        d = _DEFAULTS.get(str(d.get("model_type", "")), {}) | {k: v for k, v in d.items() if not k.startswith("_")}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, only in (("hidden_act", "silu"), ("mlp_bias", False)):
            require(d.get(key, only) == only, f"{key} is {d.get(key)!r}; the specification has only {only!r}")
        unknown = sorted(set(d) - set(fields) - _HARMLESS)
        if unknown:
            raise SpecError(f"config keys that the specification does not know: {', '.join(unknown)}")
        values = {k: v for k, v in d.items() if k in fields and not k.startswith("rope_s")}
        if "num_mtp_layers" in d:
            values.setdefault("num_nextn_predict_layers", d["num_mtp_layers"])
        for key in ("rope_parameters", "rope_scaling", _DIALECT_KEY):
            ok = d.get(key) is None or isinstance(d[key], Mapping | RopeScaling | Dialect)
            require(ok, f"{key} is {d.get(key)!r}; it must be an object or null")
        rope = d.get("rope_parameters") or d.get("rope_scaling")
        theta = (d.get("rope_parameters") or {}).get("rope_theta", d.get("rope_theta", 10000.0))
        values |= {"rope_theta": theta, "rope_scaling": RopeScaling.from_dict(rope)}
        for key in ("n_group", "topk_group", "n_shared_experts", "n_routed_experts", "first_k_dense_replace"):
            if key in d and d[key] is None:
                values[key] = {"n_group": 1, "topk_group": 1}.get(key, 0)
        values["q_lora_rank"] = d.get("q_lora_rank", fields["q_lora_rank"].default) or None
        if isinstance(d.get(_DIALECT_KEY), Mapping):
            values[_DIALECT_KEY] = _dialect(d[_DIALECT_KEY])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` form; `from_dict` of it gives an equal Config."""
        d = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        d["rope_scaling"] = self.rope_scaling.to_dict() if self.rope_scaling else None
        changed = {k: v for k, v in dataclasses.asdict(self.dialect).items() if v != getattr(Dialect(), k)}
        del d[_DIALECT_KEY]
        return d | ({_DIALECT_KEY: changed} if changed else {}) | {"model_type": "deepseek_v3"}

    def replace(self, **changes: Any) -> Config:
        """A copy with other values, checked again."""
        return dataclasses.replace(self, **changes)

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` has experts (R 4.2: all but the first `first_k_dense_replace`)."""
        return bool(self.n_routed_experts and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0)

    @property
    def yarn(self) -> RopeScaling | None:
        """The YaRN settings in force, or None for plain RoPE (see Dialect.yarn_applies)."""
        s = self.rope_scaling
        short = s is not None and self.max_position_embeddings <= s.original_max_position_embeddings
        return None if short and self.dialect.yarn_applies == "beyond_original" else s

    @property
    def softmax_scale(self) -> float:
        """(Dn + Dr)^-1/2, times m(factor, mscale_all_dim)^2 under YaRN; it multiplies nope and rope alike."""
        scale = 1 / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim)
        return scale * (self.yarn.softmax_factor if self.yarn else 1.0)

    @property
    def latent_norm_eps(self) -> float:
        """eps of the two latent norms (see Dialect.latent_norm_eps)."""
        eps = self.dialect.latent_norm_eps
        return self.rms_norm_eps if eps is None else eps

    def __post_init__(self) -> None:
        _check_types(self)
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
            "moe_layer_freq",
        ]:
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ["n_shared_experts", "n_routed_experts", "first_k_dense_replace", "num_nextn_predict_layers"]:
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        require(
            self.q_lora_rank is None or self.q_lora_rank >= 1,
            f"q_lora_rank is {self.q_lora_rank}; at least 1 or null",
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim is {self.qk_rope_head_dim}; pairs need an even size",
        )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"{name} is {value}; it must be positive")
        require(self.rope_theta > 1, f"rope_theta is {self.rope_theta}; frequencies fall with it only above 1")
        require(math.isfinite(self.routed_scaling_factor), "routed_scaling_factor must be finite")
        if self.n_routed_experts:
            _check_experts(self)


def _check_types(c: Config) -> None:
    choices = {
        "scoring_func": ("sigmoid", "softmax"),
        "topk_method": ("noaux_tc", "group_limited_greedy", "greedy"),
    }
    for f in dataclasses.fields(c):
        v = getattr(c, f.name)
        if f.name in choices:
            require(v in choices[f.name], f"{f.name} is {v!r}; it must be one of {', '.join(choices[f.name])}")
        elif f.type == "int" or (f.type == "int | None" and v is not None):
            require(isinstance(v, int) and not isinstance(v, bool), f"{f.name} is {v!r}; it must be an integer")
        elif f.type == "float":
            require(isinstance(v, int | float) and not isinstance(v, bool), f"{f.name} is {v!r}; it must be a number")
        elif f.type == "bool":
            require(isinstance(v, bool), f"{f.name} is {v!r}; it must be true or false")


def _check_experts(c: Config) -> None:
    e, g, m, k = c.n_routed_experts, c.n_group, c.topk_group, c.num_experts_per_tok
    require(c.moe_intermediate_size >= 1, f"moe_intermediate_size is {c.moe_intermediate_size}; at least 1")
    require(1 <= k <= e, f"num_experts_per_tok={k} is not between 1 and n_routed_experts={e}")
    require(g >= 1 and e % g == 0, f"n_group={g} does not divide n_routed_experts={e}")
    require(1 <= m <= g, f"topk_group={m} exceeds n_group={g}" if m > g else f"topk_group={m}; at least 1")
    if c.topk_method != "greedy" and g > 1:
        require(
            k <= m * (e // g),
            f"num_experts_per_tok={k} exceeds the {m * (e // g)} experts of topk_group={m} groups",
        )
        short = c.topk_method == "noaux_tc" and e // g < 2
        require(not short, f"groups of {e // g} expert: a group's score is the sum of its two best (noaux_tc)")


def _dialect(d: Mapping[str, Any]) -> Dialect:
    names = {f.name for f in dataclasses.fields(Dialect)}
    unknown = sorted(set(d) - names)
    require(not unknown, f"unknown dialect points {', '.join(unknown)}; known: {', '.join(sorted(names))}")
    choices = get_type_hints(Dialect)
    for name, value in d.items():
        allowed = get_args(choices[name])
        if allowed and all(isinstance(a, str) for a in allowed):
            require(value in allowed, f"dialect {name} is {value!r}; it must be one of {', '.join(allowed)}")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            good = (number and math.isfinite(value) and value >= 0) or (value is None and allowed)
            require(good, f"dialect {name} is {value!r}; it must be a number, not negative")
    return Dialect(**d)
