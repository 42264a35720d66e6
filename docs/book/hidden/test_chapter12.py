"""Chapter 12's exercises."""

import numpy as np
import pytest

from refimpl.infer.engine import Limits
from refimpl.infer.engine.blocks import Blocks
from refimpl.infer.engine.job import Job
from refimpl.infer.engine.scheduler import Scheduler


@pytest.mark.parametrize("seed", range(5))
def test_blocks_needed(mine, seed):
    """Catches blocks that agree but follow on different ones, and a shared last block that is not full."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 2, rng.integers(1, 12)).tolist() for _ in range(12)]
    prefixes = {}
    for p in prompts:  # a naive tree of blocks
        at = prefixes
        for i in range(0, len(p), 3):
            key = tuple(p[i : i + 3]) if i + 3 <= len(p) else object()
            at = at.setdefault(key, {})

    def count(tree):
        return sum(1 + count(below) for below in tree.values())

    assert mine.blocks_needed(prompts, 3) == count(prefixes)


@pytest.mark.parametrize("seed", range(8))
def test_schedule(mine, seed):
    """Catches a budget that is overdrawn, a first token a step late, a request that keeps its place when it is over."""
    rng = np.random.default_rng(seed)
    requests = [(int(p), int(a)) for p, a in rng.integers(1, 14, (7, 2))]
    rows, tokens = int(rng.integers(1, 5)), int(rng.integers(4, 10))
    scheduler = Scheduler(Blocks(400, 4), Limits(rows=rows, tokens=tokens))
    for number, (prompt, answer) in enumerate(requests):
        scheduler.submit(Job(number, 0.0, [100 + number] * prompt, answer))
    expected = []
    while work := scheduler.step(0.0, more=False).work:
        expected.append([(w.job.id, w.stop - w.start) for w in work])
        for w in work:
            scheduler.done(w, 1 if w.decides else None)
            if w.decides and not w.job.left:
                scheduler.leave(w.job)
    assert mine.schedule(requests, rows, tokens) == expected


@pytest.mark.parametrize("experts, k, tokens", [(8, 2, 1), (8, 2, 5), (6, 6, 3), (16, 1, 40)])
def test_touched(mine, experts, k, tokens):
    """Catches draws with replacement inside a token (6 of 6 touch all), and experts counted once a token."""
    rng = np.random.default_rng(0)
    drawn = [len(np.unique([rng.choice(experts, k, replace=False) for _ in range(tokens)])) for _ in range(3000)]
    assert mine.touched(experts, k, tokens) == pytest.approx(np.mean(drawn), abs=0.1)  # standard error below 0.03
