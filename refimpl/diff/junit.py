"""A judgement as JUnit XML, for continuous integration: a test case a tap, in a suite a stage, and one a gate."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from .compare import Finding
from .gates import Gate
from .judge import Judgement


def to_junit(j: Judgement) -> str:
    """The XML text. A gate that could not decide is skipped, with its reason."""
    root = Element("testsuites", name="refimpl diff")
    gates = SubElement(root, "testsuite", name="gates")
    for g in j.gates:
        _gate(SubElement(gates, "testcase", classname="gates", name=g.name), g)
    by_stage: dict[str, list[Finding]] = {}
    for f in j.findings:
        by_stage.setdefault(f.stage, []).append(f)
    for stage, found in by_stage.items():
        suite = SubElement(root, "testsuite", name=stage)
        for f in found:
            case = SubElement(suite, "testcase", classname=stage, name=f.tap)
            if not f.ok:
                because = "; ".join([d.said for d in j.causes if f.tap in d.taps])
                text = f"error {f.error:.1e}, allowed {f.allowed:.1e}; {f.note}" + (f"; {because}" if because else "")
                SubElement(case, "failure", message=text)
            elif f.open:
                SubElement(case, "skipped", message=f.note)
    for suite in root:
        _count(suite)
    indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="unicode")


def _count(suite: Element) -> None:
    """How many cases there are of each kind, which some readers take from the attributes and not from the cases."""
    suite.set("tests", str(len(suite)))
    suite.set("errors", "0")
    for kind, name in (("failure", "failures"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"testcase/{kind}"))))


def _gate(case: Element, g: Gate) -> None:
    if g.state != "ok":
        SubElement(case, "failure" if g.state == "FAIL" else "skipped", message=g.text)
