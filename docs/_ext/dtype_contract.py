"""What a stage's page says of dtypes: what a trace may hold, and what every precision plan does to the stage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from refimpl.layers.fp8 import Fp8
from refimpl.layers.precision import PLANS, Plan
from refimpl.record.catalogue import Entry

TRACE = {
    "float": "A trace holds it as floating-point numbers, in the width that the implementation kept them in; integers are refused.",
    "integer": "A trace holds it as integers of any width; floating-point numbers are refused, and no plan rounds it.",
    "ids": "A trace holds it as integers of any width, whose order along the last axis does not count; no plan rounds it.",
}
FORMATS = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16"}


def contract(e: Entry) -> Iterator[str]:
    """The section of a page: one sentence on traces; for floating-point numbers a row for the plans that treat the stage alike."""
    yield from ("## Dtype", "", TRACE[e.kind], "")
    if e.kind == "float":
        plans = {p.name: _row(p, e.stage.name) for p in PLANS.values()}
        yield from ("| precision plan | its output | its arithmetic |", "|---|---|---|")
        for row, names in groupby(plans, plans.__getitem__):
            yield f"| {', '.join(f'`{n}`' for n in names)} | {row} |"
        yield ""


def _row(p: Plan, stage: str) -> str:
    kernel, fmt = p.kernel(stage), FORMATS[p.format(stage)]
    values = np.dtype(p.dtype).name
    kept = fmt if fmt == values else f"rounded to {fmt}, held in {values}"
    return f"{kept} | {f'FP8: {kernel.describe()}' if isinstance(kernel, Fp8) else values}"
