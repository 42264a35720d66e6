"""A timeline as a picture: one row a rank, time to the right, one box a step; text for a terminal, SVG for a page.

Colours follow the figure of the DualPipe repository: forward orange, backward green, its input part light blue, its
weight part dark blue; the two halves of an overlapped pair share a black border.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .schedule import Op, Step, step_text
from .timeline import Span, Timeline

_FILL = {"F": "#f4b860", "B": "#8cc98a", "I": "#9bd3e6", "W": "#6f9fd8"}
_DARK = {"F": "#b5651d", "B": "#2f7d32", "I": "#22809c", "W": "#274f8f"}  # direction 1 and above, with white text
_MEANING = {"F": "forward", "B": "backward", "I": "backward for input", "W": "backward for weights"}
_ROW, _BOX, _LEFT, _TOP = 26, 22, 64, 34  # pixels
_MOST_COLUMNS = 8  # characters a time unit may take


def _shortest(timeline: Timeline) -> float:
    """Duration of the shortest step that takes time at all."""
    lengths = [span.end - span.start for row in timeline.spans for span in row]
    return min((length for length in lengths if length > 0), default=1.0)


def _labels(timeline: Timeline, step: Step) -> list[str]:
    """`F3` in direction 0, `f3` in direction 1; `F2.3` where a rank has more than two directions."""
    if max(len(row) for row in timeline.schedule.layout.stages) > 2:
        return [str(op) for op in step]
    return [f"{op.kind.lower() if op.direction else op.kind}{op.chunk}" for op in step]


def text(timeline: Timeline) -> str:
    """One line a rank, as wide as time is long; lower case is direction 1, idle time is blank."""
    spans = [span for row in timeline.spans for span in row if span.end > span.start]
    needed = ((len("&".join(_labels(timeline, s.step))) + 1) / (s.end - s.start) for s in spans)
    columns = min(math.ceil(max(needed, default=1)), _MOST_COLUMNS / _shortest(timeline))
    lines = [f"{'rank':<6}{timeline.schedule.name}, {timeline.makespan:g} time units"]
    for rank, row in enumerate(timeline.spans):
        line = ""
        for span in row:
            start, end = round(span.start * columns), round(span.end * columns)
            label = "&".join(_labels(timeline, span.step))
            line = line.ljust(start) + label.ljust(end - start - 1, "-")[: max(0, end - start - 1)].ljust(end - start)
        lines.append(f"{rank:<6}{line}".rstrip())
    return "\n".join(lines)


def svg(timeline: Timeline) -> str:
    """A stand-alone SVG document; hovering over a box shows op, start and end."""
    scale = 26 / _shortest(timeline)
    n_ranks = timeline.schedule.layout.n_ranks
    width, height = _LEFT + timeline.makespan * scale + 12, _TOP + n_ranks * _ROW + 34
    size = f'width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}"'
    name, least = timeline.schedule.name, min(map(timeline.bubble, range(n_ranks)), default=0.0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
        f'<text x="6" y="20" font-size="13">{name}: {n_ranks} ranks, {timeline.schedule.layout.micro_batches} '
        f"micro-batches, {timeline.makespan:g} time units, idle at least {least:g}</text>",
    ]
    for rank, row in enumerate(timeline.spans):
        y = _TOP + rank * _ROW
        lines.append(f'<text x="6" y="{y + 15}">rank {rank}</text>')
        for span in row:
            lines += _box(timeline, span, y, scale)
    lines += _legend(_TOP + n_ranks * _ROW + 8)
    return "\n".join([*lines, "</svg>\n"])


def _box(timeline: Timeline, span: Span, y: int, scale: float) -> Iterator[str]:
    """One step: a rectangle for each op, sharing the time in equal parts, and a border around a pair."""
    x, width = _LEFT + span.start * scale, (span.end - span.start) * scale
    yield f"<g><title>{step_text(span.step)}  {span.start:g} to {span.end:g}</title>"
    part = width / len(span.step)
    for i, op in enumerate(span.step):
        yield _rectangle(op, x + i * part, y, part)
    if len(span.step) > 1:
        yield f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" fill="none" stroke="black"/>'
    yield "</g>"


def _rectangle(op: Op, x: float, y: int, width: float) -> str:
    fill, ink = (_DARK[op.kind], "white") if op.direction else (_FILL[op.kind], "black")
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BOX}" fill="{fill}" stroke="#888" '
        f'stroke-width="0.5"/><text x="{x + width / 2:.2f}" y="{y + 15}" fill="{ink}" '
        f'text-anchor="middle">{op.chunk}</text>'
    )


def _legend(y: int) -> Iterator[str]:
    x = _LEFT
    for kind, meaning in _MEANING.items():
        yield f'<rect x="{x}" y="{y}" width="14" height="14" fill="{_FILL[kind]}"/>'
        yield f'<rect x="{x + 14}" y="{y}" width="14" height="14" fill="{_DARK[kind]}"/>'
        yield f'<text x="{x + 33}" y="{y + 11}">{meaning}</text>'
        x += 50 + 7 * len(meaning)
    yield f'<text x="{x}" y="{y + 11}">light: direction 0, dark: the others</text>'
