"""Weights from disk: the same numbers as from memory, nothing read that is not needed, in bounded memory (R 3.4, at any size)."""

import threading

import numpy as np
import pytest

from refimpl import Checkpoint, Impl
from refimpl.autograd.errors import SpecError
from refimpl.checkpoint import Reader, open_file, save, write_file
from refimpl.cli import main
from refimpl.infer import Request, Settings, Speculation, generate
from refimpl.infer.from_disk import DiskWeights, Shelf, load_from_disk, pass_bytes, run_layer, weights
from refimpl.layers.precision import BF16, FLOAT32, FLOAT64
from refimpl.model import Streamed, by_rows, effective
from refimpl.spec_tests.cases.configs import SMALL
from refimpl.spec_tests.strategies.models import make_weights

TOKENS = [[3, 1, 4, 1, 5]]
CONFIG = SMALL.replace(num_hidden_layers=3, hidden_size=144, intermediate_size=300, moe_intermediate_size=132)


def checkpoint_of(folder, config=CONFIG, *, dtype="fp8", **options):
    made = make_weights(config.to_dict(), np.random.default_rng(0), mtp=config.num_nextn_predict_layers)
    save(folder, {n: np.float32(w) for n, w in made.items()}, config, dtype=dtype, **options)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return checkpoint_of(tmp_path_factory.mktemp("case"), max_shard_bytes=1 << 20)


def passes(impl):
    """Logits, hidden, cache and chosen experts of a prompt and two steps."""
    state, found = {}, []
    for tokens in (TOKENS, [[2]], [[6]]):
        out = impl.advance(tokens, state)
        ids = {layer: r.ids for layer, r in out.routing.items()}
        found.append((out.logits, out.hidden_pre_norm, *[a for kv in out.cache.layers for a in kv], ids))
    return found


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a[:-1], b[:-1], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
def test_from_disk_is_from_memory_bit_for_bit(tmp_path, precision, dtype):
    """Catches scales of other blocks, rows of other tensors, a plan that is not applied, chunks of another
    pass. Bit for bit: each matrix here is one block, and its product the product itself.
    """
    checkpoint = checkpoint_of(tmp_path, dtype=dtype, max_shard_bytes=1 << 20)
    impl = Impl(precision=precision)
    with load_from_disk(impl, checkpoint, budget=200_000):
        ours = passes(impl)
    assert_same(ours, passes(Impl(precision=precision).load(CONFIG, checkpoint)))


def test_blocks_are_put_where_they_belong(case, monkeypatch):
    """Catches a block of rows in another's place, at every seam of blocks, chunks and scales. One term a sum,
    so that only the place can be wrong.
    """
    monkeypatch.setattr(by_rows, "BLOCK", 1)
    monkeypatch.setattr(weights, "CHUNK", 1 << 14)
    rng, lazy = np.random.default_rng(0), DiskWeights(case, FLOAT64)
    for name in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
    ):
        whole, w = np.float64(case[name]), lazy[name]
        assert isinstance(w, Streamed) and w.shape == whole.shape and w.dtype == np.float64
        np.testing.assert_array_equal(np.asarray(w), whole)
        x = np.eye(whole.shape[1])[rng.permutation(whole.shape[1])]  # one term a sum: exact
        np.testing.assert_array_equal(x @ w.T, x @ whole.T)
        y = np.empty((len(x), len(whole)))
        assert np.matmul(x, w.T, out=y) is y
        np.testing.assert_array_equal(y, x @ whole.T)
        for a, b in ((0, 1), (127, 129), (len(whole) - 1, len(whole)), (5, len(whole))):
            if b <= len(whole):
                np.testing.assert_array_equal(lazy.read(name, FLOAT64, a, b), whole[a:b])
    assert len(lazy.keys_of("model.layers.0.mlp.up_proj.weight")) == 3


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_a_part_of_every_head(case, monkeypatch, block):
    """Catches the values' rows taken for the keys', a head in another's place, a matrix decoded whole: a block of one number is
    one head."""
    monkeypatch.setattr(by_rows, "BLOCK", block)
    name, heads = "model.layers.1.self_attn.kv_b_proj.weight", CONFIG.num_attention_heads
    whole = case[name].reshape(heads, -1, CONFIG.kv_lora_rank)
    w = DiskWeights(case, FLOAT32)[name].reshape(heads, -1, CONFIG.kv_lora_rank)
    read, asked = DiskWeights.read, []
    monkeypatch.setattr(DiskWeights, "read", lambda self, *a: asked.append(a[3] - a[2]) or read(self, *a))
    rng = np.random.default_rng(0)
    for rows in (slice(None, CONFIG.qk_nope_head_dim), slice(-CONFIG.v_head_dim, None)):
        x = rng.standard_normal((heads, 2, len(range(whole.shape[1])[rows])), np.float32)
        np.testing.assert_array_equal(x @ w[:, rows], x @ whole[:, rows])
        x = rng.standard_normal((heads, 2, CONFIG.kv_lora_rank), np.float32)
        np.testing.assert_array_equal(x @ w[:, rows].swapaxes(1, 2), x @ whole[:, rows].swapaxes(1, 2))
    assert sum(asked) == 4 * heads * whole.shape[1] and (block > 1 or set(asked) == {whole.shape[1]})


def test_only_what_is_needed_is_read_and_once(case, monkeypatch):
    """Catches experts read that no token chose, a matrix read twice, a chunk read ahead that was not needed: in every
    pass the names are those that the routers of the model in memory chose, and the bytes those of the header.
    """
    impl, read, rows = Impl(), [], Reader.rows
    monkeypatch.setattr(Reader, "rows", lambda self, *a: read.append(a) or rows(self, *a))
    expected = passes(Impl().load(CONFIG, case))
    with load_from_disk(impl, case) as w:
        assert all(len(case.shape(name)) == 1 for name, *_ in read)  # opening reads vectors only
        state = {}
        for tokens, (*_, ids) in zip((TOKENS, [[2]], [[6]]), expected, strict=True):
            read.clear()
            before = w.bytes_read
            impl.advance(tokens, state)
            assert len(set(read)) == len(read)
            chosen = {int(layer[1:]): set(np.unique(i).tolist()) for layer, i in ids.items()}
            wanted = {n for n in case if len(case.shape(n)) == 2 and ".experts." not in n}
            wanted |= {n for n in case for i, es in chosen.items() for e in es if f"layers.{i}.mlp.experts.{e}." in n}
            assert {name for name, *_ in read} == wanted
            stored = sum(t.nbytes for f in map(open_file, case.files) for n, t in f.header.items() if _of(n) in wanted)
            embedding = case.nbytes("model.embed_tokens.weight")
            rest = len(set(tokens[0])) * embedding // CONFIG.vocab_size
            assert w.bytes_read - before == stored - embedding + rest
            assert w.bytes_read - before == pass_bytes(case, CONFIG, chosen, tokens[0])


def _of(name):
    return name.removesuffix("_scale_inv")


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 1}, {"tie_word_embeddings": True}], ids=str)
def test_what_is_announced_is_what_is_used_in_this_order(tmp_path, monkeypatch, changes):
    """Catches a router that tells nobody, reading ahead that never begins, or is in vain: at every use the head of what
    was announced is what is used, and at the end nothing is left. The thread sleeps here, so only uses shorten the list.
    """
    config = CONFIG.replace(**changes)
    made = make_weights(config.to_dict(), np.random.default_rng(0), mtp=config.num_nextn_predict_layers)
    made["lm_head.weight"] = made["model.embed_tokens.weight"]  # also where it is tied, and so not used
    save(tmp_path, {n: np.float32(w) for n, w in made.items()}, config, dtype="fp8")
    impl, used, get = Impl(), [], Shelf.get

    def seen(shelf, key):
        assert shelf.coming[:1] == [key]
        used.append(key)
        return get(shelf, key)

    monkeypatch.setattr(Shelf, "get", seen)
    w = load_from_disk(impl, Checkpoint.open(tmp_path))
    for tokens in (TOKENS, [[2]]):
        impl.advance(tokens, {})
        assert w.shelf.coming == []
    assert any(".experts." in name for name, _ in used) and len(used) > 40


def test_a_cache_saves_reading_and_keeps_its_budget(case):
    """Catches a cache that is never hit, or grows beyond its budget; with room for all a second pass reads one row."""
    for budget in (0, 50_000, 10**9):
        impl, state = Impl(), {}
        with load_from_disk(impl, case, budget=budget) as w:
            impl.advance([[3]], state)
            first = w.bytes_read
            impl.advance([[3]], {})
            second = w.bytes_read - first
            assert w.hot.size == sum(r.nbytes for r in w.hot.held.values()) <= budget
        least = case.nbytes("model.embed_tokens.weight") // CONFIG.vocab_size
        if budget == 10**9:
            assert second == least
        else:
            everything = pass_bytes(case, CONFIG, {1: range(4), 2: range(4)}, [3])  # all experts are of one size
            assert everything - second == w.hot.size


def test_layers_in_turn_are_the_model(case):
    """Catches a layer with other positions, masks or inputs: one after the other they are the whole, bit for bit."""
    out = Impl().load(CONFIG, case).advance(TOKENS, {})
    hidden = None
    for i in range(CONFIG.num_hidden_layers):
        with DiskWeights(case, FLOAT32) as w:
            found = run_layer(w, CONFIG, i, TOKENS, hidden)
        hidden = found.hidden
        for ours, theirs in zip(found.cache, out.cache.layers[i], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        if found.routing is not None:
            np.testing.assert_array_equal(found.routing.ids, out.routing[f"L{i}"].ids)
    np.testing.assert_array_equal(hidden, out.hidden_pre_norm)


@pytest.mark.parametrize("layout", [{"layout": "deepseek", "mp": 2}, {"layout": "deepseek", "mp": 1}, {}], ids=str)
@pytest.mark.parametrize("dtype", ["fp8", "bfloat16"])
def test_any_layout_is_read_alike(tmp_path, layout, dtype):
    """Catches parts joined along the other axis, or rows of one part taken for another's."""
    sizes = dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 64)  # whole blocks for each rank
    sizes |= {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 128}
    config = CONFIG.replace(vocab_size=32, num_attention_heads=4, **sizes)
    checkpoint = checkpoint_of(tmp_path, config, dtype=dtype, **layout)
    reader = Reader(checkpoint)
    for name in checkpoint:
        (codes, scales), n = checkpoint.raw(name), checkpoint.shape(name)[0]
        for a, b in ((0, n), (n // 2 - 1, n // 2 + 1), (n - 1, n)):
            rows = reader.rows(name, a, b)
            np.testing.assert_array_equal(rows.codes.view(np.uint8), codes[rows.start : b].view(np.uint8))
            assert rows.start == (a if scales is None else a // 128 * 128)
            if scales is not None:
                np.testing.assert_array_equal(rows.scales, scales[a // 128 : -(-b // 128)])


def test_a_part_is_read_without_the_others(tmp_path):
    """Rows of one rank's part while the other's file is gone. Catches a file opened for none of its rows."""
    name = "model.layers.0.mlp.up_proj.weight"
    config = CONFIG.replace(vocab_size=32, num_attention_heads=4)
    checkpoint = checkpoint_of(tmp_path, config, dtype="bfloat16", layout="deepseek", mp=2)
    half, codes = CONFIG.intermediate_size // 2, np.array(checkpoint.raw(name)[0]).view(np.uint16)
    reader = Reader(checkpoint)
    for gone, begin in ((1, 0), (0, half)):
        path = tmp_path / f"model{gone}-mp2.safetensors"
        held = path.rename(tmp_path / "away")
        np.testing.assert_array_equal(
            reader.rows(name, begin, begin + half).codes.view(np.uint16), codes[begin:][:half]
        )
        with pytest.raises(SpecError, match="cannot be read"):
            reader.rows(name, half - begin, 2 * half - begin)
        held.rename(path)


def test_fused_experts_are_read_alone(tmp_path):
    """Catches another expert's rows, and up taken for gate."""
    rng, name = np.random.default_rng(0), "model.layers.1.mlp.experts"
    fused = {
        f"{name}.gate_up_proj": rng.standard_normal((3, 10, 4), np.float32),
        f"{name}.down_proj": rng.standard_normal((3, 4, 5), np.float32),
    }
    write_file(tmp_path / "model.safetensors", fused)
    checkpoint = Checkpoint.open(tmp_path)
    reader = Reader(checkpoint)
    for key in checkpoint:
        np.testing.assert_array_equal(reader.rows(key, 1, 4).codes, checkpoint[key][1:4])
    assert reader.bytes_read == 3 * (3 * 4 + 3 * 4 + 3 * 5) * 4  # of three experts three rows of gate, up and down


def test_a_shard_cut_off_meanwhile_is_named(tmp_path):
    """Catches a process that the operating system kills, zeros in place of what is missing, an error that does not say where."""
    checkpoint, impl = checkpoint_of(tmp_path), Impl()
    with load_from_disk(impl, checkpoint) as w:
        file = open_file(checkpoint.files[0])
        name = "model.layers.0.mlp.down_proj.weight"
        with checkpoint.files[0].open("r+b") as f:
            f.truncate(file.offset(name) + 5)
        with pytest.raises(SpecError, match="cut off") as error:
            w.read(name, FLOAT32, 0, 144)
        assert name in str(error.value) and str(checkpoint.files[0]) in str(error.value)
    with pytest.raises(SpecError, match="truncated"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_numbers_are_checked_when_they_are_read(tmp_path, name):
    """Catches NaN that goes into the logits, from codes or from stored floats."""
    checkpoint, impl = checkpoint_of(tmp_path), Impl()
    with checkpoint.files[0].open("r+b") as f:
        f.seek(open_file(checkpoint.files[0]).offset(name))
        f.write(b"\xff\xff" if name.startswith("lm") else b"\xff")
    with load_from_disk(impl, checkpoint), pytest.raises(SpecError, match="NaN") as error:
        impl.advance(TOKENS, {})
    assert name in str(error.value)


def test_what_cannot_be_streamed_is_refused(case):
    """Catches whole matrices held for quantising, a model that computes in another dtype than its weights, negative memory."""
    with pytest.raises(SpecError, match="quantises"):
        load_from_disk(Impl(precision="fp8"), case)
    with pytest.raises(SpecError, match="plan"):
        Impl(precision="bf16").load(CONFIG, DiskWeights(case, FLOAT32))
    with pytest.raises(SpecError, match="cache of -1"):
        DiskWeights(case, BF16, budget=-1)
    with pytest.raises(SpecError, match=r"0\.\.2"):
        run_layer(DiskWeights(case, FLOAT32), CONFIG, 3, TOKENS)
    with pytest.raises(SpecError, match="expected floats"):
        run_layer(DiskWeights(case, FLOAT32), CONFIG, 1, TOKENS, np.zeros((1, 4, 144)))
    assert not effective({}, FLOAT32)


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 1}, {"tie_word_embeddings": True}], ids=str)
def test_drafts_and_tied_embeddings(tmp_path, changes):
    """Catches the MTP modules or the embedding as a head left out."""
    checkpoint = checkpoint_of(tmp_path, CONFIG.replace(**changes))
    requests = [Request([3, 1, 4], Settings(temperature=0, max_tokens=6))]
    drafts = Speculation(1) if "num_nextn_predict_layers" in changes else None
    held, impl = Impl().load(checkpoint.config, checkpoint), Impl()
    with load_from_disk(impl, checkpoint, budget=1 << 20):
        ours = generate(impl, requests, speculate=drafts)
    theirs = generate(held, requests, speculate=drafts)
    assert (ours[0].tokens, ours[0].logprobs) == (theirs[0].tokens, theirs[0].logprobs)


def test_the_commands(case, capsys, tmp_path):
    """Catches options that are parsed and forgotten: a chain of run-layer, and generate with and without its weights in memory."""
    folder, out = str(case.path), tmp_path / "out.safetensors"
    assert main(["generate", folder, "--tokens", "3,1,4", "--max-tokens", "5"]) == 0
    held = capsys.readouterr().out
    assert main(["generate", folder, "--tokens", "3,1,4", "--max-tokens", "5", "--stream-weights", "0.001"]) == 0
    assert capsys.readouterr().out == held
    assert main(["run-layer", folder, "--layer", "0", "--tokens", "3,1,4,1,5", "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 5 and "bytes read" in said.err
    assert (
        main(["run-layer", folder, "--layer", "1", "--tokens", "3 1 4 1 5", "--input", str(out), "-o", str(out)]) == 0
    )
    assert "experts" in capsys.readouterr().out
    impl = Impl().load(CONFIG, case)
    ids = impl.advance(TOKENS, {}).routing["L1"].ids
    np.testing.assert_array_equal(open_file(out)["ids"], ids)
    for bad in (
        ["--layer", "9"],
        ["--layer", "1", "--precision", "fp8"],
        ["--layer", "1", "--input", str(case.files[0])],
    ):
        assert main(["run-layer", folder, "--tokens", "3", *bad]) == 3
    assert main(["generate", folder, "--tokens", "3", "--stream-weights", "-1"]) == 3


def test_ctrl_c_ends_the_thread(case, capsys, monkeypatch):
    """Catches a program that hangs on Ctrl-C because of its thread, and tokens lost."""
    real, calls = DiskWeights.read, []

    def read(self, name, *args):
        calls.append(name)
        if calls.count("lm_head.weight") == 3:
            raise KeyboardInterrupt
        return real(self, name, *args)

    monkeypatch.setattr(DiskWeights, "read", read)
    assert main(["generate", str(case.path), "--tokens", "3,1,4", "--max-tokens", "9", "--stream-weights"]) == 130
    assert len(capsys.readouterr().out.split()) == 2
    assert "read-ahead" not in [t.name for t in threading.enumerate()]
