"""Experts x GPUs before and after, as text for a terminal and as SVG: which GPU holds which part of an expert's load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refimpl.autograd.errors import require

from .eplb import Ints, Placement
from .eplb_check import least_imbalance, placement

Floats = NDArray[np.float64]
_SHADES, _BARS = "·░▒▓█", "▁▂▃▄▅▆▇█"
_COLUMNS = 40  # of a panel in text; more GPUs share a column
_CELL, _BAR, _LEFT, _TOP, _GAP = 12, 60, 70, 46, 40  # pixels


def in_order(experts: int, num_gpus: int) -> Ints:
    """(E,) GPU of each expert without a plan: consecutive experts, as evenly as they divide."""
    return np.arange(experts, dtype=np.int64) * num_gpus // experts


def matrix(weight: ArrayLike, phy2log: Ints, num_gpus: int) -> Floats:
    """weight (E,), phy2log (R,) -> (E, gpus): each expert's load on each GPU; NaN where it is not."""
    w = np.asarray(weight, np.float64)
    p = placement(phy2log[None], len(w))
    found = np.full((len(w), num_gpus), np.nan)
    gpu = np.arange(len(phy2log)) // (len(phy2log) // num_gpus)
    for g, e in zip(gpu, phy2log, strict=True):
        found[e, g] = np.nansum([found[e, g], w[e] / p.logcnt[0, e]])
    return found


def matrix_in_order(weight: ArrayLike, num_gpus: int) -> Floats:
    """The same for experts in order, one copy of each."""
    w = np.asarray(weight, np.float64)
    found = np.full((len(w), num_gpus), np.nan)
    found[np.arange(len(w)), in_order(len(w), num_gpus)] = w
    return found


def ratio(shares: Floats) -> float:
    """max / mean of the GPUs' loads; 1 without load.  shares (E, gpus)"""
    loads = np.nansum(shares, axis=0)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def summary(weight: ArrayLike, plan: Placement, num_gpus: int) -> list[dict[str, float]]:
    """Per layer max / mean in order, planned, and at best; the same numbers for `text`, SVG and JSON."""
    w = np.asarray(weight, np.float64)
    bound = least_imbalance(w, plan.phy2log.shape[1], num_gpus)
    return [
        {
            "layer": n,
            "before": ratio(matrix_in_order(row, num_gpus)),
            "after": ratio(matrix(row, plan.phy2log[n], num_gpus)),
            "bound": float(bound[n]),
        }
        for n, row in enumerate(w)
    ]


def text(panels: Mapping[str, Floats], rows: int) -> str:
    """Panels side by side, the `rows` heaviest experts down, GPUs across; above them each GPU's load against the busiest.

    A cell is full if an expert alone gives its GPU a mean GPU's load.
    """
    require(rows >= 1, f"{rows} rows to draw")
    parts = {name: _thinned(m) for name, m in panels.items()}
    first = next(iter(panels.values()))
    load = np.nansum(first, axis=1)
    shown = np.argsort(-load, kind="stable")[:rows]
    full = max(np.nansum(m, axis=0).mean() for m in parts.values())
    busiest = max(np.nansum(m, axis=0).max() for m in parts.values())
    per = -(-first.shape[1] // next(iter(parts.values())).shape[1])
    head = f"the {len(shown)} heaviest of {len(load)} experts; {first.shape[1]} GPUs across" + (
        f", {per} a column" if per > 1 else ""
    )
    gap, lines = "   ", [head]
    lines.append(f"{'':14}{gap.join([name.ljust(m.shape[1]) for name, m in parts.items()])}".rstrip())
    bars = ["".join(_pick(_BARS, x, busiest) for x in np.nansum(m, axis=0)) for m in parts.values()]
    lines.append(f"{'load of GPU':14}{gap.join(bars)}")
    for e in shown:
        cells = ["".join(" " if np.isnan(x) else _pick(_SHADES, x, full) for x in m[e]) for m in parts.values()]
        lines.append(f"expert {e:<7}{gap.join(cells)}".rstrip())
    return "\n".join(lines)


def _pick(scale: str, x: float, most: float) -> str:
    """The character of that height; the last one from `most` on."""
    return scale[min(int(x / most * len(scale)), len(scale) - 1)] if most > 0 else scale[0]


def _thinned(m: Floats) -> Floats:
    """(E, gpus) -> (E, <= _COLUMNS), neighbouring GPUs added up."""
    per = -(-m.shape[1] // _COLUMNS)
    starts = range(0, m.shape[1], per)
    held = np.stack([(~np.isnan(m[:, s : s + per])).any(axis=1) for s in starts], axis=1)
    return np.where(held, np.stack([np.nansum(m[:, s : s + per], axis=1) for s in starts], axis=1), np.nan)


def svg(panels: Mapping[str, Floats], title: str) -> str:
    """A stand-alone SVG document; every expert a row, every GPU a column, darker for more load; hovering tells the numbers."""
    experts, gpus = next(iter(panels.values())).shape
    cell = min(_CELL, max(3, 640 // max(gpus, 1)))
    width = _LEFT + len(panels) * (gpus * cell + _GAP)
    height = _TOP + _BAR + experts * cell + 30
    most = max(np.nanmax(m) for m in panels.values()) or 1.0
    busiest = max(np.nansum(m, axis=0).max() for m in panels.values()) or 1.0
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="6" y="18" font-size="13">{escape(title)}</text>',
    ]
    for i, (name, m) in enumerate(panels.items()):
        lines += _panel(name, m, _LEFT + i * (gpus * cell + _GAP), cell, most, busiest)
    step = max(1, -(-14 // cell))
    lines += [
        f'<text x="{_LEFT - 6}" y="{_TOP + _BAR + e * cell + min(cell, 10)}" text-anchor="end">expert {e}</text>'
        for e in range(0, experts, step)
    ]
    return "\n".join([*lines, "</svg>\n"])


def _panel(name: str, m: Floats, x: int, cell: int, most: float, busiest: float) -> Iterator[str]:
    loads = np.nansum(m, axis=0)
    top, gpus = _TOP + _BAR, m.shape[1]
    yield f'<text x="{x}" y="{_TOP - 12}">{escape(name)}: max / mean {ratio(m):.3f}</text>'
    yield f'<rect x="{x}" y="{top}" width="{gpus * cell}" height="{len(m) * cell}" fill="none" stroke="#ccc"/>'
    for g, load in enumerate(loads):
        h = load / busiest * (_BAR - 6)
        yield (
            f'<rect x="{x + g * cell}" y="{top - 3 - h:.1f}" width="{cell - 1}" height="{h:.1f}" fill="#f4b860">'
            f"<title>GPU {g}: load {load:g}</title></rect>"
        )
    y = top - 3 - loads.mean() / busiest * (_BAR - 6)
    yield f'<line x1="{x}" x2="{x + gpus * cell}" y1="{y:.1f}" y2="{y:.1f}" stroke="#b00" stroke-dasharray="4 2"/>'
    for e, g in np.argwhere(~np.isnan(m)):
        yield (
            f'<rect x="{x + g * cell}" y="{top + e * cell}" width="{cell}" height="{cell}" fill="#274f8f" '
            f'fill-opacity="{0.12 + 0.88 * m[e, g] / most:.3f}"><title>expert {e} on GPU {g}: {m[e, g]:g}</title></rect>'
        )
