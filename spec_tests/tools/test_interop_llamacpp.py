"""llama.cpp through its adapter: a case as GGUF and back, and faults of the conversion. Its verdicts: test_interop_adapters.py."""

import numpy as np
import pytest

from refimpl.autograd.errors import SpecError
from refimpl.cli import main
from refimpl.diff import Case, Trace
from refimpl.diff.judge import judge
from refimpl.record import gguf_weights, llamacpp

from .test_refimpl_tap import TINY
from .test_regimes import made


@pytest.fixture(scope="module", autouse=True)
def _gguf():
    pytest.importorskip("gguf", reason="comes with the extra 'llamacpp'; CI runs these tests with it")


@pytest.fixture
def llama():
    reason = "llama-cpp-python is built from source; CI runs these tests where it builds within 15 minutes"
    return pytest.importorskip("llama_cpp", reason=reason)


@pytest.fixture
def case():
    return Case.read(TINY)


@pytest.fixture
def file(case, tmp_path):
    gguf_weights.write(case, tmp_path / "case.gguf")
    return tmp_path / "case.gguf"


def traced(case, path, tmp_path):
    return Trace.read(llamacpp.record(TINY, tmp_path / "trace", gguf=path).path)


# ---- The file


def test_a_case_comes_back_from_its_gguf_bit_for_bit(case, file):
    """Catches k_b not transposed back, v_b before k_b, experts out of order, a tensor that is forgotten."""
    held, weights = gguf_weights.read(file, case.config), case.weights()
    assert set(held) == set(weights)
    for name, w in weights.items():
        np.testing.assert_array_equal(held[name], np.asarray(w, np.float32), err_msg=name)


def test_queries_of_full_rank_come_back_and_are_told_of_by_a_rank_of_0(tmp_path):
    """Catches q_proj dropped on the way, and a file without the key that llama.cpp asks for."""
    import gguf

    case = made("full-rank-q")
    gguf_weights.write(case, tmp_path / "case.gguf")
    held = gguf_weights.read(tmp_path / "case.gguf", case.config)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert set(held) == set(case.weights())
    np.testing.assert_array_equal(held[name], np.asarray(case.weights()[name], np.float32))
    assert gguf.GGUFReader(tmp_path / "case.gguf").get_field("deepseek2.attention.q_lora_rank").contents() == 0


def test_a_file_of_another_architecture_or_size_is_refused(case, tmp_path):
    """Catches a GGUF of another model, whose nodes would be taken for this one's."""
    import gguf

    for name, layers, what in (
        ("llama", 3, "architecture 'llama'"),
        ("deepseek2", 7, "7 blocks; the case has 3"),
        ("deepseek2", None, "no count of blocks"),
    ):
        writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), name)
        if layers is not None:
            writer.add_block_count(layers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(SpecError, match=what):
            gguf_weights.read(tmp_path / "other.gguf", case.config)
    (tmp_path / "none.gguf").write_bytes(b"nothing of that kind")
    with pytest.raises(SpecError, match="not a GGUF file"):
        gguf_weights.read(tmp_path / "none.gguf", case.config)


def test_what_deepseek2_would_compute_otherwise_is_refused(case):
    """Catches a file that says less than the config does."""
    with pytest.raises(SpecError, match="every deepseek2 of 27 layers for one without query latent"):
        gguf_weights.supported(case.config.replace(num_hidden_layers=27))
    gguf_weights.supported(case.config.replace(num_hidden_layers=27, q_lora_rank=None))
    with pytest.raises(SpecError, match="scoring_func is 'softmax'"):
        gguf_weights.supported(case.config.replace(scoring_func="softmax", topk_method="noaux_tc"))


# ---- The run


def _yarn(monkeypatch):
    import gguf

    real = gguf.GGUFWriter.add_rope_scaling_yarn_log_mul
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_scaling_yarn_log_mul", lambda self, x: real(self, 10 * x))


def _changed(monkeypatch, change):
    real = gguf_weights.converted
    monkeypatch.setattr(gguf_weights, "converted", lambda weights, c: change(real(weights, c), c))


def _order(monkeypatch):
    def swap(t, c):
        k, v = t["blk.1.attn_k_b.weight"].transpose(0, 2, 1), t["blk.1.attn_v_b.weight"]
        both = np.concatenate([v, k], axis=1)
        v, k = both[:, c.qk_nope_head_dim :], both[:, : c.qk_nope_head_dim]
        return t | {"blk.1.attn_k_b.weight": k.transpose(0, 2, 1), "blk.1.attn_v_b.weight": v}

    _changed(monkeypatch, swap)


def _bias(monkeypatch):
    _changed(monkeypatch, lambda t, c: t | {"blk.2.exp_probs_b.bias": 0 * t["blk.2.exp_probs_b.bias"]})


@pytest.mark.parametrize(
    ("fault", "taps", "tensors"),
    [
        (_yarn, {f"fwd/L{i}/mla.probs" for i in range(3)}, ""),
        (_order, {"fwd/L1/mla.q_absorbed", "fwd/L1/mla.ctx"}, "model.layers.1.self_attn.kv_b_proj.weight"),
        (_bias, {"fwd/L2/router.choice"}, "model.layers.2.mlp.gate.e_score_correction_bias"),
    ],
)
def test_faults_of_the_conversion_are_placed(fault, taps, tensors, llama, case, tmp_path, monkeypatch):
    """Catches taps too few to place a fault, and digests of what was meant to be written instead of what the file holds."""
    fault(monkeypatch)
    gguf_weights.write(case, tmp_path / "bad.gguf")
    found = judge(case, traced(case, tmp_path / "bad.gguf", tmp_path))
    assert {f.tap for f in found.culprits} == taps
    (gate,) = [g for g in found.gates if g.name == "weights"]
    assert (gate.state == "FAIL") == bool(tensors) and tensors in str(gate)


def test_a_file_that_llama_cpp_cannot_load_is_refused_in_its_own_words(llama, case, tmp_path, monkeypatch, capsys):
    """Catches a null pointer that is used."""
    _changed(monkeypatch, lambda t, c: {n: x for n, x in t.items() if n != "blk.1.attn_norm.weight"})
    gguf_weights.write(case, tmp_path / "short.gguf")
    assert (
        main(["record", "llamacpp", str(TINY), "-o", str(tmp_path / "t"), "--gguf", str(tmp_path / "short.gguf")]) == 3
    )
    assert "llama.cpp cannot load it" in (said := capsys.readouterr().err) and "blk.1.attn_norm.weight" in said
