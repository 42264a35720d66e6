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

NEAR = 0.1
"""What a stage gives with the right weights is nearer than that, in any dtype; with another layer's it is off by its whole size."""
_STAGES, _TRIED = 4, 4
_LAYER = re.compile(r"\w+/L(\d{1,6})/(.*)")


def local_counts(run: Run, config: Config) -> Iterator[tuple[Trace, dict[str, list[str]]]]:
    """The trace of a run that is not taken apart yet under the counts that it may have; what to declare -> the taps."""
    if "layers" in run.trace.header.layouts:
        return
    told = _possible(run, config)
    away = {t: _away(_few(run, t), config) for t in ("", *told)} if told else {}
    known = {t: a for t, a in away.items() if a is not None}
    best = min(known, key=lambda t: known[t], default="")
    if known:
        told = [best] if best and known[best] < NEAR else []
    for one in told if len(told) <= _TRIED else ():
        yield counted(run.trace, one, "layers are counted from another number than ours")


def _possible(run: Run, config: Config) -> list[str]:
    """The counts under which all names of taps are such, where several layers were recorded."""
    named = {
        t: int(m[1]) for t in run.trace.taps if (m := _LAYER.fullmatch(t)) and m[2] in {s.tap for s in STAGES.values()}
    }
    first, last = min(named.values(), default=0), max(named.values(), default=0)
    if first == last:
        return []
    ours = {c.tap for c in run.calls(config)}
    told = [f"L{first} is L{i}" for i in range(config.num_hidden_layers - last + first) if i != first]
    return [one for one in told if all(renamed(t, one) in ours for t in named)]


def _few(run: Run, told: str) -> Run:
    """The run with the first layers alone, under a count."""
    numbers = sorted({int(m[1]) for t in run.trace.taps if (m := _LAYER.fullmatch(t))})[:2]
    kept = {t: run.trace.taps[t] for t in run.trace.taps if (m := _LAYER.fullmatch(t)) and int(m[1]) in numbers}
    few = Trace(
        replace(run.trace.header, slices={}, dims={t: d for t, d in run.trace.header.dims.items() if t in kept}), kept
    )
    return replace(run, trace=counted(few, told, "")[0] if told else few, looked=True)


def _away(run: Run, config: Config) -> float | None:
    """How far what the layers' weights give is from what was recorded; None where nothing tells."""
    comparison, program = run.comparison(config, frozenset())
    r, lane, found = comparison.recorded, Lane(FLOAT32), list[float]()
    for call in program:
        read = list(names(call.args))
        weights = [n for n in read if n.startswith("w/") and ".experts." not in n]
        told = call.tap in r.taps and call.own is None and weights and all(n in weights or n in r.taps for n in read)
        if told and len(found) < _STAGES:
            e, x = np.asarray(lane.run(call, r), np.float64), np.asarray(r.taps[call.tap], np.float64)
            found.append(float(np.linalg.norm(x - e) / max(np.linalg.norm(e), 1e-30)))
    return median(found) if found else None
