"""Test vectors: complete, the same on every machine, judged as the diff judges, and readable without us."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refimpl.autograd import SpecError, Tensor, backward
from refimpl.checkpoint import safetensors
from refimpl.cli import main
from refimpl.layers.stage import STAGES
from refimpl.model import Impl
from refimpl.parallel_emulation.comm import launcher
from refimpl.record.regimes import REGIMES
from refimpl.vectors import (
    Vectors,
    all_runs,
    entries,
    loops_experts,
    loops_fp8,
    read_vectors,
    runs,
    second,
    write_vectors,
)
from refimpl.vectors.limits import rounded_up

from .tree import HERE, ROOT, in_repository, interpreter, python

SAMPLE = "plain/float32/[fcs]*"
"""Forward, chunk and step."""
FREE = ("variant.", "int8.", "optim.before", "cache.documents", "cache.valid", "mtp.documents")
"""Stages that no run of a case has: other mechanisms, what is only given, what packed documents need."""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The vectors of three runs."""
    folder = tmp_path_factory.mktemp("vectors") / "out"
    write_vectors(folder, only=SAMPLE)
    return Vectors(folder)


def ours(vector, impl):
    """What an implementation gives for a vector of a stage."""
    settings = {k: float(v) if v in ("inf", "-inf") else v for k, v in vector.settings.items()}
    return np.asarray(impl.stage(vector.entry["stage"], vector.inputs, settings), np.float64)


def test_every_stage_of_the_sample_is_ours(sample):
    """Catches inputs that are not those of the expected numbers, settings that were lost on the way to JSON, limits too tight."""
    impl = Impl(precision="float32")
    assert {v.id: v.judge(ours(v, impl)) for v in sample} == {v.id: "" for v in sample}


@pytest.mark.parametrize("by", [1 + 1e-5, -1])
def test_a_wrong_output_is_told(sample, by):
    """Catches a judge that passes whatever it is given."""
    impl = Impl(precision="float64")
    numbers = [v for v in sample if v.entry["kind"] == "value"]
    assert len(numbers) > 100
    assert not [v.id for v in numbers if not v.judge(by * ours(v, impl))]


def test_a_lean_within_every_row_s_limit_is_told(sample):
    """Catches truncation where rounding is meant: each row is within its limit, all are too small."""
    v = sample["plain/float32/forward/moe.down"]
    limit, lean = v.entry["limit"], v.entry["lean"]
    assert lean < limit
    assert "leans" in v.judge(v.expected.astype(np.float64) * (1 - (lean + limit) / 2))


def test_codes_sets_and_elements_are_judged_each_in_its_way(sample):
    """Catches an order of experts that counts, a wrong expert that does not, a shape, NaN."""
    ids = sample["plain/float32/forward/router.ids"]
    assert not ids.judge(ids.expected[..., ::-1])
    assert ids.judge(np.where(ids.expected == ids.expected[0, 0, 0], 1 + ids.expected, ids.expected))
    norm = sample["plain/float32/forward/attn_norm"]
    assert "shape" in norm.judge(norm.expected[0]) and "NaN" in norm.judge(norm.expected * np.nan)
    assert read_vectors._each(np.array([1.0, 2.1]), np.array([1.0, 2.0]), {"limit": 0.01})
    assert not read_vectors._same(np.array([1.0, 2.1]), np.array([1.0, 2.0]), {"limit": 1})
    assert read_vectors._same(np.array([1.0, 2.1]), np.array([1.0, 2.0]), {"limit": 0})


def test_a_masked_score_may_be_any_large_negative_number(sample):
    """Catches a judge that wants -inf where engines write -1e30, and one that takes 0 for it."""
    v = sample["plain/float32/forward/mla.scores"]
    assert not v.judge(np.maximum(v.expected, -1e30)) and v.judge(np.where(np.isneginf(v.expected), 0, v.expected))


def test_every_second_computation_agrees_and_a_changed_number_is_told(sample):
    """Catches a check that cannot fail."""
    assert not [v.id for v in sample if v.verify()]
    v = sample["plain/float32/forward/mlp.up"]
    v.expected.flags.writeable or v.__dict__.update(expected=v.expected.copy())
    v.expected[1, 2, 3] += 1e-3
    assert v.verify()


def test_a_vector_that_is_contradicted_is_not_written(tmp_path, monkeypatch):
    """Catches vectors of a wrong specification: the loops say otherwise, and nothing is left behind."""
    monkeypatch.setitem(second.SECOND, "router.weights", lambda s, ids, **_: np.take_along_axis(s, ids, -1))
    with pytest.raises(SpecError, match=r"plain/float32/forward/router.weights: .* differ from the second computation"):
        write_vectors(tmp_path / "out", only="plain/float32/forward")
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_its_slope_contradicts_is_told(tmp_path, monkeypatch):
    """Catches a slope that is compared with nothing."""
    monkeypatch.setattr(second, "slope", lambda call, r: 1.0)
    with pytest.raises(SpecError, match=r"slope 1\.0, the gradient says"):
        write_vectors(tmp_path / "out", only="plain/float32/backward")


def gradient_of(part):
    """What a part sends back, by our own tape from the arrays of the files alone."""
    stage, leaf = STAGES[part["stage"]], None
    names = {k: wide(v) for k, v in part["inputs"].items()}
    for name, index in re.findall(r"(\w+)(?:\[(\d+)\])?", " ".join(part["by"])):
        here = names[name][int(index)] if index else names[name]
        leaf = Tensor(here) if leaf is None else leaf
        if index:
            names[name][int(index)] = leaf
        else:
            names[name] = leaf
    args = []
    for p in inspect.signature(stage.fn).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            args += names[p.name]
        elif p.kind is p.POSITIONAL_OR_KEYWORD and p.name in part["inputs"]:
            args.append(tuple(names[p.name]) if isinstance(names[p.name], list) else names[p.name])
    y = stage.fn(*args, **part["settings"])
    dy = np.asarray(part["gradient"], np.float64)
    return backward(y, dy.reshape(y.shape))[leaf]


def wide(a):
    """Floats in float64, lists of them too."""
    if isinstance(a, list):
        return [wide(x) for x in a]
    return a.astype(np.float64) if getattr(a, "dtype", np.dtype(int)).kind == "f" else a


def test_a_gradient_is_the_sum_of_what_its_parts_send_back(tmp_path):
    """Catches a reader of a quantity that is left out, another argument than the one meant, a gradient of another output."""
    write_vectors(tmp_path / "out", only="plain/float32/backward")
    found = {v.id: v.judge(sum(map(gradient_of, v.parts))) for v in Vectors(tmp_path / "out") if v.parts}
    assert len(found) > 60 and not {id: what for id, what in found.items() if what}


def test_the_runs_are_all_regimes_dtypes_and_phases():
    """Catches a regime that was added and has no vectors."""
    listed = [run.split("/") for run in all_runs()]
    assert {r for r, _, _ in listed} == {"plain", *REGIMES}
    assert {(r, d) for r, d, p in listed if p == "forward"} == {
        (r, d) for r in ("plain", *REGIMES) for d in runs.DTYPES
    }
    assert {p for _, _, p in listed} == {"forward", "chunk", "step", "backward", "update"}


def test_inputs_are_cut_to_numbers_that_roundings_do_not_change():
    """Catches inputs with all of float64's noise in them, or with too few bits for float32 to be tested."""
    x = np.random.default_rng(0).normal(size=1000)
    a, b = (runs.cut(x * (1 + e), "fp32") for e in (0, 3e-16))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a / x - 1).max() < 2.0**-18 and (np.frexp(a)[0] * 2**18 % 1 == 0).all()
    for middle, fmt in ((1 + 2.0**-18, "fp32"), (1 + 2.0**-8, "bf16")):  # between two numbers of the format
        assert len(set(runs.cut(np.nextafter(middle, [0, middle, 2]), fmt).tolist())) == 1


@pytest.mark.parametrize(
    "x, s, nearest", [(448, 1, 448), (500, 1, 448), (17, 1, 16), (19, 1, 20), (-3e-3, 2, -(2.0**-9)), (0, 3, 0)]
)
def test_e4m3_by_its_list_of_numbers(x, s, nearest):
    """Catches ties away from even (17 and 19 lie in the middle), no saturation, subnormals that are flushed."""
    assert loops_fp8.nearest(x, s) == nearest


def test_the_reader_knows_every_code_of_e4m3():
    """Catches a bias, a NaN or subnormals that are another format's: it has its own decoder."""
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(read_vectors.e4m3(codes), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_the_loops_give_a_tie_to_the_lower_index():
    """Catches a second computation that agrees with the first on everything but ties."""
    assert loops_experts.best_of([0.5, 1.0, 1.0, 1.0], 2) == [1, 2]


def test_limits_are_rounded_up():
    """Catches a limit below what was measured."""
    assert [rounded_up(x) for x in (1.01e-7, 9.5e-7, 2e-6)] == [2e-7, 1e-6, 2e-6]


def test_an_array_is_stored_once_and_without_loss():
    """Catches inputs that the file does not hold exactly, and a file for each of many equal arrays."""
    store = entries.Store()
    w = np.ones((2, 2), np.float32)
    assert store.put(w, "a", "x") == store.put(w.copy(), "b", "y") == {"file": "a", "name": "x"}
    assert store.runs["a"].hexdigest() != store.runs["b"].hexdigest()
    assert entries.narrow(w).dtype.name == "bfloat16" and entries.narrow(w / 3).dtype == np.float32
    with pytest.raises(AssertionError):
        entries.narrow(np.array([1 / 3]))


@in_repository
def test_the_release_is_what_is_written_today(sample):
    """Catches a specification that gives other numbers without a new set of vectors, and its changelog entry."""
    tagged = ROOT / "releases" / "vectors-1"
    told = json.loads((tagged / "runs.json").read_text())
    assert told["schema"] == sample.index["schema"] and list(told["runs"]) == list(all_runs())
    assert {run: told["runs"][run] for run in sample.index["runs"]} == sample.index["runs"]
    for file in (tagged / "sample").glob("*.safetensors"):
        theirs, mine = (read_vectors.read_safetensors(f) for f in (file, sample.folder / file.name))
        assert theirs.keys() == mine.keys() and all(np.array_equal(theirs[k], mine[k], equal_nan=True) for k in mine)
    for a, b in zip(Vectors(tagged / "sample"), sample, strict=True):  # twins of another processor add up otherwise
        assert a.id == b.id and a.entry["limit"] <= 5 * b.entry["limit"] <= 25 * a.entry["limit"]


def test_the_text_form_gives_every_number_back(sample, capsys):
    """Catches digits that are cut off, and a reader that needs us: it runs from the folder alone."""
    v = sample["plain/float32/forward/router.weights"]
    lines = list(read_vectors.text_of(v))
    at = lines.index("array expected float32 2 8 4")
    numbers = np.array([[float(x) for x in line.split()] for line in lines[at + 1 :]], np.float32)
    np.testing.assert_array_equal(numbers.reshape(2, 8, 4), v.expected)
    alone = [sys.executable, "-I", str(sample.folder / "read_vectors.py"), str(sample.folder), "--verify"]
    assert (
        subprocess.run(alone, capture_output=True, text=True, check=True).stdout
        == f"{len(list(sample))} of 144 right\n"
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_reader_in_c_knows_every_code_of_e4m3(tmp_path):
    """Catches subnormals, NaN or a sign that its decoder gets wrong, which no example of its engine reads."""
    print_all = 'for (int i = 0; i < 256; i++) { unsigned char c = i; printf("%.9g\\n", number(&c, "F8_E4M3")); }'
    reader = Path(read_vectors.__file__).with_suffix(".c")
    text = f'#define main unused\n#include "{reader}"\n#undef main\nint main(void) {{ {print_all} }}'
    (tmp_path / "all.c").write_text(text)
    subprocess.run(["cc", "-w", "-o", tmp_path / "all", tmp_path / "all.c", "-lm"], check=True)
    said = subprocess.run([tmp_path / "all"], capture_output=True, text=True, check=True).stdout.split()
    np.testing.assert_array_equal(np.array(said, float), read_vectors.e4m3(np.arange(256, dtype=np.uint8)))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_engine_in_c_reads_and_judges_them(sample, tmp_path):
    """Catches offsets, dtypes and lines that only our own reader understands, and a judge in C that passes anything."""
    said = []
    for wrong in ([], ["-DWRONG=1.00001"]):
        program = tmp_path / f"check{len(wrong)}"
        subprocess.run(["cc", "-O2", *wrong, "-o", program, sample.folder / "read_vectors.c", "-lm"], check=True)
        said.append(subprocess.run([program, sample.folder], capture_output=True, text=True))
    right, bad = said
    assert (right.returncode, right.stdout.splitlines()[-1]) == (0, "49 right, 0 wrong, 95 left")
    assert (bad.returncode, bad.stdout.splitlines()[-1]) == (1, "0 right, 49 wrong, 95 left")


def test_the_command_writes_judges_and_says_what_is_wrong(sample, tmp_path, capsys):
    """Catches exit codes that do not say what happened, and an unknown id that passes."""
    outputs = {v.id: v.expected for v in sample}
    safetensors.write_file(tmp_path / "good.safetensors", outputs)
    safetensors.write_file(tmp_path / "bad.safetensors", outputs | {"plain/float32/forward/nothing": np.zeros(1)})
    good, bad = (
        ["vectors", str(sample.folder), "--check", str(tmp_path / f)] for f in ("good.safetensors", "bad.safetensors")
    )
    assert main(good) == 0 and capsys.readouterr().out == "144 of 144 right\n"
    assert main(bad) == 1 and "nothing: no such vector" in capsys.readouterr().out
    assert main(["vectors", str(sample.folder), "--verify"]) == 0
    assert main(["vectors", str(tmp_path / "none"), "--verify"]) == 3 and main(["vectors", str(sample.folder)]) == 3
    assert main(["vectors", str(tmp_path / "new"), "--runs", "nothing"]) == 3
    assert "no run fits 'nothing'" in capsys.readouterr().err


@pytest.mark.slow
def test_every_stage_has_a_vector_and_the_set_is_small(tmp_path):
    """Catches a stage without vectors, a set that grew beyond 20 MB, and a release that is not written any more."""
    index = write_vectors(tmp_path / "all")
    have = {v["stage"] for v in index["vectors"]}
    assert {s for s in STAGES if not s.startswith(FREE)} <= have
    assert {"act.scale", "act.q", "bwd/mla.scores", "grad/gate.weight"} <= have
    assert len({v["id"] for v in index["vectors"]}) == len(index["vectors"])
    assert sum(f.stat().st_size for f in (tmp_path / "all").iterdir()) <= 20e6
    assert not [v.id for v in Vectors(tmp_path / "all") if v.verify()]
    if ROOT:
        assert json.loads((ROOT / "releases" / "vectors-1" / "runs.json").read_text())["runs"] == index["runs"]


def written_elsewhere(folder, before=(), **environment):
    """The files that another process writes, by their names."""
    code = f"from refimpl.vectors import write_vectors\nwrite_vectors({str(folder)!r}, only='plain/*')"
    done = subprocess.run(
        [*before, *interpreter(code)], cwd=HERE, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.slow
def test_the_bytes_are_the_same_with_other_threads_and_under_mpi(tmp_path):
    """Catches numbers, and limits, that depend on the order in which threads add up."""
    one = written_elsewhere(tmp_path / "1", OPENBLAS_NUM_THREADS="1")
    assert written_elsewhere(tmp_path / "2", OPENBLAS_NUM_THREADS="2") == one
    beside = Path(sys.executable).parent / "mpiexec"
    if mpiexec := str(beside) if beside.exists() else shutil.which("mpiexec"):
        assert written_elsewhere(tmp_path / "3", launcher.mpiexec_command(1, mpiexec)) == one


@pytest.mark.slow
def test_the_arrays_are_the_same_on_a_processor_without_avx(tmp_path):
    """Catches inputs and expected numbers that another kernel of BLAS, or another `exp`, moves. Limits may."""
    one = written_elsewhere(tmp_path / "1")
    old = written_elsewhere(tmp_path / "2", OPENBLAS_CORETYPE="Prescott", NPY_DISABLE_CPU_FEATURES="AVX2 FMA3")
    assert {n: b for n, b in old.items() if "index" not in n} == {n: b for n, b in one.items() if "index" not in n}


def test_importing_the_reader_needs_numpy_alone(tmp_path):
    """Catches a reader that imports the package it lies in."""
    shutil.copy(read_vectors.__file__, tmp_path / "alone.py")
    done = python(
        "import sys, alone\nassert not [m for m in sys.modules if m.startswith(('refimpl.', 'ml_dtypes'))]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
