"""Hold the measurements against the goals: `python benchmarks/check.py [results.json]`. Exits 1 if one is missed.
`--goals` prints the goals.

Without a file it measures first (pairs.py, 9 rounds, one thread; about four minutes).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from pairs import measure

GOALS = (  # case, what of it, at most: ratios to transformers 5.23.0 in the same rounds, seconds for start-up
    ("mini/forward", "cpu_ratio", 1.25),
    ("mini/forward_backward", "cpu_ratio", 1.4),
    ("mini/decode_1", "cpu_ratio", 0.6),
    ("mini/decode_2", "cpu_ratio", 0.8),
    ("mini/forward", "peak_ratio", 0.7),
    ("mini/forward_backward", "peak_ratio", 0.9),
    ("tiny/startup", "cpu", 0.5),
    ("nodes/nodes", "cpu_ratio", 1.0),
)


def verdicts(results: dict[str, Any]) -> list[tuple[bool, str]]:
    """(met, line) per goal."""
    lines = []
    for case, what, limit in GOALS:
        value = results[case]["refimpl"][what]
        met = value <= limit
        lines.append((met, f"{'met   ' if met else 'MISSED'}  {case:22s} {what:10s} {value:6.3f}  goal {limit}"))
    return lines


def main() -> int:
    """0 if every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="?", type=pathlib.Path, help="a file of pairs.py --json; measured anew without it"
    )
    parser.add_argument("--goals", action="store_true", help="print the goals as JSON")
    args = parser.parse_args()
    if args.goals:
        print(json.dumps(GOALS))
        return 0
    if args.results:
        results = json.loads(args.results.read_text())
    else:
        results = measure(list(dict.fromkeys(case for case, _, _ in GOALS)), rounds=9, threads=1)
    found = verdicts(results)
    print("\n".join(line for _, line in found))
    return 0 if all(met for met, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
