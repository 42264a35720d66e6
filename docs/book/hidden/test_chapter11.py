"""Chapter 11's exercises."""

import numpy as np
import pytest

from refimpl.parallel_emulation.eplb import balanced_packing, gpu_loads, rebalance_experts, replicate


def drawn(seed, experts):
    """Loads with ties: whole numbers, few of them."""
    return np.random.default_rng(seed).integers(0, 12, experts)


@pytest.mark.parametrize("seed", range(4))
def test_loads(mine, seed):
    """Catches copies that each bear all of their expert, and slots dealt out in turn instead of in blocks."""
    tokens = drawn(seed, 16) + 1
    plan = rebalance_experts(tokens[None], 24, 1, 1, 4)
    assert mine.loads(tokens.tolist(), plan.phy2log[0].tolist(), 4) == pytest.approx(
        gpu_loads(tokens[None], plan, 4)[0].tolist()
    )


@pytest.mark.parametrize("seed", range(6))
def test_copies(mine, seed):
    """Catches copies by load alone, by a share of all slots rounded, and ties to the last."""
    tokens = drawn(seed, 12)
    _, _, count = replicate(tokens[None].astype(np.float32), 20)
    assert mine.copies(tokens.tolist(), 20) == count[0].tolist()


@pytest.mark.parametrize("seed, packs", [(0, 4), (1, 4), (2, 8), (3, 2), (4, 16)])
def test_pack(mine, seed, packs):
    """Catches packs over their room, the lightest pack although it is full, and an unstable order among equals."""
    weights = drawn(seed, 32)
    place = balanced_packing(weights[None].astype(np.float32), packs)[0] // (32 // packs)
    assert mine.pack(weights.tolist(), packs) == place.tolist()
