"""One tap's part of the page: numbers, the hypothesis, and, if it has a picture, map, histogram and worst entries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from .compare import Finding
from .diagnose import Diagnosis
from .drawing import DECADES, heat_png, histogram_svg, largest, scale_png, strip_png
from .picture import Entry, Picture

_TALL, _WIDE = 320, 560
"""Pixels that a map may take; its cells are whole pixels of at most 20."""


def section(f: Finding, causes: list[Diagnosis], *, picture: bool) -> Iterator[str]:
    """The lines of HTML. Its id is the tap, so that a link to it needs no script."""
    name, state = escape(f.tap, quote=True), "ok" if f.ok else "blamed"
    yield f'<section id="{name}" class="{state}" aria-label="{name}"><h2>{name}</h2>'
    yield from _numbers(f)
    yield from (f"<p>{escape(line)}</p>" for line in (f.note, _region(f)) if line)
    if not f.ok:
        yield from _hypothesis(f, causes)
    if f.picture is not None and picture:
        yield from (*_map(f, f.picture), *_histogram(f, f.picture), *_worst(f.picture))
    elif f.picture is not None and not f.ok:
        yield "<p>Not pictured: so many taps are blamed that only the worst of every stage are.</p>"
    yield '<p><a href="#grid">Back to the grid</a></p></section>'


def _numbers(f: Finding) -> Iterator[str]:
    rows = (
        ("stage", f.stage),
        ("verdict", "within what is allowed" if f.ok else "BEYOND what is allowed"),
        ("worst row", f"{f.error:.2e}, allowed {f.allowed:.2e}"),
        ("lean of all rows", f"{f.lean:.2e}, allowed {f.upright:.2e}"),
        ("distance to our own run", f"{f.chained:.1e}"),
    )
    yield "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in rows) + "</dl>"


def _region(f: Finding) -> str:
    return f"Computed through {', '.join(f.region[:-1])}, which were not recorded." if len(f.region) > 1 else ""


def _hypothesis(f: Finding, causes: list[Diagnosis]) -> Iterator[str]:
    """What reproduces the tap, with its threads; or that nothing does."""
    found = [d for d in causes if f.tap in d.taps]
    for d in found:
        known = (
            f" ({', '.join([*d.ids, *d.threads])}). Re-run on these inputs it gives the candidate's output."
            if d.id
            else ""
        )
        yield f'<p class="cause"><b>Hypothesis:</b> {escape(d.said + known)}</p>'
    if not found:
        yield '<p class="cause"><b>Hypothesis:</b> none: no known mistake reproduces it.</p>'


def _map(f: Finding, p: Picture) -> Iterator[str]:
    """Strip and map beside each other, with their first and last indices, and what they show in words."""
    (rows, columns), across = p.heat.shape, p.size[1]
    high, wide = max(1, min(20, _TALL // rows)) * rows, max(1, min(20, _WIDE // columns)) * columns
    first, last = (str(list(end)) for end in p.ends)
    alt = f"{f.tap}: map of errors, {' x '.join(map(str, p.size))}" + "".join(
        f"; worst at {list(w.at)}" for w in p.worst[:1]
    )
    yield f"<figure><figcaption>{_caption(p)}</figcaption>"
    yield f'<div class="map"><span class="ends"><span>{first}</span><span>{last}</span></span>'
    yield f'<img src="{strip_png(p, f.allowed)}" width="14" height="{high}" alt="">'
    yield f'<img class="heat" src="{heat_png(p)}" width="{wide}" height="{high}" alt="{escape(alt, quote=True)}">'
    yield f'<span></span><span></span><span class="feet"><span>0</span><span>{across - 1}</span></span></div>'
    yield from _scale(f.allowed, largest(p))
    yield "</figure>"


def _caption(p: Picture) -> str:
    tokens, features = (" ".join(axes) or "1" for axes in (p.rows, p.columns))
    words = [
        f"Error by token ({tokens}, down) and feature ({features}, across); left of it each token's worst row, blue within"
    ]
    words += ["what is allowed, orange to black beyond."]
    if p.size != p.heat.shape:
        block = " x ".join(str(math.ceil(n / cells)) for n, cells in zip(p.size, p.heat.shape, strict=True))
        words += [f"Each cell is the largest of up to {block}."]
    if p.unseen:
        words += [f"White: {p.unseen:,} elements of tokens whose experts rounding may change, not compared."]
    return " ".join(words)


def _scale(allowed: float, most: float) -> Iterator[str]:
    """What a shade means."""
    if not allowed:
        yield '<p class="scale">Pale: equal. Dark: not.</p>'
        return
    marks = {most * 10.0**-DECADES: 0.0, most: 1.0}
    within = 1 + math.log10(allowed / most) / DECADES
    marks |= {allowed: within} if 0.15 < within < 0.85 else {}
    each = "".join(f'<span style="left:{100 * s:.0f}%">{e:.0e}</span>' for e, s in marks.items())
    yield f'<div class="scale"><img src="{scale_png()}" width="300" height="12" alt="scale: darker is worse">{each}</div>'
    yield f'<p class="scale">Palest: equal; black: NaN or infinite. A row is allowed {allowed:.1e}.</p>'


def _histogram(f: Finding, p: Picture) -> Iterator[str]:
    yield "<figure><figcaption>Elements by error; heights are logarithmic. A row's elements have the row's error as their root"
    yield f"mean square.</figcaption>{histogram_svg(p, f.allowed)}</figure>"


def _worst(p: Picture) -> Iterator[str]:
    if not p.worst:
        return
    head = "".join(f'<th scope="col">{h}</th>' for h in (f"index ({' '.join(p.axes)})", *_COLUMNS))
    yield f"<table class='worst'><caption>Worst entries</caption><thead><tr>{head}</tr></thead><tbody>"
    yield from (_entry(e) for e in p.worst)
    yield "</tbody></table>"


_COLUMNS = ("candidate", "expected", "difference", "error")


def _entry(e: Entry) -> str:
    values = (f"{e.candidate:.9g}", f"{e.expected:.9g}", f"{e.candidate - e.expected:+.3g}", f"{e.error:.1e}")
    return f"<tr><td>{list(e.at)}</td>{''.join(f'<td>{v}</td>' for v in values)}</tr>"
