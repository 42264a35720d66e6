"""Continual updates with replay, described in articles, not in V3."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from refimpl.autograd import SpecError
from refimpl.spec_tests.cases import toys
from refimpl.train import AdamW, init
from refimpl.train.post.replay import Reservoir, mixed


class Scripted:
    """A generator that gives the integers it was told."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def integers(self, below):
        n = self.numbers.pop(0)
        assert n < below
        return n


def test_every_item_is_kept_with_the_same_probability():
    """All draws enumerated: 2 places, 5 items, 3 x 4 x 5 equally likely courses; each item is in 2/5 of the ends. Catches a
    probability of capacity / (seen - 1), a place that is never overwritten.
    """
    kept = []
    for course in itertools.product(range(3), range(4), range(5)):
        held = Reservoir(2, Scripted(course))
        for item in range(5):
            held.add(item)
        kept += held.items
    assert [kept.count(i) for i in range(5)] == [24] * 5  # 60 ends of 2 items


def test_mixed_batches():
    """Catches a batch that grows, a share of the old rather than of the batch, an old item twice, too few for the share."""
    old = Reservoir(10, np.random.default_rng(0))
    assert mixed([1, 2, 3, 4], old, 0.5) == [1, 2, 3, 4]
    for i in range(100, 103):
        old.add(i)
    batch = mixed([1, 2, 3, 4], old, 0.5)
    assert batch[:2] == [1, 2] and len(set(batch)) == 4 and set(batch[2:]) <= {100, 101, 102}
    assert sorted(mixed([1, 2, 3, 4], old, 1.0)) == [1, 100, 101, 102]
    with pytest.raises(SpecError, match="share is 2"):
        mixed([1], old, 2)
    with pytest.raises(SpecError, match="capacity is 0"):
        Reservoir(0, np.random.default_rng(0))


@pytest.mark.slow
def test_replay_keeps_what_was_learned():
    """After learning to copy, a model learns to reverse after another token: with a quarter of each batch from the reservoir it
    still copies. Catches a reservoir that fills with new items only. Over five seeds 0.64 to 0.91 of what was learned stays, 0.11
    to 0.13 without the reservoir: half tells them apart, whatever the last bits.
    """
    rng = np.random.default_rng(0)
    first = [toys.some(toys.COPY, 16, rng) for _ in range(80)]
    weights = toys.fine_tune(init(toys.TOY, std=0.1), first)
    assert toys.accuracy(weights, toys.every(toys.COPY)) > 0.8
    memory = Reservoir(64, np.random.default_rng(1))
    for e in itertools.chain(*first):
        memory.add(e)
    gently = replace(toys.RECIPE, opt=AdamW(lr=5e-3, weight_decay=0.0))
    second = [toys.some(toys.REVERSE, 16, rng) for _ in range(120)]
    alone, replayed = (
        toys.fine_tune(weights, [mixed(batch, memory, share) for batch in second], gently) for share in (0.0, 0.25)
    )
    assert toys.accuracy(alone, toys.every(toys.COPY)) < 0.3
    assert toys.accuracy(replayed, toys.every(toys.COPY)) > 0.5
    for weights in (alone, replayed):
        assert toys.accuracy(weights, toys.every(toys.REVERSE)) > 0.7
