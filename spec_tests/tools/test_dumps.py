"""Dumps of other tools as traces. The folders and texts are made here, after their tools' formats, of our own run's numbers."""

import json
import pickle
import shutil

import numpy as np
import pytest

from refimpl.checkpoint import safetensors
from refimpl.cli import main
from refimpl.diff import Case, Trace
from refimpl.diff.judge import judge
from refimpl.record import dumps, trace_case
from refimpl.record.dump_eval_callback import dtype_of

from .test_refimpl_tap import TINY


def imported(source, out, case=TINY, **options):
    return Trace.read(dumps.record(case, out, source=source, **options).path)


# ---- SGLang's dumper


def sglang(folder, *, step="step", tokens=None, rank=0):
    """Our run as SGLang's hooks would dump it: tokens flattened, hidden state and residual apart, (output, None) as one tensor."""
    case = Case.read(TINY)
    taps = {
        t: np.asarray(x).reshape(48, *np.shape(x)[2:])
        for t, x in trace_case(case).taps.items()
        if np.shape(x)[:2] == (2, 24)
    }
    named = {"input_ids": np.asarray(tokens or case.tokens).ravel(), "positions": np.tile(np.arange(24), 2)}
    hook = "non_intrusive__model."
    named[f"{hook}embed_tokens.output"] = taps["fwd/embed"]
    named[f"{hook}norm.output.0"] = taps["fwd/final_norm"]
    for i in range(3):
        at, t = f"{hook}layers.{i}.", lambda tap, i=i: taps[f"fwd/L{i}/{tap}"]
        named[at + "input_layernorm.output" + (".0" if i else "")] = t("attn_norm")
        named[at + "self_attn.fused_qkv_a_proj_with_mqa.output"] = np.concatenate([t("mla.q_a"), t("mla.kv_a")], -1)
        named[at + "self_attn.q_b_proj.output"] = t("mla.q").reshape(48, -1)
        named[at + "self_attn.o_proj.inputs.0"] = t("mla.ctx").reshape(48, -1)
        named[at + "self_attn.o_proj.output"] = t("attn_out")
        named[at + "post_attention_layernorm.output.0"] = t("ffn_norm")
        named[at + "post_attention_layernorm.output.1"] = t("resid_mid")
        named[at + "output.0"], named[at + "output.1"] = t("ffn_out"), t("resid_mid")
    folder.mkdir()
    tags = {step: 0, "rank": rank}
    for n, (name, x) in enumerate(named.items()):
        _file(folder, {**tags, "dump_index": n + 1, "name": name}, x)
    for i in (1, 2):
        _file(
            folder, {**tags, "dump_index": 900 + i, "name": "router.ids", "layer_id": i}, taps[f"fwd/L{i}/router.ids"]
        )
    _file(folder, {**tags, "dump_index": 950, "name": "logits"}, taps["fwd/logits"])
    _file(folder, {**tags, step: 1, "dump_index": 999, "name": "logits"}, 0 * taps["fwd/logits"])
    return folder


def _file(folder, tags, x):
    stem = "___".join(f"{k}={v}" for k, v in tags.items())
    safetensors.write_file(folder / f"{stem}.safetensors", {"value": np.ascontiguousarray(x)})


@pytest.mark.parametrize("step", ["step", "forward_pass_id"])
def test_sglangs_folder_becomes_a_trace_that_conforms(step, tmp_path):
    """Catches a sum of hidden state and residual that is not made, a fused projection cut in the wrong place, the second
    forward pass instead of the first.
    """
    trace = imported(sglang(tmp_path / "dump", step=step), tmp_path / "t")
    per_layer = {"attn_norm", "mla.q_a", "mla.kv_a", "mla.q", "mla.ctx", "attn_out", "ffn_norm", "resid_mid", "resid"}
    assert {t.rpartition("/")[2] for t in trace.taps} == per_layer | {"embed", "final_norm", "logits", "router.ids"}
    assert len(trace.taps) == 3 * len(per_layer) + 5
    assert judge(Case.read(TINY), trace).verdict == "CONFORMS"
    assert "of several forward passes the first, 0" in trace.header.notes and "router.weights" in trace.header.notes


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 3}, "tensors of ranks 0, 3"),
        ({"tokens": [[7] * 24] * 2}, r"of other tokens: \[7 7"),
    ],
)
def test_sglangs_folder_of_another_run_is_refused(change, complaint, tmp_path):
    """Catches parts of tensors taken for tensors, and a run of other tokens called wrong in every tap."""
    folder = sglang(tmp_path / "dump", tokens=change.get("tokens"))
    if "rank" in change:
        _file(folder, {"step": 0, "rank": 3, "dump_index": 1, "name": "x"}, np.ones(2))
    with pytest.raises(ValueError, match=complaint):
        imported(folder, tmp_path / "t")


# ---- SGLang's dumper on several ranks


def shares(n):
    """name -> what each of n tensor-parallel ranks of SGLang has of our run: cut by hand, and sums as each rank's own products."""
    case = Case.read(TINY)
    run = trace_case(case).taps
    taps = {t: np.asarray(x).reshape(48, *np.shape(x)[2:]) for t, x in run.items() if np.shape(x)[:2] == (2, 24)}
    w = {name: np.asarray(x, np.float32) for name, x in case.weights().items()}
    found = {"input_ids": np.asarray(case.tokens).ravel(), "logits": taps["fwd/logits"]}

    def rows(x, name):  # a product by rows: every rank's channels with its part of the matrix
        return [a @ b.T for a, b in zip(np.split(x, n, 1), np.split(w[name], n, 1), strict=True)]

    def mlp(at, gate, up, act, weight):
        halves = zip(*(np.split(x, n, 1) for x in (gate, up)), strict=True)
        found[f"{at}.gate_up_proj.output"] = [np.concatenate(pair, 1) for pair in halves]
        found[f"{at}.down_proj.inputs.0"] = np.split(act, n, 1)
        found[f"{at}.output"] = found[f"{at}.down_proj.output"] = rows(act, weight)

    for i in range(3):
        at, t = f"layers.{i}.", lambda tap, i=i: taps[f"fwd/L{i}/{tap}"]
        here = f"model.layers.{i}.mlp."
        heads, ctx = t("mla.q").shape[1] // n, t("mla.ctx").reshape(48, -1)
        found[at + "self_attn.q_b_proj.output"] = [
            t("mla.q")[:, r * heads :][:, :heads].reshape(48, -1) for r in range(n)
        ]
        found[at + "self_attn.rotary_emb.output.0"] = [t("mla.q_rope")[:, r * heads :][:, :heads] for r in range(n)]
        found[at + "self_attn.rotary_emb.output.1"] = t("mla.k_rope")
        found[at + "self_attn.o_proj.inputs.0"] = np.split(ctx, n, 1)
        found[at + "self_attn.o_proj.output"] = rows(ctx, f"model.layers.{i}.self_attn.o_proj.weight")
        found[at + "post_attention_layernorm.output.0"] = t("ffn_norm")
        found[at + "post_attention_layernorm.output.1"] = found[at + "output.1"] = t("resid_mid")
        if i:
            shared = [t(f"shared.{x}") for x in ("gate", "up", "act")]
            mlp(at + "mlp.shared_experts", *shared, here + "shared_experts.down_proj.weight")
            found[at + "mlp.output"] = found[at + "output.0"] = t("ffn_out")  # behind its all-reduce
        else:
            mlp(at + "mlp", t("mlp.gate"), t("mlp.up"), t("mlp.act"), here + "down_proj.weight")
            found[at + "output.0"] = found[at + "mlp.output"]
    hooked = {f"non_intrusive__model.{k}" if k.startswith("layers") else k: x for k, x in found.items()}
    return {k: x if isinstance(x, list) else [x] * n for k, x in hooked.items()}


def ranked(folder, held, n=2, order=None, **info):
    """The folder that n ranks write, each into the same one; rank k's place is order[k]."""
    folder.mkdir()
    for r in range(n):
        place = (order or range(n))[r]
        meta = {"world_rank": r, "sglang_parallel_info": {"tp_rank": place, "tp_size": n, **info}}
        for k, (name, parts) in enumerate(held.items()):
            stem = f"step=0___rank={r}___dump_index={k + 1}___name={name}___recompute_status=disabled"
            x = np.ascontiguousarray(parts[place])
            safetensors.write_file(folder / f"{stem}.safetensors", {"value": x}, {"meta": json.dumps(meta)})
    return folder


@pytest.mark.parametrize(("n", "order"), [(2, None), pytest.param(4, [2, 0, 3, 1], marks=pytest.mark.slow)])
def test_sglangs_ranks_are_put_together(n, order, tmp_path):
    """Catches heads in the wrong order, gate and up cut in the middle of the ranks, a residual that is added once a rank, a sum
    that is taken although the all-reduce has been.
    """
    trace = imported(ranked(tmp_path / "dump", shares(n), n, order), tmp_path / "t.safetensors")
    run = trace_case(Case.read(TINY)).taps
    for tap in (
        "mla.q",
        "mla.q_rope",
        "mla.k_rope",
        "mla.ctx",
        "ffn_norm",
        "resid_mid",
        "shared.gate",
        "shared.up",
        "shared.act",
    ):
        np.testing.assert_array_equal(trace.taps[f"fwd/L1/{tap}"].ravel(), np.ravel(run[f"fwd/L1/{tap}"]), err_msg=tap)
    for tap in ("L0/mlp.gate", "L0/mlp.up", "L0/mlp.act"):
        np.testing.assert_array_equal(trace.taps[f"fwd/{tap}"].ravel(), np.ravel(run[f"fwd/{tap}"]), err_msg=tap)
    for tap in ("L0/attn_out", "L0/ffn_out", "L0/resid", "L1/moe.shared", "L2/resid"):
        e = np.ravel(run[f"fwd/{tap}"])
        np.testing.assert_allclose(trace.taps[f"fwd/{tap}"].ravel(), e, rtol=0, atol=1e-5 * abs(e).max(), err_msg=tap)
    assert f"{n} tensor-parallel ranks put together" in trace.header.notes and not trace.header.parallel
    judgement = judge(Case.read(TINY), trace)
    assert judgement.verdict == "CONFORMS", [f for f in judgement.findings if not f.ok]


def test_a_part_that_a_rank_computed_wrongly_is_found(tmp_path):
    """Catches ranks of which only the first counts: the second's part of o_proj is doubled."""
    held = shares(2)
    name = "non_intrusive__model.layers.1.self_attn.o_proj.output"
    held[name] = [held[name][0], 2 * held[name][1]]
    trace = imported(ranked(tmp_path / "dump", held), tmp_path / "t.safetensors")
    assert {f.tap for f in judge(Case.read(TINY), trace).culprits} >= {"fwd/L1/attn_out"}


def test_replicas_that_disagree_are_left_to_the_diff(tmp_path):
    """Catches a norm that ranks compute differently, of which the importer shows one: a bug between ranks is a bug."""
    held = shares(2)
    name = "non_intrusive__model.layers.1.post_attention_layernorm.output.0"
    held[name] = [held[name][0], held[name][1] * np.float32(1.01)]
    folder = ranked(tmp_path / "dump", held)
    found = dumps.record(TINY, tmp_path / "t.safetensors", source=folder)
    assert sorted(p.name for p in found.path.iterdir()) == ["rank-0-of-2.safetensors", "rank-1-of-2.safetensors"]
    judgement = judge(Case.read(TINY), Trace.read(found.path))
    (gate,) = [g for g in judgement.gates if g.name == "ranks"]
    assert gate.state == "FAIL" and "fwd/L1/ffn_norm" in gate.text and judgement.verdict == "DIVERGES"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pp_size": 2}, "it is of pp 2"),
        ({"attn_dp_size": 4}, "it is of attn_dp 4"),
        ({"tp_size": 4}, r"at tp \[0, 1\] of \[4, 4\]"),
        ({"tp_rank": 0}, r"at tp \[0, 0\]"),
        ({"tp_rank": "0"}, r"at tp \['0', '0'\]"),
    ],
)
def test_ranks_of_another_kind_are_refused(change, complaint, tmp_path):
    """Catches layers of pipeline stages, tokens of data-parallel attention, or half of the ranks, put together as heads."""
    held = {"logits": shares(2)["logits"]}
    with pytest.raises(ValueError, match=complaint):
        imported(ranked(tmp_path / "dump", held, **change), tmp_path / "t")


def test_what_some_ranks_lack_is_said_and_parts_that_do_not_fit_are_refused(tmp_path):
    """Catches half of the heads taken for all of them; and a shape error of NumPy's instead of the name of the tensor."""
    held = shares(2)
    folder, name = ranked(tmp_path / "dump", held), "non_intrusive__model.layers.0.self_attn.q_b_proj.output"
    next(f for f in folder.iterdir() if "rank=1" in f.name and f"name={name}" in f.name).unlink()
    trace = imported(folder, tmp_path / "t.safetensors")
    assert "fwd/L0/mla.q" not in trace.taps and f"{name} was dumped by 1 of 2 ranks" in trace.header.notes
    held[name] = [held[name][0], held[name][1][:5]]
    with pytest.raises(
        ValueError, match=r"ranks hold shapes \(48, 40\) and \(5, 40\), .*\n  in non_intrusive__.*q_b_proj"
    ):
        imported(ranked(tmp_path / "other", held), tmp_path / "u")


# ---- llama.cpp's eval-callback


def printed(nodes, n):
    """The text that eval-callback prints of nodes (name, array of four axes, slowest first): n entries at either end of an axis."""
    lines = ["load: some other line"]
    for name, x in nodes:
        kind = "i32" if x.dtype.kind == "i" else "f32"
        ne = ", ".join(str(k) for k in reversed(x.shape))
        lines.append(f"ggml_debug: {name:>24} = ({kind})    MUL_MAT(blk.0.w{{4, 4, 1, 1}}, z{{{ne}}}}}) = {{{ne}}}")
        for block in x:
            lines.append("    [")
            lines += [line for plane in _ends(block, n, "        ...,") for line in _plane(plane, n)]
            lines += ["    ]", f"    sum = {float(block.sum()):f}"]
    return "\n".join(lines) + "\n"


def _plane(plane, n):
    if isinstance(plane, str):
        return [plane]
    rows = _ends(plane, n, "            ...,")
    texts = [r if isinstance(r, str) else "            [" + ", ".join(_numbers(r, n)) + "  ]," for r in rows]
    return ["        [", *texts, "        ],"]


def _numbers(row, n):
    return [v if isinstance(v, str) else f"{float(v):12.4f}" for v in _ends(row, n, "   ...")]


def _ends(items, n, gap):
    items = list(items)
    return items if len(items) <= 2 * n else [*items[:n], gap, *items[-n:]]


@pytest.fixture
def short(tmp_path):
    """The case with one sequence of six tokens."""
    folder = tmp_path / "case"
    folder.mkdir()
    for name in ("config.json", "weights.safetensors"):
        shutil.copy(TINY / name, folder / name)
    tokens = Case.read(TINY).tokens[0][:6]
    (folder / "tokens.json").write_text(json.dumps({"tokens": [tokens]}))
    return folder


def llama_nodes(folder):
    """Our run, absorbed, as nodes of llama.cpp."""
    taps = trace_case(Case.read(folder), attend="absorbed").taps
    for i in range(3):
        for name, tap in (
            ("attn_norm", "attn_norm"),
            ("kv_cmpr_pe", "mla.kv_a"),
            ("ffn_norm", "ffn_norm"),
            ("l_out", "resid"),
        ):
            yield f"{name}-{i}", np.asarray(taps[f"fwd/L{i}/{tap}"])[None]
        yield f"q_pe-{i}", np.zeros((1, 6, 4, 8), np.float32)  # before rotation
        yield f"q_pe-{i}", np.asarray(taps[f"fwd/L{i}/mla.q_rope"])
        if i:
            yield f"ffn_moe_topk-{i}", np.asarray(taps[f"fwd/L{i}/router.ids"])[None].astype(np.int32)
            yield f"ffn_moe_weights_scaled-{i}", np.asarray(taps[f"fwd/L{i}/router.weights"]).reshape(1, 6, -1, 1)
    yield "result_output", np.asarray(taps["fwd/logits"])[None]


def test_a_text_printed_whole_becomes_a_trace_judged_at_four_decimals(short, tmp_path):
    """Catches four decimals judged as if they were float32, the first node of a name taken for the second, axes in another
    order.
    """
    text = tmp_path / "log.txt"
    text.write_text(printed(llama_nodes(short), 10**6))
    trace = imported(text, tmp_path / "t", case=short)
    assert len(trace.taps) >= 15 and trace.header.layouts == {"mla": "absorbed"}
    assert {trace.header.precision[t] for t in trace.taps if trace.taps[t].dtype.kind == "f"} <= {"float16", "bfloat16"}
    found = judge(Case.read(short), trace)
    assert found.verdict == "CONFORMS", found.culprits


def test_of_a_text_as_the_program_prints_it_only_what_is_whole_is_used(short, tmp_path):
    """Catches tensors with a gap in them filled with something, and an import that says nothing of what it left out."""
    text = tmp_path / "log.txt"
    text.write_text(printed(llama_nodes(short), 3))
    trace = imported(text, tmp_path / "t", case=short)
    assert {t.rpartition("/")[2] for t in trace.taps} == {"router.ids", "router.weights"}
    assert trace.taps["fwd/L1/router.ids"].dtype == np.int64
    assert "nodes are printed in short and were left out" in trace.header.notes


def test_texts_that_say_nothing_or_stop_are_refused(short, tmp_path):
    """Catches an empty trace, and half a tensor of a log that was cut."""
    text, whole = tmp_path / "log.txt", list(llama_nodes(short))
    text.write_text(printed([n for n in whole if n[0].startswith("attn")], 3))
    with pytest.raises(ValueError, match="all of them printed in short: `refimpl record llamacpp --gguf FILE`"):
        imported(text, tmp_path / "t", case=short)
    text.write_text("\n".join(printed(whole, 3).splitlines()[:-2]))
    with pytest.raises(ValueError, match="ends in the middle of node 'result_output'"):
        imported(text, tmp_path / "t", case=short)
    text.write_text(printed(whole, 3))
    with pytest.raises(ValueError, match="shows one sequence; the case has 2"):
        imported(text, tmp_path / "t")


@pytest.mark.parametrize(("size", "name"), [(1.0, "float16"), (0.05, "bfloat16"), (0.001, ""), (0.0, "")])
def test_four_decimals_are_as_good_as_the_smallest_row_allows(size, name):
    """Catches a dtype chosen by the largest row, which would call rounding in the smallest a fault. By hand: 5e-5 against
    2^-11 size and 2^-9 size.
    """
    assert dtype_of(np.stack([np.full(8, size), np.ones(8)]).astype(np.float32)) == name


# ---- What is refused


def test_pickles_are_refused_with_the_way_out_and_are_not_run(tmp_path, capsys):
    """Catches an unpickler: the file would write another one."""
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (ran.write_text, ("run",))

    (tmp_path / "taps.pkl").write_bytes(pickle.dumps({"x": Bomb()}))
    (tmp_path / "taps.pkl.again.pt").write_bytes(pickle.dumps({"x": Bomb()}))
    for source in (tmp_path, tmp_path / "taps.pkl"):
        assert main(["record", "import", str(TINY), "--from", str(source), "-o", str(tmp_path / "t")]) == 3
        said = capsys.readouterr().err
        assert "a pickle is a program" in said and "refimpl record tap-file" in said
    assert not ran.exists() and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("name", "complaint"), [("nowhere", "no such file or folder"), ("a.txt", "not a dump of SGLang's")]
)
def test_what_is_no_dump_is_refused(name, complaint, tmp_path, capsys):
    """Catches a traceback, and an empty trace."""
    (tmp_path / "a.txt").write_text("hello\n")
    assert main(["record", "import", str(TINY), "--from", str(tmp_path / name), "-o", str(tmp_path / "t")]) == 3
    assert complaint in capsys.readouterr().err


def test_a_debuggers_folder_whose_tensors_were_only_printed_is_refused(tmp_path, capsys):
    """Catches numbers of four digits with gaps, read from the JSON as if they were tensors."""
    (tmp_path / "Model_debug_tree_FULL_TENSORS.json").write_text("{}")
    assert main(["record", "import", str(TINY), "--from", str(tmp_path), "-o", str(tmp_path / "t")]) == 3
    assert "use_repr=False" in capsys.readouterr().err
