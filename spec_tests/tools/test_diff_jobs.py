"""A judgement spread over processes gives the report of one process, to the byte."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import refimpl
from refimpl.cli import main
from refimpl.cli.jobs import Files
from refimpl.diff import Case, Trace, to_json
from refimpl.diff.html import to_html
from refimpl.diff.judge import judge
from refimpl.diff.spread import Pool, SpanFound, join, spans_of
from refimpl.layers import PRESETS
from refimpl.parallel_emulation.comm.launcher import mpiexec_command
from refimpl.record import new_case, trace_case

TINY = Path(refimpl.__file__).parent / "cases" / "tiny"
BUG = [str(TINY), str(TINY / "hf-bug.safetensors")]
FOUND = importlib.util.find_spec("mpi4py") is not None and (
    (Path(sys.executable).parent / "mpiexec").exists() or shutil.which("mpiexec")
)


class _Counting(ThreadPoolExecutor):
    """One worker in this process, which tells how many spans it was given."""

    spans = 0

    def submit(self, fn, /, *args, **more):
        self.spans += 1
        return super().submit(fn, *args, **more)


def both(case, trace, n=3):
    """(spans that were worked on, the reports of one process and of n) for files."""
    files, one = Files(case, trace, None), judge(Case.read(case), Trace.read(trace), pictures=True)
    with _Counting(1) as worker:
        many = judge(Case.read(case), Trace.read(trace), pictures=True, pool=Pool(worker, n, files))
    return worker.spans, [(to_json(j), to_html(j)) for j in (one, many)]


def write(path, trace, keep=lambda tap: True, **changed):
    """A trace with some of the taps, some of them changed."""
    taps = {t: np.asarray(a) for t, a in trace.taps.items() if keep(t)}
    Trace(trace.header, taps | changed).write(path)
    return path


@pytest.mark.parametrize("name", ["hf-float32", "hf-bfloat16", "hf-bug"])
def test_spans_give_the_report_of_one_process(name):
    """Catches findings in the order in which workers end, a span that starts from numbers of its own, our own run begun anew in
    every span, gauges and dialects that are not looked for.
    """
    spans, (one, many) = both(TINY, TINY / f"{name}.safetensors")
    assert spans >= 3 and one == many


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-float32", "hf-bfloat16", "hf-bug"])
@pytest.mark.parametrize("seed", range(8))
def test_spans_of_partial_traces(name, seed, tmp_path):
    """Catches a cut through a region, where twins, doubts or exact values of an earlier span are still read."""
    rng, trace = np.random.default_rng(seed), Trace.read(TINY / f"{name}.safetensors")
    share = (0.9, 0.7, 0.5, 0.3)[seed % 4]
    part = write(tmp_path / "t.safetensors", trace, lambda t: t.endswith("/resid") or rng.random() < share)
    _, (one, many) = both(TINY, part)
    assert one == many


def test_there_is_no_cut_where_the_stream_was_not_recorded(tmp_path):
    """Catches a cut between layers whose residual stream has to be computed: nothing is spread, and the report is the same."""
    trace = Trace.read(TINY / "hf-bug.safetensors")
    part = write(tmp_path / "t.safetensors", trace, lambda t: not t.endswith(("/resid", "/embed")))
    spans, (one, many) = both(TINY, part)
    assert spans == 0 and one == many


def test_what_follows_from_the_inputs_is_made_again(tmp_path):
    """Catches a span without the mask and the rotations that were made, and not recorded, before it."""
    trace = Trace.read(TINY / "hf-float32.safetensors")
    part = write(tmp_path / "t.safetensors", trace, lambda t: "mask" not in t and "rope_tables" not in t)
    spans, (one, many) = both(TINY, part)
    assert spans >= 2 and one == many


def test_an_unknown_name_is_nearest_to_one_tap_of_all_spans():
    """Catches the last span's word on an array that resembles a tap of an earlier one more."""
    whole = SimpleNamespace(
        recorded=SimpleNamespace(taps={}, withdrawn={}, partial={}),
        findings=[],
        accepted={},
        either=set(),
        plain={},
        alike={},
        supposable=False,
    )
    found = [SpanFound([], {}, set(), {}, {"x": told}, {}, False, {}) for told in ((0.2, "a"), (0.1, "b"), (0.3, "c"))]
    join(whole, found)
    assert whole.alike == {"x": (0.1, "b")}


def test_a_tap_between_spans_that_is_read_otherwise(tmp_path):
    """Catches a span that reads the stream as it was recorded where the span before has found its axes in another order."""
    case = tmp_path / "case"
    new_case(case, PRESETS["tiny"], seed=0, batch=1, length=4)
    tokens = np.random.default_rng(0).integers(0, PRESETS["tiny"].vocab_size, (6, 6)).tolist()
    (case / "tokens.json").write_text(json.dumps({"tokens": tokens}))
    trace = trace_case(Case.read(case), precision="float32")
    turned = {"fwd/L0/resid": np.ascontiguousarray(np.asarray(trace.taps["fwd/L0/resid"]).swapaxes(0, 1))}
    spans, (one, many) = both(case, write(tmp_path / "t.safetensors", trace, **turned))
    assert spans >= 2 and one == many and "CONFORMS_IN_GAUGE" in one[0]


def test_names_that_are_no_taps(tmp_path):
    """Catches an array under another name that is held against one span's taps alone."""
    trace = Trace.read(TINY / "hf-float32.safetensors")
    renamed = {"decoder.2.out": np.asarray(trace.taps["fwd/L1/attn_out"])}
    part = write(tmp_path / "t.safetensors", trace, lambda t: t != "fwd/L1/attn_out", **renamed)
    spans, (one, many) = both(TINY, part)
    assert spans >= 2 and one == many and "fwd/L1/attn_out" in json.loads(one[0])["unknown"]["decoder.2.out"]


def test_spans_cover_the_program_once():
    """Catches a call that no span holds, or two do."""
    for n in range(1, 9):
        spans = spans_of(100, [10, 40, 45, 70, 99], n)
        assert [i for a, b in spans for i in range(a, b)] == list(range(100)) and len(spans) <= n
    assert spans_of(100, [], 4) == [(0, 100)]


def test_processes_of_the_command_line(capfd):
    """Catches what cannot be sent to a process, one that does not find this package, and a wrong number taken for one."""
    assert main(["diff", *BUG, "--json"]) == 1
    one = capfd.readouterr().out
    assert main(["diff", *BUG, "--json", "--jobs", "2"]) == 1
    assert capfd.readouterr().out == one
    assert main(["diff", *BUG, "--jobs", "0"]) == 3 and "expected a number of processes" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not FOUND, reason="mpi4py or mpiexec is not installed; the extra `mpi` brings both")
def test_processes_of_mpi(capfd):
    """Catches what MPI cannot send, and workers that are not used: 4 processes give the bytes of one."""
    assert main(["diff", *BUG, "--json"]) == 1
    one = capfd.readouterr().out
    paths = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if Path(p or ".").is_dir())
    program = [sys.executable, "-m", "mpi4py.futures", "-m", "refimpl", "diff", *BUG, "--json", "--jobs", "mpi"]
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([*mpiexec_command(4), *program], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 1 and done.stdout.strip() == one.strip(), done.stderr
