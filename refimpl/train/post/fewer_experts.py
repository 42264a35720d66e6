"""Expert pruning: the least used experts leave the model, config and router with them (Chen et al. 2022, arXiv 2206.00277;
Lu et al. 2024, arXiv 2402.14800). Described in articles, not in V3.

As many leave every group, so that groups stay equal, and as many every layer, for the config has one number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(.+)")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.(weight|e_score_correction_bias)")


def most_used(load: Mapping[int, Array], c: Config, *, per_group: int) -> dict[int, Array]:
    """The `per_group` experts of each group that most tokens chose, ascending; of equal ones the first.  layer -> tokens per expert
    (E,)  ->  layer -> ids (G per_group,).
    """
    size = c.n_routed_experts // c.n_group
    require(1 <= per_group <= size, f"per_group is {per_group}; a group has {size} experts")
    kept = {}
    for layer, n in load.items():
        require(n.shape == (c.n_routed_experts,), f"layer {layer}: load {n.shape}, {c.n_routed_experts} experts")
        best = np.argsort(-n.reshape(c.n_group, size), axis=1, kind="stable")[:, :per_group]
        kept[layer] = np.sort((best + size * np.arange(c.n_group)[:, None]).reshape(-1))
    return kept


def pruned(c: Config, weights: Mapping[str, Array], kept: Mapping[int, Array]) -> tuple[Config, dict[str, Array]]:
    """The model of the kept experts, counted anew in their order -> its config, its weights. SpecError if layers keep different
    numbers, a group more than another, or a layer of experts is not told.
    """
    n = _number_kept(c, kept)
    place = {layer: {int(e): i for i, e in enumerate(np.sort(ids))} for layer, ids in kept.items()}
    new = {}
    for name, w in weights.items():
        with where(f"while pruning {name}"):
            renamed = _renamed(name, place)
            if renamed and (router := _ROUTER.fullmatch(name)):
                w = w[sorted(place[int(router[1])])]
        if renamed:
            new[renamed] = w
    return c.replace(n_routed_experts=n), new


def _number_kept(c: Config, kept: Mapping[int, Array]) -> int:
    """How many experts every layer keeps. SpecError unless all keep as many in every group."""
    require(kept, "no layer keeps any expert")
    size, counts = c.n_routed_experts // c.n_group, {}
    for layer, ids in kept.items():
        known = bool(np.all((ids >= 0) & (ids < c.n_routed_experts)))
        require(known, f"layer {layer}: an expert out of range, 0..{c.n_routed_experts - 1}")
        require(len(np.unique(ids)) == len(ids), f"layer {layer}: an expert is kept twice")
        counts[layer] = np.bincount(ids // size, minlength=c.n_group).tolist()
    require(len({n for by_group in counts.values() for n in by_group}) == 1, f"groups must keep as many each: {counts}")
    return len(next(iter(kept.values())))


def _renamed(name: str, place: Mapping[int, Mapping[int, int]]) -> str | None:
    """The name in the smaller model, None for what leaves it."""
    found = _EXPERT.fullmatch(name)
    layer = found or _ROUTER.fullmatch(name)
    require(layer is None or int(layer[1]) in place, "nobody says which experts of this layer stay")
    if found is None:
        return name
    number = place[int(found[1])].get(int(found[2]))
    return None if number is None else f"model.layers.{found[1]}.mlp.experts.{number}.{found[3]}"
