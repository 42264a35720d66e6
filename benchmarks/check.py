"""Hold the measurements against the goals: `python benchmarks/check.py [results.json]`. Exits 1 if one is missed.
`--goals` prints the goals, `--only` takes some of the cases, `--files` adds what is not measured against transformers: the loader's
rate and that of a checkpoint's write.

Without a file it measures first (pairs.py, 9 rounds, one thread; about five minutes).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

from pairs import HERE, environment, measure

GOALS = (  # case, what of it, at most: ratios to transformers 5.23.0 in the same rounds, seconds for start-up
    ("mini/forward", "cpu_ratio", 1.25),
    ("mini/forward_backward", "cpu_ratio", 1.4),
    ("mini/train_step", "cpu_ratio", 1.0),
    ("mini/prefill_512", "cpu_ratio", 0.9),
    ("mini/decode_1", "cpu_ratio", 0.4),
    ("mini/decode_2", "cpu_ratio", 0.8),
    ("mini/decode_8", "cpu_ratio", 0.6),
    ("mini/forward", "peak_ratio", 0.7),
    ("mini/forward_backward", "peak_ratio", 0.9),
    ("mini/train_step", "peak_ratio", 0.8),
    ("tiny/startup", "cpu", 0.5),
    ("nodes/nodes", "cpu_ratio", 1.0),
)


FILES = (  # programs that print and judge what they see by themselves
    ("loader.py",),
    ("loader.py", "--length", "512", "--batch", "64"),
    ("train_checkpoint.py",),
)


def verdicts(results: dict[str, Any]) -> list[tuple[bool, str]]:
    """(met, line) per goal whose case was measured."""
    lines = []
    for case, what, limit in GOALS:
        if case in results:
            value = results[case]["refimpl"][what]
            met = value <= limit
            lines.append((met, f"{'met   ' if met else 'MISSED'}  {case:22s} {what:10s} {value:6.3f}  goal {limit}"))
    return lines


def files_met() -> list[bool]:
    """Run the benchmarks of files, which print their own tables."""
    return [subprocess.run([sys.executable, HERE / p, *how], env=environment(1)).returncode == 0 for p, *how in FILES]


def main() -> int:
    """0 if every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="?", type=pathlib.Path, help="a file of pairs.py --json; measured anew without it"
    )
    parser.add_argument("--only", help="cases, separated by commas (default: all that have a goal)")
    parser.add_argument(
        "--files", action="store_true", help="also the loader and a checkpoint's write, a minute or two"
    )
    parser.add_argument("--goals", action="store_true", help="print the goals as JSON")
    args = parser.parse_args()
    if args.goals:
        print(json.dumps(GOALS))
        return 0
    if args.results:
        results = json.loads(args.results.read_text())
    else:
        cases = args.only.split(",") if args.only else list(dict.fromkeys(case for case, _, _ in GOALS))
        results = measure(cases, rounds=9, threads=1)
    found = verdicts(results)
    print("\n".join(line for _, line in found))
    met = [*(met for met, _ in found), *(files_met() if args.files else [])]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
