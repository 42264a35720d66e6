"""Train one of the runs of docs/learning.md, or go on with it where it was stopped; a finished one is left as it is.

    python benchmarks/learn/train.py main                # 25 minutes of one core at most
    python benchmarks/learn/train.py v3-0 fp8-0          # short runs, one to three minutes each
    python benchmarks/learn/train.py all                 # every run of the page

Each run is that of `refimpl train` with its recipe (`runs.py`). Ctrl-C saves; the same command goes on. A run's folder holds
metrics.jsonl, checkpoints/, and when it is finished result.json: steps, tokens, CPU seconds, loss on the held-out novel.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from runs import HERE, job, names

from refimpl.checkpoint import Transaction
from refimpl.layers import Config
from refimpl.layers.precision import Plan
from refimpl.layers.stage import observing
from refimpl.model import ForCausalLM
from refimpl.train.data import Build, Shards, build, load_tokenizer
from refimpl.train.run import Job, train


def shards(name: str, length: int) -> Path:
    """The shards of `NAME.jsonl.gz`, made if they are not there; half-done ones are gone on with."""
    folder = HERE / "shards" / name
    if not (folder / "index.json").exists():
        how = Build(length=length, packing="concatenate")
        for _ in build(folder, [HERE / f"{name}.jsonl.gz"], load_tokenizer(HERE / "tokenizer.json"), how):
            pass
    return folder


def held_out_loss(c: Config, weights: dict[str, Any], plan: Plan, rows: Shards, batch: int = 32) -> dict[str, float]:
    """Mean loss in nats a token, of the model and of its MTP module, on all rows of shards."""
    model = ForCausalLM.from_weights(c, {n: plan.weight(n, w) for n, w in weights.items()})
    sums: dict[str, float] = {}
    for first in range(0, len(rows), batch):
        tokens = rows.rows(np.arange(first, min(first + batch, len(rows))))
        with observing(plan):
            out = model.forward_and_loss(model.inputs(tokens, labels=tokens), mtp_weight=0.3)
        for name, loss in out.losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss) * len(tokens)
    return {name.removeprefix("loss."): total / len(rows) for name, total in sums.items()}


def write_json(path: Path, found: Any) -> None:
    """A file that is there whole or not at all."""
    with Transaction() as files, files.new(path) as f:
        f.write(json.dumps(found, indent=1).encode())


def run(name: str, folder: Path) -> bool:
    """Train run NAME in FOLDER to its end; False if it was stopped before."""
    folder = folder / name
    if (folder / "result.json").exists():
        return True
    this: Job = job(name)
    length = this.run.phases[0].sequence
    shards("novels", length)
    used = json.loads((folder / "cpu.json").read_text()) if (folder / "cpu.json").exists() else 0.0
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

    def tell(record: Any) -> None:
        if record["step"] % this.log.every == 0:
            spent = used + time.process_time() - began
            print(f"{name} step {record['step']}/{len(this)} loss {record['loss']:.3f} {spent:.0f} s", flush=True)

    began = time.process_time()
    end = train(this, folder, resume=(folder / "checkpoints").exists(), stop=lambda: bool(asked), tell=tell)
    used += time.process_time() - began
    write_json(folder / "cpu.json", used)
    if end.complete:
        rows = Shards(shards("held_out", length))
        recipe = this.run.recipe(end.step - 1)
        loss = held_out_loss(this.config, dict(end.weights), recipe.plan, rows)
        tokens = end.record.get("tokens", this.run.tokens)
        write_json(folder / "result.json", {"run": name, "steps": end.step, "tokens": tokens, "cpu_seconds": used, "held_out": loss})
    return end.complete


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="main, VARIANT-SEED, or all")
    parser.add_argument("--out", type=Path, default=HERE / "runs", help="folder of the runs (default: beside this file)")
    args = parser.parse_args()
    for name in names() if args.runs == ["all"] else args.runs:
        if not run(name, args.out):
            print(f"stopped; go on with: {' '.join(sys.argv)}", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
