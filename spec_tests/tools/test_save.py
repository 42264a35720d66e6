"""Saving, and DeepSeek's converted format: names, cuts, dtypes, and nothing half-written."""

import json
import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Checkpoint, check, save
from refimpl.checkpoint.header import DTYPES
from refimpl.checkpoint.names import config_from_deepseek, config_to_deepseek, from_deepseek, to_deepseek
from refimpl.checkpoint.saving import hf_files
from refimpl.checkpoint.stored import Plan
from refimpl.layers.config import Config
from refimpl.layers.presets import DEEPSEEK_V2, DEEPSEEK_V2_LITE, DEEPSEEK_V3, TINY
from refimpl.model import expected_tensors
from refimpl.spec_tests.oracles.handmade import f32, make_file, parse_file

SMALL = TINY.replace(  # every cut axis holds whole 128-blocks for two ranks; 160 = 1.25 blocks for kv_a
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    q_lora_rank=40,
    kv_lora_rank=96,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
)
L0, L1 = "model.layers.0.", "model.layers.1."


@pytest.fixture(scope="module")
def weights():
    """bfloat16 values in float32, so that only FP8 loses anything."""
    rng = np.random.default_rng(0)
    shapes = expected_tensors(SMALL, mtp=True)
    return {n: rng.normal(size=s).astype(ml_dtypes.bfloat16).astype(np.float32) for n, s in shapes.items()}


def main_only(weights):
    return {n: w for n, w in weights.items() if not n.startswith("model.layers.2.")}


# ----------------------------------------------------------------------------------- DeepSeek names

PAIRS = """
model.embed_tokens.weight                             embed.weight
model.layers.0.input_layernorm.weight                 layers.0.attn_norm.weight
model.layers.0.post_attention_layernorm.weight        layers.0.ffn_norm.weight
model.layers.0.self_attn.q_proj.weight                layers.0.attn.wq.weight
model.layers.0.self_attn.q_a_proj.weight              layers.0.attn.wq_a.weight
model.layers.0.self_attn.q_a_proj.weight_scale_inv    layers.0.attn.wq_a.scale
model.layers.0.self_attn.q_a_layernorm.weight         layers.0.attn.q_norm.weight
model.layers.0.self_attn.q_b_proj.weight              layers.0.attn.wq_b.weight
model.layers.0.self_attn.kv_a_proj_with_mqa.weight    layers.0.attn.wkv_a.weight
model.layers.0.self_attn.kv_a_layernorm.weight        layers.0.attn.kv_norm.weight
model.layers.0.self_attn.kv_b_proj.weight             layers.0.attn.wkv_b.weight
model.layers.0.self_attn.o_proj.weight                layers.0.attn.wo.weight
model.layers.0.mlp.gate_proj.weight                   layers.0.ffn.w1.weight
model.layers.0.mlp.down_proj.weight                   layers.0.ffn.w2.weight
model.layers.0.mlp.up_proj.weight                     layers.0.ffn.w3.weight
model.layers.3.mlp.gate.weight                        layers.3.ffn.gate.weight
model.layers.3.mlp.gate.e_score_correction_bias       layers.3.ffn.gate.bias
model.layers.3.mlp.experts.25.gate_proj.weight        layers.3.ffn.experts.25.w1.weight
model.layers.3.mlp.experts.25.down_proj.weight_scale_inv  layers.3.ffn.experts.25.w2.scale
model.layers.3.mlp.shared_experts.up_proj.weight      layers.3.ffn.shared_experts.w3.weight
model.norm.weight                                     norm.weight
lm_head.weight                                        head.weight
model.layers.0.self_attn.o_proj.bias                  layers.0.attn.wo.bias
"""


@pytest.mark.parametrize("pair", PAIRS.split("\n")[1:-1])
def test_deepseeks_names_are_those_of_convert_py(pair):
    """Catches the trap: w2 is down and w3 is up, not the other way round; gate.bias is the
    selection bias, but wo.bias is a bias. Worked out by hand from convert.py's table."""
    hf, deepseek = pair.split()
    assert to_deepseek(hf) == deepseek
    assert from_deepseek(deepseek) == hf


def test_names_without_a_counterpart_are_refused_or_kept():
    """Catches: an MTP tensor under a made-up name; an unknown one lost instead of reported."""
    with pytest.raises(SpecError, match="no name in DeepSeek's converted format"):
        to_deepseek("model.layers.61.eh_proj.weight")
    assert from_deepseek("layers.0.attn.indexer.wk.weight") == "layers.0.attn.indexer.wk.weight"


# --------------------------------------------------------------------------- DeepSeek files, by hand


def hand_cut(rank):
    """Rank's part of a model in which every number is known: two ranks, four experts of one layer."""

    def t(*values, shape=None):
        return ("F32", shape or (len(values),), f32(*values))

    column = [[1, 2, 3, 4], [5, 6, 7, 8]][rank]  # rows 0-1, rows 2-3 of a (4, 2) matrix
    row = [[1, 2, 5, 6], [3, 4, 7, 8]][rank]  # columns 0-1, columns 2-3 of a (2, 4) matrix
    tensors = {
        "embed.weight": t(*column, shape=(2, 2)),
        "head.weight": t(*(10 * v for v in column), shape=(2, 2)),
        "norm.weight": t(1, 2),
        "layers.0.attn.wq.weight": t(*column, shape=(2, 2)),
        "layers.0.attn.wo.weight": t(*row, shape=(2, 2)),
        "layers.0.attn.wkv_a.weight": t(9, 8, shape=(1, 2)),
        "layers.0.ffn.shared_experts.w1.weight": t(*column, shape=(2, 2)),
        "layers.0.ffn.shared_experts.w2.weight": t(*row, shape=(2, 2)),
        "layers.0.ffn.shared_experts.w3.weight": t(*(-v for v in column), shape=(2, 2)),
        "layers.0.ffn.gate.weight": t(*range(8), shape=(4, 2)),
        "layers.0.ffn.gate.bias": t(1, 2, 3, 4),
    }
    for e in (2 * rank, 2 * rank + 1):
        for w, value in {"w1": 100, "w2": 200, "w3": 300}.items():
            shape = (2, 3) if w == "w2" else (3, 2)
            tensors[f"layers.0.ffn.experts.{e}.{w}.weight"] = t(*[value + e] * 6, shape=shape)
    return tensors


def write_parts(folder, parts):
    for rank, tensors in enumerate(parts):
        make_file(folder / f"model{rank}-mp{len(parts)}.safetensors", tensors)


def test_model_parallel_parts_are_joined(tmp_path):
    """Catches: parts joined along the wrong axis, replicas stacked, w2 and w3 exchanged, experts
    numbered per rank."""
    write_parts(tmp_path, [hand_cut(0), hand_cut(1)])
    ckpt = Checkpoint.open(tmp_path)
    assert ckpt.naming == "deepseek"
    rows, columns = [[1, 2], [3, 4], [5, 6], [7, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]]
    shared = L0 + "mlp.shared_experts."
    expected = {
        "model.embed_tokens.weight": rows,
        "lm_head.weight": [[10 * v for v in row] for row in rows],
        "model.norm.weight": [1, 2],
        L0 + "self_attn.q_proj.weight": rows,
        L0 + "self_attn.o_proj.weight": columns,
        L0 + "self_attn.kv_a_proj_with_mqa.weight": [[9, 8]],
        shared + "gate_proj.weight": rows,
        shared + "down_proj.weight": columns,
        shared + "up_proj.weight": [[-v for v in row] for row in rows],
        L0 + "mlp.gate.weight": [[0, 1], [2, 3], [4, 5], [6, 7]],
        L0 + "mlp.gate.e_score_correction_bias": [1, 2, 3, 4],
    }
    for e in range(4):
        prefix = L0 + f"mlp.experts.{e}."
        expected[prefix + "gate_proj.weight"] = [[100 + e] * 2] * 3
        expected[prefix + "down_proj.weight"] = [[200 + e] * 3] * 2
        expected[prefix + "up_proj.weight"] = [[300 + e] * 2] * 3
    assert {name: ckpt[name].tolist() for name in ckpt} == expected
    assert all(ckpt.shape(name) == np.shape(value) for name, value in expected.items())


def drop_part(parts):
    return [parts[0], None]


def drop_from_one(key):
    def damage(parts):
        del parts[1][key]
        return parts

    return damage


def put(rank, key, tensor):
    def damage(parts):
        parts[rank][key] = tensor
        return parts

    return damage


EXPERT = "layers.0.ffn.experts.{}.w1.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda parts: [None, parts[1]], "1 of 2 parts are missing: model0-mp2"),
        (drop_from_one("norm.weight"), "'norm.weight' is only in model0-mp2"),
        (drop_from_one("embed.weight"), "expected in all 2 parts"),
        (put(1, EXPERT.format(0), ("F32", (3, 2), f32(*range(6)))), "in parts [0, 1]; expected expert 0"),
        (lambda parts: parts[::-1], "expected expert 2 in part 1"),
        (put(1, "embed.weight", ("F32", (1, 2), f32(1, 2))), "'embed.weight' differs between the parts"),
        (put(1, "norm.weight", ("F32", (1,), f32(1))), "'norm.weight' differs between the parts"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, damage, says):
    """Catches: a model assembled from the parts of two, or from too few."""
    for rank, tensors in enumerate(damage([hand_cut(0), hand_cut(1)])):
        if tensors is not None:
            make_file(tmp_path / f"model{rank}-mp2.safetensors", tensors)
    with pytest.raises(SpecError, match=re.escape(says)):
        Checkpoint.open(tmp_path)


def test_replicas_that_disagree_are_refused_when_read(tmp_path):
    """Catches: parts of two training steps mixed; only the data can tell."""
    parts = [hand_cut(0), hand_cut(1)]
    parts[1]["norm.weight"] = ("F32", (2,), f32(1, 2.5))
    write_parts(tmp_path, parts)
    ckpt = Checkpoint.open(tmp_path)
    assert ckpt["lm_head.weight"].shape == (4, 2)
    with pytest.raises(SpecError, match=r"'norm\.weight' differs between model0-mp2") as error:
        ckpt["model.norm.weight"]
    assert "while loading model.norm.weight" in str(error.value)


def test_one_part_alone_and_mixed_worlds_are_refused(tmp_path):
    """Catches: half a model taken for a whole one."""
    write_parts(tmp_path, [hand_cut(0), hand_cut(1)])
    with pytest.raises(SpecError, match="is one of 2 parts; name their folder"):
        Checkpoint.open(tmp_path / "model0-mp2.safetensors")
    make_file(tmp_path / "model0-mp1.safetensors", hand_cut(0))
    with pytest.raises(SpecError, match="mixes parts of mp 1 and mp 2"):
        Checkpoint.open(tmp_path)


# ----------------------------------------------------------------------------------------- configs

CONFIG_671B = {  # what the table of inference/configs/config_671B.json says
    **{"vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048},
    **{"n_layers": 61, "n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4},
    **{"route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8"},
}


def test_deepseeks_config_becomes_hugging_faces():
    """Catches: a key mapped to the wrong one, a default of ModelArgs forgotten (softmax, mscale)."""
    found = config_from_deepseek(CONFIG_671B)
    expected = DEEPSEEK_V3.replace(num_nextn_predict_layers=0, max_position_embeddings=16384)
    assert Config.from_dict(found) == expected
    assert found["quantization_config"]["weight_block_size"] == [128, 128]
    lite = {"n_shared_experts": 2, "mscale": 0.707}  # the rest are ModelArgs' defaults
    expected = DEEPSEEK_V2_LITE.replace(max_position_embeddings=16384)
    assert Config.from_dict(config_from_deepseek(lite)) == expected


def test_yarn_is_on_only_beyond_the_original_length():
    """Catches: YaRN in a config that inference/model.py runs without."""
    assert config_from_deepseek({"max_seq_len": 4096})["rope_scaling"] is None
    assert config_from_deepseek({"max_seq_len": 4097})["rope_scaling"]["factor"] == 40


@pytest.mark.parametrize("config", [DEEPSEEK_V3, DEEPSEEK_V2, DEEPSEEK_V2_LITE, TINY, SMALL])
def test_configs_survive_the_way_there_and_back(config):
    """Catches: a setting lost on the way through DeepSeek's keys."""
    bias = config.topk_method == "noaux_tc"
    back = config_from_deepseek(config_to_deepseek(config.to_dict()), has_bias=bias)
    assert Config.from_dict(back) == config.replace(num_nextn_predict_layers=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"rope_interleave": False}, "rope_interleave=False"),
    ],
)
def test_settings_that_deepseeks_format_cannot_hold_are_refused(change, says):
    """Catches: a converted model that runs, but is another one."""
    with pytest.raises(SpecError, match=f"cannot hold {re.escape(says)}"):
        config_to_deepseek(TINY.replace(**change).to_dict())


def test_other_blocks_and_dialects_are_refused_too():
    """Catches F07: a block size that the converted format has no place for; our own options lost."""
    quantization = {"quantization_config": {"weight_block_size": [64, 64]}}
    with pytest.raises(SpecError, match="for 128 x 128 blocks"):
        config_to_deepseek(TINY.to_dict() | quantization)
    with pytest.raises(SpecError, match="cannot hold dialect="):
        config_to_deepseek(TINY.to_dict() | {"dialect": {"mtp_hidden": "pre_norm"}})


@pytest.mark.parametrize("config", [{"dim": "7168"}, {"dim": 64, "n_expert_groups": None}, {"dim": 64, "n_moe": 3}])
def test_nonsense_in_deepseeks_config_is_refused(config):
    """Catches: a TypeError, or a misspelt key silently replaced by a default."""
    with pytest.raises(SpecError, match=r"expected a number|does not have: n_moe"):
        config_from_deepseek(config)


# ------------------------------------------------------------------------------------------ saving


def open_parts(folder):
    """{file name: {tensor: (dtype, shape, bytes)}} by the hand-made parser."""
    return {p.name: parse_file(p)[0] for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout",
    [{}, {"max_shard_bytes": 1 << 20}, {"layout": "deepseek"}, {"layout": "deepseek", "mp": 2}],
    ids=["single", "shards", "deepseek-mp1", "deepseek-mp2"],
)
def test_every_layout_gives_the_tensors_back(tmp_path, weights, dtype, layout):
    """Catches: a name, cut or dtype that is not undone on reading."""
    written = save(tmp_path / "c", weights, SMALL, dtype=dtype, **layout)
    assert sorted(written) == sorted((tmp_path / "c").iterdir())
    ckpt = Checkpoint.open(tmp_path / "c")
    expected = main_only(weights) if "layout" in layout else weights  # convert.py drops MTP
    assert set(ckpt) == set(expected)
    for name, w in expected.items():
        assert np.array_equal(ckpt[name].astype(np.float32), w)  # exact: the values are bfloat16's
    mtp = 0 if "layout" in layout else 1
    assert Config.from_dict(ckpt.config) == SMALL.replace(num_nextn_predict_layers=mtp)
    assert "quantization_config" not in ckpt.config


@pytest.mark.parametrize("mp", [1, 4])
def test_a_model_without_experts_is_cut_among_any_ranks(tmp_path, weights, mp):
    """Catches: experts counted where there are none, which then do not divide."""
    dense = {n: w for n, w in weights.items() if not n.startswith(("model.layers.1.", "model.layers.2."))}
    written = save(
        tmp_path / "c", dense, SMALL.replace(num_hidden_layers=1, first_k_dense_replace=1), layout="deepseek", mp=mp
    )
    assert sum(p.suffix == ".safetensors" for p in written) == mp
    ckpt = Checkpoint.open(tmp_path / "c")
    assert set(ckpt) == set(dense) and all(np.array_equal(ckpt[n].astype(np.float32), w) for n, w in dense.items())


def test_fp8_stores_what_the_release_stores(tmp_path, weights):
    """Catches: eh_proj, gate, norms or embedding quantised; the bias rounded; a projection missed."""
    save(tmp_path, weights, SMALL, dtype="fp8")
    found, metadata = parse_file(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}  # transformers refuses a file without it
    for name, (dtype, shape, _) in found.items():
        if name.endswith("_scale_inv"):
            weight = found[name.removesuffix("_scale_inv")]
            assert weight[0] == "F8_E4M3" and dtype == "F32"
            assert shape == tuple((n + 127) // 128 for n in weight[1])
        elif name.endswith("e_score_correction_bias"):
            assert dtype == "F32"
        elif re.search(r"(norm|embed_tokens|lm_head|eh_proj|mlp\.gate)\.weight$", name):
            assert dtype == "BF16" and name + "_scale_inv" not in found
        else:
            assert dtype == "F8_E4M3" and name + "_scale_inv" in found
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_fp8_comes_back_within_half_a_code(tmp_path, weights):
    """Catches: scales of other blocks; 2^-4 is E4M3's rounding, s 2^-10 that of its subnormals."""
    save(tmp_path, weights, SMALL, dtype="fp8")
    ckpt = Checkpoint.open(tmp_path)
    assert check(expected_tensors(SMALL), ckpt).ok
    for name, w in weights.items():
        bound = np.abs(w) * 2.0**-4 + np.abs(w).max() / 448 * 2.0**-10
        assert np.all(np.abs(ckpt[name].astype(np.float32) - w) <= 1.001 * bound)


@pytest.mark.slow
def test_the_released_checkpoint_would_have_its_688574839360_bytes():
    """Catches: any tensor, dtype or scale shape that differs from the release.

    The sum over the headers of the 163 released files is 688,574,839,360 bytes in 91,991 tensors
    (README of simpx/model-inspect); a bfloat16 bias would make 30,208 fewer.
    """
    shapes = expected_tensors(DEEPSEEK_V3, mtp=True)
    shapes["model.layers.61.embed_tokens.weight"] = (129280, 7168)
    shapes["model.layers.61.shared_head.head.weight"] = (129280, 7168)
    tensors = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    (file,) = hf_files(Path("x"), Plan(tensors, "fp8", (128, 128), None), None).values()
    assert (len(file), sum(t.nbytes for t in file.values())) == (91_991, 688_574_839_360)


def test_fp8_codes_pass_unchanged_from_layout_to_layout(tmp_path, weights):
    """Catches: a conversion that requantises. convert.py copies bytes, and so must we."""
    save(tmp_path / "hf", weights, SMALL, dtype="fp8")
    source = Checkpoint.open(tmp_path / "hf")
    save(tmp_path / "ds", source, source.config, dtype="fp8", layout="deepseek", mp=2)
    parts = open_parts(tmp_path / "ds")
    assert list(parts) == ["model0-mp2.safetensors", "model1-mp2.safetensors"]
    for name, axis in {
        L0 + "self_attn.q_b_proj": 0,
        L0 + "self_attn.o_proj": 1,
        L0 + "self_attn.kv_a_proj_with_mqa": None,
        L0 + "mlp.down_proj": 1,
        L1 + "mlp.shared_experts.up_proj": 0,
    }.items():
        codes, scales = source.raw(name + ".weight")
        short = to_deepseek(name + ".weight").removesuffix(".weight")
        for rank, part in enumerate(parts.values()):
            for suffix, whole in {"weight": codes, "scale": scales}.items():
                cut = whole if axis is None else np.split(whole, 2, axis)[rank]
                assert part[f"{short}.{suffix}"][2] == cut.tobytes()
    back = Checkpoint.open(tmp_path / "ds")
    for name in back:
        for a, b in zip(back.raw(name), source.raw(name), strict=True):
            assert (a is None and b is None) or a.tobytes() == b.tobytes()


def test_fp8_to_bfloat16_drops_scales_and_settings(tmp_path, weights):
    """Catches: fp8_cast_bf16.py's trap, a quantization_config left in a bfloat16 checkpoint."""
    save(tmp_path / "fp8", weights, SMALL, dtype="fp8")
    source = Checkpoint.open(tmp_path / "fp8")
    save(tmp_path / "bf16", source, source.config)
    found, _ = parse_file(tmp_path / "bf16" / "model.safetensors")
    name = L0 + "self_attn.kv_a_proj_with_mqa.weight"
    assert found[name][0] == "BF16" and not any("scale" in n for n in found)
    assert found[name][2] == source[name].astype(ml_dtypes.bfloat16).tobytes()
    assert "quantization_config" not in Checkpoint.open(tmp_path / "bf16").config


def test_another_scale_format_requantises(tmp_path, weights):
    """Catches F10: exact scales under a config that promises powers of two."""
    save(tmp_path / "v3", weights, SMALL, dtype="fp8")
    source = Checkpoint.open(tmp_path / "v3")
    config = source.config | {"quantization_config": {"scale_fmt": "ue8m0"}}
    save(tmp_path / "v31", source, config, dtype="fp8")
    ckpt = Checkpoint.open(tmp_path / "v31")
    assert ckpt.scale_fmt == "ue8m0"
    for name in (n for n in ckpt if ckpt.scale(n)):
        assert np.all(np.log2(ckpt.raw(name)[1]) % 1 == 0)
        np.testing.assert_allclose(ckpt[name], source[name], rtol=2**-4, atol=0.01)


def test_shards_keep_to_their_size_and_weights_with_their_scales(tmp_path, weights):
    """Catches: shards that exceed the limit; a scale in another shard than its weight."""
    limit = 400_000
    save(tmp_path, weights, SMALL, dtype="fp8", max_shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    parts = open_parts(tmp_path)
    assert len(parts) > 3 and next(iter(parts)) == f"model-00001-of-{len(parts):05}.safetensors"
    sizes = [sum(len(raw) for _, _, raw in part.values()) for part in parts.values()]
    assert max(sizes) <= limit and sum(sizes) == index["metadata"]["total_size"]
    held = {name: shard for shard, part in parts.items() for name in part}
    assert held == index["weight_map"]
    scales = [n for n in held if n.endswith("_scale_inv")]
    assert scales and all(held[n] == held[n.removesuffix("_scale_inv")] for n in scales)


INDEX = "model.safetensors.index.json"


def test_a_single_file_may_be_named(tmp_path, weights):
    """Catches: a case folder's weights.safetensors written as model.safetensors."""
    written = save(tmp_path / "case" / "weights.safetensors", weights, SMALL, dtype="float32")
    assert sorted(p.name for p in written) == ["config.json", "weights.safetensors"]
    assert len(Checkpoint.open(tmp_path / "case")) == len(weights)


def test_float64_is_rounded_once():
    """Catches: float64 -> float32 -> bfloat16, which makes a tie of what lies just above it."""
    x = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-40)])
    plan = Plan({"x": x}, "bfloat16", (128, 128), None)
    (pending,) = plan.pending("x").values()
    up, down = 1 + 2**-7, 1.0
    # above the tie: up; at it: to even; below it: down; at the next tie: to even, which is up
    assert pending.make().astype(float).tolist() == [up, down, down, 1 + 2**-6, -up]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_float64_pattern_rounds_to_the_nearest(dtype):
    """Catches: wrong rounding anywhere else (subnormals, halves, large); oracle: integer arithmetic."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**64, 4000, dtype=np.uint64).view(np.float64)
    x = x[np.isfinite(x) & (np.abs(x) < 3e38)]
    x = np.concatenate([x, rng.normal(size=4000), (rng.integers(0, 999, 999) + 0.5) * 2.0**-140])
    plan = Plan({"x": x}, dtype, (128, 128), None)
    (pending,) = plan.pending("x").values()
    found = pending.make().astype(np.float64)
    digits = {"float32": 24, "bfloat16": 8}[dtype]
    _, e = np.frexp(x)
    step = np.ldexp(1.0, np.maximum(e, -125) - digits)  # spacing of the format around x
    assert np.array_equal(found, np.rint(x / step) * step)  # exact: powers of two; rint ties to even


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        ({"lm_head.weight": np.full((128, 256), 1e39)}, {}, "32768 finite values overflow BF16"),
        ({"lm_head.weight": np.full((128, 256), 3.4e38)}, {}, "overflow BF16"),
        ({"lm_head.weight": np.ones((128, 256), int)}, {}, "dtype int64"),
        ({L0 + "mlp.up_proj.weight": np.ones((4, 4), DTYPES["F8_E4M3"])}, {}, "dtype float8_e4m3fn"),
        ({L0 + "mlp.up_proj.weight_scale_inv": np.ones((1, 1))}, {}, "are scales"),
        ({L0 + "mlp.up_proj.weight": np.full((256, 256), np.nan)}, {"dtype": "fp8"}, "block (0, 0)"),
        ({}, {"dtype": "float16"}, "dtype 'float16'; expected one of bfloat16, float32, fp8"),
        ({}, {"layout": "gguf"}, "layout 'gguf'"),
        ({}, {"mp": 2}, "needs layout 'deepseek'"),
        ({}, {"layout": "deepseek", "max_shard_bytes": 9}, "has no shards"),
        ({}, {"max_shard_bytes": 0}, "must be positive"),
        ({}, {"layout": "deepseek", "mp": 3}, "4 experts do not divide among mp=3"),
        ({}, {"layout": "deepseek", "mp": 4, "dtype": "fp8"}, "are no whole blocks of 128"),
        ({"model.odd.weight": np.ones(1)}, {"layout": "deepseek"}, "'model.odd.weight' has no name"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path, weights, change, arguments, says):
    """Catches: Inf for large values, scales that belong to other rows, half a checkpoint on disk."""
    with pytest.raises(SpecError, match=re.escape(says)):
        save(tmp_path / "c", weights | change, SMALL, **arguments)
    assert not (tmp_path / "c").exists() or not os.listdir(tmp_path / "c")


@pytest.mark.parametrize("layout", [{}, {"max_shard_bytes": 1 << 20}, {"layout": "deepseek", "mp": 2}])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, weights, layout):
    """Catches: new shards beside old ones after an error on the way."""
    save(tmp_path, weights, SMALL, **layout)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SpecError, match="overflow"):
        save(tmp_path, weights | {"model.norm.weight": np.full(256, 1e39)}, SMALL, **layout)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


MANY_FILES = [{"max_shard_bytes": 1 << 20}, {"layout": "deepseek", "mp": 2}]


@pytest.mark.parametrize("layout", MANY_FILES)
def test_a_power_cut_leaves_the_old_the_new_or_nothing(tmp_path, weights, layout, monkeypatch):
    """Catches: an index over shards of two training steps. The folder is copied before every rename,
    which is what a power cut at that moment would leave."""
    folder, new = tmp_path / "c", {name: w + 1 for name, w in weights.items()}
    save(folder, weights, SMALL, dtype="float32", **layout)
    real, cuts = os.replace, []

    def replace(a, b):
        cuts.append(shutil.copytree(folder, tmp_path / f"cut{len(cuts)}"))
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    save(folder, new, SMALL, dtype="float32", **layout)
    states = []
    for cut in [*cuts, folder]:
        try:
            ckpt = Checkpoint.open(cut)
        except SpecError:
            states.append("nothing")
        else:
            kinds = {"old" if np.array_equal(ckpt[n], weights[n]) else "new" for n in ckpt}
            assert len(kinds) == 1
            assert all(np.array_equal(ckpt[n], (weights if kinds == {"old"} else new)[n]) for n in ckpt)
            states += kinds
    assert states == ["old"] + ["nothing"] * (len(cuts) - 1) + ["new"]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("layout", [pytest.param(MANY_FILES[0], marks=pytest.mark.slow), MANY_FILES[1]])
def test_a_rename_that_fails_is_undone(tmp_path, weights, layout, monkeypatch):
    """Catches: the old checkpoint lost because the last of the new files could not be put in place."""
    real = os.replace
    save(tmp_path, weights, SMALL, dtype="float32", **layout)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for failing in range(2 * len(before)):  # every old file set aside, every new one put in place
        calls = iter(range(99))

        def replace(a, b, calls=calls, failing=failing):
            if next(calls) == failing:
                raise PermissionError(13, "in use")
            real(a, b)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(SpecError, match="cannot be written: in use"):
            save(tmp_path, {n: -w for n, w in weights.items()}, SMALL, dtype="float32", **layout)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_weights_of_another_kind_in_the_folder_are_not_left_beside(tmp_path, weights):
    """Catches: an old index that hides the new single file, or the reverse."""
    save(tmp_path, weights, SMALL, max_shard_bytes=1 << 20)
    with pytest.raises(SpecError, match=f"holds {INDEX}, which would stay beside the new"):
        save(tmp_path, weights, SMALL)
    save(tmp_path, weights, SMALL, max_shard_bytes=1 << 19)  # shards over shards are fine
    assert len(Checkpoint.open(tmp_path)) == len(weights)


def test_saving_over_the_checkpoint_being_read_is_safe(tmp_path, weights):
    """Catches: the source overwritten while tensors are still to be read from it."""
    save(tmp_path, weights, SMALL)
    source = Checkpoint.open(tmp_path)
    save(tmp_path, source, source.config, dtype="float32")
    ckpt = Checkpoint.open(tmp_path)
    assert all(np.array_equal(ckpt[n], w) and ckpt.dtype(n) == "F32" for n, w in weights.items())
