"""The oracle against transformers itself on random models (needs torch and transformers; slow).

The recordings in golden/ fix a handful of settings; this draws them. `pip install .[interop]`, then
`pytest -m slow spec_tests/r2_1_attention_and_experts/test_oracle_transformers.py`.
"""

import copy

import numpy as np
import pytest
from hypothesis import assume, given, settings

from refimpl.spec_tests.oracles.compare import routing_margin
from refimpl.spec_tests.oracles.model import forward
from refimpl.spec_tests.strategies.models import V3

from .test_oracle_random import models

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def transformers_model(config, weights):
    """A DeepseekV3ForCausalLM, or V2 for softmax routing, holding these weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family = "DeepseekV3" if config["scoring_func"] == "sigmoid" else "DeepseekV2"
    keys = {k: v for k, v in copy.deepcopy(config).items() if k != "model_type"}
    keys |= {"num_key_value_heads": config["num_attention_heads"], "attn_implementation": "eager"}
    hf_config = getattr(transformers, family + "Config")(**keys)
    hf_config._experts_implementation = "eager"
    model = getattr(transformers, family + "ForCausalLM")(hf_config).eval()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(torch.tensor(fused(name, parameter, weights)))
    return model


def fused(name, parameter, weights):
    """The parameter transformers calls `name`: experts stacked, gate above up, the head tied."""
    at, _, kind = name.rpartition("mlp.experts.")
    if at and kind in ("gate_up_proj", "down_proj"):
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        each = [[weights[f"{at}mlp.experts.{e}.{p}.weight"] for p in parts] for e in range(len(parameter))]
        return np.stack([np.concatenate(matrices) for matrices in each])
    if name == "lm_head.weight" and name not in weights:
        return weights["model.embed_tokens.weight"]
    return weights[name] if name in weights else np.zeros(parameter.shape)  # no shared expert


@settings(max_examples=60, deadline=None)
@given(models(dtype=np.float32))
def test_logits_are_those_of_transformers(model):
    """Catches an oracle that agrees with the recordings by luck."""
    config, weights, tokens = model
    assume(config["n_group"] is not None and config["hidden_size"] % config["num_attention_heads"] == 0)
    if (config["scoring_func"], config["topk_method"]) != V3:  # V2's code: pairs only, even sizes only
        assume(config["rope_interleave"] and config["qk_nope_head_dim"] % 2 == config["kv_lora_rank"] % 2 == 0)
    torch = pytest.importorskip("torch")
    ours = forward(config, weights, tokens)
    assume(routing_margin(config, ours) > 1e-3)
    theirs = transformers_model(config, weights)(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    error = np.linalg.norm(ours["fwd/logits"] - theirs) / np.linalg.norm(theirs)
    assert error < 1e-4  # float32 through three layers; 7e-6 is the most that was seen
