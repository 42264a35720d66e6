"""Small models with MTP, and requests, for claims about generation."""

import numpy as np

from refimpl import Impl
from refimpl.infer import Request, Settings
from refimpl.spec_tests.strategies.models import make_weights

from .configs import SMALL

CLOSE = {
    "rtol": 0,
    "atol": 1e-9,
}  # absorbed against expanded attention in float64, a few layers deep; logits are of order 1


def impl(modules=1, *, seed=0, sharp=1.0, **changes):
    """A model of SMALL in float64; `sharp` multiplies its logits."""
    config = SMALL.replace(num_nextn_predict_layers=modules, **changes)
    weights = make_weights(config.to_dict(), np.random.default_rng(seed), mtp=modules)
    weights["lm_head.weight"] = sharp * weights["lm_head.weight"]
    return Impl(precision="float64").load(config, weights)


def requests(*prompts, tokens=8, **settings):
    return [Request(p, Settings(max_tokens=tokens, seed=i, **settings)) for i, p in enumerate(prompts)]


PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [3, 3])
