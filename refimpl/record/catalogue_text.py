"""The catalogue of taps as text, as JSON, and as the tables of docs/taps.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from refimpl.autograd.errors import require
from refimpl.diff.names import frameworks

from .catalogue import Entry, everything

COMPARED = {
    "value": "row by row, |difference| / |row|, against what twins of the stage err by",
    "exact": "element by element, no difference allowed",
    "set": "as a set along the last axis, no difference allowed",
    "gauge": "as value, after undoing a declared layout of the rotated channels",
    "distribution": "as value",
    "given": "not at all: later stages are replayed on it",
}
"""Comparison class -> how the diff compares such a tap."""
GROUPS = {
    "": "Around every block",
    "mla": "Attention",
    "cache": "Cache (decoding, and prefill in parts)",
    "router": "Router",
    "mlp": "Dense feed-forward",
    "moe": "Experts",
    "mtp": "Multi-token prediction (`fwd/mtp1/...`: there `mtp.` is left out)",
    "loss": "Losses",
    "optim": "The optimiser (`upd/grad_norm`; `weight` is any: `upd/model.norm.weight`, `upd/model.norm.weight.exp_avg.before`)",
    "variant": "Described in articles, not in V3 ([variants.md](variants.md))",
}
_HOME = {"attn_out": "mla", "shared": "moe", "int8": "variant"}
"""Taps, or first words of taps, that belong to another group than their own first word."""


def render(entries: Sequence[Entry]) -> str:
    """One line a tap: name, axes, sizes where there is a run, dtype class, comparison, what it is, what it is computed from."""
    rows = [_columns(e) for e in entries]
    heads = ("tap", "axes", "shape", "dtype", "compared", "what", "from")
    widths = [max(len(r[i]) for r in [heads, *rows]) for i in range(len(heads))]
    return "\n".join(["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in [heads, *rows]])


def _columns(e: Entry) -> tuple[str, ...]:
    shape = "" if e.shape is None else "x".join(map(str, e.shape)) or "scalar"
    return (e.tap, _axes(e), shape, e.kind, e.stage.compare, e.stage.what, ", ".join(_folded(e.sources)))


def _axes(e: Entry) -> str:
    return e.stage.shape or "scalar"


def _folded(sources: Iterable[str]) -> Iterator[str]:
    """The experts' weights as one: `...experts.e.gate_proj.weight`."""
    yield from dict.fromkeys(re.sub(r"(?<=\.experts\.)\d+", "e", s) for s in sources)


def to_json(entries: Sequence[Entry]) -> str:
    """schema refimpl-taps/1: per tap everything that `Entry` holds, and its names in other implementations."""
    known = frameworks()

    def body(e: Entry) -> dict[str, Any]:
        last = e.tap.rpartition("/")[2]
        return {
            "tap": e.tap,
            "stage": e.stage.name,
            "what": e.stage.what,
            "equation": e.equation,
            "report": e.stage.eq,
            "axes": e.stage.shape.split(),
            "shape": None if e.shape is None else list(e.shape),
            "dtype": e.kind,
            "compare": e.stage.compare,
            "from": list(e.sources),
            "elsewhere": {f.name: f.says(last) for f in known if f.says(last)},
        }

    return json.dumps({"schema": "refimpl-taps/1", "taps": [body(e) for e in entries]}, indent=1)


# ---- The tables of docs/taps.md

_MARKS = re.compile(r"(<!-- generated: (\w+)[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def rewritten(page: str) -> str:
    """The page with what stands between its marks made anew. SpecError for a mark that is not known."""
    tables = {"compared": _compared, "taps": _taps, "elsewhere": _elsewhere, "variants": _variants}

    def fill(found: re.Match[str]) -> str:
        require(found[2] in tables, f"no table {found[2]!r}; there are {', '.join(tables)}")
        return f"{found[1]}\n" + "\n".join(tables[found[2]]()) + f"\n\n{found[3]}"

    return _MARKS.sub(fill, page)


def group(e: Entry) -> str:
    """The key of GROUPS under which a tap is listed."""
    first = e.stage.name.partition(".")[0]
    return _HOME.get(first, first if first in GROUPS else "")


def _taps() -> Iterator[str]:
    entries = everything()
    for key, title in GROUPS.items():
        yield from (
            f"### {title}",
            "",
            "| tap | what | axes | dtype | compared | equation | from |",
            "|---|---|---|---|---|---|---|",
        )
        for e in entries:
            if group(e) == key:
                text = f"{e.equation} ({e.stage.eq})"
                sources = ", ".join(f"`{s}`" for s in _folded(e.sources))
                yield _row(f"`{e.tap}`", e.stage.what, _axes(e), e.kind, e.stage.compare, text, sources)
        yield ""


def _elsewhere() -> Iterator[str]:
    known = frameworks()
    yield _row("tap", *[f.name for f in known])
    yield _row(*["---"] * (1 + len(known)))
    for tap in dict.fromkeys(e.tap for e in everything()):
        names = [f.says(tap) for f in known]
        if any(names):
            yield _row(f"`{tap}`", *names)
    yield ""
    yield from (f"- **{f.name}**: {f.version}. {f.note}" for f in known)


def _variants() -> Iterator[str]:
    yield from ("| stage | computes | axes | source |", "|---|---|---|---|")
    for e in everything():
        if group(e) == "variant":
            yield _row(f"`{e.stage.name}`", e.equation, _axes(e), e.stage.eq)


def _compared() -> Iterator[str]:
    yield from (f"- `{name}`: {how}." for name, how in COMPARED.items())


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
