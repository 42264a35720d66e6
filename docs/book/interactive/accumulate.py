"""The accumulation stepper: one step of a tensor core, addend by addend, with the bits that are kept and those that are cut.

Everything shown comes from `why`, the specification's own account of an output; the page only turns its leaves.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from _shell import document

from refimpl.layers.numerics.formats import E4M3, encode
from refimpl.layers.numerics.tensor_cores import why
from refimpl.layers.numerics.tensor_cores.explain import Step

EXAMPLES: dict[str, tuple[str, list[float], list[float], float]] = {
    "mixed sizes": (
        "hopper",
        [16, 1.5, 0.125, 0.015625, -0.75],
        [14, 1.25, 0.140625, 0.01953125, 0.01953125],
        100.0078125,
    ),
    "an accumulator just below 2": ("hopper", [2**-6] * 7, [2**-7] * 7, 2 - 2**-13),
    "an accumulator of exactly 2": ("hopper", [2**-6] * 7, [2**-7] * 7, 2.0),
    "a difference that should be small": ("hopper", [16, -16, 0.203125], [15, 15, 0.140625], 0.0),
    "only zeros, and an accumulator": ("hopper", [0, 0], [1, 1], 1.0001220703125 + 2**-20),
    "mixed sizes, on Blackwell": (
        "blackwell",
        [16, 1.5, 0.125, 0.015625, -0.75],
        [14, 1.25, 0.140625, 0.01953125, 0.01953125],
        100.0078125,
    ),
}
"""name -> (machine, a, b, accumulator)."""


def explained(name: str) -> Step:
    """The one step of an example."""
    arch, a, b, c = EXAMPLES[name]
    codes = [encode(np.array([x], np.float32), E4M3, overflow="refuse") for x in (a, b)]
    return why(*codes, np.array([[c]], np.float32), 0, 0, arch=arch, fmt="e4m3").steps[0]


def bits(x: Fraction, top: int, last: int) -> str:
    """The bits of |x| from 2^top down to 2^last, "." above its leading one; `last` is deep enough for all of them.

    >>> bits(Fraction(5, 4), 1, -3)
    '.1010'
    """
    whole = abs(x) / Fraction(2) ** last
    assert whole.denominator == 1
    return f"{int(whole):b}".rjust(top - last + 1, ".")


def example(name: str) -> dict[str, Any]:
    """What the page shows of an example: rows of bits with where they are cut, the sum of quanta so far, the result."""
    step = explained(name)
    quantum = step.quantum.numerator.bit_length() - step.quantum.denominator.bit_length()
    shown = [a for a in step.addends if a.x]
    top = max(step.E + 3, quantum + abs(step.S).bit_length())
    last = min([quantum, *(-(a.x.denominator.bit_length() - 1) for a in shown)])
    running, rows = 0, []
    for a in shown:
        running += a.t
        who = "accumulator" if a.k is None else f"product {a.k}"
        rows.append([who, float(a.x), bits(a.x, top, last), a.t, float(a.lost), running])
    total = step.S * step.quantum
    return {
        "E": step.E, "quantum": quantum, "top": top, "last": last, "rows": rows, "S": step.S,
        "sum": [float(total), bits(total, top, last)], "written": [step.value, bits(Fraction(step.value), top, last)],
        "lost": float(step.lost), "exact": float(sum(a.x for a in shown)), "arch": EXAMPLES[name][0],
    }  # fmt: skip


CELL, ROW, LEFT = 15, 20, 150


def picture(e: dict[str, Any]) -> str:
    """All rows of an example as bits, cut bits hatched; each row a group, so that the script can hide those to come."""
    lines = [*((r[0], r[1], r[2], e["quantum"]) for r in e["rows"])]
    lines += [("sum of quanta", *e["sum"], e["quantum"]), ("written", *e["written"], e["last"])]
    out, width = [], LEFT + CELL * (e["top"] - e["last"] + 1) + 10
    edge = LEFT + CELL * (e["top"] - e["quantum"] + 1)
    for j, (who, value, row, cut) in enumerate(lines):
        y, cells = 30 + ROW * j, []
        for i, bit in enumerate(row):
            if bit == ".":
                continue
            gone = e["top"] - i < cut
            kind = 'fill="url(#cut)"' if gone else f'class="{"dark" if bit == "1" else "pale"}"'
            ink = ' style="fill:#fff"' if bit == "1" and not gone else ""
            at = LEFT + CELL * i
            cells.append(
                f'<rect x="{at}" y="{y - 14}" width="{CELL - 1}" height="17" {kind} stroke="currentColor" stroke-width="0.4"/>'
                f'<text x="{at + 7}" y="{y - 1}" text-anchor="middle"{ink}>{bit}</text>'
            )
        sign = f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{"-" if value < 0 else ""}</text>'
        out.append(f'<g data-row="{j}"><text x="0" y="{y}">{who}</text>{sign}{"".join(cells)}</g>')
    height = 30 + ROW * len(lines)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Bits of every addend, lined up; bits right of the dashed line are cut">'
        '<defs><pattern id="cut" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<path d="M0 0V5" stroke="#d55e00" stroke-width="2"/></pattern></defs>'
        f'<text x="{LEFT}" y="10">2^{e["top"]}</text><text x="{edge - 2}" y="10" text-anchor="end">2^{e["quantum"]}</text>'
        f'<path class="line" stroke-dasharray="4 3" d="M{edge - 0.5} 0V{height}"/>{"".join(out)}</svg>'
    )


def page() -> str:
    """The HTML document."""
    data = {name: example(name) | {"picture": picture(example(name))} for name in EXAMPLES}
    first = next(iter(data.values()))
    options = "".join(f"<option>{name}</option>" for name in EXAMPLES)
    body = f"""
<p>A tensor core lines up its products and the accumulator with the largest exponent. What lies right of the dashed line
is cut, toward zero, addend by addend. Then the whole numbers that are left are added, exactly, and the sum is cut once more
when it is written.</p>
<div id="live" hidden><div class="controls">
<label>example <select id="example">{options}</select></label>
<button id="back">Back</button> <button id="next">Next</button> <button id="all">All</button></div>
<p class="says" id="says" aria-live="polite"></p></div>
<div id="picture" class="scroll" tabindex="0" role="group" aria-label="the addends">{first["picture"]}</div>
<p class="says" id="result"></p>
<p id="still">Without scripts: {first["exact"]!r} is the exact sum above, {first["written"][0]!r} is what a Hopper tensor core
writes.</p>
"""
    return document("Accumulation stepper", body, data, Path(__file__).with_suffix(".js").read_text(encoding="utf-8"))
