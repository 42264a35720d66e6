"""What is drawn of a picture, number by number: maps by loops, histograms as texts that somebody looked at."""

import base64
import colorsys
import dataclasses
import math
import struct

import numpy as np
import pytest

from refimpl.diff.drawing import heat_png, histogram_svg, scale_png, strip_png, verdict_colour
from refimpl.diff.picture import BINS, Picture

from .test_diff_pictures import levels


def pictured(equal=0, counts=None, lost=0):
    """A picture with this histogram: bin -> elements."""
    bins = [(counts or {}).get(k, 0) for k in range(BINS)]
    return Picture(
        axes=("S", "D"),
        rows=("S",),
        columns=("D",),
        size=(1, 1),
        ends=((0,), (0,)),
        heat=np.zeros((1, 1)),
        strip=np.zeros(1),
        unseen=0,
        equal=equal,
        counts=(*bins, lost),
        worst=(),
    )


DRAWN = {
    "equal, far apart, lost": (
        pictured(12, {3: 1, 20: 1500, 21: 30}, 2),
        3.2e-7,
        """
<svg viewBox="0 0 560 140" role="img" aria-label="elements by error: equal: 12; 3e-17 to 1e-16: 1; 1e-08 to 3e-08: 1,500; \
3e-08 to 1e-07: 30; NaN or infinite: 2">
<rect x="1.0" y="76.3" width="22.3" height="33.7"><title>equal: 12 elements</title></rect>
<rect x="25.3" y="100.9" width="22.3" height="9.1"><title>3e-17 to 1e-16: 1 elements</title></rect>
<rect x="439.3" y="14.0" width="22.3" height="96.0"><title>1e-08 to 3e-08: 1,500 elements</title></rect>
<rect x="463.6" y="64.9" width="22.3" height="45.1"><title>3e-08 to 1e-07: 30 elements</title></rect>
<rect x="536.7" y="95.6" width="22.3" height="14.4"><title>NaN or infinite: 2 elements</title></rect>
<text x="48.7" y="124" text-anchor="middle">1e-16</text>
<text x="146.1" y="124" text-anchor="middle">1e-14</text>
<text x="243.5" y="124" text-anchor="middle">1e-12</text>
<text x="340.9" y="124" text-anchor="middle">1e-10</text>
<text x="438.3" y="124" text-anchor="middle">1e-8</text>
<text x="12.2" y="124" text-anchor="middle">0</text>
<text x="547.8" y="124" text-anchor="middle">NaN</text>
<path d="M511.6 8V110" class="limit"/><text x="511.6" y="137" text-anchor="middle" class="limit">allowed</text>
</svg>""",
    ),
    "one bin, the limit at its edge": (
        pictured(0, {30: 7}),
        1e-3,
        """
<svg viewBox="0 0 560 140" role="img" aria-label="elements by error: 1e-03 to 3e-03: 7">
<rect x="255.5" y="14.0" width="48.9" height="96.0"><title>1e-03 to 3e-03: 7 elements</title></rect>
<text x="152.7" y="124" text-anchor="middle">1e-4</text>
<text x="356.4" y="124" text-anchor="middle">1e-2</text>
<path d="M254.5 8V110" class="limit"/><text x="254.5" y="137" text-anchor="middle" class="limit">allowed</text>
</svg>""",
    ),
    "the last bin, where nothing may differ": (
        pictured(0, {47: 3}),
        0.0,
        """
<svg viewBox="0 0 560 140" role="img" aria-label="elements by error: 3e+05 to 1e+06: 3">
<rect x="255.5" y="14.0" width="48.9" height="96.0"><title>3e+05 to 1e+06: 3 elements</title></rect>
<text x="101.8" y="124" text-anchor="middle">1e4</text>
<text x="305.5" y="124" text-anchor="middle">1e6</text>
<text x="509.1" y="124" text-anchor="middle">1e8</text>
</svg>""",
    ),
    "all equal, a limit below the first bin": (
        pictured(5),
        1e-25,
        """
<svg viewBox="0 0 560 140" role="img" aria-label="elements by error: equal: 5">
<rect x="1.0" y="14.0" width="48.9" height="96.0"><title>equal: 5 elements</title></rect>
<text x="254.5" y="124" text-anchor="middle">1e-18</text>
<text x="458.2" y="124" text-anchor="middle">1e-16</text>
<text x="25.5" y="124" text-anchor="middle">0</text>
<path d="M254.5 8V110" class="limit"/><text x="254.5" y="137" text-anchor="middle" class="limit">allowed</text>
</svg>""",
    ),
    "nothing at all": (
        pictured(),
        0.0,
        """
<svg viewBox="0 0 560 140" role="img" aria-label="elements by error: ">
<text x="254.5" y="124" text-anchor="middle">1e0</text>
<text x="458.2" y="124" text-anchor="middle">1e2</text>
</svg>""",
    ),
}
"""Recorded, and looked at in a browser: bars as high as the logarithm of their count, a pixel apart, numbers under their edges."""


@pytest.mark.parametrize("name", DRAWN)
def test_a_histogram_is_drawn_as_it_was_looked_at(name):
    """Catches bars on top of each other, a number under another bin's edge or over NaN, a limit beside its place."""
    picture, allowed, drawn = DRAWN[name]
    assert histogram_svg(picture, allowed) == drawn.replace("\n", "")


def palette(address):
    """The colours of a PNG: its second chunk."""
    data = base64.b64decode(address.partition(",")[2])
    (n,) = struct.unpack(">I", data[33:37])
    assert data[37:41] == b"PLTE"
    return [tuple(data[41 + i : 44 + i]) for i in range(0, n, 3)]


def hsl(hue, saturation, lightness):
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue / 360, lightness, saturation))


def test_a_map_shows_decades_below_its_largest_error():
    """Catches another level or colour than the module's words give: 1 none, 2 four decades below the largest or more, 254 the
    largest, 255 no number, 0 not compared; blue, the darker the larger.
    """
    heat = np.array([[0.0, 3e-3, 3e-5, 2.9e-7, 1e-12], [np.nan, np.inf, 1e-3, 3e-7, 1e-4]])
    expected = [[0 if math.isnan(e) else 1 if e == 0 else 255 if math.isinf(e) else None for e in row] for row in heat]
    for r, c in np.ndindex(*heat.shape):
        if expected[r][c] is None:
            decades = min(max(math.log10(heat[r, c] / 3e-3), -4.0), 0.0)
            expected[r][c] = 2 + round(252 * (1 + decades / 4))
    drawn = heat_png(dataclasses.replace(pictured(), heat=heat))
    assert levels(drawn) == expected
    blues = [hsl(210, 0.6, 0.9 - 0.7 * i / 252) for i in range(253)]
    assert palette(drawn) == [(255, 255, 255), hsl(210, 0.6, 0.95), *blues, (0, 0, 0)] == palette(scale_png())
    assert levels(scale_png()) == [list(range(2, 255))]
    for none in (np.zeros((1, 2)), np.array([[np.inf, np.nan]])):
        shown = levels(heat_png(dataclasses.replace(pictured(), heat=none)))
        assert shown == ([[1, 1]] if none[0, 0] == 0 else [[255, 0]])


def test_a_strip_shows_error_over_what_is_allowed():
    """Catches another level or colour than the module's words give: within, 1 to 127, blue; beyond, 128 to 255, six decades of
    orange; 0 not compared.
    """
    strip = np.array([0, 1e-9, 0.5, 1, 1.001, 10, 3e4, 1e6, 1e12, np.inf, np.nan])
    expected = [0 if math.isnan(r) else 1 + round(126 * r) if r <= 1 else 255 if math.isinf(r) else None for r in strip]
    for i, r in enumerate(strip):
        if expected[i] is None:
            expected[i] = 128 + round(127 * min(math.log10(r) / 6, 1.0))
    for allowed in (1.0, 2.0**-20):
        drawn = strip_png(dataclasses.replace(pictured(), strip=strip * allowed), allowed)
        assert [row[0] for row in levels(drawn)] == expected
    within = [hsl(210, 0.6, 0.96 - 0.2 * i / 126) for i in range(127)]
    beyond = [hsl(25, 0.9, 0.34 - 0.29 * i / 127) for i in range(128)]
    assert palette(drawn) == [(255, 255, 255), *within, *beyond]
    assert levels(strip_png(dataclasses.replace(pictured(), strip=np.array([0.0, 1e-30])), 0.0)) == [[1], [255]]
    assert verdict_colour(math.inf, ok=False) == beyond[-1] and verdict_colour(9.0, ok=True) == within[-1]
    assert verdict_colour(math.nan, ok=False) == beyond[-1] and verdict_colour(0.1, ok=False) == beyond[0]
