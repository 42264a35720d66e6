"""Train the runs of docs/learning.md, or go on with them where they were stopped; a finished one is left as it is.

    python benchmarks/learn/train.py main                # 25 minutes of one core at most
    python benchmarks/learn/train.py v3-0 fp8-0          # short runs, about a minute each
    python benchmarks/learn/train.py all                 # every run of the page

Each is `refimpl train` with its recipe (`runs.py`), which is written to RUN/recipe.toml; CPU seconds are in RUN/cpu.json. Ctrl-C
saves; the same command goes on. Needs the extra `text`; set OPENBLAS_NUM_THREADS=1, or cores that others use wait for each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from runs import HERE, document, names

from refimpl.checkpoint import Transaction
from refimpl.cli.dispatch import main as command
from refimpl.train.data import Build, build, load_tokenizer
from refimpl.train.recipe import to_toml
from refimpl.train.run import load_job


def shards(name: str, length: int) -> Path:
    """The shards of `NAME.jsonl.gz`, made if they are not there; half-done ones are gone on with."""
    folder = HERE / "shards" / name
    if not (folder / "index.json").exists():
        how = Build(length=length, packing="concatenate")
        for _ in build(folder, [HERE / f"{name}.jsonl.gz"], load_tokenizer(HERE / "tokenizer.json"), how):
            pass
    return folder


def write_json(path: Path, found: Any) -> None:
    """A file that is there whole or not at all."""
    with Transaction() as files, files.new(path) as f:
        f.write(json.dumps(found, indent=1).encode())


def run(name: str, folder: Path) -> int:
    """Train run NAME in FOLDER/NAME to its end -> the exit code of `refimpl train`."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe, used = folder / "recipe.toml", folder / "cpu.json"
    recipe.write_text(to_toml(document(name)), encoding="utf-8")
    sequence = load_job(recipe).run.phases[0].sequence
    for text in ("novels", "held_out"):
        shards(text, sequence)
    spent, began = json.loads(used.read_text()) if used.exists() else 0.0, time.process_time()
    begun = any((folder / "checkpoints").glob("step-????????"))
    code = command(["train", str(recipe), "-o", str(folder), *(["--resume"] if begun else [])])
    write_json(used, spent + time.process_time() - began)
    return code


def main() -> int:
    """Run what is asked for, until one is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="main, VARIANT-SEED, or all")
    parser.add_argument(
        "--out", type=Path, default=HERE / "runs", help="folder of the runs (default: beside this file)"
    )
    args = parser.parse_args()
    for name in names() if args.runs == ["all"] else args.runs:
        if code := run(name, args.out):
            print(f"stopped; the same command goes on: python {' '.join(sys.argv)}", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
