"""docs/examples: what people copy does what its first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import refimpl
from refimpl.cli import main

from .tree import ROOT, in_repository

TINY = Path(refimpl.__file__).parent / "cases" / "tiny"
EXAMPLES = (ROOT or TINY) / "docs" / "examples"  # which a wheel has not, as the marks below say


def example(name, *args):
    """What an example prints; its own program, so that nothing here helps it."""
    command = [sys.executable, EXAMPLES / name, *args]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@in_repository
def test_every_example_is_listed_and_no_other():
    """Catches an example that nobody finds, and one that is gone."""
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"[{f.name}]({f.name})" in listed for f in EXAMPLES.glob("*.py"))
    assert listed.count("| [") == len(list(EXAMPLES.glob("*.py"))) + 1


@in_repository
def test_a_stage_of_ones_own_changes_the_choice():
    """Catches a patch that nothing calls: the experts would all stay."""
    lines = example("own_stage.py", TINY).splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["fwd/L1/router.ids", "fwd/L2/router.ids"]
    assert all(0 < int(line.split()[1].rstrip("%")) < 100 for line in lines[:-1]) and float(lines[-1].split()[-1]) > 0.1


@in_repository
def test_expert_maps_of_ones_own_are_taken(tmp_path, capsys):
    """Catches maps in a form that --check no longer reads, and a placement with two replicas too many."""
    loads, maps = tmp_path / "loads.json", tmp_path / "maps.json"
    example("own_eplb.py", loads, maps)
    assert main(["eplb", str(loads), "--gpus", "8", "--slots", "40", "--check", str(maps)]) == 0
    assert "the maps can be used" in capsys.readouterr().out


@in_repository
def test_a_schedule_of_ones_own_is_taken(tmp_path, capsys):
    """Catches a notation that --check no longer reads."""
    (tmp_path / "mine.txt").write_text(example("own_schedule.py"))
    assert main(["schedule", "1f1b", "--pp", "4", "--microbatches", "8", "--check", str(tmp_path / "mine.txt")]) == 0
    assert "the order is that of 1f1b" in capsys.readouterr().out
