"""Which stage of which rank first showed a number that is none, when a step on a mesh gave no loss (`guard.py`: on one rank).

Every rank runs the passes again with a watch, all make the same calls, and what each found is put in the order in which a model
computes: a weight, then forward from the embedding up, then backward from the loss down.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from refimpl.autograd import Array
from refimpl.train import parallel
from refimpl.train.checkpoints.agree import everyone
from refimpl.train.guard import FINITE, NotFinite, Watch, check, counted
from refimpl.train.training import Report

FIRST = ("embed", "mask", "mla.rope_tables")
"""Stages outside of layers that come before them; all others come after."""
HEAD, MTP = 10**6, 10**7
"""Depths of what comes after the last layer."""


def guarded_step(rank: parallel.Rank, **rows: Array) -> tuple[parallel.Rank, Report]:
    """`parallel.step`, or NotFinite on every rank alike: loss or gradient norm is no number, which stage first showed it."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        new, report = parallel.step(rank, **rows)
        try:
            check(report)
        except NotFinite as error:
            raise NotFinite(f"{error}\n  {first_bad(rank, **rows) or FINITE}") from None
    return new, report


def first_bad(rank: parallel.Rank, **rows: Any) -> str:
    """As `guard.first_bad`, of all ranks together; the same on each of them."""
    watch = Watch()
    bad = [(name, w) for name, w in rank.named.items() if not np.isfinite(w).all()]
    if bad:
        watch.found = f"the weight {bad[0][0]} holds it already: {counted(bad[0][1])}"
    grads = parallel.watched(rank, observer=watch, **rows)
    spoiled = [name for name, g in grads.items() if not np.isfinite(g).all()]
    if spoiled and not watch.found:
        watch.found, watch.backward = f"backward: the gradient of {spoiled[0]}", True
    said = everyone(rank.groups.world, json.dumps([*order(watch), watch.found]), "guard.first_bad")
    found = [(*json.loads(text), r) for r, text in enumerate(said)]
    *_, what, r = min([f for f in found if f[-2]], default=("", 0))
    return f"rank {r}: {what if not what or what.startswith('the weight') else f'first seen in {what}'}" if what else ""


def order(watch: Watch) -> tuple[int, int, int]:
    """Where in a model's pass a watch found something: weights, forward or backward; how deep; how many stages later."""
    *unit, name = watch.tap.split("/")[1:] or [""]
    layer = re.fullmatch(r"(L|mtp)(\d+)", unit[0]) if unit else None
    deep = int(layer[2]) + (MTP if layer[1] == "mtp" else 0) if layer else -1 if name in FIRST else HEAD
    if watch.backward:
        return 2, -deep, watch.calls
    return int(bool(watch.tap)), deep, watch.calls
