"""What the main run's checkpoints can do: loss on the held-out novel, text, and drafts of the MTP module that stand.

    python benchmarks/learn/measure.py        # five minutes; reads runs/main, writes runs/main/measured.json

Text and drafts are those of `refimpl.infer`, in the precision the model was trained in. Drafting is measured on windows of the
held-out novel, and the MTP module's agreement with the model on its text as it stands (no text is generated for that).
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from runs import HERE
from train import checkpoints, held_out_loss, masters, shards, write_json

from refimpl import Impl
from refimpl.infer import Request, Settings, Speculation, Tally, generate
from refimpl.infer.distribution import overlap, softmax
from refimpl.layers.stage import observing
from refimpl.train import init
from refimpl.train.data import Shards, load_tokenizer
from refimpl.train.run import load_job

PROMPTS = ("Sir Walter Elliot, of Kellynch Hall,", '"My dear Miss Elliot," said')
"""How the held-out novel begins, and a speech."""
PROMPT, TOKENS, REQUESTS = 64, 64, 24
DRAFTS = (Speculation(1), Speculation(2, recycle=True))


def samples(impl: Impl, tokenizer: Any) -> list[dict[str, Any]]:
    """Each prompt continued, greedily and by drawing at temperature 0.7."""
    found = []
    for prompt in PROMPTS:
        ids = tokenizer.encode([prompt])[0].tolist()
        for temperature in (0.0, 0.7):
            settings = Settings(temperature=temperature, max_tokens=TOKENS)
            (out,) = generate(impl, [Request(ids, settings)])
            found.append({"prompt": prompt, "temperature": temperature, "text": tokenizer.decode(out.tokens)})
    return found


def agreement(impl: Impl, rows: Shards, n: int = 64) -> dict[str, float]:
    """On n rows of text: how often model and MTP module have the same most likely token for a position, and sum min(p, q) of their
    distributions: what drafts would stand at temperature 0 and 1, if the text before them were this.
    """
    tokens = rows.rows(np.arange(min(n, len(rows))))
    with observing(impl.plan):
        out = impl.model(impl.model.inputs(tokens), with_mtp=True)
    p, q = (
        out.logits[:, 1:-1],
        out.mtp_logits[0][:, :-1],
    )  # both of the token after i + 1; q has not seen that one's logits
    shared = [
        overlap(softmax(a), softmax(b))
        for a, b in zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), strict=True)
    ]
    right = (p.argmax(-1) == tokens[:, 2:]).mean()
    return {
        "same": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "overlap": float(np.mean(shared)),
        "right": float(right),
    }


def timed(impl: Impl, requests: list[Request], how: Speculation | None) -> tuple[float, Tally]:
    """CPU seconds for all requests, one after the other, and the tally."""
    tally, began = Tally(), time.process_time()
    for request in requests:
        generate(impl, [request], speculate=how, tally=tally)
    return time.process_time() - began, tally


def drafting(impl: Impl, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """A row for every temperature and way to draft."""
    found = []
    for temperature in (0.0, 0.7, 1.0):
        how = [Settings(temperature=temperature, max_tokens=TOKENS, seed=i) for i in range(len(prompts))]
        requests = [Request(p, s) for p, s in zip(prompts, how, strict=True)]
        plain, _ = timed(impl, requests, None)
        for drafts in DRAFTS:
            seconds, tally = timed(impl, requests, drafts)
            row = {"temperature": temperature, "depth": drafts.depth, "stood": tally.acceptance, "tried": tally.tried}
            found.append(row | {"tokens_per_step": tally.tokens_per_step, "time": seconds / plain})
    return found


def windows(rows: Shards, n: int) -> list[list[int]]:
    """The first tokens of n rows of the held-out novel, spread over it."""
    return [row[:PROMPT].tolist() for row in rows.rows(np.linspace(0, len(rows) - 2, n).astype(np.int64))]


def text_bytes(name: str) -> int:
    """UTF-8 bytes of the text of `NAME.jsonl.gz`."""
    lines = gzip.decompress((HERE / f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
    return sum([len(json.loads(line)["text"].encode()) for line in lines])


def measured(folder: Path) -> dict[str, Any]:
    """Everything, of the run in `folder`."""
    this, tokenizer = load_job(folder / "recipe.toml"), load_tokenizer(HERE / "tokenizer.json")
    plan, start = this.run.recipe(0).plan, init(this.config, seed=this.seed, std=this.run.optimizer.init_std)
    weights = {0: lambda: start} | {step: partial(masters, path) for step, path in checkpoints(folder).items()}
    shown = [min(weights), sorted(weights)[len(weights) // 2], max(weights)]
    losses, texts, impl = {}, {}, Impl(precision=plan)
    for step, of in weights.items():
        losses[step] = held_out_loss(this, held := of())
        print(f"step {step}: held-out loss {losses[step]['main']:.3f}", flush=True)
        if step in shown:
            texts[step] = samples(impl.load(this.config, held), tokenizer)
    rows = Shards(shards("held_out", this.run.phases[0].sequence))
    sizes = {"bytes": text_bytes("held_out"), "tokens": sum([s.tokens for s in rows.shards])}
    drafts = {"agreement": agreement(impl, rows), "drafting": drafting(impl, windows(rows, REQUESTS))}
    return {"held_out": losses, "samples": texts} | sizes | drafts


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE / "runs", help="folder of the runs (default: beside this file)"
    )
    args = parser.parse_args()
    folder = args.out / "main"
    write_json(folder / "measured.json", measured(folder))


if __name__ == "__main__":
    main()
