"""How much of a run is recorded: five sets of taps, from all to the logits alone."""

from __future__ import annotations

from collections.abc import Iterable

from refimpl.layers.config import Config
from refimpl.record.hf_probes import expected_taps

_ENGINE = frozenset(
    [
        "attn_norm",
        "ffn_norm",
        "final_norm",
        "mla.q",
        "mla.c_kv",
        "mla.q_rope",
        "mla.k_rope",
        "mla.ctx",
        "attn_out",
        "resid_mid",
        "resid",
        "router.logits",
        "router.weights",
        "router.ids",
        "moe.routed",
        "moe.shared",
        "ffn_out",
        "logits",
    ]
)
SETS = {
    "all": "everything that `refimpl record hf` sees",
    "hooks": "what hooks on transformers' modules see",
    "engine": "what an engine with fused kernels shows",
    "stream": "embedding, residual stream after each layer, logits",
    "logits": "the logits alone",
}


def part(name: str, taps: Iterable[str], config: Config) -> list[str]:
    """Those of the taps that are in the set."""
    if name == "all":
        return list(taps)
    if name == "hooks":
        hooks = {t for t, p in expected_taps(config).items() if p is not None and p.function is None}
        return [t for t in taps if t in hooks]
    few = {"engine": _ENGINE, "stream": frozenset({"embed", "resid", "logits"}), "logits": frozenset({"logits"})}[name]
    return [t for t in taps if t.rpartition("/")[2] in few]
