"""Settings of another value: a norm's eps, which its rows tell; how many experts, groups or best of a group are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.layers.stage import STAGES, Call

from ..corpus import Mutant
from ..corpus.norms import NORMS
from .evidence import Evidence, guess
from .words import rounded

_WORDS = {
    "k": "experts chosen by every token",
    "topk_group": "groups kept",
    "best": "experts of a group that count for its score",
}
_NORMS = (*NORMS, "mla.q_a_norm", "mla.c_kv")
_MORE = 4
"""Up to how many more experts, or best of a group, are tried."""


def eps(ev: Evidence) -> Iterator[Mutant]:
    """Another eps of a norm: a row is too small by sqrt((m + eps) / (m + eps')), m its mean square."""
    here, static = ev.call.stage, ev.call.static
    if not ev.whole or static.keys() != {"eps"}:
        return
    width = ev.args[1].shape[0]
    mean = np.square(ev.args[0][..., :width]).mean(axis=-1)
    ratio = np.vecdot(ev.x, ev.e) / np.maximum(np.vecdot(ev.e, ev.e), np.finfo(float).tiny)
    with np.errstate(all="ignore"):
        each, weight = (mean + static["eps"]) / ratio**2 - mean, mean**-2
    good = np.isfinite(each) & np.isfinite(weight)
    value = float((each * weight)[good].sum() / weight[good].sum()) if good.any() else 0.0
    for v in rounded(value) if value > 0 else ():
        every = {name: changed(name, eps=v) for name in _NORMS}
        yield guess(f"the norms' eps is {v:g}", here, every.pop(here), every)


def changed(name: str, **settings: Any) -> Callable[..., Any]:
    """The stage with other settings."""
    return lambda *args, **static: STAGES[name].fn(*args, **static | settings)


def counts(ev: Evidence) -> Iterator[Mutant]:
    """Another number of experts a token, of kept groups, of experts that count for a group, of groups."""
    for call in {c.stage: c for c in ev.region}.values():
        for key in _WORDS.keys() & call.static.keys():
            for n in _values(ev, call, key):
                yield guess(_said(key, n, call.static[key]), call.stage, changed(call.stage, **{key: n}))
        if call.stage in ("router.group_scores", "router.ids"):
            yield from _groups(ev, call)


def _said(key: str, n: int, meant: int) -> str:
    return f"{_WORDS[key]}: {n} instead of {meant}"


def _values(ev: Evidence, call: Call, key: str) -> list[int]:
    """Other numbers, those next to the right one first."""
    meant, c = int(call.static[key]), ev.config
    if call.tap in ev.recorded.odd:
        return [ev.recorded.odd[call.tap].shape[-1]]
    most = c.n_group if key == "topk_group" else meant + _MORE
    return sorted([n for n in range(1, most + 1) if n != meant], key=lambda n: (abs(n - meant), n))


def _groups(ev: Evidence, call: Call) -> Iterator[Mutant]:
    """Experts cut into another number of groups."""
    experts, meant = ev.config.n_routed_experts, ev.config.n_group
    for n in [n for n in range(2, experts + 1) if experts % n == 0 and n != meant]:
        also = {name: changed(name, n_group=n) for name in ("router.group_scores", "router.ids")}
        yield guess(f"experts are in {n} groups instead of {meant}", call.stage, also.pop(call.stage), also)
