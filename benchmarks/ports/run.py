"""Record and judge every implementation in every regime, and write docs/ports.md of what was seen.

    python benchmarks/ports/run.py                                   # what is not there yet, then the page
    python benchmarks/ports/run.py --ports mlx-lm --cases plain,eps  # some of it
    python benchmarks/ports/run.py --page                            # only the page, from the rows that are there

Rows are in benchmarks/ports/rows.jsonl, one a run; a run is repeated when a version has changed, or with --again. Each
implementation runs in a process of its own, so that one that aborts is a row and not the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from page import rendered
from ports import CASES, PORTS, Port
from row import Row, base, row

from refimpl.autograd.errors import SpecError, require
from refimpl.checkpoint import Transaction

HERE = Path(__file__).resolve().parent
ROWS, PAGE = HERE / "rows.jsonl", HERE.parents[1] / "docs" / "ports.md"


# ---- Processes


def judged(port: Port, cases: list[str]) -> Iterator[Row]:
    """Rows of these cases as they come; a case during which the process ended is a row of its own."""
    while cases:
        with tempfile.TemporaryFile("w+") as log:
            command = [sys.executable, __file__, "--worker", port.name, "--cases", ",".join(cases)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    found = json.loads(line)
                    yield found
                    cases = cases[cases.index(found["case"]) + 1 :]
            log.seek(0)
            last = (log.read().strip().splitlines() or [""])[-1]
        if not cases:
            return
        require(child.returncode < 0, f"{port.name}: {last}")  # else it is not the framework that ended
        why = f"the process ended by signal {-child.returncode}: {last}"
        yield base(port, cases[0]) | {"verdict": "CRASHED", "why": why, "seconds": 0}
        cases = cases[1:]


def worker(name: str, cases: list[str]) -> None:
    """One row a line, on what is standard output now; what frameworks print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for case in cases:
            print(json.dumps(row(PORTS[name], case)), file=out, flush=True)


# ---- The command


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ports", default=";".join(PORTS), help="names, semicolons between (default: all)")
    parser.add_argument("--cases", default=",".join(CASES), help="plain and regimes, commas between (default: all)")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [c for c in CASES if c in _known(args.cases.split(","), CASES)]
    if args.worker:
        worker(args.worker, cases)
        return
    rows = kept() if ROWS.exists() else []
    if not args.page:
        for name in _known(args.ports.split(";"), PORTS):
            rows = run(PORTS[name], cases, rows, again=args.again)
    write(PAGE, rendered(rows))


def run(port: Port, cases: list[str], rows: list[Row], *, again: bool) -> list[Row]:
    """The rows with those of this implementation that were missing; written as they come."""
    try:
        versions = port.versions()
    except PackageNotFoundError as error:
        print(f"{port.name}: {error.name} is not installed; pip install 'deepseek-v3-refimpl[{port.extra}]'")
        return rows
    there = {r["case"] for r in rows if r["port"] == port.name and r["versions"] == versions}
    todo = [c for c in cases if again or c not in there]
    for n, found in enumerate(judged(port, todo), 1):
        rows = [r for r in rows if (r["port"], r["case"]) != (port.name, found["case"])] + [found]
        write(ROWS, "".join(json.dumps(r) + "\n" for r in sorted(rows, key=_order)))
        print(f"{port.name} {n}/{len(todo)} {found['case']}: {found['verdict']}, {found['seconds']} s", flush=True)
    return rows


def write(path: Path, text: str) -> None:
    """The whole file or none."""
    with Transaction() as files, files.new(path) as f:
        f.write(text.encode())


def kept() -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def _order(r: Row) -> tuple[int, int]:
    return list(PORTS).index(r["port"]), CASES.index(r["case"])


def _known(names: list[str], all_: Iterable[str]) -> list[str]:
    unknown = [n for n in names if n not in all_]
    if unknown:
        raise SpecError(f"{', '.join(unknown)}; known: {', '.join(all_)}")
    return names


if __name__ == "__main__":
    main()
