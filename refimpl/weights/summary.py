"""Findings put together: the same thing in several layers or experts said once, and the error of each stored format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from refimpl.checkpoint.names import expert_of, layer_of
from refimpl.layers.config import Config

from .findings import Finding, Status
from .kin import order_of

_STATUSES: dict[str, int] = {s: i for i, s in enumerate(get_args(Status))}


@dataclass(frozen=True)
class Group:
    """Findings that say the same; `what`: their name without layer and expert; the worst error among them."""

    status: Status
    how: str
    what: str
    layers: tuple[int, ...]
    names: tuple[str, ...]
    error: float

    @property
    def where(self) -> str:
        """`q_b_proj.weight in L0-L2`."""
        runs: list[list[int]] = []
        for i in sorted(set(self.layers)):
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        spans = ", ".join(f"L{r[0]}" if len(r) == 1 else f"L{r[0]}-L{r[-1]}" for r in runs)
        return f"{self.what} in {spans}" if spans else self.what


@dataclass(frozen=True)
class FormatError:
    """Of all tensors stored in a format that are there in their place: relative l2 error of their numbers together, and of the
    worst tensor.
    """

    stored: str
    tensors: int
    error: float
    worst: float
    name: str


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """Groups in the order of severity, each in model order."""
    held: dict[tuple[str, str, str], list[Finding]] = {}
    for f in findings:
        held.setdefault((f.status, f.how, unit(f.name)), []).append(f)
    groups = [
        Group(
            group[0].status,
            group[0].how,
            what,
            tuple(i for f in group if (i := layer_of(f.name)) is not None),
            tuple(f.name for f in group),
            max(f.error for f in group),
        )
        for (_, _, what), group in held.items()
    ]
    return sorted(groups, key=lambda g: _STATUSES[g.status])


def unit(name: str) -> str:
    """A tensor's name without its layer and its expert."""
    short = re.sub(r"^model\.layers\.\d+\.", "", name)
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", short)


def by_format(findings: Iterable[Finding]) -> list[FormatError]:
    """The error of each stored format, worst first."""
    held: dict[str, list[Finding]] = {}
    for f in findings:
        if f.status in ("equal", "rounded", "differs") and np.isfinite(f.error):
            held.setdefault(f.stored, []).append(f)
    rows = []
    for stored, group in held.items():
        numbers = sum(f.numbers for f in group)
        mean = float(np.sqrt(sum(f.numbers * f.error**2 for f in group) / numbers)) if numbers else 0.0
        worst = max(group, key=lambda f: f.error)
        rows.append(FormatError(stored, len(group), mean, worst.error, worst.name))
    return sorted(rows, key=lambda r: -r.error)


def experts_told(findings: list[Finding], config: Config) -> list[Finding]:
    """Experts of a layer that all lie in each other's places: their order instead of each one's."""
    count = config.n_routed_experts or 0
    places: dict[tuple[int | None, str], dict[int, int]] = {}
    for f in findings:
        e, source = expert_of(f.name), expert_of(f.source)
        if (
            e is not None
            and source is not None
            and layer_of(f.name) == layer_of(f.source)
            and f.how.startswith("expert ")
        ):
            places.setdefault((layer_of(f.name), unit(f.name)), {})[e] = source
    told = []
    for f in findings:
        moved = places.get((layer_of(f.name), unit(f.name)), {})
        order = [moved.get(e, e) for e in range(count)]
        if expert_of(f.name) in moved and sorted(order) == list(range(count)):
            rounded = f.how.partition("; ")[2]
            how = f"experts {order_of(order, config.n_group or 0)}" + (f"; {rounded}" if rounded else "")
            f = replace(f, status="permuted", how=how)
        told.append(f)
    return told
