"""What was found, as text for people or as JSON for programs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from refimpl.version import __version__

from .findings import Finding
from .moving import Weighed
from .summary import by_format, grouped

MOST = 20
"""Groups, or tensors weighed, that are shown unless all are asked for."""


@dataclass(frozen=True)
class Report:
    """The container, the findings of all its tensors, and what was weighed (None: not asked for)."""

    container: str
    path: str
    findings: list[Finding]
    weighed: list[Weighed] | None = None

    @property
    def ok(self) -> bool:
        """Nothing but rounding, and MTP modules left out."""
        return all(f.ok for f in self.findings)


def render(r: Report, *, everything: bool = False) -> str:
    """Counts, what is wrong, error by stored format, what it moves, the verdict last."""
    lines = [f"{r.path}: {r.container}, {len(r.findings)} tensors", *_counts(r)]
    groups = [g for g in grouped(r.findings) if everything or g.status not in ("equal", "rounded", "left out")]
    for g in groups if everything else groups[:MOST]:
        error = f"   error {g.error:.1e}" if 0 < g.error < math.inf else ""
        lines.append(f"  {g.status:<10} {g.where}{': ' + g.how if g.how else ''}{error}")
    if len(groups) > MOST and not everything:
        lines.append(f"  ... and {len(groups) - MOST} more (--all lists them)")
    lines += ["", f"{'stored as':<32}{'tensors':>8}{'error':>10}{'worst':>10}", *_formats(r)]
    if r.weighed:
        lines += [
            "",
            f"{'moves the logits by':<52}{'KL':>9}{'|logit|':>10}{'flipped':>9}",
            *_weighed(r.weighed, everything),
        ]
    return "\n".join([*lines, "", _verdict(r)])


def _counts(r: Report) -> Iterator[str]:
    count = Counter((f.status, f.how if f.status in ("rounded", "left out") else "") for f in r.findings)
    for (status, how), n in count.most_common():
        yield f"{status:<12}{n:>6}" + (f"  {'to ' if status == 'rounded' else ''}{how}" if how else "")


def _formats(r: Report) -> Iterator[str]:
    for row in by_format(r.findings):
        yield f"{row.stored:<32}{row.tensors:>8}{row.error:>10.1e}{row.worst:>10.1e}" + (
            f"  {row.name}" if row.worst else ""
        )


def _weighed(rows: list[Weighed], everything: bool) -> Iterator[str]:
    for w in rows if everything else rows[:MOST]:
        m = w.moved
        yield f"{w.what:<52}" + (f"{m.kl:>9.1e}{m.logit:>10.1e}{m.flipped:>9.1%}" if m else "  cannot be run")
    if len(rows) > MOST and not everything:
        yield f"... and {len(rows) - MOST} more (--all lists them)"


def _verdict(r: Report) -> str:
    bad = [f for f in r.findings if not f.ok]
    if not bad:
        return "SOUND (equal or rounded)"
    return f"NOT THE CASE'S WEIGHTS ({len(bad)} of {len(r.findings)} tensors: {', '.join(sorted({f.status for f in bad}))})"


def to_json(r: Report) -> str:
    """schema refimpl-weights/1; numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    groups = [asdict(g) for g in grouped(r.findings) if g.status != "equal"]
    body = {"schema": "refimpl-weights/1", "version": __version__, "ok": r.ok, "container": r.container, "path": r.path}
    body |= {"tensors": [asdict(f) for f in r.findings], "groups": groups}
    body |= {"formats": [asdict(row) for row in by_format(r.findings)]}
    body |= {"impact": None if r.weighed is None else [asdict(w) for w in r.weighed]}
    return json.dumps(plain(body), indent=1)
