"""Record every entry of the matrix: one trace and one file of measures for each entry, case and dtype; what is there stays.

    python benchmarks/diff_matrix/record.py --cache DIR
    python benchmarks/diff_matrix/record.py --cache DIR --cases tiny --seeds 0 --dtypes bfloat16 --only "R*,clean"

DIR/CASE-SEED/case is the case, DIR/CASE-SEED/DTYPE/ENTRY.safetensors a trace, ENTRY.json beside it what was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cases import VARIANTS, make
from corpus import ENTRIES
from entries import Entry
from measures import against_ours, changes, our_run

from refimpl.autograd.errors import SpecError
from refimpl.diff import Case, Trace
from refimpl.record.hf import DTYPES, trace_of
from refimpl.record.hf_load import load_model
from refimpl.record.torch_arrays import one_thread


def options(about: str | None) -> argparse.ArgumentParser:
    """What both scripts can be asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the recordings")
    parser.add_argument("--cases", default=",".join(VARIANTS), help="names of cases (default: all)")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--only", default="*", help="entries: ids and patterns")
    return parser


def chosen(patterns: str) -> list[Entry]:
    """Entries whose id fits one of the patterns. SpecError if there are none."""
    found = [e for e in ENTRIES.values() if any(fnmatchcase(e.id, p) for p in patterns.split(","))]
    if not found:
        raise SpecError(f"no entry fits {patterns!r}; there are {', '.join(ENTRIES)}")
    return found


def places(args: argparse.Namespace) -> Iterator[tuple[str, int, str, Path]]:
    """(case, seed, dtype, folder) of everything asked for."""
    for name in args.cases.split(","):
        for seed in map(int, args.seeds.split(",")):
            for dtype in args.dtypes.split(","):
                yield name, seed, dtype, args.cache / f"{name}-{seed}"


def record(folder: Path, dtype: str, entries: list[Entry]) -> int:
    """Record what is not there yet of one case and dtype, the clean run first. -> how many traces were written."""
    missing = [e for e in (ENTRIES["clean"], *entries) if not _measures(folder, dtype, e).exists()]
    if not missing:
        return 0
    case = Case.read(folder / "case")
    (folder / dtype).mkdir(exist_ok=True)
    with one_thread():
        model, ours = load_model(case.raw_config, case.weights(), dtype), our_run(case)
        for entry in dict.fromkeys(missing):
            row = _one(model, case, folder, dtype, entry, ours)
            _measures(folder, dtype, entry).write_text(json.dumps(row))
    return len(missing)


def _measures(folder: Path, dtype: str, entry: Entry) -> Path:
    return folder / dtype / f"{entry.id}.json"


def _one(model: Any, case: Case, folder: Path, dtype: str, entry: Entry, ours: Any) -> dict[str, Any]:
    """Record an entry; -> its measures, or why it does not apply to this model."""
    start = time.perf_counter()
    try:
        with entry.patch(model):
            trace = trace_of(model, case, dtype=dtype, notes=f"matrix entry {entry.id}")
    except SpecError as error:
        return {"id": entry.id, "applies": False, "why": str(error)}
    trace.write(folder / dtype / f"{entry.id}.safetensors")
    clean = Trace.read(folder / dtype / "clean.safetensors").taps
    return {
        "id": entry.id,
        "applies": True,
        "seconds": round(time.perf_counter() - start, 3),
        "changes": changes(trace.taps, clean),
        "baselines": against_ours(trace.taps, ours),
        "notes": trace.header.notes,
    }


def main() -> None:
    """The command."""
    args = options(__doc__).parse_args()
    entries, start = chosen(args.only), time.perf_counter()
    for name, seed, dtype, folder in places(args):
        make(folder / "case", name, seed)
        n = record(folder, dtype, entries)
        print(f"{folder.name} {dtype}: {n} recorded, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
