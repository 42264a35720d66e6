"""How long a placement takes, in products of two 512 x 512 float32 matrices on the same core: `python benchmarks/eplb.py`.

58 layers x 256 experts -> 288 slots. The published PyTorch code takes about 260 products (hierarchical, 8 groups, 4
nodes, 32 GPUs) and 1,240 (global, 144 GPUs) in this measure; the goal is half of that, and the exit code 1 if one is
missed. Set OPENBLAS_NUM_THREADS=1, or the product is not that of one core. Both take turns, the best of each counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from refimpl.parallel_emulation.eplb import imbalance, rebalance_experts

CASES = {  # name -> (replicas, groups, nodes, gpus), products the published code takes
    "hierarchical": ((288, 8, 4, 32), 260),
    "global": ((288, 8, 18, 144), 1240),
}
LAYERS, EXPERTS, SIDE, ROUNDS = 58, 256, 512, 15


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> int:
    """0 if both goals are met."""
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 5000, (LAYERS, EXPERTS))
    a, b = rng.standard_normal((2, SIDE, SIDE), dtype=np.float32)
    met = True
    for name, (sizes, published) in CASES.items():
        turns = [
            (seconds(lambda: a @ b), seconds(lambda s=sizes: rebalance_experts(weight, *s))) for _ in range(ROUNDS)
        ]
        product, placement = (min(column) for column in zip(*turns, strict=True))
        ratio, spread = placement / product, imbalance(weight, rebalance_experts(weight, *sizes), sizes[-1])
        met = met and ratio <= published / 2
        print(
            f"{name:13} {placement * 1e3:7.2f} ms = {ratio:6.2f} products of {product * 1e3:.2f} ms "
            f"(goal {published / 2:g}, published code {published}); max / mean load {spread.mean():.3f}"
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
