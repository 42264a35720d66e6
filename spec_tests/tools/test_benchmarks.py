"""The benchmarks still run, and their check can fail. Their numbers are in benchmarks/README.md."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="an installed wheel has no benchmarks")


def run(script, *args):
    env = dict(os.environ, OPENBLAS_NUM_THREADS="1")
    command = [sys.executable, str(FOLDER / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def results(factor):
    """Measurements at `factor` times every goal."""
    found = json.loads(run("check.py", "--goals").stdout)
    cases = {case: {} for case, _, _ in found}
    for case, what, limit in found:
        cases[case][what] = factor * limit
    return {case: {"refimpl": row} for case, row in cases.items()}


def test_our_worker_reaches_its_first_logits():
    """Catches a worker that no longer fits the model."""
    done = run("pairs.py", "--startup", "refimpl_worker.py", "tiny")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 8


@pytest.mark.parametrize(("factor", "code"), [(0.99, 0), (1.01, 1)])
def test_check_exits_1_if_a_goal_is_missed(factor, code, tmp_path):
    """Catches a check that is always content."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(factor)))
    done = run("check.py", file)
    assert done.returncode == code, done.stderr
    assert ("MISSED" in done.stdout) == bool(code)


def test_the_loader_benchmark_runs():
    """Catches a benchmark that no longer fits the reader; the exit code says whether the goal is met, which is not our question."""
    done = run("loader.py", "--length", 16, "--rows", 40, "--batches", 3, "--batch", 4, "--rounds", 2, "--json")
    assert done.returncode in (0, 1), done.stderr
    assert set(json.loads(done.stdout)) == {"copy", "cast", "plain", "masked"}
