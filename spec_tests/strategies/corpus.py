"""Regimes in which known bugs show, as strategies: one for each row of the corpus's list. Values are what shrinks.

A case of `refimpl case --regime` is one point of a regime; these draw others, for single stages.
"""

import numpy as np
from hypothesis import strategies as st

from .models import seeds

EXPERTS = 12


def normal(seed, *shape):
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


def scores(seed):
    """Affinities of five tokens (5, E), strictly between 0 and 1."""
    return np.random.default_rng(seed).uniform(0.01, 0.99, (5, EXPERTS))


signs = st.sampled_from([(0.5, 3.0), (-0.5, 0.5), (-5.0, -1.5)])
"""Ends of the selection bias: all positive, mixed, so negative that every biased score is below 0."""
biased = st.tuples(
    seeds.map(scores), st.tuples(seeds, signs).map(lambda a: np.random.default_rng(a[0]).uniform(*a[1], EXPERTS))
)
"""R01, R02, R14: affinities (5, E) and a bias (E,) of a sign."""
near_ties = st.lists(st.integers(0, 6), min_size=EXPERTS, max_size=EXPERTS).map(lambda n: 0.5 + np.array(n) * 2.0**-18)
"""R05, R06: choices (E,) that differ by 4e-6, or not at all."""
extreme_logits = st.lists(
    st.sampled_from([-800.0, -120.0, -20.0, 0.0, 90.0, 800.0]), min_size=EXPERTS, max_size=EXPERTS
).map(np.array)
"""R12, R14: logits (E,) whose sigmoid is 0 or 1 to rounding, or underflows."""
groupings = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 4), (6, 3)]).flatmap(
    lambda g: st.tuples(st.just(g[0]), st.just(g[1]), st.integers(1, EXPERTS // g[0] * g[1]))
)
"""R03, R15: n_group, topk_group, num_experts_per_tok; also all groups, one group, all experts of the kept ones."""
small_rows = st.tuples(seeds, st.sampled_from([1.0, 1e-2, 1e-3, 0.0]), st.sampled_from([1e-6, 1e-5, 1e-3])).map(
    lambda a: (a[1] * normal(a[0], 4, 10), a[2])
)
"""A12, A13: rows (4, 10) of a size that an eps beside 1e-6 changes; and the eps."""
positions = st.lists(st.integers(0, 163839), min_size=1, max_size=6).map(lambda p: np.array([p]))
"""A04 to A11, A14: any positions (1, S), in any order."""
cuts = st.integers(2, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n - 1), min_size=1).map(lambda at: [0, *sorted(at), n]))
)
"""A17 to A21: how many tokens, and where the run is cut: a long prefix and one token, one at a time, chunks."""
fp8_rows = st.tuples(
    seeds,
    st.sampled_from([1, 127, 128, 129, 576]),
    st.sampled_from([0.0, 2.0**-130, 1.0, 448.0, 449.0, 448 * (1 + 2.0**-23)]),
).map(
    lambda a: (
        np.float32(a[2]) * (normal(a[0], 1, a[1]) / max(np.abs(normal(a[0], 1, a[1])).max(), 1e-9)).astype(np.float32)
    )
)
"""F01 to F14: one row (1, K) whose largest number is 0, subnormal, 448, just above: scales of 1 and next to it."""
labels = st.tuples(st.integers(1, 4), st.integers(0, 2)).flatmap(
    lambda a: st.tuples(st.just(a[1]), st.lists(st.sampled_from([-100, 0, 3]), min_size=a[0], max_size=a[0]))
)
"""T01 to T08: an MTP depth, and labels (T,) of few tokens, some ignored, token 0 kept."""
micro_batches = st.lists(st.lists(st.sampled_from([-100, 1, 2]), min_size=2, max_size=5), min_size=1, max_size=4)
"""L01 to L07: labels of micro-batches of unequal lengths."""
loader_faults = st.sampled_from(["missing", "extra", "renamed", "transposed", "short"])
"""R17, R18: what is wrong with a set of weights."""

REGIMES = {
    1: biased,
    2: near_ties,
    3: extreme_logits,
    4: groupings,
    5: small_rows,
    6: positions,
    7: cuts,
    8: fp8_rows,
    9: labels,
    10: micro_batches,
    11: loader_faults,
}
"""Number in the corpus's list of regimes -> strategy."""
