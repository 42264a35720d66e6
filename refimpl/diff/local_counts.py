"""Layers that are counted from anywhere, as a rank of a pipeline counts its own from 0, told by value: of which of our layers the
weights are that give the candidate's numbers.

A few stages that read a weight are run on the candidate's own inputs with each layer's weights. Where no such stage was recorded
with its inputs, the few counts that there may be are all tried in full.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import numpy as np

from refimpl.layers.config import Config
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import STAGES

from .counting import counted
from .lanes import Lane
from .numbering import renamed
from .program import names
from .run import Run
from .trace import Trace

_STAGES, _TRIED = 4, 4
"""How many stages are run with each layer's weights; how many counts are tried in full where there is no such stage."""
_LAYER = re.compile(r"(?:fwd|dec\d+)/L(\d{1,6})/(.*)")


def local_counts(run: Run, config: Config) -> Iterator[tuple[Trace, dict[str, list[str]]]]:
    """The trace of a run that is not taken apart yet under the counts that it may have; what to declare -> the taps. One layer
    alone tells of no count.
    """
    named = _named(run.trace)
    first = min(named.values(), default=0)
    if "layers" in run.trace.header.layouts or len(set(named.values())) < 2:
        return
    ours = {c.tap for c in run.calls(config)}
    told = [f"L{first} is L{i}" for i in range(config.num_hidden_layers)]
    there = [*named, *[f"fwd/L{i}/resid" for i in run.trace.header.slices.get("layers", [])]]
    told = [one for one in told if all((renamed(t, one) or t) in ours for t in there)]
    away = {one: a for one in told if (a := _away(_few(run, one), config)) is not None} if len(told) > 1 else {}
    likely = [min(away, key=lambda one: away[one])] if away else told
    for one in likely if len(likely) <= _TRIED else ():
        if one != f"L{first} is L{first}":
            yield counted(run.trace, one, "layers are counted from another number than ours")


def _named(trace: Trace) -> dict[str, int]:
    """The taps of layers, and which layer each is said to be of."""
    stages = {s.tap for s in STAGES.values()}
    return {t: int(m[1]) for t in trace.taps if (m := _LAYER.fullmatch(t)) and m[2] in stages}


def _few(run: Run, told: str) -> Run:
    """The run with the first two layers alone, under a count."""
    named = _named(run.trace)
    kept = {t: run.trace.taps[t] for t, i in named.items() if i in sorted(set(named.values()))[:2]}
    dims = {t: d for t, d in run.trace.header.dims.items() if t in kept}
    few = Trace(replace(run.trace.header, dims=dims), kept)
    return replace(run, trace=counted(few, told, "")[0], looked=True)


def _away(run: Run, config: Config) -> float | None:
    """How far what the layers' weights give is from what was recorded; None where nothing tells."""
    comparison, program = run.comparison(config, frozenset())
    r, lane, found = comparison.recorded, Lane(FLOAT32), list[float]()
    for call in program:
        read = list(names(call.args))
        weights = [n for n in read if n.startswith("w/") and ".experts." not in n]
        told = call.tap in r.taps and weights and all(n in weights or n in r.taps for n in read)
        if told and len(found) < _STAGES:
            e, x = np.asarray(lane.run(call, r), np.float64), np.asarray(r.taps[call.tap], np.float64)
            found.append(float(np.linalg.norm(x - e)) / max(float(np.linalg.norm(e)), 1e-30))
    return median(found) if found else None
