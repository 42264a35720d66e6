"""Judge every recording of the matrix at five depths of recording, and print what `refimpl diff` saw.

    python benchmarks/diff_matrix/run.py --cache DIR --out rows.jsonl
    python benchmarks/diff_matrix/run.py --out rows.jsonl --table        # only the table, from rows that are there

Rows that are in the file already are not judged again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from corpus import ENTRIES
from record import chosen, options, places
from sets import SETS, part
from summary import tables

from refimpl.diff import Case, Trace
from refimpl.diff.judge import Judgement, judge

Job = tuple[str, int, str, str, str, Path]
"""(case, seed, dtype, entry, set, folder)."""
_VISIBLE = {"float32": 3e-6, "bfloat16": 2e-2}
"""A change of a tap, relative to the clean recording, from which a bug counts as visible."""


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """Everything asked for that has a trace."""
    for name, seed, dtype, folder in places(args):
        for entry in chosen(args.only):
            if (folder / dtype / f"{entry.id}.safetensors").exists():
                for tap_set in args.sets.split(","):
                    yield name, seed, dtype, entry.id, tap_set, folder


def row(job: Job) -> dict[str, Any]:
    """Judge one recording at one depth. A crash of the judge is a row, too."""
    name, seed, dtype, entry_id, tap_set, folder = job
    case, trace = Case.read(folder / "case"), Trace.read(folder / dtype / f"{entry_id}.safetensors")
    measured = json.loads((folder / dtype / f"{entry_id}.json").read_text())
    taps = {t: trace.taps[t] for t in part(tap_set, trace.taps, case.config)}
    header = dataclasses.replace(trace.header, expected=part(tap_set, trace.header.expected, case.config))
    change = max((v for t, v in measured["changes"].items() if t in header.expected), default=0.0)
    found = {"case": name, "seed": seed, "dtype": dtype, "entry": entry_id, "set": tap_set, "taps": len(taps)}
    start = time.perf_counter()
    try:
        judgement = judge(case, Trace(header, taps))
        found["seconds"] = round(time.perf_counter() - start, 3)
        found |= _outcome(judgement, entry_id)
        shown = {t for t, v in measured["changes"].items() if v > _VISIBLE[dtype]}
        found |= {"first": _first(judgement, shown), "causes": _causes(judgement, entry_id, tap_set)}
    except Exception as error:
        found |= {"verdict": "CRASH", "error": repr(error), "culprits": [], "right": False, "right_region": False}
        found |= {"first": False, "causes": [], "seconds": round(time.perf_counter() - start, 3)}
    return found | {"visible": change > _VISIBLE[dtype], "change": change, "baselines": measured["baselines"]}


def _outcome(found: Judgement, entry_id: str) -> dict[str, Any]:
    """Verdict, culprits, and whether they are the right ones: a true stage and nothing else; a true stage in every region."""
    entry = ENTRIES[entry_id]
    stages = {f.tap.rpartition("/")[2] for f in found.culprits}
    failed = [g for g in found.gates if g.state == "FAIL"]
    named = bool(entry.weights) and any(d.endswith(tuple(entry.weights.split())) for g in failed for d in g.details)
    regions = [{t.rpartition("/")[2] for t in getattr(f, "region", ()) or (f.tap,)} for f in found.culprits]
    near = entry.stages | entry.also
    return {
        "verdict": found.verdict,
        "culprits": [f.tap for f in found.culprits],
        "failed": [g.name for g in failed],
        "contested": found.contested,
        "gauges": list(getattr(found, "gauges", {})),
        "open": sum(getattr(f, "open", False) for f in found.findings),
        "right": stages <= near and (bool(stages & entry.stages) or named),
        "right_region": all(r & near for r in regions) and (any(r & entry.stages for r in regions) or named),
    }


def _first(found: Judgement, shown: set[str]) -> bool:
    """Whether the first culprit is no later than the first recorded tap that shows the edit."""
    order = [f.tap for f in found.findings]
    blamed = min((order.index(f.tap) for f in found.culprits), default=len(order))
    return blamed <= min((i for i, tap in enumerate(order) if tap in shown), default=len(order))


def _causes(found: Judgement, entry_id: str, tap_set: str) -> list[tuple[str, str]]:
    """(id, title) of the known mistakes that reproduce the first culprit of a bug, or else anything; with all taps only."""
    if tap_set != "all" or ENTRIES[entry_id].innocent or not found.culprits:
        return []
    first = [d for d in found.causes if found.culprits[0].tap in d.taps]
    return [(" ".join(d.ids), d.said) for d in first or found.causes]


def main() -> None:
    """The command."""
    parser = options(__doc__)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--out", type=Path, required=True, help="rows, one JSON object a line; grows")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--table", action="store_true", help="judge nothing")
    next(a for a in parser._actions if a.dest == "cache").required = False
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.table:
        done = {(r["case"], r["seed"], r["dtype"], r["entry"], r["set"]) for r in rows}
        todo = [job for job in jobs(args) if job[:5] not in done]
        with args.out.open("a") as file:
            for r in _judged(todo, args.jobs):
                file.write(json.dumps(r) + "\n")
                file.flush()
                rows.append(r)
    print(tables(rows))


def _judged(todo: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        yield from map(row, todo)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(row, todo, chunksize=8)


if __name__ == "__main__":
    main()
