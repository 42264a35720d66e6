"""How many drafts of the main run's MTP module stand (R 5.4.3: 85-90 % of the second tokens, 1.8 times the tokens a second).

    python benchmarks/learn/drafts.py        # a few minutes; reads runs/main, writes runs/main/drafts.json

Prompts are windows of the held-out novel; precision and weights are the run's own, at its last checkpoint. Beside that the module's
agreement with the model on the novel's text as it stands: nothing is generated there, so no repetition of its own flatters it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from runs import HERE
from train import write_json

from refimpl import Impl
from refimpl.autograd import require
from refimpl.infer import Request, Settings, Speculation, Tally, generate
from refimpl.infer.distribution import overlap, softmax
from refimpl.layers.stage import observing
from refimpl.train.checkpoints import Keeper, Saved
from refimpl.train.data import Shards
from refimpl.train.run import load_job

PROMPT, TOKENS, REQUESTS = 64, 64, 8
DRAFTS = (Speculation(1), Speculation(2, recycle=True))


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


def measured(folder: Path) -> dict[str, Any]:
    """Both, of the run in `folder`; the agreement at every checkpoint."""
    job, keeper = load_job(folder / "recipe.toml"), Keeper(folder / "checkpoints")
    steps = keeper.steps()
    require(steps and steps[-1] == len(job), f"{folder} is not at its end; train.py goes on with it")
    impl, rows, found = Impl(precision=job.run.recipe(0).plan), Shards(job.evaluation.shards), {}
    for step in steps:
        impl.load(job.config, dict(Saved(keeper.path(step)).tensors("master").items()))
        found[step] = agreement(impl, rows)
    return {"agreement": found, "drafting": drafting(impl, windows(rows, REQUESTS))}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE / "runs", help="folder of the runs (default: beside this file)"
    )
    args = parser.parse_args()
    folder = args.out / "main"
    write_json(folder / "drafts.json", measured(folder))


if __name__ == "__main__":
    main()
