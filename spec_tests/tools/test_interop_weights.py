"""Converted weights by the real libraries: gguf's and llama.cpp's quantisers, mlx-lm's, torchtitan's and Megatron's own names."""

import json

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Checkpoint, write_file
from refimpl.cli import main
from refimpl.diff import Case
from refimpl.layers.presets import TINY
from refimpl.model import expected_tensors
from refimpl.record import gguf_weights
from refimpl.record.torch_map import built
from refimpl.weights import held_against, open_weights

from .test_refimpl_tap import TINY as TINY_CASE

K = TINY.replace(
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank"), 256),
    **{
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    },
)
"""Rows of 256: what K-quants need."""
HOW = "comes with an extra; CI runs these tests with it"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("case")
    shapes = expected_tensors(K, mtp=False)
    weights = {n: rng.normal(size=s, scale=0.05).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    write_file(path / "weights.safetensors", weights)
    (path / "config.json").write_text(json.dumps(K.to_dict()))
    (path / "tokens.json").write_text('{"tokens": [[1, 2, 3]]}')
    return Case.read(path)


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf", reason=HOW)


@pytest.fixture(scope="module")
def float_file(case, gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "case.gguf"
    gguf_weights.write(case, path)
    return path


def told(case, path):
    return {f.name: f for f in held_against(case.checkpoint, case.config, open_weights(path, case.config))}


def quantised(gguf, case, path, kind, change=lambda name, x: x):
    """The case as GGUF, matrices in a type that gguf itself quantises to."""
    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), "deepseek2")
    writer.add_block_count(case.config.num_hidden_layers)
    for name, x in gguf_weights.converted(case.weights(), case.config).items():
        x = np.ascontiguousarray(change(name, x), np.float32)
        raw = x.ndim > 1 and "gate_inp" not in name
        writer.add_tensor(name, gguf.quants.quantize(x, kind) if raw else x, raw_dtype=kind if raw else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("BF16", "bf16"),
        ("F16", "fp16"),
        ("Q8_0", "q8_0"),
        ("Q4_0", "Q4_0, within its step"),
        ("Q5_1", "Q5_1, within its step"),
    ],
)
def test_ggufs_quantisers_are_roundings(gguf, case, tmp_path, kind, how):
    """Catches our q8_0 that is not gguf's, experts read out of the wrong bytes, k_b judged in kv_b_proj's axes."""
    found = told(case, quantised(gguf, case, tmp_path / "q.gguf", kind))
    hows = {f.how for f in found.values() if f.status == "rounded"}
    assert (
        all(f.ok for f in found.values()) and hows <= {how} and (hows or kind == "BF16")
    )  # cases are made in bfloat16


def test_a_mistake_behind_a_quantiser_is_named(gguf, case, tmp_path, capsys):
    """Catches a permutation hidden by 4-bit noise, and noise taken for it."""

    def change(name, x):
        return (
            np.roll(x, 1, axis=0)
            if name == "blk.1.ffn_up_exps.weight"
            else x.T
            if name == "blk.0.attn_q_a.weight"
            else x
        )

    path = quantised(gguf, case, tmp_path / "q.gguf", "Q4_0", change)
    found = told(case, path)
    assert found["model.layers.0.self_attn.q_a_proj.weight"].how == "transposed; rounded to Q4_0, within its step"
    assert main(["weights", str(case.path), str(path)]) == 1
    assert "up_proj.weight in L1: experts shifted by 7; rounded to Q4_0" in capsys.readouterr().out


def test_llama_cpps_k_quants_are_roundings(case, float_file, tmp_path):
    """Catches a step too small for a real quantiser's search, or so large that half of another tensor passes."""
    llama = pytest.importorskip("llama_cpp", reason=HOW)
    for kind, error in (("Q2_K", 0.4), ("Q4_K_M", 0.1), ("Q6_K", 0.03)):
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.nthread = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
        path = tmp_path / f"{kind}.gguf"
        assert llama.llama_model_quantize(str(float_file).encode(), str(path).encode(), params) == 0
        found = told(case, path)
        assert all(f.ok for f in found.values()), [f for f in found.values() if not f.ok]
        assert 0.005 < max(f.error for f in found.values()) < error


def test_a_broken_gguf_is_bad_input(case, float_file, tmp_path, capsys):
    """Catches a trace of Python for a file that ends early, anywhere, or holds something else."""
    whole = float_file.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 20, 200, 2000, len(whole) // 2, len(whole) - 4096):
        path.write_bytes(whole[:size])
        assert main(["weights", str(case.path), str(path)]) == 3, size
    for at in range(4, 400, 7):  # flipped bytes of the header: either read or refused
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert main(["weights", str(case.path), str(path)]) in (0, 1, 3), at
    assert "this is a bug" not in capsys.readouterr().err


def test_half_of_kv_b_is_bad_input(gguf, case, tmp_path):
    """Catches attn_k_b without attn_v_b taken for a whole kv_b_proj."""
    writer = gguf.GGUFWriter(str(tmp_path / "half.gguf"), "deepseek2")
    writer.add_block_count(2)
    writer.add_tensor("blk.0.attn_k_b.weight", np.zeros((4, 256, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SpecError, match="attn_v_b"):
        open_weights(tmp_path / "half.gguf", case.config)


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"group_size": 64, "bits": 4},
        {"group_size": 32, "bits": 3},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    ],
    ids=str,
)
def test_mlx_lms_own_folders_come_back(case, tmp_path, settings):
    """Catches its packing, its modes and its stacks read otherwise than mlx does."""
    pytest.importorskip("mlx.core", reason=HOW)
    pytest.importorskip("mlx_lm", reason=HOW)
    import mlx.core as mx
    from mlx_lm.utils import quantize_model, save_config, save_model

    from refimpl.record import mlx

    with mlx.on_cpu():
        model, config = mlx.load(case), dict(case.raw_config)
        if settings:
            model, config = quantize_model(model, config, **settings)
        save_model(tmp_path, model)
        save_config(config, config_path=tmp_path / "config.json")
        held = open_weights(tmp_path, case.config)
        if settings:
            layer = model.model.layers[1].mlp.switch_mlp.up_proj
            theirs = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **settings)[3]
            ours = held["model.layers.1.mlp.experts.3.up_proj.weight"]
            np.testing.assert_allclose(ours, np.array(theirs.astype(mx.float32)), rtol=0, atol=2**-8 * abs(ours).max())
    found = told(case, tmp_path)
    assert {f.status for f in found.values()} <= {"equal", "rounded"}
    assert any(f.status == "rounded" for f in found.values()) == bool(settings)


def saved(state, path, config):
    arrays = {n: t.detach().float().numpy() for n, t in state.items() if hasattr(t, "detach") and t.is_floating_point()}
    path.mkdir(exist_ok=True)
    write_file(path / "model.safetensors", {n: x for n, x in arrays.items() if not n.endswith(("freqs_cis", "cache"))})
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def test_torchtitans_own_state_comes_back(tmp_path):
    """Catches a name of torchtitan's model that we do not know."""
    pytest.importorskip("torchtitan", reason=HOW)
    case = Case.read(TINY_CASE)
    with built(case, "refimpl.record.build_torchtitan:build") as made:
        path = saved(made.module.state_dict(), tmp_path / "titan", case.config)
    found = told(case, path)
    assert open_weights(path, case.config).container == "torchtitan"
    assert {f.status for f in found.values()} == {"equal"}, [f for f in found.values() if not f.ok]


def test_megatrons_own_state_comes_back(tmp_path):
    """Catches a name of Megatron's model that we do not know."""
    pytest.importorskip("megatron.core", reason=HOW)
    case = Case.read(TINY_CASE)
    with built(case, "refimpl.record.build_megatron:build") as made:
        path = saved(made.module.state_dict(), tmp_path / "megatron", case.config)
    found = told(case, path)
    assert open_weights(path, case.config).container == "Megatron"
    assert {f.status for f in found.values()} == {"equal"}, [f for f in found.values() if not f.ok]


def test_what_transformers_saves_is_the_same(tmp_path):
    """Catches fused experts (transformers 5) not taken apart before they are compared."""
    pytest.importorskip("transformers", reason=HOW)
    case = Case.read(TINY_CASE)
    with built(case, "refimpl.record.build_transformers:build") as made:
        made.module.save_pretrained(tmp_path)
    ours = Checkpoint.open(TINY_CASE)
    found = list(held_against(ours, case.config, open_weights(tmp_path, case.config)))
    assert {f.status for f in found} <= {"equal", "rounded"}, [f for f in found if not f.ok]
