"""What a step's numbers say: how even the experts' load is, how far biases have moved, how well the machine is used."""

from __future__ import annotations

import math
import sys
import time

import numpy as np

from refimpl.autograd import Array
from refimpl.layers.config import Config
from refimpl.parallel_emulation.cost.layer_cost import attention_parameters, core_flop, mlp_flop, training_flop


def load(n: Array) -> dict[str, float]:
    """Tokens per expert n (E,) -> `peak`: max n / mean n (1 is even); `entropy`: -sum p log p / log E with p = n / sum n (1 is
    even, 0 one expert); `dead`: experts without a token.
    """
    p = n / max(n.sum(), 1)
    held = p[p > 0]
    entropy = float(-(held * np.log(held)).sum()) / math.log(len(n)) if len(n) > 1 else 1.0
    return {"peak": float(p.max() * len(n)), "entropy": entropy, "dead": int((n == 0).sum())}


def bias(b: Array) -> dict[str, float]:
    """A balancing bias b (E,), which began at 0 -> `drift`: sqrt(mean b^2), how far it is from there; `spread`: max b - min b."""
    b = b.astype(np.float64)
    return {"drift": float(np.sqrt((b * b).mean())), "spread": float(b.max() - b.min())}


def flop_per_token(c: Config, sequence: int, *, mtp: bool) -> float:
    """FLOP that a model needs for a token of training: 3 x its forward, with causal attention; MTP modules with their head if they
    are trained; without norms, activations, recomputation and the optimiser. MFU is this x tokens/s / peak.
    """
    extra = 0.0
    if mtp and c.num_nextn_predict_layers:
        d, last = c.hidden_size, c.num_hidden_layers
        block = 2.0 * attention_parameters(c) + core_flop(c, sequence) + mlp_flop(c, moe=c.is_moe(last))
        extra = c.num_nextn_predict_layers * (block + 2.0 * 2 * d * d + 2.0 * d * c.vocab_size)
    return training_flop(c, sequence) + 3 * extra


def gemm_rate(size: int = 768, tries: int = 5) -> float:
    """FLOP/s of the best of a few float32 products (size, size) x (size, size): what stands for this machine's peak."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    best = math.inf
    for _ in range(tries):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def peak_bytes() -> int:
    """The most memory that this process has had at any time (resident set); 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) if sys.platform == "darwin" else int(most) * 1024
