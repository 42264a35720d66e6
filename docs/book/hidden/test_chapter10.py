"""Chapter 10's exercises."""

import pytest

from refimpl.parallel_emulation.pipeline import Times, build, check, simulate


@pytest.mark.parametrize("ranks, m", [(1, 3), (4, 8), (8, 20), (4, 2)])
def test_one_f_one_b(mine, ranks, m):
    """Catches a warm-up one too long, and more warm-up than micro-batches."""
    for rank, line in enumerate(str(build("1f1b", ranks, m)).splitlines()):
        assert mine.one_f_one_b(ranks, m, rank) == [word.replace("0.", "", 1) for word in line.split()]


@pytest.mark.parametrize("ranks, m, forward, backward", [(4, 8, 1, 2), (3, 5, 1.5, 2.25), (1, 4, 1, 1), (8, 20, 2, 1)])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_makespan(mine, name, ranks, m, forward, backward):
    """Catches a step that does not wait for its input, the last rank's backward without its forward, a sum instead of a max."""
    schedule = build(name, ranks, m)
    orders = [[word.replace("0.", "", 1) for word in line.split()] for line in str(schedule).splitlines()]
    expected = simulate(schedule, Times(F=forward, B=backward, W=0)).makespan
    assert mine.makespan(orders, forward, backward) == expected  # sums of quarters are exact


@pytest.mark.parametrize("name, ranks, m", [("1f1b", 4, 8), ("zb1p", 4, 8), ("gpipe", 4, 6), ("dualpipe", 8, 20)])
def test_peak_live(mine, name, ranks, m):
    """Catches weight parts that free a chunk, and pairs counted as one."""
    schedule = build(name, ranks, m)
    assert [mine.peak_live(line) for line in str(schedule).splitlines()] == list(check(schedule).peak_live)
