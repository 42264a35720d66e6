"""One implementation in one case: made, recorded and judged by the commands that the page prints."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from typing import Any

from places import places
from ports import Port

import refimpl
from refimpl.autograd.errors import require
from refimpl.cli import main

Row = dict[str, Any]


def base(port: Port, case: str) -> Row:
    """What was run, and in which versions."""
    return {"port": port.name, "case": case, "refimpl": refimpl.__version__, "versions": port.versions()}


def row(port: Port, case: str) -> Row:
    """Make the case, record and judge it in the current folder; -> what was seen."""
    found = base(port, case)
    make, record, judge = port.commands(case)
    start = time.perf_counter()
    code, _, said = _command(make)
    require(code == 0, f"refimpl {make}: {said}")
    code, _, said = _command(record)
    if code:
        theirs = " raises " in said.partition(":")[0]  # else the adapter says why not
        return found | {"verdict": "RAISES" if theirs else "REFUSED", "why": said, "seconds": _since(start)}
    code, out, said = _command(f"{judge} --json")
    require(code != 3, f"refimpl {judge}: {said}")
    return found | _seen(json.loads(out), port) | {"notes": said.splitlines(), "seconds": _since(start)}


def _command(words: str) -> tuple[int, str, str]:
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = main(shlex.split(words))
    return code, out.getvalue(), said.getvalue().removeprefix("refimpl: ").strip()


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def _seen(report: dict[str, Any], port: Port) -> Row:
    """Of the diff's report what the page needs."""
    blamed = [f for f in report["findings"] if not f["ok"]]
    logits = [f["chained"] for f in report["findings"] if f["tap"] == "fwd/logits"]
    return {
        "verdict": report["verdict"],
        "taps": len(report["findings"]),
        "failed": [
            f"{g['name']}: {g['text']}" for g in report["gates"] if g["state"] != "ok" and g["name"] not in _SAID
        ],
        "blamed": {f["tap"]: {k: f[k] for k in ("error", "allowed", "lean", "upright")} for f in blamed},
        "open": sum(f["open"] for f in report["findings"]),
        "causes": [{k: c[k] for k in ("id", "title", "taps")} for c in report["causes"]],
        "logits": logits[0] if logits else None,
        "layouts": report["layouts"],
        "gauges": [*report["gauges"], *(f"dialect {k}={v}" for k, v in report["contested"].items())],
        "places": places(port.name, [*(c["title"] for c in report["causes"]), *(f["stage"] for f in blamed)]),
    }


_SAID = ("local", "chained")
"""Gates that say again which taps are blamed."""
