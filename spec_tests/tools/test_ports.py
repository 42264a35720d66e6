"""docs/ports.md is what the rows say, and the runner of benchmarks/ports loses nothing. Needs no framework."""

import importlib
import json
import sys

import pytest

from refimpl.record.regimes import REGIMES

from .tree import BASE, ROOT, in_repository

pytestmark = in_repository
FOLDER = BASE / "benchmarks" / "ports"


@pytest.fixture
def ours(monkeypatch):
    """A module of benchmarks/ports by name, imported as its script imports it, and forgotten again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [f.stem for f in FOLDER.glob("*.py")]
    kept = {n: sys.modules.pop(n) for n in names if n in sys.modules}
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def rows():
    return [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def section(name):
    page = (ROOT / "docs" / "ports.md").read_text(encoding="utf-8")
    return " ".join(page.partition(f"\n## {name}\n")[2].partition("\n## ")[0].split())


# ---- The page


def test_the_page_is_what_the_rows_say(ours):
    """Catches a page edited by hand, and rows without their page."""
    assert (ROOT / "docs" / "ports.md").read_text(encoding="utf-8") == ours("page").rendered(rows())


def test_every_implementation_was_run_in_every_case_in_one_version(ours):
    """Catches a run that was stopped, and rows of two versions in one column."""
    assert {(r["port"], r["case"]) for r in rows()} == {
        (p, c) for p in ours("ports").PORTS for c in ("plain", *REGIMES)
    }
    for port in ours("ports").PORTS:
        assert len({json.dumps(r["versions"]) for r in rows() if r["port"] == port}) == 1, port


def test_what_was_found_by_hand_is_on_the_page():
    """Catches a page that lost a deviation on its way. Each was found first by reading and by hand-made traces."""
    mlx, titan = section("mlx-lm"), section("torchtitan")
    assert "(`R02`), in `bias-negative`: `router.ids`" in mlx and "deepseek_v3.py:" in mlx
    assert "the norms' eps is 1e-05** (`A12-" in titan and "nn_modules.py:" in titan
    assert "computed in bfloat16" in titan and "moe.py:" in titan


def test_no_verdict_that_a_stage_is_blamed_for_lacks_a_number(ours):
    """Catches blamed taps that no deviation of the page holds."""
    for port in ours("ports").PORTS:
        by_case = {r["case"]: r for r in rows() if r["port"] == port}
        for case, r in by_case.items():
            held = {t for d in ours("deviations").deviations(by_case) for t in d.errors.get(case, {})}
            assert held == set(r.get("blamed", {})), (port, case)


def test_every_deviation_was_looked_up_in_the_source(ours):
    """Catches a finding that is printed before anybody has read the source."""
    for port in ours("ports").PORTS:
        found = ours("deviations").deviations({r["case"]: r for r in rows() if r["port"] == port})
        assert all(d.places for d in found), [d.title for d in found]


# ---- The runner


@pytest.fixture
def port(ours):
    return ours("ports").Port("numpy", "hf", "interop", ("numpy",))


def test_a_process_that_aborts_is_a_row_and_the_next_cases_are_run(ours, port, tmp_path, monkeypatch):
    """Catches an abort that ends everything, that is repeated for ever, or that is put down to the wrong case."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nn=${5%%,*}\n[ $n = bad ] || echo "{\\"case\\": \\"$n\\"}"\necho gone >&2\nkill -ABRT $$\n'
    )
    python.chmod(0o755)
    run = ours("run")
    monkeypatch.setattr(run.sys, "executable", str(python))
    found = list(run.judged(port, ["a", "bad", "worse", "b"]))
    assert [(r["case"], r.get("verdict", "")) for r in found] == [
        ("a", ""),
        ("bad", "CRASHED"),
        ("worse", ""),
        ("b", "CRASHED"),
    ]
    assert found[1]["why"] == "the process ended by signal 6: gone"


def test_only_what_is_missing_is_run_and_every_row_is_kept_at_once(ours, port, tmp_path, monkeypatch):
    """Catches a stopped run that begins again, rows of another version that count, and rows that are written at the end."""
    run, asked = ours("run"), []
    base = ours("row").base

    def judged(port, cases):
        asked.append(cases)
        for case in cases:
            if case == "eps":
                raise KeyboardInterrupt
            yield base(port, case) | {"verdict": "CONFORMS", "seconds": 0.1}

    monkeypatch.setattr(run, "judged", judged)
    monkeypatch.setattr(run, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setitem(run.PORTS, "numpy", port)
    old = base(port, "plain") | {"versions": {"numpy": "0"}, "verdict": "DIVERGES", "seconds": 9}
    with pytest.raises(KeyboardInterrupt):
        run.run(
            port,
            ["plain", "ties", "eps"],
            [old, base(port, "ties") | {"verdict": "CONFORMS", "seconds": 1}],
            again=False,
        )
    assert asked == [["plain", "eps"]]
    assert [(r["case"], r["verdict"]) for r in run.kept()] == [("plain", "CONFORMS"), ("ties", "CONFORMS")]


def test_places_are_asked_of_the_source_that_is_installed(ours, tmp_path, monkeypatch):
    """Catches line numbers that were typed, lines in front of `after`, and a place of another version that is printed."""
    places = ours("places")
    (tmp_path / "strange.py").write_text("eps = 1\n\nclass Norm:\n    eps = 1\n    eps = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = {"port": "x", "module": "strange", "text": "eps"}
    assert places._there(entry) == ["`strange.py:1, 4, 5`"]
    assert places._there(entry | {"after": "class Norm"}) == ["`strange.py:4`"]
    assert places._there(entry | {"text": "nowhere"}) == []
    monkeypatch.setitem(places.PORTS, "x", ours("ports").Port("x", "", "", ("numpy",)))
    assert places._there({"port": "x", "file": "a.cpp", "line": 3, "version": "0.0"}) == []
