"""Units whose tokens have another number of experts than the config says, in all that was recorded of them.

That is the fault of the ids alone, which are blamed. Weights, dispatched rows and their sum are judged on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from .dims import Sizes, shape_of
from .program import owner


def other_sizes(program: list[Call], taps: Mapping[str, Array], c: Config, sizes: Sizes) -> dict[str, Config]:
    """Tap -> the config with the number of experts a token that the ids of its unit have, and all that is sized by it there."""
    found: dict[str, Config] = {}
    for tap, k in [(call.tap, _slots(call, taps, c)) for call in program if call.stage == "router.ids"]:
        if k:
            other = c.replace(num_experts_per_tok=k, n_group=1, topk_group=1)  # kept groups may have fewer
            sized = [one for one in of_slots(program, owner(tap)) if one.tap in taps]
            if all(np.size(taps[one.tap]) == prod(shape_of(one, other, sizes)) for one in sized):
                found |= {one.tap: other for one in sized}
    return found


def of_slots(program: list[Call], unit: str) -> Iterator[Call]:
    """The calls of a unit whose taps have an entry for every expert of a token, or a dispatched row."""
    for call in program:
        axes = call.of.shape.split()
        if call.tap.startswith(f"{unit}/") and (axes[-1] == "K" or axes[0] == "M"):
            yield call


def _slots(call: Call, taps: Mapping[str, Array], c: Config) -> int:
    """How many experts a token has by its recorded ids, which all name one; 0 if that is the right number or cannot be known."""
    x = np.asarray(taps[call.tap]) if call.tap in taps else np.zeros(0)
    if x.ndim < 2 or not x.size or x.dtype.kind not in "iu" or int(x.min()) < 0 or int(x.max()) >= c.n_routed_experts:
        return 0
    k = x.shape[-1]
    return k if k != c.num_experts_per_tok and k < c.n_routed_experts else 0
