"""What is written of a judgement, to the letter: of made ones with a finding of every kind, against files that a person has read.

A file is what the function gives. After a wanted change read the new text as carefully as the old one was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refimpl.diff import render, to_json
from refimpl.diff.compare import Finding
from refimpl.diff.diagnose import Diagnosis
from refimpl.diff.drawing import heat_png, histogram_svg, scale_png, strip_png
from refimpl.diff.gates import Gate
from refimpl.diff.judgement import Judgement
from refimpl.diff.picture import Entry, Picture
from refimpl.diff.report import wrapped
from refimpl.diff.sarif import to_sarif
from refimpl.diff.section import section
from refimpl.layers.stage import STAGES
from refimpl.version import __version__

WRITTEN = Path(__file__).parents[1] / "cases" / "written"
Q, IDS, LOGITS = "fwd/L1/mla.q", "fwd/L1/router.ids", "fwd/logits"
ROPE = Diagnosis("A1", "rotated < late", ("a #1", "b #2", "c #3", "d #4"), ("fwd/L0/mla.q", Q))
TIED = Diagnosis("R2", "grouped", (), (IDS,), "tied")
BIAS = Diagnosis("R1", "biased", ("e #5",), (IDS,), rivals=(TIED,), same=True)
NARROW = Diagnosis("", "declare bfloat16", (), ("bwd/L1/mla.q",))
UNSEEN = Gate("coverage", "?", "3 unseen", ("fwd/L0/mask", "fwd/L1/resid", "fwd/logits"))


def number(tap: str, error: float, allowed: float, **more: object) -> Finding:
    """A finding on a tap of numbers, whose stage is named like it."""
    given: dict[str, object] = {"note": "" if error <= allowed else "off", "chained": error, "twin": allowed / 4}
    given |= {"lean": error / 2, "upright": allowed / 8, "region": (tap,)} | more
    stage = str(given.pop("stage", tap.rpartition("/")[2]))
    return Finding(tap, stage, error <= allowed, error, allowed=allowed, **given)  # type: ignore[arg-type]


def bad() -> Judgement:
    """Taps that conform, that a known mistake explains, one of two, or none; of numbers, of ids, of gradients; not finite."""
    skipped = tuple(f"fwd/L1/{n}" for n in ("attn_norm", "mla.q_a", "mla.q_a_norm", "mla.q_b", "mask", "x", "y"))
    findings = [
        number("fwd/embed", 0.0, 0.0),
        number("fwd/L0/attn_norm", 3e-7, 2e-6),
        number("fwd/L0/mla.q", 2e-2, 1e-5, note="worst row [0, 1], 3 of 4 rows affected"),
        number(Q, 3e-2, 1e-5, note="worst row [0, 3], 2 of 4 rows affected", region=(*skipped, Q)),
        number("fwd/L0/router.ids", 0.0, 0.0),
        number(IDS, 0.25, 0.0, note="2 of 8 tokens choose others", region=("fwd/L1/router.groups", IDS)),
        number("dec8/L1/resid", 0.0, 0.0, open=True, note="no token's experts are beyond rounding"),
        number("fwd/L1/act.scale", 2.0, 0.0, note="a scale is another"),
        number("fwd/L1/act.q", 3.0, 0.0),
        number(LOGITS, math.inf, 1e-4, note="1 elements are NaN or infinite", chained=math.nan),
        number("bwd/L1/mla.q", 2e-5, 1e-5, stage="bwd/mla.q"),
        number("grad/model.layers.0.o_proj.weight", 2e-5, 1e-5, stage="grad/o_proj"),
    ]
    gates = [Gate("inputs", "ok", "as in the case"), Gate("weights", "FAIL", "1 of 9 differs", ("w",)), UNSEEN]
    found = Judgement(gates, findings, diagnosis=lambda: [ROPE, BIAS, NARROW])
    found.notes = {"transposed": [], "flattened": ["a", "b", "c", "d", "e"]}
    found.gauges, found.contested = {"half pairs": ["fwd/L0/mla.k_rope"]}, {"moe_weights": "late"}
    found.unknown = {f"n{i}": f"fwd/L{i}/resid" for i in range(8)} | {"odd": ""}
    found.layouts = {"fwd/L0/mla.q": "B S H Dn"}
    return found


def wide() -> Judgement:
    """More stages, layers, phases, causes than are shown; a mistake in some layers, some with gaps, the MTP modules among them."""
    stages = [f"s{i}" for i in range(8)]
    findings = [
        number(f"fwd/L{i}/{s}", 10.0 ** (i - 3), 1e-3, region=(f"fwd/L{i}/a", f"fwd/L{i}/{s}"))
        for s in stages
        for i in (0, 1, 3)
    ]
    findings += [number(f"{phase}/mtp1/{s}", 1e-2, 1e-3) for s in stages[:2] for phase in ("fwd", "dec8")]
    findings += [number("fwd/final_norm", 1.0, 1e-3, region=tuple(f"fwd/L2/{n}" for n in ("a", "b", "mask", "c")))]
    causes = [Diagnosis(f"C{i}", f"cause {i}", (), (f"fwd/L0/s{i}", f"fwd/L1/s{i}")) for i in range(6)]
    causes[5] = replace(causes[5], taps=tuple(f.tap for f in findings[15:24]))
    return Judgement([Gate("inputs", "ok", "as in the case")], findings, diagnosis=lambda: causes)


def quiet() -> Judgement:
    """All conforms; of one tap that drifts as much as is usual, nothing is said."""
    findings = [number("fwd/embed", 0.0, 0.0), number("fwd/L0/resid", 1e-7, 1e-6, chained=0.9e-4)]
    return Judgement([Gate("inputs", "ok", "as in the case"), Gate("coverage", "ok", "all")], findings)


def open_() -> Judgement:
    """Nothing is wrong and something was not seen; behind a gauge, an id is another than in our own run."""
    findings = [
        number("fwd/L0/resid", 1e-7, 1e-6, chained=1.1e-4),
        number("fwd/L1/router.groups", 0.0, 0.0, chained=0.1),
    ]
    return Judgement([UNSEEN], findings, gauges={"half pairs": ["fwd/L0/mla.k_rope"] * 4})


def text(j: Judgement) -> str:
    """The report, and the long one with a single stage."""
    return f"{render(j)}\n{'=' * 40}\n{render(j, everything=True, stages=1)}\n"


def sarif(path: Path | None) -> str:
    """Without what the rules say of stages, which is the stages' own."""
    log = json.loads(to_sarif(bad(), path))
    for rule in log["runs"][0]["tool"]["driver"]["rules"]:
        if stage := STAGES.get(rule["id"]):
            assert rule.pop("shortDescription") == {"text": stage.what}
            assert rule.pop("fullDescription") == {"text": f"{stage.eq}: {(stage.__doc__ or '').splitlines()[0]}"}
    return json.dumps(log, indent=1) + "\n"


def sections() -> str:
    """Sections of the page, a tag a line, without their drawings."""
    entries = (Entry((0, 3), 1.25, 1.0, 0.25), Entry((1, 0), -2e-7, math.nan, math.inf))
    heat, strip = np.array([[0, 1e-3], [np.nan, 2e-2]]), np.array([1e-3, np.nan])
    ends, counts = ((0, 0), (1, 64)), (*range(48), 2)
    pooled = Picture(
        ("B", "S", "H", "D"), ("B", "S"), ("H", "D"), (130, 96), ends, heat, strip, 1200, 3, counts, entries
    )
    plain = Picture(
        ("B", "V"), ("B",), ("V",), (40, 85), ((0,), (39,)), np.full((40, 85), 1e-5), np.zeros(40), 0, 0, (0,) * 49, ()
    )
    of = {f.tap: f for f in bad().findings}
    shown = [("fwd/embed", pooled, True), ("fwd/L0/attn_norm", pooled, True), (Q, pooled, True), (LOGITS, plain, True)]
    shown += [(IDS, None, True), ("fwd/L0/mla.q", pooled, False), ("fwd/L0/attn_norm", pooled, False)]
    shown += [("fwd/L0/attn_norm", None, False), (LOGITS, None, False)]
    lines = []
    for tap, picture, drawn in shown:
        page = "\n".join(section(replace(of[tap], picture=picture), bad().causes, picture=drawn))
        for name, drawing in _drawings(picture, of[tap].allowed) if picture else ():
            assert not drawn or name == "SCALE" or drawing in page
            page = page.replace(drawing, name)
        lines.append(page.replace("><", ">\n<"))
    return "\n\n".join(lines) + "\n"


def _drawings(p: Picture, allowed: float) -> tuple[tuple[str, str], ...]:
    return (
        ("HEAT", heat_png(p)),
        ("STRIP", strip_png(p, allowed)),
        ("HISTOGRAM", histogram_svg(p, allowed)),
        ("SCALE", scale_png()),
    )


FILES: dict[str, Callable[[], str]] = {
    "bad.txt": lambda: text(bad()),
    "wide.txt": lambda: text(wide()),
    "quiet.txt": lambda: text(quiet()),
    "open.txt": lambda: text(open_()),
    "narrow.txt": lambda: wrapped(render(bad()), 60) + "\n",
    "bad.json": lambda: to_json(bad()) + "\n",
    "bad.sarif": lambda: sarif(None),
    "sections.html": sections,
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_what_was_read(name: str) -> None:
    """Catches a word, a number, a tap, a tag or a line that is another, missing, or too much."""
    made = FILES[name]().replace(f'"version": "{__version__}"', '"version": "VERSION"')
    assert made == (WRITTEN / name).read_text(encoding="utf-8")


def test_results_lie_in_the_file_that_was_judged() -> None:
    """Catches results without a place, or in another file: each beside what it says without one."""
    plain, placed = (json.loads(sarif(path))["runs"][0]["results"] for path in (None, Path("a b/c")))
    for one, other in zip(plain, placed, strict=True):
        where = [
            {**place, "physicalLocation": {"artifactLocation": {"uri": "a%20b/c"}}}
            for place in one.get("locations", [{}])
        ]
        assert other == one | {"locations": where}
