"""R 3.2: the same rank programs under mpiexec give the same bits as on the simulator, and never hang.

Needs the extra `mpi` (mpi4py and an MPI wheel) or a site's own MPI; 2, 3 and 4 processes, on however few cores.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refimpl.autograd import SpecError
from refimpl.parallel_emulation import __main__ as command_line
from refimpl.parallel_emulation.comm import launcher, wire
from refimpl.spec_tests.cases import layer_programs, rank_programs, serving_programs

HERE = "refimpl.spec_tests.cases.rank_programs"
PROGRAMS = (*rank_programs.PROGRAMS, *layer_programs.PROGRAMS, *serving_programs.PROGRAMS)
NAMES = [f"{program.__module__}:{program.__name__}" for program in PROGRAMS]
FOUND = importlib.util.find_spec("mpi4py") is not None and (
    (Path(sys.executable).parent / "mpiexec").exists() or shutil.which("mpiexec")
)
needs_mpi = pytest.mark.skipif(not FOUND, reason="mpi4py or mpiexec is not installed; the extra `mpi` brings both")


# ---- Bit for bit


@pytest.fixture(scope="module", params=[2, *[pytest.param(n, marks=pytest.mark.slow) for n in (3, 4)]])
def both(request):
    """Every program on this many processes, in one MPI job and on the simulator."""
    n = request.param
    return n, launcher.launch(n, NAMES, timeout=180), launcher.simulate(n, NAMES)


@needs_mpi
@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.partition(":")[2])
def test_mpi_gives_the_bits_of_the_simulator(both, name):
    """Catches a dtype that MPI mangles, a sum left to MPI, a group in another order, calls that log other bytes."""
    n, mpi, simulator = both
    assert len(mpi[name]) == n and mpi[name] == simulator[name]


@needs_mpi
@pytest.mark.slow
def test_prefill_and_decode_apart_on_eight_processes():
    """R 3.4's TP4 for prompts, four ranks that decode. Catches what fewer ranks do not show: groups within both units."""
    name = f"{serving_programs.__name__}:apart"
    assert launcher.launch(8, [name], timeout=180) == launcher.simulate(8, [name])


@needs_mpi
def test_fingerprints_tell_ranks_and_programs_apart(both):
    """Catches a fingerprint that is always the same, which would make the test above empty."""
    n, mpi, _ = both
    per_rank = [line for name in NAMES if name.endswith((":groups", ":every_dtype", ":hops")) for line in mpi[name]]
    assert len(set(per_rank)) == 3 * n


# ---- What goes wrong ends with a message


@needs_mpi
@pytest.mark.parametrize(
    ("program", "says"),
    [
        (
            "returns_early",
            "rank 1 calls allgather 'program returned' of uint8[160] while rank 0 is in barrier 'without 1'",
        ),
        ("raises", "RuntimeError: expert 7 is on fire"),
        *[
            pytest.param(program, says, marks=pytest.mark.slow)
            for program, says in (
                (
                    "disagrees",
                    "rank 1 calls allgather 'one' of float64[3] while rank 0 is in barrier 'other': another call",
                ),
                ("wrong_like", "from rank 1 to rank 0 is float64[3], the receiver expects float64[4]"),
            )
        ],
    ],
)
def test_a_job_that_goes_wrong_ends_with_a_message(program, says):
    """Catches what plain MPI makes of these: a silent hang."""
    with pytest.raises(SpecError, match="the MPI job ended with code") as caught:
        launcher.launch(2, [f"{HERE}:{program}"], timeout=60)
    assert says in str(caught.value)


@needs_mpi
@pytest.mark.slow
def test_a_job_that_hangs_ends_with_what_every_rank_was_doing():
    """Catches a hang that no check can see (a receive that nobody sends), and processes that outlive their job."""
    start, mark = time.monotonic(), "--timeout=2.25"  # in the command line of these ranks and of no others
    with pytest.raises(SpecError, match=r"the MPI job has not ended after 2.25 s") as caught:
        launcher.launch(2, [f"{HERE}:hangs"], timeout=2.25)
    assert time.monotonic() - start < 60
    line = r"on ranks 0-1(, waits to receive from rank 1)?, at rank_programs.py:\d+ in hangs"
    assert re.search(rf"time is up: rank 0: recv 'never sent' {line}", str(caught.value))
    assert re.search(rf"time is up: rank 1: barrier 'after' {line}", str(caught.value))
    time.sleep(0.5)
    assert not [command for command in processes() if mark in command]


def processes():
    """The command lines of all processes, where the system shows them."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            yield path.read_bytes().decode(errors="replace")


@needs_mpi
def test_the_command_compares_both_engines(capsys):
    """Catches a command that only prints: it says whether the two agree, and ends with 0."""
    assert command_line.main(["run", "-n", "2", f"{HERE}:groups,{HERE}:sums"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("the same, bit for bit\n") and out.count("rank 1  result") == 4


# ---- The command and its flags, without MPI


def fake_mpiexec(folder, says, then=""):
    path = folder / "mpiexec"
    path.write_text(f"#!/bin/sh\necho '{says}'\n[ $1 = --version ] && exit\n{then}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_open_mpi_gets_the_flags_it_needs_and_mpich_none(tmp_path, monkeypatch):
    """Catches 4 ranks refused on 2 cores, and root refused, as Open MPI does without these flags."""
    path = fake_mpiexec(tmp_path, "mpiexec (Open MPI) 5.0.11")
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    assert launcher.mpiexec_command(4, path) == [path, "--oversubscribe", "--allow-run-as-root", "-n", "4"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert launcher.mpiexec_command(4, path) == [path, "--oversubscribe", "-n", "4"]
    path = fake_mpiexec(tmp_path, "HYDRA build details: Version 5.0.2")
    assert launcher.mpiexec_command(3, path) == [path, "-n", "3"]


@pytest.mark.parametrize(
    ("then", "code"),
    [("echo 'time is up: rank 0: barrier' >&2; sleep 90", "time is up: rank 0: barrier"), ("sleep 90", "")],
    ids=["the ranks have left", "nothing ever starts"],
)
def test_a_launcher_that_does_not_end_is_ended(tmp_path, monkeypatch, then, code):
    """Catches a wait for ever on mpiexec itself, as Open MPI's sometimes needs ending after its ranks have left."""
    monkeypatch.setattr(launcher, "_GRACE", 0.1)
    monkeypatch.setattr(launcher, "_START", 20.0 if code else 0.1)
    start = time.monotonic()
    with pytest.raises(SpecError, match=f"has not ended after 0.1 s\n{code}"):
        launcher.launch(2, [f"{HERE}:sums"], timeout=0.1, mpiexec=fake_mpiexec(tmp_path, "HYDRA", then))
    assert time.monotonic() - start < 15


def test_no_mpi_is_said_so(tmp_path, monkeypatch):
    """Catches a FileNotFoundError where the reader needs to know which extra to install."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpecError, match=r"no mpiexec: pip install 'deepseek-v3-refimpl\[mpi\]'"):
        launcher.launch(2, [f"{HERE}:sums"])
    with pytest.raises(SpecError, match="no /nowhere/mpiexec"):
        launcher.mpiexec_command(2, "/nowhere/mpiexec")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("rank_programs", "module:function"), (f"{HERE}:nothing", "no program"), (f"{HERE}:TOY", "not a function")],
)
def test_a_misspelt_program_is_refused(name, complaint, capsys):
    """Catches n tracebacks where one line would do."""
    with pytest.raises(SpecError, match=complaint):
        launcher.load(name)
    assert command_line.main(["run", "-n", "2", "--engine", "simulator", name]) == 3
    assert capsys.readouterr().err.startswith("refimpl.parallel_emulation: ")


def test_the_simulator_alone_needs_no_mpi():
    """Catches an import of mpi4py on the way; run as a user would, in a fresh interpreter."""
    command = [sys.executable, "-m", "refimpl.parallel_emulation", "run", "-n", "3", "--engine", "simulator"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([*command, f"{HERE}:sums"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    want = launcher.simulate(3, [f"{HERE}:sums"])[f"{HERE}:sums"]
    assert done.stdout.splitlines()[1:] == [f"  rank {rank}  {line}" for rank, line in enumerate(want)]


def test_arguments_reach_the_program(capsys):
    """Catches numbers that arrive as text."""
    command = ["run", "-n", "2", "--engine", "simulator", f"{HERE}:echo"]
    assert command_line.main([*command, "3", "[1, 2]", "text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(f"result {wire.digest([3, [1, 2], 'text'])}  log" in line for line in lines[1:])


DOCUMENT = Path(__file__).parents[2] / "docs" / "mpi.md"


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="about the repository's docs; this is an installed wheel")
def test_the_example_of_the_document_prints_what_the_document_says(tmp_path, monkeypatch):
    """Catches a document that no longer runs, or shows fingerprints of long ago."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (tmp_path / "halves.py").write_text(re.search(r"```python\n(# halves.py\n.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    lines = [
        f"  rank {rank}  {line}" for rank, line in enumerate(launcher.simulate(4, ["halves:program"])["halves:program"])
    ]
    shown = re.findall(r"^  rank \d  result .*$", text, re.MULTILINE)
    assert shown == [lines[0], lines[1], lines[0]]
