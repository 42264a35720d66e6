"""Train the runs of docs/learning.md, or go on with them where they were stopped; a finished one is left as it is.

    python benchmarks/learn/train.py main                # 25 minutes of one core at most
    python benchmarks/learn/train.py v3-0 fp8-0          # short runs, one to three minutes each
    python benchmarks/learn/train.py all                 # every run of the page

Each is `refimpl train` with its recipe (`runs.py`), which is written to RUN/recipe.toml. Ctrl-C saves; the same command goes on. A
finished run has result.json: steps, tokens, CPU seconds, loss on the held-out novel. Needs the extra `data`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import HERE, document, names

from refimpl.autograd import Array
from refimpl.checkpoint import Transaction
from refimpl.cli.dispatch import main as command
from refimpl.layers.loss import IGNORE
from refimpl.layers.stage import observing
from refimpl.model import ForCausalLM
from refimpl.train.checkpoints import Saved
from refimpl.train.data import Build, Reader, Shards, build, load_tokenizer
from refimpl.train.recipe import to_toml
from refimpl.train.run import Job, load_job
from refimpl.train.training import parts


def shards(name: str, length: int) -> Path:
    """The shards of `NAME.jsonl.gz`, made if they are not there; half-done ones are gone on with."""
    folder = HERE / "shards" / name
    if not (folder / "index.json").exists():
        how = Build(length=length, packing="concatenate")
        for _ in build(folder, [HERE / f"{name}.jsonl.gz"], load_tokenizer(HERE / "tokenizer.json"), how):
            pass
    return folder


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, oldest first."""
    found = (folder / "checkpoints").glob("step-????????")
    return {int(p.name.removeprefix("step-")): p for p in sorted(found)}


def masters(path: Path) -> dict[str, Array]:
    """The weights of a checkpoint."""
    return dict(Saved(path).tensors("master").items())


def held_out_loss(this: Job, weights: Mapping[str, Array], batch: int = 32) -> dict[str, float]:
    """Mean loss on the held-out novel in nats a token: "main", of the model, and "mtp1", of its MTP module if it has one."""
    c, plan = this.config, this.run.recipe(0).plan
    rows = Shards(shards("held_out", this.run.phases[0].sequence))
    model = ForCausalLM.from_weights(c, {n: plan.weight(n, w) for n, w in weights.items()})
    reader = Reader(rows)
    cursor, sums, count = reader.start(), dict[str, float](), 0
    while cursor.samples < len(rows):
        part, cursor = reader.take(cursor, batch)
        with observing(plan):
            out = model.forward_and_loss(model.inputs(**part.inputs()), mtp_weight=1.0)
        n = int((part.labels[:, 1:] != IGNORE).sum())
        count += n
        for name, loss in parts(out.losses).items():
            sums[name] = sums.get(name, 0.0) + loss * n
    return {name: total / count for name, total in sums.items()}


def write_json(path: Path, found: Any) -> None:
    """A file that is there whole or not at all."""
    with Transaction() as files, files.new(path) as f:
        f.write(json.dumps(found, indent=1).encode())


def run(name: str, folder: Path) -> int:
    """Train run NAME in FOLDER/NAME to its end, and measure it -> the exit code of `refimpl train`."""
    folder = folder / name
    if (folder / "result.json").exists():
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    recipe, used = folder / "recipe.toml", folder / "cpu.json"
    recipe.write_text(to_toml(document(name)), encoding="utf-8")
    this = load_job(recipe)
    shards("novels", this.run.phases[0].sequence)
    spent, began = json.loads(used.read_text()) if used.exists() else 0.0, time.process_time()
    code = command(["train", str(recipe), "-o", str(folder), *(["--resume"] if checkpoints(folder) else [])])
    spent += time.process_time() - began
    write_json(used, spent)
    if code == 0:
        steps, path = checkpoints(folder).popitem()
        loss = held_out_loss(this, masters(path))
        result = {"run": name, "steps": steps, "tokens": this.run.tokens, "cpu_seconds": spent, "held_out": loss}
        write_json(folder / "result.json", result)
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
