"""A judgement as one HTML file that needs nothing else: a grid of stages by layers, coloured by error over what is allowed.

Clicking a cell shows its numbers. Without scripts the grid, the verdict and the blamed taps are still there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html import escape

from .compare import Finding
from .judge import Judgement
from .report import render, summary

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em;max-width:75em;color:#111;background:#fff}
h1{font-size:1.3em}pre{background:#f4f4f4;padding:1em;overflow:auto;white-space:pre-wrap}
table{border-collapse:collapse}th{font-weight:normal;text-align:right;padding:0 .6em;white-space:nowrap}
thead th{text-align:center;font-size:.85em}
td{min-width:3.2em;height:1.5em;border:1px solid #fff;text-align:center;font-size:.75em;padding:0}
td[data-tap]{cursor:pointer}td button{all:unset;display:block;width:100%;height:100%;cursor:pointer}
td button:focus-visible{outline:2px solid #000}td.none{background:#eee}
#detail{min-height:9em;border-top:1px solid #999;margin-top:1em;padding-top:.6em;white-space:pre-wrap}
"""
_SCRIPT = """
const taps = JSON.parse(document.getElementById("taps").textContent);
document.querySelectorAll("td[data-tap]").forEach(td => td.addEventListener("click", () => {
  document.getElementById("detail").textContent = taps[td.dataset.tap].join("\\n");
}));
"""


def to_html(j: Judgement, title: str = "refimpl diff") -> str:
    """The page."""
    details = json.dumps({f.tap: list(_detail(f, j)) for f in j.findings}).replace("<", "\\\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>',
            f"<h1>{escape(title)}: {escape(summary(j))}</h1>",
            f"<pre>{escape(render(j))}</pre>",
            "<p>Error over what is allowed, by stage and layer; a number is given where it is 1 or more. Click a cell.</p>",
            *_grid(j.findings),
            '<div id="detail" role="status" aria-live="polite"></div>',
            f'<script type="application/json" id="taps">{details}</script><script>{_SCRIPT}</script>',
            "</body></html>\n",
        ]
    )


def _grid(findings: list[Finding]) -> Iterator[str]:
    units = list(dict.fromkeys(f.tap.split("/")[1] if f.tap.count("/") > 1 else "" for f in findings))
    cells = {(f.tap.rpartition("/")[2], f.tap.split("/")[1] if f.tap.count("/") > 1 else ""): f for f in findings}
    yield (
        "<table><thead><tr><th></th>"
        + "".join(f"<th>{escape(u) or 'model'}</th>" for u in units)
        + "</tr></thead><tbody>"
    )
    for name in dict.fromkeys(name for name, _ in cells):
        row = "".join(_cell(cells.get((name, u))) for u in units)
        yield f"<tr><th>{escape(name)}</th>{row}</tr>"
    yield "</tbody></table>"


def _cell(f: Finding | None) -> str:
    if f is None:
        return '<td class="none"></td>'
    ratio = _ratio(f)
    text = "" if f.ok else "!" if math.isinf(ratio) else f"{ratio:.0f}" if ratio < 1e4 else f"1e{math.log10(ratio):.0f}"
    tap = escape(f.tap, quote=True)
    label = f"{tap}: {'within' if f.ok else 'beyond'} what is allowed"
    return f'<td data-tap="{tap}" style="{_colour(f, ratio)}"><button aria-label="{label}" title="{tap}">{text}</button></td>'


def _ratio(f: Finding) -> float:
    """Error over allowed, by row or by lean, whichever is more; infinite for what may not differ at all."""
    if f.ok and not f.allowed:
        return 0.0
    rows = f.error / f.allowed if f.allowed else math.inf
    return max(rows, f.lean / f.upright if f.upright else 0.0)


def _colour(f: Finding, ratio: float) -> str:
    """Blue where it conforms, darker towards the limit; orange to black beyond it: told apart in grey and by the colour-blind."""
    if f.ok:
        return f"background:hsl(210,60%,{96 - 26 * min(ratio, 1.0):.0f}%)"
    far = min(math.log10(max(ratio, 1.0)) / 6, 1.0) if math.isfinite(ratio) else 1.0
    return f"background:hsl(25,90%,{55 - 40 * far:.0f}%);color:#fff"


def _detail(f: Finding, j: Judgement) -> Iterator[str]:
    yield f"{f.tap}   stage {f.stage}   {'within' if f.ok else 'BEYOND'} what is allowed"
    yield f"worst row {f.error:.2e}, allowed {f.allowed:.2e}   lean {f.lean:.2e}, allowed {f.upright:.2e}   chained {f.chained:.1e}"
    if f.note:
        yield f.note
    if len(f.region) > 1:
        yield f"computed through {', '.join(f.region[:-1])}"
    yield from (f"reproduced by: {d.title} {' '.join(d.threads)}" for d in j.causes if f.tap in d.taps)
