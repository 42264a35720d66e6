"""The DualPipe player: one HTML page in which a reader steps through a pipeline schedule, ranks down, time to the right.

Everything shown is computed here from `refimpl.parallel_emulation.pipeline`; the page fetches nothing, and without scripts the
whole schedule is still there as a picture.
"""

from __future__ import annotations

import json
from html import escape
from typing import Any

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
        rows.append([[s.start, s.end, [list(op) for op in s.step], k] for s, k in zip(spans, steps, strict=True)])
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
        lines.append(f'<g transform="translate({_LEFT},{y})"><text x="{2 - _LEFT}" y="17">rank {rank}</text>')
        for i, (start, end, ops, _) in enumerate(row):
            lines.append(f'<g class="box" data-rank="{rank}" data-i="{i}">')
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
    bar = f'<rect class="bar" x="{x:g}" y="{_BOX - 4}" width="{width:g}"/>' if direction else ""
    text = f'<text class="in" x="{x + width / 2:g}" y="17">{label}</text>'
    return f'<rect class="{kind}" x="{x:g}" width="{width:g}"/>{bar}{text}'


def legend() -> str:
    """Kinds and directions, each beside a drawn sample."""
    samples = [(k, 0, KINDS[k]) for k in KINDS] + [("F", 1, "small letter, bar below: enters at the last rank")]
    parts = []
    for kind, direction, text in samples:
        box = f'<svg width="28" height="28" aria-hidden="true">{_rect([kind, direction, 3], 1, 26)}</svg>'
        parts.append(f"<li>{box} {escape(text)}</li>")
    return f'<ul class="legend">{"".join(parts)}</ul>'


def page() -> str:
    """The document."""
    schedules = {name: data(name) for name in NAMES}
    options = "".join(f'<option value="{name}">{schedules[name]["name"]}</option>' for name in NAMES)
    follow = "".join(
        f'<option value="{d}.{c}">{c} from rank {RANKS - 1 if d else 0}</option>'
        for d in (0, 1)
        for c in range(MICRO_BATCHES // 2)
    )
    places = {"ranks": RANKS, "unit": _U, "left": _LEFT, "half": MICRO_BATCHES // 2}
    given = json.dumps({"schedules": schedules, "kinds": KINDS, "steps": STEPS, **places})
    pictures = "\n".join(f'<figure data-name="{n}">{picture(n, s)}</figure>' for n, s in schedules.items())
    return _PAGE.format(
        style=_STYLE, script=_SCRIPT, data=given.replace("<", "\\u003c"), pictures=pictures, options=options, follow=follow,
        legend=legend(), ranks=RANKS, m=MICRO_BATCHES, end=int(schedules["dualpipe"]["end"]),
    )  # fmt: skip


_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 8px 12px; max-width: 1100px; color: #111; background: #fff; }
h1 { font-size: 1.15rem; margin: 4px 0; }
.controls { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; margin: 8px 0; }
.controls[hidden], .said[hidden] { display: none; }
button, select { font: inherit; padding: 6px 10px; min-height: 36px; border: 1px solid #444; border-radius: 5px;
  background: #f6f6f6; }
button:focus-visible, select:focus-visible, input:focus-visible, .scroll:focus-visible { outline: 3px solid #0072B2; }
input[type=range] { flex: 1 1 180px; min-height: 36px; }
.scroll { overflow-x: auto; border: 1px solid #bbb; }
figure { margin: 0; }
svg text { font: 11px system-ui, sans-serif; }
svg .in { text-anchor: middle; font-size: 10px; }
svg .tick { text-anchor: middle; fill: #444; }
.F { fill: #fbe3c0; stroke: #888; stroke-width: .5; } .B { fill: #9ecae1; stroke: #888; stroke-width: .5; }
.I { fill: #d9d9d9; stroke: #888; stroke-width: .5; } .W { fill: #31507a; stroke: #888; stroke-width: .5; }
rect { height: 26px; } .bar { height: 4px; fill: #111; }
.W + text, .W + .bar + text { fill: #fff; } .W + .bar { fill: #fff; stroke: #111; stroke-width: .5; }
.edge { fill: none; stroke: #333; stroke-width: .7; }
.play .box { opacity: .3; } .play .box.past { opacity: .6; } .play .box.on { opacity: 1; }
.play .box.on .edge { stroke-width: 2.5; }
.play .box.other { opacity: .08; } .play .box.mine { opacity: 1; }
.now { stroke: #d55e00; stroke-width: 2; }
.said { padding: 0; margin: 8px 0; list-style: none; display: grid;
  grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 2px 18px; }
.said li { min-height: 1.5em; border-bottom: 1px solid #eee; } .idle { color: #595959; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; padding: 0; list-style: none; } .legend svg { vertical-align: middle; }
.hide { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>DualPipe, step by step</title><style>{style}</style></head>
<body><main>
<h1>A pipeline step by step: {ranks} ranks, {m} micro-batches</h1>
<p>A box is what a rank computes, time runs to the right, white is idle. F = 1, B = 2, of which W = 1; a forward and a backward
in one frame are executed together. Keys: <kbd>space</kbd> plays, <kbd>&larr;</kbd> <kbd>&rarr;</kbd> step,
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
<noscript><p>Scripts are off: above are the three schedules as pictures, DualPipe, ZB1P and 1F1B.</p></noscript>
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body></html>
"""

_SCRIPT = """
"use strict";
const D = JSON.parse(document.getElementById("data").textContent), $ = id => document.getElementById(id);
let name = "dualpipe", t = 0, timer = null, begun = false;
const quiet = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const from = op => " (from rank " + (op[1] ? D.ranks - 1 : 0) + ")";
const word = (op, two) => D.kinds[op[0]] + " of " + op[2] + (two ? from(op) : "");
function at(rank) { return D.schedules[name].rows[rank].findIndex(s => s[0] <= t && t < s[1]); }
function say(rank) {
  const i = at(rank);
  if (i < 0) return "idle";
  const s = D.schedules[name].rows[rank][i], two = name === "dualpipe";
  return s[2].map(op => word(op, two)).join(" together with ") + (s[3] ? "; step " + s[3] : "");
}
function show() {
  const S = D.schedules[name], svg = $("pic-" + name), follow = two() ? $("follow").value : $("follow").value && any();
  $("time").max = S.end; $("time").value = t; $("clock").value = t + " of " + S.end;
  $("time").setAttribute("aria-valuetext", "time " + t + " of " + S.end);
  svg.classList.toggle("play", (begun && t < S.end) || !!follow);
  for (const box of svg.querySelectorAll(".box")) {
    const s = S.rows[+box.dataset.rank][+box.dataset.i];
    box.classList.toggle("on", s[0] <= t && t < s[1]);
    box.classList.toggle("past", s[1] <= t);
    const mine = !!follow && s[2].some(op => op[1] + "." + op[2] === follow);
    box.classList.toggle("mine", mine);
    box.classList.toggle("other", !!follow && !mine);
  }
  const x = D.left + t * D.unit, now = svg.querySelector(".now"), pane = $("scroll");
  now.setAttribute("x1", x); now.setAttribute("x2", x); now.setAttribute("visibility", "visible");
  const ahead = x - pane.scrollLeft;
  if (ahead < D.left || ahead > pane.clientWidth - 3 * D.unit) pane.scrollLeft = x - pane.clientWidth / 2;
  let busy = 0; const steps = new Set();
  for (let r = 0; r < D.ranks; r++) {
    const line = $("said").children[r], text = say(r), i = at(r);
    if (i >= 0) { busy++; if (S.rows[r][i][3]) steps.add(S.rows[r][i][3]); }
    line.textContent = "rank " + r + ": " + text; line.className = i < 0 ? "idle" : "";
  }
  const list = [...steps].sort().map(k => "step " + k + ", " + D.steps[k]);
  const over = S.name + " is over after " + S.end + " time units; a rank was idle for " + Math.min(...S.idle) + " of them.";
  const words = "Time " + t + ": " + busy + " of " + D.ranks + " ranks compute.";
  $("about").textContent = t >= S.end ? over : words + (list.length ? " In " + list.join("; in ") + "." : "");
}
function two() { return name === "dualpipe"; }
function any() { const [d, c] = $("follow").value.split(".").map(Number); return "0." + (c + d * D.half); }
function go(to) { begun = true; t = Math.max(0, Math.min(D.schedules[name].end, to));
  if (t >= D.schedules[name].end) stop(); show(); }
function label(text, pressed) { $("play").textContent = text; $("play").setAttribute("aria-pressed", pressed); }
function stop() { if (timer) clearInterval(timer); timer = null; label("Play", "false");
  $("about").setAttribute("aria-live", "polite"); }
function play() {
  if (timer) return stop();
  if (t >= D.schedules[name].end) t = 0;
  begun = true; $("about").setAttribute("aria-live", "off");
  timer = setInterval(() => go(t + 1), quiet ? 1200 : 500); label("Pause", "true"); show();
}
function pick() {
  name = $("which").value; stop(); t = 0; begun = false;
  for (const f of document.querySelectorAll("figure")) f.hidden = f.dataset.name !== name;
  show();
}
for (let r = 0; r < D.ranks; r++) $("said").append(document.createElement("li"));
document.querySelector(".controls").hidden = $("said").hidden = false;
$("first").onclick = () => go(0); $("last").onclick = () => go(1e9); $("back").onclick = () => go(t - 1);
$("next").onclick = () => go(t + 1);
$("play").onclick = play; $("time").oninput = e => go(+e.target.value); $("which").onchange = pick; $("follow").onchange = show;
document.addEventListener("keydown", e => {
  if (["SELECT", "INPUT"].includes(e.target.tagName) || e.ctrlKey || e.metaKey || e.altKey) return;
  const keys = { ArrowRight: () => go(t + 1), ArrowLeft: () => go(t - 1), Home: () => go(0), End: () => go(1e9) };
  if (e.key === " " && e.target.tagName !== "BUTTON") keys[" "] = play;
  if (keys[e.key]) { e.preventDefault(); keys[e.key](); }
});
pick();
"""
