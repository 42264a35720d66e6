"""docs/ports.md of the rows: verdicts by regime, then what each implementation does otherwise, and how to see it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from deviations import Deviation, deviations
from ports import CASES, PLAIN, PORTS, Port

from refimpl.record.regimes import REGIMES

Row = dict[str, Any]

_HEAD = """<!-- generated: `python benchmarks/ports/run.py`, from benchmarks/ports/rows.jsonl; nothing below is written by hand -->

# The state of the ports

Implementations of DeepSeek-V3 that anyone can install, unchanged, each run on a CPU on preset tiny and in every regime
(`refimpl case --regimes`), recorded by `refimpl record` and judged by `refimpl diff`. An error is that of a stage fed with the
implementation's own inputs, relative to the row's norm; what is allowed is measured on twins that round otherwise
([docs/diff.md](diff.md)). The weights are random and large, so that mistakes show: how far logits move on a released model is
another question. Adapters hand over dequantised weights. How each implementation is run and watched, and what stands in for a GPU's
kernels: [docs/recording.md](recording.md). Again, or with other versions: [benchmarks/ports](../benchmarks/ports/README.md).

A number is a deviation and a letter a reason, both of the implementation's section. Bold: a stage gives other numbers than it
should. Contested: conforming in a dialect that is named there, of which released code has had both ways. Where
the source does it was looked up once (`benchmarks/ports/places.toml`) and is asked of the version that ran.
"""
_WORDS = {
    "CONFORMS": "conforms",
    "CONFORMS_IN_GAUGE": "in gauge",
    "CONTESTED": "contested",
    "DIVERGES": "diverges",
    "INCONCLUSIVE": "inconclusive",
    "REFUSED": "not run",
    "RAISES": "raises",
    "CRASHED": "aborts",
}


def rendered(rows: list[Row]) -> str:
    """The page."""
    ports = [p for p in PORTS.values() if any(r["port"] == p.name for r in rows)]
    by_port = {p.name: {c: r for c in CASES for r in rows if (r["port"], r["case"]) == (p.name, c)} for p in ports}
    sections = ["\n".join(_section(p, by_port[p.name])) for p in ports]
    return "\n".join([_HEAD, *_table(ports, by_port), "", *sections])


def _table(ports: list[Port], by_port: dict[str, dict[str, Row]]) -> Iterator[str]:
    yield f"| regime | {' | '.join(p.name for p in ports)} |"
    yield "|---" * (len(ports) + 1) + "|"
    marks = {p.name: _marks(p, by_port[p.name]) for p in ports}
    for case in CASES:
        cells = [_cell(by_port[p.name].get(case), marks[p.name].get(case, [])) for p in ports]
        yield f"| `{case}` | {' | '.join(cells)} |"


def _cell(r: Row | None, marks: list[str]) -> str:
    if r is None:
        return ""
    word = _WORDS[r["verdict"]]
    return " ".join([f"**{word}**" if r.get("blamed") else word, *marks])


def _marks(port: Port, rows: dict[str, Row]) -> dict[str, list[str]]:
    """Case -> the numbers of the deviations and the letters of the reasons that it shows."""
    found: dict[str, list[str]] = {}
    for n, d in enumerate(deviations(rows), 1):
        for case in d.errors:
            found.setdefault(case, []).append(str(n))
    for letter, (_, cases) in zip(_LETTERS, _reasons(rows).items(), strict=False):
        for case in cases:
            found.setdefault(case, []).append(letter)
    return found


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _reasons(rows: dict[str, Row]) -> dict[str, list[str]]:
    """Why something was not run, or which gate did not pass -> cases."""
    found: dict[str, list[str]] = {}
    for case, r in rows.items():
        for why in [r["why"]] if "why" in r else [*r["failed"], *r["gauges"]]:
            found.setdefault(why, []).append(case)
    return found


# ---- One implementation


def _section(port: Port, rows: dict[str, Row]) -> Iterator[str]:
    conform = sum(r["verdict"] == "CONFORMS" for r in rows.values())
    yield f"## {port.name}\n"
    yield f"{_versions(rows.values())}; `pip install 'deepseek-v3-refimpl[{port.extra}]'`."
    yield f"{conform} of {len(rows)} cases conform{_far(rows)}; {_seen(rows.values())}.\n"
    for n, d in enumerate(deviations(rows), 1):
        yield from _deviation(n, d, port, rows)
    for letter, (why, cases) in zip(_LETTERS, _reasons(rows).items(), strict=False):
        yield _wrapped(f"- **{letter}** {_ticked(cases)}: {why}", "  ")
    if _reasons(rows):
        yield ""


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, 136, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _versions(rows: Iterable[Row]) -> str:
    """Every set of versions that a row was made with."""
    sets = {", ".join(f"{p} {v}" for p, v in r["versions"].items()) + f", refimpl {r['refimpl']}" for r in rows}
    return " and ".join(sorted(sets))


def _far(rows: dict[str, Row]) -> str:
    """How far the logits of the plain case are from ours in float64."""
    far = rows.get(PLAIN, {}).get("logits")
    return f", logits of `{PLAIN}` are {far:.1e} from ours" if far is not None else ""


def _seen(rows: Iterable[Row]) -> str:
    some = [r for r in rows if "taps" in r]
    taps = [r["taps"] for r in some]
    return (
        f"{min(taps)} to {max(taps)} taps seen, at most {max(r['seconds'] for r in some):.0f} s a case"
        if some
        else "none ran"
    )


def _deviation(n: int, d: Deviation, port: Port, rows: dict[str, Row]) -> Iterator[str]:
    case = next(c for c in rows if c in d.errors)
    error, allowed, tap = d.worst()
    ids = f" ({', '.join(f'`{i}`' for i in d.ids)})" if d.ids else ""
    text = f"{n}. **{d.title}**{ids}, in {_ticked(d.errors)}: {', '.join(f'`{s}`' for s in d.stages)}."
    text += f" At most {_number(error)} at `{tap}`, where {allowed:.1e} is allowed{d.note()}."
    text += f" In the source: {'; '.join(d.places)}." if d.places else ""
    yield _wrapped(text, "   ")
    yield "\n".join(["", "   ```sh", *(f"   refimpl {c}" for c in port.commands(case)), "   ```", ""])


def _number(x: float | None) -> str:
    return f"{x:.1e}" if x is not None else "NaN or infinity"


def _ticked(cases: Iterable[str]) -> str:
    cases = list(cases)
    if len(cases) > len(REGIMES) // 2:
        return f"{len(cases)} of {len(CASES)} cases"
    return ", ".join(f"`{c}`" for c in cases)
