"""What a checkpoint or a config is: sizes, parameter counts, dtypes, and whether the names and
shapes are right.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from refimpl.autograd.errors import where
from refimpl.layers.config import Config
from refimpl.model import expected_tensors

from .checks import Report, check, count_dtypes, scan_nonfinite
from .disagreements import Disagreement, disagreements
from .mapping import Checkpoint
from .names import expert_of, is_mtp_copy, layer_of

Progress = Callable[[int, int, str], None]
"""Called with (tensors done, tensors in all, name) before each tensor is read."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, without scales and MTP's copies of embedding and head."""

    total: int  # without MTP
    active: int  # per token: everything but the experts that are not chosen
    active_without_embedding: int  # a token reads one row of the embedding
    embedding: int
    head: int
    attention: int  # all layers, with the two latent norms
    attention_per_layer: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    mtp: int
    mtp_active: int  # without embedding and head, which MTP shares with the model


@dataclass(frozen=True)
class Info:
    """Everything `refimpl info` prints about a checkpoint."""

    path: str
    naming: str
    files: tuple[str, ...]
    config: Mapping[str, Any] | None
    counts: Counts | None
    dtypes: Mapping[str, tuple[int, int]]  # dtype -> (tensors, bytes)
    tensors: int
    mtp: bool
    report: Report | None
    disagreements: tuple[Disagreement, ...] = ()

    @property
    def ok(self) -> bool:
        """Names and shapes are the model's. False where there is no config.json to tell."""
        return self.report is not None and self.report.ok


def describe(path: str | os.PathLike[str], *, scan: bool = False, progress: Progress | None = None) -> Info:
    """Look at a checkpoint's headers and config; no tensor is read unless `scan` looks for NaN and infinity. Files that an index
    names and that are not there are told of. Raises SpecError if it cannot be opened.
    """
    ckpt = Checkpoint.open(path, partial=True)
    dtypes = count_dtypes(ckpt)
    config = None
    if ckpt.config is not None:
        with where(f"while reading the config.json of {path}"):
            config = Config.described(ckpt.config)
    layers = config.num_hidden_layers if config else 0
    mtp = any((layer_of(name) or 0) >= layers for name in (*ckpt, *ckpt.absent)) if config else False
    report = check(expected_tensors(config, mtp=mtp), ckpt) if config else None
    if scan and report is not None:
        report = replace(report, nan=scan_nonfinite(ckpt, progress))
    return Info(
        path=os.fspath(path),
        naming=ckpt.naming,
        files=tuple(str(f) for f in ckpt.files),
        config=config.to_dict() if config else None,
        counts=count_parameters(config) if config else None,
        dtypes=dtypes,
        tensors=sum(tensors for tensors, _ in dtypes.values()),
        mtp=mtp,
        report=report,
        disagreements=tuple(disagreements(ckpt, config)) if config else (),
    )


def count_parameters(config: Config) -> Counts:
    """Count the parameters of a model from the shapes it expects."""
    layers = config.num_hidden_layers
    groups: dict[str, int] = {}
    for name, shape in expected_tensors(config, mtp=True).items():
        if not is_mtp_copy(name, layers):
            group = _group(name, layers)
            groups[group] = groups.get(group, 0) + math.prod(shape)

    def get(*names: str) -> int:
        return sum(groups.get(name, 0) for name in names)

    share = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0
    total = sum(n for group, n in groups.items() if not group.startswith("mtp"))
    active = total - get("routed") + round(get("routed") * share)
    return Counts(
        total=total,
        active=active,
        active_without_embedding=active - get("embedding"),
        embedding=get("embedding"),
        head=get("head"),
        attention=get("attention"),
        attention_per_layer=get("attention") // layers,
        dense_ffn=get("dense"),
        routed_experts=get("routed"),
        shared_experts=get("shared"),
        router=get("router"),
        norms=get("norms"),
        mtp=get("mtp", "mtp routed"),
        mtp_active=get("mtp") + round(get("mtp routed") * share),
    )


def _group(name: str, layers: int) -> str:
    layer = layer_of(name)
    if layer is not None and layer >= layers:
        return "mtp routed" if expert_of(name) is not None else "mtp"
    marks = {
        "model.embed_tokens.": "embedding",
        "lm_head.": "head",
        ".self_attn.": "attention",
        ".mlp.experts.": "routed",
        ".mlp.shared_experts.": "shared",
        ".mlp.gate.": "router",
        ".mlp.": "dense",
        "norm.": "norms",
    }
    return next(group for mark, group in marks.items() if mark in name)


_SHOWN = (
    *("num_hidden_layers", "first_k_dense_replace", "hidden_size", "intermediate_size"),
    *("moe_intermediate_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts"),
    *("num_experts_per_tok", "n_group", "topk_group", "scoring_func", "topk_method"),
    *("norm_topk_prob", "routed_scaling_factor", "vocab_size", "max_position_embeddings"),
    "num_nextn_predict_layers",
)


def render(info: Info) -> str:
    """Plain text, one fact a line."""
    lines = [f"{info.path}: {len(info.files)} file{'s' * (len(info.files) != 1)}, {info.naming} names"]
    if info.config is not None:
        lines += ["config"] + [f"  {key:<26}{info.config[key]}" for key in _SHOWN]
    if info.counts is not None:
        lines += render_counts(info.counts)
    lines += [f"tensors  {info.tensors}, {sum(size for _, size in info.dtypes.values()):,} bytes"]
    lines += [f"  {d:<10}{tensors:>8} tensors{size:>20,} bytes" for d, (tensors, size) in info.dtypes.items()]
    if info.report is None:
        return "\n".join([*lines, "names and shapes  not checked: no config.json beside the weights"])
    copies = f", {len(info.report.mtp_copies)} copies of embedding and head" if info.mtp else ""
    lines += [f"MTP      {'present' + copies if info.mtp else 'absent'}"]
    lines += ["names and shapes  " + ("as expected" if info.ok else "NOT as expected")]
    lines += [f"  {line}" for line in info.report.lines()]
    return "\n".join([*lines, *(_warning(d) for d in info.disagreements)])


def _warning(d: Disagreement) -> str:
    return "\n".join(
        [f"WARNING  {d.what}", *textwrap.wrap(d.stumbles, 110, initial_indent=" " * 9, subsequent_indent=" " * 9)]
    )


def render_counts(c: Counts) -> list[str]:
    """The parameter counts as lines of text."""
    rows = {
        "total, without MTP": c.total,
        "active per token": c.active,
        "  without the embedding": c.active_without_embedding,
        "embedding": c.embedding,
        "attention": c.attention,
        "  per layer": c.attention_per_layer,
        "dense FFN": c.dense_ffn,
        "MoE routed experts": c.routed_experts,
        "MoE shared experts": c.shared_experts,
        "MoE router": c.router,
        "norms": c.norms,
        "head": c.head,
        "MTP": c.mtp,
        "MTP active per token": c.mtp_active,
    }
    return ["parameters"] + [f"  {what:<26}{n:>18,}" for what, n in rows.items()]


def to_json(info: Info) -> str:
    """The same as JSON, with `ok` added."""
    return json.dumps(asdict(info) | {"ok": info.ok}, indent=2)
