"""A trace's first tokens: what does not reproduce these reproduces nothing, and is soon tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from ..compare import Finding
from ..dims import TOKEN_AXES
from ..hypothesis import theirs
from ..lanes import Recorded
from ..program import names

TOKENS = 64
"""Of the first sequence; a stage knows nothing of tokens behind."""


def first_tokens(f: Finding, calls: Mapping[str, Call], r: Recorded) -> Recorded | None:
    """What a region reads, and its tap, of the first tokens; None where they are few anyhow, or do not stand by themselves:
    dispatched rows, caches, modules that look ahead.
    """
    region = [calls[t] for t in f.region]
    read = {n for c in region for n in names(c.args) if n not in f.region and not n.startswith("w/")}
    if f.tap not in r.taps or "/mtp" in f.tap or any(n not in r.taps and n not in r.inputs for n in read):
        return None
    taps, inputs = dict[str, Array](), dict[str, Any]()
    for n in {*read, f.tap}:
        given = n in r.inputs
        x = np.asarray(r.inputs[n]) if given else theirs(n, r)
        axes = calls[n].of.shape.split() if n in calls else ["B", "S"][: x.ndim]
        if "B" not in axes or x.ndim != len(axes) or x.size <= 2 * TOKENS or _before(x, axes):
            return None
        (inputs if given else taps)[n] = _cut(x, axes)
    return replace(r, taps=taps, inputs=inputs, withdrawn={}, padding=None)


def _before(x: Array, axes: Sequence[str]) -> bool:
    """Whether there are more keys than queries, or few tokens."""
    sizes = [x.shape[i] for i, letter in enumerate(axes) if letter in TOKEN_AXES]
    return len(set(sizes)) != 1 or sizes[0] <= TOKENS


def _cut(x: Array, axes: Sequence[str]) -> Array:
    return x[tuple([slice(1) if a == "B" else slice(TOKENS) if a in TOKEN_AXES else slice(None) for a in axes])]
