"""A judgement as SARIF 2.1.0, for code scanning: rules are stages and gates, results blamed taps, known mistakes a taxonomy.

What could not be decided is a result of kind "open", a contested dialect one of kind "review"; neither fails a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from refimpl.layers.fp8_parts import SCALE
from refimpl.layers.stage import STAGES
from refimpl.version import __version__

from .compare import Finding
from .diagnose import Diagnosis
from .fp8_rules import RULES
from .gates import Gate
from .gradients import gradient
from .judge import Judgement

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
CORPUS = "refimpl corpus"
"""The taxonomy of known mistakes."""
DIALECT = "dialect"
_KINDS = {"FAIL": ("fail", "error"), "?": ("open", "none")}


def to_sarif(j: Judgement, trace: PurePath | None = None) -> str:
    """The JSON text; `trace`, the candidate's file, is where results lie."""
    results = [*_gates(j), *_findings(j), *_contested(j)]
    rules = list(dict.fromkeys(r["ruleId"] for r in results))
    for r in results:
        r["ruleIndex"] = rules.index(r["ruleId"])
        if trace is not None:
            uri = trace.as_uri() if trace.is_absolute() else quote(trace.as_posix())
            place = {"artifactLocation": {"uri": uri}}
            r["locations"] = [{**lo, "physicalLocation": place} for lo in r.get("locations", [{}])]
    driver = {"name": "refimpl", "version": __version__, "rules": [_rule(name) for name in rules]}
    ended = {"executionSuccessful": True, "exitCode": j.exit_code, "exitCodeDescription": j.verdict}
    run: dict[str, Any] = {"tool": {"driver": driver}, "invocations": [ended], "results": results}
    if known := [d for d in j.causes if d.id]:
        run["taxonomies"] = [{"name": CORPUS, "version": __version__, "taxa": [t for d in known for t in _taxa(d)]}]
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1)


def _rule(name: str) -> dict[str, Any]:
    short, full = _described(name)
    return {"id": name, "shortDescription": {"text": short}} | ({"fullDescription": {"text": full}} if full else {})


def _described(name: str) -> tuple[str, str]:
    """What a rule is about, and its equation or "": a stage, the gradient by one or by a kind of weights, codes, a gate."""
    side, _, of = name.partition("/")
    if stage := STAGES.get(name):
        return stage.what, f"{stage.eq}: {_first(stage.__doc__)}"
    if side in ("bwd", "grad"):
        by = STAGES[of].what if of in STAGES else f"the weight {of}"
        return f"gradient by {by}", f"R 3.2.1: {_first(gradient.__doc__)}"
    if name in RULES:
        return f"{'scales' if name == SCALE else 'codes'} of what an FP8 product reads", RULES[name]
    if name == DIALECT:
        return "a point on which released implementations differ", ""
    return f"the gate {name.removeprefix('gate.')}", ""


def _first(doc: str | None) -> str:
    return (doc or "").partition("\n")[0]


def _taxa(d: Diagnosis) -> Iterator[dict[str, Any]]:
    for one in (d, *d.rivals):
        yield {"id": one.id, "shortDescription": {"text": one.title}, "properties": {"threads": list(one.threads)}}


def _result(rule: str, kind: str, level: str, text: str) -> dict[str, Any]:
    return {"ruleId": rule, "kind": kind, "level": level, "message": {"text": text}}


def _gates(j: Judgement) -> Iterator[dict[str, Any]]:
    yield from (_result(f"gate.{g.name}", *_KINDS[g.state], _said(g)) for g in j.gates if g.state in _KINDS)


def _said(g: Gate) -> str:
    return f"{g.name}: {g.text}"


def _findings(j: Judgement) -> Iterator[dict[str, Any]]:
    for f in j.findings:
        if f.ok and not f.open:
            continue
        found = [d for d in j.causes if f.tap in d.taps]
        result = _result(f.stage, *_KINDS["?" if f.ok else "FAIL"], _text(f, found))
        logical = {"name": f.tap.rpartition("/")[2], "fullyQualifiedName": f.tap, "kind": "variable"}
        result |= {"locations": [{"logicalLocations": [logical]}], "partialFingerprints": {"tap/v1": f.tap}}
        if known := [{"id": id, "toolComponent": {"name": CORPUS}} for d in found for id in d.ids]:
            result["taxa"] = known
        numbers = {k: getattr(f, k) for k in ("error", "allowed", "lean", "upright")}
        result["properties"] = {k: x for k, x in numbers.items() if math.isfinite(x)} | {"region": list(f.places)}
        yield result


def _text(f: Finding, found: list[Diagnosis]) -> str:
    parts = [f.note] if f.ok else [f"error {f.error:.1e}, allowed {f.allowed:.1e}", f.note, *[d.said for d in found]]
    return f"{f.tap}: " + "; ".join([p for p in parts if p])


def _contested(j: Judgement) -> Iterator[dict[str, Any]]:
    for name, value in j.contested.items():
        yield _result(DIALECT, "review", "none", f"{name}={value} was not declared and reproduces the candidate")
