"""The FP8 number line: a number, the code it is rounded to, that code's bits and neighbours. All values come from `decode`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from _shell import document

from refimpl.layers.numerics.formats import E4M3, E5M2, Format, decode

LEFT, RIGHT, LOW, HIGH = 20, 580, -17, 16


def finite(f: Format) -> list[float | None]:
    """The value of each of 256 codes, None where it is no number."""
    values = decode(np.arange(256, dtype=np.uint8), f)
    return [float(v) if math.isfinite(v) else None for v in values]


def place(x: float) -> float:
    """Where a positive number is on the logarithmic axis."""
    return LEFT + (RIGHT - LEFT) * (math.log2(x) - LOW) / (HIGH - LOW)


def axis(f: Format, y: int) -> str:
    """All positive values of a format as ticks, and its name."""
    ticks = "".join(f"M{place(v):.2f} {y}v18" for v in finite(f) if v is not None and v > 0)
    return f'<text x="0" y="{y - 6}">{f.name}</text><path class="line" stroke-width="0.7" d="{ticks}"/>'


def page() -> str:
    """The HTML document."""
    names = "".join(
        f'<text x="{place(2.0**e):.1f}" y="112" text-anchor="middle">2^{e}</text>' for e in range(-16, 17, 4)
    )
    bits = "".join(f'<button data-bit="{b}" aria-pressed="false">0</button>' for b in range(7, -1, -1))
    body = f"""
<p>Every positive number that eight bits can hold, twice: E4M3 has eight values a doubling, E5M2 four and a longer reach.
At the left end of each the subnormals: equally spaced, so ever fewer a doubling.</p>
<div class="scroll" tabindex="0" role="group" aria-label="all values"><svg viewBox="0 0 600 118" role="img"
aria-label="Two rows of ticks on a logarithmic axis, E4M3 from 2^-9 to 448 and E5M2 from 2^-16 to 57344">
{axis(E4M3, 20)}{axis(E5M2, 66)}{names}<path id="here" class="line" style="stroke:var(--warm)" stroke-width="2.5" d=""/></svg></div>
<div id="live" hidden>
<div class="controls"><label>format
<select id="format"><option value="e4m3">E4M3</option><option value="e5m2">E5M2</option></select></label>
<label>number <input id="x" inputmode="decimal" size="12" value="0.3"></label>
<label>move <input id="move" type="range" min="-1100" max="1000" value="-174"
aria-label="size of the number, on a logarithmic scale"></label></div>
<p class="says" id="says" aria-live="polite"></p>
<svg viewBox="0 0 600 70" role="img" aria-label="The number between its neighbours, linear"><g id="near"></g></svg>
<div class="controls" role="group" 
aria-label="bits of the code: sign, exponent, fraction">{bits} <span class="says" id="fields"></span></div>
</div>
<p id="still">Without scripts this page is the picture above. With them, type a number and see its code.</p>
"""
    data: dict[str, Any] = {
        "e4m3": {"values": finite(E4M3), "m": E4M3.mantissa, "bias": E4M3.bias, "max": float(E4M3.max)},
        "e5m2": {"values": finite(E5M2), "m": E5M2.mantissa, "bias": E5M2.bias, "max": float(E5M2.max)},
        "axis": [LEFT, RIGHT, LOW, HIGH],
    }
    return document("FP8 number line", body, data, Path(__file__).with_suffix(".js").read_text(encoding="utf-8"))
