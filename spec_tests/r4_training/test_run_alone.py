"""One run at a time in a folder, and nobody kept out by a run that is dead."""

import os
import re
import socket
import subprocess
import sys

import pytest

from refimpl.autograd import SpecError
from refimpl.spec_tests.cases import runs
from refimpl.train.run import records, simulated, train
from refimpl.train.run.alone import alone

HOLDS = """
import sys, pathlib
from refimpl.train.run.alone import alone
with alone(pathlib.Path(sys.argv[1]), None):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("second", [train, lambda *job, **how: simulated(*job, 2, **how)], ids=["alone", "ranks"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_a_folder_is_refused(shards, tmp_path, second, resume):
    """Catches a second run that begins where the first has no checkpoint yet, whose metrics it cuts off and whose checkpoint in
    writing it sweeps away; and one on ranks, of which only the first looks.
    """
    job, refused = runs.job(shards, steps=2), []

    def begin_another(record):
        with pytest.raises(SpecError, match=rf"process {os.getpid()} on {re.escape(socket.gethostname())} is train"):
            second(job, tmp_path, resume=resume)
        refused.append(record["step"])

    assert train(job, tmp_path, tell=begin_another).complete
    assert refused == [1, 2] == [r["step"] for r in records(tmp_path)]
    assert train(runs.job(shards, steps=3), tmp_path, resume=True).step == 3  # it lets go at its end


def test_a_killed_run_keeps_nobody_out(tmp_path):
    """Catches a lock that outlives its process (SIGKILL cleans nothing up), and one that only its own process sees."""
    run = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SpecError, match=f"process {other.pid} on "), alone(tmp_path, None):
            pass
        other.kill()
    assert f"process {other.pid} " in (tmp_path / "lock").read_text()
    with alone(tmp_path, None):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_a_folder_of_something_else_is_not_resumed(shards, tmp_path):
    """Catches a mistyped folder in which --resume begins a run from nothing."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SpecError, match="no run to resume in"):
        train(runs.job(shards), tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
