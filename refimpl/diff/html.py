"""A judgement as one HTML file that needs nothing else: a grid of stages by layers, coloured by error over what is allowed.

A cell is a link to its tap's section, which is shown when it is the page's target: no script, so it works from a file, with a
keyboard, in any browser, and its own policy forbids it to fetch anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from .compare import Finding
from .drawing import css, verdict_colour
from .judge import Judgement
from .report import render, summary
from .section import section

PICTURED, NEAREST = 150, 3
"""Blamed taps that are pictured at most; and of those that conform, those nearest to their limit."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em;max-width:75em;color:#111;background:#fff}
h1{font-size:1.3em}h2{font-size:1.1em}pre{background:#f4f4f4;padding:1em;overflow:auto;white-space:pre-wrap}
a{color:#0645ad}a:focus-visible{outline:3px solid #111;outline-offset:1px}
table{border-collapse:collapse}.grid{overflow-x:auto}
.grid th{font-weight:normal;text-align:right;padding:0 .6em;white-space:nowrap}
.grid thead th{text-align:center;font-size:.85em}
.grid td{min-width:3.2em;height:1.6em;border:1px solid #fff;text-align:center;font-size:.75em;padding:0}
.grid td a{display:block;line-height:1.9em;min-height:1.9em;color:inherit;text-decoration:none}
td.none{background:repeating-linear-gradient(45deg,#fff 0 4px,#ddd 4px 5px)}
section{display:none;border-top:2px solid #111;margin-top:1em}section:target{display:block}
dl{display:grid;grid-template-columns:max-content auto;gap:0 1em}dd{margin:0}.cause{background:#fdf1e3;padding:.4em .8em}
figure{margin:1em 0}img{image-rendering:pixelated;border:1px solid #111;vertical-align:top}
.map{display:grid;grid-template-columns:max-content max-content max-content;gap:.2em .4em;margin:.4em 0}
.ends,.feet{display:flex;justify-content:space-between;font-size:.8em}.ends{flex-direction:column;text-align:right}
.scale{font-size:.8em;margin:.2em 3em}div.scale{position:relative;width:302px;height:2.4em}
.scale span{position:absolute;top:16px;transform:translateX(-50%);white-space:nowrap}
svg{width:100%;max-width:560px;font-size:11px;display:block}rect{fill:#4a7fb5;stroke:#111}
path.limit{stroke:#a33a00;stroke-width:2;stroke-dasharray:5 3}text.limit{fill:#a33a00}
.worst td,.worst th{text-align:right;padding:.1em .8em;border-bottom:1px solid #ccc;font-variant-numeric:tabular-nums}
.worst caption{text-align:left}
@media print{section.blamed{display:block}body{margin:0}}
"""


def to_html(j: Judgement, title: str = "refimpl diff") -> str:
    """The page. Pictures are in it if the judgement was made with them."""
    pictured = {f.tap for f in [*_blamed(j.findings), *_nearest(j.findings)]}
    sections = [line for f in j.findings for line in section(f, j.causes, picture=f.tap in pictured)]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head><body>',
            f"<h1>{escape(title)}: {escape(summary(j))}</h1>",
            f"<pre>{escape(render(j))}</pre>",
            *_links("Blamed", _blamed(j.findings)),
            *_links("Nearest to their limit", _nearest(j.findings)),
            "<p>Error over what is allowed, by stage and layer: blue within, the darker the nearer to the limit;",
            "orange to black beyond, with the number of times. Hatched: no such tap, or not recorded. A cell leads to its tap.</p>",
            *_grid(j.findings),
            *sections,
            "</body></html>\n",
        ]
    )


def _blamed(findings: list[Finding]) -> list[Finding]:
    """Blamed taps, of every stage its worst before the second of any, as many as are pictured; in model order."""
    turn: dict[str, int] = {}
    for stage in dict.fromkeys(f.stage for f in findings):
        worst_first = sorted([f for f in findings if f.stage == stage and not f.ok], key=_ratio, reverse=True)
        turn |= {f.tap: i for i, f in enumerate(worst_first)}
    chosen = sorted(turn, key=turn.__getitem__)[:PICTURED]
    return [f for f in findings if f.tap in chosen]


def _nearest(findings: list[Finding]) -> list[Finding]:
    return sorted([f for f in findings if f.ok and _ratio(f)], key=_ratio, reverse=True)[:NEAREST]


def _links(title: str, found: list[Finding]) -> Iterator[str]:
    if found:
        each = ", ".join([f'<a href="#{escape(f.tap, quote=True)}">{escape(f.tap)}</a>' for f in found])
        yield f"<p>{title}: {each}</p>"


def _grid(findings: list[Finding]) -> Iterator[str]:
    units = list(dict.fromkeys(_unit(f) for f in findings))
    cells = {(f.tap.rpartition("/")[2], _unit(f)): f for f in findings}
    heads = "".join(f'<th scope="col">{escape(u) or "model"}</th>' for u in units)
    yield f'<div class="grid" id="grid"><table><thead><tr><td></td>{heads}</tr></thead><tbody>'
    for name in dict.fromkeys(name for name, _ in cells):
        row = "".join(_cell(cells.get((name, u))) for u in units)
        yield f'<tr><th scope="row">{escape(name)}</th>{row}</tr>'
    yield "</tbody></table></div>"


def _unit(f: Finding) -> str:
    return f.tap.split("/")[1] if f.tap.count("/") > 1 else ""


def _cell(f: Finding | None) -> str:
    if f is None:
        return '<td class="none"></td>'
    ratio = _ratio(f)
    text = "" if f.ok else "!" if math.isinf(ratio) else f"{ratio:.0f}" if ratio < 1e4 else f"1e{math.log10(ratio):.0f}"
    tap = escape(f.tap, quote=True)
    label = f"{tap}: {'within' if f.ok else 'beyond'} what is allowed"
    style = f"background:{css(verdict_colour(ratio, ok=f.ok))}{'' if f.ok else ';color:#fff'}"
    return f'<td data-tap="{tap}" style="{style}"><a href="#{tap}" aria-label="{label}" title="{tap}">{text}</a></td>'


def _ratio(f: Finding) -> float:
    """Error over allowed, by row or by lean, whichever is more; infinite for what may not differ at all."""
    if f.ok and not f.allowed:
        return 0.0
    rows = f.error / f.allowed if f.allowed else math.inf
    return max(rows, f.lean / f.upright if f.upright else 0.0)
