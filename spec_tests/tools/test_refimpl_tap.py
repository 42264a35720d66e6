"""refimpl_tap.py, the file that people paste into their programs: alone with NumPy it writes traces that the diff takes."""

import pathlib
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.cli import main
from refimpl.diff import Case, Trace, digest
from refimpl.diff.judge import judge
from refimpl.record import refimpl_tap, trace_case

TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"

PORT = """
import sys
import numpy as np
before = set(sys.modules)
import refimpl_tap
taps = np.load(sys.argv[1])
with refimpl_tap.recording(sys.argv[3], sys.argv[2], producer="pasted 1.0"):
    for name in taps.files:
        assert refimpl_tap.tap(name.removeprefix("fwd/"), taps[name]) is not None
foreign = {m.partition(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(foreign - {"numpy", "refimpl_tap"}))
"""


def test_pasted_beside_a_program_it_writes_a_trace_that_conforms(tmp_path):
    """Catches a file that needs refimpl or ml_dtypes, a header the diff rejects, and digests that are not ours: our own run,
    written by the file in a folder of its own.
    """
    shutil.copy(refimpl_tap.__file__, tmp_path / "refimpl_tap.py")
    (tmp_path / "port.py").write_text(PORT)
    np.savez(tmp_path / "taps.npz", **trace_case(Case.read(TINY)).taps)
    words = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec({PORT!r})"]
    done = subprocess.run(
        [*words, str(tmp_path / "taps.npz"), str(TINY), str(tmp_path / "t")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    trace = Trace.read(tmp_path / "t")
    assert trace.header.producer == {"name": "pasted 1.0"} and len(trace.taps) == 93
    assert judge(Case.read(TINY), trace).verdict == "CONFORMS"


def test_the_command_prints_the_file(capsys, tmp_path):
    """Catches a file that a wheel leaves out, and output with something else in it."""
    text = pathlib.Path(refimpl_tap.__file__).read_text(encoding="utf-8")
    assert main(["record", "tap-file"]) == 0 and capsys.readouterr().out == text
    assert main(["record", "tap-file", "-o", str(tmp_path / "f.py")]) == 0 and (tmp_path / "f.py").read_text() == text


@pytest.mark.parametrize("kind", ["bool", "int8", "uint32", "int64", "float16", "float32", "float64", "bfloat16"])
def test_every_dtype_comes_back_bit_for_bit(kind, tmp_path):
    """Catches bfloat16 widened, a transposed array written in memory order, a scalar given an axis, misaligned data."""
    values = np.arange(-3, 3).reshape(2, 3).astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    with refimpl_tap.recording(tmp_path / "t", TINY, weights={}) as made:
        refimpl_tap.tap("L0/turned", values.T)
        made.tap("dec3/one", values[0, 0])
        made.tap("A", np.int8(1))  # whose name comes first
    taps = Trace.read(tmp_path / "t").taps
    assert set(taps) == {"fwd/L0/turned", "dec3/one", "fwd/A"}
    assert all(x.flags.aligned for x in taps.values())
    assert taps["fwd/L0/turned"].dtype == values.dtype and taps["dec3/one"].shape == ()
    np.testing.assert_array_equal(np.asarray(taps["fwd/L0/turned"]), values.T)


def test_a_big_endian_array_is_written_little_endian(tmp_path):
    """Catches bytes taken as they lie in memory."""
    with refimpl_tap.recording(tmp_path / "t", TINY, weights={}):
        refimpl_tap.tap("logits", np.array([[1.5, 2]], ">f4"))
    np.testing.assert_array_equal(np.asarray(Trace.read(tmp_path / "t").taps["fwd/logits"]), [[1.5, 2]])


def test_without_a_recording_a_tap_gives_back_its_array():
    """Catches a model that is changed, slowed down or broken by what was pasted into it."""
    x = object()
    assert refimpl_tap.tap("L0/resid", x) is x


def test_a_tap_is_a_copy_and_the_first_of_its_name(tmp_path):
    """Catches a buffer that the model overwrites later, and a second run that silently takes the place of the first."""
    x = np.ones((2, 2), np.float32)
    with refimpl_tap.recording(tmp_path / "t", TINY, weights={}):
        refimpl_tap.tap("L0/resid", x)
        x[:] = 7
        refimpl_tap.tap("L0/resid", x)
    trace = Trace.read(tmp_path / "t")
    np.testing.assert_array_equal(np.asarray(trace.taps["fwd/L0/resid"]), np.ones((2, 2)))
    assert trace.header.notes == "fwd/L0/resid: recorded more than once, the first is kept"


def test_a_run_that_fails_leaves_nothing_behind(tmp_path):
    """Catches half a trace, a temporary file, and a recording that goes on after its block."""
    with pytest.raises(ZeroDivisionError), refimpl_tap.recording(tmp_path / "t", TINY, weights={}) as made:
        refimpl_tap.tap("logits", np.ones(1))
        1 / 0  # noqa: B018
    refimpl_tap.tap("later", np.ones(1))
    assert not list(tmp_path.iterdir()) and set(made.taps) == {"fwd/logits"}


@pytest.mark.parametrize("bad", ["text", [object()], np.ones(2, complex), None])
def test_what_is_no_array_of_numbers_is_refused(bad):
    """Catches a trace that the reader cannot open."""
    with pytest.raises(TypeError, match="a tap is an array of numbers"):
        refimpl_tap.raw(bad)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_digests_are_those_of_the_diff(kind):
    """Catches a digest of other bytes, by which every weight would be called another."""
    w = np.random.default_rng(0).normal(size=(3, 5)).astype(kind)
    assert refimpl_tap.digest(w) == refimpl_tap.digest(refimpl_tap.raw(w)) == digest(w)


def test_weights_in_codes_are_not_digested_without_their_scales(tmp_path):
    """Catches FP8 codes taken for values, whose digests would be of nothing that was computed with."""
    from refimpl.checkpoint import safetensors

    for name in ("config.json", "tokens.json"):
        shutil.copy(TINY / name, tmp_path / name)
    codes = {"a.weight": np.ones((2, 2), ml_dtypes.float8_e4m3fn), "a.weight_scale_inv": np.ones((1, 1), np.float32)}
    safetensors.write_file(tmp_path / "model.safetensors", codes)
    with pytest.raises(ValueError, match="pass weights="), refimpl_tap.recording(tmp_path / "t", tmp_path):
        pass
