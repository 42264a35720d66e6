"""Converted weights: each container brought back by hand-made files, each mistake of a conversion made by loops and named."""

import json
import re
import sys

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Checkpoint, save, write_file
from refimpl.cli import main
from refimpl.diff import Case, Trace, digest
from refimpl.layers.config import Config
from refimpl.layers.presets import TINY
from refimpl.model import Impl, expected_tensors
from refimpl.record import trace_case
from refimpl.weights import held_against, open_weights
from refimpl.weights.kin import order_of
from refimpl.weights.mlx import unpacked

from .test_refimpl_tap import TINY as TINY_CASE

CONFIG = TINY.replace(num_nextn_predict_layers=0)
WIDE = CONFIG.replace(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32
).replace(v_head_dim=8)
H, DN, DR, DV, C = 4, 12, 8, 10, 20
L1 = "model.layers.1."
Q, KV_A, KV_B = (L1 + f"self_attn.{n}.weight" for n in ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
GATE, BIAS = L1 + "mlp.gate.weight", L1 + "mlp.gate.e_score_correction_bias"


def drawn(config):
    rng = np.random.default_rng(5)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in expected_tensors(config, mtp=True).items()}


WEIGHTS = drawn(CONFIG)


def folder(path, weights, config=CONFIG):
    """A checkpoint's folder, with names as given."""
    path.mkdir(parents=True, exist_ok=True)
    write_file(path / "model.safetensors", weights)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return Checkpoint.open(folder(tmp_path_factory.mktemp("ours"), WEIGHTS))


def found(ours, path, config=CONFIG):
    """name -> finding, of those that are not equal."""
    findings = list(held_against(ours, config, open_weights(path, config)))
    return {f.name: f for f in findings if f.status != "equal"}


def with_(tmp_path, changes, base=WEIGHTS):
    return folder(tmp_path / "theirs", {n: w for n, w in (base | changes).items() if w is not None})


# ------------------------------------------------------------------------------------------- containers


def assert_restored(held, weights):
    assert set(held) == set(weights)
    for name, w in weights.items():
        np.testing.assert_array_equal(held[name], w, err_msg=name)
        assert held.shape(name) == w.shape and held[name].dtype == np.float32


def test_a_checkpoint_and_deepseeks_converted_parts_are_read(tmp_path):
    """Catches a container that is not recognised, or read under its own names."""
    from refimpl.checkpoint.names import to_deepseek

    assert_restored(open_weights(folder(tmp_path / "hf", WEIGHTS), CONFIG), WEIGHTS)
    renamed = {to_deepseek(n): w for n, w in WEIGHTS.items()}
    write_file(tmp_path / "model0-mp1.safetensors", renamed)
    held = open_weights(tmp_path / "model0-mp1.safetensors", CONFIG)
    assert held.container.startswith("DeepSeek")
    assert_restored(held, WEIGHTS)


TITAN = {
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
    "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "moe.router.gate",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.shared_experts.gate_proj": "moe.shared_experts.w1",
    "mlp.shared_experts.down_proj": "moe.shared_experts.w2",
    "mlp.shared_experts.up_proj": "moe.shared_experts.w3",
}


@pytest.mark.parametrize("stack", ["moe.routed_experts.inner_experts.w{}_{}", "moe.experts.w{}"])
def test_torchtitans_names_come_back(tmp_path, stack):
    """Catches w2 taken for up, experts not taken apart, names of one version only."""
    theirs = {
        "tok_embeddings.weight": WEIGHTS["model.embed_tokens.weight"],
        "norm.weight": WEIGHTS["model.norm.weight"],
        "output.weight" if stack.endswith("w{}") else "lm_head.weight": WEIGHTS["lm_head.weight"],
    }
    for i in range(3):
        at, to = f"model.layers.{i}.", f"layers.{i}."
        for hf, name in TITAN.items():
            if f"{at}{hf}.weight" in WEIGHTS:
                theirs[f"{to}{name}.weight"] = WEIGHTS[f"{at}{hf}.weight"]
        if i:
            theirs[f"{to}moe.expert_bias_E"] = WEIGHTS[f"{at}mlp.gate.e_score_correction_bias"]
            for w, p, axes in ((1, "gate", "EFD"), (2, "down", "EDF"), (3, "up", "EFD")):
                parts = [WEIGHTS[f"{at}mlp.experts.{e}.{p}_proj.weight"] for e in range(16)]
                theirs[to + stack.format(w, axes)] = np.stack(parts)
    held = open_weights(folder(tmp_path, theirs), CONFIG)
    assert held.container == "torchtitan"
    assert_restored(held, WEIGHTS)


MEGATRON = {
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_a_layernorm": "self_attention.q_layernorm",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_a_layernorm": "self_attention.linear_kv_up_proj.layer_norm",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "self_attn.o_proj": "self_attention.linear_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.gate": "mlp.router",
}


@pytest.mark.parametrize("expert", ["local_experts.{}.linear_fc{}.weight", "linear_fc{1}.weight{0}"])
def test_megatrons_names_come_back(tmp_path, expert):
    """Catches fc1 halved the wrong way, grouped experts' names, a norm fused into the linear behind it."""
    theirs = {
        "module.embedding.word_embeddings.weight": WEIGHTS["model.embed_tokens.weight"],
        "module.decoder.final_layernorm.weight": WEIGHTS["model.norm.weight"],
        "module.output_layer.weight": WEIGHTS["lm_head.weight"],
        "module.decoder.layers.0.mlp.linear_fc1._extra_state": np.zeros(1, np.uint8),
    }

    def feed_forward(at, name):
        gate, up, down = (WEIGHTS[f"{at}{p}_proj.weight"] for p in ("gate", "up", "down"))
        theirs[name.format(1)] = np.array([*gate, *up])
        theirs[name.format(2)] = down

    for i in range(3):
        at, to = f"model.layers.{i}.", f"module.decoder.layers.{i}."
        for hf, name in MEGATRON.items():
            if f"{at}{hf}.weight" in WEIGHTS:
                theirs[f"{to}{name}" + ("_weight" if name.endswith("layer_norm") else ".weight")] = WEIGHTS[
                    f"{at}{hf}.weight"
                ]
        if i == 0:
            feed_forward(f"{at}mlp.", to + "mlp.linear_fc{}.weight")
            continue
        theirs[f"{to}mlp.router.expert_bias"] = WEIGHTS[f"{at}mlp.gate.e_score_correction_bias"]
        feed_forward(f"{at}mlp.shared_experts.", to + "mlp.shared_experts.linear_fc{}.weight")
        for e in range(16):
            feed_forward(f"{at}mlp.experts.{e}.", to + "mlp.experts." + expert.format(e, "{}"))
    held = open_weights(folder(tmp_path, theirs), CONFIG)
    assert held.container == "Megatron"
    assert_restored(held, WEIGHTS)


def mlx_of(weights, config, packed=lambda name, w: {name: w}):
    """mlx-lm's names: kv_b_proj in two, experts stacked."""
    theirs, nope = {}, config.qk_nope_head_dim
    for name, w in weights.items():
        if name.endswith("kv_b_proj.weight"):
            per = w.reshape(H, -1, config.kv_lora_rank)
            at = name.removesuffix("kv_b_proj.weight")
            theirs |= packed(at + "embed_q.weight", np.array([h[:nope].T for h in per]))
            theirs |= packed(at + "unembed_out.weight", np.array([h[nope:] for h in per]))
        elif m := re.fullmatch(r"(.+)\.experts\.0\.(.+)", name):
            theirs |= packed(
                f"{m[1]}.switch_mlp.{m[2]}", np.stack([weights[f"{m[1]}.experts.{e}.{m[2]}"] for e in range(16)])
            )
        elif ".experts." not in name:
            theirs |= packed(name, w)
    return theirs


def test_mlx_comes_back(tmp_path):
    """Catches keys not transposed back, values before keys, experts out of order."""
    held = open_weights(folder(tmp_path, mlx_of(WEIGHTS, CONFIG)), CONFIG)
    assert held.container == "MLX"
    assert_restored(held, WEIGHTS)


def naive_groups(w, bits, group):
    """Codes (as Python integers), scales and biases by MLX's rule; the packed words, bit by bit."""
    rows = w.reshape(-1, w.shape[-1])
    words, scales, biases, values = [], [], [], []
    for row in rows:
        number, k = 0, 0
        for g in range(0, len(row), group):
            part = row[g : g + group]
            low, step = part.min(), np.float32((part.max() - part.min()) / np.float32(2**bits - 1))
            scales.append(step)
            biases.append(low)
            for x in part:
                code = int(np.clip(np.rint((x - low) / step), 0, 2**bits - 1))
                number |= code << (bits * k)
                values.append(np.float32(code) * step + low)
                k += 1
        words.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(bits * k // 32)])

    def shaped(x, dtype):
        return np.array(x, dtype).reshape(*w.shape[:-1], -1)

    return shaped(words, np.uint32), shaped(scales, np.float32), shaped(biases, np.float32), shaped(values, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mlx_groups_are_dequantised_and_told(tmp_path, bits):
    """Catches codes unpacked from the top, 3-bit codes that straddle words, the wrong group, keys judged in kv_b_proj's axes."""
    weights = drawn(WIDE)
    told = []

    def packed(name, w):
        if w.ndim == 1 or w.shape[-1] % 32 or "mlp.gate." in name:
            return {name: w}
        words, scales, biases, values = naive_groups(w, bits, 32)
        told.append((name, values))
        base = name.removesuffix(".weight")
        return {name: words, f"{base}.scales": scales, f"{base}.biases": biases}

    path = folder(tmp_path / "theirs", mlx_of(weights, WIDE, packed), WIDE)
    held, values = open_weights(path, WIDE), dict(told)
    name = L1 + "self_attn.q_a_proj.weight"
    np.testing.assert_allclose(held[name], values[name], rtol=1e-6, atol=1e-7)  # one product and one sum in float32
    stack = values[L1 + "mlp.switch_mlp.up_proj.weight"]
    np.testing.assert_allclose(held[L1 + "mlp.experts.7.up_proj.weight"], stack[7], rtol=1e-6, atol=1e-7)
    ours = Checkpoint.open(folder(tmp_path / "ours", weights, WIDE))
    other = found(ours, path, WIDE)
    assert {f.status for f in other.values()} == {"rounded"} and KV_B in other
    assert other[name].how == f"affine {bits} bits, groups of 32, within its step"


def test_codes_are_unpacked_from_the_lowest_bit():
    """Catches bytes in the wrong order: 3-bit codes 0..7 and so on, laid one behind the other."""
    codes = [int(c) for c in np.random.default_rng(0).integers(0, 8, 32)]
    number = sum(c << (3 * i) for i, c in enumerate(codes))
    words = np.array([[(number >> (32 * i)) & 0xFFFFFFFF for i in range(3)]], np.uint32)
    assert unpacked(words, 3).tolist() == [codes]


# --------------------------------------------------------------------------------------------- roundings


def test_roundings_are_named(ours, tmp_path):
    """Catches a rounding called a mistake, or one format called another."""
    w = WEIGHTS[Q]
    named = {
        "bf16": w.astype(ml_dtypes.bfloat16),
        "fp16": w.astype(np.float16),
    }
    for how, x in named.items():
        f = found(ours, with_(tmp_path / how, {Q: x}))[Q]
        assert (f.status, f.how, f.ok) == ("rounded", how, True)


def test_q8_0_is_recognised_in_a_float_file(tmp_path):
    """Catches the round trip through GGUF and back, called a difference: blocks of 32, d in fp16, halves away from zero."""
    weights = drawn(WIDE)
    name = L1 + "self_attn.q_a_proj.weight"
    rounded = np.empty_like(weights[name])
    for i, row in enumerate(weights[name]):
        for g in range(0, len(row), 32):
            d = np.float32(max(abs(row[g : g + 32]))) / np.float32(127)
            for k in range(g, g + 32):
                y = float(row[k] * (np.float32(1) / d))
                rounded[i, k] = np.float32(np.float16(d)) * int(y + 0.5 if y > 0 else y - 0.5)
    ours = Checkpoint.open(folder(tmp_path / "ours", weights, WIDE))
    f = found(ours, folder(tmp_path / "theirs", weights | {name: rounded}, WIDE), WIDE)[name]
    assert (f.status, f.how) == ("rounded", "q8_0")


def test_fp8_blocks_are_a_rounding_with_its_error(ours, tmp_path):
    """Catches FP8 called wrong, or a released FP8 checkpoint not told from its bfloat16 cast."""
    save(tmp_path / "fp8", WEIGHTS, CONFIG, dtype="fp8")
    other = found(ours, tmp_path / "fp8")
    assert other[Q].how == "fp8 e4m3 blocks" and 0.01 < other[Q].error < 0.04  # 3 bits behind the point: 2^-4 at most
    assert other["lm_head.weight"].how == "bf16"
    cast = {n: Checkpoint.open(tmp_path / "fp8")[n].astype(ml_dtypes.bfloat16) for n in WEIGHTS}
    back = found(Checkpoint.open(tmp_path / "fp8"), folder(tmp_path / "cast", cast))
    assert back[Q].how == "bf16"


def test_what_is_no_rounding_differs(ours, tmp_path):
    """Catches a step so generous that noise passes: 1 % of noise in a bfloat16 file."""
    noise = np.random.default_rng(1).normal(size=WEIGHTS[Q].shape)
    f = found(ours, with_(tmp_path, {Q: (WEIGHTS[Q] * (1 + 0.02 * noise)).astype(ml_dtypes.bfloat16)}))[Q]
    assert f.status == "differs" and not f.ok and 0.01 < f.error < 0.03


# --------------------------------------------------------------------------------------------- relations


def rope_half(w, first, rows):
    """Pairs (0, 1), (2, 3), ... of the rotated rows put as halves: row j of the first half was 2 j, of the second 2 j + 1."""
    y = w.copy()
    for start in range(first, len(w), rows):
        for j in range(DR // 2):
            y[start + j], y[start + DR // 2 + j] = w[start + 2 * j], w[start + 2 * j + 1]
    return y


def rope_again(w, first, rows):
    y = w.copy()
    for start in range(first, len(w), rows):
        for j in range(DR // 2):
            y[start + 2 * j], y[start + 2 * j + 1] = w[start + j], w[start + DR // 2 + j]
    return y


def keys(w):
    return [w[h * (DN + DV) : h * (DN + DV) + DN] for h in range(H)]


def values(w):
    return [w[h * (DN + DV) + DN : (h + 1) * (DN + DV)] for h in range(H)]


def joined(parts):
    return np.array([row for part in parts for row in part])


MISTAKES = {
    "RoPE rows half, not interleaved": (Q, lambda w: rope_half(w, DN, DN + DR)),
    "RoPE rows half, not interleaved ": (KV_A, lambda w: rope_half(w, C, C + DR)),
    "RoPE rows taken for half and interleaved again": (Q, lambda w: rope_again(w, DN, DN + DR)),
    "RoPE rows taken for half and interleaved again ": (KV_A, lambda w: rope_again(w, C, C + DR)),
    "RoPE rows before the others": (KV_A, lambda w: joined([w[C:], w[:C]])),
    "values before keys in each head": (
        KV_B,
        lambda w: joined([p for k, v in zip(keys(w), values(w), strict=True) for p in (v, k)]),
    ),
    "all keys before all values": (KV_B, lambda w: joined(keys(w) + values(w))),
    "all values before all keys": (KV_B, lambda w: joined(values(w) + keys(w))),
    "keys of each head transposed": (
        KV_B,
        lambda w: joined([p for k, v in zip(keys(w), values(w), strict=True) for p in (k.T.reshape(DN, C), v)]),
    ),
    "transposed": (Q, lambda w: np.ascontiguousarray(w.T)),
    "read in the other axis order": (Q, lambda w: np.array([x for column in w.T for x in column]).reshape(w.shape)),
    "heads and their features exchanged": (
        Q,
        lambda w: np.array([w[h * (DN + DR) + d] for d in range(DN + DR) for h in range(H)]),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_permutation_is_named_also_when_rounded(ours, tmp_path, mistake, dtype):
    """Catches a wrong layout called a difference, or one layout called another."""
    name, make = MISTAKES[mistake]
    f = found(ours, with_(tmp_path, {name: make(WEIGHTS[name]).astype(dtype)}))[name]
    assert f.status == "permuted" and not f.ok
    assert f.how == mistake.strip() + ("" if dtype == np.float32 else "; rounded to bf16")


def test_mtp_halves_exchanged_are_named(tmp_path):
    """Catches T01 in a file: eh_proj's columns for [hidden, embedding]."""
    weights = drawn(TINY)
    name = "model.layers.3.eh_proj.weight"
    assert name in weights
    ours = Checkpoint.open(folder(tmp_path / "ours", weights, TINY))
    swapped = np.array([[*row[48:], *row[:48]] for row in weights[name]])
    f = found(ours, folder(tmp_path / "theirs", weights | {name: swapped}, TINY), TINY)[name]
    assert f.status == "permuted" and "T01" in f.how


def expert(e, proj="up_proj"):
    return f"{L1}mlp.experts.{e}.{proj}.weight"


def test_experts_in_other_places_are_told_by_their_order(ours, tmp_path, capsys):
    """Catches experts shifted by one, whole groups exchanged, called differences."""
    shifted = {expert(e): WEIGHTS[expert((e + 1) % 16)] for e in range(16)}
    groups = {expert(e, "down_proj"): WEIGHTS[expert((e // 4 ^ 1) * 4 + e % 4, "down_proj")] for e in range(16)}
    path = with_(tmp_path, shifted | groups)
    assert found(ours, path)[expert(3)].source == expert(4)
    assert main(["weights", str(ours.path), str(path)]) == 1
    out = capsys.readouterr().out
    assert "mlp.experts.*.up_proj.weight in L1: experts shifted by 1" in out
    assert "mlp.experts.*.down_proj.weight in L1: experts moved in whole groups: 1 0 3 2" in out
    assert order_of([0, 1, 2, 3], 2) == "shifted by 0" and order_of([1, 0, 2, 3], 2) == "permuted: 1 0 2 3"


def test_the_routers_rows_in_another_order_are_named(ours, tmp_path):
    """Catches rows and bias that follow permuted experts, or do not."""
    order = [3, 0, 1, 2, *range(4, 16)]
    changes = {GATE: WEIGHTS[GATE][order], BIAS: np.roll(WEIGHTS[BIAS], -5)}
    other = found(ours, with_(tmp_path, changes))
    assert other[GATE].status == "permuted" and other[GATE].how.startswith("rows permuted: 3 0 1 2 4")
    assert other[BIAS].how == "rows shifted by 5"


def test_gate_and_up_exchanged_and_a_stale_layer_are_copies(ours, tmp_path):
    """Catches fc1 = [up; gate], and a tensor that a loop left from the layer before."""
    gate, up = (f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up"))
    norm = "model.layers.2.self_attn.o_proj.weight"
    stale = WEIGHTS[norm.replace(".2.", ".1.")].astype(ml_dtypes.bfloat16)
    other = found(ours, with_(tmp_path, {gate: WEIGHTS[up], up: WEIGHTS[gate], norm: stale}))
    assert other[gate].status == "copy" and other[gate].how == other[up].how == "gate_proj and up_proj exchanged"
    assert other[norm].how == "a copy of layer 1's; rounded to bf16" and other[norm].source == norm.replace(
        ".2.", ".1."
    )


def test_gate_that_lies_twice_is_not_called_exchanged(ours, tmp_path):
    """Catches two tensors blamed where one is wrong: the one that was copied is where it belongs."""
    gate, up = (f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up"))
    for lost, kept, how in ((gate, up, "up_proj instead of gate_proj"), (up, gate, "gate_proj instead of up_proj")):
        other = found(ours, with_(tmp_path, {lost: WEIGHTS[kept]}))
        assert {n: (f.status, f.how) for n, f in other.items()} == {lost: ("copy", how)}


def test_factors_are_measured(ours, tmp_path):
    """Catches a routed scale folded into down_proj, a norm folded into a matrix, a bias offset or zero."""
    down, o = expert(2, "down_proj"), L1 + "self_attn.o_proj.weight"
    norm = np.linspace(0.5, 2, WEIGHTS[Q].shape[1]).astype(np.float32)
    changes = {
        down: (WEIGHTS[down] * 2.5).astype(ml_dtypes.bfloat16),
        o: -WEIGHTS[o],
        Q: WEIGHTS[Q] * norm,
        BIAS: WEIGHTS[BIAS] + np.float32(7),
        BIAS.replace(".1.", ".2."): np.zeros(16, np.float32),
    }
    other = found(ours, with_(tmp_path, changes))
    told = {n: (f.status, f.how) for n, f in other.items()}
    assert told[down][0] == "scaled" and float(told[down][1].removeprefix("by ")) == pytest.approx(2.5, rel=2**-9)
    assert told[o] == ("scaled", "by -1")
    assert told[Q] == ("scaled", "by a factor for each column, 0.5 to 2")
    assert told[BIAS] == ("offset", "by 7")
    assert told[BIAS.replace(".1.", ".2.")][0] == "zero"


def test_missing_extra_misshapen_and_nan_are_told(ours, tmp_path):
    """Catches R17 and R18: a shared expert or a bias that no loader misses."""
    lost = L1 + "mlp.shared_experts.up_proj.weight"
    bad = WEIGHTS[KV_A].copy()
    bad[3, 4] = np.nan
    changes = {lost: None, KV_A: bad, Q: WEIGHTS[Q][:-1], "model.layers.1.novel.weight": np.ones(3, np.float32)}
    told = {n: f.status for n, f in found(ours, with_(tmp_path, changes)).items()}
    assert told == {lost: "missing", KV_A: "not finite", Q: "misshapen", "model.layers.1.novel.weight": "extra"}


def fp8_case(path):
    """A checkpoint of which one matrix is FP8 in blocks of 16 x 16 with scales far apart."""
    rng = np.random.default_rng(3)
    rows, columns = WEIGHTS[KV_A].shape  # 28, 48
    codes = rng.normal(size=(rows, columns)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.exp(rng.normal(size=(2, 3))).astype(np.float32)
    folder(path, WEIGHTS | {KV_A: codes, KV_A + "_scale_inv": scales})
    told = json.loads((path / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (path / "config.json").write_text(json.dumps(told))
    return codes.astype(np.float32), scales


def test_loaders_of_fp8_scales_are_named(tmp_path):
    """Catches F01 and F02 (block size inferred from the rows), F05 (scales ignored), F10 (scales rounded, codes kept)."""
    codes, scales = fp8_case(tmp_path / "ours")
    ours = Checkpoint.open(tmp_path / "ours")

    def loaded(scale_of):
        w = np.empty_like(codes)
        for i, row in enumerate(codes):
            for j, x in enumerate(row):
                w[i, j] = x * np.float32(scale_of(i, j))
        return found(ours, with_(tmp_path / str(id(scale_of)), {KV_A: w}, dict(ours) | {})).get(KV_A)

    assert loaded(lambda i, j: scales[i // 16, j // 16]) is None
    assert "F05" in loaded(lambda i, j: 1).how
    assert "of 14 rows, not 16 (F01, F02)" in loaded(lambda i, j: scales[i // 14, j // 16]).how  # ceil(28 / 2)
    assert "rounded up to powers" in loaded(lambda i, j: 2.0 ** np.ceil(np.log2(scales[i // 16, j // 16]))).how
    assert loaded(lambda i, j: 1 / scales[i // 16, j // 16]).status == "scaled"


# --------------------------------------------------------------------------------------- command and diff


def test_codes_without_scales_are_told_of_one_by_one(ours, tmp_path, capsys):
    """Catches a comparison that ends at the first of them, one that takes codes for numbers, and an impact that ends there, too."""
    bare = [Q, L1 + "mlp.experts.3.up_proj.weight"]
    codes = {n: WEIGHTS[n].astype(ml_dtypes.float8_e4m3fn) for n in bare}
    path = with_(tmp_path, codes | {GATE: 2 * WEIGHTS[GATE]})
    seen = found(ours, path)
    assert {n: f.status for n, f in seen.items()} == dict.fromkeys(bare, "no scale") | {GATE: "scaled"}
    assert not seen[Q].ok and seen[Q].stored == "F8_E4M3"
    noise = {Q.replace(".1.", ".0."): np.random.default_rng(9).normal(size=WEIGHTS[Q].shape).astype(np.float32)}
    other = open_weights(
        folder(tmp_path / "noise", WEIGHTS | noise), CONFIG
    )  # looked for among all tensors of its shape
    theirs = {f.name: f for f in held_against(Checkpoint.open(path), CONFIG, other)}
    assert {n: f.how for n, f in theirs.items() if f.status == "no scale"} == dict.fromkeys(bare, "the case's own")
    assert theirs[next(iter(noise))].status == "differs"
    weights = dict(Case.read(TINY_CASE).weights())
    other = weights | {Q: np.asarray(weights[Q], ml_dtypes.float8_e4m3fn), GATE: 2 * weights[GATE]}
    assert main(["weights", str(TINY_CASE), str(folder(tmp_path / "impact", other)), "--impact", "--json"]) == 1
    moved = {r["what"]: r["moved"] for r in json.loads(capsys.readouterr().out)["impact"]}
    assert moved["L1/self_attn.q_b_proj.weight, no scale"] is None and moved["L1/mlp.gate.weight"]["kl"] > 0


def test_nothing_to_weigh_leaves_the_table_of_impact_out(capsys):
    """Catches a heading over nothing."""
    assert main(["weights", str(TINY_CASE), str(TINY_CASE), "--impact"]) == 0
    assert "moves the logits" not in capsys.readouterr().out


def test_impact_is_our_own_run_with_the_tensor_replaced(tmp_path, capsys):
    """Catches an impact of another tensor, of float32 noise, or of nothing."""
    case = Case.read(TINY_CASE)
    weights = case.weights()
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    other = weights | {name: (np.asarray(weights[name], np.float32) * 1.5)}
    path = folder(tmp_path / "theirs", other, case.config)
    assert main(["weights", str(TINY_CASE), str(path), "--impact", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    rows = {r["what"]: r["moved"] for r in told["impact"]}

    def logits(w):
        y = Impl(precision="float64").load(case.config, w).forward(case.tokens)["logits"]
        return y - np.log(np.exp(y).sum(-1, keepdims=True))

    p, q = logits(weights), logits(other)
    kl = np.mean([np.sum(np.exp(a) * (a - b)) for a, b in zip(p.reshape(-1, 128), q.reshape(-1, 128), strict=True)])
    assert rows["L1/self_attn.kv_b_proj.weight"]["kl"] == pytest.approx(kl, rel=1e-9)
    assert rows["all together"] == rows["L1/self_attn.kv_b_proj.weight"] and kl > 1e-6
    assert [t["how"] for t in told["tensors"] if t["status"] == "scaled"] == ["by 1.5"] and not told["ok"]


def rounded_case(tmp_path):
    """preset tiny's weights in fp8, and our own run of them."""
    case = Case.read(TINY_CASE)
    save(
        tmp_path / "theirs", {n: np.asarray(w, np.float32) for n, w in case.weights().items()}, case.config, dtype="fp8"
    )
    theirs = tmp_path / "run"
    held = open_weights(tmp_path / "theirs", case.config)
    folder(theirs, dict(held), case.config)
    (theirs / "tokens.json").write_text(json.dumps({"tokens": case.tokens}))
    trace_case(Case.read(theirs), precision="float32").write(tmp_path / "trace.safetensors")
    return tmp_path / "theirs", tmp_path / "trace.safetensors"


def test_a_quantised_run_conforms_under_its_own_weights(tmp_path, capsys):
    """Catches a quantised model's arithmetic blamed for its weights, or its weights not told of."""
    weights, trace = rounded_case(tmp_path)
    assert main(["diff", str(TINY_CASE), str(trace)]) == 1
    capsys.readouterr()
    assert main(["diff", str(TINY_CASE), str(trace), "--weights", str(weights)]) == 0
    out = capsys.readouterr().out
    assert "CONFORMS" in out and re.search(r"converted ok .* rounded", out)


def test_a_trace_that_declares_what_it_was_quantised_from_is_judged_on_the_file(tmp_path, capsys):
    """Catches a wrong FAIL for engines that quantise what they are given; a wrong ok for a trace of yet other weights."""
    weights, path = rounded_case(tmp_path)
    case, trace = Case.read(TINY_CASE), Trace.read(path)
    trace.header.weights.update({n: digest(np.asarray(w, np.float32)) for n, w in case.weights().items()})
    Trace(trace.header, dict(trace.taps)).write(tmp_path / "declared")
    assert main(["diff", str(TINY_CASE), str(tmp_path / "declared"), "--weights", str(weights)]) == 0
    assert "declares the case's" in capsys.readouterr().out
    trace.header.weights.update({KV_B: digest(np.zeros((88, 20)))})
    Trace(trace.header, dict(trace.taps)).write(tmp_path / "other")
    assert main(["diff", str(TINY_CASE), str(tmp_path / "other"), "--weights", str(weights)]) == 1


def test_a_wrong_conversion_fails_apart_from_the_arithmetic(tmp_path, capsys):
    """Catches a run under wrong weights that is told CONFORMS without a word."""
    weights, trace = rounded_case(tmp_path)
    ckpt = Checkpoint.open(weights)
    wrong = dict(ckpt) | {KV_B: ckpt[KV_B] * 2}
    folder(tmp_path / "wrong", wrong)
    assert main(["diff", str(TINY_CASE), str(trace), "--weights", str(tmp_path / "wrong")]) == 1
    assert re.search(r"converted FAIL .*kv_b_proj.weight: scaled by", capsys.readouterr().out)


def test_mtp_modules_may_be_left_out(tmp_path):
    """Catches engines without MTP called broken, or an MTP tensor that is wrong not told of."""
    weights = drawn(TINY)
    ours = Checkpoint.open(folder(tmp_path / "ours", weights, TINY))
    main_only = {n: w for n, w in weights.items() if not n.startswith("model.layers.3.")}
    told = found(ours, folder(tmp_path / "theirs", main_only, TINY), TINY)
    assert told and {f.status for f in told.values()} == {"left out"} and all(f.ok for f in told.values())


def test_what_cannot_be_read_is_refused_with_the_way_out(tmp_path, capsys):
    """Catches a pickle that is opened, a path that does not exist, a case without config, MLX codes that fit no width."""
    (tmp_path / "model.pt").write_bytes(b"\x80\x02")
    with pytest.raises(SpecError, match=r"safetensors\.torch\.save_file"):
        open_weights(tmp_path / "model.pt", CONFIG)
    with pytest.raises(SpecError, match="does not exist"):
        open_weights(tmp_path / "none", CONFIG)
    scales = {
        "model.embed_tokens.scales": np.ones((128, 1), np.float32),
        "model.embed_tokens.biases": np.ones((128, 1), np.float32),
    }
    for words in (np.zeros((128, 5), np.uint32), np.zeros((127, 6), np.uint32)):
        with pytest.raises(SpecError, match="do not make rows of 48"):
            open_weights(folder(tmp_path / "mlx", {"model.embed_tokens.weight": words} | scales), CONFIG)
    with pytest.raises(SpecError, match="without biases"):
        words = {
            "model.embed_tokens.weight": np.zeros((128, 12), np.uint32),
            "model.embed_tokens.scales": np.ones((128, 3), np.uint8),
        }
        open_weights(folder(tmp_path / "mlx", words), CONFIG)
    with pytest.raises(SpecError, match="unembed_out"):
        open_weights(
            folder(tmp_path / "half", {"model.layers.0.self_attn.embed_q.weight": np.ones((4, 20, 12))}), CONFIG
        )
    write_file(tmp_path / "bare.safetensors", WEIGHTS)
    assert main(["weights", str(tmp_path / "bare.safetensors"), str(tmp_path / "half")]) == 3
    assert "no config.json" in capsys.readouterr().err


def test_gguf_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    """Catches an ImportError for a person who has not the extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model").write_bytes(b"GGUF")
    with pytest.raises(SpecError, match=r"pip install 'deepseek-v3-refimpl\[gguf\]'"):
        open_weights(tmp_path / "model", CONFIG)


def test_an_index_of_one_file_is_a_checkpoint(tmp_path):
    """Catches what mlx-lm writes, model.safetensors with an index of it, refused as two checkpoints."""
    path = folder(tmp_path, WEIGHTS)
    index = {"weight_map": dict.fromkeys(WEIGHTS, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint.open(path)) == set(WEIGHTS)


def test_a_config_that_counts_as_json_is_the_same_config():
    """Catches fixtures that test another model than they say."""
    assert Config.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def test_q8_0_rounds_halves_away_from_zero(tmp_path):
    """Catches numpy's halves to even: with 127 in a block the step is 1, and 2.5 becomes 3 (ggml's roundf)."""
    weights = drawn(WIDE)
    name = "model.norm.weight"
    weights[name] = np.resize(np.array([127, 2.5, -2.5, 0.5, -4.5], np.float32), 64)
    away = np.resize(np.array([127, 3, -3, 1, -5], np.float32), 64)
    ours = Checkpoint.open(folder(tmp_path / "ours", weights, WIDE))
    assert found(ours, folder(tmp_path / "theirs", weights | {name: away}, WIDE), WIDE)[name].how == "q8_0"
