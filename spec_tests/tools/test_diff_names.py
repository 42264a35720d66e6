"""What the names that people use for taps mean."""

from __future__ import annotations

import pytest

from refimpl.diff.names import by_name, unit_of

LAYER = "attn_norm mla.q_a mla.q mla.kv_a attn_out resid_mid ffn_norm router.logits router.ids moe.shared ffn_out resid"
OURS = [
    "fwd/embed",
    "fwd/mask",
    "fwd/final_norm",
    "fwd/logits",
    *[f"fwd/L{i}/{t}" for i in range(12) for t in LAYER.split()],
]
MEAN = {
    "model.layers.3.self_attn.q_b_proj": "fwd/L3/mla.q (as transformers calls it)",
    "layers.11.self_attn.q_b_proj": "fwd/L11/mla.q (as transformers calls it)",
    "model.layers.12.self_attn.q_b_proj": "",  # there is no such layer
    "model.layers.4": "fwd/L4/resid (as transformers calls it)",
    "model.embed_tokens": "fwd/embed (as transformers calls it)",
    "embed_tokens.weight": "fwd/embed (as transformers calls it)",
    "lm_head": "fwd/logits (as transformers calls it)",
    "norm": "fwd/final_norm (as transformers calls it)",
    "transformer.h.2.mlp.gate": "fwd/L2/router.logits (as transformers calls it)",
    "ffn_moe_topk-1": "fwd/L1/router.ids (as llama.cpp calls it)",
    "l_out-3": "fwd/L3/resid (as llama.cpp calls it)",
    "decoder.layers.5.self_attention.linear_proj": "fwd/L5/attn_out (as Megatron calls it)",
    "layers.0.attn.wo": "fwd/L0/attn_out (as DeepSeek inference calls it)",
    "L1/mla.q": "fwd/L1/mla.q",
    "fwd/L1/mla.qq": "fwd/L1/mla.q",
    "dec8/L1/mla.q": "fwd/L1/mla.q",
    "attn_out-7": "fwd/L7/attn_out",  # and not another layer's, whose name is as near
    "fwd/final_nrom": "fwd/final_norm",
    "input_layernorm": "",  # of no layer
    "sigmoid": "",
    "xyz": "",
    "": "",
}


@pytest.mark.parametrize("name", MEAN)
def test_a_name_means_its_tap(name: str) -> None:
    """Catches another tap, another layer, another framework, a tap that this run has not, a guess out of nothing."""
    assert by_name(name, OURS) == MEAN[name]


UNITS = {
    "model.layers.3.mlp": "fwd/L3",
    "layers.2": "fwd/L2",
    "blk.7.attn": "fwd/L7",
    "attn-7": "fwd/L7",
    "h.14": "fwd/L14",
    "L5": "fwd/L5",
    "fwd/L3/mla.q": "fwd/L3",
    "dec8/L3/mla.q": "dec8/L3",
    "dec8/model.layers.12.mlp": "dec8/L12",
    "bwd/L2/x": "fwd/L2",
    "fwd/embed": "",
    "x5": "",
    "v2.proj": "",
    "dec8": "",
    "": "",
}


@pytest.mark.parametrize("name", UNITS)
def test_a_name_tells_its_layer(name: str) -> None:
    """Catches a version, a size or a phase taken for a layer, and a part of a layer's number."""
    assert unit_of(name) == UNITS[name]
