"""The DualPipe player: one HTML page in which a reader steps through a pipeline schedule, ranks down, time to the right.

Everything shown is computed here from `refimpl.parallel_emulation.pipeline`; the page fetches nothing, and without scripts the
whole schedule is still there as a picture.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from _shell import document

from refimpl.parallel_emulation.pipeline import Times, build, simulate

RANKS, MICRO_BATCHES = 8, 20
NAMES = {"dualpipe": "DualPipe", "zb1p": "ZB1P", "1f1b": "1F1B"}
KINDS = {"F": "forward", "B": "backward", "I": "backward for the input", "W": "backward for the weights"}
STEPS = {
    1: "forwards from the near end",
    2: "forwards from both ends",
    3: "the first backwards, split, while forwards go on",
    4: "the main part: forwards and backwards together, both ways",
    5: "the last forwards of the far direction",
    6: "backwards of both directions",
    7: "backwards for the input, weight parts fill the gaps",
    8: "the weight parts that are left",
}
_U, _ROW, _BOX, _LEFT, _TOP = 24, 30, 26, 46, 22  # pixels: a time unit, a row, a box, what stands before and above


def steps_of(rank: int, ranks: int, micro_batches: int) -> list[int]:
    """Which of the report's eight steps each entry of a DualPipe rank's list belongs to, by how often they repeat."""
    n, h = ranks // 2, min(rank, ranks - 1 - rank)
    main = micro_batches // 2 - ranks + h + 1
    extra = int(h == n - 1)  # a middle rank does not overlap its first pair
    counts = [
        2 * (n - h - 1),
        2 * (h + 1),
        3 * (n - h - 1),
        2 * main + extra,
        2 * (n - h - 1),
        2 * (h + 1),
        2 * (n - h - 1),
        h + 1,
    ]
    return [step for step, count in enumerate(counts, 1) for _ in range(count)]


def data(name: str) -> dict[str, Any]:
    """A schedule in unit times: per rank [start, end, ops, step]; an op is [kind, direction, chunk]; step 0 outside DualPipe."""
    schedule = build(name, RANKS, MICRO_BATCHES)
    timeline = simulate(schedule, Times())
    rows = []
    for rank, spans in enumerate(timeline.spans):
        steps = steps_of(rank, RANKS, MICRO_BATCHES) if name == "dualpipe" else [0] * len(spans)
        assert len(steps) == len(spans)
        rows.append(
            [[round(s.start), round(s.end), [list(op) for op in s.step], k] for s, k in zip(spans, steps, strict=True)]
        )
    return {
        "name": NAMES[name],
        "end": timeline.makespan,
        "rows": rows,
        "idle": [timeline.bubble(r) for r in range(RANKS)],
    }


def picture(name: str, schedule: dict[str, Any]) -> str:
    """The whole schedule as an SVG: a group a step, with the classes and data that the script moves."""
    width, height = _LEFT + schedule["end"] * _U + 8, _TOP + RANKS * _ROW + 4
    alt = f"{schedule['name']}: {RANKS} ranks, {MICRO_BATCHES} micro-batches, {schedule['end']:g} time units"
    lines = [f'<svg id="pic-{name}" class="pic" width="{width:g}" height="{height}" role="img" aria-label="{alt}">']
    lines += [
        f'<text class="tick" x="{_LEFT + t * _U}" y="14">{t}</text>' for t in range(0, int(schedule["end"]) + 1, 4)
    ]
    for rank, row in enumerate(schedule["rows"]):
        y = _TOP + rank * _ROW
        lines.append(
            f'<g class="rank" transform="translate({_LEFT},{y})"><text x="{2 - _LEFT}" y="17">rank {rank}</text>'
        )
        for start, end, ops, _ in row:
            lines.append('<g class="box">')
            part = (end - start) * _U / len(ops)
            lines += [_rect(op, start * _U + k * part, part) for k, op in enumerate(ops)]
            lines.append(f'<rect class="edge" x="{start * _U:g}" width="{(end - start) * _U:g}"/></g>')
        lines.append("</g>")
    lines.append(
        f'<line class="now" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP - 4}" y2="{height}" visibility="hidden"/></svg>'
    )
    return "\n".join(lines)


def _rect(op: list[Any], x: float, width: float) -> str:
    """One op: fill by kind, a bar below in direction 1, and a label that says both: F3, or f3 from the other end."""
    kind, direction, chunk = op
    label = f"{kind.lower() if direction else kind}{chunk}"
    bar = f'<rect class="bar" x="{x:g}" width="{width:g}"/>' if direction else ""
    text = f'<text class="in" x="{x + width / 2:g}">{label}</text>'
    return f'<rect class="{kind}" x="{x:g}" width="{width:g}"/>{bar}{text}'


def legend() -> str:
    """Kinds and directions, each beside a drawn sample."""
    samples = [(k, 0, KINDS[k]) for k in KINDS] + [("F", 1, "small letter, bar below: enters at the last rank")]
    parts = []
    for kind, direction, text in samples:
        box = f'<svg width="28" height="28" role="img" aria-label="{escape(text)}">{_rect([kind, direction, 3], 1, 26)}</svg>'
        parts.append(f"<li>{box} {escape(text)}</li>")
    return f'<ul class="legend">{"".join(parts)}</ul>'


def page() -> str:
    """The document."""
    schedules = {name: data(name) for name in NAMES}
    body = _BODY.format(
        style=_STYLE,
        pictures="\n".join(f'<figure data-name="{n}">{picture(n, s)}</figure>' for n, s in schedules.items()),
        options="".join(f'<option value="{name}">{schedules[name]["name"]}</option>' for name in NAMES),
        follow="".join(
            f'<option value="{d}.{c}">{c} from rank {RANKS - 1 if d else 0}</option>'
            for d in (0, 1)
            for c in range(MICRO_BATCHES // 2)
        ),
        legend=legend(),
        end=int(schedules["dualpipe"]["end"]),
    )
    places = {"ranks": RANKS, "unit": _U, "left": _LEFT, "half": MICRO_BATCHES // 2}
    return document(
        f"A pipeline step by step: {RANKS} ranks, {MICRO_BATCHES} micro-batches",
        body,
        {"schedules": schedules, "kinds": KINDS, "steps": STEPS, **places},
        Path(__file__).with_suffix(".js").read_text(encoding="utf-8"),
    )


_STYLE = """
body { max-width: 70rem; }
.pic, .legend svg { width: auto; margin: 0; display: inline-block; vertical-align: middle; }
.controls[hidden], .said[hidden] { display: none; }
input[type=range] { flex: 1 1 180px; min-height: 36px; }
.scroll { overflow-x: auto; border: 1px solid #bbb; }
figure { margin: 0; }
svg text { font: 11px system-ui, sans-serif; }
svg .in { text-anchor: middle; font-size: 10px; fill: #111; transform: translateY(17px); }
svg .tick { text-anchor: middle; }
.F { fill: #fbe3c0; stroke: #888; stroke-width: .5; } .B { fill: #9ecae1; stroke: #888; stroke-width: .5; }
.I { fill: #d9d9d9; stroke: #888; stroke-width: .5; } .W { fill: #31507a; stroke: #888; stroke-width: .5; }
rect { height: 26px; } .bar { y: 22px; height: 4px; fill: #111; }
svg .W + text, svg .W + .bar + text { fill: #fff; } .W + .bar { fill: #fff; stroke: #111; stroke-width: .5; }
.edge { fill: none; stroke: currentColor; stroke-width: .7; }
.play .box { opacity: .3; } .play .box.past { opacity: .6; } .play .box.on { opacity: 1; }
.play .box.on .edge { stroke-width: 2.5; }
.play .box.other { opacity: .08; } .play .box.mine { opacity: 1; }
.now { stroke: #d55e00; stroke-width: 2; }
.said { padding: 0; margin: 8px 0; list-style: none; display: grid;
  grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 2px 18px; }
.said li { min-height: 1.5em; border-bottom: 1px solid var(--pale); } .idle { opacity: .75; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; padding: 0; list-style: none; }
.hide { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""

_BODY = """<style>{style}</style>
<p>A box is what a rank computes, time runs to the right, an empty place is idle time. F = 1, B = 2, of which W = 1; a forward and a
backward in one frame are executed together. Keys: <kbd>space</kbd> plays, <kbd>&larr;</kbd> <kbd>&rarr;</kbd> step,
<kbd>Home</kbd> and <kbd>End</kbd> jump.</p>
<div class="controls" role="group" aria-label="Player" hidden>
<label>Schedule <select id="which">{options}</select></label>
<button id="first" aria-label="To the beginning">|&#9664;</button>
<button id="back" aria-label="One time unit back">&#9664;</button>
<button id="play" aria-pressed="false">Play</button>
<button id="next" aria-label="One time unit on">&#9654;</button>
<button id="last" aria-label="To the end">&#9654;|</button>
<label class="hide" for="time">Time</label><input id="time" type="range" min="0" max="{end}" step="1" value="0">
<output id="clock" for="time">0</output>
<label>Follow micro-batch <select id="follow"><option value="">none</option>{follow}</select></label>
</div>
<div class="scroll" id="scroll" tabindex="0" role="region" aria-label="Schedule, ranks down, time to the right">
{pictures}
</div>
<p id="about" role="status" aria-live="polite"></p>
<ol class="said" id="said" aria-label="What every rank does now" hidden></ol>
{legend}
<p id="still">Without scripts: the three schedules are the pictures above, DualPipe, ZB1P and 1F1B.</p>
"""
