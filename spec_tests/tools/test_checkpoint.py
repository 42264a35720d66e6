"""Checkpoints: every file layout gives the same tensors, and every inconsistency is named."""

import json
import os
import re
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Checkpoint
from refimpl.spec_tests.oracles.handmade import entry, f32, file_bytes, make_file
from refimpl.spec_tests.r3_3_fp8.test_blocks import VALUES

GATE = "model.layers.0.mlp.gate_proj.weight"
INDEX = "model.safetensors.index.json"


def f32_tensor(a):
    a = np.asarray(a, "<f4")
    return "F32", a.shape, a.tobytes()


def fp8_tensors(name, codes, scale, scale_name=None):
    return {
        name: ("F8_E4M3", codes.shape, codes.tobytes()),
        scale_name or name + "_scale_inv": f32_tensor(scale),
    }


def random_fp8(rng, shape, block=128):
    codes = rng.integers(0, 127, size=shape, dtype=np.uint8)
    grid = tuple(-(-n // block) for n in shape)
    return codes, rng.uniform(0.5, 2, size=grid).astype(np.float32)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def two_shards(folder, total_size=16):
    make_file(folder / "model-00001-of-00002.safetensors", {"a": f32_tensor([1, 2])})
    make_file(folder / "model-00002-of-00002.safetensors", {"b": f32_tensor([3, 4])})
    index = {
        "metadata": {"total_size": total_size},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }
    write_json(folder / INDEX, index)
    return index


# ---------------------------------------------------------------------------------- where files lie


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_file_or_its_folder_may_be_named(tmp_path, name):
    """Catches: a loader that knows one spelling of the path only."""
    make_file(tmp_path / name, {"a": f32_tensor([1, 2])})
    for path in (tmp_path, tmp_path / name, str(tmp_path)):
        ckpt = Checkpoint.open(path)
        assert dict(ckpt.items()).keys() == {"a"} and ckpt["a"].tolist() == [1, 2]
        assert ckpt.config is None and ckpt.naming == "hf"


def test_shards_are_joined_by_their_index(tmp_path):
    """Catches: a loader that stops after the first shard."""
    two_shards(tmp_path)
    for path in (tmp_path, tmp_path / INDEX):
        ckpt = Checkpoint.open(path)
        assert {name: a.tolist() for name, a in ckpt.items()} == {"a": [1, 2], "b": [3, 4]}


def test_total_size_may_count_headers_or_be_absent(tmp_path):
    """Catches: refusing indexes of other writers; transformers counts tensors, others whole files."""
    index = two_shards(tmp_path)
    files = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    for metadata in ({"total_size": files}, {"total_size": 16.0}, {}, None):
        write_json(tmp_path / INDEX, index | {"metadata": metadata})
        assert len(Checkpoint.open(tmp_path)) == 2


def lose_shard(folder, index):
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_tensor(folder, index):
    index["weight_map"]["c"] = "model-00002-of-00002.safetensors"


def hide_tensor(folder, index):
    make_file(folder / "model-00002-of-00002.safetensors", {"b": f32_tensor([3]), "c": f32_tensor([5])})


def duplicate_tensor(folder, index):
    make_file(folder / "model-00002-of-00002.safetensors", {"b": f32_tensor([3]), "a": f32_tensor([5])})


def swap_shards(folder, index):
    index["weight_map"] = dict(zip("ab", reversed(index["weight_map"].values()), strict=True))


def unlist_shard(folder, index):
    index["weight_map"].pop("b")


def wrong_size(folder, index):
    index["metadata"]["total_size"] = 17


def size_in_words(folder, index):
    index["metadata"]["total_size"] = "sixteen"


def path_outside(folder, index):
    index["weight_map"]["b"] = "../model-00002-of-00002.safetensors"


def path_to_pickle(folder, index):
    index["weight_map"]["b"] = "pytorch_model.bin"


def empty_map(folder, index):
    index["weight_map"] = {}


def listed_map(folder, index):
    index["weight_map"] = ["a", "b"]


def damaged_shard(folder, index):
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs...")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_shard, "1 of 2 shards are missing: model-00002-of-00002.safetensors"),
        (lose_tensor, "tensors of the index that its shards lack: c (in model-00002"),
        (hide_tensor, "tensor 'c' of model-00002-of-00002.safetensors is not in the index"),
        (duplicate_tensor, "'a' is in model-00002-of-00002.safetensors, but the index says model-0"),
        (swap_shards, "but the index says"),
        (unlist_shard, "shards that the index does not list: model-00002"),
        (wrong_size, "total_size is 17; expected 16"),
        (size_in_words, "total_size is 'sixteen'; expected a number"),
        (path_outside, "expected a .safetensors file of the same folder"),
        (path_to_pickle, "expected a .safetensors file of the same folder"),
        (empty_map, "non-empty weight_map"),
        (listed_map, "non-empty weight_map"),
        (damaged_shard, "model-00002-of-00002.safetensors"),
    ],
)
def test_index_and_shards_must_agree(tmp_path, damage, says):
    """Catches R17: weights dropped without a message because an index and its shards disagree."""
    index = two_shards(tmp_path)
    damage(tmp_path, index)
    write_json(tmp_path / INDEX, index)
    with pytest.raises(SpecError, match=re.escape(says)):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"weight_map": {"a": "x", "a": "y"}}', "\ud800"])
def test_an_unreadable_index_is_refused(tmp_path, text):
    """Catches: a JSON error without the file's name, and a tensor listed twice."""
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SpecError, match=f"while reading .*{INDEX}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "holds no checkpoint; expected model.safetensors.index.json, model.safetensors"),
        (["pytorch_model.bin"], "it has pytorch_model.bin"),
        (["model.safetensors", "weights.safetensors"], "model.safetensors and weights.safetensors"),
        (["model.safetensors", "model0-mp1.safetensors"], "name the file that is meant"),
    ],
)
def test_a_folder_without_one_clear_checkpoint_is_refused(tmp_path, files, says):
    """Catches: silently loading one of two checkpoints, or a bare "not found"."""
    for name in files:
        make_file(tmp_path / name, {"a": f32_tensor([1])})
    with pytest.raises(SpecError, match=re.escape(says)):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.safetensors", "model.bin"])
def test_a_path_that_is_no_checkpoint_is_refused(tmp_path, name):
    """Catches: an OSError from within, or an attempt to unpickle."""
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SpecError, match=name):
        Checkpoint.open(tmp_path / name)


KEYS = ["weight_map", "metadata", "total_size", "a", "quantization_config", "weight_block_size"]
KEYS += ["dim", "n_layers", "n_expert_groups", "q_lora_rank", "max_seq_len", "dtype", "scale_fmt"]


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.floats(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(KEYS) | st.text(max_size=3),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
    st.sampled_from([INDEX, "config.json"]),
)
def test_arbitrary_json_never_raises_anything_but_spec_errors(tmp_path_factory, value, name):
    """Catches: AttributeError or TypeError for JSON of another shape, in the index or the config."""
    folder = tmp_path_factory.getbasetemp() / "arbitrary"
    two_shards(folder)
    write_json(folder / name, value)
    try:
        ckpt = Checkpoint.open(folder)
    except SpecError:
        return
    finally:
        (folder / "config.json").unlink(missing_ok=True)
    assert len(ckpt) == 2 and name == "config.json"


# ---------------------------------------------------------------------------------------- mapping


def test_tensors_come_as_stored_with_free_dtype_and_shape(tmp_path):
    """Catches: bfloat16 silently widened, or copied, on loading."""
    raw = f32(1.5)[2:] * 6
    make_file(tmp_path / "model.safetensors", {"a": ("BF16", (2, 3), raw)})
    ckpt = Checkpoint.open(tmp_path)
    assert (ckpt.dtype("a"), ckpt.shape("a"), ckpt.nbytes("a")) == ("BF16", (2, 3), 12)
    assert ckpt["a"].dtype == ml_dtypes.bfloat16 and not ckpt["a"].flags.owndata
    assert ckpt.raw("a")[1] is None


def test_a_wrong_name_is_answered_with_the_right_one(tmp_path):
    """Catches: a bare KeyError among 92 thousand names."""
    make_file(tmp_path / "model.safetensors", {GATE: f32_tensor([1]), "b": f32_tensor([1])})
    ckpt = Checkpoint.open(tmp_path)
    with pytest.raises(KeyError, match=f"did you mean '{GATE}'"):
        ckpt["model.layers.0.ffn.gate_proj.weight"]
    assert ckpt.get("zzz") is None and "zzz" not in ckpt


def test_fp8_weights_are_dequantised_by_their_own_scales(tmp_path):
    """Catches F01: 576 = 4.5 * 128 rows, and scales that are divided by, shifted, or another's."""
    rng = np.random.default_rng(0)
    a, b = random_fp8(rng, (576, 256)), random_fp8(rng, (576, 256))
    names = ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.1.x.weight")
    make_file(tmp_path / "model.safetensors", fp8_tensors(names[0], *a) | fp8_tensors(names[1], *b))
    ckpt = Checkpoint.open(tmp_path)
    assert set(ckpt) == set(names) and ckpt.dtype(names[0]) == "F8_E4M3"
    for name, (codes, scale) in zip(names, (a, b), strict=True):
        expected = VALUES[codes] * np.kron(scale, np.ones((128, 128)))[:576]
        np.testing.assert_array_equal(ckpt[name], expected.astype(np.float32))
        raw_codes, raw_scale = ckpt.raw(name)
        assert np.array_equal(raw_codes.view(np.uint8), codes) and np.array_equal(raw_scale, scale)


def test_the_configs_block_size_is_used(tmp_path):
    """Catches F07: 128 assumed although quantization_config says otherwise."""
    codes, scale = random_fp8(np.random.default_rng(1), (50, 40), 32)
    make_file(tmp_path / "model.safetensors", fp8_tensors("x.weight", codes, scale))
    with pytest.raises(SpecError, match=r"shape \(2, 2\); expected \(1, 1\)"):
        Checkpoint.open(tmp_path)["x.weight"]
    write_json(tmp_path / "config.json", {"quantization_config": {"weight_block_size": [32, 32]}})
    expected = VALUES[codes] * np.kron(scale, np.ones((32, 32)))[:50, :40]
    np.testing.assert_array_equal(Checkpoint.open(tmp_path)["x.weight"], expected.astype(np.float32))


@pytest.mark.parametrize(
    "quantization",
    [{"weight_block_size": b} for b in ([128], [0, 128], ["128", 128], 128, [True, True])]
    + [{"scale_fmt": "e5m2"}, ["fp8"]],
)
def test_impossible_quantisation_settings_are_refused(tmp_path, quantization):
    """Catches: a division by zero or a nonsense grid far away from the config."""
    make_file(tmp_path / "model.safetensors", {"a": f32_tensor([1])})
    write_json(tmp_path / "config.json", {"quantization_config": quantization})
    with pytest.raises(SpecError, match=r"weight_block_size|scale_fmt|quantization_config"):
        Checkpoint.open(tmp_path)


def test_codes_without_their_scales_are_refused(tmp_path):
    """Catches F05 (abliterix #94): a scale under another name ignored, weights 3361 times too big."""
    codes, scale = random_fp8(np.random.default_rng(2), (4, 4))
    other = "model.layers.0.mlp.gate_proj.weight_scale"
    make_file(tmp_path / "model.safetensors", fp8_tensors(GATE, codes, scale, other))
    with pytest.raises(SpecError, match=f"without {GATE}_scale_inv; is it '{other}'"):
        Checkpoint.open(tmp_path)[GATE]


def test_a_bad_scale_is_reported_with_tensor_block_and_file(tmp_path):
    """Catches: NaN weights whose origin nobody can tell."""
    codes, scale = random_fp8(np.random.default_rng(3), (300, 10))
    scale[2, 0] = np.nan
    make_file(tmp_path / "model.safetensors", fp8_tensors(GATE, codes, scale))
    with pytest.raises(SpecError) as error:
        Checkpoint.open(tmp_path)[GATE]
    for part in ("block (2, 0) = rows 256:300", f"while loading {GATE}", "model.safetensors"):
        assert part in str(error.value)


# ------------------------------------------------------------------------------------ fused experts

FUSED = "model.layers.3.mlp.experts"


def test_fused_experts_come_apart_gate_rows_first(tmp_path):
    """Catches: up taken for gate (transformers 5 stores [gate; up]), or experts off by one."""
    gate_up = np.arange(2 * 6 * 4, dtype=np.float32).reshape(2, 6, 4)
    down = -np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    tensors = {f"{FUSED}.gate_up_proj": f32_tensor(gate_up), f"{FUSED}.down_proj": f32_tensor(down)}
    make_file(tmp_path / "model.safetensors", tensors)
    ckpt = Checkpoint.open(tmp_path)
    assert len(ckpt) == 6 and f"{FUSED}.gate_up_proj" not in ckpt
    for e in range(2):
        for name, part in {"gate": gate_up[e, :3], "up": gate_up[e, 3:], "down": down[e]}.items():
            key = f"{FUSED}.{e}.{name}_proj.weight"
            assert ckpt.shape(key) == part.shape and np.array_equal(ckpt[key], part)
            assert not ckpt[key].flags.owndata  # a view of the file


def test_fused_fp8_experts_take_their_scales_along(tmp_path):
    """Catches F04 (sglang #35703): rows of a fused weight split, its scales not."""
    rng = np.random.default_rng(4)
    codes, scale = rng.integers(0, 127, (2, 512, 130), np.uint8), rng.uniform(1, 2, (2, 4, 2))
    name = f"{FUSED}.gate_up_proj"
    make_file(tmp_path / "model.safetensors", fp8_tensors(name, codes, scale))
    ckpt = Checkpoint.open(tmp_path)
    for e, proj, rows in [(0, "gate", slice(0, 256)), (1, "up", slice(256, 512))]:
        whole = VALUES[codes[e]] * np.kron(scale[e].astype("f4"), np.ones((128, 128)))[:, :130]
        found = ckpt[f"{FUSED}.{e}.{proj}_proj.weight"]
        np.testing.assert_array_equal(found, whole[rows].astype(np.float32))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{FUSED}.gate_up_proj": f32_tensor(np.ones((2, 5, 4)))}, "expected (E, 2F, D)"),
        ({f"{FUSED}.down_proj": f32_tensor(np.ones((2, 5)))}, "expected (E, D, F)"),
        (
            {
                f"{FUSED}.down_proj": f32_tensor(np.ones((2, 5, 4))),
                f"{FUSED}.1.down_proj.weight": f32_tensor(np.ones((5, 4))),
            },
            f"'{FUSED}.1.down_proj.weight' is found twice",
        ),
        (
            fp8_tensors(f"{FUSED}.gate_up_proj", np.ones((1, 400, 8), np.uint8), np.ones((1, 4, 1))),
            "with 200 rows, a block of 128 would hold gate and up",
        ),
    ],
)
def test_fused_experts_that_cannot_come_apart_are_refused(tmp_path, tensors, says):
    """Catches: a split that guesses. 400 fused rows make 4 scale rows, as two times 200 would."""
    make_file(tmp_path / "model.safetensors", tensors)
    with pytest.raises(SpecError, match=re.escape(says)):
        Checkpoint.open(tmp_path)


# -------------------------------------------------------------------------------------- laziness


def test_opening_hundreds_of_gigabytes_reads_headers_only(tmp_path):
    """Catches: opening that reads or allocates data. 40 shards, 8 GB each, as sparse files."""
    size, per_shard, weight_map = 1 << 28, 32, {}
    for shard in range(40):
        path = tmp_path / f"model-{shard:05}-of-00040.safetensors"
        names = [f"model.layers.{shard}.mlp.experts.{e}.up_proj.weight" for e in range(per_shard)]
        header = {n: entry("BF16", [size // 4096, 2048], i * size, (i + 1) * size) for i, n in enumerate(names)}
        path.write_bytes(file_bytes(header))
        os.truncate(path, path.stat().st_size + per_shard * size)
        weight_map |= dict.fromkeys(names, path.name)
    write_json(tmp_path / INDEX, {"weight_map": weight_map})
    tracemalloc.start()
    start = time.perf_counter()
    ckpt = Checkpoint.open(tmp_path)
    total = sum(ckpt.nbytes(name) for name in ckpt)
    elapsed = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 40 * per_shard * size == 343_597_383_680
    assert elapsed < 3 and peak < 8e6
    assert float(ckpt["model.layers.7.mlp.experts.3.up_proj.weight"][5, :9].sum()) == 0
