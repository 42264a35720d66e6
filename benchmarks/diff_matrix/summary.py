"""The matrix in numbers: bugs flagged and placed, innocents left alone, by depth of recording; and gates on the logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from corpus import ENTRIES
from naming import NAMES, among_like, uniquely
from sets import SETS

Row = dict[str, Any]
_HEAD = (
    "| set | dtype | bugs visible | flagged | right stage only | right region | and first tap | others flagged | "
    "innocents flagged | s |"
)


def tables(rows: list[Row]) -> str:
    """Markdown: by set and dtype; other tools' gates; and what is not as it should be, by name."""
    known = [r for r in rows if r["entry"] in ENTRIES]
    order = {name: i for i, name in enumerate(SETS)}
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for r in known:
        groups[order[r["set"]], r["dtype"]].append(r)
    lines = [_HEAD, "|---" * 10 + "|"]
    lines += [_line(list(SETS)[i], dtype, groups[i, dtype]) for i, dtype in sorted(groups)]
    return "\n".join([*lines, "", *_named(known), "", *_gates(known), "", *_wrong(known)])


def _innocent(r: Row) -> bool:
    return ENTRIES[r["entry"]].innocent


def _flagged(r: Row) -> bool:
    return r["verdict"] in ("DIVERGES", "CRASH")


def _line(name: str, dtype: str, rows: list[Row]) -> str:
    bugs, fair = [r for r in rows if not _innocent(r)], [r for r in rows if _innocent(r)]
    visible = [r for r in bugs if r["visible"]]
    flagged = [r for r in visible if _flagged(r)]
    right, region = (sum(r[key] for r in flagged) for key in ("right", "right_region"))
    first = sum(r["right_region"] and r["first"] for r in flagged)
    more = sum(_flagged(r) for r in bugs if not r["visible"])
    alarms = f"{sum(map(_flagged, fair))} of {len(fair)}"
    seconds = sum(r["seconds"] for r in rows) / max(len(rows), 1)
    cells = [name, dtype, f"{len(visible)} of {len(bugs)}", len(flagged), right, region, first]
    return f"| {' | '.join(map(str, cells))} | {more} of {len(bugs) - len(visible)} | {alarms} | {seconds:.2f} |"


def _named(rows: list[Row]) -> Iterable[str]:
    """Of the flagged bugs that the catalogue has, with all taps: named by one mistake, the right one."""
    for dtype in sorted({r["dtype"] for r in rows}):
        some = [r for r in rows if r["set"] == "all" and r["dtype"] == dtype and r["entry"] in NAMES and _flagged(r)]
        right = [r for r in some if uniquely(r["entry"], r["causes"])]
        like = [r for r in some if r not in right and among_like(r["entry"], r["causes"])]
        others = [f"{r['entry']} ({r['case']}-{r['seed']})" for r in some if r not in right and r not in like]
        less = f"; not so: {', '.join(others)}" if others else ""
        more = f"; {len(like)} more with mistakes that compute the same numbers there" if like else ""
        yield f"named uniquely, {dtype}: {len(right)} of {len(some)} flagged bugs of the catalogue{more}{less}"


def _gates(rows: list[Row]) -> Iterable[str]:
    """What the usual gates say of the same recordings; bugs are those visible in all taps."""
    rows = [r for r in rows if r["set"] == "all"]
    clean = {(r["case"], r["seed"], r["dtype"]): r["baselines"] for r in rows if r["entry"] == "clean"}
    gates: dict[str, Callable[[Row], bool]] = {
        "mean cosine of the logits below 0.99": lambda r: not r["baselines"]["cosine"] >= 0.99,
        "KL above twice the clean run's": lambda r: (
            not r["baselines"]["kl"] <= 2 * clean[r["case"], r["seed"], r["dtype"]]["kl"]
        ),
        "1 - 2xy/(xx + yy) of the logits above 1e-3": lambda r: not _statistic(r, "fwd/logits") <= 1e-3,
        "the same of any tap": lambda r: bool(_above(r)),
    }
    yield "| gate | dtype | bugs flagged | first tap right | innocents flagged |"
    yield "|---" * 5 + "|"
    for name, gate in gates.items():
        for dtype in sorted({r["dtype"] for r in rows}):
            some = [r for r in rows if r["dtype"] == dtype and (r["case"], r["seed"], dtype) in clean]
            bugs, fair = [r for r in some if not _innocent(r) and r["visible"]], [r for r in some if _innocent(r)]
            first = sum(_first(r) in ENTRIES[r["entry"]].stages for r in bugs) if "any tap" in name else ""
            yield f"| {name} | {dtype} | {sum(map(gate, bugs))} of {len(bugs)} | {first} | " + (
                f"{sum(map(gate, fair))} of {len(fair)} |"
            )


def _statistic(r: Row, tap: str) -> float:
    return r["baselines"]["statistic"].get(tap, float("inf"))


def _above(r: Row) -> list[str]:
    """Taps above SGLang's default, in model order."""
    return [t for t, v in r["baselines"]["statistic"].items() if not v <= 1e-3]


def _first(r: Row) -> str:
    return next(iter(_above(r)), "").rpartition("/")[2]


def _wrong(rows: list[Row]) -> Iterable[str]:
    """Visible bugs not flagged, bugs placed wrongly although everything was recorded, innocents flagged, crashes."""
    kinds: dict[str, Callable[[Row], bool]] = {
        "innocents flagged": lambda r: _innocent(r) and _flagged(r),
        "crashes": lambda r: r["verdict"] == "CRASH",
        "visible bugs not flagged": lambda r: not _innocent(r) and r["visible"] and not _flagged(r),
        "wrong region": lambda r: not _innocent(r) and _flagged(r) and not r["right_region"],
        "other stages blamed, of all taps": lambda r: (
            not _innocent(r) and r["set"] == "all" and _flagged(r) and r["right_region"] and not r["right"]
        ),
    }
    for name, kind in kinds.items():
        found: dict[str, list[str]] = defaultdict(list)
        for r in filter(kind, rows):
            stages = sorted({t.rpartition("/")[2] for t in r["culprits"]})
            found[r["entry"]].append(
                f"{r['case']}-{r['seed']} {r['dtype']} {r['set']}: {' '.join(stages[:6]) or r['verdict']}"
            )
        yield f"{name}: {len(found)} entries"
        for entry, places in found.items():
            yield f"  {entry} ({len(places)}): {'; '.join(places[:4])}" + ("; ..." if len(places) > 4 else "")
