"""The metrics of runs as a figure (matplotlib, extra `plot`): a panel for each group of them, a line for each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require
from refimpl.plotting import drawn

from .journal import records

PANELS: Mapping[str, Sequence[str]] = {
    "loss": ("loss", "loss/main", "loss/mtp*", "eval/*"),
    "gradient norm, before clipping": ("norm",),
    "learning rate": ("lr",),
    "entropy of the experts' load (1: even)": ("load/*/entropy",),
    "largest load / mean load": ("load/*/peak",),
    "experts without a token": ("load/*/dead",),
    "drift of the balancing bias": ("bias/*/drift",),
    "tokens/s": ("tokens/s",),
    "bytes over links in a step": ("links/bytes",),
}
OVER = ("tokens", "step")
MANY = 12
"""Lines of a panel up to which they have a legend."""

Curve = tuple[list[float], list[float]]


def curves(folder: Path, patterns: Sequence[str], over: str = "tokens") -> dict[str, Curve]:
    """Metric -> where it was noted and its values, for every metric that a pattern matches, in the records' order."""
    found: dict[str, Curve] = {}
    for r in records(folder):
        for name, x in r.items():
            if isinstance(x, int | float) and any(fnmatchcase(name, p) for p in patterns):
                at, values = found.setdefault(name, ([], []))
                at.append(r[over])
                values.append(x)
    return found


def picture(
    folders: Sequence[Path], panels: Mapping[str, Sequence[str]] = PANELS, *, over: str = "tokens", form: str
) -> bytes:
    """All panels of which a run has a metric, as SVG or PNG. SpecError if there is none, or no matplotlib."""
    require(over in OVER, f"over is {over!r}; known: {', '.join(OVER)}")
    lines = {title: {f: curves(f, patterns, over) for f in folders} for title, patterns in panels.items()}
    lines = {title: of for title, of in lines.items() if any(of.values())}
    asked = ", ".join(p for patterns in panels.values() for p in patterns)
    require(lines, f"no metric of {', '.join(map(str, folders))} is one of {asked}")
    rows = -(-len(lines) // 2)

    def draw(figure: Any) -> None:
        for i, (title, of) in enumerate(lines.items(), 1):
            _panel(figure.add_subplot(rows, min(len(lines), 2), i), title, of, over)

    return drawn(draw, size=(10, 2.8 * rows + 0.4), salt="run", form=form)


def _panel(axes: Any, title: str, of: Mapping[Path, Mapping[str, Curve]], over: str) -> None:
    """One panel; where there are several runs, a line is called by run and metric."""
    count = sum(map(len, of.values()))
    for folder, found in of.items():
        for name, (at, values) in found.items():
            label = name if len(of) == 1 else f"{folder.name}: {name}"
            axes.plot(
                at, values, label=label, marker="o" if len(at) < 3 or name.startswith("eval/") else "", markersize=3
            )
    axes.set(title=title, xlabel=over)
    axes.grid(alpha=0.3)
    if 1 < count <= MANY:
        axes.legend(fontsize="small")
