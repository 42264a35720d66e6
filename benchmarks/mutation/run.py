"""Run the suite's tests on a sample of general mutants: `python benchmarks/mutation/run.py --out rows.jsonl`.

First once with coverage, to know which test runs which line and how long it takes (kept in `--map`); then each mutant of
`--sample` with the tests that run its lines, quick ones first, until one fails. Goes on where it was stopped. `--table` prints
what the rows say.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as xml
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from queue import Queue

from sample import Mutant, sampled

ROOT = Path(__file__).resolve().parents[2]
REASONS = tomllib.loads((Path(__file__).parent / "survivors.toml").read_text(encoding="utf-8"))
"""Of a mutant that survived: {"equivalent": why}, or {"test": id of the test that was written for it}."""
QUICK = 25  # tests that are asked before all others
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def mapped(root: Path, out: Path) -> None:
    """Write {"lines": {file: {line: [test number]}}, "tests": [id], "seconds": [..]} of one run of the default tests."""
    with tempfile.TemporaryDirectory() as folder:
        data = ENVIRONMENT | {"COVERAGE_FILE": f"{folder}/coverage"}
        junit = ["-o", "junit_family=xunit1", f"--junitxml={folder}/junit.xml"]
        subprocess.run(
            [*PYTEST, "--cov", "--cov-context=test", "--cov-report=", *junit], cwd=root, env=data, check=False
        )
        seconds: dict[str, float] = {}
        for case in xml.parse(f"{folder}/junit.xml").iter("testcase"):
            seconds[f"{case.get('file')}::{case.get('name')}"] = float(case.get("time", 0))
        tests = sorted(seconds)
        number = {test: i for i, test in enumerate(tests)}
        lines: dict[str, dict[int, list[int]]] = {}
        with sqlite3.connect(f"{folder}/coverage") as db:
            # with branches (pyproject.toml) coverage keeps which line followed which
            joined = "arc join file on file.id = file_id join context on context.id = context_id"
            for path, context, line in db.execute(f"select distinct path, context, tono from {joined} where tono > 0"):
                test = number.get(context.rpartition("|")[0])
                if test is not None:
                    lines.setdefault(Path(path).relative_to(root).as_posix(), {}).setdefault(line, []).append(test)
    out.write_text(json.dumps({"lines": lines, "tests": tests, "seconds": [seconds[t] for t in tests]}))


def judged(mutant: Mutant, root: Path, known: dict, most: float) -> dict[str, object]:
    """The row of one mutant: killed and by which test, or survived `most` seconds of tests; timed out counts as killed."""
    of_file = known["lines"].get(mutant.file, {})
    numbers = {t for line in range(mutant.first, mutant.last + 1) for t in of_file.get(str(line), ())}
    if not numbers:  # what runs while the module is imported, or nowhere: whoever uses the module
        numbers, most = {t for tests in of_file.values() for t in tests}, most / 4
    order = sorted(numbers, key=lambda t: known["seconds"][t])
    total = list(accumulate(known["seconds"][t] for t in order))
    order = order[: max(QUICK, bisect_right(total, most))]
    file, start = root / mutant.file, time.monotonic()
    honest = file.read_text(encoding="utf-8")
    outcome, by = "survived" if order else "no test runs it", ""
    try:
        file.write_text(mutant.source(root), encoding="utf-8")
        for part in (order[:QUICK], order[QUICK:]):
            if part and outcome == "survived":
                outcome, by = _asked(
                    [known["tests"][t] for t in part], root, 60 + 10 * sum(known["seconds"][t] for t in part)
                )
    finally:
        file.write_text(honest, encoding="utf-8")
    row = asdict(mutant) | {"key": mutant.key, "outcome": outcome, "by": by, "tests": len(order)}
    return row | {"seconds": round(time.monotonic() - start, 1), "line": honest.splitlines()[mutant.first - 1].strip()}


def _asked(tests: list[str], root: Path, limit: float) -> tuple[str, str]:
    """Run tests until one fails -> outcome and by what. Of those whose ids hold what was changed, the function."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as listed:
        listed.write("\n".join(tests))
        listed.flush()
        command = [*PYTEST, "-x", f"@{listed.name}"]
        try:
            ran = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return "killed", "took too long"
    said = ran.stdout.splitlines() + ran.stderr.splitlines()
    gone = [t for t in tests if any(line.startswith("ERROR: not found:") and line.endswith(t) for line in said)]
    if gone:
        functions = sorted({t.partition("[")[0] for t in gone if "[" in t})
        return _asked([*(t for t in tests if t not in gone), *functions], root, limit)
    if ran.returncode in (0, 5):  # 5: none of the tests is there
        return "survived", ""
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    return "killed", failed[0].split(" - ")[0] if failed else "\n".join(said)[-200:]


def table(rows: list[dict]) -> str:
    """Outcomes by folder, then what survived and why: the test that was then written, or what makes the mutant no other program."""
    told = {r["key"]: REASONS.get(r["key"], {}) for r in rows if r["outcome"] != "killed"}
    outcome = {r["key"]: next(iter(told[r["key"]]), "open") if r["key"] in told else "killed" for r in rows}
    folders = Counter((_folder(r["file"]), outcome[r["key"]]) for r in rows)
    columns = ("killed", "test", "equivalent", "open")
    lines = [
        "| folder | killed | by a test written since | equivalent | open | killed of those that are not equivalent |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for folder in [*sorted({f for f, _ in folders}), ""]:
        n = [sum(n for (f, o), n in folders.items() if o == column and folder in ("", f)) for column in columns]
        share = (n[0] + n[1]) / max(1, sum(n) - n[2])
        lines.append(f"| {folder or 'all'} | " + " | ".join(map(str, n)) + f" | {share:.1%} |")
    at = {r["key"]: r["line"].replace("|", "\\|") for r in rows}
    lines += ["", "| survived | line | why, or the test since |", "|---|---|---|"]
    lines += [f"| {k} | `{at[k]}` | {next(iter(why.values()), 'open')} |" for k, why in told.items()]
    return "\n".join(lines)


def _folder(file: str) -> str:
    return "/".join(Path(file).parts[: 2 if file.startswith("refimpl") else 1])


def run(args: argparse.Namespace) -> None:
    """Judge what has no row yet, on `--jobs` copies of the tree."""
    done = {json.loads(line)["key"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    left = [m for m in sampled(args.sample, ROOT, args.n, args.seed) if m.key not in done]
    with tempfile.TemporaryDirectory() as folder, args.out.open("a") as rows, ThreadPoolExecutor(args.jobs) as pool:
        copies: Queue[Path] = Queue()
        for job in range(args.jobs):
            copy = Path(folder) / str(job)
            shutil.copytree(
                ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", ".*_cache", "site")
            )
            copies.put(copy)
        if not args.map.exists():
            print("coverage of the default tests ...", flush=True)
            mapped(Path(folder) / "0", args.map)
        known = json.loads(args.map.read_text())

        def one(mutant: Mutant) -> None:
            copy = copies.get()
            row = judged(mutant, copy, known, args.most)
            copies.put(copy)
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            print(f"{row['outcome']:16} {row['seconds']:6} s  {row['key']}  {row['by']}", flush=True)

        list(pool.map(one, left))


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="rows, one a line; those that are there are not judged again"
    )
    parser.add_argument("--map", type=Path, default=Path("tests_by_line.json"), help="where lines and tests are kept")
    parser.add_argument(
        "--sample", type=Path, default=ROOT / "benchmarks/mutation/sample.json", help="drawn if it is not there"
    )
    parser.add_argument("-n", type=int, default=600, help="mutants (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--most", type=float, default=120, help="seconds of tests that a mutant is given (default 120)")
    parser.add_argument("--table", action="store_true", help="only print what the rows say")
    args = parser.parse_args()
    if not args.table:
        run(args)
    print(table([json.loads(line) for line in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
