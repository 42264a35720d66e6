"""A real config made small: nothing that a port can get wrong is lost on the way."""

import argparse
import itertools
import json

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.cli.common import model_config
from refimpl.diff import Case
from refimpl.diff.judge import judge
from refimpl.layers import PRESETS, Config
from refimpl.record import new_case, trace_case
from refimpl.record.shrink import shrink

YARN = {"type": "yarn", "factor": 32, "original_max_position_embeddings": 4096, "beta_fast": 1, "beta_slow": 1}
REAL = {
    "deepseek-v3": PRESETS["deepseek-v3"].to_dict(),
    "deepseek-v2": PRESETS["deepseek-v2"].to_dict(),
    "deepseek-v2-lite": PRESETS["deepseek-v2-lite"].to_dict(),
    "deepseek-v3.1": PRESETS["deepseek-v3"].to_dict()
    | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}},
    "two MTP modules": PRESETS["deepseek-v3"].to_dict() | {"num_nextn_predict_layers": 2},
    "wide values": PRESETS["deepseek-v3"].to_dict() | {"v_head_dim": 192},
    "values wider than queries": PRESETS["deepseek-v3"].to_dict() | {"v_head_dim": 256, "q_lora_rank": 384},
    "wide rotation": PRESETS["deepseek-v3"].to_dict() | {"qk_rope_head_dim": 192, "moe_intermediate_size": 8192},
    "like kimi-k2": {
        **{
            "hidden_size": 7168,
            "num_attention_heads": 64,
            "n_routed_experts": 384,
            "num_experts_per_tok": 8,
            "n_group": 1,
        },
        **{"topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000.0},
        **{
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "vocab_size": 163840,
            "num_nextn_predict_layers": 0,
        },
    },
    "like moonlight": {
        **{
            "hidden_size": 2048,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 64,
        },
        **{"n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        **{"rope_scaling": None, "rms_norm_eps": 1e-5, "num_nextn_predict_layers": 0, "max_position_embeddings": 8192},
    },
}
KEPT = [
    "n_group",
    "topk_group",
    "n_shared_experts",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
    "rope_theta",
    "rope_scaling",
    "rope_interleave",
    "rms_norm_eps",
    "attention_bias",
    "tie_word_embeddings",
    "max_position_embeddings",
    "moe_layer_freq",
    "dialect",
    "num_nextn_predict_layers",
]
HEADS = ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
LATENTS = ["q_lora_rank", "kv_lora_rank"]
WIDTHS = ["hidden_size", "intermediate_size", "moe_intermediate_size"]


@pytest.mark.parametrize("name", REAL)
def test_every_mechanism_is_kept(name):
    """Catches a small model that cannot show what the real one does: another choice, another rank, no dense layer."""
    real = Config.from_dict(REAL[name])
    small = shrink(real)
    assert {k: getattr(small, k) for k in KEPT} == {k: getattr(real, k) for k in KEPT}
    assert (small.q_lora_rank is None) == (real.q_lora_rank is None)
    kinds = {real.is_moe(i) for i in range(real.num_hidden_layers)}
    assert {small.is_moe(i) for i in range(small.num_hidden_layers)} == kinds
    assert 1 < small.num_experts_per_tok < small.n_routed_experts
    assert small.n_routed_experts % small.n_group == 0 and small.num_hidden_layers <= 4
    sizes = [small.hidden_size, small.kv_lora_rank, small.qk_nope_head_dim, small.qk_rope_head_dim, small.v_head_dim]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("name", REAL)
def test_what_is_larger_stays_larger(name):
    """Catches values wider than keys made narrower than keys: a kernel that pads or slices the one to the other is then right."""
    real, small = Config.from_dict(REAL[name]), shrink(Config.from_dict(REAL[name]))
    for names in (HEADS, LATENTS, WIDTHS):
        for a, b in itertools.permutations([n for n in names if getattr(real, n) is not None], 2):
            assert getattr(real, a) <= getattr(real, b) or getattr(small, a) > getattr(small, b), (a, b)
    assert (sum(getattr(real, n) for n in HEADS[:2]) < real.v_head_dim) == (
        sum(getattr(small, n) for n in HEADS[:2]) < small.v_head_dim
    )


@pytest.mark.parametrize("scale_fmt", [pytest.param(None, marks=pytest.mark.slow), "ue8m0"])
def test_weights_are_quantised_as_the_config_says(scale_fmt, tmp_path, capsys):
    """Catches V3 and V3.1, which differ in the scales of their weights alone, made the same small model; codes that nothing
    announces; a block of the size that all have by default.
    """
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}
    said |= {"scale_fmt": scale_fmt} if scale_fmt else {}
    (tmp_path / "config.json").write_text(json.dumps(REAL["deepseek-v3"] | {"quantization_config": said}))
    assert main(["case", str(tmp_path / "a"), "--config", str(tmp_path / "config.json"), "--shrink"]) == 0
    case = Case.read(tmp_path / "a")
    assert case.raw_config["quantization_config"] == said
    scales = {n: s for n in case.checkpoint for _, s in [case.checkpoint.raw(n)] if s is not None}
    assert {"mlp.experts.0.up_proj", "self_attn.q_a_proj"} <= {
        n.split(".", 3)[3].partition(".weight")[0] for n in scales
    }
    assert all((np.exp2(np.round(np.log2(a))) == a).all() for a in scales.values()) == bool(scale_fmt)
    assert scales["model.layers.0.self_attn.q_a_proj.weight"].shape == (2, 6)  # 24 x 48
    assert judge(case, trace_case(case)).verdict == "CONFORMS"
    assert "weights are FP8 codes" in capsys.readouterr().err


def test_another_quantisation_is_refused(tmp_path, capsys):
    """Catches int4 weights made bfloat16 in silence."""
    (tmp_path / "config.json").write_text(
        json.dumps(REAL["deepseek-v3"] | {"quantization_config": {"quant_method": "gptq"}})
    )
    assert main(["case", str(tmp_path / "a"), "--config", str(tmp_path / "config.json"), "--shrink"]) == 3
    assert "quantization_config is 'gptq'" in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", REAL)
def test_a_case_of_it_is_drawn_and_judged(name, tmp_path):
    """Catches a small model that cannot be written, run or judged."""
    case = Case.read(new_case(tmp_path / "case", shrink(Config.from_dict(REAL[name])), batch=1, length=6, margin=0.0))
    assert judge(case, trace_case(case)).verdict == "CONFORMS"


def test_the_command_shrinks_and_says_what_it_changed(tmp_path, capsys):
    """Catches a real config refused as too large without a way out, and a size changed in silence."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(REAL["deepseek-v3"]))
    assert main(["case", str(tmp_path / "a"), "--config", str(config)]) == 3
    assert "--shrink makes it small" in capsys.readouterr().err
    assert main(["case", str(tmp_path / "a"), "--config", str(config), "--shrink"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "a") and "hidden_size 7168 -> 48" in err and "n_group" not in err
    assert np.shape(Case.read(tmp_path / "a").tokens) == (2, 24)
    assert main(["case", str(tmp_path / "b"), "--config", str(config), "--shrink", "--mtp"]) == 0
    assert any("eh_proj" in name for name in Case.read(tmp_path / "b").checkpoint)


@pytest.mark.slow
def test_info_takes_a_bare_config(tmp_path, capsys):
    """Catches a config.json that is read as a checkpoint, and other numbers than the preset's."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(REAL["deepseek-v3"]))
    assert main(["info", str(config)]) == 0
    shown = capsys.readouterr().out
    assert main(["info", "deepseek-v3"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["info", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 671_026_419_200
    config.write_text(json.dumps(REAL["deepseek-v3"] | {"topk_group": 99}))
    assert main(["info", str(config)]) == 3 and "while reading" in capsys.readouterr().err


LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 128256,
}
OTHERS = {
    "nothing": ({}, "no model_type, and none of kv_lora_rank"),
    "a llama": (
        LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        "architectures is LlamaForCausalLM",
    ),
    "a llama's class": (LLAMA | {"architectures": ["LlamaForCausalLM"]}, "architectures is LlamaForCausalLM"),
    "a llama's type": (LLAMA | {"model_type": "llama"}, "model_type is 'llama'"),
    "a llama that tells nothing": (LLAMA, "no model_type, and none of kv_lora_rank"),
    "V3.2": ({"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32'"),
    "V3.2's class": ({"kv_lora_rank": 512, "architectures": ["DeepseekV32ForCausalLM"]}, "DeepseekV32ForCausalLM"),
    "another class under V3's type": (
        {"model_type": "deepseek_v3", "architectures": ["LlamaForCausalLM"]},
        "LlamaForCausalLM",
    ),
    "no list": ({"architectures": "DeepseekV3ForCausalLM"}, "expected a list of names"),
    "an odd type": ({"model_type": ["deepseek_v3"]}, "model_type is ['deepseek_v3']"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("command", ["info", "case"])
def test_another_family_is_refused(name, command, tmp_path, capsys):
    """Catches a config of another model, or of none, read as DeepSeek-V3 because V3's sizes are the defaults of what it lacks."""
    path, (config, says) = tmp_path / "config.json", OTHERS[name]
    path.write_text(json.dumps(config))
    ask = ["info", str(path)] if command == "info" else ["case", str(tmp_path / "a"), "--config", str(path), "--shrink"]
    assert main(ask) == 3
    err = capsys.readouterr().err
    assert says in err and str(path) in err and not (tmp_path / "a").exists()
    assert "expected a list" in err or "deepseek_v2, deepseek_v3, kimi_k2" in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deepseek-v3", {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}),
        ("deepseek-v3.1", {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}),
        ("deepseek-v2-lite", {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}),
        ("like kimi-k2", {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}),
        ("like moonlight", {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}),
        ("like moonlight", {"architectures": ["DeepseekV3Model"]}),
        ("like moonlight", {"model_type": "my_v3", "architectures": ["DeepseekV3ForCausalLM"]}),
        ("like moonlight", {"model_type": "kimi_k2", "architectures": None}),
        ("like moonlight", {}),
    ],
)
def test_released_configs_are_taken_as_they_declare_themselves(name, said, tmp_path):
    """Catches a family of which the specification speaks refused by its type or its class."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in REAL[name].items() if k != "model_type"} | said))
    found = model_config(argparse.Namespace(config=path))
    assert found.hidden_size == Config.from_dict(REAL[name]).hidden_size and shrink(found).hidden_size == 48


def test_a_trace_of_another_family_is_bad_input():
    """Catches a llama's config in a trace or in Python read as V3's."""
    with pytest.raises(SpecError, match=r"model_type is 'llama'; expected a config\.json of the families"):
        Config.from_dict(LLAMA | {"model_type": "llama"})
