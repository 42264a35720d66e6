"""Drawings that a page carries in itself: PNG as data addresses, SVG. What matters is told by lightness, so it holds in grey too.

Two scales. A verdict: light blue where something is within what it is allowed, dark orange to black beyond. A magnitude: the
larger an error, the darker, by decades below the largest of its map.
"""

from __future__ import annotations

import base64
import colorsys
import math
import struct
import zlib

import numpy as np

from refimpl.autograd.tensor import Array

from .picture import BINS, LOWEST, Picture

Colour = tuple[int, int, int]
DECADES = 4
"""Below a map's largest error, in which magnitudes are told apart: enough for its pattern, whatever is allowed."""
FAR = 6.0
"""Decades beyond what is allowed at which a verdict is black."""


def verdict_colour(ratio: float, *, ok: bool) -> Colour:
    """Of an error that is `ratio` times what is allowed."""
    if ok:
        return _hsl(210, 0.6, 0.96 - 0.2 * min(ratio, 1.0))
    far = min(math.log10(max(ratio, 1.0)) / FAR, 1.0) if math.isfinite(ratio) else 1.0
    return _hsl(25, 0.9, 0.34 - 0.29 * far)


def css(colour: Colour) -> str:
    """#rrggbb."""
    return "#" + bytes(colour).hex()


def _hsl(hue: float, saturation: float, lightness: float) -> Colour:
    r, g, b = colorsys.hls_to_rgb(hue / 360, lightness, saturation)
    return round(255 * r), round(255 * g), round(255 * b)


_WHITE = (255, 255, 255)
_VERDICTS = (
    _WHITE,
    *[verdict_colour(i / 126, ok=True) for i in range(127)],
    *[verdict_colour(10 ** (i * FAR / 127), ok=False) for i in range(128)],
)
_MAGNITUDES = (_WHITE, _hsl(210, 0.6, 0.95), *[_hsl(210, 0.6, 0.9 - 0.7 * i / 252) for i in range(253)], (0, 0, 0))
"""0 not compared; then none; then the decades below the largest; 255, what is no number."""


def heat_png(p: Picture) -> str:
    """The map: rows are tokens, columns features."""
    with np.errstate(all="ignore"):
        t = 1 + np.log10(p.heat / largest(p)) / DECADES
    level = np.where(np.isinf(p.heat), 255, 2 + np.round(252 * np.clip(t, 0, 1)))
    return png(np.where(np.isnan(p.heat), 0, np.where(p.heat == 0, 1, level)), _MAGNITUDES)


def largest(p: Picture) -> float:
    """The largest finite error of a map, 1 if there is none."""
    finite = p.heat[np.isfinite(p.heat) & (p.heat > 0)]
    return float(finite.max(initial=0)) or 1.0


def strip_png(p: Picture, allowed: float) -> str:
    """Beside the map: each token's worst row, which is what the verdict is about."""
    with np.errstate(all="ignore"):
        ratio = np.where(p.strip == 0, 0, p.strip / allowed)
        within, beyond = 1 + np.round(126 * ratio), 128 + np.round(127 * np.clip(np.log10(ratio) / FAR, 0, 1))
    level = np.where(np.isnan(p.strip), 0, np.where(ratio <= 1, within, beyond))
    return png(level[:, None], _VERDICTS)


def scale_png() -> str:
    """The scale of magnitudes, the largest on the right."""
    return png(np.arange(2, 255)[None], _MAGNITUDES)


def png(levels: Array, palette: tuple[Colour, ...]) -> str:
    """levels (rows, columns), each an index of the palette -> a data address."""
    rows, columns = levels.shape
    lines = np.zeros((rows, columns + 1), np.uint8)  # every line begins with its filter: 0, none
    lines[:, 1:] = levels
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes([c for colour in palette for c in colour])),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    body = b"".join([struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts])
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


# ---- The histogram

_WIDTH, _HEIGHT, _FOOT = 560, 110, 30


def histogram_svg(p: Picture, allowed: float) -> str:
    """Elements by their error, in half decades, heights logarithmic; a line at what is allowed. SVG, its words in a label."""
    low, high = _span(p, allowed)
    step, most = _WIDTH / (high - low + 3), math.log1p(max(p.equal, *p.counts, 1))
    bars = [(low - 1, p.equal, "equal"), *[(k, n, _decade(k)) for k, n in enumerate(p.counts[:BINS])]]
    bars = [b for b in [*bars, (high + 1, p.counts[BINS], "NaN or infinite")] if b[1]]
    said = "; ".join([f"{title}: {n:,}" for _, n, title in bars])
    at = (_place(allowed) - low + 1) * step if allowed else None
    edges = range(low + 1, high + (1 if p.counts[BINS] else 2))  # the last one lies under the word NaN
    return "".join(
        [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" role="img" aria-label="elements by error: {said}">',
            *[
                _bar((k - low + 1) * step, step, (_HEIGHT - 14) * math.log1p(n) / most, title, n)
                for k, n, title in bars
            ],
            *[_tick((k - low + 1) * step, f"1e{LOWEST + k // 2}") for k in edges if k % 4 == 0],
            _tick(step / 2, "0") if p.equal else "",
            _tick((high - low + 2.5) * step, "NaN") if p.counts[BINS] else "",
            _limit(at) if at is not None else "",
            "</svg>",
        ]
    )


def _place(error: float) -> float:
    """Where an error lies, counted in bins."""
    return min(max(2 * (math.log10(error) - LOWEST), 0.0), float(BINS))


def _span(p: Picture, allowed: float) -> tuple[int, int]:
    """First and last bin that is shown: those with elements in them, and what is allowed; at least four decades."""
    used = [k for k, n in enumerate(p.counts[:BINS]) if n] + ([int(_place(allowed))] if allowed else [])
    middle = (min(used, default=-2 * LOWEST) + max(used, default=-2 * LOWEST)) // 2
    return min([middle - 4, *used]), max([middle + 4, *used])


def _decade(k: int) -> str:
    return f"{10 ** (LOWEST + k / 2):.0e} to {10 ** (LOWEST + (k + 1) / 2):.0e}"


def _bar(left: float, step: float, height: float, title: str, n: int) -> str:
    rectangle = f'<rect x="{left + 1:.1f}" y="{_HEIGHT - height:.1f}" width="{step - 2:.1f}" height="{height:.1f}">'
    return f"{rectangle}<title>{title}: {n:,} elements</title></rect>"


def _tick(x: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{_HEIGHT + 14}" text-anchor="middle">{text}</text>'


def _limit(x: float) -> str:
    line = f'<path d="M{x:.1f} 8V{_HEIGHT}" class="limit"/>'
    return f'{line}<text x="{x:.1f}" y="{_HEIGHT + 27}" text-anchor="middle" class="limit">allowed</text>'
