"""Checking a checkpoint against the model, counting parameters, and saying so."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Checkpoint, check, copies_that_differ, save, scan_nonfinite
from refimpl.checkpoint.info import count_parameters, describe, render, to_json
from refimpl.checkpoint.names import near
from refimpl.cli import main
from refimpl.layers.config import Config
from refimpl.layers.presets import DEEPSEEK_V2, DEEPSEEK_V2_LITE, DEEPSEEK_V3, TINY
from refimpl.model import expected_tensors
from refimpl.spec_tests.oracles.handmade import f32, make_file, parse_file

GOLDEN = Path(__file__).parents[1] / "golden"
ROUTER = "model.layers.1.mlp.gate."
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in expected_tensors(TINY).items()}


def saved(folder, weights, config=TINY, **arguments):
    save(folder, weights, config, **arguments)
    return Checkpoint.open(folder)


def renamed(weights, old, new):
    return {n.replace(old, new): w for n, w in weights.items()}


# ------------------------------------------------------------------------------------------- check


def test_a_complete_checkpoint_is_fine(tmp_path, weights):
    """Catches: false alarms, which teach people to ignore the report."""
    for dtype in ("float32", "bfloat16", "fp8"):
        report = check(expected_tensors(TINY), saved(tmp_path / dtype, weights, dtype=dtype))
        assert report.ok and report.lines() == []
        report.demand()


def test_a_missing_tensor_is_named(tmp_path, weights):
    """Catches R17 and R18: a shared expert or a bias that no loader misses."""
    lost = [ROUTER + "e_score_correction_bias", "model.layers.2.mlp.shared_experts.up_proj.weight"]
    ckpt = saved(tmp_path, {n: w for n, w in weights.items() if n not in lost})
    report = check(expected_tensors(TINY), ckpt)
    assert sorted(report.missing) == sorted(lost) and not report.extra and not report.ok
    with pytest.raises(SpecError, match=re.escape(f"missing    {lost[0]}")):
        report.demand()


def test_a_misspelt_tensor_is_missing_extra_and_explained(tmp_path, weights):
    """Catches: two long lists in which nobody sees that they are the same name."""
    ckpt = saved(tmp_path, renamed(weights, ROUTER + "e_score_correction_bias", ROUTER + "bias"))
    report = check(expected_tensors(TINY), ckpt)
    assert report.missing == (ROUTER + "e_score_correction_bias",)
    assert report.extra == (ROUTER + "bias",)
    assert report.lines()[0].endswith(f"e_score_correction_bias; did you mean {ROUTER}bias?")


def test_suggestions_prefer_the_same_layer_and_expert(tmp_path, weights):
    """Catches: expert 3's up suggested for expert 7's, since the spellings are closer."""
    ckpt = saved(tmp_path, renamed(weights, "up_proj", "up"))
    report = check(expected_tensors(TINY), ckpt)
    assert len(report.suggestions) == 8  # the first few; the rest follow the pattern
    for missing, extra in report.suggestions.items():
        assert extra == missing.replace("up_proj", "up")
    assert any("... and" in line for line in report.lines())


def test_suggestions_stay_right_among_thousands():
    """Catches: a search cut off before the right name, or one that takes minutes for 92 thousand."""
    extra = [f"model.layers.{i}.mlp.experts.{e}.up.weight" for i in range(61) for e in range(256)]
    name = "model.layers.60.mlp.experts.255.up_proj.weight"
    assert near(name, extra) == "model.layers.60.mlp.experts.255.up.weight"


def test_a_wrong_shape_is_shown_with_the_right_one(tmp_path, weights):
    """Catches: a transposed or truncated weight."""
    name = "model.layers.0.mlp.down_proj.weight"
    ckpt = saved(tmp_path, weights | {name: weights[name].T})
    report = check(expected_tensors(TINY), ckpt)
    assert report.misshapen == {name: ((80, 48), (48, 80))} and not report.missing
    assert report.lines() == [f"misshapen  {name}: shape (80, 48), expected (48, 80)"]


def test_scales_are_checked_without_reading_them(tmp_path):
    """Catches: a scale of another weight, or one without a weight, found only when it is used."""
    codes = {"x.weight": ("F8_E4M3", (300, 10), bytes(3000))}
    scales = {"x.weight_scale_inv": ("F32", (2, 1), f32(1, 1)), "y.weight_scale_inv": ("F32", (), f32(1))}
    make_file(tmp_path / "model.safetensors", codes | scales)
    report = check({"x.weight": (300, 10)}, Checkpoint.open(tmp_path))
    assert report.misshapen == {"x.weight_scale_inv": ((2, 1), (3, 1))}
    assert report.extra == ("y.weight_scale_inv",)


def test_mtp_copies_of_embedding_and_head_are_allowed(tmp_path, weights):
    """Catches: the released checkpoint's shared tensors reported as extra, or demanded."""
    copies = {"embed_tokens.weight": weights[EMBED], "shared_head.head.weight": weights[HEAD]}
    full = weights | {f"model.layers.3.{n}": w for n, w in copies.items()}
    report = check(expected_tensors(TINY), saved(tmp_path / "1", full))
    assert report.ok and len(report.mtp_copies) == 2
    assert copies_that_differ(Checkpoint.open(tmp_path / "1"), 3) == []
    expected = expected_tensors(TINY) | {n: full[n].shape for n in full}  # a model that lists them
    assert check(expected, saved(tmp_path / "without", weights)).ok
    full["model.layers.3.embed_tokens.weight"] = weights[EMBED] + 1
    differing = copies_that_differ(saved(tmp_path / "2", full), 3)
    assert differing == ["model.layers.3.embed_tokens.weight"]


def test_a_main_layer_may_not_have_such_copies(tmp_path, weights):
    """Catches: the allowance for MTP applied to every layer."""
    ckpt = saved(tmp_path, weights | {"model.layers.1.embed_tokens.weight": weights[EMBED]})
    assert check(expected_tensors(TINY), ckpt).extra == ("model.layers.1.embed_tokens.weight",)


# --------------------------------------------------------------------------------------- NaN and Inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_infinity_are_found_and_counted(tmp_path, weights, dtype):
    """Catches: a checkpoint saved after training diverged."""
    name = "model.layers.2.input_layernorm.weight"
    bad = weights[name].copy()
    bad[[3, 5, 7]] = np.nan, np.inf, -np.inf
    ckpt, seen = saved(tmp_path, weights | {name: bad}, dtype=dtype), []
    found = scan_nonfinite(ckpt, lambda done, total, name: seen.append((done, total, name)))
    assert found == {name: 3}
    assert [s[:2] for s in seen] == [(i, len(ckpt)) for i in range(len(ckpt))]
    assert [s[2] for s in seen] == list(ckpt)


def test_fp8_codes_and_scales_are_scanned(tmp_path, weights):
    """Catches: NaN codes (0x7f, 0xff) and broken scales, which only FP8 has."""
    save(tmp_path, weights, TINY, dtype="fp8")
    path = tmp_path / "model.safetensors"
    tensors, _ = parse_file(path)
    codes, scales = (f"model.layers.0.mlp.{p}_proj.weight" for p in ("up", "gate"))
    dtype, shape, raw = tensors[codes]
    tensors[codes] = (dtype, shape, b"\x7f\xff" + raw[2:])
    tensors[scales + "_scale_inv"] = ("F32", (1, 1), f32(0))
    make_file(path, tensors)
    assert scan_nonfinite(Checkpoint.open(tmp_path)) == {codes: 2, scales + "_scale_inv": 1}


def test_tensors_larger_than_a_chunk_are_scanned_to_the_end(tmp_path):
    """Catches: an off-by-one in the chunking."""
    x = np.zeros((5_000_001,), ml_dtypes.bfloat16)
    x[-1] = np.nan
    make_file(tmp_path / "model.safetensors", {"x": ("BF16", x.shape, x.tobytes())})
    assert scan_nonfinite(Checkpoint.open(tmp_path)) == {"x": 1}


# ---------------------------------------------------------------------------------------- counting


def layer_parameters(c, attention, ffn):
    return attention + ffn + 2 * c.hidden_size  # and two norms


def counted_by_formula(c):
    """total, active, MTP from the report's dimensions (R 4.2), written out without tensor names."""
    d, h, lora = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    q = d * h * head if c.q_lora_rank is None else c.q_lora_rank * (d + 1 + h * head)
    kv = d * (lora + c.qk_rope_head_dim) + lora + lora * h * (c.qk_nope_head_dim + c.v_head_dim)
    attention = q + kv + h * c.v_head_dim * d
    expert = 3 * d * c.moe_intermediate_size
    bias = c.n_routed_experts if c.topk_method == "noaux_tc" else 0
    fixed = d * c.n_routed_experts + bias + c.n_shared_experts * expert
    moe = layer_parameters(c, attention, fixed + c.n_routed_experts * expert)
    moe_active = layer_parameters(c, attention, fixed + c.num_experts_per_tok * expert)
    dense = layer_parameters(c, attention, 3 * d * c.intermediate_size)
    n_dense, n_moe = c.first_k_dense_replace, c.num_hidden_layers - c.first_k_dense_replace
    outside = 2 * c.vocab_size * d + d
    mtp = moe + 2 * d * d + 3 * d  # eh_proj, and enorm, hnorm, shared_head.norm
    total, active = (outside + n_dense * dense + n_moe * m for m in (moe, moe_active))
    return total, active, c.num_nextn_predict_layers * mtp


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (DEEPSEEK_V3, "671.026", "37.55"),
        (DEEPSEEK_V2, "235.74", "21.4"),
        (DEEPSEEK_V2_LITE, "15.706", "2.66"),
    ],
    ids=["671B", "236B", "16B"],
)
def test_released_sizes(config, total, active):
    """Catches: any tensor forgotten, counted twice, or of another shape. R 4.2: 671B and 37B."""
    c = count_parameters(config)
    assert (c.total, c.active, c.mtp) == counted_by_formula(config)
    assert billions(c.total, total) and billions(c.active, active)
    parts = c.embedding + c.head + c.attention + c.dense_ffn + c.norms
    assert parts + c.routed_experts + c.shared_experts + c.router == c.total


def billions(count, said):
    """Whether the count rounds to the published digits."""
    return f"{count / 1e9:.{len(said.partition('.')[2])}f}" == said


def test_the_671b_model_to_the_last_parameter():
    """Catches: rounding that hides a small tensor. README_WEIGHTS.md counts MTP without eh_proj: 11.5B,
    of which 1.5B with the head, 2.4B with head and embedding, are active."""
    c = count_parameters(DEEPSEEK_V3)
    assert c.total == 671_026_419_200
    assert billions(c.active_without_embedding, "36.63") and billions(c.mtp, "11.61")
    assert c.attention_per_layer == 187_107_328
    eh_proj = 2 * 7168 * 7168
    assert billions(c.mtp - eh_proj, "11.5")
    assert billions(c.mtp_active - eh_proj + c.head, "1.5")
    assert billions(c.mtp_active - eh_proj + c.head + c.embedding, "2.4")


# -------------------------------------------------------------------------------------------- info


def test_info_describes_a_checkpoint(tmp_path, weights):
    """Catches: a wrong dtype, size or MTP statement about a checkpoint that is right."""
    save(tmp_path, weights, TINY, dtype="fp8")
    info = describe(tmp_path)
    found, _ = parse_file(tmp_path / "model.safetensors")
    for dtype, (tensors, nbytes) in info.dtypes.items():
        sizes = [len(raw) for d, _, raw in found.values() if d == dtype]
        assert (tensors, nbytes) == (len(sizes), sum(sizes))
    assert info.ok and info.mtp and info.tensors == len(found)
    text = render(info)
    for part in ("F8_E4M3", "n_routed_experts", "present", "as expected"):
        assert part in text
    data = json.loads(to_json(info))
    assert data["ok"] is True and data["counts"]["total"] == info.counts.total
    assert Config.from_dict(data["config"]) == TINY


def test_info_tells_flaws(tmp_path, weights):
    """Catches: ok said of a checkpoint with a hole."""
    save(tmp_path, {n: w for n, w in weights.items() if n != HEAD}, TINY)
    info = describe(tmp_path)
    assert not info.ok and info.report.missing == (HEAD,)
    assert "NOT as expected" in render(info) and f"missing    {HEAD}" in render(info)
    assert json.loads(to_json(info))["ok"] is False


def test_a_checkpoint_without_mtp_is_whole(tmp_path, weights):
    """Catches: converted or bfloat16 checkpoints, which drop MTP, called broken; half an MTP whole."""
    main = {n: w for n, w in weights.items() if not n.startswith("model.layers.3.")}
    save(tmp_path / "1", main, TINY)
    info = describe(tmp_path / "1")
    assert info.ok and not info.mtp and "absent" in render(info)
    name = "model.layers.3.enorm.weight"
    save(tmp_path / "2", main | {name: weights[name]}, TINY)
    info = describe(tmp_path / "2")
    assert info.mtp and not info.ok and "model.layers.3.eh_proj.weight" in info.report.missing


def test_info_without_a_config_says_so(tmp_path):
    """Catches: "ok" for what could not be checked."""
    make_file(tmp_path / "model.safetensors", {"x": ("F32", (2,), f32(1, 2))})
    info = describe(tmp_path)
    assert not info.ok and info.report is None and info.counts is None and info.tensors == 1
    assert "not checked: no config.json" in render(info)
    assert json.loads(to_json(info))["report"] is None


def test_a_bad_config_is_named(tmp_path, weights):
    """Catches: a complaint about the config that does not say which."""
    save(tmp_path, weights, TINY)
    config = json.loads((tmp_path / "config.json").read_text()) | {"n_group": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"n_group=3(.|\n)*config.json"):
        describe(tmp_path)


# ---------------------------------------------------------------------------- real implementations


@pytest.mark.parametrize("case", sorted(p.name for p in GOLDEN.glob("hf_*.json")))
def test_checkpoints_of_transformers_have_our_names_and_shapes(tmp_path, case):
    """Catches: a model of ours that expects other tensors than transformers 5.23.0 saves."""
    stem = case.removesuffix(".json")
    (tmp_path / "config.json").write_text((GOLDEN / case).read_text())
    (tmp_path / "weights.safetensors").write_bytes((GOLDEN / f"{stem}.weights.safetensors").read_bytes())
    info = describe(tmp_path)
    assert info.ok, render(info)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"max_shard_bytes": 100_000}], ids=["single", "shards"])
def test_transformers_loads_what_we_save_and_we_what_it_saves(tmp_path, weights, layout):
    """Catches: files, index or config that are ours alone. Every tensor both ways, bit for bit."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
    torch = pytest.importorskip("torch", reason="transformers needs it")
    main = {n: w for n, w in weights.items() if not n.startswith("model.layers.3.")}
    save(tmp_path / "ours", main, TINY, dtype="float32", **layout)
    model, told = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    model.save_pretrained(tmp_path / "theirs")
    theirs = Checkpoint.open(tmp_path / "theirs")
    assert set(theirs) == set(main)
    assert all(np.array_equal(theirs[n], w) for n, w in main.items())
    state = {n: t.numpy() for n, t in model.state_dict().items()}  # the fused form, in memory
    tensors = {n: ("F32", a.shape, np.ascontiguousarray(a).tobytes()) for n, a in state.items()}
    assert any("gate_up_proj" in n for n in tensors)
    fused = Checkpoint.open(make_file(tmp_path / "fused.safetensors", tensors))
    assert set(fused) == set(main)
    assert all(np.array_equal(fused[n], w) for n, w in main.items())


# ------------------------------------------------------------------------------------ config.json and files


def told(path):
    return [d.what for d in describe(path).disagreements]


def rewritten(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return path


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_config_and_files_that_agree_are_not_warned_of(tmp_path, weights):
    """Catches false alarms on what the releases are: FP8 announced, MTP counted and present, the bias F32."""
    for dtype in ("float32", "bfloat16", "fp8"):
        save(tmp_path / dtype, weights, TINY, dtype=dtype)
        assert told(tmp_path / dtype) == []


def test_quantisation_announced_or_present_alone_is_warned_of(tmp_path, weights, capsys):
    """Catches quantization_config over BF16 weights (KeyError on scales in engines), and FP8 codes that nothing announces."""
    save(tmp_path / "bf16", weights, TINY)
    save(tmp_path / "fp8", weights, TINY, dtype="fp8")
    assert main(["info", str(tmp_path / "bf16")]) == 0
    capsys.readouterr()
    (only,) = told(rewritten(tmp_path / "bf16", quantization_config=FP8))
    assert "no tensor is FP8" in only
    assert main(["info", str(tmp_path / "bf16")]) == 1
    assert re.search(r"WARNING .*no tensor is FP8\n +.*vLLM, SGLang[\s\S]*KeyError", capsys.readouterr().out)
    (only,) = told(rewritten(tmp_path / "fp8", quantization_config=None))
    assert "no quantization_config" in only


def test_codes_that_lost_their_scales_are_warned_of(tmp_path, weights):
    """Catches codes without scales that are told as "with scales", which nobody can decode."""
    save(tmp_path / "fp8", weights, TINY, dtype="fp8")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    tensors = {n: t for n, t in parse_file(file)[0].items() if not n.endswith("_scale_inv")}
    make_file(file, tensors)
    found = told(rewritten(tmp_path / "fp8", quantization_config=FP8))
    codes = sum(t[0] == "F8_E4M3" for t in tensors.values())
    assert [f for f in found if f"{codes} of {codes} tensors of FP8 codes have no scale" in f]
    unannounced = told(rewritten(tmp_path / "fp8", quantization_config=None))
    assert len(unannounced) == 2 and f"{codes} tensors are FP8 codes, but config.json has no" in unannounced[1]


@pytest.mark.parametrize("config", [{"quant_method": "compressed-tensors"}, {"bits": 4}])
def test_another_quantisation_announced_over_plain_weights_is_warned_of(tmp_path, weights, config):
    """Catches a config left beside dequantised weights, asked only where its method was FP8."""
    save(tmp_path, weights, TINY)
    (only,) = told(rewritten(tmp_path, quantization_config=config))
    assert only == f"config.json announces quantization_config {config.get('quant_method')}, but no tensor is quantised"


@pytest.mark.parametrize(
    ("counted", "kept", "what"), [(1, 3, "MTP is absent"), (0, 4, "present, but"), (2, 4, "but 1 MTP")]
)
def test_mtp_that_is_counted_otherwise_than_present_is_warned_of(tmp_path, weights, counted, kept, what):
    """Catches MTP counted but absent, called as expected; MTP present that no engine will load."""
    save(tmp_path, {n: w for n, w in weights.items() if int((re.search(r"layers\.(\d+)", n) or "00")[1]) < kept}, TINY)
    (only,) = told(rewritten(tmp_path, num_nextn_predict_layers=counted))
    assert what in only


def test_mtp_that_config_json_does_not_speak_of_is_told_as_the_default(tmp_path, weights):
    """Catches a number that stands nowhere in the file said to stand there: transformers and we take 1."""
    save(tmp_path, {n: w for n, w in weights.items() if not n.startswith("model.layers.3.")}, TINY)
    (only,) = told(rewritten(tmp_path, num_nextn_predict_layers=None))
    assert only.startswith("num_nextn_predict_layers is 1 by default, but no layer")


def test_a_selection_bias_that_is_not_float32_is_warned_of(tmp_path, weights, capsys):
    """Catches a cast of the whole model, which takes the bias along."""
    named = {n: ("BF16", w.shape, w.astype(ml_dtypes.bfloat16).tobytes()) for n, w in weights.items()}
    make_file(tmp_path / "model.safetensors", named)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    (only,) = told(tmp_path)
    assert "selection bias" in only and "BF16" in only
    assert main(["info", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["disagreements"][0]["what"] == only


def test_an_index_that_names_absent_files_is_told_of(tmp_path, weights, capsys):
    """Catches an index left beside a merged file, by which engines still go; and one without any of its files."""
    save(tmp_path, weights, TINY)
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path / "model.safetensors", tmp_path):
        (only,) = told(path)
        assert "names 1 files that are not there: model-00001-of-00002" in only
    assert main(["info", str(tmp_path / "model.safetensors.index.json")]) == 3
    assert "1 of 1 shards are missing: model-00001-of-00002" in capsys.readouterr().err


def test_where_some_files_of_the_index_are_absent_the_others_are_described(tmp_path, weights, capsys):
    """Catches a refusal that does not say who stumbles, and a second warning that speaks only of what the absent file holds: MTP
    that is counted and announced FP8 may lie there.
    """
    mtp = f".layers.{TINY.num_hidden_layers}."
    here = {n: w for n, w in weights.items() if ".layers.1." not in n and mtp not in n}
    save(tmp_path, here, TINY)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict() | {"quantization_config": {"quant_method": "fp8"}}))
    names = {n: f"model-0000{1 if n in here else 2}-of-00002.safetensors" for n in weights}
    index = {"metadata": {"total_size": 10**9}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert main(["info", str(path)]) == 1
        said = capsys.readouterr().out
        lost = len(weights) - len(here)
        assert f"names 1 files that are not there, with {lost} tensors: model-00002-of-00002" in said
        assert "vLLM and SGLang go by the index" in said and said.count("WARNING") == 1
        assert f"tensors  {len(here)}," in said and "missing" in said and "model.layers.1." in said
    with pytest.raises(SpecError, match="1 of 2 shards are missing"):
        Checkpoint.open(tmp_path)
