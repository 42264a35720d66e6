"""Chapter 9's exercises."""

import numpy as np
import pytest

from refimpl.parallel_emulation.collectives.two_hop import dispatch, make_nodes
from refimpl.parallel_emulation.comm import Log, spmd
from refimpl.parallel_emulation.cost.traffic import count_copies


@pytest.mark.parametrize("seed", range(5))
def test_copies(mine, seed):
    """Catches a rank that counts once for each of its experts, and the own node counted."""
    rng = np.random.default_rng(seed)
    ids, home = rng.choice(64, 8, replace=False), int(rng.integers(16))
    found = count_copies(ids[None], np.array([home]), 64, 16, 4)
    to_others, remote = mine.copies(ids.tolist(), home, 64, 16, 4)
    assert remote == found.remote_nodes
    assert to_others == found.ranks - (home in ids // 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_two_hops_are_those_that_the_simulator_logs(mine, gpus, seed):
    """Catches a copy for every target over the slow wire, a relay with the target's number, a message to oneself."""
    needed = np.random.default_rng(seed).random(8) < 0.5
    home, log = seed, Log()

    def program(comm):
        rows = np.ones((int(comm.rank == home), 3))
        dispatch(make_nodes(comm, gpus), rows, np.tile(needed, (len(rows), 1)))

    spmd(8, program, log=log)
    first, second = mine.two_hops(home, set(np.flatnonzero(needed).tolist()), gpus)
    for found, hop in ((first, "rail"), (second, "node")):
        assert found == {(int(a), int(b)) for a, b in np.argwhere(log.matrix(8, label=f"dispatch.{hop}"))}


def test_all_reduce_adds_in_rank_order(mine):
    """Catches a sum in another order, by its bits, and ranks that end up with different sums."""
    x = (
        np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
        * 10.0 ** np.arange(5, dtype=np.float32)[:, None]
    )
    expected = x[0].copy()
    for row in x[1:]:
        expected = expected + row
    log = Log()
    for got in spmd(5, lambda comm: mine.all_reduce(comm, x[comm.rank]), log=log):
        np.testing.assert_array_equal(got, expected)
    assert log.calls(rank=0) == 2
