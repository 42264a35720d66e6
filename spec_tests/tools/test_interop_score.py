"""Real servers on the loopback, started and ended by the tests: llama-cpp-python's, mlx_lm's, `transformers serve`."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from refimpl.checkpoint import Checkpoint
from refimpl.cli import main
from refimpl.record.servable import END, merges_of, readable, tokenizer, tokens_of

from .test_refimpl_tap import TINY

HOW = "comes with an extra, or a server's own requirements; CI runs these tests with it"
BOUND = 120
"""Seconds in which a server must be up; it takes 3 to 15 on two busy cores."""
ALL_CHOSEN = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
    "model_type": "deepseek_v3",
}
"""Rows of 32, which q8_0 needs, and no expert left out, so that no rounding can choose another."""


def needs(*names):
    for name in names:
        pytest.importorskip(name, reason=HOW)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Preset tiny's case as servers load it, in float32."""
    needs("tokenizers")
    folder = tmp_path_factory.mktemp("served")
    assert main(["case", str(folder), "--servable", "--from", str(TINY)]) == 0
    stored = Checkpoint.open(folder)
    assert {stored.dtype(n) for n in stored} == {"F32"}
    return folder


@contextmanager
def serving(tmp_path, *command):
    """A server on a free port while the block runs; its address. Its own log says why it did not come up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "server.log").open("w+b")
    where = ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command, *where], env=os.environ | quiet, stdout=log, stderr=log)
    try:
        end = time.monotonic() + BOUND
        while not up(port):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "server.log").read_text()[-3000:]
            moment(process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def up(port):
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def moment(process):
    """A fifth of a second, less where the server ends first."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.2)


def told(capfd, *args):
    """The exit code and the report of `refimpl score`."""
    capfd.readouterr()
    code = main(["score", *map(str, args), "--json"])
    return code, json.loads(capfd.readouterr().out)


# ---- The folder


@pytest.mark.parametrize("size", [128, 300, 2200])
def test_text_gives_exactly_its_ids(size):
    """Catches a merge across characters, a byte that two ids share, an id that no text gives among those that are drawn."""
    needs("tokenizers")
    inner = tokenizer(tokens_of(size))
    ids = [int(i) for i in readable(size)]
    assert END not in ids and len(ids) == {128: 127, 300: 171, 2200: 1919}[size]
    text = inner.decode(ids)
    assert len(text) == len(ids) and inner.encode(text).ids == ids
    assert inner.encode(text[::-1]).ids == ids[::-1]
    assert len(set(tokens_of(size))) == size and len(merges_of(tokens_of(size))) == {128: 0, 300: 44, 2200: 1792}[size]


def test_a_new_case_is_servable(tmp_path):
    """Catches tokens that no text gives, bfloat16 that is not stored, and config.json without what engines look for."""
    needs("tokenizers")
    (tmp_path / "config.json").write_text(json.dumps(ALL_CHOSEN))
    args = ["case", str(tmp_path / "c"), "--servable", "bfloat16", "--config", str(tmp_path / "config.json")]
    assert main(args) == 0
    config, run = (json.loads((tmp_path / "c" / n).read_text()) for n in ("config.json", "tokens.json"))
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["torch_dtype"] == "bfloat16"
    drawn = {t for row in run["tokens"] for t in row}
    assert drawn <= set(readable(300).tolist()) and max(drawn) >= 256
    assert main(["info", str(tmp_path / "c")]) == 0
    stored = Checkpoint.open(tmp_path / "c")
    assert {stored.dtype(n) for n in stored} == {"BF16", "F32"} and stored.dtype("lm_head.weight") == "BF16"
    assert main(["case", str(tmp_path / "d"), "--gguf"]) == 3


# ---- The servers


def test_mlx_lms_server(served, tmp_path, capfd):
    """Catches its list that is not in order, its first entry that is not the token's own, and its refusal of 20."""
    needs("mlx.core", "mlx_lm")
    with serving(tmp_path, "-m", "mlx_lm", "server", "--model", str(served)) as url:
        code, said = told(capfd, served, url)
        assert code == 0 and said["verdict"] == "CONSISTENT" and said["places"]["settled"] == 48
        assert "10 most likely, prompts as text" in said["source"] and said["candidate"]["rms"] < 1e-5
        assert [a["how"] for a in said["again"]] == ["twice", "in a batch", "after a prefix"]


def test_mlx_lms_server_with_masked_groups_filled_with_zero(tmp_path, capfd):
    """Catches a known mistake of a real engine that its log-probabilities do not show: all biases below -1 (R02)."""
    needs("mlx.core", "mlx_lm", "tokenizers")
    folder = tmp_path / "c"
    assert main(["case", str(folder), "--servable", "--regime", "bias-negative"]) == 0
    with serving(tmp_path, "-m", "mlx_lm", "server", "--model", str(folder)) as url:
        code, said = told(capfd, folder, url)
    assert code == 1 and len(said["breaks"]) > 24


def test_transformers_serve_shows_tokens_alone(served, tmp_path, capfd):
    """Catches "consistent" where nothing but tokens was shown, and the end of a text taken for no answer."""
    needs("torch", "transformers", "fastapi", "uvicorn", "openai", "accelerate")
    main_of = "from transformers.cli.transformers import main; main()"
    with serving(tmp_path, "-c", main_of, "serve", str(served), "--device", "cpu") as url:
        code, said = told(capfd, served, url)
    assert code == 2 and said["verdict"] == "INCONCLUSIVE" and not said["tokens"] and "tokens alone" in said["source"]


@pytest.fixture
def llama(tmp_path):
    """A function that serves a GGUF file."""
    needs("llama_cpp", "gguf", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")

    def serve(path, *more):
        threads = ["--n_threads", "1", "--n_threads_batch", "1", "--n_ctx", "256"]
        return serving(tmp_path, "-m", "llama_cpp.server", "--model", str(path), *threads, *more)

    return serve


FLOAT_CACHE = ("--type_k", "0", "--type_v", "0")


@pytest.fixture
def gguf_case(tmp_path):
    """Preset tiny's case with a GGUF file."""
    needs("gguf", "tokenizers")
    assert main(["case", str(tmp_path / "c"), "--servable", "--gguf", "--from", str(TINY)]) == 0
    return tmp_path / "c"


def test_llama_cpp_pythons_server(gguf_case, llama, tmp_path, capfd):
    """Catches its echo that is one position early, and a cache in float16 that passes for float32."""
    with llama(gguf_case / "model.gguf", *FLOAT_CACHE) as url:
        code, said = told(capfd, gguf_case, url)
    assert code == 0 and said["places"]["settled"] == 46 and said["shift"] == 1
    with llama(gguf_case / "model.gguf") as url:
        code, said = told(capfd, gguf_case, url, "--save", tmp_path / "s.json")
    assert code == 1 and said["shift"] == 1 and len(said["breaks"]) == 46
    cache = "float32,mla.c_kv=float16,mla.k_rope=float16"
    assert told(capfd, gguf_case, tmp_path / "s.json", "--precision", cache)[0] == 0


def test_a_wrong_conversion_is_inconsistent(llama, tmp_path, monkeypatch, capfd):
    """Catches a file whose selection biases are lost in one layer."""
    needs("gguf", "tokenizers")
    from refimpl.record import gguf_weights

    real, name = gguf_weights.converted, "blk.2.exp_probs_b.bias"
    monkeypatch.setattr(gguf_weights, "converted", lambda w, c: (t := real(w, c)) | {name: 0 * t[name]})
    assert main(["case", str(tmp_path / "c"), "--servable", "--gguf", "--from", str(TINY)]) == 0
    with llama(tmp_path / "c" / "model.gguf", *FLOAT_CACHE) as url:
        assert told(capfd, tmp_path / "c", url)[0] == 1


def test_a_quantised_file_is_held_to_its_own_weights(llama, tmp_path, capfd):
    """Catches quantised weights blamed for what their rounding does, and a spread that takes 8-bit products for float32."""
    needs("llama_cpp", "gguf", "tokenizers")
    import llama_cpp

    (tmp_path / "config.json").write_text(json.dumps(ALL_CHOSEN))
    folder, path = tmp_path / "c", tmp_path / "q8.gguf"
    assert main(["case", str(folder), "--servable", "--gguf", "--config", str(tmp_path / "config.json")]) == 0
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    assert llama_cpp.llama_model_quantize(str(folder / "model.gguf").encode(), str(path).encode(), params) == 0
    with llama(path, *FLOAT_CACHE) as url:
        code, said = told(capfd, folder, url, "--precision", "int8", "--weights", path, "--save", tmp_path / "s.json")
    assert code == 0 and said["places"]["settled"] == 46, said["reasons"]
    assert "rounded" in said["notes"][0]
    assert told(capfd, folder, tmp_path / "s.json", "--weights", path)[0] == 1
