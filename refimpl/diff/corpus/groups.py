"""Mistakes of the choice of experts: groups and what is chosen among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.router import top_k

from .mutant import Best, Mutant, setting, stage, threads, unmade

_IDS = "router.ids"


def _grouped(c: Config) -> bool:
    return c.n_group > 1 and c.topk_method != "greedy"


def _biased(c: Config) -> bool:
    return c.n_group > 1 and c.topk_method == "noaux_tc"


def _filled(a: Array, inside: Array, fill: float) -> Array:
    """a, and `fill` in groups that are not inside.  a (*, E), inside (*, G) -> (*, E)."""
    return np.where(np.repeat(inside, a.shape[-1] // inside.shape[-1], axis=-1), a, a.dtype.type(fill))


def _inside(kept: Array, n_group: int) -> Array:
    """Which groups are kept.  kept (*, M) -> (*, G)."""
    found: Array = (np.arange(n_group) == kept[..., None]).any(axis=-2)
    return found


def _zeros(a: Array, kept: Array | None, *, n_group: int, **static: Any) -> Array:
    return a if kept is None else _filled(a, _inside(kept, n_group), 0.0)


def _all_alike(a: Array, kept: Array | None, **static: Any) -> Array:
    return a


def _first_groups(a: Array, *, topk_group: int) -> Array:
    return np.broadcast_to(np.arange(topk_group), (*a.shape[:-1], topk_group)).copy()


def _grouped_after_all(groups: int, keep: int) -> Best:
    """Groups where the model has none."""

    def scores(a: Array, kept: Array | None, *, n_group: int, fill: float, **static: Any) -> Array:
        if kept is None and a.shape[-1] % groups == 0 and a.shape[-1] > groups:
            kept, n_group = top_k(stage("router.group_scores")(a, n_group=groups, best=2), keep), groups
        return a if kept is None else _filled(a, _inside(kept, n_group), fill)

    return Best(scores)


def _ungrouped(n_group: int, keep: int) -> Callable[[Config], bool]:
    """Whether a model has no groups, and enough experts for these."""

    def applies(c: Config) -> bool:
        each, rest = divmod(c.n_routed_experts, n_group)
        fits = not rest and each > 1 and keep * each >= c.num_experts_per_tok
        return c.n_group == 1 and c.topk_method == "noaux_tc" and fits

    return applies


def _by_threshold(a: Array, kept: Array | None, *, fill: float, reads: tuple[Array, ...], **static: Any) -> Array:
    """Every group is kept whose score is not below that of the last kept one."""
    assert kept is not None
    least = np.take_along_axis(reads[0], kept, axis=-1).min(axis=-1, keepdims=True)
    return _filled(a, reads[0] >= least, fill)


def _scored_unbiased(a: Array, *, reads: tuple[Array, ...], **static: Any) -> Array:
    """Groups by their scores without the bias."""
    out: Array = stage("router.group_scores")(reads[0], **static)
    return out


def _biased_again(
    a: Array, kept: Array | None, *, n_group: int, fill: float, reads: tuple[Array, ...], **static: Any
) -> Array:
    """The choice by scores with the bias, when those that the groups were scored by have none."""
    a = a + reads[0]
    return a if kept is None else _filled(a, _inside(kept, n_group), fill)


def _in_turn(a: Array, n_group: int) -> Array:
    """Experts in the order of the groups that they are dealt to in turn.  a (*, E) -> (*, E)."""
    return a.reshape(*a.shape[:-1], -1, n_group).swapaxes(-1, -2).reshape(a.shape)


def _dealt_scores(a: Array, *, n_group: int, best: int) -> Array:
    out: Array = stage("router.group_scores")(_in_turn(a, n_group), n_group=n_group, best=best)
    return out


def _dealt(a: Array, kept: Array | None, *, n_group: int, fill: float, **static: Any) -> Array:
    """Expert e is in group e mod G."""
    inside = kept is None or np.tile(_inside(kept, n_group), a.shape[-1] // n_group)
    return np.where(inside, a, a.dtype.type(fill))


def _dealt_back(a: Array, kept: Array | None, *, n_group: int, fill: float, **static: Any) -> Array:
    """The choice when what is chosen by stands in the order of the groups already: by experts again."""
    inside = kept is None or np.repeat(_inside(kept, n_group), a.shape[-1] // n_group, axis=-1)
    return _in_turn(np.where(inside, a, a.dtype.type(fill)), a.shape[-1] // n_group)


def _but_the_best(a: Array, kept: Array | None, *, n_group: int, fill: float, **static: Any) -> Array:
    """The best expert of all that may be chosen counts as none."""
    a = a if kept is None else _filled(a, _inside(kept, n_group), fill)
    return np.where(np.arange(a.shape[-1]) == a.argmax(axis=-1, keepdims=True), -np.inf, a)


def _lowest_groups(a: Array, *, topk_group: int) -> Array:
    return top_k(-a, topk_group)


_BIAS = "w:mlp.gate.e_score_correction_bias"
MUTANTS = (
    Mutant(
        "R02",
        "experts of dropped groups count as 0 instead of never",
        _IDS,
        Best(_zeros),
        threads(
            "vLLM #13474; transformers #45440; DeepSeek-V3 #741; ktransformers #1148; sglang #3705; flashinfer #4639"
        ),
        "biased scores below 0 in kept groups",
        _grouped,
    ),
    Mutant(
        "R03",
        "a group's score is its best expert's, not the sum of its two best",
        "router.group_scores",
        setting("router.group_scores", best=1),
        threads("vLLM #13474; mistral.rs #1278"),
        "groups",
        _grouped,
    ),
    Mutant(
        "R04c",
        "the best experts of all groups are chosen",
        _IDS,
        Best(_all_alike),
        threads("TensorRT-Model-Connect #669; sglang #29042"),
        "groups",
        _grouped,
    ),
    Mutant("R15", "the first groups are kept, whatever their scores", "router.groups", _first_groups, applies=_grouped),
    Mutant("R15c", "the groups with the lowest scores are kept", "router.groups", _lowest_groups, applies=_grouped),
    Mutant(
        "X08",
        "groups are scored without the selection bias",
        "router.group_scores",
        _scored_unbiased,
        applies=_biased,
        reads=("router.scores",),
    ),
    Mutant(
        "X08-seen",
        "groups are scored without the selection bias",
        _IDS,
        Best(_biased_again),
        applies=_biased,
        reads=(_BIAS,),
        also={"router.choice": lambda s, b: s},
    ),
    Mutant(
        "X09",
        "experts are dealt to the groups in turn, instead of in blocks",
        _IDS,
        Best(_dealt),
        applies=_grouped,
        also={"router.group_scores": _dealt_scores},
    ),
    Mutant(
        "X09-seen",
        "experts are dealt to the groups in turn, instead of in blocks",
        "router.choice",
        unmade,
        applies=_biased,
        also={_IDS: Best(_dealt_back)},
        made=lambda c: lambda s, b: _in_turn(s + b, c.n_group),
    ),
    Mutant("X28", "the best expert is left out, and one more of the others chosen", _IDS, Best(_but_the_best)),
    *[
        Mutant(
            "R15b" if (groups, keep) == (8, 4) else f"R15b-{groups}-{keep}",
            f"a model without groups is routed in {groups}, of which {keep} {'is' if keep == 1 else 'are'} kept",
            _IDS,
            _grouped_after_all(groups, keep),
            threads("vLLM #33858") if (groups, keep) == (8, 4) else (),
            regime="no groups",
            applies=_ungrouped(groups, keep),
        )
        for groups, keep in ((8, 4), (8, 3), (8, 2), (4, 3), (4, 2), (4, 1), (2, 1))
    ],
    Mutant(
        "X06",
        "groups whose score ties with the last kept one's are kept too",
        _IDS,
        Best(_by_threshold),
        regime="exact ties of groups",
        applies=_grouped,
        reads=("router.group_scores",),
    ),
)
