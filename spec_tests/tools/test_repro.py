"""`refimpl repro`: a folder that shows a finding without us; and the plain NumPy it is made of, which is the stages' own source."""

import ast
import dataclasses
import functools
import json
import runpy
import subprocess
import sys
import zlib

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.cli import main
from refimpl.diff import Trace
from refimpl.diff.examined import examine, examined
from refimpl.diff.judge import judge
from refimpl.diff.plain import HEAD, function_of, literal, plain
from refimpl.diff.repro import repro
from refimpl.layers import STAGES
from refimpl.layers.precision import FLOAT64
from refimpl.layers.rope import RopeScaling
from refimpl.layers.stage import Patch, observing
from refimpl.model import ForCausalLM, effective
from refimpl.record import trace_case
from refimpl.spec_tests.cases import variants
from refimpl.spec_tests.cases.mtp import mtp_case

from .test_diff_partial import TINY, case, only, recording

LIBRARIES = {"math", "sys", "pathlib", "types", "numpy"}
VALID = [[0, *[1] * 11], [1] * 12]
NO_TAP = {
    **dict.fromkeys(["loss.main", "loss.mtp", "loss.total", "loss.seq_aux"], "a judged run has no labels"),
    **dict.fromkeys(["router.counts", "router.bias_update"], "bookkeeping of a training step"),
    **{
        f"cache.{n}": "a judged run starts without a cache"
        for n in ("c_kv", "k_rope", "positions", "documents", "valid")
    },
    "mtp.documents": "a case holds no packed documents",
    **dict.fromkeys(
        [n for n in STAGES if n.startswith(("int8.", "variant."))], "described in articles: no model calls them"
    ),
    **{
        f"optim.{n}": "a judged run without an optimiser"
        for n in ("grad_norm", "clip", "exp_avg", "exp_avg_sq", "step", "before")
    },
}
"""Stages that are no tap of a judged forward run, and why; their plain NumPy is tested all the same."""


@pytest.fixture(scope="module")
def mtp():
    return dataclasses.replace(mtp_case(), valid=VALID)


# ---- Plain NumPy


def calls_of(mtp):
    """Calls of every stage of a training step with packed, padded documents, of cached decoding and of absorbed attention."""
    seen = {}

    def note(stage, run, /, *args, **static):
        kept = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
        seen.setdefault(stage.name, []).append((kept, static))
        return run(*args, **static)

    model = ForCausalLM.from_weights(mtp.config, effective(mtp.weights(), FLOAT64))
    valid, documents = VALID, [[0] * 6 + [1] * 6, [0] * 12]
    with observing(note):
        inputs = model.inputs(mtp.tokens, None, valid, documents, mtp.tokens)
        model.forward_and_loss(inputs, mtp_weight=0.3, aux_weight=0.1)
        cache = model(model.inputs(mtp.tokens, None, valid, documents), attend="absorbed").cache
        more = model.inputs([[5], [6]], None, [[1], [1]], [[1], [0]], cache=cache)
        model(more, cache, attend="absorbed")
    seen["router.counts"] = [([np.array([[[1, 3], [0, 3]]])], {"n_experts": 5})]
    seen["router.bias_update"] = [
        ([np.linspace(-1, 1, 4), np.array([1, 5, 3, 3])], {"gamma": 0.1, "zero_sum": z}) for z in (True, False)
    ]
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 6)) * 4, rng.normal(size=(5, 6))
    seen["int8.mixed_linear"] = [([x, w], {"threshold": 6.0})]
    seen["int8.scale"], seen["int8.fake_quant"] = [([x], {})], [([x, np.abs(x).max(-1, keepdims=True) / 99], {})]
    seen["optim.grad_norm"], seen["optim.clip"] = [([x, w], {})], [([w, np.array(9.0)], {"max_norm": 2.0})]
    seen["optim.exp_avg"] = seen["optim.exp_avg_sq"] = [([x, before], {"beta": 0.9}) for before in (None, x)]
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1, "steps": 3}
    seen["optim.step"], seen["optim.before"] = [([x, x, x * x], settings)], [([x], {})]
    described = variants.calls(rng, B=2, S=3, T=5, D=4, E=6, K=2, V=7)
    return seen | {name: [call] for name, call in described.items()}


def test_every_stage_is_written_in_plain_numpy_and_computes_the_same(mtp):
    """Catches a stage that cannot be written out, a helper of the same name taken for another, a vjp's leftovers. The oracle is
    the stage itself, bit by bit.
    """
    seen = calls_of(mtp)
    for name, stage in STAGES.items():
        namespace = {}
        exec(HEAD + plain([name]), namespace)
        assert name in seen, name
        for args, static in seen[name]:
            with np.errstate(all="ignore"):
                ours = namespace[function_of(name)](*args, **static)
                theirs = stage.fn(*args, **static)
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_the_text_needs_nothing_of_ours():
    """Catches an annotation, a decorator or a check that is left in, and names that nothing defines."""
    nodes = list(ast.walk(ast.parse(HEAD + plain(STAGES))))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    assert not any(n.decorator_list or n.returns for n in functions) and not any(
        isinstance(n, ast.AnnAssign) for n in nodes
    )
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    assert not names & {"Tensor", "primitive", "data_of", "require", "SpecError", "_kernel"}


def test_settings_are_written_out():
    """Catches a setting whose text is not Python, or means something else."""
    for value in (1, 2.5, 1e-20, True, None, "sigmoid"):
        assert eval(literal(value)) == value
    assert eval(literal(-np.inf), {"float": float}) == -np.inf
    assert eval(literal(np.float64), {"np": np}) is np.float64
    from types import SimpleNamespace

    yarn = eval(literal(RopeScaling()), {"SimpleNamespace": SimpleNamespace})
    assert yarn.factor == 40.0 and yarn.attention_factor == RopeScaling().attention_factor
    with pytest.raises(SpecError, match="cannot be written out"):
        literal(object())


def _uses_a_class(x):
    return np.zeros(3) if isinstance(x, Patch) else x


def test_what_is_not_plain_numpy_is_refused():
    """Catches a script that fails where it is run, instead of a refusal where it is written."""
    _uses_a_class.__globals__["Patch"] = Patch
    with pytest.raises(SpecError, match="_uses_a_class uses Patch"):
        plain([], [_uses_a_class])


# ---- The folder


def spoiled(tap, a):
    """The tap with its middle row changed: another set, another mask, numbers 5 to 20 % larger."""
    a = np.array(a)
    row = tuple(n // 2 for n in a.shape[:-1])
    if tap.endswith(("router.ids", "router.groups")):
        a[row] = (a[row] + 1) % (16 if tap.endswith("ids") else 4)
    elif a.dtype.kind in "iu":
        a[row] += 1
    elif tap.endswith("mask"):
        a[row] = np.where(np.isneginf(a[row]), 0, -np.inf)
    else:
        rng = np.random.default_rng(zlib.crc32(tap.encode()))
        wrong = a[row] * rng.uniform(1.05, 1.2, a.shape[-1]).astype(a.dtype)
        a[row] = np.where(np.isfinite(a[row]), wrong, a[row])
    return a


def every_tap_wrong(c, attend):
    trace = trace_case(c, attend=attend)
    return judge(c, Trace(trace.header, {t: spoiled(t, a) for t, a in trace.taps.items()}))


def isolated(folder):
    """The script as somebody else runs it: another folder, no environment, no packages of the user."""
    command = [sys.executable, "-I", str(folder / "repro.py")]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60)


def with_candidate(folder, body):
    """The script's exit code after somebody put a function of theirs in the place of `candidate`, run in this process."""
    text = (folder / "repro.py").read_text()
    assert text.count('return a["candidate"]') == 1
    path = folder / "edited.py"
    path.write_text(text.replace('return a["candidate"]', body))
    return int(runpy.run_path(str(path))["main"]())


def isolated_all(folders):
    """The exit codes of many scripts, as `isolated` runs one, in one interpreter."""
    code = """if True:
        import contextlib, io, json, runpy, sys
        codes = []
        for path in sys.argv[1:]:
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    runpy.run_path(path, run_name="__main__")
                except SystemExit as end:
                    codes.append(end.code)
        print(json.dumps([codes, sorted(m for m in sys.modules if m.startswith("refimpl"))]))"""
    paths = [str(folder / "repro.py") for folder in folders]
    ran = subprocess.run(
        [sys.executable, "-I", "-c", code, *paths], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    codes, ours = json.loads(ran.stdout)
    assert ours == []
    return codes


ABSORBED = {"mla.q_absorbed", "mla.scores_absorbed", "mla.ctx_latent", "mla.ctx_absorbed"}
RIGHT = "return np.float32(e) if (e := expected(dict(a))).dtype.kind == 'f' else e"


@pytest.mark.slow
@pytest.mark.parametrize("attend", ["expanded", "absorbed"])
def test_every_stage_has_a_script_that_shows_it(mtp, tmp_path, attend, capsys):
    """Catches a stage without reproducer, one that needs this package, one that says 0 to a wrong candidate or 1 to a right one.

    Every tap of a small model with MTP is made wrong; one tap a stage is written out and run by `python -I`. The right candidate
    is the stage in float32.
    """
    judgement, folders = every_tap_wrong(mtp, attend), {}
    for f in judgement.findings:  # a row in the middle of the dispatched ones may be padding's, which is not judged
        if not f.ok and f.stage not in folders and (attend == "expanded" or f.stage in ABSORBED):
            folders[f.stage] = tmp_path / f.stage
            made = repro(examined(judgement, f.tap))
            made.write(folders[f.stage])
            assert made.differs, f.stage
    assert dict(zip(folders, isolated_all(folders.values()), strict=True)) == dict.fromkeys(folders, 1)
    assert {name: with_candidate(folder, RIGHT) for name, folder in folders.items()} == dict.fromkeys(folders, 0)
    assert all(set(ast_imports(folder / "repro.py")) <= LIBRARIES for folder in folders.values())
    expected = set(STAGES) - set(NO_TAP) - (ABSORBED if attend == "expanded" else set(STAGES) - ABSORBED)
    assert set(folders) == expected
    capsys.readouterr()


def ast_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node.module if isinstance(node, ast.ImportFrom) else node.names[0].name


def test_stages_of_no_forward_run_are_refused():
    """Catches a stage that is silently absent: what the loop above does not reach is no tap of a judged run."""
    x = judge(case(), recording("hf-float32"))
    for tap in ("loss.main", "L1/router.counts", "L1/cache.c_kv", "L1/router.bias"):
        with pytest.raises(SpecError, match="this run has no tap"):
            examined(x, tap)


@pytest.mark.parametrize(
    "asked, meant",
    [
        ("router.weights", "fwd/L1/router.weights"),
        ("L1/router.weight", "fwd/L1/router.weights"),
        ("model.layers.2.self_attn.q_a_proj", "fwd/L2/mla.q_a (as transformers calls it)"),
        ("nothing.of.the.kind", ""),
    ],
)
def test_a_tap_that_is_not_there_is_told_from_the_one_that_was_meant(asked, meant):
    """Catches a bare refusal of a name that lacks its layer, or that is another framework's; and a guess at nonsense."""
    with pytest.raises(SpecError) as refused:
        examined(judge(case(), recording("hf-float32")), asked)
    said = f", did you mean {meant}" if meant else ""
    assert str(refused.value).startswith(f"this run has no tap {asked!r}{said};")


@functools.cache
def bug():
    return judge(case(), recording("hf-bug"))


def test_inputs_are_the_least_that_shows_it(tmp_path):
    """Catches whole sequences in a bug report: one token of 48, one head of 4, one number where the stage gives it alone."""
    made = repro(examined(bug(), "L1/router.weights"))
    assert {n: a.shape for n, a in made.arrays.items()} == {
        "fwd/L1/router.scores": (1, 1, 16),
        "fwd/L1/router.ids": (1, 1, 4),
        "candidate": (1, 1, 4),
    }
    wrong = trace_case(
        case(), patches=[Patch("mla.kv_b", lambda c, w, *, n_heads: STAGES["mla.kv_b"].fn(c, w, n_heads=n_heads) * 2)]
    )
    made = repro(examine(case(), wrong, "L1/mla.kv_b"))
    assert {n.rpartition(".")[2]: a.shape for n, a in made.arrays.items()} == {
        "c_kv": (1, 1, 20),
        "weight": (1, 20),
        "candidate": (1, 1, 1, 1),
    }
    made.write(tmp_path)
    with np.load(tmp_path / "inputs.npz", allow_pickle=False) as file:
        assert {n: file[n].dtype.kind for n in file.files} == {n: a.dtype.kind for n, a in made.arrays.items()}


def test_the_script_measures_as_the_diff_does(tmp_path):
    """Catches another size of the row, another row, another limit: where one number alone is within, the row is shown, as off as
    the finding says.
    """
    taps = dict(recording("hf-float32").taps)
    taps["fwd/L1/moe.shared"] = np.array(taps["fwd/L1/moe.shared"])
    rng = np.random.default_rng(0)
    e = taps["fwd/L1/moe.shared"][1, 3]
    taps["fwd/L1/moe.shared"][1, 3] += (1e-6 * np.linalg.norm(e) / np.sqrt(48) * np.sign(rng.normal(size=48))).astype(
        np.float32
    )
    x = examine(case(), Trace(recording("hf-float32").header, taps), "L1/moe.shared")
    assert not x.finding.ok
    repro(x).write(tmp_path)
    ran = isolated(tmp_path)
    assert (
        ran.returncode == 1
        and f"off by     {x.finding.error:.3e}" in ran.stdout
        and f"allowed {x.finding.allowed:.3e}" in ran.stdout
    )


@pytest.mark.parametrize("tap", ["L1/mla.ctx", "L1/ffn_norm"])
def test_the_row_of_a_number_is_shown_where_the_number_alone_is_within(tap):
    """Catches another row than the one that was asked for, in taps of three axes and of four; a right one called wrong."""
    tap, taps = f"fwd/{tap}", dict(recording("hf-float32").taps)
    a = taps[tap] = np.array(taps[tap])
    row = tuple(n - 1 for n in a.shape[:-1])
    a[row] *= 1 + 4e-6 * np.sign(np.random.default_rng(1).normal(size=a.shape[-1])).astype(np.float32)
    x = examine(case(), Trace(recording("hf-float32").header, taps), tap)
    made = repro(x, (*row, 1))
    assert not x.finding.ok and made.differs
    assert made.arrays["candidate"].shape[-1] == a.shape[-1] and made.shown.startswith(f"{tap} {list(row)},")
    assert not repro(x, (*[0] * len(row), 1)).differs


def test_a_lean_is_shown_on_all_rows(tmp_path):
    """Catches a finding of the whole tap that no single row can show: an epsilon within every row's rounding in bfloat16."""
    off = Patch("mla.c_kv", lambda kv, w, *, eps: STAGES["mla.c_kv"].fn(kv, w, eps=eps) * 1.0035)
    x = examine(case(), trace_case(case(), precision="bf16", patches=[off]), "L1/mla.c_kv")
    assert not x.finding.ok and x.finding.error <= x.finding.allowed
    repro(x).write(tmp_path)
    ran = isolated(tmp_path)
    assert ran.returncode == 1 and "one way" in ran.stdout
    assert with_candidate(tmp_path, "return expected(dict(a))") == 0


def test_a_region_is_written_out_stage_by_stage(tmp_path):
    """Catches a coarse trace without reproducer: the script then holds every stage that was not recorded apart."""
    few = only(recording("hf-bug"), lambda t: t.endswith(("resid", "fwd/logits")))
    made = repro(examine(case(), few, "L1/resid"))
    made.write(tmp_path)
    assert isolated(tmp_path).returncode == 1
    assert "def router_ids(" in made.script and "def mla_probs(" in made.script
    assert with_candidate(tmp_path, "return expected(dict(a))") == 0


def test_nan_is_shown(tmp_path):
    """Catches NaN that compares as within."""

    def spoil(p, kv, *, v_dim):
        y = np.array(STAGES["mla.ctx"].fn(p, kv, v_dim=v_dim))
        y[0, 3, 1, 2] = np.nan
        return y

    with np.errstate(all="ignore"):
        x = examine(case(), trace_case(case(), patches=[Patch("mla.ctx", spoil)]), "L0/mla.ctx")
    made = repro(x)
    made.write(tmp_path)
    assert "[0, 3, 1, 2]" in made.shown and isolated(tmp_path).returncode == 1


def test_command_line(tmp_path, capsys):
    """Catches a folder half written, an index that is ignored, and a reader who is not told that the script will exit 0."""
    args = ["repro", str(TINY), str(TINY / "hf-bug.safetensors"), "L1/router.weights"]
    assert main([*args, "1,2,0", "-o", str(tmp_path / "new" / "folder")]) == 0
    shown = capsys.readouterr()
    assert "fwd/L1/router.weights [1, 2, 0]" in shown.out and shown.err == ""
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["inputs.npz", "repro.py"]
    assert main(["repro", str(TINY), str(TINY / "hf-bug.safetensors"), "L1/resid", "-o", str(tmp_path / "ok")]) == 0
    assert "the script exits 0" in capsys.readouterr().err
    assert isolated(tmp_path / "ok").returncode == 0
    assert main([*args, "-1,-1,-1", "-o", str(tmp_path / "out")]) == 3 and "outside shape" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*args, "-o", str(tmp_path / "file")]) == 3 and "cannot be made" in capsys.readouterr().err
