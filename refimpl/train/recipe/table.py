"""A run as a table: one row for every stretch in which no schedule changes its course; the tokens of the rows add up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

from .amounts import shown
from .run import Phase, Run

COLUMNS = {
    "batch": "batch",
    "lr": "learning rate",
    "gamma": "bias gamma",
    "mtp_weight": "MTP lambda",
    "aux_weight": "balance alpha",
}
Ends = tuple[float, float]
"""A value at the start and at the end of a row."""


@dataclass(frozen=True)
class Row:
    """`tokens` of a phase from token `first` on, in `steps` steps that begin there; values at both ends."""

    phase: str
    first: int
    tokens: int
    steps: int
    sequence: int
    values: dict[str, Ends]


def rows(run: Run) -> list[Row]:
    """Every row of a run. sum of tokens = run.tokens, sum of steps = len(run)."""
    return [row for phase in run.phases for row in _phase(phase)]


def _phase(p: Phase) -> Iterator[Row]:
    courses = [p.batch, *p.schedules.values()]
    for a, b in pairwise(sorted({0, p.tokens} | {piece.last for s in courses for piece in s.pieces})):
        first, last = p.steps.step(a), p.steps.step(b)
        batch = p.steps.batch(first), p.steps.batch(max(last - 1, first))
        values: dict[str, Ends] = {"batch": batch}
        for name, s in p.schedules.items():
            piece = s.piece(a)
            start, end = piece.value(a, first), piece.value(b, last)
            if name == "lr" and p.lr_per_batch:
                start, end = start * batch[0] / p.lr_per_batch, end * batch[1] / p.lr_per_batch
            values[name] = start, end
        yield Row(p.name, a, b - a, last - first, p.sequence, values)


def render(run: Run) -> str:
    """The table in text, with the totals of phases and run, and what the source does not say."""
    body: list[list[str]] = []
    for phase in run.phases:
        body += [_cells(r) for r in _phase(phase)]
        body.append([f"= {phase.name}", "", shown(phase.tokens), f"{len(phase.steps):,}"] + [""] * 6)
    if len(run.phases) > 1:
        body.append(["= all", "", shown(run.tokens), f"{len(run):,}"] + [""] * 6)
    lines = [["phase", "from", "tokens", "steps", "sequence", *COLUMNS.values()], *body]
    notes = ["", "not published, taken here:", *[f"  {note}" for note in run.unpublished]] if run.unpublished else []
    tasks = [line for p in run.phases if p.tasks for line in _tasks(p)]
    return "\n".join([f"{run.name}: {run.origin}", "", *aligned(lines), "", *tasks, *_optimizer(run), *notes])


def aligned(lines: list[list[str]]) -> list[str]:
    """Lines of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _tasks(p: Phase) -> list[str]:
    w = p.weighting
    more = f", temperature {w.temperature:g}, windows of {w.window:,} steps" if w.by == "loss-ratio" else ""
    lines = [["task", "loss", "weight", "share", "masked", "prefix"]]
    for t in p.tasks:
        weight = f"{t.weight:g}" if w.by == "fixed" else w.by
        share = f"{t.share / sum([other.share for other in p.tasks]):.3g}"
        lines.append([t.name, t.loss, weight, share, "yes" if t.masked else "no", repr(t.prefix) if t.prefix else ""])
    return [f"tasks of {p.name}, weights {w.by}{more}", *[f"  {line}" for line in aligned(lines)], ""]


def _optimizer(run: Run) -> list[str]:
    o = run.optimizer
    scale = f", loss scale {o.loss_scale:g}" if o.loss_scale else ""
    average = "" if run.ema is None else f"; average of the parameters with decay {run.ema:g}"
    return [
        f"AdamW betas {o.betas[0]:g}, {o.betas[1]:g}, eps {o.eps:g}, weight decay {o.weight_decay:g} on {o.decays},"
        f" moments {o.moments}, clip {o.clip:g}",
        f"weights start with std {o.init_std:g}; precision {o.precision}{scale}{average}",
    ]


def _cells(r: Row) -> list[str]:
    texts = [f"{a:.6g}" if a == b else f"{a:.6g} to {b:.6g}" for a, b in [r.values[name] for name in COLUMNS]]
    return [r.phase, shown(r.first), shown(r.tokens), f"{r.steps:,}", f"{r.sequence:,}", *texts]


def to_json(run: Run) -> str:
    """The table in JSON (schema refimpl-recipe/1), tokens exact."""
    body = {
        "schema": "refimpl-recipe/1",
        "name": run.name,
        "origin": run.origin,
        "tokens": run.tokens,
        "steps": len(run),
    }
    optimizer = asdict(run.optimizer)
    more = {
        "rows": [asdict(r) for r in rows(run)],
        "tasks": {
            p.name: {"weighting": asdict(p.weighting), "tasks": [asdict(t) for t in p.tasks]}
            for p in run.phases
            if p.tasks
        },
        "optimizer": optimizer,
        "ema": run.ema,
        "unpublished": run.unpublished,
    }
    return json.dumps(body | more, indent=1)
