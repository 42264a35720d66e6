"""The matrix that measures `refimpl diff` (benchmarks/diff_matrix): its edits are undone, its scripts run and count."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
from fnmatch import fnmatchcase as fnmatch

import numpy as np
import pytest

import refimpl
from refimpl.autograd.errors import SpecError
from refimpl.diff import Case
from refimpl.diff.corpus import MUTANTS
from refimpl.record import hf, hf_load, hf_taps
from refimpl.record.torch_arrays import one_thread

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "diff_matrix"
TINY = pathlib.Path(refimpl.__file__).parent / "cases" / "tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="an installed wheel has no benchmarks")


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="comes with the extra 'interop'; CI runs these tests with it")


@pytest.fixture
def entries(monkeypatch):
    """Every entry by id; the matrix's modules are imported as its scripts import them, and forgotten again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module("corpus").ENTRIES
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").is_file():
            del sys.modules[name]


def test_every_entry_is_undone_on_leaving(entries):
    """Catches an edit that outlives its use: every recording after it would be of another model."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    case = Case.read(TINY)
    with one_thread():
        net = hf_load.load_model(case.raw_config, case.weights())

        def state():
            logits = hf_taps.run(net, case.tokens, hf.positions_of(case)).numpy()
            held = {path: sorted(vars(m)) for path, m in net.named_modules()}
            return logits.tobytes(), held, theirs.eager_attention_forward, theirs.create_causal_mask

        before = state()
        for entry in entries.values():
            try:
                with entry.patch(net):
                    hf_taps.run(net, case.tokens, hf.positions_of(case))
            except SpecError as error:
                assert entry.id == "R15", error  # the one that needs a model without groups
            assert state() == before, entry.id


def test_the_corpus_names_taps_that_exist(entries):
    """Catches a misspelt stage, which no culprit could ever match; and a corpus that has shrunk."""
    taps = {t.rpartition("/")[2] for t in hf_taps.expected_taps(Case.read(TINY).config)}
    assert not {e.id: wrong for e in entries.values() if (wrong := (e.stages | e.also) - taps)}
    naming = importlib.import_module("naming")
    assert set(naming.NAMES) <= {e.id for e in entries.values() if not e.innocent}
    for patterns in naming.NAMES.values():
        assert all(p == "dtype" or any(fnmatch(id, p) for id in MUTANTS) for p in patterns.split()), patterns
    assert sum(not e.innocent for e in entries.values()) >= 80 and sum(e.innocent for e in entries.values()) >= 30


def test_the_scripts_record_judge_and_count(tmp_path):
    """Catches a script that no longer fits the recorder or the judge, a bug that counts as placed although it was not, and
    rows that are judged twice.
    """
    env = dict(os.environ, OPENBLAS_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    some = ["--cache", tmp_path, "--cases", "tiny", "--seeds", "0", "--dtypes", "float32", "--only", "R01,ids-sorted"]
    out = ["--out", tmp_path / "rows.jsonl", "--sets", "all,logits"]
    for script, more in (("record.py", []), ("run.py", out), ("run.py", out)):
        command = [sys.executable, str(FOLDER / script), *map(str, some), *map(str, more)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = {(r["entry"], r["set"]): r for r in rows}
    assert len(rows) == len(found) == 4
    assert (
        found["R01", "all"]["right"] and found["R01", "all"]["visible"] and np.isfinite(found["R01", "all"]["change"])
    )
    assert found["R01", "logits"]["right_region"] and not found["R01", "logits"]["right"]
    assert found["ids-sorted", "all"]["verdict"] == "CONFORMS"
    assert found["R01", "all"]["first"] and [id for id, _ in found["R01", "all"]["causes"]] == ["R01"]
    assert "named uniquely, float32: 1 of 1 flagged bugs of the catalogue" in done.stdout
    assert "| all | float32 | 1 of 1 | 1 | 1 | 1 | 1 | 0 of 0 | 0 of 1 |" in done.stdout
